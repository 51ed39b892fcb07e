"""The network, its priors and the box coding, against numbers worked out by hand or elsewhere."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scratchdet
from scratchdet import (
    BasicBlock,
    Config,
    ScratchDet,
    cxcywh_to_xyxy,
    detect,
    summary,
)

OURS = ("root-resnet18", "root-resnet34", "resnet18", "resnet34", "resnet18-a", "resnet18-b")
COCO_80 = tuple(f"class {i}" for i in range(80))
NARROW = Config(backbone="root-resnet18", width=0.25, classes=("a", "b", "c"))


def on_meta(**fields) -> ScratchDet:
    """A network without memory: shapes and counts only."""
    with torch.device("meta"):
        return ScratchDet(Config(**fields))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------- counts and maps


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"backbone": "root-resnet34"}, 24_589_852),
        ({"backbone": "root-resnet18"}, 14_481_692),
    ],
)
def test_parameters_are_exactly_the_papers(fields, count):
    assert num_parameters(on_meta(**fields)) == count


@pytest.mark.parametrize(
    ("fields", "millions", "gmacs"),
    [
        # computed once for these networks, elsewhere; OpenVINO lists 26.285 M and 2 x 31.4 G for
        # Caffe's SSD300
        ({"backbone": "vgg16", "bn": "none"}, 26.285, 31.37),
        ({"backbone": "vgg16", "bn": "all"}, 26.294, 31.37),
        ({"backbone": "vgg16", "bn": "none", "classes": COCO_80}, 34.305, 34.36),
        ({"backbone": "vgg16", "bn": "all", "classes": COCO_80}, 34.315, 34.36),
        ({"backbone": "root-resnet18"}, 14.482, 19.81),
        ({"backbone": "root-resnet18", "classes": COCO_80}, 18.080, 21.26),
        ({"backbone": "root-resnet34"}, 24.590, 33.30),
        ({"backbone": "root-resnet34", "classes": COCO_80}, 28.188, 34.76),
        ({"backbone": "root-resnet18", "extras": "conv"}, 15.994, 19.96),
        ({"backbone": "root-resnet34", "extras": "conv"}, 26.102, 33.45),
        # Table 2, without down-sampling: 7x7, then one to five 3x3; and with it (Figure 3 b)
        ({"backbone": "root-resnet18", "extras": "conv", "stem": (7, 1, 1)}, None, 14.02),
        ({"backbone": "root-resnet18", "extras": "conv", "stem": (3, 1, 1)}, None, 13.33),
        ({"backbone": "root-resnet18", "extras": "conv", "stem": (3, 2, 1)}, None, 16.64),
        ({"backbone": "root-resnet18", "extras": "conv", "stem": (3, 4, 1)}, None, 23.28),
        ({"backbone": "root-resnet18", "extras": "conv", "stem": (3, 5, 1)}, None, 26.60),
        ({"backbone": "resnet18-a", "extras": "conv"}, 15.93, 13.38),
        ({"backbone": "resnet18", "extras": "conv"}, None, 3.78),
    ],
    ids=lambda x: "" if not isinstance(x, dict) else "-".join(map(str, x.values()))[:40],
)
def test_parameters_and_macs(fields, millions, gmacs):
    model = on_meta(**fields)
    if millions is not None:
        digits = len(str(millions).split(".")[1].rstrip("0"))
        assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.51 * 10**-digits)
    last = summary(model).splitlines()[-1]
    assert f"{num_parameters(model):,} parameters" in last
    assert float(last.split()[-2]) == pytest.approx(gmacs, abs=0.0101), last


@pytest.mark.parametrize(
    ("backbone", "extras"),
    [(name, extras) for name in OURS for extras in ("residual", "conv")] + [("vgg16", "residual")],
)
def test_every_backbone_has_the_six_maps_and_8732_priors(backbone, extras):
    model = on_meta(backbone=backbone, extras=extras, width=0.25)
    assert [h for h, _ in model.map_sizes(300, 300)] == [38, 19, 10, 5, 3, 1]
    assert [w for _, w in model.map_sizes(300, 300)] == [38, 19, 10, 5, 3, 1]
    assert model.priors_cxcywh.shape == (8732, 4)
    loc, logits = model(torch.empty(2, 3, 300, 300, device="meta"))
    assert loc.shape == (2, 8732, 4)
    assert logits.shape == (2, 8732, 21)


@pytest.mark.parametrize("stem", [(3, 1, 2), (3, 2, 2), (3, 3, 2), (7, 1, 2), (7, 1, 1), (3, 5, 1)])
def test_every_stem_of_table_2_has_the_six_maps(stem):
    assert len(on_meta(backbone="root-resnet18", stem=stem).priors_cxcywh) == 8732


def test_a_network_without_the_six_maps_is_refused_at_construction(monkeypatch):
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: self.conv1(x)[..., :-1])
    with pytest.raises(ValueError, match="maps"):
        on_meta(backbone="root-resnet18")


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16"])
def test_a_size_without_six_maps_is_refused(backbone):
    assert len(on_meta(backbone=backbone, size=257).head.loc) == 6
    with pytest.raises(ValueError, match=f"size = 256: {backbone} makes 5 maps .* not 6"):
        on_meta(backbone=backbone, size=256)


def test_the_last_extra_block_leads_from_3x3_to_1x1():
    """Main branch 3x3 stride 2 without padding, shortcut 1x1 on the centre pixel."""
    extras = on_meta(backbone="root-resnet34").features.extras
    assert [e.conv1[0].padding for e in extras] == [(1, 1), (1, 1), (1, 1), (0, 0)]
    assert [e.conv1[0].stride for e in extras] == [(2, 2)] * 4
    assert [e.shortcut[0].stride for e in extras] == [(2, 2)] * 4
    assert [e.conv2[0].padding for e in extras] == [(1, 1)] * 4

    block = BasicBlock(2, 2, stride=2, bn=False, shrink=True)
    nn.init.zeros_(block.conv2[0].weight)
    nn.init.zeros_(block.conv2[0].bias)
    block.shortcut[0].weight.data = torch.eye(2)[:, :, None, None]
    block.shortcut[0].bias.data.zero_()
    x = torch.arange(18.0).reshape(1, 2, 3, 3)
    torch.testing.assert_close(block(x), x[:, :, 1:2, 1:2])


@pytest.mark.parametrize("backbone", ["root-resnet18", "vgg16"])
@pytest.mark.parametrize("bn", ["all", "backbone", "head", "none"])
def test_bn_modes_place_bn_where_table_1_says(backbone, bn):
    model = on_meta(backbone=backbone, bn=bn, width=0.25)
    for name, part, wanted in (
        ("backbone", model.features, bn in ("all", "backbone")),
        ("head", model.head, bn in ("all", "head")),
    ):
        convs = [m for m in part.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == (len(convs) if wanted else 0), name
        # a bias in front of BN would be a parameter without effect
        assert all((conv.bias is None) == wanted for conv in convs), name
    assert len([m for m in model.head.modules() if isinstance(m, nn.Conv2d)]) == 12
    assert not any(isinstance(m, nn.ReLU) for m in model.head.modules())


def test_the_eps_of_the_heads_batchnorm(rng):
    """Caffe's heads have 1e-3: on a map of variance 1e-3 their outputs are 1 / sqrt(2) as large."""
    for eps, gain in ((1e-5, 1 / math.sqrt(1.01)), (1e-3, 1 / math.sqrt(2))):
        model = on_meta(backbone="root-resnet18", width=0.25, head_bn_eps=eps)
        eps_of = {m.eps for m in model.head.modules() if isinstance(m, nn.BatchNorm2d)}
        assert eps_of == {eps}
        others = {m.eps for m in model.features.modules() if isinstance(m, nn.BatchNorm2d)}
        assert others == {1e-5}
        norm = scratchdet.conv_bn(1, 1, 1, bn=True, relu=False, eps=eps)[1]
        x = torch.randn(64, 1, 8, 8, generator=rng)
        x = (x - x.mean()) / x.std(correction=0) * math.sqrt(1e-3)
        assert norm(x).std(correction=0).item() == pytest.approx(gain, rel=1e-4)


