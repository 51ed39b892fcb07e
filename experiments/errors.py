"""Why a detector errs: six kinds of error, what each costs, and pictures of the worst.

    python -m experiments.errors RUN                 the table; RUN/errors.json, shown in its report
    python -m experiments.errors RUN --suspects 50   RUN/suspects.html: labels that may be wrong

RUN is a folder of train.py, or a checkpoint. The kinds are those of TIDE (Bolya et al. 2020, "TIDE:
A General Toolbox for Identifying Object Detection Errors"), and the numbers equal those of its
tidecv 1.0.1:

    classification  IoU >= .5 with an object of another class
    localisation    IoU .1 to .5 with an object of its class
    both            some overlap with an object of another class, too little for "classification"
    duplicate       IoU >= .5 with an object of its class that a better detection has found
    background      IoU <= .1 with every object
    missed          an object that no detection finds, and none of the first two kinds points at

The cost of a kind is what AP50 would gain if all its errors were mended: wrong classes and boxes
made right (the best one of each object; the others removed), wrong detections removed, missed
objects not counted. Costs do not add up to 100 - AP50: to mend one kind changes what others cost.

Letters: D detections, G objects, C classes, N images. Boxes are `_xyxy` in pixels.
"""

import argparse
import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array
from PIL import Image, ImageDraw

import eval as evaluation
from experiments import report
from metrics import (
    SIZES,
    Detections,
    Guesses,
    Objects,
    average_precision,
    best_precision,
    class_and_image,
    class_ranges,
    overlaps,
    tabulate,
    take_turns,
    voc_f1,
    voc_match,
)
from plumbing import sources
from plumbing.files import Record, decode_pixels, open_record
from plumbing.pictures import GREEN, ORANGE
from plumbing.program import check_range, run_program
from scratchdet import load_detector

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASS, BOX, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT = -1  # the `kind` of a detection that is no error
ENOUGH, SOME = 0.5, 0.1  # IoU: of a right box, and of a box that has to do with the object
RECALLS = np.arange(101) / 100  # TIDE's AP is the mean of the best precision at these
PER_IMAGE = 100  # detections that count, as in tidecv


class Verdicts(NamedTuple):
    """What every detection is, and what became of every object."""

    objects: Objects
    guesses: Guesses  # the best `PER_IMAGE` of each image
    kind: Array  # (D,) index of `KINDS`, or RIGHT
    target: Array  # (D,) the object that it finds, doubles, or should have found; else -1
    iou: Array  # (D,) with that object
    ignored: Array  # (D,) bool: it would be wrong, but a difficult object or a crowd covers it
    mended: Array  # (D,) bool: the best of the wrong detections that point at an object
    found: Array  # (G,) the detection that finds the object, or -1
    missed: Array  # (G,) bool
    num_classes: int


