"""The shape of the house: imports go down only, and the lesson stays short."""

import ast
from pathlib import Path

import pytest

from experiments.count_lines import LESSON, MAIN_PATH, count

ROOT = Path(__file__).parents[1]
# A file may import from its own floor's files on its left, and from lower floors.
FLOORS = (
    ("plumbing", "ops"),
    ("metrics", "data", "scratchdet"),
    ("detect",),
    ("eval",),
    ("train",),
)
UPWARDS = {  # the lines that reach up into experiments/: the rivals' networks, the final pages
    ("detect", "experiments.baselines"), ("train", "experiments.baselines"),
    ("train", "experiments.report"), ("train", "experiments.errors"),
    ("scratchdet", "experiments.baselines"),
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Modules of this repository that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    tops = {name for floor in FLOORS for name in floor} | {"experiments", "tests"}
    modules = {name for name in names if name.split(".")[0] in tops}
    return {m for m in modules if (ROOT / (m.replace(".", "/") + ".py")).exists() or "." not in m}


def floor_of(module: str) -> int:
    return next(n for n, floor in enumerate(FLOORS) if module.split(".")[0] in floor)


@pytest.mark.parametrize("name", ["metrics", "data", "scratchdet", "eval", "detect", "train"])
def test_lesson_files_import_downwards_only(name):
    for module in imports_of(ROOT / f"{name}.py"):
        if module.startswith("experiments"):
            assert module == "experiments" or (name, module) in UPWARDS, module
        else:
            assert floor_of(module) < floor_of(name), f"{name}.py imports {module}"


@pytest.mark.parametrize("folder", ["plumbing", "ops"])
def test_plumbing_and_ops_import_no_lesson_file(folder):
    lesson = {name for floor in FLOORS[1:] for name in floor} | {"experiments", "tests"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        above = {m for m in imports_of(path) if m.split(".")[0] in lesson}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_nothing_outside_tests_imports_tests():
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT).parts
        if inside[0] not in ("tests", "build", "runs", ".venv"):
            assert not {m for m in imports_of(path) if m.startswith("tests")}, path


def test_the_lesson_stays_short():
    counts = {name: count(ROOT / name) for name in MAIN_PATH}
    # Code is what a reader has to follow; comments may grow where they answer a question.
    assert sum(counts[name].code for name in LESSON) <= 1420
    assert sum(counts[name].lines for name in LESSON) <= 2150
    for name, c in counts.items():
        most = 66 if c.where == "main" else 60
        assert c.longest <= most, (name, c.where, c.longest)
        assert 0.28 <= c.words / c.code <= 1.2, (name, c.words / c.code)
    assert sum(c.code for c in counts.values()) > 1000  # the counting itself works
