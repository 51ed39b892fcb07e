"""Every table and figure of the paper as commands: what it reports, what to run, what we got.

    python -m experiments.paper                         all rows, with commands
    python -m experiments.paper table1 --scale laptop   run what is missing, then write docs/

Scales. `full`: the paper's own networks, schedules and precision (weeks on one GPU). `gpu`: the
same networks with a budget of --minutes or --images per run. `laptop`: narrow networks with such a
budget, on the data of --voc-root or on drawn shapes; with the defaults at most four hours on two
cores for a table. Numbers of different scales cannot be compared, and the paper's numbers stand
beside them only as the paper's.

`full` trains in float32, as the paper did; on GPUs PyTorch computes the convolutions in TF32.
Everything else follows train.py's default, which is bf16 where the hardware is made for it.

Runs go one after another (--jobs: several at once). Stopped by Ctrl-C, SIGTERM or --stop-after,
each writes its checkpoint, and the same command goes on. Flags behind `--` are handed to train.py
and win: `-- --config extras=residual` runs Table 2 with the extra layers of section 3.2.

Finished runs are read from --runs (results.json, nonfinite.json, log.jsonl of train.py). Tables
(Markdown), figures (SVG) and the numbers behind them (measured.json) are written to --out. The list
shows your runs, or else what measured.json has. Faster R-CNN (section 4.2.1) is out of scope.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from experiments import figures
from plumbing.program import own_and_others, run_program

ROOT = Path(__file__).parents[1]
SCALES = ("laptop", "gpu", "full")
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was told to


class Row(NamedTuple):
    """One row of a table: a network to train, or (`test`) another test of a trained one."""

    key: str  # names the folder of its runs; rows of two tables with one key share their runs
    what: str
    paper: str  # the paper's number, in the paper's unit
    flags: str = ""  # of train.py, at full scale
    laptop: str | None = None  # what the laptop scale puts in place of `flags`; None: not run there
    start: str = ""  # what experiments.convert makes its first weights of; "": random weights
    test: str = ""  # flags of eval.py: the row tests the last checkpoint of `key` again
    needs: str = "voc"  # voc | coco | both; "server": as voc, but a test server has the answers
    full_only: bool = False


class Table(NamedTuple):
    title: str
    metric: str  # of results.json
    rows: tuple[Row, ...]
    minutes: float  # of a run at the laptop scale, where neither --minutes nor --images is given
    pace: str  # key of the run that turns minutes into iterations, for all rows
    claims: tuple[tuple[str, str, str], ...] = ()  # (better, worse, the paper's words in ours)
    notes: str = ""


# ------------------------------------------------------------------------------ Table 1

# At the laptop scale Table 1 has ResNet-18 with the strided stem, because VGG-16 of the same width
# costs eight times as much. Without BN the variances of its residual blocks add up, so pixels are
# divided by their deviation, or the loss would start at 1,300. No warm-up: it would hide what
# diverges. Flips only: short runs learn less from the full augmentation.
SMALL_VGG = (
    "--recipe ssd120k --backbone resnet18 --width 0.25 --batch-size 8 --augment flip"
    " --config std=58,58,58"
)
VGG = "--recipe ssd120k --backbone vgg16"
# Section 4.1: pre-trained networks train as in SSD, at batch 32. Given, because the recipe's linear
# rule would make 480,000 iterations of it.
BATCH_32 = "--batch-size 32 --iterations 120000"


def batchnorm_rows():
    """The paper's number for each learning rate and place of BN, and footnote 1."""
    paper = {
        0.001: ("67.6", "71.0", "72.8", "71.8", "77.1", "77.6"),
        0.01: ("NaN", "75.6", "77.8", "77.3", "76.9", "78.2"),
        0.05: ("NaN", "NaN", "78.0", "78.7", "NaN", "75.5"),
    }
    modes = ("none", "head", "backbone", "all", "head", "all")
    for lr, numbers in paper.items():
        for column, (bn, number) in enumerate(zip(modes, numbers, strict=True)):
            key, what = f"bn-{bn}-{lr}", f"BN {bn}, learning rate {lr}"
            flags = f"{VGG} --bn {bn} --lr {lr}"
            if column < 4:
                yield Row(key, what, number, flags, f"{SMALL_VGG} --bn {bn} --lr {lr}")
            else:  # reconstructed from the table's check-marks
                file = "vgg16_bn.pth" if bn == "all" else "vgg16.pth"
                what += f", {file} of ImageNet, batch 32"
                start = f"vgg16 WEIGHTS/{file}"
                yield Row(f"pretrained-{key}", what, number, f"{flags} {BATCH_32}", start=start)
    for bn, file, number in (("head", "vgg16.pth", "76.8"), ("all", "vgg16_bn.pth", "78.2")):
        what = f"footnote 1: BN {bn}, {file} of ImageNet, batch 128"
        flags, start = f"{VGG} --bn {bn} --lr 0.01", f"vgg16 WEIGHTS/{file}"
        yield Row(f"pretrained-bn-{bn}-batch128", what, number, flags, start=start)
    yield Row(
        "pretrained-ssd300", "SSD300 as published: vgg16.pth of ImageNet, L2 norm on conv4_3",
        "77.2", f"{VGG} --bn none --config l2_norm=True --lr 0.001 {BATCH_32}",
        start="vgg16 WEIGHTS/vgg16.pth",
    )  # fmt: skip