def test_the_heads_batchnorm_begins_with_its_factor():
    """1 unless the Config says otherwise; the backbone's stays 1."""
    for flags, factor in (({}, 1.0), ({"head_gamma": 0.1}, 0.1)):
        model = ScratchDet(Config("root-resnet18", width=0.05, **flags))
        for part, expected in ((model.head, factor), (model.features, 1.0)):
            norms = [m.weight for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
            assert len(norms) >= 12
            assert all((weight == expected).all() for weight in norms)


def test_l2_norm_scales_conv4_3_alone(rng):
    """Per pixel to length 20, over channels; the other five maps stay as they are."""
    torch.manual_seed(0)
    plain = ScratchDet(Config("vgg16", width=0.05)).features.eval()
    torch.manual_seed(0)
    normed = ScratchDet(Config("vgg16", width=0.05, l2_norm=True)).features.eval()
    assert set(normed.state_dict()) - set(plain.state_dict()) == {"norm.weight"}
    x = torch.randn(1, 3, 300, 300, generator=rng)
    with torch.no_grad():
        before, after = plain(x), normed(x)
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a, b)
    lengths = before[0].square().sum(1, keepdim=True).sqrt()
    assert lengths.min() > 0
    torch.testing.assert_close(after[0], 20 * before[0] / lengths)
    by_hand = scratchdet.L2Norm(2)(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
    torch.testing.assert_close(by_hand.flatten(), torch.tensor([12.0, 16.0]))
    assert scratchdet.L2Norm(2)(torch.zeros(1, 2, 1, 1)).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backbone": "vgg16", "stem": (3, 1, 1)}, "stem = .3, 1, 1.: vgg16 has no such option"),
        ({"backbone": "vgg16", "extras": "conv"}, "it has l2_norm"),
        ({"backbone": "resnet18", "l2_norm": True}, "l2_norm = True: .* it has stem and extras"),
        ({"bn": "backbone", "head_bn_eps": 1e-3}, "bn = 'backbone' has none there"),
    ],
)
def test_options_without_effect_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


