"""The network, its priors and the box coding, against numbers worked out by hand or elsewhere."""

import json
import math
import pickle
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scratchdet
from ops.reference import decode
from plumbing.checkpoint import read_checkpoint
from scratchdet import (
    BasicBlock,
    Config,
    ScratchDet,
    cxcywh_to_xyxy,
    detect,
    encode,
    load_detector,
    make_priors,
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


# ------------------------------------------------------------------------------- priors

# The first cell of each map: centre in pixels, then (w, h) in pixels in their order.
R2, R3 = 1.41421356, 1.73205081
FIRST_CELL_VOC = [
    (4, [(30, 30), (42.4264, 42.4264), (42.4264, 21.2132), (21.2132, 42.4264)]),
    (8, [(60, 60), (81.6088, 81.6088), (84.8528, 42.4264), (42.4264, 84.8528),
         (103.9230, 34.6410), (34.6410, 103.9230)]),
    (16, [(111, 111), (134.0970, 134.0970), (156.9777, 78.4889), (78.4889, 156.9777),
          (192.2576, 64.0859), (64.0859, 192.2576)]),
    (32, [(162, 162), (185.7579, 185.7579), (229.1026, 114.5513), (114.5513, 229.1026),
          (280.5922, 93.5307), (93.5307, 280.5922)]),
    (50, [(213, 213), (237.1329, 237.1329), (301.2275, 150.6137), (150.6137, 301.2275)]),
    (150, [(264, 264), (288.3748, 288.3748), (373.3524, 186.6762), (186.6762, 373.3524)]),
]  # fmt: skip
SMALL_LARGE_COCO = [
    (21, 30.7409), (45, 66.7458), (99, 123.0732), (153, 177.9635), (207, 232.4371), (261, 286.7316),
]  # fmt: skip
STARTS = [0, 5776, 7942, 8542, 8692, 8728]  # 38*38*4, + 19*19*6, + 10*10*6, + 5*5*6, + 3*3*4


def test_first_cell_of_every_map():
    priors = make_priors(Config()) * 300  # pixels
    for start, (centre, sides) in zip(STARTS, FIRST_CELL_VOC, strict=True):
        rows = torch.tensor([(centre, centre, w, h) for w, h in sides])
        torch.testing.assert_close(priors[start : start + len(sides)], rows, rtol=0, atol=2e-4)


def test_priors_run_along_rows_first():
    priors = make_priors(Config())
    # map 1: next prior of the row is 4 on, 8 pixels to the right; next row is 38 * 4 on
    step = torch.tensor([8 / 300, 0, 0, 0])
    torch.testing.assert_close(priors[4] - priors[0], step, rtol=0, atol=1e-6)
    torch.testing.assert_close(priors[152] - priors[0], step.roll(1), rtol=0, atol=1e-6)
    # map 5: 100 pixels from cell to cell
    torch.testing.assert_close(priors[8692 + 4, 0] * 300, torch.tensor(150.0))
    torch.testing.assert_close(priors[8692 + 12, 1] * 300, torch.tensor(150.0))


def test_priors_are_not_clipped():
    pixels = cxcywh_to_xyxy(make_priors(Config())) * 300
    # the wide prior of the last map: 150 +- 373.3524 / 2 by 150 +- 186.6762 / 2
    wanted = torch.tensor([-36.6762, 56.6619, 336.6762, 243.3381])
    torch.testing.assert_close(pixels[8730], wanted, rtol=0, atol=2e-3)
    # the farthest out are those of ratio 3 on map 4, at 32 and 288 pixels
    assert pixels.min().item() == pytest.approx(32 - 280.5922 / 2, abs=2e-3)
    assert pixels.max().item() == pytest.approx(288 + 280.5922 / 2, abs=2e-3)


def test_coco_priors_are_smaller():
    priors = make_priors(Config(priors="coco")) * 300
    assert len(priors) == 8732
    for start, (small, large) in zip(STARTS, SMALL_LARGE_COCO, strict=True):
        wide = torch.tensor([small * R2, small / R2])
        torch.testing.assert_close(priors[start, 2:], torch.tensor([float(small)] * 2))
        torch.testing.assert_close(
            priors[start + 1, 2:], torch.tensor([large] * 2), rtol=2e-6, atol=0
        )
        torch.testing.assert_close(priors[start + 2, 2:], wide)
        torch.testing.assert_close(priors[start + 3, 2:], wide.flip(0))
    torch.testing.assert_close(priors[5776 + 4, 2:], torch.tensor([45 * R3, 45 / R3]))


def test_priors_of_another_image_size_keep_their_pixels():
    """An image of 600 x 400 (h x w): the sides stay, steps 100 and 300 would leave the image."""
    maps = [(75, 50), (38, 25), (19, 13), (10, 7), (5, 4), (2, 1)]
    priors = make_priors(Config(), maps, (600, 400)) * torch.tensor([400.0, 600, 400, 600])
    torch.testing.assert_close(priors[0], torch.tensor([4.0, 4, 30, 30]))
    torch.testing.assert_close(priors[4], torch.tensor([12.0, 4, 30, 30]))
    torch.testing.assert_close(priors[50 * 4], torch.tensor([4.0, 12, 30, 30]))
    at = sum(h * w * a for (h, w), a in zip(maps[:4], (4, 6, 6, 6), strict=True))
    torch.testing.assert_close(priors[at], torch.tensor([50.0, 60, 213, 213]))  # 400/4/2, 600/5/2
    torch.testing.assert_close(priors[-4], torch.tensor([200.0, 450, 264, 264]))


def test_priors_of_the_same_fraction_of_another_image_size():
    """An image of 150 x 600 (h x w): sides half as high and twice as wide, in pixels; the distance
    between cells is the stride of the map."""
    maps = [(19, 75), (10, 38), (5, 19), (3, 10), (2, 5), (1, 3)]
    fraction = make_priors(Config(), maps, (150, 600), same_fraction=True)
    pixels = fraction * torch.tensor([600.0, 150, 600, 150])
    torch.testing.assert_close(pixels[0], torch.tensor([4.0, 4, 60, 15]))
    torch.testing.assert_close(pixels[4], torch.tensor([12.0, 4, 60, 15]))
    torch.testing.assert_close(pixels[75 * 4], torch.tensor([4.0, 12, 60, 15]))
    torch.testing.assert_close(fraction[0, 2:], torch.tensor([0.1, 0.1]))  # 30 of 300
    # map 5: 2 x 5 cells of 75 x 120 pixels; its small square is 213 / 300 of the image
    at = sum(h * w * a for (h, w), a in zip(maps[:4], (4, 6, 6, 6), strict=True))
    torch.testing.assert_close(pixels[at, :2], torch.tensor([60.0, 37.5]))
    torch.testing.assert_close(fraction[at, 2:], torch.tensor([0.71, 0.71]))
    # of a shape that occurs in no other image: as many rows as in pixels, the same centres
    sides_in_pixels = make_priors(Config(), maps, (150, 600))
    assert torch.equal(fraction[:, :2], sides_in_pixels[:, :2])
    assert torch.equal(make_priors(Config(), same_fraction=True), make_priors(Config()))


# --------------------------------------------------------------------------- box coding


def test_encode_by_hand():
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.45, 0.4, 0.65, 0.6]])  # centre (.55, .5), size (.2, .2)
    # (.05 / .2) / .1, 0, ln 1 / .2, ln .5 / .2
    wanted = torch.tensor([[2.5, 0.0, 0.0, -3.4657359]])
    torch.testing.assert_close(encode(box, prior), wanted, rtol=0, atol=2e-5)


