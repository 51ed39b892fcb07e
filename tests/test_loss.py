"""Targets and loss, against loops that are slow and plainly right."""

import math

import plain
import pytest
import torch

import ops
from ops.reference import hard_negatives
from scratchdet import (
    Config,
    assign_targets,
    cxcywh_to_xyxy,
    encode,
    make_priors,
    multibox_loss,
)

# ----------------------------------------------------------- the same, in loops over numbers


def loss_by_force(loc, logits, priors, boxes_of, labels_of) -> tuple[float, float, int]:
    """SSD's loss with Python floats: loc[n][p][k], logits[n][p][c], priors cxcywh, boxes xyxy."""
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in priors]
    total_loc = total_conf = 0.0
    positives = 0
    for n, boxes in enumerate(boxes_of):
        matched = plain.match(corners, boxes)
        negatives = []
        for p, b in enumerate(matched):
            exp_sum = sum(math.exp(x) for x in logits[n][p])
            if b < 0:
                negatives.append(-math.log(math.exp(logits[n][p][0]) / exp_sum))
                continue
            positives += 1
            total_conf -= math.log(math.exp(logits[n][p][labels_of[n][b]]) / exp_sum)
            x, y, w, h = priors[p]
            x0, y0, x1, y1 = boxes[b]
            wanted = [
                ((x0 + x1) / 2 - x) / w / 0.1,
                ((y0 + y1) / 2 - y) / h / 0.1,
                math.log((x1 - x0) / w) / 0.2,
                math.log((y1 - y0) / h) / 0.2,
            ]
            for said, target in zip(loc[n][p], wanted, strict=True):
                d = abs(said - target)
                total_loc += 0.5 * d * d if d < 1 else d - 0.5
        of_image = sum(b >= 0 for b in matched)
        total_conf += sum(sorted(negatives, reverse=True)[: 3 * of_image])
    return total_loc / max(1, positives), total_conf / max(1, positives), positives


def problem(rng, counts, num_priors=60, num_classes=5):
    """A random batch; images of `counts` boxes."""

    def boxes(k):
        corner = torch.rand(k, 2, generator=rng) * 0.7
        return torch.cat([corner, corner + 0.08 + torch.rand(k, 2, generator=rng) * 0.4], dim=1)

    xyxy = boxes(num_priors)
    priors = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], dim=1)
    shape = (len(counts), num_priors)
    return {
        "loc": torch.randn(*shape, 4, generator=rng) * 2,
        "logits": torch.randn(*shape, num_classes, generator=rng) * 2,
        "priors_cxcywh": priors,
        "boxes_xyxy": boxes(sum(counts)),
        "labels": torch.randint(1, num_classes, (sum(counts),), generator=rng),
        "offsets": torch.tensor([0, *torch.tensor(counts).cumsum(0)]),
    }