def test_weights_are_caffes_xavier():
    """Uniform within sqrt(3 / fan_in); biases 0; BN the identity."""
    torch.manual_seed(0)
    model = ScratchDet(replace(NARROW, bn="backbone"))
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            bound = math.sqrt(3 / (m.in_channels * m.kernel_size[0] * m.kernel_size[1]))
            w = m.weight.detach()
            assert w.abs().max() <= bound, name
            assert w.abs().max() > 0.97 * bound, name
            assert w.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert m.bias is None or m.bias.abs().max() == 0, name
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all(), name
            assert (m.bias == 0).all(), name


def test_width_rounds_channels_up_to_sixteens():
    model = on_meta(backbone="root-resnet18", width=0.1)
    convs = [m for m in model.features.modules() if isinstance(m, nn.Conv2d)]
    assert {c.out_channels for c in convs} == {16, 32, 64}  # 6.4, 12.8, 25.6, 51.2


# ------------------------------------------------------------ parity with torchvision's layouts

# torchvision.models.resnet18().state_dict() and vgg16().features: names and shapes, as data.
RESNET18 = {"conv1.weight": (64, 3, 7, 7), "bn1": (64,)}
for _layer, _c in ((1, 64), (2, 128), (3, 256), (4, 512)):
    for _block in (0, 1):
        _at, _half = f"layer{_layer}.{_block}", _layer > 1 and _block == 0
        RESNET18[f"{_at}.conv1.weight"] = (_c, _c // 2 if _half else _c, 3, 3)
        RESNET18[f"{_at}.bn1"] = (_c,)
        RESNET18[f"{_at}.conv2.weight"] = (_c, _c, 3, 3)
        RESNET18[f"{_at}.bn2"] = (_c,)
        if _half:
            RESNET18[f"{_at}.downsample.0.weight"] = (_c, _c // 2, 1, 1)
            RESNET18[f"{_at}.downsample.1"] = (_c,)
VGG16 = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256),
    14: (256, 256), 17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512),
    26: (512, 512), 28: (512, 512),
}  # fmt: skip


def random_resnet18(rng) -> dict:
    """A state dict with torchvision's names, every number random (BN's running ones as well)."""
    state = {}
    for name, shape in RESNET18.items():
        if len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape, generator=rng) / math.sqrt(fan_in)
        else:
            state[f"{name}.weight"] = torch.rand(shape, generator=rng) + 0.5
            state[f"{name}.bias"] = torch.randn(shape, generator=rng) * 0.3
            state[f"{name}.running_mean"] = torch.randn(shape, generator=rng) * 0.3
            state[f"{name}.running_var"] = torch.rand(shape, generator=rng) + 0.5
    return state


