"""experiments/paper.py: its rows are commands that train.py and eval.py take; runner; verdicts."""

import dataclasses
import json
import os
import signal
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import eval as evaluation
import train
from experiments import figures, paper
from scratchdet import Config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def args(tmp_path):
    """As of `table1 --scale laptop`, with all roots given and every folder in tmp_path."""
    words = ["table1", "--voc-root", "V", "--coco-root", "C", "--weights", "W"]
    return paper.parse_args(
        [*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "d")]
    )


def finish(folder, mean_ap, *, losses=(3.0, 2.0), iterations=2):
    """A run folder as train.py leaves it."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({
        "mAP": mean_ap, "mAP_11point": mean_ap, "by_size": {"small": {"mAP_11point": mean_ap / 2}}
    }))  # fmt: skip
    rows = [{"step": i, "loss": x, "images_per_s": 7.0} for i, x in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"commit": "abc", "torch": "2.0", "machine": "one core"}
    about["args"] = {"iterations": iterations, "batch_size": 16, "data": "voc", "seed": 0}
    about["args"] |= {"train_sets": ["2007:train"], "eval_sets": ["2007:val"]}
    about["args"] |= {"voc_root": "/private"}
    (folder / "run.json").write_text(json.dumps(about))


# ------------------------------------------------------------------------------ the rows


def test_every_row_of_the_tables_is_there():
    tables = {name: table.rows for name, table in paper.TABLES.items()}
    assert [len(tables[f"table{i}"]) for i in (1, 2, 3, 4, 5)] == [21, 10, 7, 3, 4]
    assert [len(tables[name]) for name in ("figure1", "figure3", "time")] == [3, 4, 2]
    numbers = [row.paper for row in tables["table1"]]
    assert numbers.count("NaN") == 4  # three from scratch, one pretrained
    assert {"67.6", "71.0", "75.6", "78.7", "77.1", "75.5"} < set(numbers)
    text = " ".join(row.paper for rows in tables.values() for row in rows)
    numbers = "73.1 78.5 80.4 84.1 83.6 32.7 39.1 84.0 82.1 86.3 77.7 71.5 75.3 84.6"
    for number in f"{numbers} 76.8 77.2 77.1 75.4 28.0".split():  # SSD300 and SSD321 as well
        assert number in text


def test_bn_and_learning_rate_of_table_1_are_where_the_paper_has_them():
    cells = {(r.what, r.paper) for r in paper.TABLES["table1"].rows}
    assert ("BN head, learning rate 0.01", "75.6") in cells
    assert ("BN all, learning rate 0.05", "78.7") in cells
    assert ("BN backbone, learning rate 0.05", "78.0") in cells
    assert ("BN all, learning rate 0.01, vgg16_bn.pth of ImageNet, batch 32", "78.2") in cells
    assert ("footnote 1: BN head, vgg16.pth of ImageNet, batch 128", "76.8") in cells


@pytest.mark.parametrize("scale", paper.SCALES)
def test_every_command_is_one_that_the_programs_take(scale, args):
    for name, table in paper.TABLES.items():
        for row in paper.runs_of(table, scale):
            words = paper.command(row, scale, 1, args)
            assert words[1] == ("eval.py" if row.test else "train.py")
            if row.test:
                parsed = evaluation.parse_args(words[2:])
                assert parsed.multi_scale
                assert bool(parsed.json) != bool(parsed.comp4)
                continue
            flags = train.parse_args(words[2:])
            assert flags.resume
            assert flags.seed == 1
            assert flags.data == ("coco" if row.needs == "coco" else "voc")
            names = {field.name for field in dataclasses.fields(Config)} - {"classes"}
            Config.from_dict({k: v for k, v in vars(flags).items() if k in names})
            assert bool(flags.init) == bool(row.start)
            if scale == "laptop":
                assert flags.width <= 0.25, (name, row.key)
                assert "--batch-size" in words, (name, row.key)  # --images is divided by it
            else:
                assert flags.width == 1
                assert (flags.bf16 is False) == (scale == "full")  # the paper's precision
                # section 4.1: pre-trained SSD at batch 32, for as many iterations; but footnote 1
                small = row.key.startswith("pretrained") and "batch128" not in row.key
                assert flags.batch_size == (32 if small else 128)
                assert not small or flags.iterations == 120_000


def test_the_full_scale_is_the_papers_schedule(args):
    def at(key):
        return train.parse_args(paper.command(paper.row_of(key), "full", 0, args)[2:])

    vgg = at("bn-head-0.01")
    assert (vgg.backbone, vgg.bn, vgg.lr, vgg.iterations) == ("vgg16", "head", 0.01, 120_000)
    assert (vgg.warmup, vgg.schedule, vgg.augment) == (0, "steps", "ssd")
    root = at("stride1-3x3-3")
    assert (root.lr, root.iterations, root.drops) == (0.05, 100_000, (0.45, 0.75, 0.95))
    assert at("voc12").train_sets == ["2007:trainval", "2007:test", "2012:trainval"]
    assert (at("coco").iterations, at("coco").priors) == (320_000, "coco")
    dsod = at("dsod300")
    assert (dsod.lr, dsod.drops, dsod.backbone) == (0.1, [0.2, 0.4, 0.6, 0.8], "dsod300")
    assert dsod.head_bn_eps == 1e-3
    ssd = at("pretrained-ssd300")
    assert (ssd.bn, ssd.l2_norm, ssd.lr, ssd.drops) == ("none", True, 0.001, (80 / 120, 100 / 120))
    both = [row.key for name in ("table2", "figure3") for row in paper.TABLES[name].rows]
    assert {at(key).extras for key in both} == {"conv"}  # as the only released 18-layer network
    assert at("voc07").extras == "residual"  # section 3.2


def test_first_weights_come_from_the_converter(args):
    """What the row trains from is what experiments.convert writes."""
    for key, kind, source in (
        ("pretrained-bn-all-0.05", "vgg16", "W/vgg16_bn.pth"),
        ("coco-voc07", "detector", f"{args.runs}/full/coco/seed1/last.pt"),
    ):
        row = paper.row_of(key)
        words = paper.conversion(row, "full", 1, args)
        assert words[:5] == ["python", "-m", "experiments.convert", kind, source]
        assert train.parse_args(paper.command(row, "full", 1, args)[2:]).init == words[-1]


def test_a_start_that_cannot_be_made_is_said(args, tmp_path):
    args.weights = str(tmp_path)
    words = paper.conversion(paper.row_of("pretrained-ssd300"), "full", 0, args)
    assert "vgg16.pth: no such file" in paper.convert(words)
    Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
    Path(words[-1]).touch()
    assert paper.convert(words) is None  # it is there already


def test_rows_with_one_key_are_one_run():
    seen = {}
    for table in paper.TABLES.values():
        for row in table.rows:
            if row.key and not row.test:
                assert seen.setdefault(row.key, (row.flags, row.laptop)) == (row.flags, row.laptop)
        assert table.pace in {r.key for t in paper.TABLES.values() for r in t.rows}
        for better, worse, _ in table.claims:
            assert {better, worse} <= {r.key for r in table.rows}


def test_the_laptop_scale_is_what_a_laptop_can_do():
    def keys(name):
        return {r.key for r in paper.runs_of(paper.TABLES[name], "laptop")}

    modes, rates = ("none", "head", "backbone", "all"), (0.001, 0.01, 0.05)
    assert keys("table1") == {f"bn-{bn}-{lr}" for bn in modes for lr in rates}
    assert keys("table2") == {"stride2-3x3-1", "stride1-3x3-1", "stride1-3x3-3"}
    for name in ("table1", "table2"):  # runs x seeds x (training + evaluation), two at a time
        assert len(keys(name)) * 3 * (paper.TABLES[name].minutes + 3) / 2 <= 4 * 60


def test_what_a_row_needs_is_said(args):
    args.voc_root = args.coco_root = args.weights = None
    assert "--voc-root" in paper.cannot(paper.row_of("voc07"), "gpu", args)
    assert paper.cannot(paper.row_of("voc07"), "laptop", args) is None  # on shapes
    assert "--coco-root" in paper.cannot(paper.row_of("coco"), "laptop", args)
    args.voc_root = "V"
    assert "--weights" in paper.cannot(paper.row_of("pretrained-bn-all-0.01"), "gpu", args)


# ------------------------------------------------------------------------------ what there is


def test_outcomes_are_read_from_the_folders_of_runs(tmp_path):
    row = paper.row_of("bn-all-0.01")
    place = tmp_path / "laptop" / row.key
    finish(place / "seed0", 0.25, losses=[9.0] * 20 + [4.0])
    (place / "seed0" / "cost.jsonl").write_text('{"seconds": 3600, "cpu_seconds": 60}\n' * 2)
    finish(place / "seed1", 0.0)
    (place / "seed1" / "results.json").unlink()
    (place / "seed1" / "nonfinite.json").write_text('{"step": 0, "loss": NaN}')  # skipped
    finish(place / "seed2", 0.0)
    (place / "seed2" / "results.json").unlink()
    (place / "seed2" / "nonfinite.json").write_text('{"step": 62, "loss": NaN}')
    (place / "seed3").mkdir()
    found = paper.outcomes(row, "laptop", tmp_path)
    assert {seed: one["state"] for seed, one in found.items()} == {
        0: "done", 1: "stopped", 2: "diverged"
    }  # fmt: skip
    assert found[0]["loss"] == 4.0
    assert (found[0]["hours"], found[0]["cpu_minutes"]) == (2.0, 2.0)
    assert (found[1]["step"], found[2]["step"]) == (2, 62)
    assert paper.result(row, found, "mAP_11point") == "25.0; diverged at step 62; 1 unfinished"
    assert paper.result(row, {}, "mAP_11point") == "not run"


def test_a_second_test_of_a_run_has_its_own_numbers(tmp_path):
    single, multi = paper.TABLES["table3"].rows[:2]
    finish(tmp_path / "gpu" / "voc07" / "seed0", 0.5)
    assert paper.outcomes(multi, "gpu", tmp_path) == {}
    again = tmp_path / "gpu" / "voc07" / "seed0" / "multi-scale.json"
    again.write_text('{"mAP_11point": 0.6}')
    assert paper.values(paper.outcomes(multi, "gpu", tmp_path), "mAP_11point") == [60.0]
    assert paper.values(paper.outcomes(single, "gpu", tmp_path), "mAP_11point") == [50.0]


def runs(*numbers):
    """Outcomes with these mAPs; None diverged."""
    return {
        i: {"state": "diverged", "step": 5} if x is None else {"state": "done", "mAP": x / 100}
        for i, x in enumerate(numbers)
    }


@pytest.mark.parametrize(
    ("better", "worse", "start"),
    [
        ((20, 21, 22), (17, 18, 19), "yes, by 3.00"),
        ((20, 21, 22), (17, 18, 20), "no claim: a difference of 2.67 lies inside the spread"),
        ((17, 18, 19), (20, 21, 22), "no, the other way round, by 3.00"),
        ((20, 21), (None, None, None), "yes: every run of the other diverged (3 of 3)"),
        ((None, None), (20, 21), "no, the other way round: every run of it diverged"),
        ((20, 21, 22), (None, 3, 4), "no claim: 0 and 1 runs diverged"),
        ((None, None), (None, None), "no claim: 2 and 2 runs diverged"),
        ((25,), (1, 2, 3), "no claim: fewer than two seeds"),
        ((25, 26), (), "no claim: fewer than two seeds"),
    ],
)
def test_nothing_is_claimed_inside_the_spread(better, worse, start):
    assert paper.verdict(runs(*better), runs(*worse), "mAP").startswith(start)


def test_of_two_losses_the_lower_is_the_better():
    low, high = ({i: {"state": "done", "loss": x + i} for i in (0, 1)} for x in (5.0, 7.5))
    assert paper.verdict(low, high, "loss").startswith("yes, by 2.50")
    assert paper.verdict(high, low, "loss").startswith("no, the other way round, by 2.50")
    assert paper.verdict(low, runs(None, None), "loss").startswith("yes: every run of the other")


def test_the_page_has_the_papers_numbers_ours_and_the_commands(args, tmp_path):
    for key, numbers in {"bn-all-0.05": (0.20, 0.22), "bn-none-0.05": (0.1, 0.11)}.items():
        for seed, number in enumerate(numbers):
            finish(args.runs / "laptop" / key / f"seed{seed}", number)
    args.voc_root = "/private/VOCdevkit"
    text = paper.markdown("table1", "laptop", args)
    assert (
        "| BN all, learning rate 0.05 | 78.7 | 21.0 [20.0, 22.0] | 10.5 [10.0, 11.0] | 2 |" in text
    )
    assert "| BN none, learning rate 0.05 | NaN | 10.5 [10.0, 11.0] | 5.2 [5.0, 5.5] | 2 |" in text
    assert "| `bn-all-0.05` | `bn-none-0.05` | yes, by 10.50: every seed" in text
    assert (
        text.count("| no claim: a difference of 0.00 lies") == 1
    )  # by the loss, equal in all runs
    assert "commit abc; torch 2.0; on one core; training images seen a run 32" in text
    assert "measured on 2007:val" in text
    assert "--voc-root DIR" in text
    assert "/private" not in text
    assert "--out RUNS/laptop/bn-all-0.05/seed0" in text
    assert str(tmp_path) not in text
    paper.write("table1", "laptop", args)
    assert (args.out / "table1-laptop.md").read_text().endswith(".svg)\n")
    ET.parse(args.out / "figures" / "table1-laptop.svg")


def test_what_was_published_is_listed_where_the_runs_are_not(args, capsys):
    finish(args.runs / "laptop/bn-all-0.05/seed0", 0.20)
    args.out.mkdir()
    paper.publish(paper.TABLES["table1"], "laptop", args)
    finish(args.runs / "gpu/bn-all-0.05/seed0", 0.30)
    paper.publish(paper.TABLES["table1"], "gpu", args)  # beside the laptop's
    assert "/private" not in (args.out / "measured.json").read_text()
    place, args.runs = args.runs, args.runs / "nowhere"
    paper.listing(args)
    ours = "ours laptop: 20.0; commit abc; torch 2.0; on one core; training images seen a run 32"
    text = capsys.readouterr().out
    assert text.count(ours) == text.count("; gpu: 30.0; commit abc") == 1
    args.runs = place
    finish(args.runs / "laptop/bn-all-0.05/seed1", 0.22)
    paper.listing(args)  # your own runs come first
    assert "ours laptop: 21.0 [20.0, 22.0]" in capsys.readouterr().out


def test_another_test_of_a_run_is_published_as_short_as_the_run(args):
    folder = args.runs / "gpu/voc07/seed0"
    finish(folder, 0.20)
    (folder / "multi-scale.json").write_text('{"mAP_11point": 0.25, "classes": {"dog": [0.1]}}')
    args.out.mkdir()
    paper.publish(paper.TABLES["table3"], "gpu", args)
    both = json.loads((args.out / "measured.json").read_text())["gpu"]
    assert both["voc07"]["0"]["mAP_11point"] == 0.20
    assert both["voc07 --multi-scale"]["0"]["mAP_11point"] == 0.25
    assert both["voc07"]["0"].keys() == both["voc07 --multi-scale"]["0"].keys()


def test_the_listing_names_every_row(tmp_path, capsys):
    assert paper.main(["--runs", str(tmp_path), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for table in paper.TABLES.values():
        for row in table.rows:
            assert f"  {row.what}\n      the paper's {row.paper}; ours none" in printed.out
    assert "Faster R-CNN" in printed.out.splitlines()[-1]
    assert printed.err == ""


# ------------------------------------------------------------------------------ the runner

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
steps = 40
if "--iterations" in sys.argv:
    steps = int(sys.argv[sys.argv.index("--iterations") + 1])
args = {"iterations": steps, "batch_size": 16, "data": "shapes", "seed": 0,
        "train_sets": ["2007:train"], "eval_sets": ["2007:test"]}
about = {"args": args, "commit": "c", "torch": "t", "machine": "m"}
(out / "run.json").write_text(json.dumps(about))
log = out / "log.jsonl"
first = len(log.read_text().splitlines()) if log.exists() else 0
if "bn-head-0.05" in str(out):
    sys.exit("error: broken on purpose")
for step in range(first, steps):
    with open(log, "a") as file:
        print(json.dumps({"step": step, "loss": 1.0, "images_per_s": 1.0}), file=file)
    if "bn-head-0.001" in str(out):
        os.kill(os.getpid(), signal.SIGKILL)  # as a system without memory does
    if "bn-none-0.05" in str(out):
        (out / "nonfinite.json").write_text('{"step": 3, "loss": NaN}')
        sys.exit("error: not finite")
    time.sleep(PAUSE)
    if stop:
        sys.exit(143)
(out / "results.json").write_text('{"mAP": 0.5, "mAP_11point": 0.5}')
"""


