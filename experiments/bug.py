"""Guess the bug: one of a kind that published detectors had, planted where you do not see it.

    python -m experiments.bug                           the twelve, the easiest first
    python -m experiments.bug 7                         train with it and without: what do you see?
    python -m experiments.bug 7 --guess multibox_loss   is it in this function? (or FILE.py:LINE)
    python -m experiments.bug 7 --hint                  where to look
    python -m experiments.bug 7 --tell                  the line, who had it, the test that sees it

Both runs learn four drawn pictures by heart, in 240 steps on one core (some 45 CPU seconds); the
right one is kept for the next bug. runs/bugs/7.html has the numbers, curves, detections and
kinds of error of both. The bug is a line of tests/harness/mutants.py, planted in a copy of this
repository that is gone afterwards. For lecturers: docs/bug-answers.md.
"""

import argparse
import ast
import base64
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import eval as evaluation
from experiments import errors, figures, report
from metrics import Detections
from plumbing import sources
from plumbing.files import Record, decode_pixels, open_record
from plumbing.pictures import draw_boxes, letters, save_sheet
from plumbing.program import Progress, run_program
from plumbing.run_folder import is_ours
from plumbing.shapes import SHAPE_CLASSES, draw_shapes
from scratchdet import load_detector

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from harness import mutants  # noqa: E402

STEPS, PICTURES = 240, 4
DRAWING = 16  # the pictures' seed: six small objects, three of which no prior covers with IoU .5
BEST = 10  # detections that are drawn in a picture
HEAD = ["", "without", "with the bug", "with / without"]
NOTE = "Positives per image: the mean of all steps. mAP and AP50 lie between 0 and 1"
FLAGS = f"--overfit {PICTURES} --batch-size 4 --iterations {STEPS} --lr 0.06 --seed 0".split()
FLAGS += "--augment flip --backbone resnet18 --width 0.25 --workers 0".split()
FLAGS += "--train-sets 2007:train --eval-sets 2007:test --no-bf16".split()  # some CPUs have bf16


class Bug(NamedTuple):
    what: str  # of tests/harness/mutants.py
    hint: str
    seen: str  # the symptom, and why it is so
    who: str = "none that we know by name"  # had this bug, or one of its kind


# fmt: off
BUGS = [
    Bug("background detected",
        "Read the last line that the run printed. Which label is it, and who may have it?",
        "Training is right. The detector also reports background, class 0, as an object; this "
        "evaluation refuses such a label, others count it as a class."),
    Bug("decoded boxes lose half their size",
        "Lay the two loss curves on each other. What happens to the network's answers after the "
        "loss? And on which part of its object does each box lie?",
        "The loss is the right one's to the last digit, and nothing is found: training is right. "
        "Each box covers one quarter of its object, because one corner is the centre."),
    Bug("the first class is background",
        "Look at the green boxes of the pictures: nobody has trained those. What are they called?",
        "Even the ground truth has wrong names: each class has the name of the one before it, and "
        "the first is label 0, background, and is never learnt. Its priors have offsets to learn, "
        "but background's answers are set to 0: that part of the offset loss never falls.",
        "lzx1413/PytorchSSD #7"),
    Bug("background is a positive",
        "Look at the number of positives, and at how large the loss is from the first step on.",
        "The loss is tiny: it is divided by 8,732 positives per picture. All background counts, "
        "its offsets are pulled to 0, and little is learnt.",
        "a relative: lzx1413/PytorchSSD #7, where background and a class share a label"),
    Bug("divided by images, not by positives",
        "Compare the first steps of both runs: by what factor do they differ?",
        "Before anything is learnt the loss is as many times too large as there are positives per "
        "picture. So is every gradient, as if the learning rate were.",
        "balancap/SSD-Tensorflow #292"),
    Bug("head does not permute",
        "The numbers of all priors are there, and none is lost. Whose are they?",
        "The loss of the classes falls little, and small objects are never found: (N, A*k, H, W) "
        "was cut into rows of k as it lay in memory, so a row holds one channel of neighbouring "
        "cells. Maps of few cells suffer least.",
        "a relative: jwyang/fpn.pytorch #6 numbers anchors one way for scores, another for boxes"),
    Bug("rows of the first image for all",
        "It is the loss of the offsets that stays high. Would it with a batch of one picture?",
        "Every picture of a batch is given the boxes of the first ones, but for the one prior that "
        "each object is sure of. Which picture is the first changes from step to step, so the "
        "offsets can never be right.",
        "a relative: google/cameratrapai #45 gives the whole batch the answers of its first image"),
    Bug("boxes not mirrored with the image",
        "Half of the time all is right. What is random in this training?",
        "The loss stays above the right one, that of the offsets most: in every second picture "
        "the boxes lie where nothing is. Boxes near the middle suffer least.",
        "KaihuaTang/Scene-Graph-Benchmark.pytorch #92"),
    Bug("head permutes rows and columns",
        "Which objects are found, and where in the picture do they lie? Mirror it in your mind.",
        "Large objects are found, small ones away from the diagonal are not: cell (row, column) "
        "answers for cell (column, row). The maps are square, so nothing crashes.",
        "relatives: allanzelener/YAD2K #86, ultralytics/ultralytics #7247"),
    Bug("the easiest negatives",
        "The loss of the classes is far below the right one's from the start. Is that good? Count "
        "what is shown in the pictures.",
        "A low loss, and false alarms: only the background that was easy anyway is learnt.",
        "none that we know by name; amdegroot/ssd.pytorch #43 asks, but has that sort right"),
    Bug("IoU with sides one longer",
        "mAP and pictures are nearly right. Compare the positives. In which unit are the boxes?",
        "A ninth of the positives: almost no prior reaches an IoU of .5, so each object has only "
        "the one that is forced. A side is 1 longer: a pixel, if boxes were in pixels; but here 1 "
        "is the whole image.",
        "xg-chu/CrowdDet #47 (the areas have the + 1, the intersection has none)"),
    Bug("forced match lost",
        "Compare the positives per image to the last digit: which objects may have lost theirs? "
        "Then compare the objects by size.",
        "Small objects suffer: no prior reaches an IoU of .5 with some of them, and the one that "
        "each was promised is not given. So there is a little less than one positive per picture "
        "too few, and half of the small objects are missed. Large ones have enough.",
        "a relative: isl-org/Open3D-ML #602 marks the forced prior, but lets it learn another box"),
]
# fmt: on