def test_decode_by_hand():
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    loc = torch.tensor([[1.0, -2.0, 3.4657359, 0.0]])
    # centre .5 + .1 * .2, .5 - .2 * .4; size .2 * 2, .4
    wanted = torch.tensor([[0.32, 0.22, 0.72, 0.62]])
    torch.testing.assert_close(decode(loc, prior), wanted, rtol=0, atol=1e-6)


def test_coding_round_trip(rng):
    priors = make_priors(Config())
    corner, size = torch.rand(8732, 2, generator=rng), torch.rand(8732, 2, generator=rng)
    boxes = torch.cat([corner, corner + 0.01 + size], dim=1)
    torch.testing.assert_close(decode(encode(boxes, priors), priors), boxes, rtol=0, atol=2e-6)
    boxes = torch.stack([boxes, boxes.flip(0)])  # a batch of them
    torch.testing.assert_close(decode(encode(boxes, priors), priors), boxes, rtol=0, atol=2e-6)


# ----------------------------------------------------- the order that head, priors, loss share

MAPS = [(6, 4), (4, 3), (3, 5), (2, 3), (3, 1), (1, 2)]  # rows, columns: none is square
IMAGE_HW = (48, 40)


def copying_head(config: Config, channels: int = 1) -> nn.Module:
    """A head without BN whose weights are all 0, to be set by hand."""
    body = SimpleNamespace(channels=[channels] * 6)
    head = scratchdet.Head(body, replace(config, bn="none"))
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