def resnet18_maps(w: dict, x: torch.Tensor, *, training: bool) -> list[torch.Tensor]:
    """torchvision's resnet18 up to layer4, written with functions alone: maps of layers 2 to 4."""

    def bn(x, name):
        mean, var = w[f"{name}.running_mean"].clone(), w[f"{name}.running_var"].clone()
        if training:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        scale = w[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        return x * scale[:, None, None] + (w[f"{name}.bias"] - mean * scale)[:, None, None]

    x = F.relu(bn(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1"))
    x, maps = F.max_pool2d(x, 3, stride=2, padding=1), []
    for layer in range(1, 5):
        for block in range(2):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.relu(
                bn(F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1")
            )
            y = bn(F.conv2d(y, w[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if stride == 2:
                x = F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=2)
                x = bn(x, f"{at}.downsample.1")
            x = F.relu(x + y)
        maps.append(x)
    return maps[1:]


def our_name(name: str) -> str:
    """torchvision's name of a ResNet weight -> ours."""
    if not name.startswith("layer"):
        return name.replace("conv1", "stem.0.0").replace("bn1", "stem.0.1")
    layer, block, rest = name.split(".", 2)
    for theirs, ours in (
        ("conv1", "conv1.0"), ("conv2", "conv2.0"), ("bn1", "conv1.1"), ("bn2", "conv2.1"),
        ("downsample", "shortcut"),
    ):  # fmt: skip
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    return f"stages.{int(layer[-1]) - 1}.{block}.{rest}"


@pytest.mark.parametrize("training", [False, True])
def test_parity_with_torchvisions_resnet18(rng, training):
    state = random_resnet18(rng)
    body = ScratchDet(Config(backbone="resnet18")).features.train(training)
    missing, unexpected = body.load_state_dict({our_name(k): v for k, v in state.items()}, False)
    assert not unexpected
    assert not [k for k in missing if not k.startswith("extras") and "num_batches" not in k]
    images = torch.randn(2, 3, 96, 64, generator=rng)
    with torch.no_grad():
        maps = body(images)
        wanted = resnet18_maps(state, images, training=training)
    assert [m.shape[1:] for m in wanted] == [(128, 12, 8), (256, 6, 4), (512, 3, 2)]
    for ours, theirs in zip(maps, wanted, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.abs().mean() > 0.1  # something to compare


def test_parity_with_torchvisions_vgg16(rng):
    """Features 0 to 28 as torchvision has them; SSD's changes by hand: pool3 rounds up, pool5 is
    3x3 with stride 1, fc6 a dilated convolution, fc7 a 1x1."""
    state = {}
    for i, (c_out, c_in) in VGG16.items():
        state[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=rng)
        state[f"features.{i}.weight"] *= math.sqrt(2 / (9 * c_in))
        state[f"features.{i}.bias"] = torch.randn(c_out, generator=rng) * 0.1
    body = ScratchDet(Config(backbone="vgg16", bn="none")).features
    ours = [k for k in body.state_dict() if not k.startswith("extras")]
    fc = [f"{layer}.{kind}" for layer in ("fc6", "fc7") for kind in ("weight", "bias")]
    assert len(ours) == len(state) + len(fc)
    own = body.state_dict()
    renamed = dict(zip(ours, [*state, *fc], strict=True))  # both are in the order of computation
    body.load_state_dict({k: state.get(renamed.get(k), v) for k, v in own.items()})
    fc6, fc6_bias, fc7, fc7_bias = (own[k] for k in ours[-4:])
    for bias in (fc6_bias, fc7_bias):
        bias.uniform_(-0.1, 0.1, generator=rng)

    x = images = torch.randn(1, 3, 72, 104, generator=rng)
    for i in VGG16:
        x = F.relu(
            F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1)
        )
        if i in (2, 7, 14):  # 72x104 -> 36x52 -> 18x26 -> 9x13
            x = F.max_pool2d(x, 2)
        if i == 21:
            conv4_3 = x
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2)  # 9x13 -> 5x7: rounds up
    x = -F.max_pool2d(F.pad(x, (1,) * 4, value=-math.inf), 3, stride=1)
    x = F.relu(F.conv2d(-x, fc6, fc6_bias, padding=6, dilation=6))
    fc7_map = F.relu(F.conv2d(x, fc7, fc7_bias))

    with torch.no_grad():
        maps = body(images)
    torch.testing.assert_close(maps[0], conv4_3, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[1], fc7_map, rtol=1e-4, atol=1e-4)
    assert conv4_3.shape == (1, 512, 9, 13)
    assert fc7_map.shape == (1, 1024, 5, 7)
    assert conv4_3.abs().mean() > 0.1
    assert fc7_map.abs().mean() > 0.01


def test_the_frozen_layouts_are_torchvisions():
    """Where torchvision is installed: the tables above, and the plain forward, are its own."""
    models = pytest.importorskip("torchvision").models
    net = models.resnet18()
    theirs = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith("fc")}
    state = random_resnet18(torch.Generator().manual_seed(1))
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        k: v for k, v in theirs.items() if "num_batches" not in k
    }
    net.load_state_dict(state, strict=False)
    net.eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x4 = net.layer4(
            net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
        )
    torch.testing.assert_close(resnet18_maps(state, x, training=False)[2], x4, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        vgg = models.vgg16().features.state_dict()
    assert {k: tuple(v.shape) for k, v in vgg.items() if "weight" in k} == {
        f"{i}.weight": (*shape, 3, 3) for i, shape in VGG16.items()
    }


# ------------------------------------------------------------------------------ the forward


def test_batchnorm_of_the_head_and_backbone_follow_train_and_eval(rng):
    """In evaluation an image's outputs do not depend on the others of its batch."""
    torch.manual_seed(0)
    model = ScratchDet(NARROW)
    images = torch.randn(2, 3, 300, 300, generator=rng)
    with torch.no_grad():
        together, alone = model(images)[0][:1], model.eval()(images[:1])[0]
        assert not torch.allclose(together, alone, atol=1e-3)
        torch.testing.assert_close(model(images)[0][:1], alone, rtol=1e-3, atol=1e-4)


def test_bf16_and_channels_last_give_nearly_the_same(rng):
    torch.manual_seed(0)
    model = ScratchDet(NARROW).eval()
    images = torch.randn(1, 3, 300, 300, generator=rng)
    with torch.no_grad():
        loc, logits = model(images)
        model = model.to(memory_format=torch.channels_last)
        same = model(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images.to(memory_format=torch.channels_last))
    for a, b, c in zip((loc, logits), same, low, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
        assert c.dtype == torch.bfloat16
        torch.testing.assert_close(a, c.float(), rtol=0.1, atol=0.05 * a.abs().max().item())


def test_another_body_can_be_plugged_in(monkeypatch):
    """As experiments/baselines.py does: anything with .channels and as many maps."""

    class Body(nn.Module):
        channels = (4, 4, 4, 4, 4, 4)

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return [F.adaptive_avg_pool2d(self.conv(x), s) for s in (38, 19, 10, 5, 3, 1)]

    monkeypatch.setitem(scratchdet.BODIES, "mine", lambda config: Body())
    monkeypatch.setitem(scratchdet.TAKES, "mine", ())
    model = ScratchDet(replace(NARROW, backbone="mine"))
    loc, logits = model(torch.zeros(2, 3, 300, 300))
    assert loc.shape == (2, 8732, 4)
    assert logits.shape == (2, 8732, 4)


def grid_of_priors(n: int) -> torch.Tensor:
    """(n * n, 4) cxcywh: boxes that touch nowhere."""
    at = (torch.arange(n) + 0.5) / n
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    size = torch.full_like(rows, 0.5 / n)
    return torch.stack([columns, rows, size, size], dim=-1).reshape(-1, 4)


def test_detect_keeps_400_of_a_class_and_200_of_an_image():
    """576 boxes apart from each other: the numbers that Caffe SSD evaluates with."""
    priors, loc = grid_of_priors(24), torch.zeros(1, 576, 4)
    logits = torch.zeros(1, 576, 3)
    logits[0, :, 1] = torch.linspace(2, 4, 576)
    logits[0, :, 2] = -9.0  # below .01
    assert detect(loc, logits, priors, max_detections=1000)[3].tolist() == [400]
    boxes, scores, labels, count = detect(loc, logits, priors)
    assert count.tolist() == [200]
    assert boxes.shape == (1, 200, 4)
    assert (labels == 1).all()
    assert (scores[0, 1:] <= scores[0, :-1]).all()
    torch.testing.assert_close(boxes[0, 0], cxcywh_to_xyxy(priors)[575])  # the best is the last


def test_detect_by_hand():
    """Softmax, threshold above .01, NMS within a class at .45; no background."""
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.55, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]])
    probability = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.5, 0.4], [0.985, 0.009, 0.006]])
    boxes, scores, labels, count = detect(torch.zeros(1, 3, 4), probability.log()[None], priors)
    # priors 0 and 1 overlap by .15 / .25: IoU .6; each class keeps the better one
    assert count.tolist() == [2]
    assert labels[0, :3].tolist() == [1, 2, 0]
    torch.testing.assert_close(scores[0, :3], torch.tensor([0.6, 0.4, 0.0]))
    torch.testing.assert_close(boxes[0, :2], cxcywh_to_xyxy(priors)[:2])


def test_the_table_of_the_network(capsys):
    text = summary(on_meta())
    assert "root-resnet34" in text
    assert "24,589,852 parameters, 33.30 GMACs" in text
    assert "8,732 priors" in text
    rows = [line.split() for line in text.splitlines()[2:8]]
    assert [r[1] for r in rows] == ["38x38", "19x19", "10x10", "5x5", "3x3", "1x1"]
    assert [int(r[2]) for r in rows] == [256, 512, 128, 128, 128, 128]
    assert [int(r[4]) for r in rows] == [5776, 2166, 600, 150, 36, 4]
