"""Guess the bug: a real bug of a published detector, planted where you do not see it.

    python -m experiments.bug                           the twelve, the easiest first
    python -m experiments.bug 7                         train with it and without: what do you see?
    python -m experiments.bug 7 --guess multibox_loss   is it in this function? (or FILE.py:LINE)
    python -m experiments.bug 7 --hint                  where to look
    python -m experiments.bug 7 --tell                  the line, who had it, the test that sees it

Both runs learn four pictures of drawn shapes by heart, in 120 steps, each on one core for some 25
CPU seconds; the right one is kept for the next bug. runs/bugs/7.html has curves, detections
and the kinds of error of both. The bug is a line of tests/harness/mutants.py, planted in a copy of
this repository that is gone afterwards. docs/lecture.md has the symptoms that were measured.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from experiments import figures, report
from plumbing.pictures import letters, save_sheet
from plumbing.program import Progress, run_program
from plumbing.shapes import SHAPE_CLASSES, draw_shapes

ROOT = Path(__file__).resolve().parents[1]
STEPS, PICTURES = 120, 4
FLAGS = ["--overfit", str(PICTURES), "--batch-size", "4", "--iterations", str(STEPS)]
FLAGS += ["--lr", "0.06", "--seed", "0"]
FLAGS += ["--augment", "flip", "--backbone", "resnet18", "--width", "0.25", "--workers", "0"]
FLAGS += ["--train-sets", "2007:train", "--eval-sets", "2007:test"]


class Bug(NamedTuple):
    what: str  # of tests/harness/mutants.py
    hint: str
    seen: str  # the symptom, and why it is so
    who: str  # had this bug, or one of its kind


BUGS = [
    Bug(
        "background detected",
        "Read the last line that the run printed. Which label is it, and who may have it?",
        "Training is right. The detector also reports background, class 0, as an object; the "
        "evaluation refuses such a label, where others would count it as a class or crash later.",
        "none that we know by name",
    ),
    Bug(
        "decoded boxes lose half their size",
        "Lay the two loss curves on each other. What happens to the network's answers after the "
        "loss? And on which part of its object does each box lie?",
        "The loss is the right one's to the last digit, and nothing is found: training is right. "
        "Each box covers one quarter of its object, because one corner is the centre.",
        "none that we know by name",
    ),
    Bug(
        "the first class is background",
        "Look at the green boxes of the pictures: nobody has trained those. What are they called?",
        "Even the ground truth has wrong names: every class is called as the one before it, and "
        "the first one is label 0, which is background and is never learnt.",
        "lzx1413/PytorchSSD #7",
    ),
    Bug(
        "background is a positive",
        "Look at the number of positives, and at how large the loss is from the first step on.",
        "The loss is tiny: it is divided by 8,732 positives per picture. All background counts, "
        "its offsets are pulled to 0, and little is learnt.",
        "a relative: lzx1413/PytorchSSD #7, where background and a class share a label",
    ),
    Bug(
        "divided by images, not by positives",
        "Compare the first steps of both runs: by what factor do they differ?",
        "Before anything is learnt the loss is as many times too large as there are positives per "
        "picture. So is every gradient, as if the learning rate were.",
        "balancap/SSD-Tensorflow #292",
    ),
    Bug(
        "head does not permute",
        "The numbers of all priors are there, and none is lost. Whose are they?",
        "The loss of the classes falls little, and small objects are never found: (N, A*k, H, W) "
        "was cut into rows of k as it lay in memory, so that a row holds one channel of "
        "neighbouring cells. Maps of few cells suffer least.",
        "a relative: jwyang/fpn.pytorch #6 numbers anchors one way for scores, another for boxes",
    ),
    Bug(
        "rows of the first image for all",
        "It is the loss of the offsets that stays high. Would it with a batch of one picture?",
        "Every picture of a batch is given the boxes of the first one. Which picture is the first "
        "changes from step to step, so the offsets can never be right.",
        "a relative: google/cameratrapai #45 gives the whole batch the answers of its first image",
    ),
    Bug(
        "boxes not mirrored with the image",
        "Half of the time all is right. What is random in this training?",
        "The loss stays above the right one, that of the offsets most: in every second picture the "
        "boxes lie where nothing is. Boxes near the middle suffer least.",
        "KaihuaTang/Scene-Graph-Benchmark.pytorch #92",
    ),
    Bug(
        "head permutes rows and columns",
        "Which objects are found, and where in the picture do they lie? Mirror it in your mind.",
        "Large objects are found, small ones away from the diagonal are not: cell (row, column) "
        "answers for cell (column, row). The maps are square, so nothing crashes.",
        "relatives: allanzelener/YAD2K #86, ultralytics/ultralytics #7247",
    ),
    Bug(
        "the easiest negatives",
        "The loss of the classes is far below the right one's from the start. Is that good? Count "
        "what is shown in the pictures.",
        "A low loss and many false alarms: only the background that was easy anyway is learnt.",
        "none that we know by name; amdegroot/ssd.pytorch #43 asks about that sort, which is right",
    ),
    Bug(
        "IoU with sides one longer",
        "mAP and pictures are nearly right. Compare the positives per image. In which unit are the "
        "boxes?",
        "A tenth of the positives: almost no prior reaches an IoU of .5, so each object has only "
        "the one that is forced. A pixel was added to a side, but the boxes are in units of the "
        "image, where 1 is all of it.",
        "xg-chu/CrowdDet #47 (the areas have the + 1, the intersection has none)",
    ),
    Bug(
        "forced match lost",
        "Nearly right, with fewer positives. Which objects are worse, the small or the large?",
        "Small objects suffer: no prior reaches an IoU of .5 with them, and the one that each of "
        "them was promised is not given. Large ones have enough.",
        "a relative: isl-org/Open3D-ML #602 marks the forced prior, but lets it learn another box",
    ),
]


def mutant_of(bug: Bug):
    """Its entry in the table of planted bugs."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from harness import mutants

    (mutant,) = [m for m in mutants.MUTANTS if m.what == bug.what and not m.compiled]
    return mutant


