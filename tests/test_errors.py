"""experiments/errors.py and compare.py: why a detector errs, and what changed.

`python tests/test_errors.py` recomputes EXPECTED (it needs tidecv 1.0.1).
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import compare, errors  # noqa: E402
from experiments.eval_bench import by_tidecv, found, random_case, record  # noqa: E402
from metrics import Detections, mean, summarise, voc_ap, voc_match  # noqa: E402
from plumbing.shapes import SHAPE_CLASSES, draw_shapes  # noqa: E402
from plumbing.voc import read_voc  # noqa: E402
from scratchdet import Config, ScratchDet  # noqa: E402

CLASSES = tuple(SHAPE_CLASSES)
ORACLES = os.environ.get("SCRATCHDET_ORACLES")
A, B, FAR = [11, 11, 50, 50], [101, 101, 150, 150], [201, 201, 240, 240]


def case(seed):
    """Records, detections, number of classes: with ties, crowds, and more than 100 per image."""
    images, guesses, crowd = 4 + seed % 20, (10, 60, 250)[seed % 3], 0.1 * (seed % 4)
    made = random_case(seed, images, 1 + seed % 5, guesses=guesses, crowd=crowd)
    return *made, 1 + seed % 5 + seed % 2


# As printed by `python tests/test_errors.py`: AP50, the costs in the order of KINDS, the counts.
# fmt: off
EXPECTED = {
    0: ([24.29522509, 0.0, 10.88837091, 0.0, 0.47422328, 15.45875031, 18.23655888],
        [0, 2, 0, 4, 17, 7]),
    1: ([33.45093987, 0, 0, 0, 1.03996181, 16.84553516, 4.02312669],
        [0, 11, 10, 42, 79, 4]),
    2: ([23.15278048, 0.0, 0.0, 0.02428814, 0.4572084, 52.05741911, 0.0],
        [0, 1, 8, 111, 264, 0]),
    3: ([71.78217822, 0.0, 0.0, 0.0, 0.92821782, 3.6509901, 20.72607261],
        [0, 0, 0, 8, 15, 3]),
    4: ([34.01497448, 0.0, 0.360036, 3.47069401, 2.63678996, 13.66245755, 11.41608757],
        [0, 2, 16, 60, 74, 14]),
    5: ([27.01843038, 0, 0, 0, 0, 13.39541945, 0],
        [0, 88, 0, 217, 399, 0]),
    6: ([10.75907591, 0.0, 0.0, 0.27345592, 1.1203752, 17.45874587, 17.44726647],
        [0, 0, 1, 6, 39, 17]),
    7: ([20.25415016, 0, 0, 0, 1.77211899, 22.68933812, 0.45440018],
        [1, 9, 12, 89, 171, 4]),
    8: ([24.49247095, 0.00162944, 0.17257913, 1.75176869, 3.63116698, 18.17117607, 3.72303494],
        [1, 14, 51, 350, 437, 5]),
    9: ([12.97249725, 0, 3.18104668, 0, 0.1210121, 9.39619676, 9.00670067],
        [0, 6, 1, 5, 34, 28]),
    10: ([27.03963153, 0.0, 4.66851056, 0.0, 3.05824734, 24.08622128, 0.81313055],
        [0, 34, 0, 122, 273, 2]),
    11: ([23.37897542, 0, 0, 0, 0, 16.89693218, 0],
        [0, 68, 27, 279, 825, 0]),
}
# fmt: on


@pytest.mark.parametrize("seed", EXPECTED)
def test_frozen_numbers_of_tidecv(seed):
    verdicts = errors.judge(*case(seed))
    values = [*errors.costs(verdicts).values()]
    np.testing.assert_allclose(values, EXPECTED[seed][0], rtol=0, atol=1e-6)
    assert [*errors.counts(verdicts).values()] == EXPECTED[seed][1]


@pytest.mark.slow
@pytest.mark.skipif(not ORACLES, reason="needs SCRATCHDET_ORACLES, the folder with voc07-test/")
def test_real_detections_as_tidecv_counts_them():
    """Tiny YOLO on VOC2007 test; the numbers are tidecv 1.0.1's."""
    from test_metrics import voc07_test

    records, detections, _ = voc07_test(Path(ORACLES, "voc07-test"))
    start = time.process_time()
    verdicts = errors.judge(records, detections, 20)
    values = errors.costs(verdicts)
    print(f"254,590 detections in {time.process_time() - start:.2f} CPU s")
    expected = [54.066723064454024, 3.395472859412564, 11.408908694646584, 1.3698039450121087,
                0.5082427607579234, 3.0091084753294837, 1.6029060390219243]  # fmt: skip
    np.testing.assert_allclose([*values.values()], expected, rtol=0, atol=1e-6)
    assert [*errors.counts(verdicts).values()] == [5584, 46401, 32864, 3315, 146079, 365]