def mutant_of(bug: Bug) -> mutants.Mutant:
    """Its entry in the table of planted bugs."""
    (mutant,) = [m for m in mutants.MUTANTS if m.what == bug.what and not m.compiled]
    return mutant


def lines_of(mutant: mutants.Mutant) -> range:
    """The lines of the file that the bug changes, counted from 1."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    first = text[: text.index(mutant.old)].count("\n") + 1
    return range(first, first + mutant.old.count("\n") + 1)


# ------------------------------------------------------------------------------ guesses

HOMES = (path for where in ("*.py", "ops/*.py", "plumbing/*.py") for path in ROOT.glob(where))
FILES = sorted((p.relative_to(ROOT).as_posix() for p in HOMES), key=lambda f: (f.count("/"), f))


class Function(NamedTuple):
    """A function or a class of FILES."""

    file: str
    path: str  # .scratchdet.Head.forward
    name: str  # Head.forward
    last: str  # forward
    lines: range  # from its first decorator on
    head: range  # decorators and signature
    calls: set[str]  # names of functions and classes


@functools.cache
def functions() -> list[Function]:
    """All of them; what is inside another comes after it."""
    found, modules = [], {Path(file).stem for file in FILES} | {"ops", "self"}

    def called(call: ast.Call) -> str:
        """The name in `name()`, `module.name()` or `self.name()`; of other objects nobody knows."""
        *owner, name = ast.unparse(call.func).split(".")
        return name if not owner or owner[-1] in modules else ""

    def walk(node: ast.AST, file: str, path: str, outer: str = "") -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                walk(child, file, path, outer)
                continue
            name = f"{outer}{child.name}"
            first = min(n.lineno for n in (child, *child.decorator_list))
            lines, head = range(first, child.end_lineno + 1), range(first, child.body[0].lineno)
            calls = {called(n) for n in ast.walk(child) if isinstance(n, ast.Call)} - {""}
            found.append(Function(file, path + name, name, child.name, lines, head, calls))
            walk(child, file, path, f"{name}.")

    for file in FILES:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        walk(ast.parse((ROOT / file).read_text(encoding="utf-8")), file, f".{module}.")
    return found


def around(mutant: mutants.Mutant) -> list[Function]:
    """What the bug stands in, the innermost last."""
    line = lines_of(mutant)[0]
    return [f for f in functions() if f.file == mutant.file and line in f.lines]


def named(name: str) -> list[Function]:
    """The functions of that name: `crop`, `BasicBlock.forward`, `reference.nms`."""
    found = [f for f in functions() if f.path.endswith(f".{name}")]
    return [f for f in found if f.name == name] or found


def answer(mutant: mutants.Mutant, guess: str) -> str:
    """What to say to a guess: the name of a function or class, or FILE.py:LINE."""
    name, _, line = guess.removeprefix("./").removesuffix("()").partition(":")
    inside, wanted = around(mutant), lines_of(mutant)
    if line:
        files = [f for f in FILES if f"/{f}".endswith(f"/{name}")] or [name]
        file = name if name in files else files[0]
        if not line.isdecimal() or not (ROOT / file).is_file():
            raise ValueError(f"--guess {guess}: expected a function's name, or FILE.py:LINE")
        if file != name and len(files) > 1:
            return f"Which {name}? {', '.join(files)}"
        number, same = int(line), file == mutant.file
        asked = [f for f in functions() if f.file == file and number in f.lines][-1:]
        near = wanted[0] - 3 <= number <= wanted[-1] + 3
        yes = same and (near or any(number in f.head for f in inside))
    else:
        asked = named(name)
        if not asked:
            return f"There is no function or class {name}"
        if len(names := dict.fromkeys(f.name for f in asked)) > 1:
            return f"Which {name}? {', '.join(names)}"
        yes = any(f in inside for f in asked)
        same = mutant.file in {f.file for f in asked}
    if yes:
        return "Yes, there. --tell has the rest"
    if any(f in inside for f in asked):
        where = "Near: it is in this function, but not in this line"
    elif any(f.calls & {g.last for g in inside} for f in asked):
        where = "Near: this calls the function with the bug"
    elif any(f.last in inside[-1].calls for f in asked):
        where = "Near: the function with the bug calls this"
    else:
        where = "In this file, but not there" if same else "Not there"
    return f"{where}. --hint helps"


# ------------------------------------------------------------------------------ both runs


def learn(repo: Path, out: Path, data: Path) -> str:
    """Train in this copy of the repository, and draw what it detects; -> the error, if any."""
    env = {"SCRATCHDET_OPS": "reference", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    how = {"cwd": repo, "env": os.environ | env, "capture_output": True, "text": True}
    flags = [*FLAGS, "--voc-root", data, "--classes", data.parent / "names.txt", "--out", out]
    ends = []
    for command in (["train.py", *flags], ["-m", "experiments.bug", "--draw", out]):
        said = subprocess.run([sys.executable, *map(str, command)], **how)
        if said.returncode != 0:  # the last line that it printed, if it printed one
            ends += [f"exit status {said.returncode}", *said.stderr.strip().splitlines()][-1:]
    return ends[0] if ends else ""


def draw(run: Path) -> None:
    """RUN/seen/1.jpg, ...: what it detects in its pictures, by the code of this copy."""
    model, checkpoint = load_detector(run / "last.pt")
    saved, classes = argparse.Namespace(**checkpoint["args"]), model.config.classes
    # as train.py reads them: with the network's classes given, objects of no class are left out
    records = sources.open_data(saved, saved.train_sets)[0][: saved.overfit]
    threshold = shown_from(run, classes)
    (run / "seen").mkdir(exist_ok=True)
    found = evaluation.run_detector(model, records, what=None)
    for n, (record, one) in enumerate(zip(records, found, strict=True), start=1):
        picture(record, one, classes, threshold).save(run / "seen" / f"{n}.jpg", quality=85)


def shown_from(run: Path, classes: Sequence[str]) -> np.ndarray:
    """(C + 1,) scores: each class's threshold in the table of errors, or .3; that of label 0."""
    results = run / "results.json"
    if not results.is_file():
        return np.full(len(classes) + 1, 0.3)
    return np.append(errors.thresholds(json.loads(results.read_text()), classes), 0.3)