def judge(records: list[Record], detections: list[Detections], num_classes: int) -> Verdicts:
    """Match by TIDE's rules, and say of every detection that is not right what is wrong with it.

    Each image's best 100 detections choose in turn, best score first: of the objects of their
    class that are still free the one they overlap most, if the IoU is .5 or more. Difficult
    objects (COCO: crowds) are none; a wrong detection more than half inside one is ignored.
    """
    objects, guesses = tabulate(records, detections, num_classes)
    guesses = best_of_each_image(guesses)
    d_all, g_all = len(guesses.label), len(objects.label)
    usable = np.flatnonzero(~objects.difficult)
    plain = Objects(*(column[usable] for column in objects))

    # every pair in an image, whatever the classes
    alike = (x._replace(label=np.ones_like(x.label)) for x in (guesses, plain))
    d, g, iou = overlaps(*alike, SOME)
    g = usable[g]
    same = guesses.label[d] == objects.label[g]

    pairs = greedy(guesses, objects, d, g, iou, np.flatnonzero(same & (iou >= ENOUGH)))
    found = np.full(g_all, -1)
    found[g[pairs]] = d[pairs]

    def best(some):
        """Of each detection the first pair of largest IoU among `some` -> object, IoU; -1, 0."""
        order = some[np.lexsort((g[some], -iou[some], d[some]))]
        who, first = np.unique(d[order], return_index=True)
        which, value = np.full(d_all, -1), np.zeros(d_all)
        which[who], value[who] = g[order[first]], iou[order[first]]
        return which, value

    mine, mine_iou = best(np.flatnonzero(same))
    other, other_iou = best(np.flatnonzero(~same))
    used, used_iou = best(np.flatnonzero(same & (found[g] >= 0)))
    tests = [  # the first that holds decides
        (BOX, (mine_iou >= SOME) & (mine_iou <= ENOUGH), mine, mine_iou),
        (CLASS, other_iou >= ENOUGH, other, other_iou),
        (DUPLICATE, used_iou >= ENOUGH, used, used_iou),
        (BACKGROUND, np.maximum(mine_iou, other_iou) <= SOME, np.full(d_all, -1), np.zeros(d_all)),
        (BOTH, np.ones(d_all, bool), other, other_iou),
    ]
    holds = [test[1] for test in tests]
    kind = np.select(holds, [test[0] for test in tests])
    target, value = (np.select(holds, [test[i] for test in tests]) for i in (2, 3))
    right = d[pairs]
    kind[right], target[right], value[right] = RIGHT, g[pairs], iou[pairs]

    # of all that point at an object which is not found, the best score would find it if mended
    points = np.flatnonzero((kind == BOX) | (kind == CLASS))
    points = points[found[target[points]] < 0]
    order = points[np.lexsort((guesses.row[points], -guesses.score[points], target[points]))]
    reached, first = np.unique(target[order], return_index=True)
    mended = np.zeros(d_all, bool)
    mended[order[first]] = True
    missed = ~objects.difficult & (found < 0)
    missed[reached] = False
    ignored = covered(guesses, objects) & (kind != RIGHT)
    return Verdicts(
        objects, guesses, kind, target, value, ignored, mended, found, missed, num_classes
    )


def covered(guesses: Guesses, objects: Objects) -> Array:
    """(D,) bool: more than half of the box lies in a difficult object (a crowd) of its class."""
    hidden = np.flatnonzero(objects.difficult)
    crowds = Objects(*(column[hidden] for column in objects))
    d, _, share = overlaps(guesses, crowds, ENOUGH, crowd=np.ones(len(hidden), bool))
    inside = np.zeros(len(guesses.label), bool)
    inside[d[share > ENOUGH]] = True
    return inside


def greedy(guesses: Guesses, objects: Objects, d: Array, g: Array, iou: Array, some: Array):
    """The pairs among `some` that come together: best score first, then the largest IoU."""
    group = class_and_image(guesses, objects)[0]
    turn = some[np.lexsort((g[some], -iou[some], d[some], group[d[some]]))]
    exclusive = np.zeros(len(objects.label), bool)
    together, _ = take_turns(group, d[turn], g[turn], np.ones(len(turn), int), exclusive)
    return turn[together > 0]


def best_of_each_image(guesses: Guesses) -> Guesses:
    """The best `PER_IMAGE` detections of each image, of all classes."""
    order = np.lexsort((guesses.row, -guesses.score, guesses.image))
    counts = np.bincount(guesses.image)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Guesses(*(column[rank < PER_IMAGE] for column in guesses))


class Column(NamedTuple):
    """All that an AP needs: detections class by class, best score first, and the objects."""

    image: Array  # (D,)
    label: Array  # (D,)
    tp: Array  # (D,) bool; the others are wrong
    objects_image: Array  # (G,)
    objects_label: Array  # (G,)


