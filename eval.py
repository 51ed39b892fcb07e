"""Run a detector over a data set and measure it.

    python eval.py runs/shapes/last.pt                    on what it was trained for: AP per class
    python eval.py CHECKPOINT --voc-root DIR              the sets of its run, or VOC2007 test
    python eval.py CHECKPOINT --coco-root DIR             the same, or val2017: COCO's 12 numbers

    records --+--> run_detector --> one Detections per image --+--> summarise --> results_text
              +------------------------------------------------+    metrics.py    plumbing/tables.py

For your own pictures, without annotations, use detect.py.

Letters: N images, P priors, C classes with background, D detections of one image.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

import data
from detect import COCO_MULTI_SCALE, MULTI_SCALE, detect_image, load_and_describe, to_pixels
from metrics import Detections, summarise
from plumbing import sources, submission
from plumbing.files import Record, decode_pixels, open_record, to_disk
from plumbing.pictures import draw_found, drawing_folder, save_drawn, save_sheet
from plumbing.program import Help, Progress, check_file, check_range, run_program
from plumbing.tables import results_text
from plumbing.threads import THREADS, spread
from scratchdet import ScratchDet, detect

# ----------------------------------------------------------------------------- running a detector


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
        return to_pixels(*detect(loc, logits, model.priors_cxcywh), sizes)

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

    `main` below does the two steps itself, since it has several ways to detect.
    With several ranks of torch.distributed, rank r takes records[r::world] and all return the same.
    """
    if world > 1:
        # On GPUs each rank has running statistics of BatchNorm of its own: all use those of rank 0.
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
    g.add_argument("--multi-scale", action="store_true", help="RefineDet320's passes, rescaled")
    g.add_argument("--draw", metavar="DIR", help="write the images with boxes, labels and scores")
    g.add_argument("--min-score", type=float, default=0.3, help="draw from this score on")
    g.add_argument("--json", metavar="FILE", help="write the numbers")
    g.add_argument("--results", metavar="FILE", help="write COCO results JSON (also of a test set)")
    g.add_argument("--comp4", metavar="DIR|FILE", help="write VOC server files, or FILE.tar.gz")
    args = parser.parse_args(argv)
    sources.check_eval_flags(args)
    check_range(args, "min_score", 0, 1)
    for flag in ("json", "results"):  # fail now, not after the evaluation
        check_file(getattr(args, flag), args.checkpoint, flag=f"--{flag}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, checkpoint = load_and_describe(args)
    classes = model.config.classes
    records = sources.open_test_set(args, checkpoint.get("args") or {}, classes)
    for flag in ("json", "results"):
        check_file(getattr(args, flag), *(record.path for record in records), flag=f"--{flag}")
    # A test set without annotations cannot be measured here, but its detections can be written, and
    # the server measures them.
    metric, annotated = metric_of(args.data, args.eval_sets), any(len(r.labels) for r in records)
    if args.json and not annotated:
        raise ValueError(f"--json {args.json}: {' '.join(args.eval_sets)} has no annotations")
    names = [to_disk(f"{record.name.replace('/', '_')}.jpg") for record in records]
    if args.draw is not None:
        drawing_folder(args.draw, [r.path for r in records], names)
    submission.check_comp4(args.comp4, records)

    if args.multi_scale:
        print("multi-scale: RefineDet320's passes, rescaled (the paper does not describe its own)")
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
        for record, one, name in zip(records, found, names, strict=True):
            save_drawn(draw_found(record, one, classes, args.min_score), Path(args.draw) / name)
        print(f"drawn: {args.draw}/ (truth green, detections from {args.min_score:g} orange)")


if __name__ == "__main__":
    run_program(main)
