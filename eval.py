"""Measure a detector: VOC AP, COCO AP, AP by size, speed, pictures.

    python eval.py runs/shapes/last.pt                    on what it was trained for: AP a class
    python eval.py CHECKPOINT --voc-root DIR              VOC2007 test
    python eval.py CHECKPOINT --coco-root DIR             val2017: COCO's 12 numbers
    python eval.py CHECKPOINT --images DIR --draw OUT     your own pictures
    python eval.py CHECKPOINT --fps                       images/s, with and without NMS

    records --+--> run_detector --> one Detections an image --+--> voc_ap | coco_ap --> numbers
              +-----------------------------------------------+

The two metrics are plain NumPy and know no network: give them records and detections.

Letters: D detections, G ground-truth boxes; of one image or, inside the metrics, of all images.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.

References: the VOC2007 devkit (VOCevaldet); COCOeval of pycocotools; sections 4.2 to 4.5.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import data
from ops.reference import decode
from scratchdet import detect, load, make_priors

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
SECONDS = 5.0  # that each number of --fps is measured for


class Detections(NamedTuple):
    """What a detector says about one image."""

    boxes_xyxy: np.ndarray  # (D, 4) pixels of the original image
    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,) int64, 1.. as in the records


# ---------------------------------------------------------------------------------- matching rows


class Rows(NamedTuple):
    """The boxes of all images, one a row; `key` numbers the (class, image) a box belongs to."""

    key: np.ndarray  # (R,) int64: (label - 1) * images + image
    boxes_xyxy: np.ndarray  # (R, 4) float64
    area: np.ndarray  # (R,) of the box, by the metric's own rule


def flatten(records, detections, num_classes, *, by_number=False):
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
    xyxy, difficult = (
        column(records, "boxes_xyxy", shape=(-1, 4)),
        column(records, "difficult", bool),
    )
    order = np.argsort(gt_key, kind="stable")
    gt = [x[order] for x in (gt_key, xyxy, difficult, column(records, "area"))]

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


def overlaps(det, gt, min_iou, *, plus=0.0, crowd=None):
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


def voc_ap(records, detections, num_classes, iou_threshold=0.5):
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
    starts = np.searchsorted(key // images, np.arange(num_classes + 1))  # key is sorted by class
    scale = np.array([300 * 300 / (r.size[0] * r.size[1]) for r in records])
    side, gt_side = (
        np.sqrt(np.maximum(rows.area * scale[rows.key % images], 0)) for rows in (det, gt)
    )

    def average(low, high):
        """AP of the ground truth whose side is in [low, high): ap11, area, curves."""
        ignored = difficult | (gt_side < low) | (gt_side >= high)
        skip = np.where(found >= 0, np.append(ignored, False)[found], (side < low) | (side >= high))
        rows = np.flatnonzero((found >= 0) & ~skip)
        rows = np.sort(rows[np.unique(found[rows], return_index=True)[1]])  # first of each: tp
        counted = np.append(0, np.cumsum(~skip))  # true and false positives before each row
        positives = np.bincount(gt_key[~ignored] // images, minlength=num_classes)
        ap, curves = np.full((2, num_classes), np.nan), []
        for c in range(num_classes):
            tp = rows[slice(*np.searchsorted(rows, starts[c : c + 2]))]
            hits = np.arange(1, len(tp) + 1)
            recall = hits / max(1, positives[c])
            precision = hits / (counted[tp + 1] - counted[starts[c]])
            curves.append((recall, precision))
            if positives[c]:
                ap[:, c] = interpolate(recall, precision, positives[c])
        return *ap, curves

    ap11, area, curves = average(0, np.inf)
    by_size = {name: [mean(ap) for ap in average(*sides)[:2]] for name, sides in SIZES.items()}
    return {"ap11": ap11, "area": area, "curves": curves, "by_size": by_size}


def interpolate(recall, precision, positives):
    """11-point AP and the area under the envelope, from the points at the true positives."""
    # precision only falls between true positives, so the best at recall >= r is at one of them
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # 3 * .1 > .3 in floating point, so a recall of exactly 3/10 does not reach the point .3: the
    # published numbers (py-faster-rcnn's voc_eval) were made so, and it moves a class by up to .001
    points = np.searchsorted(recall, np.arange(0, 1.1, 0.1))  # the first with recall >= r
    return best[points].mean(), best.sum() / positives


def mean(ap):
    """Mean over the classes that have ground truth; NaN where none has."""
    return float(np.mean(ap[~np.isnan(ap)])) if not np.isnan(ap).all() else float("nan")


# --------------------------------------------------------------------------------------- COCO


def exact_sides(boxes_xyxy):
    """Widths and heights (R, 2), rounded to the decimal number they are, if they are one.

    In floating point x + w - x may miss w. A side of 32 has to stay 32: an area of 32 * 32, on the
    border of two ranges, counts in both.
    """
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    decimal = np.round(sides, 6)
    slack = 4 * np.finfo(float).eps * np.abs(boxes_xyxy).max(axis=1, initial=0.0)[:, None]
    return np.where(np.abs(decimal - sides) <= slack, decimal, sides)


def coco_match(det, gt, crowd, gt_ignored):
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


def coco_ap(records, detections, num_classes):
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


# ----------------------------------------------------------------------------- running a detector


def to_pixels(boxes, scores, labels, count, sizes):
    """The tensors of `detect` and the images' sizes [(w, h)] -> one `Detections` an image.

    Clipped to the image, as Caffe SSD does when it writes results.
    """
    boxes, scores, labels = (x.cpu().numpy() for x in (boxes, scores, labels))
    found = []
    for n, (k, (w, h)) in enumerate(zip(count.tolist(), sizes, strict=True)):
        scale = np.array([w, h, w, h], np.float32)
        xyxy = boxes[n, :k].clip(0, 1) * scale  # (D, 4)
        found.append(Detections(xyxy, scores[n, :k].copy(), labels[n, :k].copy()))
    return found


class Progress:
    """One live line on a terminal; elsewhere a line every half minute."""

    def __init__(self, total, what):
        self.total, self.what, self.start, self.said = total, what, time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, done):
        now = time.monotonic()
        rate = done / max(1e-9, now - self.start)
        if now - self.said < (0.5 if self.live else 30) and not (self.live and done == self.total):
            return
        eta = round((self.total - done) / max(1e-9, rate))
        line = (
            f"{self.what} {done}/{self.total}  {rate:.1f} images/s  ETA {eta // 60}:{eta % 60:02}"
        )
        print(f"\r{line}  " if self.live else line, file=sys.stderr, flush=True,
              end="\n" if not self.live or done == self.total else "")  # fmt: skip
        self.said = now


@torch.no_grad()
def run_detector(model, records, *, batch_size=8, workers=0, what="evaluating"):
    """One `Detections` a record, in their order.

    Each image is warped to the network's size (section 4.1), without augmentation. The network
    keeps its device and comes back in the mode it was in. `what` heads the line of progress; None
    for none.
    """
    device, mode = model.priors_cxcywh.device, model.training
    progress, found = Progress(len(records), what), []
    model.eval()
    try:
        for batch in data.ordered_batches(
            records, model.config.size, batch_size=batch_size, workers=workers
        ):
            batch = data.Batch(*(x.to(device, non_blocking=True) for x in batch))
            loc, logits = model(data.prepare(batch, model.config))
            sizes = [records[i].size for i in batch.indices.tolist()]
            found += to_pixels(*detect(loc.float(), logits.float(), model.priors_cxcywh), sizes)
            if what:
                progress(len(found))
    finally:
        model.train(mode)
    return found


def evaluate(model, records, *, metric="voc", batch_size=8, workers=0, rank=0, world=1):
    """Run the model over the records and measure: the dict of `summarise`.

    With several ranks of torch.distributed, rank r takes records[r::world] and all return the same.
    The weights of rank 0 count: BatchNorm's running statistics differ between ranks.
    """
    run = {"batch_size": batch_size, "workers": workers, "what": None if rank else "evaluating"}
    if world > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    found = run_detector(model, records[rank::world], **run)
    if world > 1:
        mine, parts = found, [None] * world
        dist.all_gather_object(parts, mine)
        found = [None] * len(records)
        for r, part in enumerate(parts):
            found[r::world] = part
    return summarise(records, found, model.config.classes, metric)


def summarise(records, detections, classes, metric="voc"):
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


def report(result):
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


# ------------------------------------------------------------------------------ multi-scale testing

# Our recipe, for the paper's "multi-scale testing" is not described: RefineDet320's (same authors),
# rescaled to this network. Input side and short side as factors; kept are boxes with long side > a
# and short side < b in pixels of the image. Each pass runs mirrored, too.
ONE_SCALE = ((1.0, 1.0, 0, np.inf),)
MULTI_SCALE = (
    *ONE_SCALE,
    (1.0, 0.6, 0, np.inf),
    (0.6, 1.0, 32, np.inf),
    (1.2, 1.0, 0, 160),
    (1.4, 1.0, 0, 128),
    (1.6, 1.0, 0, 96),
    (1.8, 1.0, 0, 64),
    (2.0, 1.0, 0, 48),
    (2.2, 1.0, 0, 32),
)


def normalise(pixels, config):
    """RGB pixels (N,3,H,W) of 0..255 -> what the network sees, as `data.prepare` makes it."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (config.mean, config.std))
    x = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    return x if config.channels == "rgb" else x.flip(1)


