"""Run a detector over a data set and measure it.

    python eval.py runs/shapes/last.pt                    on what it was trained for: AP per class
    python eval.py CHECKPOINT --voc-root DIR              VOC2007 test
    python eval.py CHECKPOINT --coco-root DIR             val2017: COCO's 12 numbers

    records --+--> run_detector --> one Detections per image --+--> summarise --> results_text
              +------------------------------------------------+    (metrics.py)

For your own pictures, without annotations, use detect.py.

Letters: N images, P priors, C classes with background, D detections of one image.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import data
from experiments import baselines  # noqa: F401  the rivals' networks
from metrics import Detections, summarise
from ops.reference import normalise
from plumbing import machine, sources, submission
from plumbing.files import Record, decode_pixels, open_record, to_disk
from plumbing.pictures import as_rgb, draw_boxes, drawing_folder, save_sheet
from plumbing.program import Help, Progress, check_file, check_range, run_program
from plumbing.tables import results_text
from plumbing.threads import THREADS, spread
from scratchdet import ScratchDet, detect, load_detector, make_priors

# ----------------------------------------------------------------------------- running a detector


def to_pixels(
    boxes: Tensor, scores: Tensor, labels: Tensor, count: Tensor, sizes: list[tuple[int, int]]
) -> list[Detections]:
    """What `detect` returns, and the images' sizes [(w, h)] -> one `Detections` per image.

    Boxes are clipped to the image, as Caffe SSD does when it writes results.
    """
    boxes, scores, labels = (x.cpu().numpy() for x in (boxes, scores, labels))
    found = []
    # The first `count` rows of an image are detections, the rest is padding up to D = 200.
    for n, (k, (w, h)) in enumerate(zip(count.tolist(), sizes, strict=True)):
        scale = np.array([w, h, w, h], np.float32)
        xyxy = boxes[n, :k].clip(0, 1) * scale  # (D, 4)
        found.append(Detections(xyxy, scores[n, :k].copy(), labels[n, :k].copy()))
    return found


@torch.no_grad()
def run_detector(
    model: ScratchDet, records: list[Record], *,
    batch_size: int = 8, workers: int = 0, what: str | None = "evaluating",
) -> list[Detections]:  # fmt: skip
    """One `Detections` per record, in the order of the records.

    Each image is resized to the square input, whatever its aspect (section 4.1), and not augmented.
    The network stays on its device and returns to the mode it was in (training or evaluation).
    `what` is the first word of the progress line; None: no progress line.
    """
    device, mode = model.priors_cxcywh.device, model.training
    progress, found = Progress(len(records), what), []

    def run(batch: data.Batch) -> list[Detections]:
        batch = data.to_device(batch, device)
        loc, logits = model(data.prepare(batch, model.config))  # (N, P, 4), (N, P, C)
        sizes = [records[i].size for i in batch.indices.tolist()]
        # Scores and NMS in float32: bfloat16 would make many scores equal, and so their order.
        return to_pixels(*detect(loc.float(), logits.float(), model.priors_cxcywh), sizes)

    # BatchNorm must use its running statistics here, not those of the batch.
    model.eval()
    try:
        batches = data.ordered_batches(
            records, model.config.size, batch_size=batch_size, workers=workers
        )
        # On a CPU several batches run at once, each on its own core; the results keep their order.
        for some in spread(run, batches, THREADS if device.type == "cpu" else 1):
            found += some
            if what:
                progress(len(found))
    finally:
        model.train(mode)
    return found


def evaluate(
    model: ScratchDet, records: list[Record], *, metric: str = "voc",
    batch_size: int = 8, workers: int = 0, rank: int = 0, world: int = 1,
) -> tuple[dict, list[Detections]]:  # fmt: skip
    """Runs the model over the records and measures it -> (the dict of `summarise`, detections).

    With several ranks of torch.distributed, rank r takes records[r::world] and all return the same.
    """
    if world > 1:
        # Each rank has its own running statistics of BatchNorm: all must use those of rank 0.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    found = run_detector(
        model, records[rank::world], batch_size=batch_size, workers=workers,
        what=None if rank else "evaluating",
    )  # fmt: skip
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found)
        found = [None] * len(records)  # back in the order of the records
        for r, part in enumerate(parts):
            found[r::world] = part
    return summarise(records, found, model.config.classes, metric), found


def metric_of(kind: str, sets: list[str]) -> str:
    """The usual metric of a data set, as `summarise` calls it: COCO's AP for COCO, the 11-point AP
    for VOC2007, the area under the curve for all others."""
    if kind == "coco":
        return "coco"
    years = {name.rpartition(":")[0].removeprefix("VOC") for name in sets}  # 2007 or VOC2007
    return "voc07" if years == {"2007"} else "voc"


# ------------------------------------------------------------------------------ multi-scale testing

# The paper does not describe its multi-scale test; this is RefineDet320's (same authors), rescaled.
# Each row is a pass: (side of the input / config.size, short side / long side of the input, a, b).
# It keeps boxes with long side > a and short side < b, in pixels of the image: large inputs find
# small objects, small inputs large ones. Each pass also runs on the mirrored image.
ONE_SCALE = ((1.0, 1.0, 0, np.inf),)
MULTI_SCALE = (
    *ONE_SCALE,
    (1.0, 0.6, 0, np.inf),
    (0.6, 1.0, 32, np.inf),
    (1.2, 1.0, 0, 160),
    (1.4, 1.0, 0, 128),
    (1.6, 1.0, 0, 96),
    (1.8, 1.0, 0, 64),
    (2.2, 1.0, 0, 32),
)
# RefineDet adds this pass on COCO: "more scales make coco get better performance".
COCO_MULTI_SCALE = (*MULTI_SCALE, (2.0, 1.0, 0, 48))


def vote_boxes(
    found: Detections, *, soft: bool = False, iou_threshold: float = 0.45, min_score: float = 0.01
) -> Detections:
    """Box voting (Gidaris and Komodakis 2015): overlapping detections of a class become their mean.

    As in NMS, the best detection of a class absorbs all that overlap it with IoU >= iou_threshold
    (sides are one pixel longer, as in VOC's rules). It keeps its score; its box becomes the mean of
    all of theirs, weighted by score. With `soft` (for COCO) the absorbed ones also stay as they
    are, with their score times 1 - IoU, where that is still min_score or more.
    -> all of them, as in RefineDet, the best first.
    """
    rows = [np.empty((0, 6))]
    for label in np.unique(found.labels):
        mine = found.labels == label
        boxes, scores = found.boxes_xyxy[mine].astype(float), found.scores[mine].astype(float)
        order = np.argsort(-scores, kind="stable")
        boxes, scores = boxes[order], scores[order]
        area = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
        while len(scores):  # row 0 is the best of those that are left
            corners = np.minimum(boxes[0, 2:], boxes[:, 2:]) - np.maximum(
                boxes[0, :2], boxes[:, :2]
            )
            inter = np.prod((corners + 1).clip(0), axis=1)
            iou = inter / (area[0] + area - inter)
            near = iou >= iou_threshold
            near[0] = True  # itself, whatever rounding says
            box = np.average(boxes[near], axis=0, weights=scores[near])
            rows.append(np.array([[*box, scores[0], label]]))
            if soft:
                softer = scores * (1 - iou)
                again = near & (softer >= min_score)
                rows.append(np.c_[boxes[again], softer[again], np.full(again.sum(), label)])
            boxes, scores, area = boxes[~near], scores[~near], area[~near]
    rows = np.concatenate(rows)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


@torch.no_grad()
def detect_image(
    model: ScratchDet, image: Image.Image, passes: tuple = ONE_SCALE, *, soft: bool = False
) -> Detections:
    """`Detections` in a picture of any size, over several passes joined by `vote_boxes`.

    A single pass is not mirrored, and needs no voting. In the other passes the priors keep their
    sides in pixels while the input changes its size. A small input has fewer than six maps.
    """
    image = as_rgb(image)
    config, device, (w, h) = model.config, model.priors_cxcywh.device, image.size
    several, parts = len(passes) > 1, []
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w) uint8
    for scale, aspect, longer, shorter in passes:
        # The priors keep their size in pixels, so in a larger input they fit smaller objects.
        side = round(config.size * scale)
        sides = (side, round(side * aspect)) if w >= h else (round(side * aspect), side)
        x = torch.nn.functional.interpolate(pixels, sides[::-1], mode="bilinear", antialias=True)
        x = normalise(x.to(device), config.mean, config.std, config.channels)
        x = torch.cat([x, x.flip(3)]) if several else x  # (N, 3, H, W), N = 1 or 2
        maps = model.features(x)
        priors = make_priors(config, [m.shape[-2:] for m in maps], sides[::-1]).to(device)
        loc, logits = model.head(maps)
        found = to_pixels(*detect(loc.float(), logits.float(), priors), [(w, h)] * len(x))
        for mirrored, (xyxy, scores, labels) in enumerate(found):
            if mirrored:  # back into the picture that is not mirrored
                xyxy = np.stack([w - xyxy[:, 2], xyxy[:, 1], w - xyxy[:, 0], xyxy[:, 3]], axis=1)
            sizes = xyxy[:, 2:] - xyxy[:, :2] + 1  # (D, 2): VOC counts both edges
            keep = (sizes.max(axis=1) > longer) & (sizes.min(axis=1) < shorter)
            parts.append(Detections(xyxy[keep], scores[keep], labels[keep]))
    joined = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return vote_boxes(joined, soft=soft) if several else joined


# ------------------------------------------------------------------------------ pictures, files


def draw_found(
    record: Record, found: Detections, classes: Sequence[str], min_score: float
) -> Image.Image:
    """The picture of a record: ground truth green, detections scored min_score or more orange."""
    image, keep = decode_pixels(open_record(record), record), found.scores >= min_score
    image = draw_boxes(image, record.boxes_xyxy, record.labels, None, classes)
    boxes, scores, labels = (x[keep] for x in found)
    return draw_boxes(image, boxes, labels, scores, classes)


def draw_sheet(model: ScratchDet, records: list[Record], path: str | Path) -> None:
    """Writes a sheet of pictures: detections scored .3 or more, and the ground truth."""
    rows = zip(records, run_detector(model, records, what=None), strict=True)
    pictures = [draw_found(record, found, model.config.classes, 0.3) for record, found in rows]
    save_sheet(path, pictures, columns=4)


# ---------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=Help,
    )
    parser.add_argument("checkpoint", help="file that train.py wrote: network, classes, weights")
    sources.add_eval_flags(parser)
    g = parser.add_argument_group("output")
    g.add_argument("--multi-scale", action="store_true", help="our recipe: 8 scales, mirrored")
    g.add_argument("--draw", metavar="DIR", help="write the images with boxes, labels and scores")
    g.add_argument("--min-score", type=float, default=0.3, help="draw detections from this score")
    g.add_argument("--json", metavar="FILE", help="write the numbers")
    g.add_argument("--results", metavar="FILE", help="write COCO results JSON (also of a test set)")
    g.add_argument("--comp4", metavar="DIR|FILE", help="write VOC server files, or FILE.tar.gz")
    args = parser.parse_args(argv)
    sources.check_eval_flags(args)
    check_range(args, "min_score", 0, 1)
    for file in (args.json, args.results):  # fail now, not after the evaluation
        check_file(file, args.checkpoint)
    return args


def load_and_describe(args: argparse.Namespace) -> tuple[ScratchDet, dict]:
    """Loads args.checkpoint onto args.device and prints what it is -> (model, checkpoint)."""
    model, checkpoint = load_detector(args.checkpoint, args.device)
    if args.device != "cpu":  # the inputs are channels_last: else cuDNN transposes every weight
        model.to(memory_format=torch.channels_last)
    print(
        f"{args.checkpoint}: {model.config.backbone}, {len(model.config.classes)} classes, step "
        f"{checkpoint.get('step')}, commit {checkpoint.get('commit')}; on "
        f"{machine.hardware(args.device)}"
    )
    return model, checkpoint


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, checkpoint = load_and_describe(args)
    classes = model.config.classes
    records = sources.open_test_set(args, checkpoint.get("args") or {}, classes)
    for file in (args.json, args.results):
        check_file(file, *(record.path for record in records))
    # A test set without annotations cannot be measured here, but its detections can be written, and
    # the server measures them.
    metric, annotated = metric_of(args.data, args.eval_sets), any(len(r.labels) for r in records)
    if args.json and not annotated:
        raise ValueError(f"--json {args.json}: {' '.join(args.eval_sets)} has no annotations")
    if args.draw is not None:
        drawing_folder(args.draw, [r.path for r in records])

    if args.multi_scale:
        print("multi-scale: our recipe (the paper does not describe its own)")
        found, progress = [], Progress(len(records), "multi-scale")
        # as RefineDet: on COCO, whose AP asks for precise boxes, one more pass and soft voting
        passes = COCO_MULTI_SCALE if metric == "coco" else MULTI_SCALE
        for record in records:
            image = decode_pixels(open_record(record), record)
            found.append(detect_image(model, image, passes, soft=metric == "coco"))
            progress(len(found))
    else:
        found = run_detector(model, records, batch_size=args.batch_size, workers=args.workers)
    if annotated:
        results = summarise(records, found, classes, metric)
        print(results_text(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    if not any(len(f.scores) for f in found):
        print("nothing found in any image: is the checkpoint trained?")
    submission.write(args, records, found, classes)
    if args.draw:
        for record, one in zip(records, found, strict=True):
            picture = draw_found(record, one, classes, args.min_score)
            picture.save(Path(args.draw) / to_disk(f"{record.name.replace('/', '_')}.jpg"))
        print(f"drawn: {args.draw}/ (truth green, detections from {args.min_score:g} orange)")


if __name__ == "__main__":
    run_program(main)
