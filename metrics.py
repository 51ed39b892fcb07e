"""The two standard metrics, VOC AP and COCO AP, in plain NumPy: no network, no torch.

    records, one Detections per image --> voc_ap, for COCO also coco_ap --> summarise

Read `average_precision` first, the metric as a textbook has it; then from `voc_match` on, VOC's
rules of which detections are right. COCO's come last (skip them on a first reading). Between them
lies one table of all images, which only makes it fast (`python -m experiments.eval_bench`).

Letters: D detections and G objects (ground-truth boxes) of all images together, C classes
(without background), N images, K pairs of a detection and an object.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.
References: the VOC2007 devkit (VOCevaldet); COCOeval of pycocotools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy import ndarray as Array

from plumbing.tables import as_plain_data

if TYPE_CHECKING:
    from plumbing.files import Record

SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)}  # of objects, see voc_ap
THRESHOLDS = np.arange(101) / 100  # of the score, at which F1 is looked at


class Detections(NamedTuple):
    """What a detector says about one image."""

    boxes_xyxy: Array  # (D, 4) pixels of the original image
    scores: Array  # (D,)
    labels: Array  # (D,) int64, 1.. as in the records

    def above(self, min_score: float) -> Detections:
        """Those with this score or more."""
        keep = self.scores >= min_score
        return Detections(*(x[keep] for x in self))


# ------------------------------------------------------------------------------ average precision


def average_precision(tp: Array, fp: Array, objects: int) -> tuple[float, float, Array, Array]:
    """AP of one class by both of VOC's definitions: (11-point, area, recall, precision).

    tp, fp (D,): 1 where a detection is right (true positive) and 1 where it is wrong (false
    positive), best score first; both 0 where it does not count. In a resampled set of images they
    may be larger than 1: an image that was drawn twice counts twice.

    tp = [1, 0, 1], fp = [0, 1, 0], objects = 2: precision 1 up to recall 1/2, then 2/3, so
    11-point = (6 * 1 + 5 * 2/3) / 11, area = 1/2 * 1 + 1/2 * 2/3, recall = [1/2, 1],
    precision = [1, 2/3].
    """
    right = np.flatnonzero(tp)  # recall grows only here: at the others precision just falls
    found, wrong = np.cumsum(tp[right]), np.cumsum(fp)[right]  # so far, down to this score
    recall = found / objects
    precision = found / (found + wrong)
    if not objects:
        return np.nan, np.nan, recall, precision
    # 3 * .1 > .3 in floating point, so a recall of exactly 3/10 does not reach the point .3. The
    # published numbers (py-faster-rcnn's voc_eval) have this, too; it matters if recall ends there.
    eleven = best_precision(recall, precision, np.arange(0, 1.1, 0.1)).mean()
    area = best_precision(recall, precision, recall) @ (tp[right] / objects)
    return eleven, area, recall, precision


def best_precision(recall: Array, precision: Array, points: Array) -> Array:
    """For each of `points`, the best precision at that recall or more; 0 where it is not reached.

    This makes the zigzag of a precision-recall curve a staircase that only falls.
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(best, 0.0)[np.searchsorted(recall, points)]


def mean(ap: Array) -> float:
    """Mean over the classes that have objects; NaN if none has."""
    return float(np.mean(ap[~np.isnan(ap)])) if not np.isnan(ap).all() else float("nan")


# --------------------------------------------------------------------------- one table of all boxes


class Objects(NamedTuple):
    """The ground truth of all images, one object per row."""

    image: Array  # (G,) int64: the place of its image in the list
    label: Array  # (G,) int64, 1..
    boxes_xyxy: Array  # (G, 4) float64
    difficult: Array  # (G,) bool; COCO: iscrowd
    area: Array  # (G,) as annotated


