"""Detect objects in your own pictures.

    python detect.py photo.jpg                            prints what it finds
    python detect.py photos/ --draw drawn/ --json found.json
    ffmpeg -i film.mp4 -f mjpeg - | python detect.py - --draw found.mjpeg
    python detect.py photos/ --checkpoint runs/mine/last.pt

    from detect import Detector                           the same from Python
    detector = Detector("runs/mine/last.pt")
    boxes_xyxy, scores, names = detector(image)           a PIL picture or a NumPy array; or a list

    picture --> detect_image --> Detections --> a line of text, a drawing, JSON
                one pass, or several with larger and smaller inputs, joined by vote_boxes

Letters: N images, P priors, C classes with background, D detections of one image.
Boxes here are `_xyxy`, (left, top, right, bottom), in PIXELS of the picture.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Idle threads must sleep, as in train.py: beside other work, threads that spin are far slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch
from PIL import Image
from torch import Tensor

from experiments import baselines  # noqa: F401  the rivals' networks
from metrics import Detections
from ops.reference import normalise
from plumbing import machine
from plumbing.export import check_ending, export
from plumbing.frames import film_writer, split_jpegs
from plumbing.pictures import (
    as_rgb,
    draw_boxes,
    drawing_folder,
    find_pictures,
    names_to_draw,
    open_picture,
    save_drawn,
    upright,
)
from plumbing.program import Help, check_file, check_range, kept_as_json, run_program
from scratchdet import ScratchDet, detect, load_detector, make_priors

ROOT = Path(__file__).resolve().parent
DEFAULTS = (ROOT / "weights/photos.pt", ROOT / "runs/shapes/last.pt")  # the first that is there
MIN_SCORE = 0.3  # where neither the user nor the checkpoint says what counts as found


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


# A pass: (side of the input / config.size, short / long side of the input, longer, shorter). It
# keeps boxes with a long side > longer and a short side < shorter, in pixels of the picture.
ONE_SCALE = ((1.0, 1.0, 0, np.inf),)


@torch.no_grad()
def detect_image(
    model: ScratchDet, image: Image.Image, passes: tuple = ONE_SCALE, *, soft: bool = False
) -> Detections:
    """`Detections` in a picture of any size, over several passes joined by `vote_boxes`.

    With several passes each also runs mirrored; a single one gives what eval.py's `run_detector`
    gives, but that may decode a large JPEG at a fraction. The priors keep their sides in pixels of
    the input, so in a larger input they fit smaller objects. A small input has fewer maps.
    """
    image = as_rgb(image)
    config, device, (w, h) = model.config, model.priors_cxcywh.device, image.size
    several, parts = len(passes) > 1, []
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w) uint8
    for scale, aspect, longer, shorter in passes:
        side = round(config.size * scale)
        sides = (side, round(side * aspect)) if w >= h else (round(side * aspect), side)
        x = torch.nn.functional.interpolate(pixels, sides[::-1], mode="bilinear", antialias=True)
        x = normalise(x.to(device), config.mean, config.std, config.channels)
        x = torch.cat([x, x.flip(3)]) if several else x  # (N, 3, H, W), N = 1 or 2
        maps = model.features(x)
        priors = make_priors(config, [m.shape[-2:] for m in maps], sides[::-1]).to(device)
        loc, logits = model.head(maps)
        found = to_pixels(*detect(loc, logits, priors), [(w, h)] * len(x))
        for mirrored, (xyxy, scores, labels) in enumerate(found):
            if mirrored:  # back into the picture that is not mirrored
                xyxy = np.stack([w - xyxy[:, 2], xyxy[:, 1], w - xyxy[:, 0], xyxy[:, 3]], axis=1)
            sizes = xyxy[:, 2:] - xyxy[:, :2] + 1  # (D, 2): VOC counts both edges
            keep = (sizes.max(axis=1) > longer) & (sizes.min(axis=1) < shorter)
            parts.append(Detections(xyxy[keep], scores[keep], labels[keep]))
    joined = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return vote_boxes(joined, soft=soft) if several else joined


# ------------------------------------------------------------------------------ multi-scale testing

# The paper does not describe its multi-scale test; this is RefineDet320's (same authors), rescaled.
# Large inputs find small objects, small inputs large ones. Each pass also runs mirrored.
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
            corner = np.maximum(boxes[0, :2], boxes[:, :2])
            sides = np.minimum(boxes[0, 2:], boxes[:, 2:]) - corner + 1
            inter = np.prod(sides.clip(0), axis=1)
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


# ------------------------------------------------------------------------------ from Python


class Found(NamedTuple):
    """What is on one picture, best first."""

    boxes_xyxy: np.ndarray  # (D, 4) pixels
    scores: np.ndarray  # (D,) 0 to 1
    names: list[str]  # D class names


class Detector:
    """A checkpoint of train.py, ready for pictures of any size.

    `min_score`: detections below it are left out; default: the checkpoint's own threshold, else .3.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu", min_score: float | None = None):
        machine.check_device(str(device))
        check_range(argparse.Namespace(min_score=min_score), "min_score", 0, 1)
        self.model, about = load_detector(checkpoint, device)
        self.min_score = threshold(about) if min_score is None else min_score

    def __call__(self, images):
        """A picture -> `Found`; a list of pictures -> a list of them.

        A picture is PIL's, or a NumPy array (h,w), (h,w,3) RGB or (h,w,4) RGBA of uint8. PIL's is
        turned as its EXIF says, as every viewer shows it, and the boxes lie in the turned picture.
        """
        if isinstance(images, (list, tuple)):  # one by one: they may differ in size
            return [self(image) for image in images]
        image = upright(images) if isinstance(images, Image.Image) else images
        boxes, scores, labels = detect_image(self.model, image).above(self.min_score)
        # label 0 is background, so label 1 is the first class
        return Found(boxes, scores, [self.model.config.classes[label - 1] for label in labels])


