"""The checks of docs/exercises.md.

    SCRATCHDET_STUDENT=my_ops.py pytest tests/test_exercises.py -k iou

checks the function of that name in the student's file. Without the variable our own answers are
checked, and that each check rejects wrong ones.
"""

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.exercise_answers import RIGHT, WRONG

import ops
from ops import reference
from scratchdet import PRIORS, Config, make_priors, multibox_loss

OPS = Path(ops.__file__).parent
STUDENT = os.environ.get("SCRATCHDET_STUDENT")


def expect(got, want, case, tolerance=1e-5):
    """Equal shapes and, to the tolerance, numbers; else the message says for what input."""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape, (
        f"{case}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    near = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=tolerance)
    if not near.all():
        where = tuple((~near).nonzero()[0].tolist())
        raise AssertionError(
            f"{case}: {got[where].item():.6g} at {list(where)}, expected {want[where].item():.6g}"
        )


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g)
    return torch.cat([corner, corner + 0.05 + 0.4 * torch.rand(n, 2, generator=g)], dim=1)


# ------------------------------------------------------------------------------ the checks


def check_iou(iou):
    for a, b, want in [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 4, 1), (0, 0, 1, 1), 0.25),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        ((0.1, 0.1, 0.3, 0.2), (0.2, 0.1, 0.4, 0.2), 1 / 3),
    ]:
        expect(iou(a, b), want, f"iou({a}, {b})")


def check_pairs(pairs):
    a, b = random_boxes(5, 0), random_boxes(7, 1)
    expect(pairs(a, b), reference.pairwise_iou(a, b), "5 x 7 random boxes")
    empty = torch.tensor([[0.2, 0.2, 0.2, 0.5], [0.0, 0.0, 0.0, 0.0]])
    expect(pairs(empty, empty), torch.zeros(2, 2), "empty boxes")
    far = torch.tensor([[0.0, 0.0, 0.1, 0.1]]), torch.tensor([[0.5, 0.5, 0.6, 0.6]])
    expect(pairs(*far), [[0.0]], "boxes far apart")


def check_priors(priors):
    small, large, step, ratios = PRIORS["voc"][1]
    want = make_priors(Config())[5776 : 5776 + 2166] * 300
    expect(priors(19, small, large, step, ratios), want, "map 2 of VOC", 1e-4)
    want = [[50, 50, 4, 4], [50, 50, 6, 6], [50, 50, 4 * 2**0.5, 4 / 2**0.5],
            [50, 50, 4 / 2**0.5, 4 * 2**0.5]]  # fmt: skip
    expect(priors(1, 4, 9, 100, (2,)), want, "priors(1, 4, 9, 100, (2,))", 1e-4)


def check_coding(coding):
    encode, decode = coding
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.5, 0.4, 0.7, 0.6]])
    want = [[5.0, 0.0, 0.0, -3.4657359]]
    expect(encode(box, prior), want, "encode: prior cxcywh (.5,.5,.2,.4), box (.5,.4,.7,.6)", 1e-4)
    expect(decode(torch.tensor(want), prior), box, "decode: the way back", 1e-4)
    loc = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    priors = make_priors(Config())[-9:]
    boxes = reference.decode(loc, priors)
    expect(decode(loc, priors), boxes, "decode: random offsets", 1e-4)
    expect(encode(boxes, priors), loc, "encode: the way back", 1e-3)


def check_matching(matching):
    def case(iou, want, what):
        expect(matching(torch.tensor(iou), 0.5), want, f"{what}, IoU (G, P) = {iou}")

    case([[0.1, 0.6, 0.9]], [-1, 0, 0], "the threshold")
    case([[0.1, 0.5, 0.4]], [-1, 0, -1], "an IoU of exactly the threshold")
    case([[0.1, 0.3, 0.2]], [-1, 0, -1], "a box below it everywhere")
    case([[0.2, 0.8], [0.3, 0.7]], [1, 0], "two boxes with one best prior")
    case([[0.3, 0.9], [0.2, 0.8]], [0, 1][::-1], "its mirror image")
    case([[0.55, 0.9], [0.52, 0.6]], [1, 0], "a forced prior that the other box overlaps more")
    case([[0.9, 0.0], [0.0, 0.0]], [0, -1], "a box that overlaps nothing")
    for seed in range(5):
        boxes, p = random_boxes(6, seed), random_boxes(40, seed + 100)
        want = reference.match(p, boxes, torch.tensor([0, 6]), 0.5)[0]
        expect(matching(reference.pairwise_iou(boxes, p), 0.5), want, f"random boxes, seed {seed}")