def lines_of(mutant) -> range:
    """The lines of the file that the bug changes, counted from 1."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    first = text[: text.index(mutant.old)].count("\n") + 1
    return range(first, first + mutant.old.count("\n") + 1)


def around(mutant) -> dict[str, range]:
    """What the bug stands in: {name of a function, class or constant: its lines}."""
    tree, line = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8")), lines_of(mutant)[0]
    found = {}
    for node in ast.walk(tree):
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign) and node in tree.body:
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if names and node.lineno <= line <= node.end_lineno:
            found |= {name: range(node.lineno, node.end_lineno + 1) for name in names}
    return found


def is_there(mutant, guess: str) -> bool:
    """A guess is the name of what the bug stands in, or a line next to it."""
    name, _, line = guess.removeprefix("./").partition(":")
    if not line:
        return name.removesuffix("()") in around(mutant)
    if not line.isdecimal() or not (ROOT / name).is_file():
        raise ValueError(f"--guess {guess}: expected a function's name, or FILE.py:LINE")
    near = lines_of(mutant)
    return name == mutant.file and near[0] - 3 <= int(line) <= near[-1] + 3


def answer(mutant, guess: str) -> str:
    """What to say to a guess."""
    if is_there(mutant, guess):
        return "Yes, there. --tell has the rest"
    name, _, line = guess.removeprefix("./").partition(":")
    if line:
        return (
            "In this file, but not there" if name == mutant.file else "Not there"
        ) + ". --hint helps"
    files = [p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.py"), *ROOT.glob("ops/*.py"),
             *ROOT.glob("plumbing/*.py"))]  # fmt: skip
    word = re.compile(rf"^\s*(?:def|class) {re.escape(name.removesuffix('()'))}\b", re.MULTILINE)
    homes = [f for f in files if word.search((ROOT / f).read_text(encoding="utf-8"))]
    if not homes:
        return f"There is no function or class {name}"
    return (
        "In this file, but not there" if mutant.file in homes else "Not there"
    ) + ". --hint helps"


# ------------------------------------------------------------------------------ both runs


def learn(repo: Path, out: Path, data: Path) -> int:
    """Train in this copy of the repository, and count its errors; -> exit status."""
    env = os.environ | {"SCRATCHDET_OPS": "reference", "OMP_NUM_THREADS": "1"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    flags = [*FLAGS, "--voc-root", data, "--classes", data.parent / "names.txt", "--out", out]
    with open(out.with_suffix(".txt"), "w") as said:
        for command in (["train.py", *flags], ["-m", "experiments.errors", out]):
            command = [sys.executable, *map(str, command)]
            status = subprocess.run(command, cwd=repo, env=env, stdout=said, stderr=said).returncode
            if status != 0:
                break
    return status


def code_now() -> str:
    """A hash of all that a run here runs: the Python on top, in plumbing/ and in ops/."""
    digest = hashlib.sha256()
    for pattern in ("*.py", "plumbing/*.py", "ops/*.py", "experiments/errors.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_current(run: Path) -> bool:
    """Was this run made by just this code?"""
    mark = run / "code"
    return mark.is_file() and mark.read_text() == code_now()


def steps(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def play(number: int, folder: Path) -> None:
    """Train with the bug, and without it unless that is done; show both."""
    right, wrong, mutant = folder / "right", folder / f"bug-{number}", mutant_of(BUGS[number - 1])
    from harness import mutants

    data = draw_shapes(folder / "shapes", num_train=PICTURES, num_test=1)
    (data.parent / "names.txt").write_text("\n".join(SHAPE_CLASSES))
    with tempfile.TemporaryDirectory() as copy, ThreadPoolExecutor(2) as pool:
        repo = mutants.copy_of_the_repository(Path(copy))
        mutants.plant(repo, mutant)
        runs = {wrong: repo} if is_current(right) else {wrong: repo, right: ROOT}
        for out in runs:
            shutil.rmtree(out, ignore_errors=True)
        tasks = {out: pool.submit(learn, where, out, data) for out, where in runs.items()}
        progress = Progress(len(tasks) * STEPS, "learning", unit="steps", every=15)
        while not all(task.done() for task in tasks.values()):
            if (done := sum(map(steps, tasks))) < progress.total:
                progress(done)
            time.sleep(0.5)
    for out, task in tasks.items():
        if out == right and task.result() == 0:
            (right / "code").write_text(code_now())
        if task.result() != 0:
            last = out.with_suffix(".txt").read_text().strip().splitlines()[-1:]
            print(f"{out.name} ended with: {''.join(last)}")
    print(table(right, wrong))
    if steps(wrong):
        report.write([right, wrong], folder / f"{number}.html")
        print(f"{folder}/{number}.html: curves, detections and errors of both")
    print(f"Where is it? python -m experiments.bug {number} --guess FUNCTION (or FILE.py:LINE), "
          "--hint, --tell")  # fmt: skip


def symptoms(run: Path) -> dict[str, str]:
    """What a person would see of a run, as rows of a table."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = {}
    for part in ("loss", "loc", "conf"):
        for step in sorted({min(step, len(log)) for step in (20, 100, len(log))}):
            mean = sum(row[part] for row in log[step - 10 : step]) / 10
            rows[f"{part}, steps {step - 9} to {step}"] = f"{mean:.2f}"
    rows["positives per image"] = f"{sum(row['positives'] for row in log) / len(log):.1f}"
    if (run / "results.json").is_file():
        results = json.loads((run / "results.json").read_text())
        rows["mAP"] = f"{results['mAP_11point']:.3f}"
        for size, row in results["by_size"].items():
            rows[f"mAP, {size} objects"] = report.shown(row["mAP_11point"], 3)
    if (run / "errors.json").is_file():
        errors = json.loads((run / "errors.json").read_text())
        for kind in ("found", "shown", "right"):
            rows[kind] = (
                f"{errors[kind]} of {errors['objects']}" if kind == "found" else str(errors[kind])
            )
        for kind, row in errors["kinds"].items():
            rows[f"AP50 lost to {kind}"] = f"{row['cost']:.1f}"
    return rows


