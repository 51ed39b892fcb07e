"""experiments/baselines.py and transfer.py: the rival networks, and weights from elsewhere."""

import dataclasses
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import scratchdet
import train
from data import VOC_CLASSES
from experiments import baselines, peer_run, transfer
from scratchdet import (
    Config,
    ScratchDet,
    cxcywh_to_xyxy,
    make_priors,
    multibox_loss,
    priors_per_cell,
)  # fmt: skip

# What each network is made for, and its maps there.
MADE_FOR = {
    "scratchdet512": {"size": 512, "priors": "coco512"},
    "ssd321": {"size": 321, "priors": "voc321"},
}
MAPS = {
    "dsod300": (38, 19, 10, 5, 3, 2),
    "root-resnet34-caffe-compat": (38, 19, 10, 5, 5, 5),
    "scratchdet512": (64, 32, 16, 8, 4, 2, 1),
    "ssd321": (40, 20, 10, 5, 3, 1),
}
COCO = (  # the 80 names in the order of their ids
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


@functools.cache
def on_meta(name, **fields):
    with torch.device("meta"):
        return ScratchDet(Config(name, **MADE_FOR.get(name, {}), **fields))


def randomise(model, rng):
    """Statistics and factors of BN as after training, so that nothing hides behind 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.2, generator=rng)
    return model.eval()


# ------------------------------------------------------------------------------ baselines


def test_the_names_in_scratchdet_are_those_that_can_be_built():
    assert set(scratchdet.BASELINES) == set(baselines.BODIES)
    assert not set(scratchdet.BASELINES) & set(scratchdet.BACKBONES)


@pytest.mark.parametrize("name", scratchdet.BASELINES)
def test_maps_and_priors_are_those_the_network_is_known_for(name):
    model = on_meta(name)
    maps, size = MAPS.get(name, scratchdet.MAPS_300), model.config.size
    assert model.map_sizes(size, size) == [(s, s) for s in maps]
    priors = {"scratchdet512": 24564, "ssd321": 17080, "dsod300": 8744}
    priors["root-resnet34-caffe-compat"] = 8892
    loc, logits = model.eval()(torch.empty(1, 3, size, size, device="meta"))
    assert loc.shape == (1, priors.get(name, 8732), 4)
    assert logits.shape[1] == len(model.priors_cxcywh)


@pytest.mark.parametrize(
    ("classes", "bn", "millions", "gmacs"),
    [(20, "all", 14.716, 15.08), (80, "all", 21.70, 18.37), (20, "none", None, 15.08)],
)
def test_dsod_has_the_parameters_and_macs_of_the_released_one(classes, bn, millions, gmacs):
    model = on_meta("dsod300", bn=bn, classes=tuple(map(str, range(classes))))
    text = scratchdet.summary(model)
    parameters, macs = re.search(r"([\d,]+) parameters, ([\d.]+) GMACs", text).groups()
    if millions:
        assert int(parameters.replace(",", "")) / 1e6 == pytest.approx(millions, abs=5e-3)
    assert float(macs) == pytest.approx(gmacs, abs=5e-3)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 23_508_032), ("resnet101", 42_500_160)]
)
def test_bottleneck_bodies_have_the_parameters_of_the_classification_networks(name, millions):
    body = on_meta(name).features  # torchvision's, less its last layer
    parts = (body.stem, body.stages)
    assert sum(p.numel() for part in parts for p in part.parameters()) == millions
    assert body.channels == [512, 1024, 2048, 128, 128, 128]


@pytest.mark.parametrize(
    "name", ["resnet50", "root-resnet18-preact", "dsod300", "scratchdet512", "ssd321"]
)
def test_bn_is_everywhere_or_nowhere(name):
    for bn in ("all", "none"):
        model = on_meta(name, bn=bn)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert (norms > 20) if bn == "all" else norms == 0
        assert not any(c.bias is not None for c in convs) or bn == "none"


@pytest.mark.parametrize("name", scratchdet.BASELINES)
def test_a_training_step_reaches_every_weight(name, rng):
    torch.manual_seed(0)
    # BN needs two images for its statistics of the 1x1 map; the costly networks do without
    bn, n = ("none", 1) if "101" in name or name in MADE_FOR else ("all", 2)
    config = Config(name, bn, width=0.05, classes=("a",), **MADE_FOR.get(name, {}))
    model = ScratchDet(config).train()
    sizes = model.map_sizes(config.size, config.size)
    per_map = [h * w * a for (h, w), a in zip(sizes, priors_per_cell(config), strict=True)]
    # an object of the size and place of one prior of each map, so that each has something to learn
    rows = [sum(per_map[:i]) + k // 2 for i, k in enumerate(per_map)]
    boxes = cxcywh_to_xyxy(model.priors_cxcywh[rows])
    labels, offsets = torch.ones(len(rows), dtype=torch.long), [0] * n + [len(rows)]
    loc, logits = model(torch.randn(n, 3, config.size, config.size, generator=rng))
    loss_loc, loss_conf, _ = multibox_loss(
        loc, logits, model.priors_cxcywh, boxes, labels, torch.tensor(offsets)
    )
    (loss_loc + loss_conf).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    weights = {k: p for k, p in model.features.named_parameters() if p.ndim > 1}
    assert [k for k, p in weights.items() if not p.grad.any()] == []


def test_bottleneck_is_the_sum_of_its_branch_and_shortcut(rng):
    block = randomise(baselines.Bottleneck(16, 32, stride=2, bn=True), rng)
    x = torch.randn(2, 16, 9, 9, generator=rng)

    def conv(parts, x, **how):
        bn = parts[1]
        x = F.conv2d(x, parts[0].weight, **how)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    y = F.relu(conv(block.conv1, x))
    y = F.relu(conv(block.conv2, y, stride=2, padding=1))
    y = F.relu(conv(block.conv3, y) + conv(block.shortcut, x, stride=2))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize(("c_in", "stride"), [(16, 1), (8, 2)])
def test_pre_activation_leaves_the_sum_bare(c_in, stride, rng):
    block = randomise(baselines.PreActBlock(c_in, 16, stride=stride, bn=True), rng)
    x = torch.randn(2, c_in, 8, 8, generator=rng)

    def activate(bn, x):
        return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias))

    active = activate(block.activate[0], x)
    y = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    y = F.conv2d(activate(block.conv2[0], y), block.conv2[2].weight, padding=1)
    shortcut = x if stride == 1 else F.conv2d(active, block.shortcut.weight, stride=2)
    total, branch = block(x)
    torch.testing.assert_close(branch, y)
    torch.testing.assert_close(total, shortcut + y)
    assert total.min() < 0 and branch.min() < 0  # noqa: PT018


def test_only_the_caffe_compatible_network_shows_its_head_the_bare_branch(rng):
    for name, compatible in (("root-resnet34-caffe-compat", True), ("root-resnet34-preact", False)):
        torch.manual_seed(0)
        body = ScratchDet(Config(name, width=0.05, classes=("a",))).features
        randomise(body, rng)
        branches = {}
        for i in (2, 3, 4, 5, 6, 7):
            body.stages[i][-1].conv2.register_forward_hook(
                lambda module, args, out, i=i, to=branches: to.__setitem__(i, out)
            )
        with torch.no_grad():
            maps = body(torch.randn(1, 3, 300, 300, generator=rng))
        for i, m in enumerate(maps, start=2):
            assert torch.equal(m, branches[i]) == compatible
            assert (m.min() < 0) == compatible  # the others come from a ReLU


def test_l2_norm_by_hand():
    x = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    torch.testing.assert_close(baselines.L2Norm(2)(x).flatten(), torch.tensor([12.0, 16.0]))
    assert torch.isfinite(baselines.L2Norm(2)(torch.zeros(1, 2, 1, 1))).all()


def test_dense_layers_see_all_layers_before_them(rng):
    block = baselines.DenseBlock(4, 3, bottleneck=8, growth=2, bn=False)
    x = torch.randn(1, 4, 5, 5, generator=rng)
    y = x
    for layer in block.layers:
        h = F.conv2d(F.relu(y), layer[0][1].weight, layer[0][1].bias)
        y = torch.cat([y, F.conv2d(F.relu(h), layer[1][1].weight, layer[1][1].bias, padding=1)], 1)
    torch.testing.assert_close(block(x), y)
    assert y.shape[1] == block.c_out == 10
    assert torch.equal(block(x)[:, :4], x)  # no ReLU in place may touch what is handed on


def test_a_checkpoint_of_a_baseline_is_loaded_and_detects(tmp_path, rng):
    model = ScratchDet(Config("dsod300", width=0.05, classes=("a", "b")))
    saved = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "ema": None}
    torch.save(saved, tmp_path / "last.pt")
    again, _ = scratchdet.load(tmp_path / "last.pt")
    with torch.no_grad():
        x = torch.randn(1, 3, 300, 300, generator=rng)
        loc, logits = again(x)
        torch.testing.assert_close(loc, model.eval()(x)[0])
        boxes, *_ = scratchdet.detect(loc, logits, again.priors_cxcywh)
    assert boxes.shape == (1, 200, 4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("root-resnet50", {}),
        ("root-resnet34-preact", {}),
        ("dsod300", {}),
        ("scratchdet512", {"size": 512, "priors": "coco512"}),
        ("ssd321", {"size": 321, "priors": "voc321"}),
    ],
)
def test_other_image_sizes_have_as_many_priors_as_outputs(name, config):
    model = ScratchDet(Config(name, width=0.05, classes=("a",), **config)).eval()
    with torch.no_grad():
        maps = model.features(torch.zeros(1, 3, 100, 180))
        loc, _ = model.head(maps)
    sizes = [tuple(m.shape[-2:]) for m in maps]
    assert loc.shape[1] == len(make_priors(model.config, sizes, (100, 180)))


def test_a_network_that_does_not_fit_its_priors_is_refused():
    with pytest.raises(ValueError, match="'voc' are for 6 maps, scratchdet512 has 7"):
        ScratchDet(Config("scratchdet512", width=0.05, size=512))
    with pytest.raises(ValueError, match="ssd321"):
        ScratchDet(Config("ssd321", width=0.05))
    with pytest.raises(ValueError, match="size = 256: scratchdet512 makes 6 maps"):
        ScratchDet(Config("scratchdet512", width=0.05, size=256, priors="coco512"))


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
    model = transfer.start(Config("vgg16", bn), tmp_path / "vgg16.pth").eval()
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


def test_bn_has_to_fit_the_file(vgg_file):
    with pytest.raises(ValueError, match=r"without BatchNorm, but --bn all .*head or none"):
        transfer.start(Config("vgg16", "all"), vgg_file())
    with pytest.raises(ValueError, match=r"with BatchNorm, but --bn none .*all or backbone"):
        transfer.start(Config("vgg16", "none"), vgg_file(batchnorm=True))


def test_other_files_and_networks_are_refused(vgg_file, tmp_path):
    path = vgg_file(lambda state: state.pop("classifier.3.bias"))
    with pytest.raises(ValueError, match=r"classifier.3.bias is missing, expected \(4096,\)"):
        transfer.start(Config("vgg16", "head"), path)
    path = vgg_file(lambda state: state.update({"features.5.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"features.5.weight is \(3,\), expected \(128, 64, 3, 3"):
        transfer.start(Config("vgg16", "head"), path)
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ValueError, match="not a state dict"):
        transfer.start(Config("vgg16", "head"), tmp_path / "text")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="not a state dict"):
        transfer.start(Config("vgg16", "head"), tmp_path / "list")
    with pytest.raises(ValueError, match="no such file"):
        transfer.start(Config("vgg16", "head"), tmp_path / "absent")
    for config in (Config("resnet18"), Config("vgg16", width=0.5)):
        with pytest.raises(ValueError, match="fit --backbone vgg16 --width 1 alone"):
            transfer.start(config, path)
    with pytest.raises(ValueError, match="--std 58 58 58: --pretrained brings"):
        transfer.start(Config("vgg16", std=(58.0, 58.0, 58.0)), path)
    with pytest.raises(ValueError, match="choose one"):
        transfer.start(Config("vgg16"), path, path)


# ------------------------------------------------------------------------------ COCO -> VOC

SMALL = {"backbone": "resnet18", "width": 0.05}


def checkpoint(path, rng, **fields):
    """A detector with weights as after training, and its checkpoint."""
    torch.manual_seed(0)
    model = randomise(ScratchDet(Config(**SMALL | fields)), rng)
    saved = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "ema": None}
    torch.save(saved, path)
    return model


@pytest.mark.parametrize("bn", ["all", "none"])
def test_a_coco_detector_says_the_same_of_vocs_classes(bn, tmp_path, rng):
    source = checkpoint(tmp_path / "coco.pt", rng, classes=tuple(COCO), priors="coco", bn=bn)
    for name, p in source.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=rng)
    saved = {"config": dataclasses.asdict(source.config), "model": source.state_dict(), "ema": None}
    torch.save(saved, tmp_path / "coco.pt")
    config = Config(**SMALL, bn=bn, priors="coco")
    model = transfer.start(config, init_from=tmp_path / "coco.pt").eval()
    assert model.config == dataclasses.replace(source.config, classes=VOC_CLASSES)
    assert torch.equal(model.priors_cxcywh, source.priors_cxcywh)  # COCO's, smaller than VOC's
    # background, then the official map from COCO's ids to VOC's 20 classes
    rows = [0, 5, 2, 15, 9, 40, 6, 3, 16, 57, 20, 61, 17, 18, 4, 1, 59, 19, 58, 7, 63]
    x = torch.randn(1, 3, 300, 300, generator=rng)
    with torch.no_grad():
        (loc, logits), (source_loc, source_logits) = model(x), source(x)
    torch.testing.assert_close(loc, source_loc)
    torch.testing.assert_close(logits, source_logits[..., rows])


def test_classes_are_found_by_name(tmp_path):
    assert transfer.class_rows(VOC_CLASSES[:2], COCO, "x") == [0, 5, 2]
    assert transfer.class_rows(("dog", "zebra", "cat"), COCO, "x") == [0, 17, 23, 16]
    assert transfer.class_rows(("sofa", "couch"), ("couch", "sofa"), "x") == [0, 2, 1]
    with pytest.raises(ValueError, match=r"x does not know dragon, unicorn: it detects person, b"):
        transfer.class_rows(("dragon", "dog", "unicorn"), COCO, "x")


def test_the_network_has_to_be_the_checkpoints(tmp_path, rng):
    checkpoint(tmp_path / "coco.pt", rng, classes=("dog",), stem=(3, 1, 2))
    config = Config(**SMALL, classes=("dog",))
    with pytest.raises(
        ValueError, match=r"has backbone resnet18, .* Leave --backbone out, or give resnet18"
    ):
        transfer.start(
            dataclasses.replace(config, backbone="vgg16"), init_from=tmp_path / "coco.pt"
        )
    with pytest.raises(ValueError, match=r"or give 3 1 2"):
        transfer.start(config, init_from=tmp_path / "coco.pt")
    checkpoint(tmp_path / "plain.pt", rng, classes=("dog",))
    with pytest.raises(ValueError, match=r"has priors voc, this run coco. .*or give voc"):
        transfer.start(dataclasses.replace(config, priors="coco"), init_from=tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"leave out --stem"):
        transfer.start(dataclasses.replace(config, stem=(3, 1, 2)), init_from=tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        transfer.start(config, init_from=tmp_path / "absent.pt")


def test_training_starts_from_the_detector_and_resumes_its_own(tmp_path, rng, monkeypatch):
    """Through train.py: COCO's priors are kept, also by --resume, when the source is gone."""
    source = checkpoint(tmp_path / "coco.pt", rng, classes=tuple(COCO), priors="coco")
    names = ("dog", "cat", "sofa")
    monkeypatch.setattr(train, "read_data", lambda args: ([0], [0], names))
    monkeypatch.setattr(train.machine, "check_memory", lambda *args: 0.0)
    seen = []

    class Stop(Exception):
        pass

    def look(model, *args):
        seen.append(model)
        raise Stop

    monkeypatch.setattr(train, "parameter_groups", look)
    flags = ["--out", str(tmp_path), "--device", "cpu"]  # the network is the checkpoint's
    flags += ["--init-from", str(tmp_path / "coco.pt")]
    with pytest.raises(Stop):
        train.main(flags)
    model = seen.pop()
    assert (model.config.priors, model.config.classes) == ("coco", names)
    assert (model.config.backbone, model.config.width, model.config.stem) == (
        "resnet18",
        0.05,
        None,
    )
    weight = next(iter(source.features.parameters()))
    assert torch.equal(next(iter(model.features.parameters())), weight)

    arguments = vars(train.parse_args(flags))
    assert arguments["priors"] == "coco"  # which run.json and the checkpoint then say, too
    with pytest.raises(ValueError, match="has priors coco, this run voc"):
        train.main([*flags, "--priors", "voc"])
    (tmp_path / "coco.pt").unlink()
    saved = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "ema": None}
    saved |= {"args": arguments, "step": 1}
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(Stop):
        train.main([*flags, "--resume"])
    assert seen.pop().config.priors == "coco"


# ------------------------------------------------------------------------- experiments/peer_run.py


def test_peer_sees_the_same_pixels_and_boxes():
    """0..1 inside the photograph, its mean outside, boxes in pixels, each image its own."""
    batch = data.Batch(
        images=torch.full((2, 3, 300, 300), 255, dtype=torch.uint8),
        inside=torch.tensor([[0, 0, 300, 300], [0, 0, 150, 300]]),
        colour=torch.tensor([data.PLAIN] * 2),
        boxes_xyxy=torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4]]),
        labels=torch.tensor([3, 7]), offsets=torch.tensor([0, 0, 2]), indices=torch.tensor([5, 6]),
    )  # fmt: skip
    full, half = peer_run.inputs(batch)
    torch.testing.assert_close(full, torch.ones(3, 300, 300))
    torch.testing.assert_close(half[:, :, :150], torch.ones(3, 300, 150))
    assert (half[:, 0, 200] * 255).tolist() == pytest.approx([123, 117, 104])
    empty, two = peer_run.targets(batch)
    assert empty["boxes"].shape == (0, 4)
    assert two["labels"].tolist() == [3, 7]
    assert two["boxes"][0].tolist() == [0, 0, 150, 300]