def mend(v: Verdicts, kind: int | None) -> Column:
    """The detections with one kind of error mended, or as they are (None)."""
    label, tp = v.guesses.label, v.kind == RIGHT
    kept, counted = ~v.ignored, ~v.objects.difficult
    if kind == MISSED:
        counted = counted & ~v.missed
    elif kind is not None:
        wrong = v.kind == kind
        repaired = wrong & v.mended  # never of a duplicate, a background or both
        tp, kept = tp | repaired, (kept & ~wrong) | repaired
        if kind == CLASS:
            label = label.copy()
            label[repaired] = v.objects.label[v.target[repaired]]
    # by equal scores tidecv counts first what it mends or could have mended, image by image
    right_before = (v.kind == RIGHT) & (kind is not None)
    keep = np.flatnonzero(kept)
    keys = (v.guesses.row, right_before, -v.guesses.score, label)
    keep = keep[np.lexsort([key[keep] for key in keys])]
    return Column(
        v.guesses.image[keep], label[keep], tp[keep],
        v.objects.image[counted], v.objects.label[counted],
    )  # fmt: skip


def ap50(column: Column, num_classes: int, times: Array | None = None) -> float:
    """Mean AP at IoU .5 in percent, over 101 recalls. times (N,): how often each image counts."""
    tp, fp, weights = column.tp.astype(int), (~column.tp).astype(int), None
    if times is not None:
        drawn = times[column.image]
        tp, fp, weights = tp * drawn, fp * drawn, times[column.objects_image]
    objects = np.bincount(column.objects_label, weights, num_classes + 1)[1:]
    values = []
    for c, rows in enumerate(class_ranges(column.label, num_classes)):
        if objects[c]:
            curve = average_precision(tp[rows], fp[rows], objects[c])[2:]
            values.append(best_precision(*curve, RECALLS).mean())
        elif rows.start < rows.stop:  # detections of a class without objects: AP 0 in tidecv
            values.append(0.0)
    return 100 * float(np.mean(values)) if values else float("nan")


def costs(v: Verdicts, times: Array | None = None) -> dict[str, float]:
    """{"AP50": percent, kind: points of AP50 that it costs}."""
    now = ap50(mend(v, None), v.num_classes, times)
    after = [ap50(mend(v, k), v.num_classes, times) for k in range(len(KINDS))]
    return {"AP50": now} | {k: max(0.0, x - now) for k, x in zip(KINDS, after, strict=True)}


def counts(v: Verdicts) -> dict[str, int]:
    """{kind: how often}; of wrong detections also those that are ignored, as tidecv counts."""
    wrong = np.bincount(v.kind[v.kind != RIGHT], minlength=len(KINDS))
    wrong[MISSED] = v.missed.sum()
    return dict(zip(KINDS, wrong.tolist(), strict=True))


# ----------------------------------------------------------------------- what a user would see


def thresholds(results: dict, classes: Sequence[str]) -> Array:
    """(C,) the score of each class's best F1, from the results of `summarise`."""
    all_classes = results.get("threshold") or 0.5
    rows = [results["per_class"].get(name, {}) for name in classes]
    return np.array([row.get("threshold") or all_classes for row in rows])


def is_shown(v: Verdicts, threshold: Array) -> Array:
    """(D,) bool: the detections of at least their class's threshold, without those ignored."""
    return ~v.ignored & (v.guesses.score >= threshold[v.guesses.label - 1])


def is_found(v: Verdicts, threshold: Array) -> Array:
    """(G,) bool: the objects that a detection finds which is shown."""
    found = v.found >= 0
    found[found] = is_shown(v, threshold)[v.found[found]]
    return found


def confusion(v: Verdicts, threshold: Array) -> Array:
    """(C + 1, C + 1) counts: rows are what is there, columns what is shown of it.

    Each object stands in its row once: under its own class if it is found, else under that of the
    best detection of another class with IoU >= .5, else in the last column (nothing). The last row
    (background) has the detections that are left. So columns add up to what is shown.
    """
    last = v.num_classes
    truth = np.full(len(v.kind), last)  # (D,) of the detections: what is there
    found, shown = is_found(v, threshold), is_shown(v, threshold)
    right = shown & (v.kind == RIGHT)
    truth[right] = v.objects.label[v.target[right]] - 1
    seen = found.copy()
    wrong = np.flatnonzero(shown & (v.kind == CLASS))
    for d in wrong[np.argsort(-v.guesses.score[wrong], kind="stable")]:
        if not seen[v.target[d]]:
            seen[v.target[d]] = True
            truth[d] = v.objects.label[v.target[d]] - 1
    counts = np.zeros((last + 1, last + 1), np.int64)
    np.add.at(counts, (truth[shown], v.guesses.label[shown] - 1), 1)
    unseen = ~seen & ~v.objects.difficult
    np.add.at(counts, (v.objects.label[unseen] - 1, last), 1)
    return counts


