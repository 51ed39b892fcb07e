"""Checks a student's answers to docs/exercises.md.

    SCRATCHDET_STUDENT=my_ops.py pytest tests/test_exercises.py -k iou

checks the function `iou` of that file; without -k, all that the file has. What is asked stands in
harness/exercise_checks.py; test_exercise_checks.py tests the checks themselves.
"""

import difflib
import functools
import importlib.util
import os
from pathlib import Path

import pytest
from harness.exercise_checks import CHECKS, Wrong

STUDENT = os.environ.get("SCRATCHDET_STUDENT")
STUDENT_FILE = str(Path(STUDENT).expanduser().resolve()) if STUDENT else ""
NAMES = {name: {"coding": ("encode", "decode"), "kernel": ("KERNEL",)}.get(name, (name,))
         for name in CHECKS}  # fmt: skip
UNSET = (
    "SCRATCHDET_STUDENT is not set, so no answer of yours is checked: "
    "SCRATCHDET_STUDENT=my_ops.py pytest tests/test_exercises.py"
)


@functools.cache
def load_student():
    """The student's module, run once."""
    path = Path(STUDENT_FILE)
    if not path.is_file():
        raise Wrong(f"SCRATCHDET_STUDENT={STUDENT}: no such file")
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Wrong(f"{path.name} does not load: {type(error).__name__}: {error}") from None
    return module


def missing(name):
    """What the file lacks for an exercise: [] if it is there."""
    return [n for n in NAMES[name] if not hasattr(load_student(), n)]


@pytest.fixture(scope="module", autouse=True)
def _say_whose_answers(request):
    if not STUDENT:
        return
    try:
        there = [name for name in CHECKS if not missing(name)]
    except Wrong:
        return  # every test says it
    absent = [name for name in CHECKS if name not in there]
    line = f"checking {STUDENT}: {', '.join(there) or 'none of the exercises'}"
    line += f" - not yet there: {', '.join(absent)}" * bool(absent)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line}")


@pytest.mark.parametrize("name", CHECKS)
def test_exercise(name, tmp_path, request):
    if not STUDENT:
        pytest.skip(UNSET)
    try:
        check_student(name, tmp_path, asked=bool(request.config.option.keyword))
        return
    except Wrong as wrong:
        said = str(wrong)
    pytest.fail(said, pytrace=False)


def check_student(name, folder, *, asked):
    """Wrong, or a skip for what is not there yet, unless it was `asked` for by name."""
    module = load_student()
    if absent := missing(name):
        known = {n for names in NAMES.values() for n in names}
        others = [n for n in vars(module) if n not in known and not n.startswith("_")]
        close = difflib.get_close_matches(absent[0], others, n=1, cutoff=0.7)
        text = f"{STUDENT} has no `{'` and no `'.join(absent)}`"
        if close:
            raise Wrong(f"{text}, but `{close[0]}`: is the name right?")
        if asked:
            raise Wrong(text)
        pytest.skip(f"{text} yet")
    answer = [getattr(module, n) for n in NAMES[name]]
    if name == "kernel":
        path = Path(STUDENT_FILE).parent / str(answer[0])
        if not path.is_file():
            raise Wrong(f"KERNEL = {answer[0]!r}: there is no {path}")
        CHECKS[name](path, folder)
    else:
        CHECKS[name](answer if name == "coding" else answer[0])
