"""What changed from one detector to another, and how sure is it?

    python -m experiments.compare A                       mAP and its 95 % interval
    python -m experiments.compare A B                     in a sentence, in numbers, by objects
    python -m experiments.compare A B --out page.html     the same as a page, with pictures

A and B are run folders of train.py, or checkpoints. Both are measured on the same images: those
that A was evaluated on, or --voc-root DIR --eval-sets SET.

Intervals are a paired bootstrap: the images are drawn again, with replacement, 1,000 times, and
both detectors are measured on each draw; the interval holds the middle 95 % of the results. It says
what other images would change, not what another seed of training would: for that, train several.
A draw counts some images several times, so its curves have higher peaks: the draws may lie a little
above the value itself.

mAP is VOC's, 11-point for VOC2007 and the area elsewhere, of all objects and by their size; the
kinds of error, and what they cost in points of AP50, are those of errors.py.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

import eval as evaluation
from experiments import errors, report
from metrics import SIZES, VocMatches, mean, voc_average, voc_match, voc_outcome
from plumbing.program import Progress, check_file, check_range, run_program
from plumbing.sources import add_eval_flags, check_eval_flags

PARTS = {"all": (0.0, np.inf), **SIZES}  # objects by their side, as in metrics.voc_ap
PICTURES = 6  # of objects won, and of objects lost


# ------------------------------------------------------------------------------ how sure


def draws_of(images: int, draws: int):
    """Yields how often each image counts (N,): once each, then `draws` times as it was drawn."""
    rng, progress = np.random.default_rng(0), Progress(draws, "resampling", unit="draws")
    yield np.ones(images, int)
    for draw in range(1, 1 + draws):
        yield np.bincount(rng.integers(images, size=images), minlength=images)
        progress(draw)


class Detector(NamedTuple):
    """What one detector says about the images, matched by both rules."""

    matches: VocMatches
    verdicts: errors.Verdicts
    threshold: Array  # (C,)

    def found(self) -> Array:  # (G,) bool
        return errors.is_found(self.verdicts, self.threshold)


def bootstrap(detectors: list[Detector], draws: int, metric: str) -> dict[str, Array]:
    """{measure: (1 + draws, M)} of M detectors: mAP in percent of each of `PARTS`, AP50 and the
    cost of each kind of error in points. Row 0 is of the images as they are."""
    outcomes = [[voc_outcome(one.matches, *sides) for sides in PARTS.values()] for one in detectors]
    kinds = (None, *range(len(errors.KINDS)))
    columns = [[errors.mend(one.verdicts, kind) for kind in kinds] for one in detectors]
    names = [*PARTS, "AP50", *errors.KINDS]
    values = np.empty((1 + draws, len(detectors), len(names)))
    for draw, times in enumerate(draws_of(detectors[0].matches.images, draws)):
        for m, one in enumerate(detectors):
            both = [voc_average(one.matches, outcome, times)[:2] for outcome in outcomes[m]]
            row = [100 * mean(ap11 if metric == "voc07" else area) for ap11, area in both]
            num_classes = one.matches.num_classes
            after = [errors.ap50(column, num_classes, times) for column in columns[m]]
            costs = [max(0.0, ap - after[0]) for ap in after[1:]]
            values[draw, m] = [*row, after[0], *costs]
    return {name: values[..., i] for i, name in enumerate(names)}


def interval(values: Array) -> str:
    """(1 + draws,) -> "81.7 [79.9, 83.2]"."""
    if np.isnan(values[0]):
        return "-"
    ends = np.nanpercentile(values[1:], (2.5, 97.5))
    value, low, high = (round(float(x), 1) + 0.0 for x in (values[0], *ends))  # no -0.0
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


# ----------------------------------------------------------------------- object by object


def won_and_lost(a: Array, b: Array) -> tuple[Array, Array]:
    """found by A (G,), by B (G,) -> the rows of the objects that B alone finds, that A alone."""
    return np.flatnonzero(b & ~a), np.flatnonzero(a & ~b)


def tally(one: Detector, won: Array, lost: Array, classes: Sequence[str]) -> dict:
    """{class or size: (objects, won, lost)}."""
    v, side = one.verdicts, one.matches.object_side
    groups = {name: (side >= low) & (side < high) for name, (low, high) in SIZES.items()}
    groups |= {name: v.objects.label == c for c, name in enumerate(classes, start=1)}
    real = ~v.objects.difficult
    return {name: (int((real & some).sum()), int(some[won].sum()), int(some[lost].sum()))
            for name, some in groups.items()}  # fmt: skip


def confused(matrix: Array, other: Array, classes: Sequence[str]) -> tuple[int, int, str]:
    """The two classes whose confusion, in either direction, changes most: how often in A, in B,
    and their names as "cow and sheep"."""
    n = len(classes)
    a, b = (m[:n, :n] + m[:n, :n].T for m in (matrix, other))
    change = np.triu(np.abs(a - b), k=1)
    if n < 2 or not change.any():
        return 0, 0, ""
    i, j = np.unravel_index(change.argmax(), change.shape)
    return int(a[i, j]), int(b[i, j]), f"{classes[i]} and {classes[j]}"


def sentence(values: dict[str, Array], counts: dict, pair: tuple[int, int, str]) -> str:
    """What a person can repeat."""
    won, lost = (sum(counts[size][k] for size in SIZES) for k in (1, 2))
    objects = sum(counts[size][0] for size in SIZES)
    gain = won - lost
    words = f"B finds {abs(gain):,} objects {'more' if gain > 0 else 'fewer'} of {objects:,}"
    if gain == 0:
        words = f"Both find equally many of {objects:,} objects"
    by_size = {size: counts[size][1] - counts[size][2] for size in SIZES}
    most = max(by_size, key=lambda size: by_size[size] * np.sign(gain))
    if gain and 2 * abs(by_size[most]) > abs(gain):
        words += f", most of them {most}"
    words += f" ({won:,} won, {lost:,} lost)"
    before, after, names = pair
    if abs(before - after) > 2:
        how = "less" if after < before else "more"
        words += f"; it confuses {names} {how} ({after} times instead of {before})"
    difference = values["all"][:, 1] - values["all"][:, 0]
    sign = 1 if difference[0] >= 0 else -1
    stays = (difference[1:] * sign > 0).mean()
    words += (
        f"; its mAP is {abs(difference[0]):.1f} points {'higher' if sign > 0 else 'lower'}, and "
        f"would be so on other images in {100 * stays:.0f} of 100 draws."
    )
    return words


# ------------------------------------------------------------------------------ as text, as a page


def text(values: dict[str, Array], letters: Sequence[str]) -> str:
    """The table of measures: a row each, a column per detector, and the difference to A."""
    head = [*letters, *(f"{letter} - A" for letter in letters[1:])]
    lines = [f"{'':16}" + "".join(f"{cell:>22}" for cell in head)]
    for name, table in values.items():
        cells = [*table.T, *(table[:, m] - table[:, 0] for m in range(1, len(letters)))]
        title = f"mAP, {name}" if name in PARTS else name
        lines.append(f"{title:16}" + "".join(f"{interval(cell):>22}" for cell in cells))
    return "\n".join(lines)


def side_by_side(pair: list[Detector], finder: int, rows: Array, records, classes) -> str:
    """Objects that only one of the pair finds as pictures: what A shows of each, and what B does.
    Those come first of which the finder is most sure."""
    sure = pair[finder].verdicts
    score, pictures = sure.guesses.score[sure.found[rows]], []
    for g in rows[np.argsort(-score, kind="stable")][:PICTURES]:
        for letter, (_, v, threshold) in zip("AB", pair, strict=True):
            box, image = v.objects.boxes_xyxy[g], v.objects.image[g]
            here = np.flatnonzero(errors.is_shown(v, threshold) & (v.guesses.image == image))
            boxes = v.guesses.boxes_xyxy[here]
            near = [errors.iou(other, box) > errors.SOME for other in boxes]
            words = [f"{classes[v.guesses.label[d] - 1]} {v.guesses.score[d]:.2f}"
                     for d in here[near]]  # fmt: skip
            pictures.append({
                "image": records[image].name, "said": f"{letter}: {', '.join(words) or 'nothing'}",
                "there": classes[v.objects.label[g] - 1], "words": "",
                "jpeg": errors.crop(records[image], boxes[near], [box], around=[box]),
            })  # fmt: skip
    return report.gallery(pictures)


def section(words, values, counts, pictures: dict[str, str], names: Sequence[str]) -> str:
    """HTML: the sentence, the measures, objects per size and class, pictures."""
    head = ["", *map(escape, names), "difference [95 % of the draws]"]
    rows = []
    for name, table in values.items():
        cells = [*table.T, table[:, 1] - table[:, 0]]
        title = f"mAP, {name}" if name in PARTS else f"cost: {name}" if name != "AP50" else name
        rows.append([title, *map(interval, cells)])
    found = [[escape(name), f"{n:,}", f"+{won:,}", f"−{lost:,}", f"{won - lost:+,}"]
             for name, (n, won, lost) in counts.items() if n]  # fmt: skip
    parts = [
        f"<p><b>{escape(words)}</b></p>",
        report.table(head, rows),
        "<h3>Objects that one finds and the other does not</h3>",
        report.table(["", "objects", "won", "lost", "net"], found),
    ]
    parts += [f"<h4>{title}</h4>{some}" for title, some in pictures.items() if "<img" in some]
    return "".join(parts)


# ------------------------------------------------------------------------------ command line


def measure(runs: list[str], args: argparse.Namespace) -> tuple[list, tuple, list[Detector], str]:
    """Run all detectors over the data of the first -> records, classes, detectors, metric."""
    detectors, first = [], None
    for run in runs:
        records, found, classes, results, data = errors.detect_in(run, args, first and first[2])
        first = first or (records, classes, data)
        if set(classes) != set(first[1]):
            raise ValueError(f"{run} detects {', '.join(classes)}; {runs[0]} {', '.join(first[1])}")
        records, names, (where, sets, _) = first
        label = np.array([0, *(names.index(name) + 1 for name in classes)])  # in the first's order
        found = [one._replace(labels=label[one.labels]) for one in found]
        matches = voc_match(records, found, len(names))
        verdicts = errors.judge(records, found, len(names))
        detectors.append(Detector(matches, verdicts, errors.thresholds(results, names)))
    return *first[:2], detectors, evaluation.metric_of(where.data, sets)


def main(argv: list[str] | None = None) -> dict[str, Array]:
    """Measure, resample, print, write the page; -> the measures, as of `bootstrap`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of train.py, or checkpoints"
    )
    parser.add_argument("--draws", type=int, default=1000, help="how often images are resampled")
    parser.add_argument("--out", metavar="FILE", help="of two runs also a page with pictures")
    add_eval_flags(parser)
    args = parser.parse_args(argv)
    check_eval_flags(args)
    check_range(args, "draws", 1)
    if args.out and len(args.runs) != 2:
        raise ValueError(f"--out {args.out}: a page compares two runs, not {len(args.runs)}")
    check_file(args.out, *map(errors.checkpoint_of, args.runs))

    records, classes, detectors, metric = measure(args.runs, args)
    values = bootstrap(detectors, args.draws, metric)
    letters = [chr(ord("A") + m) for m in range(len(args.runs))]
    for letter, run in zip(letters, args.runs, strict=True):
        print(f"{letter} = {run}")
    if len(detectors) == 2:
        won, lost = won_and_lost(*(one.found() for one in detectors))
        counts = tally(detectors[0], won, lost, classes)
        tables = [errors.confusion(one.verdicts, one.threshold) for one in detectors]
        words = sentence(values, counts, confused(*tables, classes))
        print(f"\n{words}\n")
    print(f"{len(records)} images, {args.draws} draws [95 % of them]; mAP: "
          f"{'11-point' if metric == 'voc07' else 'area'}")  # fmt: skip
    print(text(values, letters))
    if len(detectors) == 2:
        print(f"\n{'objects':16}{'in all':>10}{'won':>8}{'lost':>8}")
        for name, (n, more, fewer) in counts.items():
            print(f"{name:16}{n:10,}{more:8,}{fewer:8,}")
    if args.out:
        pictures = {
            "Won: B finds it, A does not": side_by_side(detectors, 1, won, records, classes),
            "Lost: A finds it, B does not": side_by_side(detectors, 0, lost, records, classes),
        }
        write(args.out, args.runs, section(words, values, counts, pictures, "AB"))
        print(f"{args.out}: with pictures")
    return values


def write(path: str, runs: list[str], changed: str) -> None:
    """The report of both runs with what changed; of bare checkpoints only what changed."""
    if all(Path(run, name).is_file() for run in runs for name in ("log.jsonl", "run.json")):
        report.write(runs, path, changed)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        names = [escape(run) for run in runs]
        page = report.document(" and ".join(runs), {"What changed": changed}, names)
        Path(path).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
