"""The table of ops, from which the tests, the fuzzer, the emulator and the bench draw.

An op is one entry: how to make a case, and what "equal to the reference" means for it. Everything
that holds for every op is then run for it: odd strides, empty inputs, opcheck, torch.compile,
threads, nasty numbers under the sanitizers, the emulated kernel, a GPU's streams and graphs, a row
in the bench. An op of ops.NAMES without an entry is an error in all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import ops
from ops import reference

INF, NAN = math.inf, math.nan
NASTY = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-20, 1e18, 2e19, 3e38, -3e38, 0.5]


# ------------------------------------------------------------------------------ what is drawn

ODD_BOXES = torch.tensor(
    [
        [0.2, 0.2, INF, 0.6],  # infinite
        [-INF, 0.1, 0.5, 0.5],
        [NAN, 0.1, 0.5, 0.5],
        [0.6, 0.2, 0.2, 0.6],  # inverted in x: negative area
        [0.6, 0.6, 0.2, 0.2],  # inverted twice: positive area
        [0.3, 0.3, 0.3, 0.3],  # a point
        [0.3, 0.1, 0.3, 0.9],  # a line
        [-1e30, -1e30, 1e30, 1e30],  # its area overflows
        [0.0, 0.0, 1e-30, 1e-30],  # its area underflows
        [-5.0, -5.0, 5.0, 5.0],  # far outside the image
        [-0.0, 0.0, 0.5, 0.5],
    ]
)


def random_int(low, high, rng):
    return int(torch.randint(low, high, (), generator=rng))


def one_of(choices, rng):
    return choices[random_int(0, len(choices), rng)]


def random_boxes(n, rng, *, grid=0, odd=0.0):
    """(n,4) xyxy; on a grid of 1/`grid` (many ties and exact IoUs); a share `odd` of odd boxes."""
    corner, size = torch.rand(n, 2, generator=rng), torch.rand(n, 2, generator=rng) * 0.5
    boxes = torch.cat([corner, corner + size], dim=1)
    if grid:
        boxes = (boxes * grid).round() / grid
    replaced = torch.rand(n, generator=rng) < odd
    which = torch.randint(len(ODD_BOXES), (n,), generator=rng)
    return torch.where(replaced[:, None], ODD_BOXES[which], boxes)


def random_scores(n, rng, *, levels=0, odd=0.0):
    """(n,), negative ones, too; `levels` > 0: that many different values; some NaN, inf and -0."""
    scores = torch.randn(n, generator=rng)
    if levels:
        scores = (scores * levels).round() / levels
    strange = torch.tensor([NAN, INF, -INF, -0.0, 0.0])
    which = torch.randint(len(strange), (n,), generator=rng)
    return torch.where(torch.rand(n, generator=rng) < odd, strange[which], scores)


def offsets_of(counts):
    """Boxes of each image -> offsets (N+1,)."""
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)


def nasty(x, rng, share):
    """Some elements replaced by numbers that break careless code."""
    which = torch.randint(len(NASTY), x.shape, generator=rng)
    replaced = torch.rand(x.shape, generator=rng) < share
    return torch.where(replaced, torch.tensor(NASTY)[which].to(x.dtype), x)


def odd_strides(x, rng):
    """The same values: dense, behind an offset of one element, every other row, or turned."""
    style = random_int(0, 5, rng)
    if style == 1:
        flat = torch.cat([x.new_zeros(1), x.reshape(-1)])
        return flat[1:].view(x.shape)
    if style == 2:
        return torch.stack([x, x.new_zeros(()).expand_as(x)], dim=1).flatten(0, 1)[::2]
    if style == 3 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if style == 4 and len(x):
        return x.flip(0).contiguous().flip(0)
    return x


def strided(x):
    """The same values behind strides that skip and run across."""
    wide = torch.stack([x, x], dim=-1).transpose(0, -2) if x.dim() > 1 else torch.stack([x, x], -1)
    return wide[..., 0].transpose(0, -1) if x.dim() > 1 else wide[..., 0]


def as_list(result):
    return list(result) if isinstance(result, tuple) else [result]


# ------------------------------------------------------------------------------ equal, bit by bit


def same_bits(a, b):
    """Equal type, shape and numbers, where a NaN equals a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(a.isclose(b, rtol=0, atol=0, equal_nan=True).all())


def check_equal(op, arguments, device="cpu", expected=None):
    """The op's results are the reference's, bit by bit. -> 0: nothing was excused."""
    if expected is None:
        expected = getattr(reference, op)(*arguments)
    on_device = [x.to(device) if torch.is_tensor(x) else x for x in arguments]
    got = as_list(getattr(ops, op)(*on_device))
    for a, b in zip(got, as_list(expected), strict=True):
        assert same_bits(a.cpu(), b), (
            f"{op} differs from the reference{where(a.cpu(), b)}: {arguments}"
        )
    return 0