def picture(record: Record, found: Detections, classes, threshold: np.ndarray) -> Image.Image:
    """Ground truth and the best detections of a picture, 600 pixels wide."""
    found = Detections(*(column[: errors.PER_IMAGE] for column in found))
    shown = np.flatnonzero(found.scores >= threshold[found.labels - 1])
    best, more = shown[np.argsort(-found.scores[shown], kind="stable")[:BEST]], len(shown) - BEST
    names = [*classes, "label 0"]  # names[0 - 1] is the last
    image = decode_pixels(open_record(record), record).convert("RGB")
    scale = 600 / image.width
    image = image.resize((600, round(scale * image.height)), Image.Resampling.BICUBIC)
    # never with a legend: pictures of two runs can be compared only if both have names and scores
    image = draw_boxes(image, record.boxes_xyxy * scale, record.labels, None, names, crowded=False)
    boxes, scores, labels = (column[best] for column in found)
    image = draw_boxes(image, boxes * scale, labels, scores, names, crowded=False)
    if more > 0:
        write_on(image, f"+ {more} more", 28)
    return image


def write_on(image: Image.Image, text: str, size: int, *, left: bool = False) -> None:
    """White letters with a black edge, at the top right or left."""
    pen, font = ImageDraw.Draw(image), letters(size)
    x = 8 if left else image.width - 8 - pen.textlength(text, font)
    pen.text((x, 4), text, "white", font, stroke_width=3, stroke_fill="black")