@pytest.mark.parametrize("seed", range(100, 130))
def test_equals_tidecv(seed):
    pytest.importorskip("tidecv")
    records, detections, num_classes = case(seed)
    costs, counts, _ = by_tidecv(records, detections)
    verdicts = errors.judge(records, detections, num_classes)
    got = errors.costs(verdicts)
    np.testing.assert_allclose([got[k] for k in costs], [*costs.values()], rtol=0, atol=1e-6)
    assert errors.counts(verdicts) == counts


def one_of_each():
    """An image with a detection of every kind; two classes."""
    truth = record([A, B, FAR, [11, 201, 50, 240]], [1, 1, 2, 2])
    boxes = [A, A, [101, 101, 150, 130], FAR, [211, 211, 250, 260], [260, 11, 290, 40], B]
    scores, labels = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [1, 1, 1, 1, 1, 2, 1]
    boxes[2] = [101, 101, 150, 121]  # IoU .4 with B, which a later detection finds
    return [truth], [found(boxes, scores, labels)]


def test_kinds_by_hand():
    records, detections = one_of_each()
    v = errors.judge(records, detections, 2)
    by_row = dict(zip(v.guesses.row.tolist(), v.kind.tolist(), strict=True))
    assert by_row == {
        0: errors.RIGHT, 1: errors.DUPLICATE, 2: errors.BOX, 3: errors.CLASS,
        4: errors.BOTH, 5: errors.BACKGROUND, 6: errors.RIGHT,
    }  # fmt: skip
    assert v.missed.tolist() == [False, False, False, True]  # the third could be mended
    assert v.mended.sum() == 1
    assert errors.counts(v) == dict.fromkeys(errors.KINDS, 1)
    costs = errors.costs(v)
    # class 1 finds its 2 objects at ranks 1 and 6; class 2 finds none of its 2
    assert costs["AP50"] == pytest.approx(100 * (51 * 1 + 50 * 2 / 6) / 101 / 2)
    # mended, FAR is found at .6 of class 2, before its only wrong one: AP 51 of 101
    after = ((51 * 1 + 50 * 2 / 5) / 101 + 51 / 101) / 2
    assert costs["classification"] == pytest.approx(100 * after - costs["AP50"])


def test_a_difficult_object_hides_what_lies_in_it():
    truth = record([A, B], difficult=[0, 1])
    v = errors.judge([truth], [found([A, B, [105, 105, 120, 120], FAR], [0.9, 0.8, 0.7, 0.6])], 1)
    assert v.ignored.tolist() == [False, True, True, False]
    assert errors.costs(v)["AP50"] == pytest.approx(100)
    assert not v.missed.any()


def test_nothing_at_all():
    for records, detections in (
        ([record([])], [found([A], [0.5])]),
        ([record([A])], [found([], [])]),
        ([record([])], [found([], [])]),
    ):
        v = errors.judge(records, detections, 1)
        costs = errors.costs(v)
        assert errors.counts(v)["background"] == len(detections[0].scores)
        assert errors.counts(v)["missed"] == len(records[0].labels)
        assert costs["AP50"] == 0 or np.isnan(costs["AP50"])