def mean_f1(records: list[Record], detections: list[Detections], num_classes: int) -> list[float]:
    """F1 at the scores 0, .01, ... 1: mean of the classes that have objects."""
    f1 = voc_f1(voc_match(records, detections, num_classes))
    f1 = f1[~np.isnan(f1[:, 0])]
    return f1.mean(axis=0).round(4).tolist() if len(f1) else []


def almost(v: Verdicts) -> tuple[Array, Array]:
    """(G,) score times IoU of the detection that comes nearest to each object, and its row or -1.

    Of the detections of the object's class, whatever their score.
    """
    d, g, iou = overlaps(v.guesses, v.objects, SOME)
    near = v.guesses.score[d] * iou
    order = np.lexsort((-near, g))
    which, first = np.unique(g[order], return_index=True)
    value, row = np.zeros(len(v.missed)), np.full(len(v.missed), -1)
    value[which], row[which] = near[order[first]], d[order[first]]
    return value, row


# ---------------------------------------------------------------------------------- pictures


def crop(
    record: Record, detections: Sequence[Array], truth: Sequence[Array], *,
    around: Sequence[Array] | None = None, side: int = 200,
) -> str:  # fmt: skip
    """The part of a picture around some boxes (default: all), as a JPEG in base64: detections
    orange, ground truth green, and thin what else is annotated there."""
    image = decode_pixels(open_record(record), record)
    boxes = np.array(around or [*detections, *truth], float).reshape(-1, 4)
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    middle, half = (low + high) / 2, max(32.0, 0.9 * (high - low).max())
    x0, y0 = np.floor(np.maximum(middle - half, 0))
    x1, y1 = np.ceil(np.minimum(middle + half, image.size))
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)  # a box may lie off the picture
    scale = side / max(x1 - x0, y1 - y0)
    size = max(1, round(scale * (x1 - x0))), max(1, round(scale * (y1 - y0)))
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, (x0, y0, x1, y1))
    pen = ImageDraw.Draw(image)
    layers = ((record.boxes_xyxy, GREEN, 1), (truth, GREEN, 3), (detections, ORANGE, 3))
    for some, colour, width in layers:
        for box in some:
            a, b, c, d = ((np.asarray(box, float) - (x0, y0, x0, y0)) * scale).tolist()
            pen.rectangle((a, b, max(a, c), max(b, d)), outline=colour, width=width)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(v: Verdicts, records, classes, d: int, g: int, words: str = "") -> dict:
    """One detection, one object, or both (-1: none) for the report: a crop, and what to say."""
    image, box = place_of(v, d, g)
    boxes = [v.guesses.boxes_xyxy[d]] if d >= 0 else []
    truth = [v.objects.boxes_xyxy[g]] if g >= 0 else []
    said = f"{classes[v.guesses.label[d] - 1]} {v.guesses.score[d]:.2f}" if d >= 0 else "nothing"
    return {
        "image": records[image].name,
        "said": said,
        "there": classes[v.objects.label[g] - 1] if g >= 0 else "",
        "words": words,
        "box_xyxy": box.round(1).tolist(),
        "jpeg": crop(records[image], boxes, truth),
    }


def place_of(v: Verdicts, d: int, g: int) -> tuple[int, Array]:
    """The image and the box of a detection, or, without one (-1), of an object."""
    table, row = (v.guesses, d) if d >= 0 else (v.objects, g)
    return int(table.image[row]), table.boxes_xyxy[row]