def check_mining(mining):
    score = torch.tensor([[0.9, 0.8, 0.1, 0.7, 0.2, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    positive = torch.zeros(2, 6, dtype=torch.bool)
    positive[0, 0] = True
    want = torch.tensor([[0, 1, 0, 1, 0, 1], [0] * 6]) > 0
    expect(mining(score, positive, 3), want, "image 0 has one positive, image 1 none")
    positive[1, :3] = True
    want[1, 3:] = True
    expect(mining(score, positive, 3), want, "nine wanted, three negatives there")


def check_loss(loss):
    g = torch.Generator().manual_seed(0)
    p = make_priors(Config())
    loc, logits = torch.randn(2, len(p), 4, generator=g), torch.randn(2, len(p), 5, generator=g)
    boxes, labels, offsets = random_boxes(3, 4), torch.tensor([1, 4, 2]), torch.tensor([0, 2, 3])
    from ops.reference import hard_negatives
    from scratchdet import assign_targets

    for what, rows in (("two images with boxes", 3), ("a batch without boxes", 0)):
        one = boxes[:rows], labels[:rows], offsets.clamp(max=rows)
        target_labels, target_loc = assign_targets(p, *one)
        if rows == 0:  # what a background prior's target holds must not matter
            target_loc = torch.full_like(target_loc, 7.0)
        positive = target_labels > 0
        score = (logits.logsumexp(2) - logits[..., 0]).clamp(min=0)
        mined = hard_negatives(score, ~positive, 3 * positive.sum(1))
        want = multibox_loss(loc, logits, p, *one)[:2]
        got = loss(loc, logits, target_loc, target_labels, mined)
        for name, x, y in zip(("loss_loc", "loss_conf"), got, want, strict=True):
            expect(x, y, f"{name}, {what}", 1e-4)


def check_nms(nms):
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    expect(nms(boxes, scores, 0.5), [True] * 3, "IoU of exactly the threshold does not suppress")
    expect(nms(boxes, scores, 0.4), [True, False, True], "IoU above it does")
    chain = torch.tensor([[0.0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]])
    expect(nms(chain, scores, 0.3), [True, False, True], "the third touches only the suppressed")
    expect(nms(chain, scores.flip(0), 0.3), [True, False, True], "scores that rise")
    twins = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    expect(nms(twins, torch.tensor([0.5, 0.5]), 0.5), [True, False], "a tie: the lowest index")
    expect(nms(twins[:0], scores[:0], 0.5), torch.zeros(0) > 0, "no boxes")
    for seed in range(3):
        b = random_boxes(60, seed)
        s = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) * 20).round() / 20
        want = reference.nms(b, s, torch.zeros(60, dtype=torch.int64), 0.45)
        expect(nms(b, s, 0.45), want, f"random boxes, seed {seed}")


def check_precision(precision):
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    correct = torch.tensor([True, False, True, True, False])
    best = [1] * 4 + [0.75] * 7  # of three objects: recalls 1/3, 2/3 and 1
    expect(precision(scores, correct, 3), sum(best) / 11, "right, wrong, right, right, wrong; 3")
    best = [1] * 2 + [0.75] * 3 + [0] * 6  # of seven: 1/7, 2/7 and 3/7
    expect(precision(scores, correct, 7), sum(best) / 11, "the same; 7 objects")
    order = torch.tensor([3, 0, 4, 1, 2])
    expect(precision(scores[order], correct[order], 7), sum(best) / 11, "the same, shuffled")
    expect(precision(scores, ~correct & False, 3), 0.0, "all wrong")


HARNESS = """
#include "emulate.h"
#include "iou.h"
using Key = unsigned long long;
#include KERNEL
int main() {  // stdin: count, threshold, boxes; stdout: the mask and a row behind it
  int count;
  float threshold;
  if (!std::fread(&count, 4, 1, stdin) || !std::fread(&threshold, 4, 1, stdin)) return 1;
  const unsigned words = (count + 63) / 64;
  std::vector<Box> boxes(count);
  if (std::fread(boxes.data(), 16, count, stdin) != size_t(count)) return 1;
  std::vector<Key> mask((count + 64) * words, 0);
  std::fill(mask.begin() + count * words, mask.end(), ~Key(0));
  LAUNCH(nms_mask, dim3(words, words), 64, 0, 0)(boxes.data(), count, threshold, mask.data());
  std::fwrite(mask.data(), 8, mask.size(), stdout);
}
"""


def check_kernel(kernel, tmp_path):
    """`kernel` is CUDA source, or the path of a file with it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    source, program = tmp_path / "kernel.cu", tmp_path / "kernel"
    source.write_text(kernel if "\n" in str(kernel) else Path(kernel).read_text())
    (tmp_path / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-pthread", f"-I{OPS}",
             f'-DKERNEL="{source}"']  # fmt: skip
    built = subprocess.run(
        [compiler, *flags, str(tmp_path / "harness.cpp"), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, f"it does not compile:\n{built.stderr[:3000]}"

    touching = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])  # IoU .5
    cases = [("two boxes, IoU exactly the threshold", touching, 0.5)]
    cases += [(f"{n} random boxes", random_boxes(n, n), 0.3) for n in (130, 64, 1)]
    for what, boxes, threshold in cases:
        n = len(boxes)
        data = struct.pack("if", n, threshold) + boxes.numpy().tobytes()
        try:
            ran = subprocess.run([program], input=data, capture_output=True, timeout=20)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{what}: the kernel hangs. Does a thread return before __syncthreads()?"
            ) from None
        assert ran.returncode == 0, f"{what}: crashed with {ran.returncode}; an index out of range?"
        words = -(-n // 64)
        mask = torch.frombuffer(bytearray(ran.stdout), dtype=torch.int64).reshape(n + 64, words)
        bits = mask[..., None] >> torch.arange(64) & 1  # (n + 64, words, 64)
        want = torch.triu(reference.pairwise_iou(boxes, boxes) > threshold, diagonal=1)
        expect(bits[:n].reshape(n, -1)[:, :n], want, f"{what}, bit (row, later box)")
        assert not bits[:n].reshape(n, -1)[:, n:].any(), f"{what}: bits of boxes that do not exist"
        assert (mask[n:] == -1).all(), f"{what}: writes behind the {n} rows of the mask"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items())
          if name.startswith("check_")}  # fmt: skip


# ------------------------------------------------------------------------------ the tests


def student(name):
    """What the student's file calls by this name."""
    path = Path(STUDENT)
    if not path.is_file():
        pytest.fail(f"SCRATCHDET_STUDENT={STUDENT}: no such file", pytrace=False)
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = {"coding": ("encode", "decode"), "kernel": ("KERNEL",)}.get(name, (name,))
    if missing := [n for n in names if not hasattr(module, n)]:
        pytest.skip(f"{path} has no {' and no '.join(missing)} yet")
    found = tuple(getattr(module, n) for n in names)
    if name == "kernel" and "\n" not in str(found[0]):
        return path.parent / found[0]
    return found if name == "coding" else found[0]


def run(name, answer, tmp_path):
    CHECKS[name](answer, *([tmp_path] if name == "kernel" else []))


@pytest.mark.parametrize("name", CHECKS)
def test_exercise(name, tmp_path):
    run(name, student(name) if STUDENT else getattr(RIGHT, name), tmp_path)


if STUDENT is None:  # what follows tests the checks themselves
    HANGS = ("kernel", 3)
    WRONG_ANSWERS = [
        pytest.param(name, i, marks=[pytest.mark.slow] * ((name, i) == HANGS))
        for name in CHECKS
        for i in range(len(getattr(WRONG, name)))
    ]

    @pytest.mark.parametrize(("name", "which"), WRONG_ANSWERS)
    def test_check_rejects(name, which, tmp_path):
        with pytest.raises(AssertionError):
            run(name, getattr(WRONG, name)[which], tmp_path)

    def test_every_exercise_is_described_and_has_three_wrong_answers():
        text = (Path(__file__).parents[1] / "docs" / "exercises.md").read_text()
        for name in CHECKS:
            assert f"-k {name}" in text, name
            assert len(getattr(WRONG, name)) >= 3, name

    def test_a_student_file_is_swapped_in(tmp_path, monkeypatch):
        """Right, wrong and missing functions: passed, failed with its reason, skipped."""
        mine = tmp_path / "my_ops.py"
        mine.write_text("def iou(a, b):\n    return 0.5\n\nKERNEL = 'mine.cu'\n")
        monkeypatch.setattr(sys.modules[__name__], "STUDENT", str(mine))
        with pytest.raises(
            AssertionError, match=r"\(1, 1, 3, 3\)\): 0.5 at \[\], expected 0.142857"
        ):
            check_iou(student("iou"))
        with pytest.raises(pytest.skip.Exception, match="has no encode and no decode yet"):
            student("coding")
        assert student("kernel") == tmp_path / "mine.cu"
        monkeypatch.setattr(sys.modules[__name__], "STUDENT", "nowhere.py")
        with pytest.raises(pytest.fail.Exception, match="nowhere.py: no such file"):
            student("iou")
