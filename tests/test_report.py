"""The report page and the course's figures: complete, self-contained, drawn by the real code."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import drawings, figures, report
from metrics import Detections
from plumbing.shapes import SHAPE_CLASSES, draw_shapes
from scratchdet import Config, ScratchDet

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CLASSES = ("circle", "<b>cross</b>")


def make_run(folder: Path, *, steps=60, loss=lambda i: 10 / (i + 1), ended=True, **args) -> Path:
    """A run's folder as train.py leaves it."""
    (folder / "detections").mkdir(parents=True)
    Image.new("RGB", (64, 36)).save(folder / "detections" / "0000030.png")
    Image.new("RGB", (1600, 900)).save(folder / "detections" / "0000060.png")
    rows = [
        {"step": i, "loss": loss(i), "loc": 1.0, "conf": 2.0, "positives": 20.0,
         "grad_norm": float(i % 7), "lr": 0.05, "images_per_s": 8.0}
        for i in range(steps)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"args": {"lr": 0.05, "bn": "all", "backbone": "root-resnet18", "data": "shapes",
                      "iterations": steps, "batch_size": 50} | args, "config": {},
             "commit": "abc1234", "machine": "a <machine>", "torch": "2.13.0"}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    if ended:
        result = {"mAP": 0.4321, "metric": "voc07", "mAP_area": 0.41, "mAP_11point": 0.4321,
                  "cpu_minutes": steps / 10}  # fmt: skip
        result["per_class"] = {
            name: {"ap_11point": ap, "ap_area": ap}
            for name, ap in zip(CLASSES, (0.625, None), strict=True)
        }
        result["by_size"] = {"small": {"mAP_11point": 0.1, "mAP_area": 0.125}}
        result["curves"] = {CLASSES[0]: [[0.1, 0.7], [1.0, 0.5]], CLASSES[1]: [[], []]}
        (folder / "results.json").write_text(json.dumps(result))
    return folder


