"""experiments/baselines.py: the rival networks."""

import dataclasses
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scratchdet
from experiments import baselines
from scratchdet import (
    Config,
    ScratchDet,
    cxcywh_to_xyxy,
    load_detector,
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


def test_the_rivals_are_among_the_backbones_and_say_what_they_take():
    assert baselines.BODIES.items() <= scratchdet.BODIES.items()
    assert scratchdet.TAKES.keys() == scratchdet.BODIES.keys()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dsod300", {"extras": "conv"}),
        ("root-resnet34-preact", {"stem": (7, 3, 1)}),
        ("root-resnet34-preact", {"extras": "conv"}),
        ("scratchdet512", {"size": 512, "priors": "coco512", "extras": "conv"}),
        ("ssd321", {"size": 321, "priors": "voc321", "stem": (3, 3, 2)}),
    ],
)
def test_options_without_effect_are_refused(name, fields):
    with pytest.raises(ValueError, match=f"{name} has no such option"):
        Config(name, **fields)


@pytest.mark.parametrize("name", baselines.BODIES)
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


def test_ssd321_is_the_released_one():
    """116,526,320 parameters, counted from the script of chengyangfu/caffe (branch dssd), which
    has no BN in the head; 5x5 heads on maps 1 and 2; strides in the first 1x1; 17,080 priors."""
    model = on_meta("ssd321", bn="backbone")
    assert sum(p.numel() for p in model.parameters()) == 116_526_320
    kernels = [conv[0].kernel_size[0] for conv in model.head.loc]
    assert kernels == [conv[0].kernel_size[0] for conv in model.head.conf] == [5, 5, 3, 3, 3, 3]
    first, middle, _ = model.features.stages[1][0].branch
    assert (first[0].kernel_size, first[0].stride) == ((1, 1), (2, 2))
    assert (middle[0].kernel_size, middle[0].stride) == ((3, 3), (1, 1))
    centres = model_priors = make_priors(model.config, model.map_sizes(321, 321)) * 321
    map5 = model_priors[17_080 - 8 - 72 : 17_080 - 8]
    assert sorted({round(x) for x in map5[:, 0].tolist()}) == [54, 160, 268]  # 53.5 + 107 k
    assert centres[-1, 0] == pytest.approx(160.5)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", baselines.BODIES)
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
    saved = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    torch.save(saved, tmp_path / "last.pt")
    again, _ = load_detector(tmp_path / "last.pt")
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
    with pytest.raises(ValueError, match=r"has 7: expected coco512"):
        ScratchDet(Config("scratchdet512", width=0.05, size=512, priors="coco"))
    with pytest.raises(ValueError, match="ssd321"):
        ScratchDet(Config("ssd321", width=0.05))
    with pytest.raises(ValueError, match="size = 256: scratchdet512 makes 6 maps"):
        ScratchDet(Config("scratchdet512", width=0.05, size=256, priors="coco512"))
