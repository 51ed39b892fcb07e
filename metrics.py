"""The two metrics, VOC AP and COCO AP, in plain NumPy: no network, no torch.

    records, one Detections an image --> voc_ap | coco_ap --> summarise --> report

Both sort all detections of all images once and then work on whole columns: a million detections
take seconds. `python experiments/eval_bench.py` times them beside pycocotools.

Letters: D detections, G ground-truth boxes, K pairs of the two; of all images at once.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.

References: the VOC2007 devkit (VOCevaldet); COCOeval of pycocotools.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from records import Record

SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)}  # of objects, see voc_ap
COCO_NAMES = (  # in the order of COCOeval.stats
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
COCO_BEST = np.array((1, 10, 100))  # detections a class and image that count
COCO_AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # all, small, medium, large
PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the IoUs to some 100 MB


class Detections(NamedTuple):
    """What a detector says about one image."""

    boxes_xyxy: Array  # (D, 4) pixels of the original image
    scores: Array  # (D,)
    labels: Array  # (D,) int64, 1.. as in the records


# ---------------------------------------------------------------------------------- matching rows


class Rows(NamedTuple):
    """The boxes of all images, one a row; `key` numbers the (class, image) a box belongs to."""

    key: Array  # (R,) int64: (label - 1) * images + image
    boxes_xyxy: Array  # (R, 4) float64
    area: Array  # (R,) of the box, by the metric's own rule


def flatten(
    records: list[Record], detections: list[Detections], num_classes: int, *, by_number=False
) -> tuple[list[Array], tuple[Array, Array]]:
    """All ground truth and all detections as flat arrays.

    The images come in the order of the lists or, `by_number`, in that of their names.

    Returns (gt_key, gt_xyxy, difficult, gt_area), sorted by key, and (key, xyxy), sorted by class,
    then score descending, then image and row: the order in which both metrics count.
    """
    if len(records) != len(detections):
        raise ValueError(f"{len(detections)} images of detections for {len(records)} records")
    if by_number and all(record.name.isdecimal() for record in records):
        order = sorted(range(len(records)), key=lambda i: int(records[i].name))
        records, detections = [records[i] for i in order], [detections[i] for i in order]

    def column(rows, name, dtype=np.float64, shape=(-1,)):
        parts = [np.asarray(getattr(row, name), dtype).reshape(shape) for row in rows]
        return np.concatenate([np.empty((0, *shape[1:]), dtype), *parts])

    def keys(rows, what):
        counts = [len(row.labels) for row in rows]
        labels, image = column(rows, "labels", np.int64), np.repeat(np.arange(len(rows)), counts)
        for i in np.flatnonzero((labels < 1) | (labels > num_classes)):
            name = records[image[i]].name
            raise ValueError(
                f"{what} of image {name}: label {labels[i]} is not in 1..{num_classes}"
            )
        return (labels - 1) * len(records) + image

    gt_key = keys(records, "ground truth")
    gt = [gt_key, column(records, "boxes_xyxy", shape=(-1, 4))]
    gt += [column(records, "difficult", bool), column(records, "area")]
    order = np.argsort(gt_key, kind="stable")
    gt = [x[order] for x in gt]

    for record, found in zip(records, detections, strict=True):
        d = len(found.scores)
        finite = np.isfinite(found.scores).all() and np.isfinite(found.boxes_xyxy).all()
        if np.shape(found.boxes_xyxy) != (d, 4) or len(found.labels) != d or not finite:
            raise ValueError(
                f"detections of image {record.name}: expected finite boxes (D,4), scores and "
                f"labels (D,); got {np.shape(found.boxes_xyxy)}, {d}, {len(found.labels)}"
            )
    key, scores = keys(detections, "detections"), column(detections, "scores")
    order = np.lexsort((-scores, key // max(1, len(records))))  # stable: ties by image, then row
    return gt, (key[order], column(detections, "boxes_xyxy", shape=(-1, 4))[order])


def overlaps(
    det: Rows, gt: Rows, min_iou: float, *, plus: float = 0.0, crowd: Array | None = None
) -> list[Array]:
    """Every (detection, ground truth) of one class and image with IoU >= min_iou.

    Two `Rows`, gt sorted by key -> rows d (K,), rows g (K,), iou (K,), sorted by d, then g.
    `plus` is the devkit's 1 pixel. Where `crowd` (G,), the union is the detection alone.
    """
    num_keys = int(max(det.key.max(initial=-1), gt.key.max(initial=-1))) + 1
    per_key = np.bincount(gt.key, minlength=num_keys)
    first, count = (np.cumsum(per_key) - per_key)[det.key], per_key[det.key]  # (D,)
    busy = np.flatnonzero(count)  # most detections have no ground truth of their class at all
    ends = np.cumsum(count[busy])
    parts = [(np.empty(0, int), np.empty(0, int), np.empty(0))]
    start = 0
    while start < len(busy):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right"))
        n = count[busy[start:stop]]
        d = np.repeat(busy[start:stop], n)  # (K,)
        g = np.arange(len(d)) - np.repeat(np.cumsum(n) - n - first[busy[start:stop]], n)
        a, b = det.boxes_xyxy[d], gt.boxes_xyxy[g]  # (K, 4)
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + plus
        inter = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
        union = det.area[d] + gt.area[g] - inter
        if crowd is not None:
            union = np.where(crowd[g], det.area[d], union)
        iou = np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)
        near = iou >= min_iou
        parts.append((d[near], g[near], iou[near]))
        start = stop
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


# --------------------------------------------------------------------------------------- VOC


def interpolate(recall: Array, precision: Array, steps: Array) -> tuple[float, float]:
    """11-point AP and the area under the envelope, from the points at the true positives, each of
    which raised the recall by one of `steps`."""
    # precision only falls between true positives, so the best at recall >= r is at one of them
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # 3 * .1 > .3 in floating point, so a recall of exactly 3/10 does not reach the point .3: the
    # published numbers (py-faster-rcnn's voc_eval) were made so, and it moves a class by up to .001
    points = np.searchsorted(recall, np.arange(0, 1.1, 0.1))  # the first with recall >= r
    return best[points].mean(), best[:-1] @ steps


def mean(ap: Array) -> float:
    """Mean over the classes that have ground truth; NaN where none has."""
    return float(np.mean(ap[~np.isnan(ap)])) if not np.isnan(ap).all() else float("nan")


def voc_matched(
    records: list[Record], detections: list[Detections], num_classes: int, iou_threshold=0.5
) -> Callable:
    """Matches as `voc_ap` says -> a function that averages, of some sizes or some images only."""
    (gt_key, gt_xyxy, difficult, _), (key, xyxy) = flatten(records, detections, num_classes)
    det = Rows(key, xyxy, np.prod(xyxy[:, 2:] - xyxy[:, :2] + 1, axis=1))
    gt = Rows(gt_key, gt_xyxy, np.prod(gt_xyxy[:, 2:] - gt_xyxy[:, :2] + 1, axis=1))

    d, g, iou = overlaps(det, gt, iou_threshold, plus=1.0)
    d, g, iou = (x[iou > iou_threshold] for x in (d, g, iou))
    best = np.lexsort((g, -iou, d))  # of each detection the largest IoU, then the first box
    best = best[np.unique(d[best], return_index=True)[1]]
    found = np.full(len(key), -1)  # (D,) the row of the ground truth it looks at, or -1
    found[d[best]] = g[best]

    images = max(1, len(records))
    image, gt_image = key % images, gt_key % images
    starts = np.searchsorted(key // images, np.arange(num_classes + 1))  # key is sorted by class
    scale = np.array([300 * 300 / (r.size[0] * r.size[1]) for r in records])
    side = np.sqrt(np.maximum(det.area * scale[image], 0))
    gt_side = np.sqrt(np.maximum(gt.area * scale[gt_image], 0))

    def average(low=0.0, high=np.inf, times=None):
        """AP of the ground truth whose side is in [low, high): ap11, area, curves.

        `times` (N,) integers: how often each image counts, if not once.
        """
        times = np.ones(images, int) if times is None else times
        ignored = difficult | (gt_side < low) | (gt_side >= high)
        skip = np.where(found >= 0, np.append(ignored, False)[found], (side < low) | (side >= high))
        skip |= times[image] == 0
        rows = np.flatnonzero((found >= 0) & ~skip)
        rows = np.sort(rows[np.unique(found[rows], return_index=True)[1]])  # first of each: tp
        # true and false positives before each row
        counted = np.append(0, np.cumsum(np.where(skip, 0, times[image])))
        objects = gt_key[~ignored] // images, times[gt_image[~ignored]]
        positives = np.bincount(*objects, minlength=num_classes)
        ap, curves = np.full((2, num_classes), np.nan), []
        for c in range(num_classes):
            tp = rows[slice(*np.searchsorted(rows, starts[c : c + 2]))]
            gains = times[image[tp]]
            hits = np.cumsum(gains)
            recall = hits / max(1, positives[c])
            precision = hits / (counted[tp + 1] - counted[starts[c]])
            curves.append((recall, precision))
            if positives[c]:
                ap[:, c] = interpolate(recall, precision, gains / positives[c])
        return *ap, curves

    return average


def voc_ap(
    records: list[Record], detections: list[Detections], num_classes: int, iou_threshold=0.5
) -> dict:
    """Average precision by the VOC devkit's rules, both ways, for each class, and by size.

    A detection looks only at the ground truth of its class and image that it overlaps most (the
    first on ties). IoU, pixels counted inclusively (+1), strictly above `iou_threshold` and not
    yet found by a higher score: true positive; found already or too little overlap: false
    positive; difficult: neither. Detections of equal score count in the order of the images.

    Returns a dict: "ap11" and "area", each (num_classes,), NaN for a class without ground truth
    that is not difficult; "curves", for each class (recall, precision) at its true positives;
    "by_size": the mean of "ap11" and "area" over objects of one size only, for each of `SIZES`:
    sides of the object as a 300x300 network sees it, other ground truth ignored like difficult
    ones, and so is a detection of another size that finds nothing (as in COCO).
    Labels are 1..num_classes. Raises ValueError for lists that do not belong together.
    """
    average = voc_matched(records, detections, num_classes, iou_threshold)
    ap11, area, curves = average()
    by_size = {name: [mean(ap) for ap in average(*sides)[:2]] for name, sides in SIZES.items()}
    return {"ap11": ap11, "area": area, "curves": curves, "by_size": by_size}


# --------------------------------------------------------------------------------------- COCO


def exact_sides(boxes_xyxy: Array) -> Array:
    """Widths and heights (R, 2), rounded to the decimal number they are, if they are one.

    In floating point x + w - x may miss w. A side of 32 has to stay 32: an area of 32 * 32, on the
    border of two ranges, counts in both.
    """
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    decimal = np.round(sides, 6)
    slack = 4 * np.finfo(float).eps * np.abs(boxes_xyxy).max(axis=1, initial=0.0)[:, None]
    return np.where(np.abs(decimal - sides) <= slack, decimal, sides)


def coco_match(det: Rows, gt: Rows, crowd: Array, gt_ignored: Array) -> tuple[Array, Array]:
    """COCO's greedy matching for 10 IoU thresholds and 4 area ranges at once.

    Setting 10 * a + t (area range a, threshold t) is one bit of an integer, so one `&` answers all
    forty. In each class and image the detections choose in turn, best score first: of the ground
    truth still free, the one of largest IoU (the last on ties); an ignored one only if no other
    is left. Crowds stay free. The turns of all images run side by side: turn s handles
    the s-th (detection, ground truth) pair of each.

    gt_ignored (G,) bits. Returns (matched, hit), (D,) bits: matched at all; and to one that counts.
    """
    d, g, iou = overlaps(det, gt, COCO_IOUS[0], crowd=crowd)
    reached = (1 << np.searchsorted(COCO_IOUS, iou, side="right")) - 1  # (K,) thresholds <= IoU
    reached = reached * sum(1 << 10 * a for a in range(len(COCO_AREAS)))
    d, g, iou = np.tile(d, 2), np.tile(g, 2), np.tile(iou, 2)
    second = np.arange(len(d)) >= len(reached)  # each pair comes twice: as counting, as ignored
    allowed = np.tile(reached, 2) & np.where(second, gt_ignored[g], ~gt_ignored[g])
    turn = np.lexsort((-g, -iou, second, d, det.key[d]))
    turn = turn[allowed[turn] != 0]
    d, g, second, allowed = d[turn], g[turn], second[turn], allowed[turn]

    _, first, turns = np.unique(det.key[d], return_index=True, return_counts=True)
    longest = np.argsort(-turns, kind="stable")
    first, turns = first[longest], turns[longest]
    matched, hit = np.zeros(len(det.key), np.int64), np.zeros(len(det.key), np.int64)
    taken = np.zeros(len(gt.key), np.int64)
    for s in range(turns.max(initial=0)):
        pair = first[: np.searchsorted(-turns, -s)] + s  # those with more than s turns
        i, j = d[pair], g[pair]  # no detection and no ground truth comes twice in one turn
        new = allowed[pair] & ~taken[j] & ~matched[i]
        matched[i] |= new
        hit[i] |= np.where(second[pair], 0, new)
        taken[j] |= np.where(crowd[j], 0, new)
    return matched, hit


def coco_ap(records: list[Record], detections: list[Detections], num_classes: int) -> dict:
    """The 12 numbers of COCO's bounding-box evaluation, equal to those of pycocotools.

    `difficult` of a record is COCO's iscrowd, `area` the annotation's own. Images whose names are
    numbers are taken in their order, as pycocotools does: it decides between equal scores.

    Returns a dict: `COCO_NAMES` -> float (-1 where there is nothing to find), and "per_class", AP
    (num_classes,), NaN for a class without ground truth. Labels are 1..num_classes.
    Raises ValueError for lists that do not belong together.
    """
    (gt_key, gt_xyxy, crowd, gt_area), (key, xyxy) = flatten(
        records, detections, num_classes, by_number=True
    )
    by_image = np.argsort(key, kind="stable")  # the rank of each among its class and image
    _, first, count = np.unique(key[by_image], return_index=True, return_counts=True)
    rank = np.empty(len(key), np.int64)
    rank[by_image] = np.arange(len(key)) - np.repeat(first, count)
    key, xyxy, rank = (x[rank < COCO_BEST[-1]] for x in (key, xyxy, rank))

    gt_sides, sides = exact_sides(gt_xyxy), exact_sides(xyxy)
    gt_xyxy[:, 2:], xyxy[:, 2:] = gt_xyxy[:, :2] + gt_sides, xyxy[:, :2] + sides
    det, gt = Rows(key, xyxy, np.prod(sides, axis=1)), Rows(gt_key, gt_xyxy, gt_sides.prod(axis=1))

    def outside(area):  # (4, R): not in the area range
        return np.stack([(area < low) | (area > high) for low, high in COCO_AREAS])

    gt_outside, det_outside = outside(gt_area) | crowd, outside(det.area)
    ignored = sum(row.astype(np.int64) * 1023 << 10 * a for a, row in enumerate(gt_outside))
    matched, hit = coco_match(det, gt, crowd, ignored)

    images = max(1, len(records))
    starts = np.searchsorted(key // images, np.arange(num_classes + 1))  # key is sorted by class
    touched = np.flatnonzero(matched)  # precision peaks at hits: no other row needs a look
    edges = np.searchsorted(touched, starts)
    shape = (len(COCO_AREAS), len(COCO_IOUS), num_classes)
    precision = np.zeros((*shape, len(COCO_RECALLS)))
    recall = np.zeros((*shape, len(COCO_BEST)))  # of the best 1, 10 and 100 a class and image
    positives = np.zeros((len(COCO_AREAS), num_classes), np.int64)
    for a, out in enumerate(gt_outside):
        positives[a] = np.bincount(gt_key[~out] // images, minlength=num_classes)
    for a, t in np.ndindex(shape[:2]):
        if t == 0:  # rows before each that are in the area range
            inside = np.append(0, np.cumsum(~det_outside[a]))
        bit = 1 << 10 * a + t
        is_matched, is_hit = (matched[touched] & bit) > 0, (hit[touched] & bit) > 0
        spared = np.append(0, np.cumsum(is_matched & ~det_outside[a][touched]))
        for c in np.flatnonzero(positives[a]):
            near = edges[c] + np.flatnonzero(is_hit[edges[c] : edges[c + 1]])
            rows = touched[near]  # (H,) the true positives
            tp = np.arange(1.0, len(rows) + 1)
            fp = inside[rows] - inside[starts[c]] - (spared[near] - spared[edges[c]])
            envelope = np.maximum.accumulate((tp / (fp + tp + np.spacing(1)))[::-1])[::-1]
            points = np.searchsorted(tp / positives[a, c], COCO_RECALLS)
            precision[a, t, c] = np.append(envelope, 0.0)[points]
            recall[a, t, c] = (rank[rows][:, None] < COCO_BEST).sum(axis=0) / positives[a, c]

    def average(values, a):  # (T, C): over the classes that have ground truth in area range a
        return float(values[..., positives[a] > 0].mean()) if positives[a].any() else -1.0

    ap, ar = precision.mean(axis=3), recall  # (A, T, C), (A, T, C, 3)
    stats = [average(ap[0], 0), average(ap[0, 0], 0), average(ap[0, 5], 0)]  # IoU .5 and .75
    stats += [average(ap[a], a) for a in (1, 2, 3)]
    stats += [average(ar[0, ..., m], 0) for m in range(len(COCO_BEST))]
    stats += [average(ar[a, ..., 2], a) for a in (1, 2, 3)]
    per_class = np.where(positives[0] > 0, ap[0].mean(axis=0), np.nan)
    return dict(zip(COCO_NAMES, stats, strict=True), per_class=per_class)


# ------------------------------------------------------------------------------ results


def summarise(
    records: list[Record], detections: list[Detections], classes: Sequence[str], metric="voc"
) -> dict:
    """All numbers of one evaluation as plain data, None where there is nothing to measure.

    metric "voc07": "mAP" is the 11-point one; "voc": the area; "coco": COCO's AP.
    """

    def plain(x):
        return None if np.isnan(x) else float(x)

    voc = voc_ap(records, detections, len(classes))
    eleven, area = mean(voc["ap11"]), mean(voc["area"])
    result = {
        "mAP": plain(eleven if metric == "voc07" else area),
        "metric": metric,
        "mAP_11point": plain(eleven),
        "mAP_area": plain(area),
        "per_class": {
            name: {"ap_11point": plain(voc["ap11"][c]), "ap_area": plain(voc["area"][c])}
            for c, name in enumerate(classes)
        },
        "by_size": {
            name: {"mAP_11point": plain(a), "mAP_area": plain(b)}
            for name, (a, b) in voc["by_size"].items()
        },
        "images": len(records),
        "objects": int(sum((~r.difficult).sum() for r in records)),
        "detections": int(sum(len(d.scores) for d in detections)),
        "curves": {},
    }
    for name, (recall, precision) in zip(classes, voc["curves"], strict=True):
        some = np.unique(np.linspace(0, max(0, len(recall) - 1), 200).astype(int))[: len(recall)]
        result["curves"][name] = [recall[some].round(4).tolist(), precision[some].round(4).tolist()]
    if metric == "coco":
        coco = coco_ap(records, detections, len(classes))
        result["coco"] = {name: coco[name] for name in COCO_NAMES}
        result["mAP"] = coco["AP"]
        for name, ap in zip(classes, coco["per_class"], strict=True):
            result["per_class"][name]["ap_coco"] = plain(ap)
    return result


def report(result: dict) -> str:
    """The result of `summarise` as text."""

    def cell(x):
        return f"{'-' if x is None else format(x, '.4f'):>10}"

    columns = ["ap_11point", "ap_area"] + ["ap_coco"] * ("coco" in result)
    sizes = {f"{name}, {low} to {min(high, 300)} px": name for name, (low, high) in SIZES.items()}
    width = max(map(len, [*result["per_class"], *sizes])) + 1
    lines = [f"{'class':{width}}" + "".join(f"{c[3:]:>10}" for c in columns)]
    for name, row in result["per_class"].items():
        lines.append(f"{name:{width}}" + "".join(cell(row[c]) for c in columns))
    lines.append(f"{'mean':{width}}{cell(result['mAP_11point'])}{cell(result['mAP_area'])}")
    lines.append("by size: side of the object in the network's 300x300 image")
    for text, name in sizes.items():
        row = result["by_size"][name]
        lines.append(f"{text:{width}}{cell(row['mAP_11point'])}{cell(row['mAP_area'])}")
    if "coco" in result:
        lines += [f"{name:{width}}{cell(value)}" for name, value in result["coco"].items()]
    kind = {"voc07": "11-point, VOC2007", "voc": "area", "coco": "COCO AP"}[result["metric"]]
    lines.append(
        f"mAP {cell(result['mAP']).strip()} ({kind}); {result['objects']} objects, "
        f"{result['detections']} detections in {result['images']} images"
    )
    return "\n".join(lines)