def threshold(checkpoint: dict) -> float:
    """The score from which detections count as found.

    It is the one with the best F1 on the images that the checkpoint was evaluated on, or .3 where
    the checkpoint was never evaluated.
    """
    return (checkpoint.get("results") or {}).get("threshold") or MIN_SCORE


def as_json(name: str, image: Image.Image, found: Detections, classes: tuple[str, ...]) -> dict:
    """All detections of a picture, weak ones too, as plain data for --json."""
    rows = [
        {"label": classes[label - 1], "score": float(score),
         "box_xyxy": [round(float(v), 1) for v in xyxy]}
        for xyxy, score, label in zip(*found, strict=True)
    ]  # fmt: skip
    return {"image": name, "size": image.size, "detections": rows}


def in_words(row: dict, min_score: float) -> str:
    """The line that is printed for a picture: "dog 0.91, cat 0.55, 37 weaker"."""
    words = [f"{d['label']} {d['score']:.2f}" for d in row["detections"]]
    good = sum(d["score"] >= min_score for d in row["detections"])  # the first ones of the row
    if not good:
        return f"nothing above {min_score:g} (best guess {words[0]})" if words else "nothing"
    text = ", ".join(words[: min(good, 8)]) + (f" and {good - 8} more" if good > 8 else "")
    return text + (f", {len(words) - good} weaker" if len(words) > good else "")


def read_pictures(pictures: list[Path], failed: list[str]) -> Iterator[tuple[Path, Image.Image]]:
    """Opens one picture after another.

    One that cannot be read is reported and its name added to `failed`; the others go on.
    """
    for path in pictures:
        try:
            yield path, open_picture(path)
        except Exception as error:  # image decoders raise all kinds of errors on damaged files
            what = str(error) if str(path) in str(error) else f"{path}: cannot be decoded ({error})"
            print(f"error: {what}", file=sys.stderr)
            failed.append(str(path))


