"""The checks of the exercises accept our answers and reject every mistake that is listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_exercises
from harness import exercise_checks
from harness.exercise_answers import KERNEL, SLOW, WRONG, answer
from harness.exercise_checks import CHECKS, Wrong

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = [
    pytest.param(name, what, marks=[pytest.mark.slow] * (what in SLOW), id=f"{name}: {what}")
    for name in CHECKS
    for what in WRONG[name]
]


def check(name, folder, *changes):
    if name == "kernel":
        (folder / "mine.cu").write_text(answer(name, *changes))
        CHECKS[name](folder / "mine.cu", folder)
    else:
        CHECKS[name](answer(name, *changes))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "kernel"])  # it is below
def test_our_answer_is_right(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize(("name", "what"), MISTAKES)
def test_mistake_is_rejected(name, what, tmp_path):
    """By a hand-made case, which comes before the random ones, and the message has the input."""
    with pytest.raises(Wrong) as wrong:
        check(name, tmp_path, *WRONG[name][what])
    first = {"coding": ("encode(", "decode("), "kernel": ("nms_mask of",)}.get(name, (f"{name}(",))
    assert str(wrong.value).startswith(first)
    assert "random" not in str(wrong.value) or name == "kernel", wrong.value


MINE = """
def iou(a, b):
    left, top, right, bottom = a
    return left / (top - top)
def pair(a_xyxy, b_xyxy):
    return a_xyxy
def priors(side, small, large, step, ratios):
    print(side)
def encode(boxes_xyxy, priors_cxcywh):
    return boxes_xyxy.tolist()
def decode(loc, priors_cxcywh):
    return loc
def mining(score, positive, ratio):
    return (score > 2).float()
def loss(loc, logits, target_loc, target_labels, mined):
    return loc.sum()
def precision(scores, correct, objects):
    return ...
KERNEL = "mine.cu"
"""


def test_a_student_file_is_checked_in_words(tmp_path):
    """As the page says it, in a process of its own: nothing is green, everything has its reason."""
    (tmp_path / "mine.py").write_text(MINE)
    env = {**os.environ, "SCRATCHDET_STUDENT": "mine.py"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "-p",
        "no:cacheprovider",
    ]
    command += [ROOT / "tests/test_exercises.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    for said in (
        "checking mine.py: iou, priors, coding, mining, loss, precision, kernel "
        "- not yet there: pairs, matching, nms",
        "iou((0, 0, 2, 2), (1, 1, 3, 3)) raises ZeroDivisionError: division by zero",
        "mine.py, line 4: return left / (top - top)",
        "mine.py has no `pairs`, but `pair`: is the name right?",
        "priors(1, 4, 9, 100, ()) gives None: is there a `return`?",
        "expected a tensor",
        "3) has dtype torch.float32, expected torch.bool",
        "expected (loss_loc, loss_conf)",
        "is Ellipsis, expected a number",
        "KERNEL = 'mine.cu': there is no",
        "mine.py has no `nms` yet",
    ):
        assert said in ran.stdout, said + "\n" + ran.stdout
    assert "8 failed, 2 skipped" in ran.stdout
    assert "Traceback" not in ran.stdout


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A function that makes a text the student's file."""

    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setattr(test_exercises, "STUDENT", str(path))
        monkeypatch.setattr(test_exercises, "STUDENT_FILE", str(path))
        test_exercises.load_student.cache_clear()

    yield write
    test_exercises.load_student.cache_clear()


def test_what_is_asked_for_by_name_has_to_be_there(student, tmp_path):
    student("def area(box):\n    return 1\n")
    with pytest.raises(pytest.skip.Exception, match="mine.py has no `encode` and no `decode` yet"):
        test_exercises.check_student("coding", tmp_path, asked=False)
    with pytest.raises(Wrong, match="has no `encode` and no `decode`$"):
        test_exercises.check_student("coding", tmp_path, asked=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def iou(:", "does not load: SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("exit()", "Exit"),
    ],
)
def test_a_file_that_does_not_load(student, tmp_path, text, said):
    student(text)
    with pytest.raises(Wrong, match=said):
        test_exercises.check_student("iou", tmp_path, asked=False)


def test_an_answer_that_never_ends(monkeypatch):
    monkeypatch.setattr(exercise_checks, "SECONDS", 1)

    def iou(a, b):
        while True:
            pass

    with pytest.raises(Wrong, match=r"3\)\) raises TimeoutError: still not done after 1 s"):
        CHECKS["iou"](iou)


def test_right_answers_in_a_file(student, tmp_path):
    (tmp_path / "mine.cu").write_text(KERNEL)
    student("KERNEL = 'mine.cu'\ndef iou(a, b):\n    return 0.5\n")
    test_exercises.check_student("kernel", tmp_path, asked=True)
    with pytest.raises(Wrong, match=r"is 0.5, expected 0.142857"):
        test_exercises.check_student("iou", tmp_path, asked=True)


def test_without_a_file_nothing_is_checked(request, monkeypatch):
    """The page's command must not turn green by our own answers."""
    monkeypatch.setattr(test_exercises, "STUDENT", None)
    with pytest.raises(pytest.skip.Exception, match="no answer of yours is checked"):
        test_exercises.test_exercise("iou", None, request)


def test_every_exercise_is_on_the_page_and_has_five_mistakes():
    text = (ROOT / "docs" / "exercises.md").read_text()
    assert list(CHECKS) == list(WRONG)
    for name in CHECKS:
        assert f"-k {name}" in text
        assert len(WRONG[name]) >= 5