TABLES = {}
TABLES["table1"] = Table(
    "Table 1: BatchNorm, the learning rate and pretraining (SSD300, VGG-16)",
    "mAP_11point",
    tuple(batchnorm_rows()),
    minutes=10,
    pace="bn-all-0.01",
    claims=(
        ("bn-all-0.05", "bn-none-0.001", "BN everywhere, at a rate 50 times as large, helps"),
        ("bn-head-0.001", "bn-none-0.001", "BN in the head helps (at 0.001)"),
        ("bn-backbone-0.001", "bn-none-0.001", "BN in the backbone helps (at 0.001)"),
        ("bn-all-0.001", "bn-none-0.001", "BN everywhere helps (at 0.001)"),
        ("bn-head-0.01", "bn-none-0.01", "BN in the head helps (at 0.01)"),
        ("bn-all-0.01", "bn-none-0.01", "BN everywhere helps (at 0.01)"),
        ("bn-all-0.05", "bn-none-0.05", "BN everywhere helps (at 0.05)"),
        ("bn-all-0.05", "bn-head-0.05", "at 0.05 BN in the head alone is not enough"),
        ("bn-backbone-0.01", "bn-none-0.01", "BN in the backbone helps (at 0.01)"),
        ("bn-head-0.01", "bn-head-0.001", "with BN in the head a larger rate is better"),
        ("bn-all-0.05", "bn-all-0.001", "with BN everywhere a larger rate is better"),
        ("bn-all-0.05", "bn-backbone-0.05", "at 0.05 BN everywhere beats the backbone's alone"),
    ),
    notes="At the laptop scale the network is ResNet-18 with the strided stem, a quarter as "
    "wide, not VGG-16, and its input is divided by its deviation. The paper does not give the "
    "learning rate of footnote 1; 0.01 is the best of its pre-trained column with BN everywhere. "
    "Rows of batch 32 see a quarter of the images, in the paper as well.",
)

# ------------------------------------------------------------------------------ Table 2

SMALL_ROOT = "--recipe shapes --batch-size 16"  # the quick start's: 6 times the images/s


def root_rows():
    """The first convolutions of ResNet-18, with the extra layers of SSD (docs/deviations.md)."""
    paper = {
        2: {(7, 1): 73.1, (3, 1): 73.2, (3, 2): 74.9, (3, 3): 75.4},
        1: {(7, 1): 77.6, (3, 1): 77.8, (3, 2): 78.1, (3, 3): 78.5, (3, 4): 78.4, (3, 5): 78.5},
    }
    fps = {
        2: {(7, 1): 59.5, (3, 1): 62.9, (3, 2): 58.1, (3, 3): 54.5},
        1: {(7, 1): 37.0, (3, 1): 37.2, (3, 2): 31.5, (3, 3): 26.9, (3, 4): 24.3, (3, 5): 21.8},
    }
    for stride, numbers in paper.items():
        for (kernel, convs), number in numbers.items():
            name = "resnet18" if stride == 2 else "resnet18-b" if kernel == 7 else "root-resnet18"
            stem = f"--config stem={kernel},{convs},{stride}"
            small = kernel == 3 and (stride, convs) in ((2, 1), (1, 1), (1, 3))
            yield Row(
                f"stride{stride}-{kernel}x{kernel}-{convs}",
                f"{'with' if stride == 2 else 'no'} down-sampling, {convs} of {kernel}x{kernel}",
                f"{number} ({fps[stride][kernel, convs]} FPS, Tesla P40)",
                f"--recipe voc07 --backbone {name} {stem} extras=conv",
                f"{SMALL_ROOT} --backbone {name} {stem}" if small else None,
            )


TABLES["table2"] = Table(
    "Table 2: the root block (Root-ResNet-18)",
    "mAP_11point",
    tuple(root_rows()),
    minutes=15,
    pace="stride1-3x3-3",
    claims=(
        ("stride1-3x3-1", "stride2-3x3-1", "no down-sampling in the first convolution helps"),
        ("stride1-3x3-3", "stride1-3x3-1", "three 3x3 convolutions beat one"),
        ("stride1-3x3-3", "stride2-3x3-1", "the root block as a whole helps"),
        ("stride1-3x3-3", "stride2-7x7-1", "the root block beats ResNet-18's own stem"),
    ),
    notes="At the laptop scale the network is the quick start's, an eighth as wide, with residual "
    "extra layers. Frames per second of a trained row, on your hardware: `python -m "
    "experiments.fps CHECKPOINT`; the paper's are those of a Tesla P40.",
)

