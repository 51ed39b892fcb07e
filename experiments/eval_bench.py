"""Time the metrics and the kinds of error, beside pycocotools and tidecv where they are installed.

    python -m experiments.eval_bench [--images 5000] [--classes 80] [--guesses 200]

Images, objects and detections are random; half of the detections lie near an object. CPU seconds
of one core; from arrays (ours), from Python lists (theirs: no files are read on either side).

The random cases and the peers are those that the tests compare with, too.
"""

import argparse
import contextlib
import copy
import io
import time
from pathlib import Path

import numpy as np

from experiments import errors
from metrics import COCO_NAMES, Detections, coco_ap, voc_ap
from plumbing.files import Record
from plumbing.machine import hardware


def record(boxes, labels=None, *, name="1", difficult=None, size=(300, 300), area=None):
    """A `Record` without a picture, whatever is not given being the plainest."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    labels = np.ones(len(boxes), int) if labels is None else np.array(labels, int)
    difficult = np.zeros(len(boxes), bool) if difficult is None else np.array(difficult, bool)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if area is None else np.array(area, float)
    return Record(name, Path(f"{name}.jpg"), size, boxes, labels, difficult, area)


def found(boxes, scores, labels=None):
    """`Detections` from lists."""
    labels = np.ones(len(scores), int) if labels is None else np.array(labels, int)
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), labels)


def random_case(seed, images=12, classes=3, objects=8, guesses=40, crowd=0.2):
    """Records and detections, half of them near an object; odd seeds: on a grid, so with ties.

    Draws with random() alone, whose stream is the same in every NumPy.
    """
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for i in rng.random(images).argsort():
        g, d = int(rng.random() * (objects + 1)), int(rng.random() * (guesses + 1))
        corner, side = rng.random((g, 2)) * 200, np.exp(1.5 + 4 * rng.random((g, 2)))
        boxes, labels = np.c_[corner, corner + side], 1 + (rng.random(g) * classes).astype(int)
        corner, side = rng.random((d, 2)) * 200, np.exp(1.5 + 4 * rng.random((d, 2)))
        guess, named = np.c_[corner, corner + side], 1 + (rng.random(d) * classes).astype(int)
        scores, near, shift = rng.random(d), rng.random(d) < 0.5, rng.random((d, 4)) - 0.5
        if g:
            to = (rng.random(d) * g).astype(int)
            sides = boxes[to, 2:] - boxes[to, :2]
            guess[near] = (boxes[to] + 0.3 * shift * np.tile(sides, 2))[near]
            named[near] = labels[to][near]
        if seed % 2:
            boxes, guess, scores = np.round(boxes / 8) * 8, np.round(guess / 8) * 8, scores.round(1)
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 8)
            guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 8)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * (0.5 + 0.5 * rng.random(g).round(1))
        records.append(
            record(boxes, labels, name=str(i + 1), difficult=rng.random(g) < crowd, area=area)
        )
        detections.append(found(guess, scores, named))
    return records, detections


def by_pycocotools(records, detections, num_classes):
    """The 12 numbers, and the CPU seconds from the results as Python lists to them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        sides = [box[2] - box[0], box[3] - box[1]]  # of a decimal box: the decimals it was made of
        decimals = [round(side, 6) for side in sides]
        return [box[0], box[1]] + (decimals if np.allclose(sides, decimals, 0, 1e-12) else sides)

    annotations, results = [], []
    for r, f in zip(records, detections, strict=True):
        image = {"image_id": int(r.name)}
        rows = zip(r.boxes_xyxy, r.labels, r.difficult, r.area, strict=True)
        for box, label, crowd, area in rows:
            row = {"id": len(annotations) + 1, "category_id": int(label), "bbox": xywh(box)}
            annotations.append(image | row | {"iscrowd": int(crowd), "area": area})
        for box, score, label in zip(*f, strict=True):
            results.append(
                image | {"category_id": int(label), "bbox": xywh(box), "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": int(r.name)} for r in records],
            "annotations": annotations,
            "categories": [{"id": c + 1} for c in range(num_classes)],
        }
        truth.createIndex()
        start = time.process_time()
        ours = truth.loadRes(results) if results else copy.deepcopy(truth)
        if not results:
            ours.dataset["annotations"] = []
            ours.createIndex()
        peer = COCOeval(truth, ours, "bbox")
        peer.evaluate(), peer.accumulate(), peer.summarize()
    return [float(x) for x in peer.stats], time.process_time() - start


