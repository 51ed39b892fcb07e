"""Guess the bug: the twelve are there, give nothing away, and are found where they are."""

import json
import re

import numpy as np
import pytest
from harness import mutants
from PIL import Image

from experiments import bug
from metrics import Detections
from plumbing.files import Record

NUMBERS = range(1, 13)
YES = "Yes, there. --tell has the rest"


def mutant_number(number: int):
    return bug.mutant_of(bug.BUGS[number - 1])


def test_twelve_bugs_of_the_table_of_mutants():
    assert len(bug.BUGS) == len({b.what for b in bug.BUGS}) == len(NUMBERS)
    for b in bug.BUGS:
        mutant = bug.mutant_of(b)
        assert mutant in mutants.MUTANTS
        assert not mutant.compiled  # both runs use the reference of the ops


@pytest.mark.parametrize("number", NUMBERS)
def test_a_guess_is_right_in_its_function_and_beside_its_line_only(number):
    mutant = mutant_number(number)
    line = bug.lines_of(mutant)[0]
    text = (bug.ROOT / mutant.file).read_text().splitlines()
    assert mutant.old.splitlines()[0].strip() in text[line - 1]
    base = mutant.file.rpartition("/")[2]
    for file in (mutant.file, base):
        assert bug.answer(mutant, f"{file}:{line}") == YES
    assert bug.answer(mutant, f"{mutant.file}:{line + 60}") != YES
    assert bug.answer(mutant, f"README.md:{line}") == "Not there. --hint helps"
    assert bug.around(mutant)
    for function in bug.around(mutant):
        assert bug.answer(mutant, f"{mutant.file}:{function.head[0]}") == YES
        assert bug.answer(mutant, function.name) == YES
        assert bug.answer(mutant, f"{base.removesuffix('.py')}.{function.name}()") == YES


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hint_names_no_function_and_no_file(number):
    b = bug.BUGS[number - 1]
    mutant = bug.mutant_of(b)
    words = set(re.findall(r"\w+", b.hint))
    assert not words & {function.name for function in bug.around(mutant)}
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
    name = bug.around(mutant)[-1].name
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


def test_a_name_of_several_classes_is_asked_for():
    head = next(n for n in NUMBERS if "Head.forward" in names_around(n))
    assert bug.answer(mutant_number(head), "forward").startswith("Which forward? ")
    assert bug.answer(mutant_number(head), "Head.forward") == YES
    assert bug.answer(mutant_number(head), "ScratchDet.forward").startswith("In this file, but")
    elsewhere = next(n for n in NUMBERS if "match" in names_around(n))
    assert bug.answer(mutant_number(elsewhere), "forward").startswith("Which forward? ")


def names_around(number: int) -> list[str]:
    return [function.name for function in bug.around(mutant_number(number))]


def test_neighbours_in_the_calls_are_near():
    number = next(n for n in NUMBERS if "match" in names_around(n))
    mutant = mutant_number(number)
    assert bug.answer(mutant, "assign_targets").startswith("Near: this calls the function")
    assert bug.answer(mutant, "pairwise_iou").startswith("Near: the function with the bug calls")
    assert bug.answer(mutant, "flip") == "Not there. --hint helps"
    line = next(f for f in bug.around(mutant) if f.name == "match").lines[20]
    assert bug.answer(mutant, f"reference.py:{line}").startswith("Near: it is in this function")


def write_run(folder, *, loss=2.0, **results):
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    row = {"step": 0, "loss": loss, "loc": loss / 2, "conf": loss / 2, "positives": 40.0}
    other = row | {"positives": 37.0}
    (folder / "log.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n" * 6)
    if results:
        (folder / "results.json").write_text(json.dumps(results))