def detect_pictures(model, args: argparse.Namespace) -> int:
    """Detects in all pictures: prints, draws, writes JSON.

    -> the exit status: 1 if a picture could not be read, else 0.
    """
    classes, pictures, failed = model.config.classes, args.files, []
    names, folder = names_to_draw(pictures), None
    if args.draw is not None:
        folder = drawing_folder(args.draw, pictures, names.values())
    with kept_as_json(args.json) as rows:
        for path, image in read_pictures(pictures, failed):
            found = detect_image(model, image, MULTI_SCALE if args.multi_scale else ONE_SCALE)
            rows.append(as_json(str(path), image, found, classes))
            print(f"{path}: {in_words(rows[-1], args.min_score)}", flush=True)
            if folder:
                boxes, scores, labels = found.above(args.min_score)
                save_drawn(draw_boxes(image, boxes, labels, scores, classes), folder / names[path])
    if rows and not any(d["score"] >= args.min_score for r in rows for d in r["detections"]):
        print(
            f"nothing found in {len(rows)} pictures. This checkpoint knows {', '.join(classes)}, "
            "and objects like those it was trained on; --min-score lists weaker detections"
        )
    if folder:
        print(f"drawn: {folder}/")
    if failed:
        print(f"{len(failed)} of {len(pictures)} pictures cannot be read: {', '.join(failed)}",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


def detect_film(model, args: argparse.Namespace) -> int:
    """Detects in the JPEG frames on standard input, one by one: the film may be endless.

    --draw writes them with boxes, again as motion JPEG.
    -> the exit status: 1 if a frame could not be read, else 0.
    """
    classes, done, failed = model.config.classes, 0, 0
    begin = time.perf_counter()
    with kept_as_json(args.json) as rows, film_writer(args.draw) as add_frame:
        for n, frame in enumerate(split_jpegs(sys.stdin.buffer)):
            try:
                image = as_rgb(Image.open(io.BytesIO(frame), formats=["JPEG"]))
            except Exception as error:  # image decoders raise all kinds of errors
                print(f"error: frame {n} cannot be decoded ({error})", file=sys.stderr)
                failed += 1
                continue
            # One scale: a film is to keep up with its camera.
            found = detect_image(model, image)
            row = as_json(f"frame {n}", image, found, classes)
            print(f"frame {n}: {in_words(row, args.min_score)}", flush=True)
            done += 1
            if args.json:
                rows.append(row)
            if args.draw:
                boxes, scores, labels = found.above(args.min_score)
                add_frame(draw_boxes(image, boxes, labels, scores, classes))
        if not done:
            raise ValueError(
                "-: no JPEG frame on standard input. ffmpeg -i FILM -f mjpeg - writes them"
            )
    rate = done / (time.perf_counter() - begin)
    print(f"{done} frames, {rate:.1f}/s" + (f", drawn: {args.draw}" if args.draw else ""))
    return 1 if failed else 0


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, and in `files` the pictures. ValueError before anything is loaded or written."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE|FOLDER", help="or - for JPEG frames on stdin")
    add(
        "--checkpoint",
        metavar="FILE",
        help="of train.py; default: the photo detector in weights/, else the quick start's",
    )
    add("--min-score", type=float, help="from which score to show; default: the checkpoint's")
    add("--multi-scale", action="store_true", help="8 sizes and aspects: slower, finds more")
    add("--draw", metavar="DIR|FILE", help="write the pictures (or the film) with boxes")
    add("--json", metavar="FILE", help="write all detections")
    add(
        "--export",
        metavar="FILE",
        help="the detector as one file, .onnx or .pt2 (torch.export)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    machine.check_device(args.device)
    check_range(args, "min_score", 0, 1)
    if not args.pictures and not args.export:
        raise ValueError("which picture? Expected: python detect.py PICTURE|FOLDER|-")
    # argparse would show a default that may not be there.
    if args.checkpoint is None:
        args.checkpoint = next((str(p) for p in DEFAULTS if p.exists()), None)
    if args.checkpoint is None:
        raise ValueError("--checkpoint: none given, and no run here; `python train.py` makes one")
    args.files = [] if args.pictures == ["-"] else find_pictures(args.pictures)
    if args.pictures == ["-"]:
        check_file(args.draw, args.checkpoint, "/dev/stdin", flag="--draw")  # the film itself
    for flag in ("json", "export"):  # fail now, not after all pictures
        check_file(getattr(args, flag), args.checkpoint, *args.files, flag=f"--{flag}")
    check_ending(args.export)
    return args


def main(argv: list[str] | None = None) -> int:
    """-> the exit status: 1 if a picture could not be read, else 0."""
    args = parse_args(argv)
    model, checkpoint = load_and_describe(args)
    args.min_score = threshold(checkpoint) if args.min_score is None else args.min_score
    if args.export:
        export(model, args.export)
        size = model.config.size
        print(f"exported: {args.export}, pixels (N,3,{size},{size}) -> boxes, scores, labels")
    if args.pictures == ["-"]:
        return detect_film(model, args)
    return detect_pictures(model, args) if args.pictures else 0


if __name__ == "__main__":
    run_program(main)