def table(right: Path, wrong: Path) -> str:
    columns = [symptoms(run) if steps(run) >= 10 else {} for run in (right, wrong)]
    lines = [f"{'':28}{'without':>10}{'with the bug':>14}"]
    for name in columns[0]:
        lines.append(f"{name:28}{columns[0][name]:>10}{columns[1].get(name, '-'):>14}")
    return "\n".join(lines)


def write_figures(folder: Path, out: Path) -> None:
    """Loss curves of all twelve (SVG), and what each detects in the first picture (JPEG).

    A run that is not in `folder` is made first.
    """
    width, height, parts, pictures = 250, 180, [], []
    for number in range(1, len(BUGS) + 1):
        if steps(folder / f"bug-{number}") < STEPS:
            play(number, folder)
    runs = {name: report.read_run(folder / name)
            for name in ("right", *(f"bug-{n}" for n in range(1, len(BUGS) + 1)))}  # fmt: skip
    curves = [report.series(run)["training loss"] for run in runs.values()]
    for i, curve in enumerate(curves[1:]):
        x, y = i % 4 * width, i // 4 * (height + 20)
        parts.append(figures.text(x + 52, y + 16, f"bug {i + 1}", weight="bold"))
        lines = {0: curves[0], 1: curve}
        parts += figures.chart(lines, f"bug{i}", x, y + 16, width, height, log=True)
    with Image.open(next((folder / "shapes").glob("*/VOC2007/JPEGImages/train00000.jpg"))) as first:
        shape = 300, round(300 * first.height / first.width)
    for name, run in runs.items():
        with Image.open(run.sheet) as sheet:
            picture = sheet.convert("RGB").crop((0, 0, *shape))
        ImageDraw.Draw(picture).text((6, 4), name, fill="white", font=letters(20),
                                     stroke_width=3, stroke_fill="black")  # fmt: skip
        pictures.append(picture)
    rows = -(-len(BUGS) // 4)
    (out / "bugs.svg").write_text(figures.page(4 * width, rows * (height + 20), parts))
    with tempfile.TemporaryDirectory() as scratch:
        save_sheet(Path(scratch, "bugs.png"), pictures, columns=5)
        (out / "bugs.jpg").write_bytes(report.shrunk(Path(scratch, "bugs.png"), 1000))


# ------------------------------------------------------------------------------ the answer


def tell(number: int) -> str:
    """All about a bug."""
    bug = BUGS[number - 1]
    mutant, where = mutant_of(bug), list(around(mutant_of(bug)))
    name = f" in {where[-1]}" if where else ""
    return (
        f"{mutant.file}:{lines_of(mutant)[0]}{name}: {mutant.what}\n  - {mutant.old}\n"
        f"  + {mutant.new}\n{bug.seen}\nWho had it: {bug.who}\n"
        f"The test that sees it: pytest tests/{mutant.tests} -k '{mutant.where}'"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("number", nargs="?", type=int, choices=range(1, len(BUGS) + 1))
    parser.add_argument("--guess", metavar="WHERE", help="a function's name, or FILE.py:LINE")
    parser.add_argument("--hint", action="store_true", help="where to look")
    parser.add_argument("--tell", action="store_true", help="the line, who had it, which test")
    parser.add_argument("--out", metavar="DIR", default="runs/bugs", help="of runs and pages")
    parser.add_argument("--figures", action="store_true", help="all twelve, for docs/lecture.md")
    args = parser.parse_args(argv)
    if args.figures:
        write_figures(Path(args.out).absolute(), ROOT / "docs" / "figures")
    elif args.number is None:
        if args.guess or args.hint or args.tell:
            raise ValueError(f"which bug? Expected its number, 1 to {len(BUGS)}")
        print(f"{len(BUGS)} bugs, the easiest first: python -m experiments.bug 1")
    elif args.guess:
        print(answer(mutant_of(BUGS[args.number - 1]), args.guess))
    elif args.hint:
        print(BUGS[args.number - 1].hint)
    elif args.tell:
        print(tell(args.number))
    else:
        play(args.number, Path(args.out).absolute())


if __name__ == "__main__":
    run_program(main)
