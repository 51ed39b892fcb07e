"""Guess the bug: the twelve are there, give nothing away, and are found where they are."""

import re

import pytest
from harness import mutants

from experiments import bug

NUMBERS = range(1, 13)


def test_twelve_bugs_of_the_table_of_mutants():
    assert len(bug.BUGS) == len({b.what for b in bug.BUGS}) == len(NUMBERS)
    for b in bug.BUGS:
        mutant = bug.mutant_of(b)
        assert mutant in mutants.MUTANTS
        assert not mutant.compiled  # both runs use the reference of the ops


@pytest.mark.parametrize("number", NUMBERS)
def test_a_guess_is_right_in_its_function_and_beside_its_line_only(number):
    mutant = bug.mutant_of(bug.BUGS[number - 1])
    line = bug.lines_of(mutant)[0]
    text = (bug.ROOT / mutant.file).read_text().splitlines()
    assert mutant.old.splitlines()[0].strip() in text[line - 1]
    assert bug.is_there(mutant, f"{mutant.file}:{line}")
    assert not bug.is_there(mutant, f"{mutant.file}:{line + 40}")
    assert not bug.is_there(mutant, f"README.md:{line}")
    names = bug.around(mutant)
    assert names
    for name in names:
        assert bug.is_there(mutant, name)
    assert not bug.is_there(mutant, "no_such_function")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hint_names_no_function_and_no_file(number):
    b = bug.BUGS[number - 1]
    mutant = bug.mutant_of(b)
    words = set(re.findall(r"\w+", b.hint))
    assert not words & set(bug.around(mutant))
    assert mutant.file not in b.hint
    assert mutant.what not in b.hint


def test_tell_names_line_repository_and_test(capsys):
    bug.main(["1", "--tell"])
    mutant = bug.mutant_of(bug.BUGS[0])
    said = capsys.readouterr().out
    assert f"{mutant.file}:{bug.lines_of(mutant)[0]} in " in said
    assert f"pytest tests/{mutant.tests} -k '{mutant.where}'" in said
    assert "Who had it: " in said


def test_guesses_are_answered(capsys):
    mutant = bug.mutant_of(bug.BUGS[0])
    name = list(bug.around(mutant))[-1]
    elsewhere = "crop" if mutant.file != "data.py" else "encode"
    for guess in (name, "no_such_function", elsewhere, f"{mutant.file}:1"):
        bug.main(["1", "--guess", guess])
    right, unknown, wrong, near = capsys.readouterr().out.splitlines()
    assert right.startswith("Yes")
    assert unknown == "There is no function or class no_such_function"
    assert wrong.startswith("Not there")
    assert near.startswith("In this file, but not there")
    with pytest.raises(ValueError, match="a function's name, or FILE.py:LINE"):
        bug.main(["1", "--guess", "nowhere.py:7"])
    with pytest.raises(ValueError, match="which bug"):
        bug.main(["--hint"])


@pytest.mark.slow
def test_both_runs_are_shown(tmp_path, monkeypatch, capsys):
    """Ten steps of two pictures; the page gives nothing away."""
    monkeypatch.setattr(bug, "STEPS", 10)
    monkeypatch.setattr(bug, "FLAGS", [*bug.FLAGS, "--iterations", "10", "--overfit", "2"])
    bug.main(["12", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"loss, steps 1 to 10 +\d+\.\d+ +\d+\.\d+\n", said)
    assert re.search(r"AP50 lost to missed +\d+\.\d +\d+\.\d\n", said)
    page = (tmp_path / "12.html").read_text()
    assert "bug-12" in page
    mutant = bug.mutant_of(bug.BUGS[11])
    assert mutant.what not in page
    assert mutant.new not in page
    assert (bug.ROOT / mutant.file).read_text().count(mutant.old) == 1  # planted in a copy only