def where(a, b) -> str:
    """The first place in which two results differ, and in how many they do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f" in kind, {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
    differ = ~((a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b)
    at = tuple(differ.nonzero()[0].tolist())
    return f" at {list(at)}, {a[at]}, expected {b[at]}; {int(differ.sum())} of {a.numel()} differ"


# ------------------------------------------------------------------------------ colour


def colour_case(rng, n, p):
    """Images of p pixels or a few more, partly covered, with each step of the jitter on or off."""
    width = random_int(1, 2 + p // 2, rng)
    height = -(-p // width)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=rng)
    if random_int(0, 2, rng):  # black, white and pure colours: hues at the edge of a sixth
        images = images // 128 * 255
    corners = torch.rand(n, 2, 2, generator=rng).sort(dim=1).values  # (N, corner, xy)
    part = (corners * torch.tensor([width, height])).round().long().flatten(1)  # (N, 4)
    whole = torch.rand(n, 1, generator=rng) < 0.5
    inside = torch.where(whole, torch.tensor([0, 0, width, height]), part)
    neutral, most = torch.tensor([[0.0, 0, 1, 1, 0], [1, 32, 0.5, 0.5, 18]])
    drawn = neutral + (torch.rand(n, 5, generator=rng) * 2 - 1) * most * one_of((1, 1, 8), rng)
    drawn[:, 0], drawn[:, 3] = 1, drawn[:, 3].abs()  # saturation is a factor of at least 0
    jitter = torch.where(torch.rand(n, 5, generator=rng) < 0.5, drawn, neutral)
    std = one_of(([1.0, 1.0, 1.0], [58.395, 57.12, 57.375]), rng)
    dtype = one_of((torch.float32, torch.bfloat16, torch.float16), rng)
    return images, inside, jitter, [123.0, 117.0, 104.0], std, one_of(("rgb", "bgr"), rng), dtype


# ------------------------------------------------------------------------------ match


def match_case(rng, most_priors, most_boxes, num_images=4):
    counts = [random_int(0, most_boxes + 1, rng) for _ in range(num_images)]
    style = dict(grid=random_int(0, 3, rng) * 4, odd=random_int(0, 3, rng) * 0.1)
    priors = random_boxes(random_int(0, most_priors + 1, rng), rng, **style)
    boxes = random_boxes(sum(counts), rng, **style)
    threshold = (0.0, 1 / 3, 0.5, 0.5, 0.7, 1.0)[random_int(0, 6, rng)]
    return priors, boxes, offsets_of(counts), threshold


# ------------------------------------------------------------------------------ mined_cross_entropy


def mined_case(rng, n, p, c, *, levels=0, odd=0.0):
    """logits (N,P,C), labels (N,P): of the images, some have no positive, and some few negatives.

    `levels` > 0: that many different logits in 1, so ties; a share `odd` of infinities and NaNs.
    """
    logits = torch.randn(n, p, c, generator=rng) * 3
    if levels:
        logits = (logits[..., :1] * levels).round() / levels + torch.arange(c)
    strange = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 1e4, -1e4])
    which = torch.randint(len(strange), logits.shape, generator=rng)
    logits = torch.where(torch.rand(logits.shape, generator=rng) < odd, strange[which], logits)
    share = torch.tensor([0.0, 0.1, 0.1, 0.5, 1.0])[torch.randint(5, (n, 1), generator=rng)]
    is_positive = torch.rand(n, p, generator=rng) < share
    labels = torch.randint(1, max(2, c), (n, p), generator=rng)
    return logits, torch.where(is_positive & (c > 1), labels, 0)


def check_mined(logits, labels, ratio=3, device="cpu"):
    """The values are PyTorch's; which of them are left out follows exactly from the values."""
    got = ops.mined_cross_entropy(logits.to(device), labels.to(device), ratio).cpu()
    assert got.dtype == torch.float32
    n, p, c = logits.shape
    wanted = torch.nn.functional.cross_entropy(logits.float().mT, labels, reduction="none")
    if c == 1:  # sure of the only class: 0, or NaN
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        return
    # What the op says of every prior: one positive more in each image, and room for all negatives.
    more = torch.cat([logits, logits.new_zeros(n, 1, c)], dim=1).to(device)
    every = torch.cat([labels, labels.new_ones(n, 1)], dim=1).to(device)
    every = ops.mined_cross_entropy(more, every, p)[:, :p].cpu()
    torch.testing.assert_close(every, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    for value, label, result in zip(every, labels, got, strict=True):
        stays = (label > 0) | ~value.isfinite()
        hardest_first = torch.where(value.isfinite(), value, INF).sort(descending=True, stable=True)
        negatives = hardest_first.indices[label[hardest_first.indices] == 0]
        stays[negatives[: ratio * int((label > 0).sum())]] = True
        expected = torch.where(stays, value, 0.0)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------ nms


def nms_case(rng, largest):
    n = random_int(0, largest, rng)
    style = dict(grid=random_int(0, 3, rng) * 8, odd=random_int(0, 3, rng) * 0.1)
    groups = torch.randint(-1, random_int(0, 4, rng), (n,), generator=rng)
    groups = groups * (1 << random_int(0, 62, rng))  # ids may be of any size and sign
    scores = random_scores(n, rng, levels=random_int(0, 3, rng) * 4, odd=style["odd"])
    threshold = (0.0, 0.25, 1 / 3, 0.45, 0.5, 0.7, 1.0)[random_int(0, 7, rng)]
    return random_boxes(n, rng, **style), scores, groups, threshold


# ------------------------------------------------------------------------------ postprocess

EPS = 1e-6  # what two ways to compute a softmax or an exponential may differ by


def post_case(rng, n, p, c, spread_logits=2.0, background=1.0):
    priors = torch.cat([torch.rand(p, 2, generator=rng), torch.rand(p, 2, generator=rng) * 0.4], 1)
    loc = torch.randn(n, p, 4, generator=rng)
    logits = torch.randn(n, p, c, generator=rng) * spread_logits
    logits[..., 0] += background
    return loc, logits, priors


def fragile(loc, logits, priors, score_threshold, top_k, iou_threshold, max_detections):
    """Could rounding alone change the detections of this image (N = 1)? From scratch, in float64.

    Yes if a score lies at the threshold or an IoU at the other one, or if two priors of different
    logits have the same score to EPS and their order matters: they overlap, or stand at a cut.
    """
    score = logits[0].double().softmax(dim=1)  # (P, C)
    if (score - score_threshold).abs().min() < EPS:
        return True
    boxes = reference.decode(loc[0].float(), priors).double()
    candidates = []
    for label in range(1, score.shape[1]):
        above = torch.nonzero(score[:, label] > score_threshold)[:, 0]
        order = above[score[above, label].sort(descending=True, stable=True).indices]
        s = score[order, label]
        tie = (s[:, None] - s[None]).abs() < EPS  # (K, K)
        same = (logits[0, order][:, None] == logits[0, order][None]).all(dim=2)
        tie &= ~same
        iou = reference.pairwise_iou(boxes[order], boxes[order])
        off = ~torch.eye(len(order), dtype=torch.bool)
        if ((iou - iou_threshold).abs() < EPS)[off].any():
            return True
        if (tie & (iou > iou_threshold - EPS)).any():
            return True
        if len(order) > top_k and tie[:top_k, top_k:].any():
            return True
        candidates.append(s[:top_k])
    every = torch.cat(candidates).sort(descending=True).values if candidates else score[:0, 0]
    close = (every[1:] - every[:-1]).abs() < EPS
    return bool(len(every) > max_detections and close.any())


def same_detections(mine, theirs):
    """Are (boxes, scores, labels, count) of one image the same set, in whatever order of ties?"""
    k = int(theirs[3])
    if int(mine[3]) != k:
        return False
    (box_a, score_a, label_a), (box_b, score_b, label_b) = (
        [x[0, :k] for x in result[:3]] for result in (mine, theirs)
    )
    pair = (label_a[:, None] == label_b[None]) & ((score_a[:, None] - score_b[None]).abs() < EPS)
    size = box_b.abs().amax(dim=1).clamp(min=1)  # (k,) an error grows with the box
    pair &= (box_a[:, None] - box_b[None]).abs().amax(dim=2) <= 4e-6 * size
    return bool(pair.any(dim=0).all() and pair.any(dim=1).all())


def check_postprocess(loc, logits, priors, *limits, device="cpu"):
    """Every image equals the reference's, or rounding excuses it. -> how many were excused."""
    result = ops.postprocess(loc.to(device), logits.to(device), priors.to(device), *limits)
    mine = [x.cpu() for x in result]
    theirs = reference.postprocess(loc, logits, priors, *limits)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    excused = 0
    for n in range(len(loc)):
        one, other = [x[n : n + 1] for x in mine], [x[n : n + 1] for x in theirs]
        scores, labels, k = one[1][0], one[2][0], int(one[3])
        assert not one[0][0, k:].any()
        assert not scores[k:].any()
        assert not labels[k:].any()
        assert (scores[1:] <= scores[:-1]).all()
        if not same_detections(one, other):
            case = loc[n : n + 1], logits[n : n + 1], priors, *limits
            assert fragile(*case), "differs from the reference, and not by rounding"
            excused += 1
    return excused


# ------------------------------------------------------------------------------ the table


def sized(rng, entry):
    """A case of random size: what the fuzzer draws, unless an op has its own way."""
    return entry.case(rng, random_int(0, 4, rng), random_int(0, 80, rng))


class Op(NamedTuple):
    """`case` is all that a new op must have."""

    case: Callable  # (rng, n, p) -> arguments for n images of p rows each, both possibly 0
    check: Callable = (
        check_equal  # (op, arguments, device) raises AssertionError; -> excused images
    )
    random: Callable | None = None  # (rng) -> arguments of any size; by default, `case` of any
    full: Callable | None = None  # (rng) -> arguments as in a run; by default `case` of 4 x 8,732
    strange: float = 1.0  # how much of the fuzzer's share of NaNs and infinities it gets

    def any_case(self, rng):
        return (self.random or (lambda rng: sized(rng, self)))(rng)

    def full_case(self, rng):
        return (self.full or (lambda rng: self.case(rng, 4, 8732)))(rng)


def _match(rng, n, p):
    return random_boxes(p, rng), random_boxes(2 * n, rng), offsets_of([2] * n), 0.5


def _match_full(rng):
    counts = torch.poisson(torch.full((32,), 2.4), generator=rng).int().tolist()
    return random_boxes(8732, rng), random_boxes(sum(counts), rng), offsets_of(counts), 0.5


def _mined_random(rng):
    levels, c = random_int(0, 3, rng), random_int(1, 41, rng)
    n, p = random_int(0, 3, rng), random_int(0, 40, rng)
    logits, labels = mined_case(rng, n, p, c, levels=levels)
    dtype = one_of((torch.float32, torch.float32, torch.bfloat16, torch.float64), rng)
    return logits.to(dtype), labels, random_int(0, 5, rng)


def _nms(rng, n, p):
    return random_boxes(p, rng), torch.rand(p, generator=rng), torch.arange(p) % 3, 0.45


def _nms_full(rng):
    k = 9000  # three panels
    return random_boxes(k, rng), torch.rand(k, generator=rng), torch.arange(k) % 20, 0.45


def _postprocess_random(rng):
    n, p, c = random_int(0, 3, rng), random_int(0, 40, rng), random_int(1, 7, rng)
    return *post_case(rng, n, p, c), 0.01, 1 + p // 2, 0.45, random_int(1, 21, rng)


OPS = {
    "colour": Op(colour_case, full=lambda rng: colour_case(rng, 8, 300 * 300), strange=0.0),
    "match": Op(_match, random=lambda rng: match_case(rng, 60, 6), full=_match_full),
    "mined_cross_entropy": Op(
        lambda rng, n, p: (*mined_case(rng, n, p, 4), 3),
        lambda op, arguments, device="cpu": check_mined(*arguments, device=device),
        _mined_random,
        lambda rng: (*mined_case(rng, 8, 8732, 21), 3),
        strange=0.25,
    ),
    "nms": Op(_nms, random=lambda rng: nms_case(rng, 80), full=_nms_full),
    "postprocess": Op(
        lambda rng, n, p: (*post_case(rng, n, p, 4), 0.01, 20, 0.45, 10),
        lambda op, arguments, device="cpu": check_postprocess(*arguments, device=device),
        _postprocess_random,
        lambda rng: (*post_case(rng, 4, 8732, 21), 0.01, 400, 0.45, 200),
        strange=0.25,
    ),
}

if missing := set(ops.NAMES) ^ set(OPS):
    raise LookupError(
        f"ops.NAMES and the table in {__file__} differ in {', '.join(sorted(missing))}: "
        "an op has one entry there"
    )


def fuzz_case(op, rng):
    """Arguments of random size and strides, some of their numbers nasty."""
    entry = OPS[op]
    share = one_of((0.0, 0.02, 0.3), rng) * entry.strange
    arguments = entry.any_case(rng)
    return tuple(
        odd_strides(nasty(x, rng, share) if x.is_floating_point() and share else x, rng)
        if torch.is_tensor(x)
        else x
        for x in arguments
    )


def op_of_rung(name):
    """nms_1_pairs is an nms."""
    return next(op for op in OPS if name.startswith(f"{op}_"))