def spread(v: Verdicts, rows: Iterable[tuple[int, int]], many: int) -> list[int]:
    """The numbers of the first rows (detection, object) that do not overlap an earlier by half."""
    chosen, places = [], []
    for n, (d, g) in enumerate(rows):
        image, box = place_of(v, d, g)
        if not any(image == i and iou(box, other) > ENOUGH for i, other in places):
            chosen.append(n)
            places.append((image, box))
        if len(chosen) == many:
            break
    return chosen


def iou(a: Array, b: Array) -> float:
    """Of two boxes."""
    inter = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter
    return float(inter / union) if union > 0 else 0.0


def worst(v: Verdicts, records, classes, threshold: Array, many: int = 6) -> dict[str, list]:
    """{kind: pictures}: of wrong detections those of the highest score, of the objects that
    nothing shown finds those that it almost found."""
    pictures = {}
    for k, name in enumerate(KINDS[:MISSED]):
        rows = np.flatnonzero((v.kind == k) & ~v.ignored)
        rows = rows[np.argsort(-v.guesses.score[rows], kind="stable")]
        rows = rows[spread(v, ((d, v.target[d]) for d in rows), many)]
        words = [f"IoU {v.iou[d]:.2f}" if v.target[d] >= 0 else "" for d in rows]
        pictures[name] = [
            picture(v, records, classes, d, v.target[d], w)
            for d, w in zip(rows, words, strict=True)
        ]
    value, row = almost(v)
    rows = np.flatnonzero(~is_found(v, threshold) & ~v.objects.difficult)
    rows = rows[np.argsort(-value[rows], kind="stable")][:many]
    pictures["missed"] = [
        picture(v, records, classes, row[g], g, f"almost: {value[g]:.2f}" if row[g] >= 0 else "")
        for g in rows
    ]
    return pictures


def analyse(
    records: list[Record], detections: list[Detections], classes: Sequence[str], results: dict
) -> dict:
    """Errors, their costs and pictures as plain data. `results`: of `summarise`."""
    v = judge(records, detections, len(classes))
    threshold = thresholds(results, classes)
    shown, cost, count = is_shown(v, threshold), costs(v), counts(v)
    found = is_found(v, threshold)
    objects = int((~v.objects.difficult).sum())
    wrong = [int((shown & (v.kind == k)).sum()) for k in range(MISSED)] + [objects - found.sum()]
    return {
        "AP50": cost["AP50"],
        "kinds": {
            name: {"cost": cost[name], "count": count[name], "shown": int(wrong[k])}
            for k, name in enumerate(KINDS)
        },
        "objects": objects,
        "found": int(found.sum()),
        "shown": int(shown.sum()),
        "right": int((shown & (v.kind == RIGHT)).sum()),
        "classes": list(classes),
        "threshold": [round(float(t), 2) for t in threshold],
        "confusion": confusion(v, threshold).tolist(),
        "f1": mean_f1(records, detections, len(classes)),
        "pictures": worst(v, records, classes, threshold),
    }


def write(
    folder: str | Path, records: list[Record], detections: list[Detections],
    classes: Sequence[str], results: dict,
) -> dict:  # fmt: skip
    """FOLDER/errors.json, from which the report takes its pictures of errors."""
    errors = analyse(records, detections, classes, results)
    Path(folder, "errors.json").write_text(json.dumps(errors), encoding="utf-8")
    return errors