# ------------------------------------------------------------------------------ Tables 3 to 5

SMALL = "--width 0.25 --batch-size 16"
SMALL_VOC = f"--recipe voc07 --lr 0.05 {SMALL}"
ROOT34 = "--backbone root-resnet34"
VOC12_SETS = "--train-sets 2007:trainval 2007:test 2012:trainval"
# DSOD with its own schedule and the eps of its heads
DSOD = "--recipe voc07 --backbone dsod300 --lr 0.1 --drops 0.2 0.4 0.6 0.8"
DSOD_EPS = "--config head_bn_eps=0.001"
TRANSFER = "--recipe voc07 --lr 0.001"
FROM_COCO = "detector COCO_RUN/last.pt"
COCO_SMALL = f"--recipe coco {ROOT34} --lr 0.05 {SMALL}"
SSD321 = (
    " SSD321 has no command: its start is the ImageNet ResNet-101 of Caffe, with the stride in the "
    "first 1x1; torchvision's has it in the 3x3. From random weights: `--backbone ssd321 --size "
    "321 --bn backbone --config priors=voc321`."
)

# fmt: off
TABLES["table3"] = Table(
    "Table 3: VOC 2007 and 2012 (ScratchDet300, Root-ResNet-34), and DSOD (section 4.2.1)",
    "mAP_11point",
    (
        Row("voc07", "ScratchDet300, VOC 2007", "80.4 (17.8 FPS, TITAN X)",
            f"--recipe voc07 {ROOT34}", f"{SMALL_VOC} {ROOT34}"),
        Row("voc07", "ScratchDet300+, VOC 2007", "84.1", test="--multi-scale", laptop=""),
        Row("voc12", "ScratchDet300, VOC 2012", "78.5",
            f"--recipe voc12 {ROOT34} {VOC12_SETS}", needs="server", full_only=True),
        Row("voc12", "ScratchDet300+, VOC 2012", "83.6", test="--multi-scale",
            needs="server", full_only=True),
        Row("dsod300", "DSOD300, VOC 2007", "77.7", f"{DSOD} {DSOD_EPS}",
            f"{DSOD} {SMALL} {DSOD_EPS}"),
        Row("dsod300-no-bn", "DSOD300 without BN, VOC 2007", "71.5", f"{DSOD} --bn none",
            f"{DSOD} {SMALL} --bn none"),
        Row("", "SSD321 (ResNet-101 of ImageNet), VOC 2007 and 2012", "77.1 and 75.4"),
    ),
    minutes=30,
    pace="voc07",
    claims=(("dsod300", "dsod300-no-bn", "DSOD needs BN"),),
    notes="VOC 2012 is measured by its server: `eval.py CHECKPOINT --eval-sets 2012:test "
    "--comp4 FILE.tar.gz` writes what it takes; the mAP that train.py prints there is of "
    "images it has seen. The learning rate of DSOD without BN is not in the paper; if 0.1 "
    "diverges, that is the result. SSD300 (77.2) is in table1." + SSD321,
)
TABLES["table4"] = Table(
    "Table 4: COCO (ScratchDet300, Root-ResNet-34)",
    "mAP",
    (
        Row("coco", "ScratchDet300, COCO test-dev", "32.7", f"--recipe coco {ROOT34}",
            COCO_SMALL, needs="coco"),
        Row("coco", "ScratchDet300+, COCO test-dev", "39.1", test="--multi-scale", laptop="",
            needs="coco"),
        Row("", "SSD321 (ResNet-101 of ImageNet), COCO test-dev", "28.0"),
    ),
    minutes=60,
    pace="coco",
    notes="test-dev is measured by its server; here val2017. The paper trains on trainval35k, "
    "whose 118,287 images are those of train2017." + SSD321,
)
TABLES["table5"] = Table(
    "Table 5: COCO, then VOC (ScratchDet300, Root-ResNet-34)",
    "mAP_11point",
    (
        Row("coco-voc07", "ScratchDet300, VOC 2007", "84.0", f"{TRANSFER} {ROOT34}",
            f"{TRANSFER} {ROOT34} {SMALL}", FROM_COCO, needs="both"),
        Row("coco-voc07", "ScratchDet300+, VOC 2007", "86.3", test="--multi-scale", laptop="",
            needs="both"),
        Row("coco-voc12", "ScratchDet300, VOC 2012", "82.1", f"{TRANSFER} {ROOT34} {VOC12_SETS}",
            start=FROM_COCO, needs="server", full_only=True),
        Row("coco-voc12", "ScratchDet300+, VOC 2012", "86.3", test="--multi-scale",
            needs="server", full_only=True),
    ),
    minutes=30,
    pace="coco-voc07",
    notes="Run table4 first: it starts from that run. The paper does not give this schedule; "
    "the learning rate is DSOD's, the drops are VOC's.",
)

