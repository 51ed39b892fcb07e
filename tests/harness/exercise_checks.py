"""What docs/exercises.md asks of an answer: hand-made inputs first, then a grid or random ones.

A check raises Wrong, which says for what input an answer is wrong. tests/test_exercises.py runs the
checks on a student's file.
"""

import itertools
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import traceback
from fractions import Fraction
from math import e
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).resolve().parents[2] / "ops"  # nothing of it is imported: nothing is built
SECONDS = 30  # that one call may take


class Wrong(AssertionError):
    """What is wrong with an answer, and for which input."""


def compiler() -> list[str]:
    """As ops.jit's, whose import would build the ops."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


# ------------------------------------------------------------------------------ asking


def show(x) -> str:
    """A value as a student would type it; a large tensor by its shape."""
    if isinstance(x, torch.Tensor):
        return show(x.tolist()) if 0 < x.numel() <= 96 else f"<tensor {tuple(x.shape)}>"
    if isinstance(x, list | tuple):
        inner = ", ".join(map(show, x)) + "," * (isinstance(x, tuple) and len(x) == 1)
        return f"[{inner}]" if isinstance(x, list) else f"({inner})"
    return f"{x:.6g}" if isinstance(x, float) else repr(x)


class Question:
    """One call of a student's function, and what to say about it."""

    def __init__(self, name, function, arguments, why):
        self.call = f"{name}({', '.join(map(show, arguments))})"
        self.why = f"\n  ({why})"
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        for copy, x in zip(copies, arguments, strict=True):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                copy.detach_().requires_grad_()
        self.arguments = copies

        def stop(*_):
            raise TimeoutError(f"still not done after {SECONDS} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            self.answer = function(*copies)
        except (Exception, SystemExit) as error:
            raise self.wrong(f"raises {type(error).__name__}: {error}{place(error)}") from None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        if self.answer is None:
            raise self.wrong("gives None: is there a `return`?")
        for i, (copy, x) in enumerate(zip(copies, arguments, strict=True), 1):
            if isinstance(x, torch.Tensor) and not torch.equal(copy, x):
                raise self.wrong(f"changes its argument {i}: work on a copy, `x.clone()`")

    def wrong(self, what):
        return Wrong(f"{self.call}{'' if what.startswith(':') else ' '}{what}{self.why}")

    def expect(self, got, want, *, what="", tolerance=1e-5):
        """`want` a number, or a tensor: then `got` has to be one of that shape and type."""
        if isinstance(want, torch.Tensor):
            if not isinstance(got, torch.Tensor):
                raise self.wrong(f"{what}is {type(got).__name__} {got!r:.60}, expected a tensor")
            for part in ("shape", "dtype"):
                have, need = getattr(got, part), getattr(want, part)
                if have != need:
                    have, need = (x if part == "dtype" else tuple(x) for x in (have, need))
                    raise self.wrong(f"{what}has {part} {have}, expected {need}")
        try:
            got, want = torch.as_tensor(got).detach(), torch.as_tensor(want)
        except (TypeError, ValueError, RuntimeError):
            raise self.wrong(f"{what}is {got!r:.60}, expected a number") from None
        if got.shape != want.shape:
            raise self.wrong(f"{what}has shape {tuple(got.shape)}, expected one number")
        near = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=tolerance)
        if not near.all():
            where, at = tuple((~near).nonzero()[0].tolist()), ""
            if got.numel() > 12:  # too many to look through
                got, want, at = got[where], want[where], f" at {list(where)}"
            raise self.wrong(f"{what}is {show(got)}{at}, expected {show(want)}")