def test_confusion_counts_every_object_and_every_detection_once():
    records, detections = one_of_each()
    v = errors.judge(records, detections, 2)
    matrix = errors.confusion(v, np.array([0.35, 0.35]))  # the last detection is not shown
    assert matrix.tolist() == [
        [1, 0, 1],  # A found; B: nothing
        [1, 0, 1],  # FAR shown as class 1; the other one: nothing
        [3, 1, 0],  # duplicate, wrong box, both; background
    ]
    for seed in range(12):
        records, detections, num_classes = case(seed)
        v = errors.judge(records, detections, num_classes)
        threshold = np.linspace(0.2, 0.7, num_classes)
        matrix, shown = errors.confusion(v, threshold), errors.is_shown(v, threshold)
        real = v.objects.label[~v.objects.difficult]
        objects = np.bincount(real, minlength=num_classes + 1)[1:]
        assert matrix[:-1].sum(axis=1).tolist() == objects.tolist()
        columns = np.bincount(v.guesses.label[shown], minlength=num_classes + 1)[1:]
        assert matrix[:, :-1].sum(axis=0).tolist() == columns.tolist()
        assert np.trace(matrix[:-1, :-1]) == errors.is_found(v, threshold).sum()


def test_almost_is_the_nearest_detection():
    v = errors.judge([record([A, B])], [found([[11, 11, 50, 30], A, FAR], [0.9, 0.2, 0.8])], 1)
    value, row = errors.almost(v)
    assert v.guesses.row[row[0]] == 0  # .9 * 19 / 39 is more than .2 * 1
    np.testing.assert_allclose(value, [0.9 * 19 / 39, 0])
    assert row[1] == -1


def test_large_evaluations_take_seconds():
    records, detections = random_case(0, images=500, classes=20, guesses=400)
    start = time.process_time()
    verdicts = errors.judge(records, detections, 20)
    errors.costs(verdicts)
    seconds = time.process_time() - start
    print(f"{len(verdicts.kind):,} detections: {seconds:.2f} CPU s")
    assert seconds < 3  # about .3 where this was written


# ------------------------------------------------------------------------- shapes, and their page


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Root of a VOC tree with 24 test images of shapes."""
    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_test=24)


@pytest.fixture(scope="module")
def records(shapes):
    return read_voc(shapes, ["2007:test"], CLASSES)[0]


def guess(records, seed=0, misses=0.2, noise=0.03):
    """A fair detector: finds most objects, not exactly, and some that are not there."""
    rng = np.random.default_rng(seed)
    answers = []
    for r in records:
        g = len(r.labels)
        side = np.tile(r.boxes_xyxy[:, 2:] - r.boxes_xyxy[:, :2], 2)
        boxes = r.boxes_xyxy + noise * side * rng.standard_normal((g, 4))
        keep, scores = rng.random(g) >= misses, 0.7 + 0.3 * rng.random(g)
        labels = np.where(rng.random(g) < 0.1, rng.integers(1, len(CLASSES) + 1, g), r.labels)
        wrong = rng.random((2, 2)) * 200
        answers.append(Detections(
            np.concatenate([boxes[keep], np.c_[wrong, wrong + 40]]),
            np.concatenate([scores[keep], 0.3 * rng.random(2)]),
            np.concatenate([labels[keep], rng.integers(1, len(CLASSES) + 1, 2)]),
        ))  # fmt: skip
    return answers


def test_suspects_find_planted_label_errors(records):
    """A detector that knows the true labels nearly, and wrong labels of four sorts."""
    labelled, places = errors.plant(records, 20, len(CLASSES))
    changed = [
        i
        for i, (a, b) in enumerate(zip(records, labelled, strict=True))
        if a.labels.tolist() != b.labels.tolist() or (a.boxes_xyxy != b.boxes_xyxy).any()
    ]
    assert changed == sorted(places)  # fmt: skip
    assert len(changed) == 20
    assert all(len(r.difficult) == len(r.area) == len(r.labels) for r in labelled)
    rng = np.random.default_rng(1)
    truth = [Detections(r.boxes_xyxy + rng.standard_normal(r.boxes_xyxy.shape),
                        0.6 + 0.4 * rng.random(len(r.labels)), r.labels)
             for r in records]  # fmt: skip
    v = errors.judge(labelled, truth, len(CLASSES))
    rows = errors.first_suspects(v, 24)
    assert errors.were_planted(v, [row[2:] for row in rows], places) >= 18
    assert {row[1] for row in rows} == {
        "no label?", "another class?", "another box?", "nothing there?"
    }  # fmt: skip
    clean = errors.judge(records, truth, len(CLASSES))
    assert not errors.suspects(clean)


def make_run(folder, classes=CLASSES) -> Path:
    """A run's folder with an untrained network."""
    folder.mkdir()
    torch.manual_seed(0)
    model = ScratchDet(Config(backbone="resnet18", width=0.1, classes=classes))
    saved = {"config": asdict(model.config), "model": model.state_dict(), "args": {}}
    torch.save(saved | {"step": 1, "commit": "none"}, folder / "last.pt")
    row = {"step": 0, "loss": 1.0, "loc": 1.0, "conf": 2.0, "positives": 20.0, "grad_norm": 1.0,
           "lr": 0.05, "images_per_s": 8.0}  # fmt: skip
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    about = {"args": {"lr": 0.05, "iterations": 1}, "config": {}}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_command_writes_errors_and_suspects(shapes, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors.evaluation, "run_detector", lambda *_, **__: guess(records))
    run = make_run(tmp_path / "run")
    flags = ["--voc-root", str(shapes), "--workers", "0", "--suspects", "5", "--plant", "3"]
    said = errors.main([str(run), *flags])
    text = capsys.readouterr().out
    assert "of the 3 labels spoilt on purpose are among the first 5" in text
    assert all(kind in text for kind in errors.KINDS)
    written = json.loads((run / "errors.json").read_text())
    assert written == json.loads(json.dumps(said))
    assert len(written["pictures"]["missed"]) == 6
    assert len(written["f1"]) == 101
    page = (run / "report.html").read_text()
    assert "Missed objects" in page
    assert "What is taken for what" in page
    assert page.count("data:image/jpeg") == sum(map(len, written["pictures"].values()))
    suspects = (run / "suspects.html").read_text()
    assert suspects.count("<figure>") == 5
    assert text.count("?") >= 5
    with pytest.raises(ValueError, match="--suspects -1: expected 0 or more"):
        errors.main([str(run), "--suspects", "-1"])