def test_the_first_step_and_the_ratio_are_shown(tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "bug-1"
    write_run(right, mAP_11point=0.5, by_size={"small": {"mAP_11point": None}})
    write_run(wrong, loss=84.0)
    kinds = {"missed": {"cost": 15.3}}  # in points, as errors.py counts
    found = {"objects": 19, "found": 15, "shown": 15, "right": 15, "kinds": kinds}
    (wrong / "errors.json").write_text(json.dumps(found))
    (right / "errors.json").write_text(json.dumps(found | {"kinds": {"missed": {"cost": 0}}}))
    rows = {name: cells for name, *cells in bug.compare(right, wrong)}
    assert rows["loss, step 1"] == ["2", "84", "42"]
    assert rows["positives per image"] == ["38.5", "38.5", "1"]
    assert rows["positives, lowest step"] == ["37", "37", "1"]
    assert rows["positives, highest step"] == ["40", "40", "1"]
    assert rows["mAP"] == ["0.5", "-", "-"]
    assert rows["mAP, small objects"] == ["-", "-", "-"]
    assert rows["AP50 lost to missed"] == ["0", "0.153", "-"]  # in mAP's unit


def test_the_pictures_show_what_the_table_counts(tmp_path):
    """From each class's own threshold up; of a run without results from .3."""
    run = tmp_path / "run"
    write_run(run, threshold=0.5, per_class={"a": {"threshold": 0.7}})
    assert bug.shown_from(run, ("a", "b")).tolist() == [0.7, 0.5, 0.3]
    write_run(tmp_path / "failed")
    assert bug.shown_from(tmp_path / "failed", ("a", "b")).tolist() == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("many", "words"), [(10, []), (12, ["+ 2 more"])])
def test_of_a_crowd_the_best_ten_are_drawn(tmp_path, monkeypatch, many, words):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    none = np.zeros((0, 4))
    record = Record("a", tmp_path / "a.png", (60, 40), none, np.zeros(0, int), np.zeros(0, bool),
                    np.zeros(0))  # fmt: skip
    scores = np.linspace(0.9, 0.1, many + 3)  # the last three are below the threshold
    found = Detections(np.tile([5.0, 5, 30, 30], (many + 3, 1)), scores, np.zeros(many + 3, int))
    threshold = np.array([0.9, (scores[many - 1] + scores[many]) / 2])  # of a, of label 0
    drawn, written = [], []

    def draw(image, *rest, crowded):
        assert not crowded  # names and scores in the pictures of both runs, no legend
        drawn.append(rest)
        return image

    monkeypatch.setattr(bug, "draw_boxes", draw)
    monkeypatch.setattr(bug, "write_on", lambda image, text, size: written.append(text))
    bug.picture(record, found, ("a",), threshold)
    (_, _, truth, _), (boxes, labels, best, names) = drawn
    assert truth is None
    assert best.tolist() == scores[:10].tolist()
    assert boxes[0].tolist() == [50, 50, 300, 300]  # ten times as large
    assert {names[label - 1] for label in labels} == {"label 0"}
    assert written == words


@pytest.mark.slow
def test_an_error_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bug, "STEPS", 10)
    monkeypatch.setattr(bug, "FLAGS", [*bug.FLAGS, "--iterations", "10"])
    bug.main(["3", "--out", str(tmp_path)])
    assert "bug-3 ended with error: " in (said := capsys.readouterr().out)
    assert "label 0 is not in 1..6" in said
    page = (tmp_path / "3.html").read_text()
    assert "label 0 is not in 1..6" in page
    assert page.count("<figure class=") >= 2 * bug.PICTURES


@pytest.mark.slow
def test_both_runs_are_shown(tmp_path, monkeypatch, capsys):
    """Ten steps of two pictures; the page gives nothing away."""
    monkeypatch.setattr(bug, "STEPS", 10)
    monkeypatch.setattr(bug, "FLAGS", [*bug.FLAGS, "--iterations", "10", "--overfit", "2"])
    bug.main(["12", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"loss, steps 1 to 10( +\d+(\.\d+)?){3}\n", said)
    assert re.search(r"AP50 lost to missed( +(\d+(\.\d+)?|-)){3}\n", said)
    page = (tmp_path / "12.html").read_text()
    assert "bug-12" in page
    mutant = bug.mutant_of(bug.BUGS[11])
    assert mutant.what not in page
    assert mutant.new not in page
    assert (bug.ROOT / mutant.file).read_text().count(mutant.old) == 1  # planted in a copy only