KINDS_OF_TIDECV = {"Cls": "classification", "Loc": "localisation", "Both": "both",
                   "Dupe": "duplicate", "Bkg": "background", "Miss": "missed"}  # fmt: skip


def by_tidecv(records, detections):
    """AP50 and the cost of each kind of error, how many there are, and the CPU seconds."""
    from tidecv import TIDE, Data

    truth, ours = Data("truth"), Data("ours", max_dets=100)
    for i, (r, f) in enumerate(zip(records, detections, strict=True)):
        truth.add_image(i, r.name)
        rows = zip(r.boxes_xyxy.tolist(), r.labels.tolist(), r.difficult, strict=True)
        for (x0, y0, x1, y1), label, difficult in rows:
            add = truth.add_ignore_region if difficult else truth.add_ground_truth
            add(i, label, [x0, y0, x1 - x0, y1 - y0])
        for (x0, y0, x1, y1), score, label in zip(*(x.tolist() for x in f), strict=True):
            ours.add_detection(i, label, score, [x0, y0, x1 - x0, y1 - y0])
    start = time.process_time()
    run = TIDE().evaluate(truth, ours, mode=TIDE.BOX)
    costs, counts = run.fix_main_errors(), run.count_errors()
    seconds = time.process_time() - start
    named = [{KINDS_OF_TIDECV[kind.short_name]: value for kind, value in some.items()}
             for some in (costs, counts)]  # fmt: skip
    return {"AP50": run.ap} | named[0], named[1], seconds


def main():
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=15, help="of an image, at most")
    parser.add_argument("--guesses", type=int, default=200, help="detections an image, at most")
    args = parser.parse_args()
    records, detections = random_case(0, args.images, args.classes, args.objects, args.guesses)
    objects, guesses = (sum(len(x.labels) for x in xs) for xs in (records, detections))
    print(f"{args.images:,} images, {objects:,} objects, {guesses:,} detections; {hardware('cpu')}")

    def timed(function, *more):
        start = time.process_time()
        result = function(records, detections, args.classes, *more)
        return result, time.process_time() - start

    print(f"voc_ap       {timed(voc_ap)[1]:8.2f} s")
    ours, seconds = timed(coco_ap)
    print(f"coco_ap      {seconds:8.2f} s")
    try:
        stats, theirs = by_pycocotools(records, detections, args.classes)
        print(f"pycocotools  {theirs:8.2f} s = {theirs / seconds:.1f} times coco_ap's")
        off = max(abs(ours[name] - value) for name, value in zip(COCO_NAMES, stats, strict=True))
        print(f"largest difference of the 12 numbers {off:.1e}")
    except ImportError:
        print("pycocotools is not installed: nothing to compare with")
    verdicts, seconds = timed(errors.judge)
    start = time.process_time()
    ours = errors.costs(verdicts)
    seconds += time.process_time() - start
    print(f"errors       {seconds:8.2f} s, of the {len(verdicts.kind):,} best 100 per image")
    try:
        costs, _, theirs = by_tidecv(records, detections)
        print(f"tidecv       {theirs:8.2f} s = {theirs / seconds:.1f} times errors'")
        off = max(abs(ours[name] - value) for name, value in costs.items())
        print(f"largest difference of AP50 and the six costs {off:.1e}")
    except ImportError:
        print("tidecv is not installed: nothing to compare with")


if __name__ == "__main__":
    main()
