"""The priors, the box coding, and the order that head, priors and loss share, by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import scratchdet
from ops.reference import decode
from scratchdet import Config, ScratchDet, cxcywh_to_xyxy, encode, make_priors

NARROW = Config(backbone="root-resnet18", width=0.25, classes=("a", "b", "c"))

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