def text(errors: dict) -> str:
    """The table of `analyse` as text."""
    lines = [f"{'error':16}{'cost in AP50':>14}{'in all':>10}{'shown':>8}"]
    for name, row in errors["kinds"].items():
        lines.append(f"{name:16}{row['cost']:14.2f}{row['count']:10,}{row['shown']:8,}")
    lines.append(
        f"AP50 {errors['AP50']:.2f}. From each class's best threshold up {errors['shown']:,} "
        f"detections are shown, {errors['right']:,} of them right; {errors['found']:,} of "
        f"{errors['objects']:,} objects are found"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ suspect labels


def suspects(v: Verdicts) -> list[tuple[float, str, int, int]]:
    """Labels that may be wrong, the most suspect first: (suspicion, why, detection, object).

    A confident detector that disagrees with a label is right now and then. Suspicion is, from 0 to
    1, for a detection where no label is: its score; for an object that it calls something else:
    its score; for one whose box it puts elsewhere: score * (1 - IoU); for an object that no
    detection even touches: the share of its class and size that is found.
    """
    score, rows = v.guesses.score, []
    other = v.mended & ~v.ignored & (v.kind == CLASS)
    rows += [(score[d], "another class?", d, v.target[d]) for d in np.flatnonzero(other)]
    moved = v.mended & ~v.ignored & (v.kind == BOX)
    rows += [(score[d] * (1 - v.iou[d]), "another box?", d, v.target[d])
             for d in np.flatnonzero(moved)]  # fmt: skip
    alone = ~v.ignored & ((v.kind == BACKGROUND) | (v.kind == BOTH))
    rows += [(score[d] * (1 - v.iou[d]), "no label?", d, -1) for d in np.flatnonzero(alone)]
    side = np.sqrt(np.prod(v.objects.boxes_xyxy[:, 2:] - v.objects.boxes_xyxy[:, :2], axis=1))
    sort = v.objects.label * 3 + np.searchsorted([SIZES["medium"][0], SIZES["large"][0]], side)
    real = ~v.objects.difficult
    there, found = (np.bincount(sort[real & some], minlength=sort.max(initial=0) + 1)
                    for some in (real, v.found >= 0))  # fmt: skip
    untouched = v.missed & (almost(v)[1] < 0)
    rows += [(found[sort[g]] / there[sort[g]], "nothing there?", -1, g)
             for g in np.flatnonzero(untouched)]  # fmt: skip
    return sorted(rows, key=lambda row: -row[0])


def plant(
    records: list[Record], many: int, num_classes: int, seed: int = 0
) -> tuple[list[Record], dict[int, Array]]:
    """Spoil one label in each of `many` images, in turn: forget it, name it wrongly, move it by
    half its size, or invent one. -> records, {number of the image: where (4,)}."""
    rng, spoilt, places = np.random.default_rng(seed), list(records), {}
    busy = [i for i, record in enumerate(records) if len(record.labels)]
    for n, i in enumerate(rng.permutation(busy)[:many].tolist()):
        record = records[i]
        g = int(rng.integers(len(record.labels)))
        boxes, labels = record.boxes_xyxy.copy(), record.labels.copy()
        rows, place = np.arange(len(labels)), boxes[g]
        if n % 4 == 0:
            rows = np.delete(rows, g)
        elif n % 4 == 1:
            labels[g] = 1 + (labels[g] - 1 + rng.integers(1, max(2, num_classes))) % num_classes
        elif n % 4 == 2:
            boxes[g] += np.tile((boxes[g, 2:] - boxes[g, :2]) / 2, 2)
        else:
            rows = np.append(rows, g)
            corner = rng.random(2) * (np.array(record.size) - 40)
            place = np.array([*corner, *(corner + 40)])
        boxes, labels = boxes[rows], labels[rows]
        if n % 4 == 3:
            boxes[-1] = place
        difficult, area = record.difficult[rows], record.area[rows]
        spoilt[i] = record._replace(boxes_xyxy=boxes, labels=labels, difficult=difficult, area=area)
        places[i] = place
    return spoilt, places


def were_planted(v: Verdicts, chosen: list[tuple[int, int]], places: dict[int, Array]) -> int:
    """How many of the suspects (detection, object) lie where a label was spoilt; each counts
    once."""
    hit = set()
    for d, g in chosen:
        boxes = ([v.guesses.boxes_xyxy[d]] if d >= 0 else []) + (
            [v.objects.boxes_xyxy[g]] if g >= 0 else []
        )
        image = place_of(v, d, g)[0]
        if image in places and any(iou(box, places[image]) > SOME for box in boxes):
            hit.add(image)
    return len(hit)


def first_suspects(v: Verdicts, many: int) -> list[tuple[float, str, int, int]]:
    """The first of `suspects`, no two of the same place."""
    ranked = suspects(v)
    return [ranked[i] for i in spread(v, ((d, g) for _, _, d, g in ranked), many)]


def write_suspects(path: Path, v: Verdicts, records, classes, many: int) -> list[dict]:
    """A page of crops, the most suspect first, and its rows as a list."""
    rows = []
    for n, (value, why, d, g) in enumerate(first_suspects(v, many), start=1):
        row = picture(v, records, classes, d, g, f"{n}. {why} {value:.2f}")
        rows.append(row | {"why": why, "suspicion": round(float(value), 4)})
    intro = (
        f"{len(rows)} labels that may be wrong, the most suspect first: labels green, detections "
        "orange. The network may be the one who errs; a person decides."
    )
    body = f"<p>{intro}</p>" + report.gallery(rows)
    path.write_text(report.document("Suspect labels", {"Suspects": body}), encoding="utf-8")
    return rows


# ------------------------------------------------------------------------------ command line


def checkpoint_of(run: str) -> Path:
    """RUN/last.pt of a folder; else the file itself."""
    return Path(run, "last.pt") if Path(run).is_dir() else Path(run)


def detect_in(run: str, args: argparse.Namespace, data: tuple | None = None):
    """Run a detector on what it was evaluated on, or as the flags say.

    `data`: what another run was measured on: (args, sets, first), as returned last.
    -> records, detections, class names, results of `summarise`, data
    """
    path = checkpoint_of(run)
    model, checkpoint = load_detector(path, args.device)
    data = data or sources.from_run(args, checkpoint.get("args") or {})
    where, sets, first = data
    classes = model.config.classes
    records = sources.open_data(where, sets, classes)[0][:first]
    results, found = evaluation.evaluate(
        model, records, metric=evaluation.metric_of(where.data, sets),
        batch_size=args.batch_size, workers=args.workers,
    )  # fmt: skip
    return records, found, classes, results, data


def main(argv: list[str] | None = None) -> dict:
    """Detect, judge, print, write; -> what `analyse` says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a folder of train.py, or a checkpoint")
    parser.add_argument("--suspects", type=int, default=0, metavar="N",
        help="also the N labels that are most likely wrong, as a page")  # fmt: skip
    parser.add_argument("--plant", type=int, default=0, metavar="N",
        help="spoil N labels first, to see how many of them the suspects contain")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="of the files (default: the run's folder)")
    sources.add_eval_flags(parser)
    args = parser.parse_args(argv)
    sources.check_eval_flags(args)
    check_range(args, "suspects plant", 0)
    if args.plant and not args.suspects:
        raise ValueError(f"--plant {args.plant}: among how many suspects? Add --suspects N")
    folder = Path(args.out) if args.out else checkpoint_of(args.run).parent
    records, found, classes, results, _ = detect_in(args.run, args)
    if not any(len(record.labels) for record in records):
        raise ValueError("the set has no annotations: an error is what disagrees with one")
    folder.mkdir(parents=True, exist_ok=True)
    errors = write(folder, records, found, classes, results)
    print(text(errors))
    print(f"{folder}/errors.json, with pictures of the worst")
    if (folder / "log.jsonl").exists() and (folder / "run.json").exists():
        report.write([folder], folder / "report.html")
        print(f"{folder}/report.html shows them")
    if args.suspects:
        if args.plant:
            records, places = plant(records, args.plant, len(classes))
        v = judge(records, found, len(classes))
        path = folder / "suspects.html"
        for row in write_suspects(path, v, records, classes, args.suspects):
            print(f"{row['words']:28} {row['image']:12} {row['said']:>20} / {row['there'] or '-'}")
        print(f"{path}, with pictures")
        if args.plant:
            chosen = [row[2:] for row in first_suspects(v, args.suspects)]
            seen = were_planted(v, chosen, places)
            print(f"{seen} of the {len(places)} labels spoilt on purpose are among the first "
                  f"{len(chosen)}")  # fmt: skip
    return errors


if __name__ == "__main__":
    run_program(main)