def split(x, offsets) -> list:
    return [x[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "counts", [(3,), (1, 2), (0, 4, 1), (2, 0, 0), (9, 1, 5), (30,), (70,)], ids=str
)
def test_loss_equals_plain_loops(rng, counts):
    for _ in range(3):
        x = problem(rng, counts)
        loss_loc, loss_conf, positives = multibox_loss(**x)
        wanted = loss_by_force(
            x["loc"].tolist(), x["logits"].tolist(), x["priors_cxcywh"].tolist(),
            split(x["boxes_xyxy"], x["offsets"]), split(x["labels"], x["offsets"]),
        )  # fmt: skip
        assert positives.item() == wanted[2]
        assert loss_loc.item() == pytest.approx(wanted[0], rel=2e-5)
        assert loss_conf.item() == pytest.approx(wanted[1], rel=2e-5)


def test_loss_with_equal_scores_equals_plain_loops(rng):
    """Ties of the mining: whichever of the equal ones is taken, the loss is the same."""
    x = problem(rng, (1, 2, 0, 3))
    x["logits"] = (x["logits"] / 3).round()
    wanted = loss_by_force(
        x["loc"].tolist(), x["logits"].tolist(), x["priors_cxcywh"].tolist(),
        split(x["boxes_xyxy"], x["offsets"]), split(x["labels"], x["offsets"]),
    )  # fmt: skip
    loss_loc, loss_conf, _ = multibox_loss(**x)
    assert loss_loc.item() == pytest.approx(wanted[0], rel=2e-5)
    assert loss_conf.item() == pytest.approx(wanted[1], rel=2e-5)


def test_loss_by_hand():
    """One box on the first of five far priors: 1 positive, 3 of 4 negatives."""
    priors = torch.tensor([[0.1 + 0.2 * i, 0.5, 0.1, 0.1] for i in range(5)])
    boxes = cxcywh_to_xyxy(priors[:1])
    logits = torch.zeros(1, 5, 3)
    logits[0, :, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])  # the last is the easiest
    loc = torch.zeros(1, 5, 4)
    loc[0, 0] = torch.tensor([0.5, -3.0, 0.0, 1.0])  # .125 + 2.5 + 0 + .5
    loc[0, 1:] = 100.0  # says nothing: negative
    loss_loc, loss_conf, positives = multibox_loss(
        loc, logits, priors, boxes, torch.tensor([2]), torch.tensor([0, 1])
    )
    assert positives.item() == 1
    assert loss_loc.item() == pytest.approx(3.125, rel=1e-5)
    # ln 3; and -ln(e^k / (e^k + 2)) for k = 1, 2, 3
    by_hand = math.log(3) + sum(math.log(1 + 2 * math.exp(-k)) for k in (1, 2, 3))
    assert loss_conf.item() == pytest.approx(by_hand, rel=1e-5)


def test_negatives_are_mined_in_each_image():
    """Three for each positive of the same image: another image's are not its own, however hard."""
    priors = torch.tensor([[0.05 + 0.1 * i, 0.5, 0.08, 0.08] for i in range(10)])
    boxes = cxcywh_to_xyxy(priors[:1])
    logits = torch.zeros(2, 10, 2)
    logits[1, :, 1] = 8.0  # image 1 has no box and every prior of it is hard
    loss = multibox_loss(
        torch.zeros(2, 10, 4), logits, priors, boxes, torch.tensor([1]), torch.tensor([0, 1, 1])
    )
    assert loss[1].item() == pytest.approx(4 * math.log(2), rel=1e-5)
    assert multibox_loss(
        torch.zeros(2, 10, 4), logits, priors, boxes, torch.tensor([1]), torch.tensor([0, 1, 1]),
        negatives_per_positive=2,
    )[1].item() == pytest.approx(3 * math.log(2), rel=1e-5)  # fmt: skip


def test_loss_is_divided_by_the_positives_of_the_batch(rng):
    """Not by those of each image: an image twice in the batch leaves the loss as it is."""
    x = problem(rng, (3,))
    once = multibox_loss(**x)
    twice = x | {k: torch.cat([x[k]] * 2) for k in ("loc", "logits", "boxes_xyxy", "labels")}
    again = multibox_loss(**twice | {"offsets": torch.tensor([0, 3, 6])})
    torch.testing.assert_close(again[0], once[0])
    torch.testing.assert_close(again[1], once[1])
    empty = x | {k: torch.cat([x[k]] * 2) for k in ("loc", "logits")}
    with_empty = multibox_loss(**empty | {"offsets": torch.tensor([0, 3, 3])})
    torch.testing.assert_close(with_empty, once)


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)])
def test_a_batch_without_boxes_gives_zero_loss_and_zero_gradients(rng, counts):
    x = problem(rng, counts)
    loc, logits = x["loc"].requires_grad_(), x["logits"].requires_grad_()
    loss_loc, loss_conf, positives = multibox_loss(**x)
    assert (loss_loc.item(), loss_conf.item(), positives.item()) == (0.0, 0.0, 0)
    (loss_loc + loss_conf).backward()
    assert (loc.grad == 0).all()
    assert (logits.grad == 0).all()