# ------------------------------------------------------------------------------ Figures, time


def row_of(key):
    """The row that trains `key`."""
    return next(r for t in TABLES.values() for r in t.rows if r.key == key and not r.test)


TABLES["figure1"] = Table(
    "Figure 1: loss and gradients, with and without BN (SSD300, VGG-16)",
    "mAP_11point",
    (
        row_of("bn-none-0.001")._replace(what="no BN, learning rate 0.001"),
        row_of("bn-head-0.001")._replace(what="BN in the head, 0.001"),
        row_of("bn-head-0.01")._replace(what="BN in the head, 0.01"),
    ),
    minutes=10,
    pace="bn-all-0.01",
    notes="The paper does not define the fluctuation of the gradient's norm; ours is the "
    "moving average of |g(t) - g(t-1)|, g being the L2 norm of all gradients.",
)
TABLES["figure3"] = Table(
    "Figure 3: from ResNet-18 to Root-ResNet-18",
    "mAP_11point",
    (
        row_of("stride2-7x7-1")._replace(what="ResNet-18", paper="73.1"),
        Row("resnet18-a", "ResNet-18-A: without the max-pooling", "75.3",
            "--recipe voc07 --backbone resnet18-a --config extras=conv",
            f"{SMALL_VOC} --backbone resnet18-a"),
        row_of("stride1-7x7-1")._replace(what="ResNet-18-B: without the stride", paper="77.6"),
        row_of("stride1-3x3-3")._replace(what="Root-ResNet-18", paper="78.5"),
    ),
    minutes=45,
    pace="stride1-3x3-3",
)
TABLES["time"] = Table(
    "Section 4.6: training time",
    "hours",
    (
        Row("coco", "ScratchDet300 from scratch, COCO, 4 x P40", "84.6 h",
            f"--recipe coco {ROOT34}", COCO_SMALL, needs="coco"),
        Row("", "the same from a pretrained network", "29.7 h"),
    ),
    minutes=60,
    pace="coco",
    notes="The paper does not name the pretrained network and its schedule, so there is no "
    "command for its second number. Hours are those of all pieces of the run.",
)
# fmt: on


# ------------------------------------------------------------------------------ what there is

# What is told of a run; the rest of its files stays with them.
RESULT = "state step mAP mAP_11point mAP_area by_size loss images_per_s hours cpu_minutes".split()
ARGUMENTS = "iterations batch_size data train_sets eval_sets seed".split()


