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

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy import ndarray as Array

from metrics import (
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
)

if TYPE_CHECKING:
    from records import Record

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
    guesses = best_of_each_image(guesses, objects)
    d_all, g_all = len(guesses.label), len(objects.label)
    usable = np.flatnonzero(~objects.difficult)
    plain = Objects(*(column[usable] for column in objects))

    # every pair in an image, whatever the classes
    alike = (x._replace(label=np.ones_like(x.label)) for x in (guesses, plain))
    d, g, iou = overlaps(*alike, SOME)
    g = usable[g]
    same = guesses.label[d] == objects.label[g]

    enough = np.flatnonzero(same & (iou >= ENOUGH))
    group = class_and_image(guesses, objects)[0]
    turn = enough[np.lexsort((g[enough], -iou[enough], d[enough], group[d[enough]]))]
    once = np.zeros(g_all, bool)
    together, _ = take_turns(group, d[turn], g[turn], np.ones(len(turn), int), once)
    pairs = turn[together > 0]
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

    hidden = np.flatnonzero(objects.difficult)
    crowds = Objects(*(column[hidden] for column in objects))
    inside, _, share = overlaps(guesses, crowds, ENOUGH, crowd=np.ones(len(hidden), bool))
    ignored = np.zeros(d_all, bool)
    ignored[inside[share > ENOUGH]] = True
    ignored &= kind != RIGHT

    # of all that point at an object which is not found, the best score would find it if mended
    points = np.flatnonzero(((kind == BOX) | (kind == CLASS)) & (found[target] < 0))
    order = points[np.lexsort((guesses.row[points], -guesses.score[points], target[points]))]
    reached, first = np.unique(target[order], return_index=True)
    mended = np.zeros(d_all, bool)
    mended[order[first]] = True
    missed = ~objects.difficult & (found < 0)
    missed[reached] = False
    return Verdicts(
        objects, guesses, kind, target, value, ignored, mended, found, missed, num_classes
    )


def best_of_each_image(guesses: Guesses, objects: Objects) -> Guesses:
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
            label = np.where(repaired, v.objects.label[v.target], label)
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