def map_of_each_prior(priors_cxcywh) -> torch.Tensor:
    """(P,) 0..5, from the prior's sides in pixels alone."""
    sides = priors_cxcywh[:, 2:] * torch.tensor([IMAGE_HW[1], IMAGE_HW[0]])
    nearest = [
        (sides[:, None] - torch.tensor(rows)).abs().sum(-1).amin(1) for _, rows in FIRST_CELL_VOC
    ]
    return torch.stack(nearest).argmin(0)


def step_of_each_map():
    """(height, width) in pixels of a cell."""
    h, w = IMAGE_HW
    return [(8, 8), (16, 16), (32, 32), (64, 64), (h / 3, w / 1), (h / 1, w / 2)]


def test_changing_one_cell_changes_only_its_neighbourhood(rng):
    """Locality, on maps that are not square."""
    head = copying_head(NARROW, channels=3)
    for conv in [*head.loc, *head.conf]:
        conv[0].weight.data.uniform_(0.5, 1.5, generator=rng)  # no term cancels another
    priors = make_priors(NARROW, MAPS, IMAGE_HW)
    centres = priors[:, :2] * torch.tensor([IMAGE_HW[1], IMAGE_HW[0]])  # x, y in pixels
    owner = map_of_each_prior(priors)
    maps = [torch.rand(1, 3, h, w, generator=rng) for h, w in MAPS]
    before = head(maps)
    for m, ((rows, columns), (sy, sx)) in enumerate(zip(MAPS, step_of_each_map(), strict=True)):
        for row in range(rows):
            for column in range(columns):
                changed_maps = [x.clone() for x in maps]
                changed_maps[m][0, 1, row, column] += 1.0
                after = head(changed_maps)
                near_x = (centres[:, 0] / sx - (column + 0.5)).abs() < 1.01
                near_y = (centres[:, 1] / sy - (row + 0.5)).abs() < 1.01
                wanted = (owner == m) & near_x & near_y
                assert wanted.sum() > 0
                for old, new in zip(before, after, strict=True):
                    changed = (old != new)[0].all(dim=1)
                    assert torch.equal(changed, (old != new)[0].any(dim=1))
                    assert torch.equal(changed, wanted), (m, row, column)