def test_crops_show_the_box_where_it_is(tmp_path):
    image = Image.new("RGB", (300, 200), (90, 90, 90))
    image.paste((255, 255, 255), (100, 50, 140, 90))
    image.save(tmp_path / "1.png")
    one = record([[100, 50, 140, 90]], size=(300, 200))._replace(path=tmp_path / "1.png")
    jpeg = errors.base64.b64decode(errors.crop(one, [[100, 50, 140, 90]], [], side=144))
    pixels = np.asarray(Image.open(errors.io.BytesIO(jpeg))).astype(int)
    assert pixels.shape == (144, 144, 3)  # 72 x 72 pixels around the box, twice as large
    white = (pixels > 220).all(axis=2)
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    assert abs(rows.mean() - 72) < 3
    assert abs(columns.mean() - 72) < 3
    assert 60 < len(rows) < 82
    beyond = errors.crop(one, [[290, 190, 340, 260]], [[-9, -9, 5, 5]])
    assert errors.base64.b64decode(beyond)


# ------------------------------------------------------------------------------ two detectors


def detector(records, answers):
    v = errors.judge(records, answers, len(CLASSES))
    threshold = errors.thresholds(summarise(records, answers, CLASSES), CLASSES)
    return compare.Detector(voc_match(records, answers, len(CLASSES)), v, threshold)


def test_bootstrap_of_a_perfect_and_a_worse_detector(records):
    """The perfect one is at its ceiling in every draw; the other misses the objects of a few."""
    whole = [found(r.boxes_xyxy, np.ones(len(r.labels)), r.labels) for r in records]
    misses = [found([], []) if i % 4 == 0 else one for i, one in enumerate(whole)]
    pair = [detector(records, one) for one in (whole, misses)]
    values = compare.bootstrap(pair, 100, "voc")
    assert {name: table.shape for name, table in values.items()} == dict.fromkeys(
        [*compare.PARTS, "AP50", *errors.KINDS], (101, 2)
    )
    np.testing.assert_allclose(values["all"][:, 0], 100)
    expected = voc_ap(records, misses, len(CLASSES))
    assert values["all"][0, 1] == pytest.approx(100 * mean(expected["area"]))
    large = 100 * expected["by_size"]["large"][1]
    assert values["large"][0, 1] == pytest.approx(large, nan_ok=True)
    costs = errors.costs(pair[1].verdicts)
    assert [values[name][0, 1] for name in costs] == pytest.approx([*costs.values()])
    drawn = values["all"][1:, 1]
    assert 60 < drawn.mean() < 90  # three quarters are found
    assert 2 < drawn.std() < 30
    assert (drawn < 100).mean() > 0.9
    np.testing.assert_allclose(values["missed"][1:, 0], 0)