def outcome(folder):
    """One run, from its folder: a dict with "state" done | diverged | stopped, or None."""
    log, lost = figures.read_log(folder), folder / "nonfinite.json"
    lost = json.loads(lost.read_text())["step"] if lost.exists() else None
    if (folder / "results.json").exists():
        found = {"state": "done"} | json.loads((folder / "results.json").read_text())
    elif lost is not None and not (log and log[-1]["step"] >= lost):  # else it was skipped
        found = {"state": "diverged", "step": lost}
    elif log:
        found = {"state": "stopped", "step": log[-1]["step"] + 1}
    else:
        return None
    tail = [line["loss"] for line in log[-max(1, len(log) // 20) :]]
    if found["state"] == "done" and tail:
        found["loss"] = sum(tail) / len(tail)  # of the last twentieth of the steps
    found["images_per_s"] = log[-1]["images_per_s"] if log else None
    pieces = []
    if (folder / "cost.jsonl").exists():
        pieces = [json.loads(s) for s in (folder / "cost.jsonl").read_text().splitlines()]
    found["hours"] = sum(p["seconds"] for p in pieces) / 3600 if pieces else None
    found["cpu_minutes"] = sum(p["cpu_seconds"] for p in pieces) / 60 if pieces else None
    found = of_interest(found)
    if (folder / "run.json").exists():
        about = json.loads((folder / "run.json").read_text())
        found["run"] = {key: about[key] for key in ("commit", "torch", "machine")}
        found["run"]["args"] = {key: about["args"][key] for key in ARGUMENTS}
    return found


def of_interest(found):
    return {key: found[key] for key in RESULT if key in found}


def outcomes(row, scale, runs):
    """Of all seeds of a row: {seed: outcome}."""
    found = {}
    for folder in sorted((runs / scale / row.key).glob("seed*")) if row.key else ():
        one = outcome(folder)
        if one and row.test:  # another test of the same run
            again = folder / f"{test_name(row)}.json"
            one = one | of_interest(json.loads(again.read_text())) if again.exists() else None
        if one:
            found[int(folder.name.removeprefix("seed"))] = one
    return found


def name_of(row):
    """Its key, and its test if it has one."""
    return f"{row.key} {row.test}".strip()


def published(args):
    """measured.json: {scale: {name_of(row): {seed: outcome}}}, seeds as text."""
    path = args.out / "measured.json"
    return json.loads(path.read_text()) if path.exists() else {}


def publish(table, scale, args):
    """Put the table's outcomes into measured.json, in place of those of the same rows and scale."""
    kept = published(args)
    for row in runs_of(table, scale):
        if found := outcomes(row, scale, args.runs):
            kept.setdefault(scale, {})[name_of(row)] = found
    (args.out / "measured.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def test_name(row):
    return row.test.strip("-").replace(" ", "").replace("--", "-")


def values(found, metric):
    """The numbers of the finished runs: percent, or hours, or the loss at the end."""
    factor = 1 if metric in ("hours", "loss") else 100
    got = [one.get(metric) for one in found.values() if one["state"] == "done"]
    return [factor * v for v in got if v is not None]


def spread(numbers):
    """Mean and range in words. [18.2, 19.0] -> "18.6 [18.2, 19.0]"."""
    if not numbers:
        return "-"
    mean = sum(numbers) / len(numbers)
    return f"{mean:.1f}" + (f" [{min(numbers):.1f}, {max(numbers):.1f}]" if numbers[1:] else "")


def result(row, found, metric):
    """All seeds of a row in one cell."""
    if row.needs == "server" and found:
        return (
            f"{sum(one['state'] == 'done' for one in found.values())} trained; its server measures"
        )
    diverged = sorted(one["step"] for one in found.values() if one["state"] == "diverged")
    stopped = sum(one["state"] == "stopped" for one in found.values())
    parts = [spread(values(found, metric))] if values(found, metric) else []
    if diverged:
        parts.append(f"diverged at step {', '.join(map(str, diverged))}")
    if stopped:
        parts.append(f"{stopped} unfinished")
    return "; ".join(parts) or "not run"


def verdict(better, worse, metric):
    """What our runs say to "better > worse" (of a loss <). Nothing, inside the seeds' spread."""
    sign = -1 if metric == "loss" else 1
    a, b = ([sign * v for v in values(found, metric)] for found in (better, worse))
    a_lost, b_lost = ([o for o in x.values() if o["state"] == "diverged"] for x in (better, worse))
    if len(a) + len(a_lost) < 2 or len(b) + len(b_lost) < 2:
        return "no claim: fewer than two seeds of each"
    if a_lost or b_lost:
        if a and not a_lost and not b:
            return f"yes: every run of the other diverged ({len(b_lost)} of {len(b_lost)})"
        if b and not b_lost and not a:
            return f"no, the other way round: every run of it diverged ({len(a_lost)})"
        return f"no claim: {len(a_lost)} and {len(b_lost)} runs diverged"
    difference = sum(a) / len(a) - sum(b) / len(b)
    if min(a) > max(b):
        return f"yes, by {difference:.2f}: every seed better than every seed of the other"
    if max(a) < min(b):
        return f"no, the other way round, by {-difference:.2f}"
    return f"no claim: a difference of {abs(difference):.2f} lies inside the spread of the seeds"


# ------------------------------------------------------------------------------ what to run


def folder_of(row, scale, seed, runs):
    return runs / scale / row.key / f"seed{seed}"


def command(row, scale, seed, args, budget=()):
    """What trains (or, for a row with `test`, tests again) this row: a list of words."""
    folder = folder_of(row, scale, seed, args.runs)
    kind = "coco" if row.needs == "coco" else "voc"
    root = getattr(args, f"{kind}_root") or ("DIR" if scale == "full" else None)
    place = [f"--{kind}-root", root] if root else []
    if row.test:
        words = ["python", "eval.py", f"{folder}/last.pt", *row.test.split(), *place]
        if row.needs == "server":
            return [*words, "--eval-sets", "2012:test", "--comp4", f"{folder}/comp4.tar.gz"]
        sets = ["--eval-sets", *args.eval_sets] if args.eval_sets and kind == "voc" else []
        return [*words, *sets, "--json", f"{folder}/{test_name(row)}.json"]
    flags = (row.laptop if scale == "laptop" else row.flags).split()
    flags += ["--init", conversion(row, scale, seed, args)[-1]] if row.start else []
    flags += ["--no-bf16"] if scale == "full" else []
    sets = []
    if kind == "voc" and place and "--train-sets" not in flags:
        sets += ["--train-sets", *args.train_sets] if args.train_sets else []
        sets += ["--eval-sets", *args.eval_sets] if args.eval_sets else []
    where = ["--seed", str(seed), "--out", str(folder), "--resume"]
    return ["python", "train.py", *place, *sets, *flags, *budget, *where, *args.train_flags]


def conversion(row, scale, seed, args):
    """What writes the start checkpoint of a row that does not start from random weights."""
    kind, source = row.start.split()
    source = source.replace("WEIGHTS", args.weights or "WEIGHTS")
    source = source.replace("COCO_RUN", str(args.runs / scale / "coco" / f"seed{seed}"))
    name = Path(source).stem if kind == "vgg16" else f"coco-seed{seed}"
    out = args.runs / scale / "starts" / f"{name}.pt"
    return ["python", "-m", "experiments.convert", kind, source, "--out", str(out)]


def runs_of(table, scale):
    """Its rows at this scale."""
    rows = [row for row in table.rows if row.key]
    if scale == "laptop":
        return [row for row in rows if row.laptop is not None]
    return rows if scale == "full" else [row for row in rows if not row.full_only]


def cannot(row, scale, args):
    """Why this row cannot be run with these arguments, or None."""
    if row.test and row.needs == "server":
        return f"its server measures it: {shlex.join(command(row, scale, 0, args))}"
    if row.needs in ("coco", "both") and not args.coco_root:
        return "needs --coco-root"
    if not args.voc_root and (row.needs == "both" or (row.needs != "coco" and scale != "laptop")):
        return "needs --voc-root"
    if "WEIGHTS" in row.start and not args.weights:
        return "needs --weights, the folder of torchvision's vgg16.pth and vgg16_bn.pth"
    return None


def find_budget(table, scale, args):
    """The flags that limit each run of a table: the same number of images for all.

    Kept in the folder of the runs, so that a table is finished as it was begun. [] means that the
    run `table.pace` has to be started first, with --minutes, to find how much that is.
    """
    if scale == "full":
        return []
    plan = args.runs / scale / f"{table.pace}.plan.json"
    if not plan.exists():
        pace = folder_of(row_of(table.pace), scale, args.seeds[0], args.runs) / "run.json"
        if args.images:
            words = command(row_of(table.pace), scale, 0, args)
            at = [i for i, word in enumerate(words) if word == "--batch-size"]
            batch = int(words[at[-1] + 1]) if at else 128  # the last: yours, behind `--`
            iterations = max(1, args.images // batch)
        elif pace.exists():
            iterations = json.loads(pace.read_text())["args"]["iterations"]
        else:
            return []
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps({"iterations": iterations}))
    return ["--iterations", str(json.loads(plan.read_text())["iterations"])]


def start(words, folder, threads):
    """The process of one run. It prints to out.txt in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(folder / "out.txt", "a") as out:
        print(f"$ {shlex.join(words)}", file=out, flush=True)
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
        return subprocess.Popen(words, stdout=out, stderr=out, env=environment)


def convert(words):
    """Write a start checkpoint, if it is not there. What went wrong, or None."""
    if Path(words[-1]).exists():
        return None
    print(time.strftime("%H:%M:%S"), shlex.join(words), flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *words[1:]], env=environment, stderr=subprocess.PIPE, text=True
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def run_missing(table, scale, args):
    """Train and test what is missing -> (how many runs failed, whether all were reached)."""
    budget = find_budget(table, scale, args)
    rows = [r for r in runs_of(table, scale) if not args.only or r.key in args.only]
    todo = [(row, seed) for seed in args.seeds for row in rows]
    if scale != "full" and not budget:  # the pace first
        pace = row_of(table.pace)
        todo = [(pace, args.seeds[0])] + [x for x in todo if x != (pace, args.seeds[0])]
    todo.sort(key=lambda x: bool(x[0].test))  # tests after all training
    minutes = args.minutes or (table.minutes if scale == "laptop" else None)
    if scale == "gpu" and not budget and not minutes:
        raise ValueError("--scale gpu needs --minutes or --images: how long is one run to be?")

    running, failed, stopped = {}, 0, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    deadline = time.monotonic() + 60 * args.stop_after if args.stop_after else float("inf")
    while todo or running:
        if todo and not stopped and len(running) < args.jobs and (budget or not running):
            row, seed = todo.pop(0)
            folder = folder_of(row, scale, seed, args.runs)
            found = outcomes(row, scale, args.runs).get(seed)
            reason = cannot(row, scale, args)
            if row.test and not (folder / "results.json").exists():
                reason = "its training has not finished"
            if row.start and not (found or reason):
                reason = convert(conversion(row, scale, seed, args))
                failed += bool(reason)
            if (found and found["state"] != "stopped") or reason:
                if reason:
                    print(f"{row.key} seed {seed}{' ' + row.test if row.test else ''}: {reason}")
                continue
            limit = budget or (["--minutes", str(minutes)] if scale != "full" else [])
            words = command(row, scale, seed, args, limit)
            if args.jobs > 1:  # one thread and no loader processes: the runs share the cores
                words += ["--workers", "0"]
            print(time.strftime("%H:%M:%S"), shlex.join(words), flush=True)
            process = start(words, folder, 1 if args.jobs > 1 else None)
            running[process.pid] = (process, row, seed, time.monotonic())
            continue
        if todo and stopped:
            todo = []
        time.sleep(0.2)
        if not budget and scale != "full":
            budget = find_budget(table, scale, args)
        if time.monotonic() > deadline and not stopped:
            stopped.append(signal.SIGTERM)
        if stopped and stopped[-1] is not None:
            for process, *_ in running.values():
                process.send_signal(signal.SIGTERM)
            stopped.append(None)  # told once
        for pid, (process, row, seed, begin) in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done:
                continue
            process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from Popen
            del running[pid]
            failed += finish(row, scale, seed, begin, usage, process.returncode, args)
            if not budget and scale != "full" and not find_budget(table, scale, args):
                todo = []  # the run that sets the pace did not start
    return failed, not stopped


def finish(row, scale, seed, begin, usage, code, args):
    """Book what a run has cost and say how it ended. 1 if it failed, else 0."""
    folder = folder_of(row, scale, seed, args.runs)
    cost = {"seconds": time.monotonic() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    if not row.test:
        with open(folder / "cost.jsonl", "a") as file:
            file.write(json.dumps(cost) + "\n")
    found = outcomes(row, scale, args.runs).get(seed) or {"state": "nothing"}
    state = found["state"]
    if state == "done":
        state = f"mAP {found['mAP'] or 0:.3f}"
    elif state != "nothing":
        state += f" at step {found['step']}"
    minutes = cost["cpu_seconds"] / 60
    print(f"{time.strftime('%H:%M:%S')} {row.key} seed {seed}: {state}, {minutes:.1f} CPU minutes")
    if code == 0 or code in STOPPED or found["state"] == "diverged":
        return 0
    tail = "\n    ".join((folder / "out.txt").read_text().splitlines()[-5:])
    print(f"  failed with code {code}; the end of {folder}/out.txt:\n    {tail}", flush=True)
    return 1


# ------------------------------------------------------------------------------ what it says


def listing(args):
    """All rows: the paper's number, ours at each scale, the full command."""
    elsewhere = published(args)
    for name, table in TABLES.items():
        print(f"\n{name} - {table.title}")
        for row in table.rows:
            ours = []
            for scale in SCALES:
                found = outcomes(row, scale, args.runs)
                found = found or elsewhere.get(scale, {}).get(name_of(row))
                if found:
                    ours += [f"{scale}: {result(row, found, table.metric)}"]
                    ours += describe({row.key: found})
            print(f"  {row.what}\n      the paper's {row.paper}; ours {'; '.join(ours) or 'none'}")
            if row.start:
                print(f"      {shlex.join(conversion(row, 'full', 0, args))}")
            if row.key:
                print(f"      {shlex.join(command(row, 'full', 0, args))}")
        if table.notes:
            print(f"  Note: {table.notes}")
    print("\nFaster R-CNN, one sentence of section 4.2.1 (67.2 from scratch), is out of scope.")


def markdown(name, scale, args):
    """The page of one table at one scale."""
    table, rows = TABLES[name], runs_of(TABLES[name], scale)
    found = {(row.key, row.test): outcomes(row, scale, args.runs) for row in rows}
    unit = "hours" if table.metric == "hours" else "mAP in %"
    lines = [f"# {table.title}: scale `{scale}`", ""]
    lines += [f"Written by `{shown(['python', '-m', 'experiments.paper', *sys.argv[1:]], args)}`."]
    lines += ["", *describe(found), ""]
    if table.notes:
        lines += [table.notes, ""]
    lines += [
        f"| row | the paper's (its data and schedule) | ours, {unit}: mean [lowest, highest] "
        "| of objects to 32 px | seeds | loss at the end | images/s | CPU minutes a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        some = found[row.key, row.test]
        small = {seed: one.get("by_size", {}).get("small", {}) | {"state": one["state"]}
                 for seed, one in some.items()}  # fmt: skip
        cells = [row.what, row.paper, result(row, some, table.metric)]
        cells += [spread(values(small, table.metric)), str(len(some))]
        for field, digits in (("loss", 2), ("images_per_s", 1), ("cpu_minutes", 1)):
            got = [one[field] for one in some.values() if one.get(field) is not None]
            cells.append(f"{sum(got) / len(got):.{digits}f}" if got else "-")
        lines.append(f"| {' | '.join(cells)} |")
    if table.claims:
        lines += [
            "",
            "What these runs say to the paper's claims. Loss at the end: the mean over the last "
            "twentieth of the steps.",
            "",
            "| the claim | better | than | by mAP | by the loss at the end |",
            "|---|---|---|---|---|",
        ]
        for a, b, text in table.claims:
            if (a, "") in found and (b, "") in found:
                pair = found[a, ""], found[b, ""]
                lines.append(f"| {text} | `{a}` | `{b}` | {verdict(*pair, table.metric)} "
                             f"| {verdict(*pair, 'loss')} |")  # fmt: skip
    lines += ["", "Commands (seed 0):", "", "```"]
    budget = find_budget(table, scale, args)
    for row in rows:
        lines += [shown(conversion(row, scale, 0, args), args)] if row.start else []
        lines.append(shown(command(row, scale, 0, args, budget), args))
    return "\n".join([*lines, "```", ""])


def shown(words, args):
    """A command as it may be published: where things lie on this machine is nobody's affair."""
    text, places = shlex.join(words), {args.runs: "RUNS", args.out: "OUT", args.weights: "WEIGHTS"}
    places |= {args.voc_root: "DIR", args.coco_root: "COCO_DIR"}
    for path, name in sorted(places.items(), key=lambda x: -len(str(x[0]))):  # a/b before a
        if path and Path(path).is_absolute():
            text = text.replace(str(path), name)
    return text


def describe(found):
    """Commits, machines, torch, images: of the runs that the numbers come from."""
    about = [one["run"] for some in found.values() for one in some.values() if "run" in one]
    if not about:
        return ["Nothing has been run yet."]
    facts = []
    for title, get in (
        ("commit", lambda r: r["commit"]),
        ("torch", lambda r: r["torch"]),
        ("on", lambda r: r["machine"]),
        ("training images seen a run", lambda r: r["args"]["iterations"] * r["args"]["batch_size"]),
        ("data", lambda r: r["args"]["data"]),
        ("trained on", lambda r: " ".join(r["args"]["train_sets"])),
        ("measured on", lambda r: " ".join(r["args"]["eval_sets"])),
        ("seeds", lambda r: r["args"]["seed"]),
    ):
        different = sorted({str(get(r)) for r in about})
        facts.append(f"{title} {', '.join(different)}")
    return ["; ".join(facts) + "."]


def write(name, scale, args):
    """The page and the figure of a table, into --out."""
    table = TABLES[name]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figures").mkdir(exist_ok=True)
    page, picture = args.out / f"{name}-{scale}.md", args.out / "figures" / f"{name}-{scale}.svg"
    text = markdown(name, scale, args)
    rows = runs_of(table, scale)
    if name == "figure1":
        curves = {
            row.what: figures.read_log(folder_of(row, scale, args.seeds[0], args.runs))
            for row in rows
        }
        svg = figures.gradients({what: log for what, log in curves.items() if log})
    else:
        dots = []
        for row in rows:
            found = outcomes(row, scale, args.runs)
            lost = {seed: one for seed, one in found.items() if one["state"] != "done"}
            remark = result(row, lost, table.metric) if lost or not found else ""
            dots.append((f"{row.what} {row.test}", values(found, table.metric), remark))
        svg = figures.dots(dots, f"{table.title.split(' (')[0]}: scale {scale}")
    publish(table, scale, args)
    picture.write_text(svg)
    page.write_text(text + f"\n![{table.title}](figures/{picture.name})\n")
    print(f"wrote {page}, {picture} and measured.json")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("table", nargs="?", choices=list(TABLES), help="none: list all rows")
    add("--scale", choices=SCALES, default="laptop")
    add("--voc-root", metavar="DIR", help="as of train.py; without it `laptop` trains on shapes")
    add("--coco-root", metavar="DIR", help="as of train.py")
    add("--weights", metavar="DIR", help="holds torchvision's vgg16.pth and vgg16_bn.pth")
    add("--train-sets", nargs="+", metavar="SET", help="as of train.py")
    add("--eval-sets", nargs="+", metavar="SET", help="as of train.py")
    add("--seeds", type=int, nargs="+", help="default: 0 1 2 at the laptop scale, else 0")
    add("--minutes", type=float, help="of the run that sets the pace; all see as many images")
    add("--images", type=int, help="training images of each run, instead of --minutes")
    add("--only", nargs="+", metavar="KEY", help="run these rows alone (keys: the listing's --out)")
    add("--jobs", type=int, default=1, help="runs at once; more than one: a thread each")
    add("--stop-after", type=float, metavar="MINUTES", help="stop all then; go on another time")
    add("--runs", type=Path, default=Path("runs/paper"), help="folder of all runs")
    add("--out", type=Path, default=Path("docs"), help="folder of the pages and figures")
    own, train_flags = own_and_others(argv)
    args = parser.parse_args(own)
    args.train_flags = train_flags
    args.seeds = args.seeds or ([0, 1, 2] if args.scale == "laptop" else [0])
    if args.minutes and args.images:
        parser.error("--minutes and --images both limit a run: give one")
    keys = [row.key for row in TABLES[args.table].rows] if args.table else []
    unknown = set(args.only or ()) - set(keys)
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: {args.table} has {', '.join(keys)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: expected 1 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.table is None:
        listing(args)
        return 0
    failed, reached = run_missing(TABLES[args.table], args.scale, args)
    write(args.table, args.scale, args)
    if not reached:
        print("stopped; the same command goes on")
    return 1 if failed else 0 if reached else 130


if __name__ == "__main__":
    run_program(main)