def test_every_output_belongs_to_the_prior_of_its_row_column_and_shape():
    """Maps that hold their own coordinates, copied by the head's centre tap, are the priors'."""
    head = copying_head(NARROW, channels=2)
    priors = make_priors(NARROW, MAPS, IMAGE_HW)
    for conv in [*head.loc, *head.conf]:
        conv[0].weight.data[:, :, 1, 1] = torch.tensor([1.0, 100.0])  # row + 100 * column
        conv[0].bias.data = torch.arange(len(conv[0].bias)) / 64  # + channel / 64
    maps = [
        torch.stack(torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij"))
        for h, w in MAPS
    ]
    loc, logits = head([m[None] for m in maps])
    owner = map_of_each_prior(priors)
    pixels = priors * torch.tensor([IMAGE_HW[1], IMAGE_HW[0]] * 2)
    for out, k in ((loc[0], 4), (logits[0], NARROW.num_classes)):
        whole = out[:, 0].floor()
        row, column = whole % 100, (whole / 100).floor()
        channel = (out - whole[:, None]) * 64  # (P, k)
        assert torch.equal(channel - channel[:, :1], torch.arange(float(k)).expand(len(out), k))
        shape = channel[:, 0] / k  # which prior of the cell
        for m, (sy, sx) in enumerate(step_of_each_map()):
            of_map = owner == m
            assert of_map.sum() == MAPS[m][0] * MAPS[m][1] * (4, 6, 6, 6, 4, 4)[m]
            torch.testing.assert_close(pixels[of_map, 0], (column[of_map] + 0.5) * sx)
            torch.testing.assert_close(pixels[of_map, 1], (row[of_map] + 0.5) * sy)
            sides = torch.tensor(FIRST_CELL_VOC[m][1])[shape[of_map].long()]
            torch.testing.assert_close(pixels[of_map, 2:], sides, rtol=0, atol=1e-3)


@pytest.mark.parametrize("hw", [(64, 96), (96, 96), (33, 70), (160, 40)])
@pytest.mark.parametrize("backbone", ["root-resnet18", "vgg16"])
def test_small_and_oblong_images_have_as_many_priors_as_outputs(backbone, hw):
    model = ScratchDet(replace(NARROW, backbone=backbone)).eval()
    with torch.no_grad():
        maps = model.features(torch.zeros(1, 3, *hw))
        loc, logits = model.head(maps)
    sizes = [tuple(m.shape[-2:]) for m in maps]
    assert sizes == model.map_sizes(*hw)
    priors = make_priors(model.config, sizes, hw)
    assert loc.shape == (1, len(priors), 4)
    assert logits.shape == (1, len(priors), 4)
    assert 2 <= len(sizes) < 6  # some levels have no 3x3 left


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


# --------------------------------------------------------------------- Config and checkpoints


def test_config_survives_json():
    config = Config(
        backbone="resnet18", bn="none", width=0.5, stem=(3, 2, 1), classes=("dog", "cat"),
        priors="coco", channels="bgr", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0),
    )  # fmt: skip
    assert Config.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert Config.from_dict(asdict(Config())) == Config()
    assert Config.from_dict({"backbone": "vgg16", "l2_norm": True}).l2_norm


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"std": (58.0, 0.0, 58.0)}, "3 numbers above 0"),
        ({"backbone": "resnet99"}, "backbone = 'resnet99': expected one of .*root-resnet34"),
        ({"bn": "some"}, "bn = 'some'"),
        ({"extras": "none"}, "extras = 'none'"),
        ({"priors": "kitti"}, "priors = 'kitti'"),
        ({"channels": "hsv"}, "channels = 'hsv'"),
        ({"width": 0}, "width = 0"),
        ({"width": float("nan")}, "width = nan"),
        ({"classes": ()}, "classes"),
        ({"classes": ("dog", "dog")}, "different names"),
        ({"classes": "dog"}, "classes = 'dog': expected a tuple"),  # not the classes d, o and g
        ({"stem": (2, 1, 1)}, "odd kernel"),
        ({"stem": (3, 0, 1)}, "odd kernel"),
        ({"stem": (3, 3, 0)}, "odd kernel"),
        ({"size": 0}, "size = 0"),
        ({"head_bn_eps": 0.0}, "head_bn_eps = 0.0"),
        ({"std": (58.0, float("nan"), 58.0)}, "3 numbers above 0"),
    ],
)
def test_config_refuses_what_it_does_not_know(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


def test_config_of_a_newer_version_is_named():
    with pytest.raises(ValueError, match="unknown Config fields .'depth'"):
        Config.from_dict({"depth": 3})


def checkpoint_of(model: ScratchDet) -> dict:
    return {"config": asdict(model.config), "model": model.state_dict(), "step": 7}


def test_a_detector_comes_back_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    model = ScratchDet(NARROW)
    torch.save(checkpoint_of(model), tmp_path / "last.pt")
    loaded, checkpoint = load_detector(tmp_path / "last.pt")
    assert loaded.config == NARROW
    assert not loaded.training
    assert checkpoint["step"] == 7
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_checkpoints_of_before_are_still_read(tmp_path):
    """Of commit 050fbda: without the newer fields of Config; with averaged weights, which win; and
    with options that had no effect."""
    model = ScratchDet(replace(NARROW, backbone="vgg16", width=0.05))
    old = checkpoint_of(model)
    for field in ("l2_norm", "head_bn_eps"):
        del old["config"][field]
    ema = {k: torch.full_like(v, 3) for k, v in model.state_dict().items()}
    for averaged, value in ((None, None), (ema, 3)):
        old["config"] |= {"extras": "conv", "stem": (3, 1, 1)}
        torch.save(old | {"ema": averaged}, tmp_path / "last.pt")
        loaded, _ = load_detector(tmp_path / "last.pt")
        assert loaded.config == model.config
        weights = loaded.state_dict()
        assert all((weights[k] == (v if value is None else value)).all()
                   for k, v in model.state_dict().items())  # fmt: skip


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


def damaged_files(folder) -> dict:
    model = ScratchDet(NARROW)
    good = checkpoint_of(model)
    torch.save(good, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "truncated": whole[: len(whole) // 2],
        "cut by a byte": whole[:-1],
        "code": pickle.dumps({"config": Bomb()}),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    objects = {
        "code in a zip": {"config": Bomb()},
        "weights alone": model.state_dict(),
        "a list": [1, 2],
        "a tensor": torch.zeros(3),
        "another backbone": good | {"config": good["config"] | {"backbone": "resnet99"}},
        "config of numbers": good | {"config": 3},
        "width of another type": good | {"config": good["config"] | {"width": "wide"}},
        "weights of other classes": good | {"config": good["config"] | {"classes": ("a",)}},
        "weights of another width": good | {"config": good["config"] | {"width": 0.5}},
        "a weight missing": good | {"model": dict(list(good["model"].items())[1:])},
        "weights are text": good | {"model": "weights"},
    }
    for name, value in objects.items():
        torch.save(value, folder / name)
    (folder / "a folder").mkdir()
    return [*contents, *objects, "a folder", "absent"]


@pytest.mark.filterwarnings("ignore")
def test_reading_anything_else_is_one_clear_error(tmp_path):
    of_another = ("another backbone", "weights of other classes", "weights of another width")
    of_another += ("a weight missing", "width of another type", "weights are text")
    for name in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=r"\w") as caught:
            load_detector(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message, name
        assert "\n" not in message, name
        assert len(message) < 600, name
        assert ("of another network" in message) == (name in of_another), name
        if name not in of_another:  # it is the file that is at fault
            with pytest.raises(ValueError, match="not a checkpoint|no such"):
                read_checkpoint(tmp_path / name)


def test_the_table_of_the_network(capsys):
    text = summary(on_meta())
    assert "root-resnet34" in text
    assert "24,589,852 parameters, 33.30 GMACs" in text
    assert "8,732 priors" in text
    rows = [line.split() for line in text.splitlines()[2:8]]
    assert [r[1] for r in rows] == ["38x38", "19x19", "10x10", "5x5", "3x3", "1x1"]
    assert [int(r[2]) for r in rows] == [256, 512, 128, 128, 128, 128]
    assert [int(r[4]) for r in rows] == [5776, 2166, 600, 150, 36, 4]
