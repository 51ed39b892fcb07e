"""The same numbers as the code of SSD, ScratchDet, DSOD, DSSD and RefineDet.

None of it can be a dependency, so its numbers were frozen into fidelity.json, by
experiments/reference.py. On how many more cases it was compared: docs/fidelity.md.
"""

import json

import numpy as np
import pytest
import torch

import data
import detect as detecting
import metrics
import ops
from experiments import reference
from scratchdet import Config, assign_targets, cxcywh_to_xyxy, encode, make_priors

FROZEN = json.loads(reference.FROZEN.read_text())


@pytest.mark.parametrize("name", reference.SMALL)
def test_networks_compute_what_the_released_definitions_say(name):
    """Of mmdetection's Root-ResNet-34 maps 1 to 5: its sixth is 3x3 (docs/deviations.md)."""
    frozen = FROZEN["networks"][name]
    for key, numbers in reference.our_numbers(name).items():
        assert numbers == pytest.approx(frozen[key], rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("case", FROZEN["matching"], ids=lambda case: f"{len(case['boxes'])} boxes")
def test_matching_mining_and_coding_are_caffes(case):
    """MatchBBox, EncodeBBox and MineHardExamples on the 8732 priors of VOC."""
    priors, boxes = make_priors(Config()), torch.tensor(case["boxes"])
    offsets = torch.tensor([0, len(boxes)])
    matched = ops.match(cxcywh_to_xyxy(priors), boxes, offsets)[0]
    assert torch.nonzero(matched >= 0)[:, 0].tolist() == case["priors"]
    assert matched[case["priors"]].tolist() == case["box"]
    ones = torch.ones(len(boxes), dtype=torch.long)
    labels, codes = assign_targets(priors, boxes, ones, offsets)
    assert codes.abs().double().sum((0, 1)).tolist() == pytest.approx(case["code_sums"], rel=1e-5)
    wanted = encode(boxes[case["box"]], priors[case["priors"]])
    assert torch.equal(codes[0, case["priors"]], wanted)
    logits = torch.sin(torch.arange(8732 * 21, dtype=torch.float64) * 0.73) * 3
    loss = ops.mined_cross_entropy(logits.float().reshape(1, 8732, 21), labels, 3)[0]
    assert torch.nonzero((loss != 0) & (labels[0] == 0))[:, 0].tolist() == case["mined"]


@pytest.mark.parametrize("scene", reference.SCENES)
def test_crops_are_distributed_as_caffes(scene):
    """200,000 draws of GenerateSamples, and 4,000 of ours. Before commit e3c0161: .16 to .29."""
    rng, boxes = np.random.default_rng(0), np.array(reference.SCENES[scene], np.float32)
    crops = np.stack([data.crop(boxes, rng) for _ in range(4000)])
    assert reference.largest_distance(crops, FROZEN["crops"][scene]) < 0.03


@pytest.mark.parametrize("case", FROZEN["average precision"])
def test_average_precision_is_caffes(case):
    """ComputeAP: "11point" and "MaxIntegral"."""
    found = np.array(case["found"])
    ap11, area, *_ = metrics.average_precision(found, 1 - found, case["objects"])
    assert ap11 == pytest.approx(case["11point"], abs=2e-6)
    assert area == pytest.approx(case["area"], abs=2e-6)


def test_passes_are_refinedets():
    """multi_scale_test_net_320: input side, kept if the long side > a, or the short side < b."""
    passes = [(320, 1, 0, np.inf), (320, 0.6, 0, np.inf), (192, 1, 32, np.inf), (384, 1, 0, 160)]
    passes += [(448, 1, 0, 128), (512, 1, 0, 96), (576, 1, 0, 64), (704, 1, 0, 32)]
    ours = [(round(320 * scale), *rest) for scale, *rest in detecting.MULTI_SCALE]
    assert ours == passes
    assert detecting.COCO_MULTI_SCALE == (*detecting.MULTI_SCALE, (2.0, 1.0, 0, 48))


def test_voting_keeps_all():
    boxes = np.array([[30.0 * i, 0, 30 * i + 20, 20] for i in range(1000)])
    found = metrics.Detections(boxes, np.full(1000, 0.5), np.ones(1000, np.int64))
    assert len(detecting.vote_boxes(found).scores) == 1000


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_box_voting_is_refinedets(kind):
    """bbox_vote and soft_bbox_vote; boxes of one class, by falling score."""
    rows = np.array(FROZEN["votes"]["boxes"])
    found = metrics.Detections(rows[:, :4], rows[:, 4], np.ones(len(rows), np.int64))
    voted = detecting.vote_boxes(found, soft=kind == "soft")
    ours = np.c_[voted.boxes_xyxy, voted.scores]
    ours = ours[np.lexsort((ours[:, 0], -ours[:, 4]))]
    np.testing.assert_allclose(ours, FROZEN["votes"][kind], atol=2e-6)