@torch.no_grad()
def detect_image(model, image, passes=ONE_SCALE, *, soft=False):
    """`Detections` of one RGB picture of any size, over several passes joined by `vote_boxes`.

    The priors keep their sides in pixels and lie where the actual maps are; a map too small for
    the next layer ends the pyramid. A single pass is not mirrored and not voted on.
    """
    config, device, (w, h) = model.config, model.priors_cxcywh.device, image.size
    several, parts = len(passes) > 1, []
    for scale, aspect, longer, shorter in passes:
        side = round(config.size * scale)
        sides = (side, round(side * aspect)) if w >= h else (round(side * aspect), side)
        pixels = np.asarray(image.resize(sides, Image.Resampling.BILINEAR)).copy()  # (H, W, 3)
        x = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device), config)
        x = torch.cat([x, x.flip(3)]) if several else x  # (N, 3, H, W), N = 1 or 2
        maps = model.features(x)
        priors = make_priors(config, [m.shape[-2:] for m in maps], sides[::-1]).to(device)
        loc, logits = model.head(maps)
        found = to_pixels(*detect(loc.float(), logits.float(), priors), [(w, h)] * len(x))
        for mirrored, (xyxy, scores, labels) in enumerate(found):
            if mirrored:
                xyxy = np.stack([w - xyxy[:, 2], xyxy[:, 1], w - xyxy[:, 0], xyxy[:, 3]], axis=1)
            sizes = xyxy[:, 2:] - xyxy[:, :2] + 1
            keep = (sizes.max(axis=1) > longer) & (sizes.min(axis=1) < shorter)
            parts.append(Detections(xyxy[keep], scores[keep], labels[keep]))
    joined = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return vote_boxes(joined, soft=soft) if several else joined