class Guesses(NamedTuple):
    """The detections of all images, one per row: class by class, best score first.

    Equal scores stay in the order of the images, as the devkits have them.
    """

    image: Array  # (D,) int64
    label: Array  # (D,) int64
    boxes_xyxy: Array  # (D, 4) float64
    score: Array  # (D,) float64
    row: Array  # (D,) int64: its place among all detections as they were given


def tabulate(
    records: list[Record], detections: list[Detections], num_classes: int
) -> tuple[Objects, Guesses]:
    """All images in two tables. ValueError for lists that do not belong together."""
    if len(records) != len(detections):
        raise ValueError(f"{len(detections)} images of detections for {len(records)} records")
    for record, (boxes, scores, labels) in zip(records, detections, strict=True):
        shapes, d = [np.shape(x) for x in (boxes, scores, labels)], len(scores)
        if shapes != [(d, 4), (d,), (d,)] or not np.isfinite(np.c_[boxes, scores]).all():
            raise ValueError(
                f"detections of image {record.name}: expected finite boxes (D,4), scores (D,) and "
                f"labels (D,); got {', '.join(map(str, shapes))}"
            )

    def column(rows, name, dtype=np.float64, shape=(-1,)):
        parts = [np.asarray(getattr(row, name), dtype).reshape(shape) for row in rows]
        return np.concatenate([np.empty((0, *shape[1:]), dtype), *parts])

    def table(rows, what):
        image = np.repeat(np.arange(len(rows)), [len(row.labels) for row in rows])
        label = column(rows, "labels", np.int64)
        for i in np.flatnonzero((label < 1) | (label > num_classes)):
            name = records[image[i]].name
            raise ValueError(f"{what} of image {name}: label {label[i]} is not in 1..{num_classes}")
        return image, label, column(rows, "boxes_xyxy", shape=(-1, 4))

    difficult, area = column(records, "difficult", bool), column(records, "area")
    objects = Objects(*table(records, "ground truth"), difficult, area)
    score = column(detections, "scores")
    guesses = Guesses(*table(detections, "detections"), score, np.arange(len(score)))
    order = np.lexsort((-guesses.score, guesses.label))  # by label, then by score; ties stay
    return objects, Guesses(*(column[order] for column in guesses))


def class_ranges(label: Array, num_classes: int) -> list[slice]:
    """Where each class stands in a sorted column of labels. [1, 1, 3], 3 -> 0:2, 2:2, 2:3."""
    edges = np.searchsorted(label, np.arange(1, num_classes + 2)).tolist()
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def sides_of(boxes_xyxy: Array) -> Array:
    """Widths and heights (R, 2) of R boxes, rounded to the decimal numbers that they are, if so.

    In floating point (x + w) - x may miss w. COCO's files hold w, and its size ranges end at
    exactly 32 * 32 and 96 * 96.
    """
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    decimal = np.round(sides, 6)
    slack = 4 * np.finfo(float).eps * np.abs(boxes_xyxy).max(axis=1, initial=0.0)[:, None]
    return np.where(np.abs(decimal - sides) <= slack, decimal, sides)


def class_and_image(guesses: Guesses, objects: Objects) -> tuple[Array, Array]:
    """(D,), (G,): a number for each pair of class and image: equal ones may match."""
    images = 1 + max(guesses.image.max(initial=0), objects.image.max(initial=0))
    return guesses.label * images + guesses.image, objects.label * images + objects.image


def pairs(guess_group: Array, object_group: Array) -> Iterator[tuple[Array, Array]]:
    """Yields all pairs of equal group, as rows (d, g), sorted by d, then g: a million at a time.

    What two nested loops would give; the arithmetic only makes it fast.
    """
    by_group = np.argsort(object_group, kind="stable")
    sizes = np.bincount(object_group, minlength=1 + guess_group.max(initial=0))
    first = np.cumsum(sizes) - sizes
    busy = np.flatnonzero(sizes[guess_group])  # most detections have no object of their class
    first, count = first[guess_group[busy]], sizes[guess_group[busy]]
    ends, start = np.cumsum(count), 0
    while start < len(busy):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, np.searchsorted(ends, done + (1 << 20), side="right"))
        n = count[start:stop]
        number = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)  # 0, 1, .. in each group
        yield np.repeat(busy[start:stop], n), by_group[np.repeat(first[start:stop], n) + number]
        start = stop


