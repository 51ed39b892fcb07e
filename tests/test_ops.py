"""Every op against the reference, and the reference against plain.py, which shares nothing with it.

A test of a kernel skips, with the reason, where the kernel is not built. What holds for every op is
tested for every entry of harness/op_table.py.
"""

import numpy as np
import plain
import pytest
import torch
from harness.op_table import (
    OPS,
    as_list,
    check_equal,
    check_mined,
    check_postprocess,
    fuzz_case,
    match_case,
    mined_case,
    nms_case,
    offsets_of,
    post_case,
    random_boxes,
    random_int,
    random_scores,
    same_bits,
    strided,
)

import ops
from ops import reference

INF, NAN = float("inf"), float("nan")


# ------------------------------------------------------------------------------- nms


def check_nms(boxes, scores, groups, threshold, device="cpu", expected=None):
    check_equal("nms", (boxes, scores, groups, threshold), device, expected)


def test_nms_reference_is_brute_force(rng):
    for _ in range(300):
        case = nms_case(rng, 16)
        boxes, scores, groups, threshold = case
        expected = plain.nms(boxes.numpy(), scores.numpy(), groups.tolist(), threshold)
        assert reference.nms(*case).tolist() == expected, case


def test_nms_reference_keeps_the_first_of_many_equal_boxes():
    """torch sorts more than 16 equal scores in any order, unless told to keep theirs."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [2, 0, 3, 1], [4, 0, 5, 1]]).repeat(30, 1)
    keep = reference.nms(boxes, torch.full((90,), 0.5), torch.zeros(90, dtype=torch.int64), 0.5)
    assert torch.equal(keep, torch.arange(90) < 3)


@pytest.mark.parametrize("cases", [400, pytest.param(2500, marks=pytest.mark.slow)])
def test_nms_random_cases(device, rng, cases):
    for _ in range(cases):
        check_nms(*nms_case(rng, 40), device)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 64, 65, 1000])
def test_nms_sizes(device, rng, n):
    for groups in (torch.zeros(n, dtype=torch.int64), torch.arange(n) % 3):
        check_nms(random_boxes(n, rng), torch.rand(n, generator=rng), groups, 0.45, device)
        clustered = random_boxes(n, rng, grid=2, odd=0.1)
        check_nms(clustered, random_scores(n, rng, levels=3), groups, 0.45, device)


@pytest.mark.slow
def test_nms_100000(device, rng):
    """20 places with 5,000 boxes each, in 2 groups."""
    centres = random_boxes(20, rng)[torch.arange(100_000) % 20]
    boxes = centres + torch.randn(100_000, 4, generator=rng) * 0.002
    groups = torch.randint(2, (100_000,), generator=rng)
    check_nms(boxes, torch.rand(100_000, generator=rng), groups, 0.45, device)


def test_nms_at_the_threshold(device):
    """IoU equal to the threshold survives; the next larger float does not."""
    unit = [0.0, 0.0, 1.0, 1.0]
    for numerator, denominator in [(1, 2), (1, 4), (3, 4), (9, 20), (1, 3), (7, 10), (1, 1)]:
        part = [0.0, 0.0, numerator, 1.0]
        whole = [0.0, 0.0, float(denominator), 1.0]
        boxes = torch.tensor([whole, part])
        iou = float(reference.pairwise_iou(boxes[:1], boxes[1:]))
        assert iou == np.float32(numerator / denominator)
        scores, groups = torch.tensor([2.0, 1.0]), torch.zeros(2, dtype=torch.int64)
        for threshold, survives in [
            (iou, True),
            (float(np.nextafter(np.float32(iou), np.float32(0))), False),
            (min(1.0, float(np.nextafter(np.float32(iou), np.float32(2)))), True),
        ]:
            expected = torch.tensor([True, survives])
            check_nms(boxes, scores, groups, threshold, device, expected)
    # .45 as Python has it lies above .45 in float32, which is what an IoU of 9/20 comes to.
    boxes = torch.tensor([[0.0, 0.0, 20.0, 1.0], [0.0, 0.0, 9.0, 1.0], unit])
    zero = torch.zeros(3, dtype=torch.int64)
    check_nms(boxes, torch.tensor([3.0, 2.0, 1.0]), zero, 0.45, device, torch.ones(3) > 0)


def test_nms_order(device):
    """Of equal scores the first box wins, and -0 equals 0; a lower score never does."""
    box = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    for scores, winner in [
        ([0.5, 0.5, 0.5], 0),
        ([-0.0, 0.0, -1.0], 0),
        ([-2.0, -1.0, -3.0], 1),
        ([0.0, 1e-45, -1e-45], 1),
        ([NAN, INF, -7.0], 2),
    ]:
        expected = torch.arange(3) == winner
        zero = torch.zeros(3, dtype=torch.int64)
        check_nms(box.expand(3, 4), torch.tensor(scores), zero, 0.5, device, expected)


def test_nms_groups_never_touch(device, rng):
    """A union of problems is solved as each of them: no coordinate is shifted, so none rounds."""
    boxes, scores = random_boxes(300, rng), torch.rand(300, generator=rng)
    groups = torch.randint(5, (300,), generator=rng) * 10**15 - 2 * 10**15
    keep = ops.nms(boxes.to(device), scores.to(device), groups.to(device)).cpu()
    for group in groups.unique():
        mine = groups == group
        alone = reference.nms(boxes[mine], scores[mine], torch.zeros(int(mine.sum())).long(), 0.45)
        assert torch.equal(keep[mine], alone)
    assert torch.equal(
        ops.nms(boxes.to(device), scores.to(device)).cpu(),
        reference.nms(boxes, scores, torch.zeros(300).long(), 0.45),
    )


# ------------------------------------------------------------------------------- match


def check_match(priors, boxes, offsets, threshold, device="cpu", expected=None):
    check_equal("match", (priors, boxes, offsets, threshold), device, expected)


def test_match_reference_is_brute_force(rng):
    for _ in range(150):
        case = match_case(rng, 12, 4, num_images=2)
        priors, boxes, offsets, threshold = case
        rows = reference.match(*case).tolist()
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            matched = plain.match(priors.numpy(), boxes[start:end].numpy(), threshold)
            assert row == [g if g < 0 else g + int(start) for g in matched], case


@pytest.mark.parametrize("cases", [600, pytest.param(6000, marks=pytest.mark.slow)])
def test_match_random_cases(device, rng, cases):
    for _ in range(cases):
        check_match(*match_case(rng, 30, 6), device)
    for _ in range(cases // 20):
        check_match(*match_case(rng, 400, 20), device)


@pytest.mark.parametrize("p", [0, 1, 63, 64, 65, 1000, 8732])
@pytest.mark.parametrize("counts", [[], [0], [1], [0, 3, 0], [65, 1]])
def test_match_sizes(device, rng, p, counts):
    if p == 8732 and sum(counts) > 3:
        counts = [20]  # the reference takes seconds otherwise
    priors, boxes = random_boxes(p, rng), random_boxes(sum(counts), rng)
    check_match(priors, boxes, offsets_of(counts), 0.5, device)


def test_match_shared_best_prior(device):
    """Three boxes want prior 0. The best one gets it; the others get what is free then."""
    priors = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.3, 0.3, 0.9, 0.9], [0.6, 0.0, 1.0, 0.2]])
    boxes = torch.tensor([[0.0, 0.0, 0.35, 0.35], [0.0, 0.0, 0.4, 0.4], [0.2, 0.2, 0.4, 0.4]])
    expected = torch.tensor([[1, 2, -1]])  # box 0 overlaps prior 0 and, a little, prior 1 ...
    iou = reference.pairwise_iou(boxes, priors)
    assert (iou.argmax(dim=1) == 0).all()
    # ... but box 2 overlaps prior 1 more, so that it comes first and box 0 is left without.
    check_match(priors, boxes, offsets_of([3]), 0.5, device, expected)


def test_match_identical_boxes(device, rng):
    """As many equal boxes as priors: each gets one, the lowest box the best prior."""
    priors = random_boxes(70, rng) * 0.2 + 0.4
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(70, 4)
    check_match(priors, boxes, offsets_of([70]), 0.9, device)
    check_match(priors[:9], boxes, offsets_of([70]), 0.9, device)  # more boxes than priors
    matched = ops.match(priors.to(device), boxes.to(device), offsets_of([70]).to(device), 0.9)
    assert sorted(matched[0].tolist()) == list(range(70))
    check_match(boxes, boxes, offsets_of([70]), 0.9, device, torch.arange(70)[None])  # all ties


def test_match_at_the_threshold(device):
    """A prior of IoU exactly .5 is positive, one of the float below is not; forced ones always."""
    box = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    priors = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1], [0, 0, below, 1], [1, 0, 2, 1]])
    check_match(priors, box, offsets_of([1]), 0.5, device, torch.tensor([[0, 0, -1, 0]]))
    check_match(priors[2:3], box, offsets_of([1]), 0.5, device, torch.tensor([[0]]))
    # Below an IoU of 1e-6 a box takes no prior at all.
    far = torch.tensor([[0.0, 0.0, 1e-3, 1e-4]])
    check_match(priors, far, offsets_of([1]), 0.5, device, torch.full((1, 4), -1))


def test_match_areas_that_underflow(device, rng):
    """Sides of 1e-21 and less: areas are zero or a few of the smallest steps of float32."""
    for tiny in (1e-21, 3e-22, 3e-23):
        for _ in range(20):
            priors, boxes, offsets, threshold = match_case(rng, 200, 3)
            check_match(priors * tiny, boxes * tiny, offsets, threshold, device)


def test_match_areas_whose_sum_overflows(device):
    """3e38 + 2.25e38 is infinite: the second prior overlaps nothing, the first still a third."""
    priors = torch.tensor([[0.5, -3e38, 0.75, 0.75], [0, -3e38, 1, 0.75]])
    boxes = torch.tensor([[0.5, -3e38, 1.25, 1]])
    assert reference.pairwise_iou(boxes, priors).tolist() == [[pytest.approx(1 / 3), 0]]
    offsets = torch.tensor([0, 1])
    matched = ops.match(priors.to(device), boxes.to(device), offsets.to(device))
    assert matched.tolist() == reference.match(priors, boxes, offsets, 0.5).tolist() == [[0, -1]]


def test_match_rows_count_over_the_batch(device):
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.5]])
    expected = torch.tensor([[0, -1], [-1, -1], [2, 1]])
    check_match(boxes[:2], boxes, torch.tensor([0, 1, 1, 3]), 0.5, device, expected)


# ------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("cases", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_mined_random_cases(device, rng, cases):
    for i in range(cases):
        sizes = random_int(0, 4, rng), random_int(0, 120, rng), (1, 2, 5, 21, 40)[i % 5]
        style = dict(levels=random_int(0, 3, rng), odd=random_int(0, 3, rng) * 0.002)
        check_mined(*mined_case(rng, *sizes, **style), random_int(0, 5, rng), device)


def test_mined_full_size(device, rng):
    check_mined(*mined_case(rng, 3, 8732, 21), device=device)
    check_mined(*mined_case(rng, 2, 8732, 2, levels=2), device=device)  # a border of many ties


def test_mined_by_hand(device):
    """Image 0: a positive and 3 of its 4 negatives, the first of the two equal ones. Image 1 has no
    positive: all 0, but for what is not finite."""
    x = torch.tensor([1.0, 0.0, 2.0, 2.0, -1.0])
    logits = torch.stack([x, torch.zeros(5)], dim=1).expand(2, 5, 2).clone()
    logits[1, 3, 1] = NAN
    logits[1, 4, 0] = -INF
    labels = torch.tensor([[1, 0, 0, 0, 0], [0] * 5])
    got = ops.mined_cross_entropy(logits.to(device), labels.to(device)).cpu()
    expected = [np.log1p(np.exp(v)) for v in (1.0, 0.0, -2.0)] + [0, np.log1p(np.exp(1.0))]
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(got[1], torch.tensor([0, 0, 0, NAN, INF]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mined_gradient(device, rng, dtype):
    """Autograd through PyTorch's cross-entropy of the same priors, for any type of logits."""
    logits, labels = [x.to(device) for x in mined_case(rng, 5, 90, 7, odd=0.001)]
    logits = strided(logits.to(dtype)).requires_grad_()
    weight = torch.rand(5, 90, generator=rng).to(device)
    got = ops.mined_cross_entropy(logits, labels)
    (got * weight)[got != 0].sum().backward()
    twin = logits.detach().float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(twin.mT, labels, reduction="none")
    (wanted * weight)[got != 0].sum().backward()
    assert logits.grad.dtype == dtype
    wanted = torch.where((got != 0)[..., None], twin.grad, 0.0).to(dtype)
    close = dict(rtol=1e-2, atol=1e-6) if dtype.itemsize == 2 else dict(rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(logits.grad, wanted, equal_nan=True, **close)


def test_mined_gradient_is_registered(device, rng):
    """What opcheck wants of an op with a gradient; and no second one is to be had in silence."""
    logits, labels = [x.to(device) for x in mined_case(rng, 3, 40, 4)]
    arguments = logits.requires_grad_(), labels, 3
    torch.library.opcheck(torch.ops.scratchdet.mined_cross_entropy.default, arguments)
    loss = ops.mined_cross_entropy(*arguments)
    backward = loss.detach() * 0 + 1, logits.detach(), labels, loss.detach()
    torch.library.opcheck(torch.ops.scratchdet.mined_cross_entropy_backward.default, backward)
    (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


# ------------------------------------------------------------------------------- postprocess


@pytest.mark.parametrize("cases", [80, pytest.param(500, marks=pytest.mark.slow)])
def test_postprocess_random_cases(device, rng, cases):
    images = excused = 0
    for _ in range(cases):
        case = post_case(
            rng,
            random_int(0, 4, rng),
            random_int(0, 120, rng),
            (1, 2, 5, 9, 21)[random_int(0, 5, rng)],
            spread_logits=(0.3, 2.0, 6.0)[random_int(0, 3, rng)],
            background=(-3.0, 0.0, 5.0)[random_int(0, 3, rng)],
        )
        top_k = (3, 20, 400)[random_int(0, 3, rng)]
        limits = (0.0, 0.01, 0.3)[random_int(0, 3, rng)], top_k, 0.45, random_int(1, 30, rng)
        excused += check_postprocess(*case, *limits, device=device)
        images += len(case[0])
    print(f"{excused} of {images} images differ from the reference by rounding")
    assert excused <= 0.03 * images


def test_postprocess_ties(device, rng):
    """Rows of equal logits have equal scores: the order is fixed, and all is equal in place."""
    for limits in [(0.01, 400, 0.45, 200), (0.01, 9, 0.45, 200), (0.01, 9, 0.3, 10)]:
        loc, logits, priors = post_case(rng, 2, 100, 5)
        logits = logits[:, :7].repeat_interleave(15, dim=1)[:, :100]
        mine = ops.postprocess(loc.to(device), logits.to(device), priors.to(device), *limits)
        theirs = reference.postprocess(loc, logits, priors, *limits)
        assert torch.equal(mine[2].cpu(), theirs[2])
        assert torch.equal(mine[3].cpu(), theirs[3])
        torch.testing.assert_close(mine[0].cpu(), theirs[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine[1].cpu(), theirs[1], rtol=0, atol=1e-6)
    # Two classes of exactly the same score: the lower class comes first, and at the cut it stays.
    logits = torch.tensor([[[0.0, 2.0, 2.0]]])
    loc, priors = torch.zeros(1, 1, 4), torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    args = loc.to(device), logits.to(device), priors.to(device)
    assert ops.postprocess(*args, max_detections=3)[2].tolist() == [[1, 2, 0]]
    assert ops.postprocess(*args, max_detections=1)[2].tolist() == [[1]]


def test_postprocess_at_the_threshold(device):
    """What the kernels sort out before they divide, or before the exponential, is below it indeed:
    of 200 scores within 1e-4 of the threshold, just those above it are found."""
    centre = (torch.arange(200) + 0.5) / 200
    priors = torch.stack([centre, torch.full((200,), 0.5), *torch.full((2, 200), 1e-3)], dim=1)
    for threshold in (1e-6, 0.01, 0.3, 0.9):
        near = torch.linspace(-1e-4, 1e-4, 200) + float(np.log(threshold / (1 - threshold)))
        logits = torch.stack([torch.zeros(200), near], dim=1)[None]  # (1, P, 2)
        arguments = [x.to(device) for x in (torch.zeros(1, 200, 4), logits, priors)]
        count = int(ops.postprocess(*arguments, threshold, 400, 0.45, 200)[3])
        score = logits.double().softmax(2)[..., 1] / threshold
        assert (score > 1 + 2e-6).sum() <= count <= (score > 1 - 2e-6).sum()


@pytest.mark.parametrize("background", [8.0, 0.0], ids=["trained", "untrained"])
def test_postprocess_full_size(device, rng, background):
    """8,732 priors and 21 classes; untrained, every one of 174,640 pairs passes the threshold."""
    loc, logits, priors = post_case(rng, 1, 8732, 21, 1.0 if background else 0.3, background)
    loc *= 0.3
    check_postprocess(loc, logits, priors, 0.01, 400, 0.45, 200, device=device)


def test_postprocess_odd_numbers(device, rng):
    """Infinite and NaN logits and offsets: no candidate, and the rest of the image is unharmed."""
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # a NaN, too
    odd = torch.cat([torch.tensor([INF, -INF, NAN, 1e30, -1e30, 89.0, -200.0]), payload])
    for _ in range(20):
        loc, logits, priors = post_case(rng, 2, 60, 4)
        for x in (loc, logits):
            where = torch.rand(x.shape, generator=rng) < 0.05
            x[where] = odd[torch.randint(len(odd), (int(where.sum()),), generator=rng)]
        result = ops.postprocess(loc.to(device), logits.to(device), priors.to(device))
        assert torch.cat([result[0].flatten(), result[1].flatten()]).isfinite().all()
        check_postprocess(loc, logits, priors, 0.01, 400, 0.45, 200, device=device)


def test_postprocess_by_hand(device):
    """Three priors: two overlap (IoU 9/11 with both decoded), one class each side of the cut."""
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]])
    loc = torch.zeros(1, 3, 4)
    loc[0, 2] = torch.tensor(
        [5.0, -5.0, 5 * np.log(2), 0.0]
    )  # moves by half a prior, twice as wide
    ln = np.log([[0.1, 0.6, 0.3], [0.1, 0.7, 0.2], [0.2, 0.005, 0.795]])
    logits = torch.tensor(ln, dtype=torch.float32)[None]
    args = [x.to(device) for x in (loc, logits, priors)]
    boxes, scores, labels, count = [x.cpu() for x in ops.postprocess(*args, max_detections=5)]
    assert count.tolist() == [3]
    assert labels.tolist() == [[2, 1, 2, 0, 0]]  # prior 2; prior 1 beats 0; prior 0 beats 1
    expected = torch.tensor([[0.795, 0.7, 0.3, 0, 0]])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    expected = [[0.15, 0.1, 0.35, 0.2], [0.42, 0.4, 0.62, 0.6], [0.4, 0.4, 0.6, 0.6]]
    torch.testing.assert_close(boxes[0, :3], torch.tensor(expected), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- any input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_postprocess_types(device, rng, dtype):
    loc, logits, priors = [x.to(device) for x in post_case(rng, 2, 100, 5)]
    low = loc.to(dtype), logits.to(dtype)
    for a, b in zip(
        ops.postprocess(*low, priors),
        ops.postprocess(low[0].float(), low[1].float(), priors),
        strict=True,
    ):
        assert torch.equal(a, b)


SIZES = {"empty": (0, 0), "one": (1, 1), "many": (3, 70), "strided": (3, 70)}


def case_of(op, size, rng, device="cpu"):
    change = strided if size == "strided" else lambda x: x
    arguments = OPS[op].case(rng, *SIZES[size])
    return tuple(change(x).to(device) if torch.is_tensor(x) else x for x in arguments)


@pytest.mark.parametrize("cases", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS)
def test_nasty_cases(device, rng, op, cases):
    """What the fuzzer draws: any size, any strides, NaNs and infinities."""
    for _ in range(cases):
        OPS[op].check(op, fuzz_case(op, rng), device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, rng, op, size):
    arguments = case_of(op, size, rng, device)
    if size == "strided":
        assert not any(x.is_contiguous() for x in arguments if torch.is_tensor(x) and x.dim() > 1)
    torch.library.opcheck(getattr(torch.ops.scratchdet, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(device, rng, op):
    arguments = case_of(op, "strided", rng, device)
    dense = [x.contiguous() if torch.is_tensor(x) else x for x in arguments]
    results = as_list(getattr(ops, op)(*arguments)), as_list(getattr(ops, op)(*dense))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("op", OPS)
def test_arguments_stay_as_they_are(device, rng, op):
    arguments = case_of(op, "many", rng, device)
    before = [x.clone() if torch.is_tensor(x) else x for x in arguments]
    getattr(ops, op)(*arguments)
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("op", OPS)
def test_compile_in_one_graph(device, rng, op):
    arguments = case_of(op, "many", rng, device)

    def doubled(*args):  # with something before and after, so that a graph could break
        return [x * 2 for x in as_list(getattr(ops, op)(args[0] * 1, *args[1:]))]

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), doubled(*arguments), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_matter(rng, op):
    arguments, before = case_of(op, "many", rng), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = as_list(getattr(ops, op)(*arguments))
        torch.set_num_threads(4)
        together = as_list(getattr(ops, op)(*arguments))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert same_bits(a, b)


def test_no_gradient_flows(rng):
    loc, logits, priors = post_case(rng, 1, 10, 3)
    boxes, scores, *_ = ops.postprocess(loc.requires_grad_(), logits.requires_grad_(), priors)
    assert not boxes.requires_grad
    assert not scores.requires_grad


# ------------------------------------------------------------------------------- wrong input

B, S, G = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
LOC, LOGITS = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
OFF = torch.tensor([0, 1, 3])
IMG = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
IN, JIT, RGB = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 5), [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.colour(IMG[0], IN, JIT, RGB, RGB), r"colour: images must be .*got \(3,4,5\)"),
        (lambda: ops.colour(IMG[:, :2], IN, JIT, RGB, RGB), "colour: images must be .*2,2,4,5"),
        (lambda: ops.colour(IMG.float(), IN, JIT, RGB, RGB), "images must be .*uint8.*float32"),
        (lambda: ops.colour(IMG, IN[:1], JIT, RGB, RGB), "colour: inside must be .*N=2; got .1,4"),
        (lambda: ops.colour(IMG, IN.int(), JIT, RGB, RGB), "colour: inside must be .*int32"),
        (lambda: ops.colour(IMG, IN, JIT.double(), RGB, RGB), "colour: jitter must be .*float64"),
        (lambda: ops.colour(IMG, IN, JIT.to("meta"), RGB, RGB), "colour: jitter must be on cpu"),
        (lambda: ops.colour(IMG, IN, JIT, RGB[:1], RGB), "colour: mean must be 3 numbers"),
        (
            lambda: ops.colour(IMG, IN, JIT, RGB, RGB, "RGB"),
            "channels must be rgb or bgr; got 'RGB'",
        ),
        (lambda: ops.colour(IMG, IN, JIT, RGB, RGB, "rgb", torch.int8), "dtype must be .*int8"),
        (
            lambda: ops.nms(B, torch.zeros(3, 2, dtype=torch.float64)),
            r"nms: scores must be \(K,\) float32 like boxes \(K,4\), K=3; got \(3,2\) float64",
        ),
        (lambda: ops.nms(torch.zeros(4), S), r"nms: boxes_xyxy must be .*got \(4\) float32"),
        (lambda: ops.nms(B.double(), S), "nms: boxes_xyxy must be .*float64"),
        (lambda: ops.nms(torch.zeros(3, 5), S), r"nms: boxes_xyxy must be .*\(3,5\)"),
        (lambda: ops.nms(B, S[:2]), r"nms: scores must be .*K=3; got \(2\)"),
        (lambda: ops.nms(B, S, G[:2]), "nms: groups must be"),
        (lambda: ops.nms(B, S, G.int()), "nms: groups must be .*int32"),
        (lambda: ops.nms(B, S.to("meta"), G), "nms: scores must be on cpu .*on meta"),
        (lambda: ops.nms(B, S, G, 1.5), "nms: iou_threshold must be between 0 and 1; got 1.5"),
        (lambda: ops.nms(B, S, G, NAN), "nms: iou_threshold .*nan"),
        (lambda: ops.match(B[:, :2], B, OFF), "match: priors_xyxy must be"),
        (lambda: ops.match(B, B.half(), OFF), "match: boxes_xyxy must be .*float16"),
        (lambda: ops.match(B, B, OFF.float()), r"match: offsets must be \(N\+1,\) int64"),
        (lambda: ops.match(B, B, OFF[:0]), r"match: offsets must be .*got \(0\)"),
        (lambda: ops.match(B, B, OFF + 1), r"match: offsets .*0 to T=3; got \[1, 2, 4\]"),
        (lambda: ops.match(B, B, torch.tensor([0, 2, 1, 3])), "match: offsets .*rising"),
        (lambda: ops.match(B, B.to("meta"), OFF), "match: boxes_xyxy must be on cpu"),
        (lambda: ops.match(B, B, OFF, -0.1), "match: iou_threshold"),
        (lambda: ops.mined_cross_entropy(LOGITS[0], LABELS), "mined_.*: logits must be .*P,C"),
        (lambda: ops.mined_cross_entropy(LOGITS[..., :0], LABELS), "logits must be .*C > 0"),
        (lambda: ops.mined_cross_entropy(LOGITS.long(), LABELS), "logits must be .*int64"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS[:1]), r"labels must be .*got \(1,3\)"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS.int()), "labels must be .*int32"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS.to("meta")), "labels must be on cpu"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS + 5), "from 0 to C-1=4; got 5 to 5"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS - 100), "labels .* got -100 to -100"),
        (lambda: ops.mined_cross_entropy(LOGITS, LABELS, -1), "_per_positive must be at least 0"),
        (lambda: ops.postprocess(LOC, LOGITS, B[:2]), r"postprocess: loc must be .*P=2"),
        (lambda: ops.postprocess(LOC[:1], LOGITS, B), "postprocess: loc must be .*like logits"),
        (lambda: ops.postprocess(LOC[..., :3], LOGITS, B), "postprocess: loc must be"),
        (lambda: ops.postprocess(LOC, LOGITS[0], B), "postprocess: logits must be"),
        (lambda: ops.postprocess(LOC, LOGITS.long(), B), "postprocess: logits must be .*int64"),
        (lambda: ops.postprocess(LOC, LOGITS, B.double()), "postprocess: priors_cxcywh must be"),
        (lambda: ops.postprocess(LOC, LOGITS, B.to("meta")), "postprocess: priors_cxcywh .*meta"),
        (lambda: ops.postprocess(LOC, LOGITS, B, -1.0), "postprocess: score_threshold"),
        (lambda: ops.postprocess(LOC, LOGITS, B, top_k=0), "postprocess: top_k must be at least 1"),
        (lambda: ops.postprocess(LOC, LOGITS, B, max_detections=-1), "max_detections .*got -1"),
    ],
)
def test_wrong_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kernels_guard_their_memory():
    """Called past the checks of ops.match, a kernel refuses offsets that leave the boxes."""
    if not ops.COMPILED["cpu"]:
        pytest.skip(f"the cpu kernels are not built ({ops.describe()})")
    if ops.MODE == "emulate":
        pytest.skip("CUDA kernels cannot raise without waiting for the GPU: they clamp")
    for offsets in ([0, 4], [-1, 3], [0, 2, 1]):
        with pytest.raises(RuntimeError, match="offsets must rise"):
            torch.ops.scratchdet.match(B, B, torch.tensor(offsets), 0.5)
    for label in (5, -1, 2**40):
        assert torch.ops.scratchdet.mined_cross_entropy(LOGITS, LABELS + label, 3).isnan().all()
