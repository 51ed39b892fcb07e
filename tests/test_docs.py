"""The pages name only what exists: files, sections, commands, flags, functions, tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for path in ROOT.rglob("*.md")
    if not {"build", "runs", "data"} & set(path.relative_to(ROOT).parts)
    and not str(path.relative_to(ROOT)).startswith(".")
)  # fmt: skip
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("experiments/*.py")]
CODE += ROOT.glob("tests/harness/*.py")
# Commands and flags on these pages are of commits that they name.
OF_OLDER_COMMITS = ("docs/results.md", "ops/README.md")
NOT_OURS = {  # torchrun, docker, git, pip, nvcc, compute-sanitizer
    "--standalone", "--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-backend",
    "--rdzv-endpoint", "--rdzv-id", "--shm-size", "--tool",
}  # fmt: skip


def words_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the sections of a page: "8. mAP" -> "8-map"."""
    text = re.sub(r"^```.*?^```", "", words_of(page), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def test_the_first_page_is_short():
    assert len(words_of(ROOT / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", words_of(page)):
        if re.match(r"[a-z]+:", target):
            continue  # another site: not looked at
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{name}: no {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors_of(there), f"{name}: {there.name} has no section #{anchor}"


@pytest.mark.parametrize("name", NAMES)
def test_tests_that_are_named_exist(name):
    for file, test in re.findall(r"(test_\w+\.py)::(test_\w+)", words_of(ROOT / name)):
        path = ROOT / "tests" / file
        assert f"def {test}(" in words_of(path), f"{name}: {file}::{test}"


def test_commands_that_are_named_exist():
    for page in [*PAGES, *CODE]:
        name, text = page.relative_to(ROOT).as_posix(), words_of(page)
        for module in re.findall(r"-m (experiments(?:\.[a-z]\w*)+)", text):
            path = ROOT / f"{module.replace('.', '/')}.py"
            assert path.exists(), f"{name}: -m {module}"
            assert "__main__" in words_of(path), f"{name}: -m {module} would do nothing"
        if name not in OF_OLDER_COMMITS:
            for file in re.findall(r"python ([\w/]+\.py)\b", text):
                assert (ROOT / file).exists(), f"{name}: python {file}"
                assert not file.startswith("experiments/"), f"{name}: {file} runs as -m"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_OLDER_COMMITS])
def test_flags_that_are_named_exist(name):
    flags = set(NOT_OURS)
    for path in CODE:
        flags |= set(re.findall(r'"(--[a-z][\w-]*)"', words_of(path)))
    flags |= {flag.replace("--", "--no-") for flag in flags}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", words_of(ROOT / name)):
        assert flag in flags, f"{name}: {flag}"


def test_functions_to_read_are_where_the_readme_says():
    """Every step of the walk: "Read `a` and `b` in [file](file), then `c` in [other](other)"."""
    sentences = re.findall(r"\bRead (`.+?\]\(.+?\))[.,;]?(?: then ([^.]+\]\(.+?\)))?",
                           words_of(ROOT / "README.md"), re.S)  # fmt: skip
    pairs = 0
    for part in (part for both in sentences for part in both if part):
        for names, file in re.findall(r"((?:`\w+`[^`\[]*)+)\[[^\]]+\]\(([\w/]+\.py)\)", part):
            text = words_of(ROOT / file)
            for name in re.findall(r"`(\w+)`", names):
                found = re.search(rf"^(def|class) {name}\b|^{name} = ", text, re.M)
                assert found, f"README: no {name} in {file}"
                pairs += 1
    assert pairs >= 15  # the search itself works
