"""experiments/convert.py: start checkpoints compute what their source says."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from experiments import convert
from scratchdet import VOC_CLASSES, Config, ScratchDet, load_detector

COCO = (  # the 80 names in the order of their ids
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


def randomise(model, rng):
    """Statistics and factors of BN as after training, so that nothing hides behind 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.2, generator=rng)
    return model.eval()


def started(path, *flags, classes=VOC_CLASSES):
    """The network that train.py starts from with --init PATH."""
    args = train.parse_args(["--init", str(path), "--device", "cpu", *flags])
    return train.make_model(args, classes, None, say=lambda text: None)


# ------------------------------------------------------------------------------ ImageNet's VGG-16

LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def imagenet(batchnorm, rng):
    """A state dict with torchvision's names and shapes, from its documented layout."""
    state, i, c_in = {}, 0, 3
    for c in LAYOUT:
        if c == "M":
            i += 1
            continue
        weight = torch.randn(c, c_in, 3, 3, generator=rng) * (2 / (9 * c_in)) ** 0.5
        state |= {f"features.{i}.weight": weight}
        state |= {f"features.{i}.bias": torch.randn(c, generator=rng) * 0.1}
        if batchnorm:
            p = f"features.{i + 1}."
            state |= {p + "weight": 1 + 0.2 * torch.rand(c, generator=rng)}
            state |= {p + "bias": 0.1 * torch.randn(c, generator=rng)}
            state |= {p + "running_mean": 0.1 * torch.randn(c, generator=rng)}
            state |= {p + "running_var": 0.5 + torch.rand(c, generator=rng)}
            state |= {p + "num_batches_tracked": torch.tensor(9)}
        i, c_in = i + (3 if batchnorm else 2), c
    for name, c_in, c in (("0", 25088, 4096), ("3", 4096, 4096), ("6", 4096, 1000)):
        # windows of one short vector: the full matrices would be half a gigabyte of random numbers
        vector = torch.randn(c_in + 7 * c, generator=rng) / c_in**0.5
        state[f"classifier.{name}.weight"] = vector.as_strided((c, c_in), (7, 1))
        state[f"classifier.{name}.bias"] = torch.randn(c, generator=rng) * 0.1
    return state


def official_forward(state, x, batchnorm):
    """conv4_3 and fc7 from the state dict alone."""
    i = 0
    for c in LAYOUT:
        if c == "M":
            if i == (33 if batchnorm else 23):
                conv4_3 = x
            last = i > 40 or (not batchnorm and i > 28)
            x = F.max_pool2d(x, 3, 1, 1) if last else F.max_pool2d(x, 2, 2, ceil_mode=True)
            i += 1
            continue
        x = F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1)
        if batchnorm:
            at = {k: state[f"features.{i + 1}.{k}"] for k in ("running_mean", "running_var")}
            more = {k: state[f"features.{i + 1}.{k}"] for k in ("weight", "bias")}
            x = F.batch_norm(x, **at, **more)
        x, i = F.relu(x), i + (3 if batchnorm else 2)
    new = (1 + 1e-5) ** -0.5 if batchnorm else 1.0  # what a new BN does in evaluation mode
    fc6, b6 = state["classifier.0.weight"], state["classifier.0.bias"]
    y = torch.stack([
        fc6[4 * o].reshape(512, 7, 7)[:, [0, 3, 6]][:, :, [0, 3, 6]] for o in range(1024)
    ])  # fmt: skip
    x = F.relu(new * F.conv2d(x, y, b6[0:4096:4], padding=6, dilation=6))
    rows = torch.arange(0, 4096, 4)
    fc7 = state["classifier.3.weight"][rows][:, rows, None, None]
    return conv4_3, F.relu(new * F.conv2d(x, fc7, state["classifier.3.bias"][rows]))