def code_now() -> str:
    """A hash of all that a run here runs: FILES, the kinds of error, and this."""
    paths = [ROOT / file for file in (*FILES, "experiments/errors.py", "experiments/bug.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def steps(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def play(number: int, folder: Path) -> None:
    """Train with the bug, and without it unless that is done; show both."""
    right, wrong, mark = folder / "right", folder / f"bug-{number}", folder / "right" / "code"
    data = draw_shapes(folder / "shapes", num_train=PICTURES, num_test=1, seed=DRAWING)
    (data.parent / "names.txt").write_text("\n".join(SHAPE_CLASSES))
    with tempfile.TemporaryDirectory() as copy, ThreadPoolExecutor(2) as pool:
        repo = mutants.copy_of_the_repository(Path(copy))
        mutants.plant(repo, mutant_of(BUGS[number - 1]))
        runs = {wrong: repo, right: ROOT}
        if mark.is_file() and mark.read_text() == code_now():  # by just this code
            del runs[right]
        for out in runs:
            inside = [*out.iterdir()] if out.is_dir() else []
            if not all(is_ours(path) or path.name in ("seen", "code") for path in inside):
                raise ValueError(f"--out {folder}: {out.name}/ there is no run; choose another")
            shutil.rmtree(out, ignore_errors=True)
        tasks = {out: pool.submit(learn, where, out, data) for out, where in runs.items()}
        progress = Progress(len(tasks) * STEPS, "learning", unit="steps", every=15)
        while not all(task.done() for task in tasks.values()):
            if (done := sum(map(steps, tasks))) < progress.total:
                progress(done)
            time.sleep(0.5)
    said = {out: task.result() for out, task in tasks.items()}  # raises what `learn` raised
    ends = [f"{out.name} ended with {error}" for out, error in said.items() if error]
    if said.get(right) == "":
        mark.write_text(code_now())
    for end in ends:
        print(end)
    rows = compare(right, wrong)
    for name, *cells in [HEAD, *rows]:
        print(f"{name:28}{cells[0]:>10}{cells[1]:>14}{cells[2]:>16}")
    print(NOTE)
    if steps(wrong):
        html = page(number, right, wrong, rows, ends)
        (folder / f"{number}.html").write_text(html, encoding="utf-8")
        print(f"{folder}/{number}.html: the same, with curves, detections and errors of both")
    print(f"Where is it? python -m experiments.bug {number} --guess FUNCTION (or FILE.py:LINE), "
          "--hint, --tell")  # fmt: skip


def symptoms(run: report.Run) -> dict[str, float | None]:
    """What a person would see of a run: {name: number}."""
    log, rows = run.log, {}
    for part in ("loss", "loc", "conf"):
        rows[f"{part}, step 1"] = log[0][part]
        for step in sorted({min(step, len(log)) for step in (20, 100, len(log))}):
            mean = sum(row[part] for row in log[step - 10 : step]) / 10
            rows[f"{part}, steps {step - 9} to {step}"] = mean
    positives = [row["positives"] for row in log]
    rows["positives per image"] = sum(positives) / len(log)
    rows["positives, lowest step"], rows["positives, highest step"] = min(positives), max(positives)
    if run.results:
        rows["mAP"] = run.results["mAP_11point"]
        for size, row in run.results["by_size"].items():
            rows[f"mAP, {size} objects"] = row["mAP_11point"]
    if found := run.errors:
        rows["objects"], rows["of them found"] = found["objects"], found["found"]
        rows["detections shown"], rows["of them right"] = found["shown"], found["right"]
        for kind, row in found["kinds"].items():
            rows[f"AP50 lost to {kind}"] = row["cost"] / 100  # points -> the unit of mAP
    return rows


def compare(right: Path, wrong: Path) -> list[tuple[str, str, str, str]]:
    """Rows: what is measured, without the bug, with it, and their ratio."""
    a, b = (symptoms(report.read_run(r)) if steps(r) >= 10 else {} for r in (right, wrong))
    rows = []
    for name in a or b:
        both = a.get(name), b.get(name)
        cells = ["-" if x is None else report.plain(x) for x in both]
        ratio = f"{both[1] / both[0]:.3g}" if both[0] and both[1] is not None else "-"
        rows.append((name, *cells, ratio))
    return rows


def page(number: int, right: Path, wrong: Path, rows: list[tuple], ends: list[str]) -> str:
    """Both runs as one HTML page, which does not say what the bug is."""
    folders = [run for run in (right, wrong) if steps(run)]
    runs = [report.read_run(run) for run in folders]
    names = report.names(runs)
    numbers = "".join(f"<p><b>{escape(end)}</b>, so nothing was measured.</p>" for end in ends)
    numbers += report.table(HEAD, [[escape(cell) for cell in row] for row in rows])
    numbers += f"<p>{NOTE}; the table of errors below has AP50 in points, from 0 to 100.</p>"
    seen = ("<p>Ground truth green. Detections from each class's best threshold up, as the table "
        "counts them; of a run that ended with an error those of a score of .3 or more. Of more "
        f"than {BEST} in a picture the best {BEST} are drawn, all with name and score.</p>"
    )  # fmt: skip
    for n in range(1, PICTURES + 1):  # both runs side by side
        pictures = "".join(
            f'<figure class="of run{i}"><img alt="{escape(run.name)}, picture {n}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'
            f"<figcaption>{names[i]}, picture {n}</figcaption></figure>"
            for i, run in enumerate(folders) if (path := run / "seen" / f"{n}.jpg").is_file()
        )  # fmt: skip
        seen += f'<div class="panels">{pictures}</div>'
    sections = {"Numbers": numbers, "Detections": seen, "Training": report.training(runs),
                "Errors": report.errors(runs), "Measures": report.results(runs)}  # fmt: skip
    return report.document(f"Bug {number}", sections, names)


def write_figures(folder: Path, out: Path) -> None:
    """Loss curves (SVG) and first pictures (JPEG) of all, also of runs that are not made yet."""
    width, height, parts, curves, pictures = 250, 180, [], [], []
    for number in range(1, len(BUGS) + 1):
        if steps(folder / f"bug-{number}") < STEPS:
            play(number, folder)
    for i, name in enumerate(["right", *(f"bug-{n + 1}" for n in range(len(BUGS)))]):
        with Image.open(folder / name / "seen" / "1.jpg") as image:
            pictures.append(image.convert("RGB"))
        write_on(pictures[-1], name, 44, left=True)
        curves.append(report.series(report.read_run(folder / name))["training loss"])
        if i > 0:
            x, y = (i - 1) % 4 * width, (i - 1) // 4 * (height + 20)
            lines = {0: curves[0], 1: curves[i]}
            parts.append(figures.text(x + 52, y + 16, f"bug {i}", weight="bold"))
            parts += figures.chart(lines, f"bug{i}", x, y + 16, width, height, log=True)
    (out / "bugs.svg").write_text(figures.page(4 * width, y + height + 20, parts))
    with tempfile.TemporaryDirectory() as scratch:
        save_sheet(Path(scratch, "bugs.png"), pictures, columns=5)
        (out / "bugs.jpg").write_bytes(report.shrunk(Path(scratch, "bugs.png"), 1000))


# ------------------------------------------------------------------------------ the answer


def tell(number: int) -> str:
    """All about a bug."""
    bug = BUGS[number - 1]
    mutant = mutant_of(bug)
    return (
        f"{mutant.file}:{lines_of(mutant)[0]} in {around(mutant)[-1].name}: {mutant.what}\n"
        f"  - {mutant.old}\n  + {mutant.new}\n{bug.seen}\nWho had it: {bug.who}\n"
        f"The test that sees it: pytest tests/{mutant.tests} -k '{mutant.where}'"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("number", nargs="?", type=int, choices=range(1, len(BUGS) + 1))
    parser.add_argument("--guess", metavar="WHERE", help="FUNCTION, CLASS.METHOD or FILE.py:LINE")
    parser.add_argument("--hint", action="store_true", help="where to look")
    parser.add_argument("--tell", action="store_true", help="the line, who had it, which test")
    parser.add_argument("--out", metavar="DIR", default="runs/bugs", help="of runs and pages")
    parser.add_argument("--figures", action="store_true", help="of all, for docs/bug-answers.md")
    parser.add_argument("--draw", metavar="RUN", help=argparse.SUPPRESS)  # by `learn`, in the copy
    args = parser.parse_args(argv)
    if args.draw:
        draw(Path(args.draw))
    elif args.figures:
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