def vote_boxes(found, *, soft=False, iou_threshold=0.45, min_score=0.01, max_detections=200):
    """Box voting (Gidaris and Komodakis 2015): overlapping detections of a class become their mean.

    The best detection takes all of IoU >= iou_threshold (+1 pixel) with it: score the best's, box
    the mean weighted by the scores. `soft` (for COCO): the members stay, too, with their score
    times 1 - IoU where that is min_score or more. Score descending.
    """
    rows = [np.empty((0, 6))]
    for label in np.unique(found.labels):
        mine = found.labels == label
        boxes, scores = found.boxes_xyxy[mine].astype(float), found.scores[mine].astype(float)
        order = np.argsort(-scores, kind="stable")
        boxes, scores = boxes[order], scores[order]
        area = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
        while len(scores):
            corners = np.minimum(boxes[0, 2:], boxes[:, 2:]) - np.maximum(
                boxes[0, :2], boxes[:, :2]
            )
            inter = np.prod((corners + 1).clip(0), axis=1)
            iou = inter / (area[0] + area - inter)
            near = iou >= iou_threshold
            near[0] = True
            box = np.average(boxes[near], axis=0, weights=scores[near])
            rows.append(np.array([[*box, scores[0], label]]))
            if soft:
                softer = scores * (1 - iou)
                again = near & (softer >= min_score)
                rows.append(np.c_[boxes[again], softer[again], np.full(again.sum(), label)])
            boxes, scores, area = boxes[~near], scores[~near], area[~near]
    rows = np.concatenate(rows)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[:max_detections]]
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


