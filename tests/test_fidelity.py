"""The same numbers as the reference code: weiliu89/caffe (branch ssd), KimSoybean/ScratchDet,
szq0214/DSOD, chengyangfu/caffe (branch dssd), sfzhang15/RefineDet.

None of it can be a dependency, so what it computes was frozen into fidelity.json; how, and on how
many more cases it was compared, is said in docs/fidelity.md.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import eval as evaluation
import metrics
import ops
from experiments import baselines  # noqa: F401  adds its networks
from scratchdet import (
    BasicBlock,
    Config,
    L2Norm,
    ScratchDet,
    assign_targets,
    cxcywh_to_xyxy,
    encode,
    make_priors,
)

FROZEN = json.loads(Path(__file__).with_name("fidelity.json").read_text())

# ------------------------------------------------------------------------------ networks


def wave(n: int, phase: float) -> torch.Tensor:
    """Numbers that any code can make again: a sine."""
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.61 + phase)


def fill(modules: list[nn.Module]) -> None:
    """Weights that depend on the place in the list: one for a convolution or an L2 norm, two for a
    BatchNorm (Caffe's BatchNorm and Scale)."""
    k = 0
    for m in (leaf for module in modules for leaf in module.modules()):
        if isinstance(m, nn.Conv2d):
            scale = math.sqrt(2 / m.weight[0].numel())
            m.weight.data = wave(m.weight.numel(), k).reshape(m.weight.shape) * scale
            if m.bias is not None:
                m.bias.data = 0.1 * wave(len(m.bias), k + 0.5)
            k += 1
        elif isinstance(m, nn.BatchNorm2d):
            c = m.num_features
            m.running_mean, m.running_var = 0.1 * wave(c, k), 1 + 0.5 * wave(c, k + 0.5)
            m.weight.data, m.bias.data = 1 + 0.1 * wave(c, k + 1), 0.1 * wave(c, k + 1.5)
            k += 2
        elif isinstance(m, L2Norm):
            m.weight.data = 20 + wave(len(m.weight), k).reshape(-1, 1, 1)
            k += 1


def numbers(x: torch.Tensor) -> list[float]:
    """Mean, mean of the absolute value, deviation, and seven elements."""
    x = x.flatten()
    some = x[:: max(1, len(x) // 7)][:7]
    return [x.mean().item(), x.abs().mean().item(), x.std().item(), *some.tolist()]


# The modules of each network in the order in which the reference creates its layers.


def heads(model: ScratchDet) -> list[list[nn.Module]]:
    return [list(pair) for pair in zip(model.head.loc, model.head.conf, strict=True)]


def vgg16(model):
    body, (first, *others) = model.features, heads(model)
    return [body.to_conv4_3, body.to_fc7, body.extras, body.norm, *first, *sum(others, [])]


def caffe_compat(model):
    blocks = [block for stage in model.features.stages for block in stage]
    parts = [[b.activate, b.shortcut or nn.Identity(), b.conv1, b.conv2] for b in blocks]
    return [model.features.stem, *sum(parts, []), *sum(heads(model), [])]


def ssd321(model):
    body = model.features
    blocks = [b for stage in body.stages for b in stage] + [*body.extras, *body.before_heads]
    return [body.stem, *sum(([b.shortcut, b.branch] for b in blocks), []), *sum(heads(model), [])]


def dsod300(model):
    body = model.features
    parts = [body.stem, body.dense1, body.transition1, body.dense2, body.transition2, body.dense3]
    parts += [body.transition3, body.dense4, body.transition4, body.first_handed_on]
    parts += sum(([half.learned, half.handed_on] for half in body.extras), [])
    return parts + sum(([n, *h] for n, h in zip(body.norms, heads(model), strict=True)), [])


SSD321 = {"bn": "backbone", "width": 0.25, "size": 321, "priors": "voc321"}


@pytest.mark.parametrize(
    ("name", "order", "side", "config"),
    [
        ("SSD300 VGG-16 (weiliu89)", vgg16, 300, Config("vgg16", "none", 0.125, l2_norm=True)),
        ("Root-ResNet-34, Caffe (KimSoybean)", caffe_compat, 300,
         Config("root-resnet34-caffe-compat", width=0.125, head_bn_eps=1e-3)),
        ("DSOD300 (szq0214)", dsod300, 96, Config("dsod300", head_bn_eps=1e-3)),
        ("SSD321 (chengyangfu)", ssd321, 321, Config("ssd321", **SSD321)),
    ],
    ids=["vgg16", "caffe-compat", "dsod300", "ssd321"],
)  # fmt: skip
def test_networks_compute_what_the_released_definitions_say(name, order, side, config):
    model = ScratchDet(config).double().eval()
    fill(order(model))
    for module in model.modules():
        if config.backbone == "ssd321" and isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # in the whole network there (docs/deviations.md)
    image = torch.sin(torch.arange(3 * side * side, dtype=torch.float64) * 0.013)
    with torch.no_grad():
        loc, logits = model(image.reshape(1, 3, side, side))
    for ours, key in ((loc, "loc"), (logits, "conf")):
        assert numbers(ours) == pytest.approx(FROZEN["networks"][name][key], rel=1e-6, abs=1e-9)


def test_the_default_network_is_that_of_the_released_mmdetection_code():
    """Post-activation Root-ResNet-34: maps 1 to 5. Map 6 is 3x3 there (stride 1), 1x1 here."""
    model = ScratchDet(Config("root-resnet34", width=0.25)).double().eval()
    body = model.features
    blocks = [b for stage in body.stages for b in stage] + [*body.extras[:3]]
    assert all(isinstance(b, BasicBlock) for b in blocks)
    fill([body.stem, *sum(([b.conv1, b.conv2, b.shortcut] for b in blocks), [])])
    image = torch.sin(torch.arange(3 * 300 * 300, dtype=torch.float64) * 0.013)
    with torch.no_grad():
        maps = body(image.reshape(1, 3, 300, 300))
    frozen = FROZEN["networks"]["Root-ResNet-34 (mmdetection)"]
    for i in range(5):
        assert numbers(maps[i]) == pytest.approx(frozen[f"map {i + 1}"], rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- matching, mining, coding


@pytest.mark.parametrize("case", FROZEN["matching"], ids=lambda case: f"{len(case['boxes'])} boxes")
def test_matching_mining_and_coding_are_caffes(case):
    """MatchBBox, EncodeBBox and MineHardExamples, compiled, on the 8732 priors of VOC."""
    priors, boxes = make_priors(Config()), torch.tensor(case["boxes"])
    rows = torch.tensor([0, len(boxes)])
    matched = ops.match(cxcywh_to_xyxy(priors), boxes, rows)[0]
    assert torch.nonzero(matched >= 0)[:, 0].tolist() == case["priors"]
    assert matched[case["priors"]].tolist() == case["box_of_each"]
    labels, codes = assign_targets(priors, boxes, torch.ones(len(boxes), dtype=torch.long), rows)
    assert codes.abs().double().sum((0, 1)).tolist() == pytest.approx(case["code_sum"], rel=1e-5)
    assert torch.equal(codes[0, case["priors"]],
                       encode(boxes[case["box_of_each"]], priors[case["priors"]]))  # fmt: skip
    logits = torch.sin(torch.arange(8732 * 21, dtype=torch.float64) * 0.73).float() * 3
    loss = ops.mined_cross_entropy(logits.reshape(1, 8732, 21), labels, 3)[0]
    assert torch.nonzero((loss != 0) & (labels[0] == 0))[:, 0].tolist() == case["mined"]


# ------------------------------------------------------------------------------ crops


def quantile_distance(values: np.ndarray, frozen: list[float]) -> float:
    """How far the shares of `values` up to the frozen 5 %, 10 %, ... quantiles are from these."""
    values = np.sort(values)
    shares = np.searchsorted(values, np.array(frozen) + 1e-4) / len(values)
    before = np.searchsorted(values, np.array(frozen) - 1e-4) / len(values)
    wanted = np.arange(5, 100, 5) / 100  # equal quantiles (a full side) are one step of many
    return max(max(w - s, b - w, 0) for s, b, w in zip(shares, before, wanted, strict=True))


@pytest.mark.parametrize("scene", FROZEN["crops"])
def test_crops_are_distributed_as_caffes(scene):
    """200,000 draws of the compiled GenerateSamples, and 4,000 of ours: quantiles of width, height,
    aspect and left side; the share of whole images, and of full width or height among the rest."""
    frozen, rng = FROZEN["crops"][scene], np.random.default_rng(0)
    boxes = np.array(frozen["boxes"], np.float32)
    crops = np.stack([data.crop(boxes, rng) for _ in range(4000)])  # (n, 4) xyxy
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    part = (width < 1 - 1e-6) | (height < 1 - 1e-6)
    assert 1 - part.mean() == pytest.approx(frozen["whole"], abs=0.03)
    full = (np.maximum(width, height) > 1 - 1e-6)[part].mean()
    assert full == pytest.approx(frozen["full_side_of_the_others"], abs=0.03)
    for name, values in (("width", width), ("height", height), ("aspect", width / height),
                         ("left", crops[:, 0])):  # fmt: skip
        assert quantile_distance(values[part], frozen[name]) < 0.03, name


# ------------------------------------------------------------------------------ AP, voting


@pytest.mark.parametrize("case", FROZEN["average_precision"], ids=lambda c: f"{len(c['tp'])} found")
def test_average_precision_is_caffes(case):
    """ComputeAP, compiled: "11point" and "MaxIntegral"."""
    found = np.array(case["tp"])
    ap11, area, *_ = metrics.average_precision(found, 1 - found, case["objects"])
    assert ap11 == pytest.approx(case["11point"], abs=2e-6)
    assert area == pytest.approx(case["area"], abs=2e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_box_voting_is_refinedets(soft):
    """bbox_vote and soft_bbox_vote; boxes of one class, by falling score."""
    frozen = FROZEN["votes"]
    rows = np.array(frozen["boxes"])
    found = metrics.Detections(rows[:, :4], rows[:, 4], np.ones(len(rows), np.int64))
    voted = evaluation.vote_boxes(found, soft=soft)
    ours = np.c_[voted.boxes_xyxy, voted.scores]
    ours = ours[np.lexsort((ours[:, 0], -ours[:, 4]))]
    np.testing.assert_allclose(ours, frozen["soft" if soft else "hard"], atol=2e-5)