def overlaps(
    guesses: Guesses, objects: Objects, min_iou: float, *, plus=0.0, crowd: Array | None = None
) -> tuple[Array, Array, Array]:
    """Every pair of a detection and an object of its class and image with IoU >= min_iou.

    -> rows d (K,), rows g (K,), iou (K,), sorted by d, then g.
    `plus` is VOC's pixel: a box from 10 to 19 is 10 pixels wide. For a `crowd` (G,) bool the union
    is the area of the detection alone: COCO's rule.
    """
    sides, other = sides_of(guesses.boxes_xyxy), sides_of(objects.boxes_xyxy)
    low, other_low = guesses.boxes_xyxy[:, :2], objects.boxes_xyxy[:, :2]
    area, other_area = (sides + plus).prod(axis=1), (other + plus).prod(axis=1)
    parts = [(np.empty(0, int), np.empty(0, int), np.empty(0))]
    for d, g in pairs(*class_and_image(guesses, objects)):
        high = np.minimum(low[d] + sides[d], other_low[g] + other[g])  # (K, 2)
        inter = (high - np.maximum(low[d], other_low[g]) + plus).clip(0).prod(axis=1)
        union = area[d] + other_area[g] - inter
        if crowd is not None:
            union = np.where(crowd[g], area[d], union)
        iou = np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)
        near = iou >= min_iou
        parts.append((d[near], g[near], iou[near]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


# -------------------------------------------------------------------------------------------- VOC


class VocMatches(NamedTuple):
    """Which object each detection looks at, by VOC's rules."""

    objects: Objects
    guesses: Guesses
    target: Array  # (D,) the row in `objects` that it overlaps most and enough; -1 for none
    object_side: Array  # (G,) root of the area as a 300x300 network sees the box
    guess_side: Array  # (D,)
    images: int
    num_classes: int


def voc_match(
    records: list[Record], detections: list[Detections], num_classes: int, iou_threshold=0.5
) -> VocMatches:
    """Each detection looks at the object of its class and image that it overlaps most."""
    objects, guesses = tabulate(records, detections, num_classes)
    d, g, iou = overlaps(guesses, objects, iou_threshold, plus=1.0)
    enough = iou > iou_threshold  # `overlaps` has also let through what equals it
    d, g, iou = d[enough], g[enough], iou[enough]
    order = np.lexsort((g, -iou, d))  # of each detection the largest IoU first, then the first box
    looking, first = np.unique(d[order], return_index=True)
    target = np.full(len(guesses.label), -1)
    target[looking] = g[order][first]

    scale = np.array([300 * 300 / (r.size[0] * r.size[1]) for r in records])
    sides = []
    for table in (objects, guesses):
        area = np.prod(table.boxes_xyxy[:, 2:] - table.boxes_xyxy[:, :2] + 1, axis=1)
        sides.append(np.sqrt(np.maximum(area * scale[table.image], 0)))
    return VocMatches(objects, guesses, target, *sides, len(records), num_classes)


def voc_outcome(matches: VocMatches, low=0.0, high=np.inf) -> tuple[Array, Array, Array]:
    """Right or wrong: tp (D,), fp (D,), counted (G,), all bool; for objects of one size only.

    Of the detections that look at one object the best score finds it; the others are wrong. Objects
    that are difficult, or whose side is not in [low, high), do not count, nor does what looks at
    them. A detection that looks at nothing is wrong if its own side is in [low, high).
    """
    m = matches
    counted = ~m.objects.difficult & (m.object_side >= low) & (m.object_side < high)
    looks = np.flatnonzero(m.target >= 0)
    looks = looks[counted[m.target[looks]]]  # rows of detections, in the order of their scores
    # The rows are sorted, best score first: the first one that looks at an object is the best.
    _, best = np.unique(m.target[looks], return_index=True)
    tp = np.zeros(len(m.target), bool)
    tp[looks[best]] = True
    fp = (m.target < 0) & (m.guess_side >= low) & (m.guess_side < high)
    fp[looks] = ~tp[looks]
    return tp, fp, counted


def voc_average(
    matches: VocMatches, outcome: tuple[Array, Array, Array], times: Array | None = None
) -> tuple[Array, Array, list]:
    """AP of every class: 11-point (C,), area (C,), curves [(recall, precision)].

    `outcome` as of `voc_outcome`. times (N,): how often each image counts, if not once.
    """
    (tp, fp, counted), m = outcome, matches
    times = np.ones(m.images, int) if times is None else times
    tp, fp = tp * times[m.guesses.image], fp * times[m.guesses.image]
    weights = times[m.objects.image[counted]]
    objects = np.bincount(m.objects.label[counted], weights, m.num_classes + 1)[1:].astype(int)
    ranges = class_ranges(m.guesses.label, m.num_classes)
    results = [average_precision(tp[r], fp[r], n) for r, n in zip(ranges, objects, strict=True)]
    eleven, area = (np.array([row[i] for row in results]) for i in (0, 1))
    return eleven, area, [row[2:] for row in results]


def voc_ap(
    records: list[Record], detections: list[Detections], num_classes: int, iou_threshold=0.5
) -> dict:
    """Average precision by the VOC devkit's rules, both ways, for each class, and by size.

    A detection looks only at the object of its class and image that it overlaps most (the first
    of equals). It is right if their IoU, with pixels counted inclusively (+1), is strictly above
    `iou_threshold` and no detection of higher score has found the object; if the object is
    difficult, it does not count; else it is wrong. Equal scores count in the order of the images.

    -> "ap11", "area" (C,), NaN for a class without an object that counts; "mAP", the means of both;
    "by_size", the same means for each of `SIZES`, over objects whose side is such to a 300x300
    network; "curves", for each class (recall, precision) at its true positives; "f1" of `voc_f1`.
    ValueError for lists that do not belong together.
    """
    matches = voc_match(records, detections, num_classes, iou_threshold)
    eleven, area, curves = voc_average(matches, voc_outcome(matches))
    by_size = {}
    for name, sides in SIZES.items():
        both = voc_average(matches, voc_outcome(matches, *sides))[:2]
        by_size[name] = [mean(ap) for ap in both]
    return {
        "ap11": eleven, "area": area, "mAP": [mean(eleven), mean(area)], "by_size": by_size,
        "curves": curves, "f1": voc_f1(matches),
    }  # fmt: skip


def voc_f1(matches: VocMatches) -> Array:
    """F1 (C, 101) of the detections whose score is at least each of `THRESHOLDS`.

    F1, the harmonic mean of precision and recall, is 2 tp / (tp + fp + objects). Where it is best
    lies the score from which on detections are worth showing. NaN for a class without objects.
    """
    (tp, fp, counted), m = voc_outcome(matches), matches
    f1 = np.full((m.num_classes, len(THRESHOLDS)), np.nan)
    objects = np.bincount(m.objects.label[counted], minlength=m.num_classes + 1)[1:]
    for c, rows in enumerate(class_ranges(m.guesses.label, m.num_classes)):
        shown = np.searchsorted(-m.guesses.score[rows], -THRESHOLDS, side="right")
        right, wrong = (np.append(0, np.cumsum(x[rows]))[shown] for x in (tp, fp))
        if objects[c]:
            f1[c] = 2 * right / (right + wrong + objects[c])
    return f1


# ----------------------------------------------------------- COCO: a second reading, if ever

COCO_NAMES = (  # in the order of COCOeval.stats
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
COCO_BEST = np.array((1, 10, 100))  # detections per class and image that count
COCO_AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # all, small, medium, large


def take_turns(
    group: Array, d: Array, g: Array, allowed: Array, shared: Array
) -> tuple[Array, Array]:
    """Greedy matching: in each group the pairs (d, g) get their turn, and come together if free.

    d, g, allowed (K,), sorted by group[d], within it by preference. `allowed` has one bit for each
    of up to 63 matchings that run side by side: a detection may be free in one and taken in
    another. `shared` (G,) bool: objects that many may have (crowds). All groups go at once: round s
    is the turn of the s-th pair of each.

    -> (K,) the matchings in which the pair came together, (D,) those in which the detection did.
    """
    _, first, rounds = np.unique(group[d], return_index=True, return_counts=True)
    longest = np.argsort(-rounds, kind="stable")
    first, rounds = first[longest], rounds[longest]
    together, matched = np.zeros(len(d), np.int64), np.zeros(len(group), np.int64)
    taken = np.zeros(len(shared), np.int64)
    for s in range(rounds.max(initial=0)):
        pair = first[: np.searchsorted(-rounds, -s)] + s  # of the groups with more than s pairs
        i, j = d[pair], g[pair]  # all different: each group has its own
        together[pair] = new = allowed[pair] & ~taken[j] & ~matched[i]
        matched[i] |= new
        taken[j] |= np.where(shared[j], 0, new)
    return together, matched


def coco_match(guesses: Guesses, objects: Objects, counted: Array) -> tuple[Array, Array]:
    """COCO's matching for 4 area ranges and 10 IoU thresholds at once: bit 10 * range + threshold.

    In each class and image the detections choose in turn, best score first: of the objects still
    free, the one of largest IoU (the last of equals); one that does not count only if no other is
    left. counted (4, G) bool: the objects of each area range.

    -> matched, hit (D,) bits: matched at all; and to an object that counts.
    """
    d, g, iou = overlaps(guesses, objects, COCO_IOUS[0], crowd=objects.difficult)
    reached = (1 << np.searchsorted(COCO_IOUS, iou, side="right")) - 1  # (K,) thresholds <= IoU
    reached = reached * sum(1 << 10 * a for a in range(4))  # the same ten bits in every area range
    counts = sum(row.astype(np.int64) * 1023 << 10 * a for a, row in enumerate(counted))  # (G,)
    # each pair comes twice: where the object counts, and, last of its detection, where it does not
    allowed = np.concatenate([reached & counts[g], reached & ~counts[g]])
    last = np.arange(len(allowed)) >= len(d)
    d, g, iou = np.tile(d, 2), np.tile(g, 2), np.tile(iou, 2)
    group, _ = class_and_image(guesses, objects)
    some = np.flatnonzero(allowed)
    order = some[np.lexsort((-g[some], -iou[some], last[some], d[some], group[d[some]]))]
    d, last = d[order], last[order]
    together, matched = take_turns(group, d, g[order], allowed[order], objects.difficult)
    hit = np.zeros(len(group), np.int64)
    np.bitwise_or.at(hit, d[~last], together[~last])
    return matched, hit


def best_per_image(guesses: Guesses, objects: Objects) -> tuple[Guesses, Array]:
    """The best 100 detections per class and image, and the rank of each (D,), from 0."""
    group, _ = class_and_image(guesses, objects)
    by_group = np.argsort(group, kind="stable")  # in each group best score first
    _, first, count = np.unique(group[by_group], return_index=True, return_counts=True)
    rank = np.empty(len(group), np.int64)
    rank[by_group] = np.arange(len(group)) - np.repeat(first, count)
    kept = rank < COCO_BEST[-1]
    return Guesses(*(column[kept] for column in guesses)), rank[kept]


def coco_ap(records: list[Record], detections: list[Detections], num_classes: int) -> dict:
    """The 12 numbers of COCO's bounding-box evaluation, equal to those of pycocotools.

    `difficult` of a record is COCO's iscrowd, `area` the annotation's own. Images whose names are
    numbers are taken in their order, as pycocotools does: it decides between equal scores.

    -> `COCO_NAMES` as keys of floats (-1 where there is nothing to find), and "per_class": AP (C,),
    NaN for a class without objects. ValueError for lists that do not belong together.
    """
    if len(records) == len(detections) and all(record.name.isdecimal() for record in records):
        order = sorted(range(len(records)), key=lambda i: int(records[i].name))
        records, detections = [records[i] for i in order], [detections[i] for i in order]
    objects, guesses = tabulate(records, detections, num_classes)
    guesses, rank = best_per_image(guesses, objects)

    def inside(area):  # (G,) or (D,) -> (4, ...): in each area range
        return np.stack([(area >= low) & (area <= high) for low, high in COCO_AREAS])

    counted = inside(objects.area) & ~objects.difficult
    near = inside(sides_of(guesses.boxes_xyxy).prod(axis=1))
    matched, hit = coco_match(guesses, objects, counted)
    label = [objects.label[row] for row in counted]
    positives = np.stack([np.bincount(x, minlength=num_classes + 1)[1:] for x in label])  # (4, C)
    precision = np.zeros((len(COCO_AREAS), len(COCO_IOUS), num_classes, len(COCO_RECALLS)))
    recall = np.zeros((*precision.shape[:3], len(COCO_BEST)))  # of the best 1, 10 and 100
    ranges = class_ranges(guesses.label, num_classes)
    for a, t in np.ndindex(precision.shape[:2]):
        bit = 1 << 10 * a + t
        tp, fp = (hit & bit) > 0, near[a] & ((matched & bit) == 0)
        for c in np.flatnonzero(positives[a]):
            right, wrong = tp[ranges[c]], fp[ranges[c]]
            curve = average_precision(right, wrong, positives[a, c])[2:]
            precision[a, t, c] = best_precision(*curve, COCO_RECALLS)
            found = rank[ranges[c]][right][:, None] < COCO_BEST
            recall[a, t, c] = found.sum(axis=0) / positives[a, c]

    def average(values, a):  # (.., C): over the classes that have objects in area range a
        return float(values[..., positives[a] > 0].mean()) if positives[a].any() else -1.0

    ap, ar = precision.mean(axis=3), recall.transpose(3, 0, 1, 2)  # (4, 10, C), (3, 4, 10, C)
    stats = [average(x, 0) for x in (ap[0], ap[0, 0], ap[0, 5])]  # all IoUs, .5, .75
    stats += [average(ap[a], a) for a in (1, 2, 3)]
    stats += [average(x[0], 0) for x in ar] + [average(ar[2, a], a) for a in (1, 2, 3)]
    per_class = np.where(positives[0] > 0, ap[0].mean(axis=0), np.nan)
    return dict(zip(COCO_NAMES, stats, strict=True), per_class=per_class)


# ---------------------------------------------------------------------------------------- results


def summarise(
    records: list[Record], detections: list[Detections], classes: Sequence[str], metric="voc"
) -> dict:
    """All numbers of one evaluation as plain data, None where there is nothing to measure.

    metric "voc07": "mAP" is the 11-point one; "voc": the area; "coco": COCO's AP.
    """
    voc = voc_ap(records, detections, len(classes))
    coco = coco_ap(records, detections, len(classes)) if metric == "coco" else {}
    result = as_plain_data(voc, coco, classes, metric, SIZES)
    result["images"] = len(records)
    result["objects"] = int(sum((~r.difficult).sum() for r in records))
    result["detections"] = int(sum(len(d.scores) for d in detections))
    return result