def test_large_logits_stay_finite(rng):
    """The sum of exponentials is taken relative to each prior's own largest logit."""
    x = problem(rng, (2, 1))
    x["logits"][0, 0] += 1e4  # one prior far above all others
    x["logits"][0, 1] -= 1e4
    logits = x["logits"].requires_grad_()
    _, loss_conf, _ = multibox_loss(**x)
    loss_conf.backward()
    assert loss_conf.isfinite()
    assert logits.grad.isfinite().all()
    assert loss_conf.item() < 100


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("image", [0, 1])
def test_mining_never_hides_what_is_not_finite(rng, image, what):
    """One bad background logit among 60 priors; image 1 has no box, and so no negative is wanted.
    -inf makes background impossible there: an infinite loss."""
    x = problem(rng, (1, 0))
    x["logits"][image, 17, 0] = what
    assert not multibox_loss(**x)[1].isfinite()


def test_gradient_flows_only_where_it_should(rng):
    """Offsets of positives; logits of positives and of three mined negatives each; nothing else."""
    x = problem(rng, (3, 0, 2))
    loc, logits = x["loc"].requires_grad_(), x["logits"].requires_grad_()
    loss_loc, loss_conf, positives = multibox_loss(**x)
    labels, _ = assign_targets(
        *(x[k] for k in ("priors_cxcywh", "boxes_xyxy", "labels", "offsets"))
    )
    loss_loc.backward()
    assert torch.equal((loc.grad != 0).any(dim=2), labels > 0)
    assert logits.grad is None
    loss_conf.backward()
    used = (logits.grad != 0).any(dim=2)
    assert used[labels > 0].all()
    negatives = (used & (labels == 0)).sum(dim=1)
    free = (labels == 0).sum(dim=1)
    wanted = torch.minimum(3 * (labels > 0).sum(dim=1), free)
    assert torch.equal(negatives, wanted)
    score = -logits.detach().log_softmax(dim=2)[..., 0]
    for n in (0, 2):  # the mined are the hardest
        mined, rest = used[n] & (labels[n] == 0), ~used[n] & (labels[n] == 0)
        assert score[n][mined].min() >= score[n][rest].max()


def test_half_precision_outputs_are_scored_in_float32(rng):
    x = problem(rng, (3, 2))
    half = x | {"loc": x["loc"].bfloat16(), "logits": x["logits"].bfloat16()}
    exact = half | {"loc": half["loc"].float(), "logits": half["logits"].float()}
    for a, b in zip(multibox_loss(**half), multibox_loss(**exact), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------ its parts


def test_hard_negatives_equals_argsort(rng):
    for high in (1.0, 1e-30, 1e30):
        score = torch.rand(6, 200, generator=rng) * high
        score[1] = (score[1] / high * 5).round()  # ties
        score[2] = 0.0
        eligible = torch.rand(6, 200, generator=rng) < 0.6
        how_many = torch.tensor([7, 20, 9, 0, 500, 1])
        got = hard_negatives(score, eligible, how_many)
        for n in range(6):
            ranked = torch.where(eligible[n], score[n], -1.0)
            best = torch.sort(ranked, descending=True, stable=True).indices
            wanted = torch.zeros(200, dtype=torch.bool)
            wanted[best[: min(int(how_many[n]), int(eligible[n].sum()))]] = True
            assert torch.equal(got[n], wanted), (high, n)


def test_hard_negatives_of_nothing():
    none = hard_negatives(
        torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.bool), torch.tensor([3, 0])
    )
    assert not none.any()
    infinite = torch.tensor([[1.0, math.inf, 0.5]])
    every = torch.ones(1, 3, dtype=torch.bool)
    assert hard_negatives(infinite, every, torch.tensor([1])).tolist() == [[False, True, False]]


@pytest.mark.parametrize("counts", [(4, 0, 9), (1,), (0,), (80,)], ids=str)
def test_targets_equal_brute_force(rng, counts):
    x = problem(rng, counts)
    labels, targets = assign_targets(x["priors_cxcywh"], x["boxes_xyxy"], x["labels"], x["offsets"])
    priors = cxcywh_to_xyxy(x["priors_cxcywh"]).tolist()
    per_image = zip(
        split(x["boxes_xyxy"], x["offsets"]), split(x["labels"], x["offsets"]), strict=True
    )
    for n, (boxes, names) in enumerate(per_image):
        matched = plain.match(priors, boxes)
        assert labels[n].tolist() == [names[b] if b >= 0 else 0 for b in matched]
        for p, b in enumerate(matched):
            wanted = torch.zeros(4)
            if b >= 0:
                wanted = encode(torch.tensor(boxes[b]), x["priors_cxcywh"][p])
            torch.testing.assert_close(targets[n, p], wanted)