@pytest.mark.parametrize(("bn", "batchnorm"), [("head", False), ("all", True)])
def test_pretrained_vgg16_computes_what_the_file_says(bn, batchnorm, tmp_path, rng):
    torch.manual_seed(0)
    state = imagenet(batchnorm, rng)
    torch.save(state, tmp_path / "vgg16.pth")
    start = convert.from_vgg16(tmp_path / "vgg16.pth")
    torch.save(start, tmp_path / "start.pt")
    model = started(tmp_path / "start.pt", "--recipe", "voc07").eval()
    assert (model.config.backbone, model.config.bn) == ("vgg16", bn)
    random = [k for k in model.state_dict() if k not in start["model"]]
    assert {k.split(".")[0] + "." + k.split(".")[1] for k in random} == {
        "features.extras", "head.loc", "head.conf"
    }  # fmt: skip
    x = torch.randn(1, 3, 64, 48, generator=rng)
    with torch.no_grad():
        ours = model.features.to_conv4_3(x)
        theirs = official_forward(state, x, batchnorm)
        torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.features.to_fc7(ours), theirs[1], rtol=1e-4, atol=1e-4)
    assert theirs[1].std() > 0.01
    pixel = torch.tensor([200.0, 100.0, 50.0])
    expected = (pixel / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    config = model.config
    got = (pixel - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(got, expected)
    assert config.channels == "rgb"


@pytest.fixture
def vgg_file(tmp_path, rng):
    """A file without BN; change(state) edits it."""

    def make(change=lambda state: None, batchnorm=False):
        state = imagenet(batchnorm, rng)
        change(state)
        torch.save(state, tmp_path / "file.pth")
        return tmp_path / "file.pth"

    return make


def test_other_files_are_refused(vgg_file, tmp_path):
    path = vgg_file(lambda state: state.pop("classifier.3.bias"))
    with pytest.raises(ValueError, match=r"classifier.3.bias is missing, expected \(4096,\)"):
        convert.from_vgg16(path)
    path = vgg_file(lambda state: state.update({"features.5.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"features.5.weight is \(3,\), expected \(128, 64, 3, 3"):
        convert.from_vgg16(path)
    (tmp_path / "text").write_text("not weights")
    torch.save([1, 2], tmp_path / "list")
    for name in ("text", "list"):
        with pytest.raises(ValueError, match="not a state dict"):
            convert.from_vgg16(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        convert.from_vgg16(tmp_path / "absent")


# ------------------------------------------------------------------------------ COCO -> VOC

SMALL = {"backbone": "resnet18", "width": 0.05}


def checkpoint(path, rng, **fields):
    """A detector with weights as after training, and its checkpoint."""
    torch.manual_seed(0)
    model = randomise(ScratchDet(Config(**SMALL | fields)), rng)
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, path)
    return model


@pytest.mark.parametrize("bn", ["all", "none"])
def test_a_coco_detector_says_the_same_of_vocs_classes(bn, tmp_path, rng):
    source = checkpoint(tmp_path / "coco.pt", rng, classes=tuple(COCO), priors="coco", bn=bn)
    for name, p in source.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=rng)
    saved = {"config": dataclasses.asdict(source.config), "model": source.state_dict()}
    torch.save(saved, tmp_path / "coco.pt")
    convert.main(["detector", str(tmp_path / "coco.pt"), "--out", str(tmp_path / "to/start.pt")])
    model, _ = load_detector(tmp_path / "to/start.pt")  # it is a whole detector
    assert model.config == dataclasses.replace(source.config, classes=VOC_CLASSES)
    trained = started(tmp_path / "to/start.pt", "--recipe", "voc07")
    assert trained.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(trained.state_dict()[key], value)
    assert torch.equal(model.priors_cxcywh, source.priors_cxcywh)  # COCO's, smaller than VOC's
    # background, then the official map from COCO's ids to VOC's 20 classes
    rows = [0, 5, 2, 15, 9, 40, 6, 3, 16, 57, 20, 61, 17, 18, 4, 1, 59, 19, 58, 7, 63]
    x = torch.randn(1, 3, 300, 300, generator=rng)
    with torch.no_grad():
        (loc, logits), (source_loc, source_logits) = model(x), source(x)
    torch.testing.assert_close(loc, source_loc)
    torch.testing.assert_close(logits, source_logits[..., rows])


def test_classes_are_found_by_name(tmp_path):
    assert convert.class_rows(VOC_CLASSES[:2], COCO, "x") == [0, 5, 2]
    assert convert.class_rows(("dog", "zebra", "cat"), COCO, "x") == [0, 17, 23, 16]
    assert convert.class_rows(("sofa", "couch"), ("couch", "sofa"), "x") == [0, 2, 1]
    with pytest.raises(ValueError, match=r"x does not know dragon, unicorn: it detects person, b"):
        convert.class_rows(("dragon", "dog", "unicorn"), COCO, "x")


def test_classes_from_a_file_and_what_is_refused(tmp_path, rng):
    source = checkpoint(tmp_path / "coco.pt", rng, classes=tuple(COCO))
    (tmp_path / "names").write_text("cat\ndog\n")
    flags = ["--out", str(tmp_path / "start.pt"), "--classes", str(tmp_path / "names")]
    convert.main(["detector", str(tmp_path / "coco.pt"), *flags])
    model, _ = load_detector(tmp_path / "start.pt")
    assert model.config.classes == ("cat", "dog")
    theirs = source.head.conf[0][1].weight.unflatten(0, (-1, 81))[:, [0, 16, 17]]
    assert torch.equal(model.head.conf[0][1].weight, theirs.flatten())
    with pytest.raises(ValueError, match="brings no class scores"):
        convert.main(["vgg16", str(tmp_path / "coco.pt"), *flags])
    with pytest.raises(ValueError, match="no such checkpoint"):
        convert.main(["detector", str(tmp_path / "absent.pt"), *flags])
    before = (tmp_path / "coco.pt").read_bytes()
    with pytest.raises(ValueError, match="coco.pt: would be overwritten"):
        convert.main(["detector", str(tmp_path / "coco.pt"), "--out", str(tmp_path / "coco.pt")])
    assert (tmp_path / "coco.pt").read_bytes() == before