@pytest.fixture
def fake(args, tmp_path, monkeypatch):
    """run(keys, **changes): the runner with a stand-in for train.py; returns what it returned."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    real = paper.command

    def run(*keys, pause=0.0, **changes):
        script = tmp_path / "fake.py"
        script.write_text(FAKE.replace("PAUSE", str(pause)))
        monkeypatch.setattr(
            paper, "command", lambda *a, **k: ["python", str(script), *real(*a, **k)[2:]]
        )
        for name, value in {"only": list(keys), "seeds": [0], **changes}.items():
            setattr(args, name, value)
        return paper.run_missing(paper.TABLES["table1"], "laptop", args)

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def test_minutes_become_the_same_number_of_steps_for_all(args, fake):
    assert fake("bn-none-0.01", "bn-all-0.01", jobs=2, minutes=1.0) == (0, True)
    first, second = (args.runs / "laptop" / k / "seed0" for k in ("bn-all-0.01", "bn-none-0.01"))
    assert "--minutes 1.0" in (first / "out.txt").read_text()  # sets the pace, and comes first
    assert "--iterations 40" in (second / "out.txt").read_text()
    cost = json.loads((second / "cost.jsonl").read_text())
    assert 0 < cost["cpu_seconds"] < 30


def test_what_is_done_is_not_run_again(args, fake):
    assert fake("bn-none-0.05", "bn-all-0.05", images=48) == (0, True)  # one diverges: a result
    place = args.runs / "laptop"
    assert json.loads((place / "bn-all-0.01.plan.json").read_text()) == {"iterations": 6}
    assert fake("bn-none-0.05", "bn-all-0.05", "bn-all-0.001", images=48) == (0, True)
    for key in ("bn-none-0.05", "bn-all-0.05", "bn-all-0.001"):
        assert (place / key / "seed0" / "out.txt").read_text().count("$ python") == 1


def test_images_are_divided_by_your_own_batch_size(args, fake):
    assert fake("bn-all-0.05", images=48, train_flags=["--batch-size", "4"]) == (0, True)
    plan = args.runs / "laptop" / "bn-all-0.01.plan.json"
    assert json.loads(plan.read_text()) == {"iterations": 12}


def test_a_run_that_fails_is_reported_and_the_others_go_on(args, fake, capsys):
    assert fake("bn-head-0.05", "bn-all-0.05", images=48) == (1, True)
    assert "error: broken on purpose" in capsys.readouterr().out
    assert fake("bn-head-0.001", "bn-all-0.05", images=48) == (1, True)
    assert "failed with code -9" in capsys.readouterr().out
    assert (args.runs / "laptop" / "bn-all-0.05" / "seed0" / "results.json").exists()


def test_an_interrupted_table_goes_on_where_it_was(args, fake):
    keys, place = ("bn-all-0.001", "bn-all-0.05"), args.runs / "laptop"
    failed, reached = fake(*keys, images=320, pause=0.1, stop_after=1 / 60)
    assert (failed, reached) == (0, False)
    assert not (place / "bn-all-0.05").exists()  # never started
    assert not (place / "bn-all-0.001" / "seed0" / "results.json").exists()
    assert fake(*keys, images=320, stop_after=None) == (0, True)
    for key in keys:
        assert len((place / key / "seed0" / "log.jsonl").read_text().splitlines()) == 40
    assert len((place / "bn-all-0.001" / "seed0" / "cost.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(args, fake):
    pid = os.fork()
    if pid == 0:  # in a child, so that a failure cannot interrupt the tests
        code = 1
        try:
            code = 0 if fake("bn-all-0.05", images=1600, pause=0.05) == (0, False) else 1
        finally:
            os._exit(code)
    log = args.runs / "laptop" / "bn-all-0.05" / "seed0" / "log.jsonl"
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert 0 < len(log.read_text().splitlines()) < 100


def test_a_gpu_run_needs_a_budget(args, fake):
    with pytest.raises(ValueError, match="--minutes or --images"):
        paper.run_missing(paper.TABLES["table1"], "gpu", args)


# ------------------------------------------------------------------------------ figures


def test_moving_average_and_fluctuation_by_hand():
    assert figures.moving_average([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert figures.fluctuation([5.0, 3.0, 4.0]) == [2.0, 1.0]


def test_figure_1_has_a_curve_a_run_in_each_panel():
    log = [{"step": i, "loss": 9 / (i + 1), "grad_norm": 5 + i % 2} for i in range(100)]
    svg = figures.gradients({"no BN": log, "BN <head>": log[:50]})
    root = ET.fromstring(svg)
    assert len(root.findall("{*}polyline")) == 6
    texts = [t.text for t in root.findall("{*}text")]
    assert {"training loss", "L2 norm of the gradient", "no BN", "BN <head>"} <= set(texts)


def test_dots_lie_at_their_numbers():
    root = ET.fromstring(figures.dots([("a", [10.0, 20.0], ""), ("b", [], "lost")], "title"))
    x = [float(c.get("cx")) for c in root.findall("{*}circle")]
    assert x == pytest.approx([330 + 420 * 10 / 25, 330 + 420 * 20 / 25], abs=0.1)
    assert "lost" in [t.text for t in root.findall("{*}text")]


def test_logs_and_figures_of_little_or_nothing(tmp_path):
    finish(tmp_path / "run", 0.1)
    assert [row["step"] for row in figures.read_log(tmp_path / "run")] == [0, 1]
    assert figures.read_log(tmp_path / "nothing") == []
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # killed while it wrote
    assert len(figures.read_log(tmp_path / "run")) == 2
    for svg in (figures.gradients({}), figures.dots([], "nothing")):
        ET.fromstring(svg)