# ----------------------------------------------------------------------------------------- pictures

GREEN, ORANGE = (0, 158, 60), (245, 130, 0)


def draw(image, boxes_xyxy, labels, scores, classes):
    """A copy of the picture with boxes in pixels: orange, named and scored.

    Without scores (None) they are ground truth: green, named inside at the bottom. Letters stay
    legible in pictures of 300 to 500 pixels and grow with larger ones.
    """
    image = image.convert("RGB").copy()
    pen, letters = ImageDraw.Draw(image), max(12, max(image.size) // 32)
    box_colour, ink = (GREEN, "white") if scores is None else (ORANGE, "black")
    try:
        font = ImageFont.load_default(letters)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType
        font = ImageFont.load_default()
    order = range(len(labels)) if scores is None else np.argsort(scores)  # the best comes on top
    for x0, y0, x1, y1 in np.asarray(boxes_xyxy, float)[order].tolist():
        corners = (x0, y0, max(x0, x1), max(y0, y1))
        pen.rectangle(corners, outline=box_colour, width=1 + letters // 8)
    for i in order:
        x0, y0, _, y1 = (float(v) for v in boxes_xyxy[i])
        text = classes[labels[i] - 1] + ("" if scores is None else f" {scores[i]:.2f}")
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        w, h = right - left + 4, bottom - top + 4
        x = max(0, min(x0, image.width - w))
        y = max(0, min(y1 - h if scores is None else y0 - h, image.height - h))
        pen.rectangle((x, y, x + w, y + h), fill=box_colour)
        pen.text((x + 2 - left, y + 2 - top), text, fill=ink, font=font)
    return image


def draw_found(record, found, classes, min_score):
    """The picture of a record: ground truth green, detections of min_score and more orange."""
    truth = draw(
        data.decode(data.open_record(record), record),
        record.boxes_xyxy,
        record.labels,
        None,
        classes,
    )
    keep = found.scores >= min_score
    return draw(truth, found.boxes_xyxy[keep], found.labels[keep], found.scores[keep], classes)


def draw_sheet(model, records, path, *, columns=4, side=300, min_score=0.3):
    """Writes one picture of a few records' detections beside their ground truth."""
    sheet = Image.new("RGB", (columns * side, -(-len(records) // columns) * side), "white")
    detections = run_detector(model, records, what=None)
    for i, record in enumerate(records):
        picture = draw_found(record, detections[i], model.config.classes, min_score)
        picture.thumbnail((side - 4, side - 4))
        sheet.paste(picture, (i % columns * side, i // columns * side))
    sheet.save(path)


# ---------------------------------------------------------------------------------- files and speed


def write_results(path, records, detections, category_ids):
    """COCO's results JSON: image_id, category_id (the official one), bbox [x, y, w, h], score."""
    rows = []
    for record, found in zip(records, detections, strict=True):
        image_id = int(record.name) if record.name.isdecimal() else record.name
        for (x0, y0, x1, y1), score, label in zip(*(x.tolist() for x in found), strict=True):
            bbox = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            category_id = category_ids[label - 1]
            rows.append(
                dict(image_id=image_id, category_id=category_id, bbox=bbox, score=round(score, 5))
            )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(rows))


def write_comp4(path, records, detections, classes, year, split):
    """The VOC server's layout, as a folder or, for a name in .tar.gz, .tgz or .tar, an archive.

    results/VOC2012/Main/comp4_det_test_<class>.txt, a line "image score xmin ymin xmax ymax" each;
    pixels count from 1, as in the annotations.
    """
    path, inside = Path(path), f"results/VOC{year}/Main/comp4_det_{split}_"
    files = {}
    for c, name in enumerate(classes, start=1):
        lines = []
        for record, found in zip(records, detections, strict=True):
            mine = found.labels == c
            for score, box in zip(found.scores[mine], found.boxes_xyxy[mine], strict=True):
                corners = " ".join(f"{max(v, 1):.1f}" for v in box)
                lines.append(f"{record.name} {score:.6f} {corners}\n")
        files[f"{inside}{name}.txt"] = "".join(lines)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        return
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


class Exported(nn.Module):
    """pixels (N,3,S,S) RGB 0..255 -> boxes (N,P,4) xyxy in image units, probabilities (N,P,C)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        loc, logits = self.model(normalise(pixels, self.model.config))
        return decode(loc, self.model.priors_cxcywh), logits.softmax(dim=-1)


def export(model, path):
    """Network and decoding as a torch.export file, for any batch size.

    `torch.export.load(path, extra_files=extra)` reads it without this code; extra["classes.json"]
    holds the class names, background first. NMS is left to the caller.
    """
    size = model.config.size
    pixels = torch.zeros(2, 3, size, size, device=model.priors_cxcywh.device)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Exported(model).eval(), (pixels,), dynamic_shapes=shapes)
    classes = json.dumps(["background", *model.config.classes])
    torch.export.save(program, path, extra_files={"classes.json": classes})


def hardware(device):
    """What the numbers were measured on, in words."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file; no such line in it
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@torch.no_grad()
def frames_per_second(model, records, *, batch_size):
    """Images/s (network alone, network and detect), float32, on warped images already in memory."""
    device = model.priors_cxcywh.device
    some = (records * batch_size)[:batch_size]
    batch = next(data.ordered_batches(some, model.config.size, batch_size=batch_size))
    x = data.prepare(data.Batch(*(t.to(device) for t in batch)), model.config)
    rates = []
    for with_nms in (False, True):
        done, start = -2, None  # two rounds to warm up
        while start is None or time.perf_counter() - start < SECONDS:
            loc, logits = model(x)
            if with_nms:
                detect(loc, logits, model.priors_cxcywh)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 1
            if done == 0:
                start = time.perf_counter()
        rates.append(done * batch_size / (time.perf_counter() - start))
    return rates


# ---------------------------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file of train.py; it knows its network and classes")
    g = parser.add_argument_group("data (none given: what the checkpoint was evaluated on)")
    g.add_argument("--data", choices=["shapes", "voc", "coco"], help="follows from the root given")
    g.add_argument("--voc-root", metavar="DIR", help="folder that holds VOC2007/, or the one above")
    g.add_argument("--coco-root", metavar="DIR", help="folder that holds annotations/, val2017/")
    g.add_argument("--shapes-root", metavar="DIR", help="default runs/shapes-data")
    g.add_argument("--eval-sets", nargs="+", metavar="SET", help="VOC; default 2007:test")
    g.add_argument("--coco-split", metavar="SPLIT", help="default val2017")
    g.add_argument("--images", metavar="DIR|FILE", help="your own pictures: detect, do not measure")
    g = parser.add_argument_group("detection")
    g.add_argument(
        "--multi-scale", action="store_true", help="our recipe: 9 scales, mirrored, voted"
    )
    g.add_argument("--min-score", type=float, default=0.3, help="of what is drawn or listed")
    g = parser.add_argument_group("output")
    g.add_argument("--draw", metavar="DIR", help="write the images with boxes, labels and scores")
    g.add_argument("--json", metavar="FILE", help="the numbers; with --images, the detections")
    g.add_argument("--results", metavar="FILE", help="COCO results JSON")
    g.add_argument("--comp4", metavar="DIR|FILE", help="VOC server files; FILE.tar.gz: the archive")
    g.add_argument("--export", metavar="FILE", help="write network + decoding by torch.export")
    g.add_argument(
        "--fps", action="store_true", help="time it, batch 1 and 8, with and without NMS"
    )
    g = parser.add_argument_group("system")
    g.add_argument("--batch-size", type=int, default=8)
    g.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def data_source(args, checkpoint):
    """What to measure on: (kind, root, sets), from the flags or else as train.py evaluated."""
    saved = checkpoint.get("args") or {}
    kind = args.data or (args.voc_root and "voc") or (args.coco_root and "coco")
    kind = kind or saved.get("data", "shapes")
    saved = saved if saved.get("data") == kind else {}
    root = getattr(args, f"{kind}_root") or saved.get(f"{kind}_root")
    if kind == "shapes":
        root = data.draw_shapes(root or "runs/shapes-data")
    if not root:
        raise ValueError(f"--data {kind}: where is it? Expected --{kind}-root DIR")
    sets = args.eval_sets or saved.get("eval_sets")
    if kind == "coco":
        return kind, root, [args.coco_split] if args.coco_split else sets or ["val2017"]
    return kind, root, sets or ["2007:test"]


def without_annotations(root, sets):
    """Records of sets without annotations, as VOC2012 test; None where there are some."""
    records = []
    for name in sets:
        tree, listing = data.find_set(root, name)
        for image_id, _ in data.read_lines(listing):
            path = tree / "JPEGImages" / f"{image_id}.jpg"
            if (tree / "Annotations" / f"{image_id}.xml").exists():
                return None
            with data.open_image(path) as image:
                size = image.size
            nothing = np.empty(0)
            records.append(
                data.Record(image_id, path, size, nothing.reshape(0, 4), nothing.astype(int),
                            nothing.astype(bool), nothing)
            )  # fmt: skip
    return records


def align(records, names, classes, where):
    """The records with labels in the checkpoint's order of classes."""
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(
            f"{where} detects {', '.join(classes)}; the data has {', '.join(names)}. It cannot be "
            f"measured on {', '.join(unknown)}: choose the data it was trained for"
        )
    lookup = np.array([0] + [classes.index(name) + 1 for name in names])
    return [record._replace(labels=lookup[record.labels]) for record in records]


def output_folder(path, sources):
    """Makes the folder; refuses one that holds the pictures themselves."""
    folder = Path(path)
    if any(folder.resolve() == source.resolve().parent for source in sources):
        raise ValueError(f"--draw {path}: the pictures are there and would be overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own_pictures(model, args):
    """Detect in pictures without annotations; print, draw, and write JSON."""
    path, classes, rows = Path(args.images), model.config.classes, []
    pictures = [path]
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in data.SUFFIXES)
    if not path.exists() or not pictures:
        raise ValueError(f"--images {path}: no picture there ({' '.join(data.SUFFIXES)})")
    folder = output_folder(args.draw, pictures) if args.draw else None
    passes = MULTI_SCALE if args.multi_scale else ONE_SCALE
    for picture in pictures:
        image = data.open_image(picture)
        try:
            image = data.to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # whatever a decoder raises on bytes from anywhere
            raise ValueError(f"{picture}: cannot be decoded ({error})") from None
        found = detect_image(model, image, passes)
        names = [classes[label - 1] for label in found.labels]
        keep = np.flatnonzero(found.scores >= args.min_score)
        text = ", ".join(f"{names[i]} {found.scores[i]:.2f}" for i in keep)
        best = f"best guess {names[0]} {found.scores[0]:.2f}" if names else "not even a guess"
        print(f"{picture}: {text or f'nothing above {args.min_score:g} ({best})'}")
        rows.append({"image": str(picture), "size": image.size, "detections": [
            {"label": names[i], "score": float(found.scores[i]),
             "box_xyxy": [round(float(v), 1) for v in found.boxes_xyxy[i]]} for i in keep
        ]})  # fmt: skip
        if folder:
            kept = (x[keep] for x in (found.boxes_xyxy, found.labels, found.scores))
            draw(image, *kept, classes).save(folder / picture.name)
    if not any(row["detections"] for row in rows):
        print(
            f"nothing found in {len(pictures)} pictures. This checkpoint knows {', '.join(classes)}"
            ", and objects like those it was trained on; --min-score lists weaker detections"
        )
    if folder:
        print(f"drawn: {folder}/")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def main(argv=None):
    args = parse_args(argv)
    model, checkpoint = load(args.checkpoint, args.device)
    classes, device = model.config.classes, model.priors_cxcywh.device
    print(
        f"{args.checkpoint}: {model.config.backbone}, {len(classes)} classes, step "
        f"{checkpoint.get('step')}, commit {checkpoint.get('commit')}; on {hardware(device)}"
    )
    if args.export:
        export(model, args.export)
        print(f"exported: {args.export}, pixels (N,3,{model.config.size},{model.config.size}) -> "
              "boxes (N,P,4) xyxy, probabilities (N,P,C)")  # fmt: skip
    if args.images:
        return own_pictures(model, args)
    asked = (args.data, args.voc_root, args.coco_root, args.draw, args.json, args.results, args.fps)
    if args.export and not any(asked):
        return None
    kind, root, sets = data_source(args, checkpoint)
    records, names = None, list(classes)
    if kind == "coco":
        records, names = data.read_coco(root, *sets)
    elif args.comp4:
        records = without_annotations(root, sets)
    if records is None:
        records, names = data.read_voc(root, sets)
    records = align(records, names, classes, args.checkpoint)
    metric = "voc07" if kind == "voc" and all(s.startswith("2007:") for s in sets) else "voc"
    metric = "coco" if kind == "coco" else metric
    if args.fps:
        for n in (1, 8):
            alone, whole = frames_per_second(model, records, batch_size=n)
            print(f"batch {n}: {alone:.1f} images/s, with softmax, decoding and NMS {whole:.1f}")
        return None
    folder = output_folder(args.draw, [r.path for r in records]) if args.draw else None

    if args.multi_scale:
        print("multi-scale: our recipe (the paper does not give its own)")
        found, progress = [], Progress(len(records), "multi-scale")
        for record in records:
            image = data.decode(data.open_record(record), record)
            found.append(detect_image(model, image, MULTI_SCALE, soft=metric == "coco"))
            progress(len(found))
    else:
        found = run_detector(model, records, batch_size=args.batch_size, workers=args.workers)
    if any(len(r.labels) for r in records):
        result = summarise(records, found, classes, metric)
        print(report(result))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    if not any(len(f.scores) for f in found):
        print("nothing found in any image: is the checkpoint trained?")
    if args.results:
        ids = range(1, len(classes) + 1)
        if kind == "coco":
            listing = json.loads(Path(root, f"annotations/instances_{sets[0]}.json").read_bytes())
            official = {category["name"]: category["id"] for category in listing["categories"]}
            ids = [official.get(name) for name in classes]
        write_results(args.results, records, found, ids)
        print(f"results: {args.results}")
    if args.comp4:
        year, _, split = sets[0].rpartition(":")
        write_comp4(args.comp4, records, found, classes, year or 2012, split)
        print(f"comp4 files: {args.comp4}")
    if args.draw:
        for record, one in zip(records, found, strict=True):
            draw_found(record, one, classes, args.min_score).save(folder / f"{record.name}.jpg")
        print(f"drawn: {folder}/ (ground truth green, detections of {args.min_score:g} up orange)")
    return None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