def test_costs_of_images_that_count_several_times():
    records, detections, num_classes = case(4)  # no ties: their order is that of the images
    times = np.random.default_rng(0).integers(0, 4, len(records))
    again = np.repeat(np.arange(len(records)), times)
    twice = [[rows[i] for i in again] for rows in (records, detections)]
    expected = errors.costs(errors.judge(*twice, num_classes))
    got = errors.costs(errors.judge(records, detections, num_classes), times)
    assert got == pytest.approx(expected)


def test_the_sentence():
    counts = {"small": (100, 30, 5), "medium": (50, 4, 2), "large": (10, 0, 1), "cow": (9, 1, 1)}
    values = {"all": np.array([[60.0, 62.0], [60, 63], [61, 60], [58, 60], [60, 64]])}
    words = compare.sentence(values, counts, (20, 12, "cow and sheep"))
    assert words == (
        "B finds 26 objects more of 160, most of them small (34 won, 8 lost); it confuses cow and "
        "sheep less (12 times instead of 20); its mAP is 2.0 points higher, and would be so on "
        "other images in 75 of 100 draws."
    )
    mirrored = {"all": values["all"][:, ::-1]}
    counts = {size: (n, lost, won) for size, (n, won, lost) in counts.items()}
    words = compare.sentence(mirrored, counts, (3, 4, "cow and sheep"))
    assert words == (
        "B finds 26 objects fewer of 160, most of them small (8 won, 34 lost); its mAP is 2.0 "
        "points lower, and would be so on other images in 75 of 100 draws."
    )


def test_command_compares(shapes, records, tmp_path, monkeypatch, capsys):
    """The second run counts its classes backwards, and finds more."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", CLASSES[::-1])]
    better = [one._replace(labels=len(CLASSES) + 1 - one.labels)
              for one in guess(records, misses=0.05)]  # fmt: skip
    answers = {CLASSES: guess(records), CLASSES[::-1]: better}
    monkeypatch.setattr(errors.evaluation, "run_detector",
                        lambda model, *_, **__: answers[model.config.classes])  # fmt: skip
    words = [*map(str, runs), "--voc-root", str(shapes), "--workers", "0", "--draws", "20"]
    values = compare.main([*words, "--out", str(tmp_path / "page.html")])
    text = capsys.readouterr().out
    assert "24 images, 20 draws [95 % of them]; mAP: 11-point" in text
    assert "B finds" in text
    assert "B - A" in text
    assert values["all"][0, 1] > values["all"][0, 0] + 5
    assert values["missed"][0, 1] < values["missed"][0, 0]
    page = (tmp_path / "page.html").read_text()
    assert page.index("What changed") < page.index("Result")
    assert "A: nothing" in page
    assert "Won: B finds it, A does not" in page
    compare.main([*(str(run / "last.pt") for run in runs), *words[2:],
                  "--out", str(tmp_path / "bare.html")])  # fmt: skip
    assert "Training" not in (tmp_path / "bare.html").read_text()
    with pytest.raises(ValueError, match="--draws 0: expected 1 or more"):
        compare.main([*words[:-1], "0"])
    with pytest.raises(ValueError, match="compares two runs, not 1"):
        compare.main([*words[:1], *words[2:], "--out", "x.html"])


if __name__ == "__main__":
    print("EXPECTED = {")
    for seed in range(12):
        costs, counts, _ = by_tidecv(*case(seed)[:2])
        values = [round(costs[name], 8) for name in ("AP50", *errors.KINDS)]
        print(f"    {seed}: ({values},\n        {[counts[name] for name in errors.KINDS]}),")
    print("}")