def place(error):
    """The line of the student's file in which it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # after the call
    for frame in reversed(frames):
        if frame.filename == frames[0].filename and frame.line:
            return f"\n  {Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
    return ""


def ask(name, function, arguments, want, why, tolerance=1e-5):
    question = Question(name, function, arguments, why)
    question.expect(question.answer, want, what="", tolerance=tolerance)


# ------------------------------------------------------------------------------ inputs


def grid_boxes():
    """Every box with corners on a grid of 3 x 3 cells, empty ones too: 100."""
    spans = [(low, high) for low in range(4) for high in range(low, 4)]
    return [(x0, y0, x1, y1) for (x0, x1), (y0, y1) in itertools.product(spans, spans)]


def iou_by_counting(a, b):
    """The cells in both boxes over those in either: of integer boxes."""
    cells = [{(x, y) for x in range(x0, x1) for y in range(y0, y1)} for x0, y0, x1, y1 in (a, b)]
    return len(cells[0] & cells[1]) / max(1, len(cells[0] | cells[1]))


def plain_iou(a, b):
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inter = sides[0] * sides[1]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return inter / (sum(areas) - inter)


def plain_pairs(a_xyxy, b_xyxy):
    rows = [[plain_iou(a, b) for b in b_xyxy.tolist()] for a in a_xyxy.tolist()]
    return torch.tensor(rows)


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g)
    return torch.cat([corner, corner + 0.05 + 0.4 * torch.rand(n, 2, generator=g)], dim=1)


def eighths(shape, g):
    """Random numbers among 0, 1/8 ... 7/8: exact in every format, and often equal."""
    return torch.randint(8, shape, generator=g) / 8


# ------------------------------------------------------------------------------ the checks


def check_iou(iou):
    for a, b, want, why in [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, "1 of 7 squares"),
        ((1, 1, 3, 3), (0, 0, 2, 2), 1 / 7, "the boxes exchanged"),
        ((0, 2, 3, 4), (2, 0, 4, 3), 1 / 11, "one is above and to the right of the other"),
        ((2, 0, 4, 3), (0, 2, 3, 4), 1 / 11, "the boxes exchanged"),
        ((0, 0, 4, 1), (0, 0, 1, 1), 0.25, "one inside the other"),
        ((0, 1, 3, 2), (1, 0, 2, 3), 0.2, "a cross"),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0, "they only touch"),
        ((0, 0, 1, 1), (5, 0, 6, 1), 0.0, "apart in x"),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0, "apart in x and in y"),
        ((-3, -3, -1, -1), (-2, -2, 0, 0), 1 / 7, "left of and above the image's corner"),
        ((0.1, 0.1, 0.3, 0.2), (0.2, 0.1, 0.4, 0.2), 1 / 3, "sides below 1"),
        ((0, 0, 2e-5, 2e-5), (1e-5, 1e-5, 3e-5, 3e-5), 1 / 7, "tiny boxes"),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0, "two empty boxes"),
    ]:
        ask("iou", iou, (a, b), want, why)
    for a, b in itertools.product(grid_boxes(), repeat=2):
        ask("iou", iou, (a, b), iou_by_counting(a, b), "counted on a grid")


def check_pairs(pairs):
    def case(a, b, want, why, tolerance=1e-5):
        ask("pairs", pairs, (torch.tensor(a), torch.tensor(b)), torch.tensor(want), why, tolerance)

    two, square = [[0.0, 0, 2, 2], [0, 0, 1, 4]], [0.0, 0, 1, 1]
    three = [[1.0, 1, 3, 3], [0, 0, 2, 2], [0, 3, 1, 4]]
    case(two, three, [[1 / 7, 1, 0], [0, 1 / 3, 1 / 4]], "two boxes, three boxes")
    case(three, two, [[1 / 7, 0], [1, 1 / 3], [0, 1 / 4]], "three boxes, two boxes")
    case([square], [[5.0, 5, 6, 6]], [[0.0]], "apart in x and in y")
    case([[2.0, 2, 2, 5], [0, 0, 0, 0]], [[2.0, 2, 2, 5], [0, 0, 0, 0]], [[0.0] * 2] * 2, "empty")
    case([[-3.0, -3, -1, -1]], [[-2.0, -2, 0, 0]], [[1 / 7]], "left of and above the corner")
    tiny = [[0, 0, 2e-5, 2e-5]], [[1e-5, 1e-5, 3e-5, 3e-5]]
    case(*tiny, [[1 / 7]], "tiny boxes", 1e-4)
    no_boxes = torch.zeros(0, 4)
    ask("pairs", pairs, (no_boxes, torch.tensor(three)), torch.zeros(0, 3), "no boxes in a")
    ask("pairs", pairs, (torch.tensor(two), no_boxes), torch.zeros(2, 0), "no boxes in b")
    boxes = grid_boxes()
    some = boxes[::7]
    counted = [[iou_by_counting(a, b) for b in some] for a in boxes]
    for unit, start in ((1.0, 0.0), (1.0, -2.0), (100.0, 0.0), (1e-5, 0.0)):
        why = f"boxes on a grid of step {unit:g} from {start:g}, counted"
        case(
            *[(torch.tensor(x) * unit + start).tolist() for x in (boxes, some)], counted, why, 1e-4
        )
    a, b = random_boxes(5, 0), random_boxes(7, 1)
    ask("pairs", pairs, (a, b), plain_pairs(a, b), "random boxes")


def plain_priors(side, small, large, step, ratios):
    """As the page says it, number by number."""
    rows = []
    for row, column in itertools.product(range(side), range(side)):
        sizes = [(small, small), ((small * large) ** 0.5,) * 2]
        for r in ratios:
            wide, narrow = small * r**0.5, small / r**0.5
            sizes += [(wide, narrow), (narrow, wide)]
        rows += [[(column + 0.5) * step, (row + 0.5) * step, *size] for size in sizes]
    return torch.tensor(rows)


def check_priors(priors):
    for arguments, want, why in [
        ((1, 4, 9, 100, ()), [[50, 50, 4, 4], [50, 50, 6, 6]], "one cell, two squares"),
        ((1, 8, 18, 15, (4,)), [[7.5, 7.5, 8, 8], [7.5, 7.5, 12, 12], [7.5, 7.5, 16, 4],
                                [7.5, 7.5, 4, 16]], "an odd step, a ratio of 4"),
        ((2, 4, 9, 7, ()), [[3.5, 3.5, 4, 4], [3.5, 3.5, 6, 6], [10.5, 3.5, 4, 4],
                            [10.5, 3.5, 6, 6], [3.5, 10.5, 4, 4], [3.5, 10.5, 6, 6],
                            [10.5, 10.5, 4, 4], [10.5, 10.5, 6, 6]], "four cells, row by row"),
        ((1, 50, 72, 10, ()), [[5, 5, 50, 50], [5, 5, 60, 60]], "they may leave the image"),
        ((1, 6, 6, 2, (4, 9)), [[1, 1, 6, 6], [1, 1, 6, 6], [1, 1, 12, 3], [1, 1, 3, 12],
                                [1, 1, 18, 2], [1, 1, 2, 18]], "two ratios"),
        ((1, 6, 6, 2, (0.25,)), [[1, 1, 6, 6], [1, 1, 6, 6], [1, 1, 3, 12], [1, 1, 12, 3]],
         "a ratio below 1: tall first"),
    ]:  # fmt: skip
        ask("priors", priors, arguments, torch.tensor(want, dtype=torch.float32), why)
    for arguments in [
        (3, 21, 45, 8, (2,)),
        (5, 111, 162, 32.5, (2, 3)),
        (2, 10, 30, 33, (1.6,)),
        (2, 12, 20, 10, (1, 2)),
        (19, 60, 111, 16, (2, 3)),
    ]:
        ask("priors", priors, arguments, plain_priors(*arguments), "computed one by one")


def check_coding(coding):
    encode, decode = coding

    def case(box, prior, loc, why, tolerance=1e-4):
        box, prior, loc = (torch.tensor([x], dtype=torch.float32) for x in (box, prior, loc))
        ask("encode", encode, (box, prior), loc, why, tolerance)
        ask("decode", decode, (loc, prior), box, why, tolerance)

    one = [0.5, 0.5, 0.2, 0.4]
    case([0.4, 0.3, 0.6, 0.7], one, [0, 0, 0, 0], "the box is the prior")
    case([0.5, 0.4, 0.7, 0.6], one, [5, 0, 0, 5 * math.log(0.5)], "to the right, half as high")
    case([0.4, 0.5, 0.6, 0.9], one, [0, 5, 0, 0], "lower")
    case([0.3, 0.3, 0.7, 0.7], one, [0, 0, 5 * math.log(2), 0], "twice as wide")
    case([-0.1, -0.4, 0.1, 0.0], one, [-25, -17.5, 0, 0], "outside the image")
    case([0.9, 1.1, 1.3, 1.5], one, [30, 20, 5 * math.log(2), 0], "beyond the image")
    case([145, 140, 175, 160], [150, 150, 60, 40], [10 / 6, 0, *[5 * math.log(0.5)] * 2], "pixels")
    tiny = [0.49999, 0.49999, 0.50001, 0.50001]
    want = [0, 0, 5 * math.log(1e-4), 5 * math.log(5e-5)]
    ask("encode", encode, (torch.tensor([tiny]), torch.tensor([one])), torch.tensor([want]),
        "a tiny box", 1e-3)  # fmt: skip
    for size in (25.0, -25.0):  # torchvision clamps at 20.7
        half = 0.01 * math.exp(size / 5) / 2
        want = torch.tensor([[0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half]])
        arguments = torch.tensor([[0, 0, size, size]]), torch.tensor([[0.5, 0.5, 0.01, 0.01]])
        ask("decode", decode, arguments, want, "a size far from the prior's; nothing is clipped")
    for n in (0, 9):
        loc, priors = 3 * torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), []
        boxes = torch.zeros(n, 4)
        for i, (x, y, log_w, log_h) in enumerate(loc.tolist()):
            px, py, pw, ph = 0.1 * i, 0.5, 0.1 + 0.05 * i, 0.2
            cx, cy, w, h = (
                px + x * pw / 10,
                py + y * ph / 10,
                pw * e ** (log_w / 5),
                ph * e ** (log_h / 5),
            )
            boxes[i] = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            priors.append([px, py, pw, ph])
        priors = torch.tensor(priors).reshape(n, 4)
        ask("decode", decode, (loc, priors), boxes, f"{n} random offsets", 1e-4)
        ask("encode", encode, (boxes, priors), loc, f"{n} random offsets, the way back", 1e-3)


def plain_matching(iou, threshold):
    """As the page says it: all pairs, best first; then what is left."""
    boxes, priors = iou.shape
    value = iou.tolist()
    matched, out = [-1] * priors, set()
    order = itertools.product(range(boxes), range(priors))
    for box, prior in sorted(order, key=lambda pair: -value[pair[0]][pair[1]]):
        if value[box][prior] > 1e-6 and box not in out and matched[prior] < 0:
            matched[prior] = box
            out.add(box)
    for prior in range(priors):
        best = max(range(boxes), key=lambda box: value[box][prior], default=None)
        if matched[prior] < 0 and best is not None and value[best][prior] >= threshold:
            matched[prior] = best
    return torch.tensor(matched)


def check_matching(matching):
    def case(iou, want, why, threshold=0.5):
        ask("matching", matching, (torch.tensor(iou), threshold), torch.tensor(want), why)

    case([[0.1, 0.6, 0.9]], [-1, 0, 0], "the threshold")
    case([[0.1, 0.5, 0.75]], [-1, 0, 0], "an IoU of exactly the threshold")
    case([[0.1, 0.4, 0.75]], [-1, 0, 0], "another threshold", 0.25)
    case([[0.1, 0.3, 0.2]], [-1, 0, -1], "a box below the threshold everywhere gets one prior")
    case([[0.2, 0.8], [0.3, 0.7]], [1, 0], "two boxes with one best prior: the loser's next best")
    case([[0.3, 0.7], [0.2, 0.8]], [0, 1], "the same, and the second box is the better one")
    case([[0.8, 0.2], [0.7, 0.3]], [0, 1], "the same, and the prior is the first")
    case([[0.55, 0.9], [0.52, 0.6]], [1, 0], "a forced prior that the other box overlaps more")
    case([[0.1, 0.9, 0.6, 0.7], [0.2, 0.8, 0.7, 0.6]], [-1, 0, 1, 0], "forced, then the threshold")
    case([[0.4, 0.3, 0.2], [0.4, 0.2, 0.3], [0.45, 0.3, 0.2]], [2, 0, 1],
         "three boxes with one best prior")  # fmt: skip
    case([[0.9, 0.1, 0.2], [0.85, 0.5, 0.3], [0.1, 0.8, 0.1]], [0, 2, 1],
         "the loser's next best comes after another box's best")  # fmt: skip
    case([[0.9, 0.8], [0.8, 0.1]], [0, 1], "the best pair first, not the best sum")
    case([[0.1, 0.49999, 0.75]], [-1, -1, 0], "an IoU just below the threshold")
    case([[0.9, 0.0], [0.0, 0.0]], [0, -1], "a box that overlaps nothing gets nothing")
    case([[0.0, 5e-7]], [-1, -1], "an IoU of 5e-7 is no overlap")
    case([[0.0, 2e-6]], [-1, 0], "an IoU of 2e-6 is one")
    case([[0.75], [0.6]], [0], "more boxes than priors")
    case([[0.6, 0.6]], [0, 0], "equal IoUs in a row")
    case([[0.3, 0.3], [0.1, 0.1]], [0, 1], "equal IoUs: the first prior to the better box")
    case([[0.9, 0.6, 0.2], [0.2, 0.6, 0.9]], [0, 0, 1], "a tie of two boxes: the lowest")
    ask("matching", matching, (torch.zeros(0, 3), 0.5), torch.full((3,), -1), "no boxes")
    g = torch.Generator().manual_seed(0)
    for i in range(300):
        shape = [int(torch.randint(n, (), generator=g)) for n in (5, 6)]
        iou, threshold = eighths((shape[0], shape[1] + 1), g), (0.25, 0.5, 0.625)[i % 3]
        want = plain_matching(iou, threshold)
        ask("matching", matching, (iou, threshold), want, f"random eighths, number {i}")
    for seed in range(3):
        boxes, priors = random_boxes(6, seed), random_boxes(40, seed + 100)
        iou = plain_pairs(boxes, priors)
        want = plain_matching(iou, 0.5)
        ask("matching", matching, (iou, 0.5), want, f"random boxes, seed {seed}")


def plain_mining(score, positive, ratio):
    keep = torch.zeros_like(positive)
    for n, row in enumerate(score.tolist()):
        negatives = [p for p in range(len(row)) if not positive[n, p]]
        wanted = ratio * (len(row) - len(negatives))
        keep[n, sorted(negatives, key=lambda p: -row[p])[:wanted]] = True
    return keep


def check_mining(mining):
    def case(score, positive, ratio, want, why):
        positive, want = torch.tensor(positive) > 0, torch.tensor(want) > 0
        ask("mining", mining, (torch.tensor(score), positive, ratio), want, why)

    score = [[0.9, 0.8, 0.1, 0.7, 0.2, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
    one, none = [1, 0, 0, 0, 0, 0], [0] * 6
    case(score[:1], [one], 3, [[0, 1, 0, 1, 0, 1]], "one positive, three negatives")
    case(score[:1], [one], 1, [[0, 1, 0, 0, 0, 0]], "a ratio of 1")
    case(score, [one, none], 3, [[0, 1, 0, 1, 0, 1], none], "image 1 has no positive")
    case(score, [one, [1, 1, 1, 0, 0, 0]], 3, [[0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1]],
         "nine wanted, three there")  # fmt: skip
    case(score, [one, [1] * 6], 2, [[0, 1, 0, 1, 0, 0], none], "no negative in image 1")
    case([[2.0, 5e4, 3e4, 7.0]], [[0, 1, 0, 0]], 2, [[0, 0, 1, 1]], "large scores")
    case([[0.5, 0.5, 0.5, 0.5, 0.5]], [[0, 0, 1, 0, 0]], 2, [[1, 1, 0, 0, 0]], "equal scores")
    case([[0.0, 0.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0, 0]], 2, [[0, 1, 1, 0, 0]], "all scores are 0")
    case([[0, 0.5, 0.5000005, 0.5000006]], [[1, 0, 0, 0]], 1, [[0, 0, 0, 1]], "nearly equal scores")
    case([[0.0] * 64], [[1] + [0] * 63], 20, [[0] + [1] * 20 + [0] * 43], "64 scores of 0")
    g = torch.Generator().manual_seed(0)
    for i in range(200):
        shape = [1 + int(torch.randint(n, (), generator=g)) for n in (3, 8)]
        arguments = eighths(shape, g), torch.rand(shape, generator=g) < 0.3, 1 + i % 3
        ask("mining", mining, arguments, plain_mining(*arguments), f"random eighths, number {i}")


def plain_loss(loc, logits, target_loc, target_labels, mined):
    """Sums over the priors, one by one."""
    parts = [0.0 * loc.sum(), 0.0 * logits.sum()]
    for n, p in itertools.product(*map(range, target_labels.shape)):
        label = int(target_labels[n, p])
        if label > 0:
            d = (loc[n, p] - target_loc[n, p]).abs()
            parts[0] = parts[0] + torch.where(d < 1, d * d / 2, d - 0.5).sum()
        if label > 0 or mined[n, p]:
            parts[1] = parts[1] + logits[n, p].logsumexp(0) - logits[n, p, label]
    positives = max(1, int((target_labels > 0).sum()))
    return parts[0] / positives, parts[1] / positives


def check_loss(loss):
    def case(loc, logits, target_loc, labels, mined, why):
        arguments = [loc.requires_grad_(), logits.requires_grad_(), target_loc, labels, mined]
        question = Question("loss", loss, arguments, why)
        if not isinstance(question.answer, tuple | list) or len(question.answer) != 2:
            raise question.wrong(f"is {question.answer!r:.60}, expected (loss_loc, loss_conf)")
        want = plain_loss(*arguments)
        parts = list(zip(("loss_loc", "loss_conf"), ("loc", "logits"), strict=True))
        for (name, _), x, y in zip(parts, question.answer, want, strict=True):
            question.expect(x, y.item(), what=f": {name} ")
        for i, (name, of) in enumerate(parts):
            x = question.answer[i]
            if not isinstance(x, torch.Tensor) or not x.requires_grad:
                raise question.wrong(f": {name} has no gradient. What cuts it off? .item()?")
            mine, right = (
                torch.autograd.grad(y, at[i], retain_graph=True, allow_unused=True)[0]
                for y, at in ((x, question.arguments), (want[i], arguments))
            )
            if mine is None:
                raise question.wrong(f": {name} has no gradient with respect to {of}")
            question.expect(mine, right, what=f": {name}, its gradient with respect to {of} ")

    def small(labels, mined, logits=((0.0, 0), (1, 0), (0, 3)), target=((0.5, 2, 0, -3),) * 3):
        numbers = [((0.0,) * 4, (1, 1, 0, 0), (4, 0, 0, 0))], [logits], [target]
        labels, mined = torch.tensor(labels).reshape(-1, 3), torch.tensor(mined).reshape(-1, 3) > 0
        loc, logits, target = (torch.tensor(x * len(labels)) for x in numbers)
        return loc, logits, target, labels, mined

    case(*small([1, 0, 0], [0, 1, 0]), "one positive, one mined, one of neither kind")
    case(*small([1, 0, 1], [0, 1, 0]), "two positives")
    case(*small([[1, 0, 1], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]), "two images: 2 positives and 1")
    case(*small([0, 0, 0], [0, 0, 0]), "no positive")
    case(*small([0, 0, 0], [1, 0, 1]), "no positive, two mined: divided by 1")
    huge = ((200.0, -200), (0, 200), (-200, 0))
    case(*small([1, 0, 0], [0, 1, 1], huge), "logits of 200")
    case(*small([1, 0, 0], [0, 1, 0], target=((0.5, 2, 0, -3), (7, 7, 7, 7), (9, 9, 9, 9))),
         "the targets of a background prior do not matter")  # fmt: skip
    g = torch.Generator().manual_seed(0)
    for seed, positives in enumerate(([3, 1], [4, 0], [0, 0], [2, 5, 1])):
        n, p, c = len(positives), 20, 5
        labels = torch.zeros(n, p, dtype=torch.int64)
        for row, count in zip(labels, positives, strict=True):
            row[torch.randperm(p, generator=g)[:count]] = torch.randint(1, c, (count,), generator=g)
        mined = (torch.rand(n, p, generator=g) < 0.3) & (labels == 0)
        numbers = [torch.randn(n, p, k, generator=g) * 2 for k in (4, c, 4)]
        case(*numbers, labels, mined, f"random, seed {seed}, {positives} positives in the images")


def plain_nms(boxes, scores, threshold):
    iou, kept = plain_pairs(boxes, boxes).tolist(), []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(iou[i][j] <= threshold for j in kept):
            kept.append(i)
    return torch.tensor([i in kept for i in range(len(scores))])


def check_nms(nms):
    def case(boxes, scores, threshold, want, why):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = torch.tensor(scores, dtype=torch.float32)
        ask("nms", nms, (boxes, scores, threshold), torch.tensor(want, dtype=torch.bool), why)

    half = [[0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]]
    case(half, [0.9, 0.8, 0.7], 0.4, [1, 0, 1], "IoU .5 is above the threshold")
    case(half, [0.9, 0.8, 0.7], 0.5, [1, 1, 1], "IoU of exactly the threshold does not suppress")
    case(half, [0.9, 0.8, 0.7], 0.6, [1, 1, 1], "IoU .5 is below the threshold")
    case(half, [0.7, 0.9, 0.8], 0.4, [0, 1, 1], "scores in another order; the mask is of the input")
    case([*half, *half], [0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 0.4, [0, 0, 0, 1, 0, 1], "rising, falling")
    chain = [[0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]]
    case(chain, [0.9, 0.8, 0.7], 0.3, [1, 0, 1], "the third overlaps only what is suppressed")
    case(chain, [0.8, 0.9, 0.7], 0.3, [0, 1, 0], "the middle one is the best")
    far = [[0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1]]
    case(far, [0.9, 0.8, 0.7], 0.5, [1, 1, 0], "the third is suppressed by the first")
    case([*far[:2], far[1]], [0.9, 0.8, 0.7], 0.5, [1, 1, 0], "the third by the second")
    twins = [[0, 0, 1, 1], [0, 0, 1, 1]]
    case(twins, [0.5, 0.5], 0.5, [1, 0], "a tie: the lowest index first")
    case([[k // 2 * 3, 0, k // 2 * 3 + 1, 1] for k in range(20)], [0.5] * 20, 0.5, [1, 0] * 10,
         "10 pairs of twins, all scores equal")  # fmt: skip
    case(twins, [0.0, -2.0], 0.5, [1, 0], "scores of 0 and below it")
    case(far[:2], [0.0, -2.0], 0.5, [1, 1], "a negative score is a score")
    near = [[0, 0, 2, 1], [0, 0, 1.0001, 1]]
    case(near, [0.9, 0.8], 0.5, [1, 0], "IoU .50005 is above the threshold")
    case([[0, 0, 4, 4], [1, 1, 3, 3]], [0.9, 0.8], 0.5, [1, 1], "one inside the other, IoU 1/4")
    case([[1, 1, 1, 1]] * 2, [0.9, 0.8], 0.5, [1, 1], "two empty boxes have IoU 0")
    case(half[:1], [0.9], 0.5, [1], "one box")
    case([], [], 0.5, [], "no boxes")
    far = [[3 * k, 0, 3 * k + 1, 1] for k in range(300)]
    case(far, [1 - k / 1e4 for k in range(300)], 0.5, [1] * 300, "300 boxes that do not touch")
    case(twins, [0.5001, 0.5002], 0.5, [0, 1], "scores that differ a little")
    for seed in range(6):
        b, threshold = random_boxes(60, seed), (0.45, 0.3, 0.7)[seed % 3]
        s = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) * 20).round() / 20
        ask("nms", nms, (b, s, threshold), plain_nms(b, s, threshold), f"random boxes, seed {seed}")


def plain_precision(correct, objects):
    """The mean of the eleven, in fractions; `correct` best score first."""
    hits = list(itertools.accumulate(correct))
    points = [(h, Fraction(h, i + 1)) for i, h in enumerate(hits)]
    best = [max([p for h, p in points if 10 * h >= k * objects], default=0) for k in range(11)]
    return float(sum(best) / 11)


def check_precision(precision):
    def case(scores, correct, objects, want, why):
        scores, correct = torch.tensor(scores), torch.tensor(correct) > 0
        ask("precision", precision, (scores, correct, objects), want, why)

    falling = [0.9, 0.8, 0.7, 0.6, 0.5]
    case(falling[:2], [1, 1], 2, 1.0, "all right, all found")
    case(falling[:2], [0, 0], 2, 0.0, "all wrong")
    case([], [], 2, 0.0, "no detection")
    case(falling[:2], [1, 0], 2, 6 / 11, "one of two found: six recalls are reached")
    case(falling[:2], [0, 1], 1, 0.5, "the best precision at that recall or more")
    case(falling, [1, 0, 1, 1, 0], 3, (4 + 7 * 0.75) / 11, "precision rises again")
    case(falling, [1, 0, 1, 1, 0], 7, (2 + 3 * 0.75) / 11, "three of seven found")
    case([0.6, 0.9, 0.5, 0.8, 0.7], [1, 1, 0, 0, 1], 7, (2 + 3 * 0.75) / 11, "the same, shuffled")
    case([0.5, 0.5], [1, 0], 1, 1.0, "a tie: the lowest index first")
    case([0.5] * 20, [1] * 10 + [0] * 10, 10, 1.0, "20 ties")
    case([3.0, -2.0], [1, 1], 2, 1.0, "any scores")
    case([-k / 1e4 for k in range(130)], [0] * 129 + [1], 1, 1 / 130, "one right behind 129 wrong")
    for objects in (10, 20, 30):
        for found in range(1, objects + 1):
            why = f"{found} of {objects} found: exactly {10 * found // objects + 1} recalls"
            want = (10 * found // objects + 1) / 11
            scores, correct = torch.arange(found, 0, -1.0), torch.ones(found) > 0
            ask("precision", precision, (scores, correct, objects), want, why)
    for count in range(7):
        for correct in itertools.product((0, 1), repeat=count):
            objects = max(1, sum(correct)) + count % 3 * 2
            scores, right = torch.arange(count, 0, -1.0), torch.tensor(correct) > 0
            want = plain_precision(correct, objects)
            ask("precision", precision, (scores, right, objects), want, "counted")


# ------------------------------------------------------------------------------ the kernel

HARNESS = """
#include "emulate.h"
#include "iou.h"
using Key = unsigned long long;
#include KERNEL
int main() {  // stdin: count, threshold, boxes; stdout: the mask
  int count;
  float threshold;
  if (!std::fread(&count, 4, 1, stdin) || !std::fread(&threshold, 4, 1, stdin)) return 1;
  const unsigned words = (count + 63) / 64;
  std::vector<Box> boxes(count);
  if (std::fread(boxes.data(), 16, count, stdin) != size_t(count)) return 1;
  std::vector<Key> mask(count * words, 0);
  LAUNCH(nms_mask, dim3(words, words), 64, 0, 0)(boxes.data(), count, threshold, mask.data());
  std::fwrite(mask.data(), 8, mask.size(), stdout);
}
"""
SANITIZERS = {
    "AddressSanitizer": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "ThreadSanitizer": ["-O1", "-fsanitize=thread"],  # -O0 hides copies of structs from it
}
WAITS = 10  # seconds until a kernel hangs


def check_kernel(kernel, folder):
    """`kernel`: the path of CUDA source. A wrong address or a race is named by its line."""
    if shutil.which(compiler()[0]) is None:
        pytest.skip("no C++ compiler on this machine")
    touching = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    cases = [(touching, 0.5, "IoU of exactly the threshold"), (touching, 0.4, "IoU .5")]
    cases += [(random_boxes(n, n), 0.3, "random boxes") for n in (1, 64, 65, 130, 200)]
    program, wrong = build_kernel(kernel, folder, "AddressSanitizer"), None
    for case in cases:
        wrong = wrong or run_kernel(program, kernel, *case)
    run_kernel(build_kernel(kernel, folder, "ThreadSanitizer"), kernel, *cases[4])
    if wrong:  # only now, because a race explains any wrong bit
        raise wrong


def build_kernel(kernel, folder, sanitizer):
    """A program that runs the kernel once on CPU threads."""
    harness, program = folder / "harness.cpp", folder / sanitizer
    harness.write_text(HARNESS)
    command = [*compiler(), "-std=c++20", "-g1", "-ffp-contract=off", "-pthread",
               f"-I{OPS}", f'-DKERNEL="{kernel.resolve()}"', harness, "-o", program]  # fmt: skip
    flags = SANITIZERS[sanitizer]
    built = subprocess.run([*command, *flags], capture_output=True, text=True)
    if built.returncode != 0 and re.search("cannot find.*(asan|tsan|ubsan)", built.stderr):
        print(f"this compiler has no {sanitizer}: checked without")
        built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise Wrong(f"{kernel.name} does not compile:\n{built.stderr[:3000]}")
    return program


def run_kernel(program, kernel, boxes, threshold, why):
    """-> None, or what is wrong with the mask. Raises it where the kernel ends or hangs."""
    n = len(boxes)
    call = f"nms_mask of {n} boxes ({why}), threshold {threshold}:"
    data = struct.pack("if", n, threshold) + boxes.numpy().tobytes()
    try:
        ran = subprocess.run([program], input=data, capture_output=True, timeout=WAITS)
    except subprocess.TimeoutExpired:
        raise Wrong(
            f"{call} hangs. Does a thread return before __syncthreads(), where the others wait?"
        ) from None
    if ran.returncode != 0:
        raise Wrong(f"{call} {explain(ran.stderr.decode(errors='replace'), kernel)}")
    mask = torch.frombuffer(bytearray(ran.stdout), dtype=torch.int64).reshape(n, -1)
    bits = (mask[..., None] >> torch.arange(64) & 1).reshape(n, -1)
    want, iou = torch.zeros_like(bits), plain_pairs(boxes, boxes)
    want[:, :n] = torch.triu(iou > threshold, diagonal=1)
    for row, box in (bits != want).nonzero().tolist()[:1]:
        pair = f"their IoU is {iou[row, box]:.3f}" if box < n else f"there is no box {box}"
        return Wrong(
            f"{call} in row {row}, bit {box % 64} of word {box // 64} (box {box}) is "
            f"{bits[row, box]}, expected {want[row, box]}: {pair}"
        )


def explain(report, kernel):
    """A sanitizer's pages in one line, with the lines of the kernel that it names."""
    lines = kernel.read_text().splitlines()
    named = dict.fromkeys(re.findall(rf"/{re.escape(kernel.name)}:(\d+)", report))
    found = re.search(
        r"(AddressSanitizer: [\w-]+|ThreadSanitizer: [\w ]+|runtime error: .*)", report
    )
    shown = "".join(f"\n  line {i}: {lines[int(i) - 1].strip()}" for i in list(named)[:2])
    hint = {
        "heap-buffer-overflow": "reads or writes outside of `boxes` or `mask`",
        "global-buffer-overflow": "reads or writes outside of shared memory",
        "unexpected memory mapping": "not your kernel; put `setarch $(uname -m) -R` before pytest",
        "data race": "one thread reads what another writes, and no barrier stands between",
    }
    what = found[0] if found else f"crashes: {report[:300]}"
    what += "".join(f" ({text})" for word, text in hint.items() if word in what)
    return what + shown


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items())
          if name.startswith("check_")}  # fmt: skip