def test_two_boxes_that_share_their_best_prior_by_hand():
    """Priors 0 and 1 overlap the boxes, prior 2 neither. Both boxes like prior 0 best:
    box 0 by .8 and box 1 by .9, which is the best pair of all, so box 1 gets it. Box 0 then takes
    prior 1, by only 1/3, although prior 1 alone would be background."""
    priors = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.4, 0.0, 1.4, 1.0], [3.0, 3.0, 4.0, 4.0]])
    boxes = torch.tensor([[0.0, 0.0, 0.8, 1.0], [0.0, 0.0, 0.9, 1.0]])
    # box 0: .8, .4 / 1.4; box 1: .9, .5 / 1.4
    assert plain.iou(boxes[0], priors[1]) == pytest.approx(0.4 / 1.4)
    matched = ops.match(priors, boxes, torch.tensor([0, 2]), 0.5)
    assert matched.tolist() == [[1, 0, -1]]
    # the same in the other order: box 0 is now the one with .9
    matched = ops.match(priors, boxes.flip(0), torch.tensor([0, 2]), 0.5)
    assert matched.tolist() == [[0, 1, -1]]


def test_golden_targets_on_the_real_priors():
    """Boxes put exactly on priors are theirs, and the offsets there are 0; the second box, less
    than half of any prior, still gets one."""
    priors = make_priors(Config())
    first = cxcywh_to_xyxy(priors[8728:8729])  # the large square of the last map
    tiny = torch.tensor([[0.5, 0.5, 0.51, 0.51]])
    labels, targets = assign_targets(
        priors, torch.cat([first, tiny]), torch.tensor([7, 9]), torch.tensor([0, 2])
    )
    assert labels[0, 8728].item() == 7
    torch.testing.assert_close(targets[0, 8728], torch.zeros(4), rtol=0, atol=1e-5)
    (row,) = torch.nonzero(labels[0] == 9)[:, 0].tolist()
    assert row < 5776  # of the map of the smallest priors
    cx, cy, w, h = priors[row].tolist()
    wanted = [(0.505 - cx) / w / 0.1, (0.505 - cy) / h / 0.1]
    wanted += [math.log(0.01 / w) / 0.2, math.log(0.01 / h) / 0.2]
    torch.testing.assert_close(targets[0, row], torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert (targets[labels == 0] == 0).all()


def test_a_prior_at_exactly_the_threshold_is_positive():
    """IoU >= .5, not > .5: a box of half the prior, in numbers that are exact."""
    priors = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]])
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    assert ops.match(priors, boxes, torch.tensor([0, 1]), 0.5).tolist() == [[0, 0, 0]]
    boxes = torch.tensor([[0.0, 0.0, 0.4375, 1.0]])  # .4375 of prior 0
    assert ops.match(priors, boxes, torch.tensor([0, 1]), 0.5).tolist() == [[-1, 0, 0]]


# ------------------------------------------------------------- nothing waits for the device


def test_loss_reads_no_value_back(rng):
    """On the meta device there are no values: an .item() or a mask as an index would raise."""
    x = {k: v.to("meta") for k, v in problem(rng, (3, 0, 2)).items()}
    x["loc"].requires_grad_()
    loss_loc, loss_conf, positives = multibox_loss(**x)
    assert (loss_loc + loss_conf).backward() is None
    assert positives.shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        positives.item()  # what such a line would do here


def test_loss_is_one_graph_and_the_same_when_compiled(rng):
    """fullgraph=True: no break, so no synchronisation. The eager backend traces, and compiles no
    C++: seconds instead of minutes."""
    compiled = torch.compile(multibox_loss, fullgraph=True, backend="eager")
    x = problem(rng, (3, 0, 2))
    for a, b in zip(compiled(**x), multibox_loss(**x), strict=True):
        torch.testing.assert_close(a, b)