class Reader(HTMLParser):
    """Every tag and attribute; fails where tags do not close in order."""

    VOID = ("meta", "link", "img", "input", "rect", "path", "polyline", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + "\n"


@pytest.fixture
def html(tmp_path) -> str:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", bn="none", ended=False)]
    report.write(runs, tmp_path / "deep" / "report.html")
    return (tmp_path / "deep" / "report.html").read_text()


def test_page_holds_everything_and_needs_nothing(html):
    page = Reader(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "default-src 'none'" in html  # and the browser is told so
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert page.tags.count("polyline") == 2 * 8 + 1  # both runs' curves, one class with a curve
    assert sum(value.startswith("data:image/jpeg") for value in links) == 2
    for words in ("one", "two", "0.4321", "0.625", "0.125", "abc1234", "no, at step 60"):
        assert words in page.words, words
    assert html.count("prefers-color-scheme:dark") == html.count("@media print") == 1


def test_names_from_files_stay_text(html):
    assert "&lt;b&gt;cross&lt;/b&gt;" in html
    assert "<b>cross" not in html
    assert "a <machine>" not in html


def test_what_differs_is_marked(html):
    assert "<mark>bn</mark>" in html
    assert "<mark>lr</mark>" not in html


def test_diverged_run_is_drawn_and_leaves_the_scale_to_the_other(tmp_path):
    good = make_run(tmp_path / "good", loss=lambda i: 4.0)
    bad = make_run(tmp_path / "bad", loss=lambda i: 1e9 if i < 30 else float("nan"))
    page = report.page([report.read_run(good), report.read_run(bad)])
    assert not re.search(r"\b(nan|inf)\b", Reader(page).words)
    assert "not finite" in page
    curves = [report.series(report.read_run(run))["training loss"] for run in (good, bad)]
    assert [len(curve) for curve in curves] == [60, 30]
    assert figures.top_of(curves) == 8.0


def test_map_on_the_way_is_a_curve(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "mAP" not in report.series(report.read_run(folder))  # of the end alone: no curve
    with open(folder / "log.jsonl", "a") as log:  # --eval-every 30
        log.write(json.dumps({"step": 29, "mAP": 0.2, "cpu_minutes": 3.1}) + "\n")
    run = report.read_run(folder)
    assert report.series(run)["mAP"] == [(30, 0.2), (60, 0.4321)]
    assert "<figcaption>mAP</figcaption>" in report.page([run])
    assert figures.top_of([report.series(run)["mAP"]]) == 0.4321  # the end is in the frame


def test_a_column_holds_one_metric(tmp_path):
    """Runs of VOC2007 and of another set: under 11-point AP stands no mean of areas."""
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    result = json.loads((other / "results.json").read_text())
    result |= {"metric": "voc", "mAP": 0.777, "mAP_area": 0.777, "mAP_11point": 0.666}
    (other / "results.json").write_text(json.dumps(result))
    html = report.results([report.read_run(first), report.read_run(other)])
    assert "11-point AP, VOC2007" in html
    assert "0.666" in html
    assert "0.777" not in html


def test_rates_far_apart_stay_in_one_frame(tmp_path):
    """0.001 and 0.05, as BatchNorm's comparison has them: the larger is no curve that diverges."""
    runs = []
    for rate in (0.001, 0.05):
        folder = make_run(tmp_path / str(rate))
        log = (folder / "log.jsonl").read_text().replace('"lr": 0.05', f'"lr": {rate}')
        (folder / "log.jsonl").write_text(log)
        runs.append(report.read_run(folder))
    svg = re.search(r'aria-label="learning rate">.*?</svg>', report.page(runs))[0]
    points = re.findall(r'points="([^"]*)"', svg)
    heights = [float(point.split(",")[1]) for line in points for point in line.split()]
    assert min(heights) >= 12  # the frame's upper edge


def test_fluctuation_is_the_change_of_the_norm(tmp_path):
    """Norms 0 .. 6, 0 .. 6: five of six changes are 1, the drop is 6."""
    run = report.read_run(make_run(tmp_path / "run"))
    steps, values = zip(*report.series(run)["fluctuation of the gradient norm"], strict=True)
    assert steps == tuple(range(2, 61))
    assert values[:7] == (1, 1, 1, 1, 1, 1, 6)


def test_a_picture_of_ones_own_is_not_taken_for_the_last_sheet(tmp_path):
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (64, 36)).save(folder / "detections" / "dog.png")
    assert "step 60: ground truth" in report.page([report.read_run(folder)])


def test_a_run_of_one_step_has_a_page(tmp_path):
    run = make_run(tmp_path / "short", steps=1)
    report.write([run], tmp_path / "r.html")
    assert report.series(report.read_run(run))["training loss"] == [(1, 10.0)]


def test_axis_marks_are_round():
    assert figures.ticks(1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert figures.ticks(23) == [0, 5, 10, 15, 20, 25]
    for high in (0.05, 0.7, 3, 9.99, 10, 101, 12345):
        marks = figures.ticks(high)
        assert marks[-2] < high <= marks[-1] * (1 + 1e-9)
        assert 3 <= len(marks) <= 6


def test_log_axis_marks_are_round():
    assert figures.log_ticks(0.7, 9) == pytest.approx([0.5, 1, 2, 5, 10])
    assert figures.log_ticks(0.15, 80) == pytest.approx([0.1, 1, 10, 100])
    assert figures.log_ticks(1, 1)[0] <= 1 <= figures.log_ticks(1, 1)[-1]


def test_a_log_chart_puts_equal_ratios_at_equal_distances():
    parts = figures.chart({0: [(0, 1.0), (1, 10.0), (2, 100.0)]}, "key", log=True)
    line = next(part for part in parts if "<polyline" in part)
    assert 'fill="none"' in line
    points = re.search(r'points="([^"]*)"', line)[1].split()
    y = [float(point.split(",")[1]) for point in points][:3]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[2] == 12  # the top of the frame


def test_the_page_leads_with_what_was_measured(tmp_path):
    folder = make_run(tmp_path / "run")
    html = report.page([report.read_run(folder)])
    assert "Not looked at yet" in html
    kinds = {name: {"cost": 1.0 + i, "count": 9, "shown": i}
             for i, name in enumerate(report.ERRORS)}  # fmt: skip
    crop = {"image": "<7>", "said": "dog <.9>", "there": "cat", "words": "IoU", "jpeg": "AAAA"}
    errors = {
        "AP50": 50.0, "kinds": kinds, "objects": 40, "found": 30, "shown": 50, "right": 31,
        "classes": CLASSES, "threshold": [0.4, 0.5], "confusion": [[9, 2, 4], [0, 9, 1], [3, 3, 0]],
        "f1": [0.1] * 101, "pictures": {name: [crop] for name in report.ERRORS},
    }  # fmt: skip
    (folder / "errors.json").write_text(json.dumps(errors))
    html = report.page([report.read_run(folder)])
    page = Reader(html)
    order = [page.words.index(w) for w in ("mAP 43.2 %", "30 of 40", "Wrong classes", "All argum")]
    assert order == sorted(order)
    assert "Missed objects cost most: 6.0 points" in page.words
    assert "dog &lt;.9&gt;" in html
    assert html.count("data:image/jpeg;base64,AAAA") == 6
    cells = re.findall(r'<div class="cell( good)?" style="--share:(\d+)%">([^<]*)', html)
    shares = [f"{share} {n}{good}" for good, share, n in cells]
    assert shares == ["60 9 good", "13 2", "27 4", "0 ·", "90 9 good", "10 1", "50 3", "50 3"]
    counts = np.eye(31, dtype=int) * 5 + np.eye(31, k=1, dtype=int)
    many = errors | {"classes": [f"c{i}" for i in range(30)], "confusion": counts.tolist()}
    assert '<th scope="row">c0</th><td>c1</td><td>1</td>' in report.matrix(many)


def test_pictures_are_shrunk(tmp_path):
    run = make_run(tmp_path / "run")
    jpeg = report.shrunk(run / "detections" / "0000060.png")
    (tmp_path / "small.jpg").write_bytes(jpeg)
    with Image.open(tmp_path / "small.jpg") as picture:
        assert picture.size == (1200, 675)


def test_folder_that_is_no_run_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no log.jsonl and run.json there. Expected the folder"):
        report.read_run(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        report.read_run(run)
    (run / "log.jsonl").write_text("")
    (run / "results.json").unlink()
    with pytest.raises(ValueError, match="no step yet"):
        report.read_run(run)
    with pytest.raises(SystemExit):
        report.main([])
    assert "no RUN" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_opens_it_without_a_console_message(html, tmp_path):
    (tmp_path / "report.html").write_text(html)
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    ).split()
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/report.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "</main>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_figures_are_small_svg_without_links(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(drawings, "detections", lambda _: Image.new("RGB", (30, 20)))
    report.main(["--figures", str(run), "--out", str(tmp_path / "figures")])
    drawn = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert drawn == sorted([*(f"{n}.svg" for n in drawings.FIGURES), "bn.svg", "detections.jpg"])
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)
    for path in (tmp_path / "figures").iterdir():
        assert path.stat().st_size < 150_000
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            assert not re.search("href|script|<image", path.read_text())
    kept = Path(__file__).parents[1] / "docs" / "figures"
    for name in drawings.FIGURES:
        assert (kept / f"{name}.svg").is_file(), "python -m experiments.report --figures"


def test_detections_are_drawn_where_they_are(tmp_path, monkeypatch):
    shapes = draw_shapes(tmp_path, num_train=1, num_test=60)
    model = ScratchDet(Config(backbone="resnet18", width=0.1, classes=tuple(SHAPE_CLASSES)))
    args = {"data": "voc", "voc_root": str(shapes), "eval_sets": ["2007:test"]}
    saved = {"config": asdict(model.config), "model": model.state_dict(), "args": args}
    torch.save(saved, tmp_path / "last.pt")
    box, one = np.array([[100.0, 100, 200, 250], [0, 0, 299, 299]]), np.array([1, 2])
    answer = Detections(box, np.array([0.5, 0.49]), one)
    monkeypatch.setattr(drawings.evaluation, "run_detector", lambda _, r, **__: [answer] * len(r))
    pixels = np.asarray(drawings.detections(str(tmp_path), side=300).convert("RGB")).astype(int)
    assert pixels.shape == (606, 912, 3)
    orange = (abs(pixels - (245, 130, 0)) < 3).all(axis=2)
    for x, y in ((0, 0), (306, 0), (612, 306)):  # each of the six: its left and its right edge
        tile = orange[y : y + 300, x : x + 300]
        assert tile[120:240, 100].all()
        assert tile[120:240, 199:201].any(axis=1).all()
        assert not tile[260:].any()  # the one below .5 is not drawn


def test_figures_show_what_the_functions_say(monkeypatch):
    assert "8,732 priors in all" in drawings.priors()
    assert "ring 17, star 0, bar 0" in drawings.matching()
    assert "ring 17, star 1, bar 1" in drawings.matching()
    monkeypatch.setattr(drawings.ops, "match", lambda p, *_: torch.full((1, len(p)), -1))
    assert "ring 0, star 0, bar 0" in drawings.matching()
    monkeypatch.setattr(drawings.ops, "nms", lambda boxes, *_: torch.ones(len(boxes)) > 0)
    assert "after: 24 kept" in drawings.suppression()


def test_gradients_figure_names_its_runs(tmp_path):
    run = report.read_run(make_run(tmp_path / "run"))
    svg = figures.gradients({"BN <all>": run.log})
    assert "BN &lt;all&gt;" in svg


def test_budget_figure_has_a_line_for_each_run(tmp_path, capsys):
    runs = [make_run(tmp_path / f"run{steps}", steps=steps) for steps in (60, 20)]
    with open(runs[0] / "log.jsonl", "a") as log:  # --eval-every 30
        log.write(json.dumps({"step": 29, "mAP": 0.2, "cpu_minutes": 3.1}) + "\n")
    report.main(["--budget", str(tmp_path / "budget.svg"), *map(str, runs)])
    svg = (tmp_path / "budget.svg").read_text()
    assert svg.count("<circle") == 2 * (2 + 1)  # panels, points of each run
    assert ">6</text>" in svg  # CPU minutes
    assert ">3</text>" in svg  # thousands of images
    assert len(report.read_run(runs[0]).log) == 60
    (tmp_path / "old.json").write_text('{"gone <1>": [[1, 2, 0.1], [90, 70, 0.3]]}')
    report.main(["--budget", str(tmp_path / "more.svg"), str(runs[0]), f"{tmp_path}/old.json"])
    svg = (tmp_path / "more.svg").read_text()
    assert svg.count("<circle") == 2 * (2 + 2)
    assert svg.count("gone &lt;1&gt;") == 1  # in the legend
    assert ">60</text>" in svg  # of both axes
    low = '{"peer": [[1, 2, 0.001]], "another": [[1, 2, 0.002]], "ours": [[1, 2, 0.4]]}'
    (tmp_path / "old.json").write_text(low)  # the best of three is not outside the frame
    report.main(["--budget", str(tmp_path / "low.svg"), f"{tmp_path}/old.json"])
    heights = re.findall(r'<circle[^>]* cy="([^"]+)"', (tmp_path / "low.svg").read_text())
    assert len(heights) == 6
    assert all(float(y) >= 32 for y in heights)
    (tmp_path / "run20" / "results.json").unlink()
    with pytest.raises(ValueError, match="run20: nothing was measured"):
        report.main(["--budget", str(tmp_path / "budget.svg"), *map(str, runs)])
