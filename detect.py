"""Detect objects in your own pictures.

    python detect.py photo.jpg                            prints what it finds
    python detect.py photos/ --draw drawn/ --json found.json
    ffmpeg -i film.mp4 -f mjpeg - | python detect.py - --draw found.mjpeg
    python detect.py photos/ --checkpoint runs/mine/last.pt

    from detect import Detector                           the same from Python
    detector = Detector("runs/mine/last.pt")
    boxes_xyxy, scores, names = detector(image)           a PIL picture or a NumPy array; or a list

Boxes are (left, top, right, bottom) in pixels of the picture.
"""

import argparse
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from eval import MULTI_SCALE, ONE_SCALE, detect_image, load_and_describe
from metrics import Detections
from plumbing import machine
from plumbing.export import check_ending, export
from plumbing.files import SUFFIXES, open_image
from plumbing.frames import split_jpegs
from plumbing.pictures import as_rgb, draw_boxes, drawing_folder, upright
from plumbing.program import Help, check_file, check_range, run_program
from scratchdet import load_detector

ROOT = Path(__file__).resolve().parent
DEFAULTS = (ROOT / "weights/photos.pt", ROOT / "runs/shapes/last.pt")  # the first that is there
MIN_SCORE = 0.3  # where neither the user nor the checkpoint says what counts as found


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
        boxes, scores, labels = detect_image(self.model, image)
        good = scores >= self.min_score
        # label 0 is background, so label 1 is the first class
        names = [self.model.config.classes[label - 1] for label in labels[good]]
        return Found(boxes[good], scores[good], names)


def threshold(checkpoint: dict) -> float:
    """The score from which detections count as found.

    It is the one with the best F1 on the images that the checkpoint was evaluated on, or .3 where
    the checkpoint was never evaluated.
    """
    return (checkpoint.get("results") or {}).get("threshold") or MIN_SCORE


def find_pictures(names: list[str]) -> list[Path]:
    """The pictures named, and those inside the folders named, without hidden files."""
    pictures = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"{name}: no such picture or folder")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        # Only a folder is filtered by suffix: whoever names a file means it.
        inside = [p for p in inside if not p.name.startswith(".") or not path.is_dir()]
        some = [p for p in inside if p.suffix.lower() in SUFFIXES or not path.is_dir()]
        if not some:
            raise ValueError(f"{name}: no picture there ({' '.join(sorted(SUFFIXES))})")
        others = Counter(p.suffix for p in set(inside) - set(some) if p.is_file())
        if others:
            what = f"{others.total()} files left out, which are no pictures by their suffix"
            print(f"{name}: {what}: {' '.join(sorted(others))}", file=sys.stderr)
        pictures += some
    return pictures


def names_to_draw(pictures: list[Path]) -> dict[Path, str]:
    """A file name for each drawn picture, all different: its own, where several have it with the
    folders above. A suffix that Pillow does not know becomes .jpg."""
    own, names, used = Counter(path.name for path in pictures), {}, set()
    for path in dict.fromkeys(pictures):
        parts, all_parts = 1 if own[path.name] == 1 else 2, path.absolute().parts[1:]
        while (name := "_".join(all_parts[-parts:])) in used and parts < len(all_parts):
            parts += 1
        known = path.suffix.lower() in Image.registered_extensions()
        names[path] = name if known else f"{name}.jpg"
        used |= {name, names[path]}
    return names


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
            yield path, upright(open_image(path))
        except Exception as error:  # image decoders raise all kinds of errors on damaged files
            what = str(error) if str(path) in str(error) else f"{path}: cannot be decoded ({error})"
            print(f"error: {what}", file=sys.stderr)
            failed.append(str(path))


def detect_pictures(model, args: argparse.Namespace) -> int:
    """Detects in all pictures: prints, draws, writes JSON.

    -> the exit status: 1 if a picture could not be read, else 0.
    """
    classes, rows, failed = model.config.classes, [], []
    pictures = args.found
    folder = drawing_folder(args.draw, pictures) if args.draw is not None else None
    names = names_to_draw(pictures)
    for path, image in read_pictures(pictures, failed):
        found = detect_image(model, image, MULTI_SCALE if args.multi_scale else ONE_SCALE)
        rows.append(as_json(str(path), image, found, classes))
        print(f"{path}: {in_words(rows[-1], args.min_score)}", flush=True)
        if folder:
            boxes, scores, labels = (x[found.scores >= args.min_score] for x in found)
            drawn = folder / names[path]
            if drawn.is_symlink():  # it may lead to somebody's original
                raise ValueError(f"--draw {folder}: {drawn.name} there is a link; choose another")
            draw_boxes(image, boxes, labels, scores, classes).save(drawn)
    if rows and not any(d["score"] >= args.min_score for r in rows for d in r["detections"]):
        print(
            f"nothing found in {len(rows)} pictures. This checkpoint knows {', '.join(classes)}, "
            "and objects like those it was trained on; --min-score lists weaker detections"
        )
    if folder:
        print(f"drawn: {folder}/")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if failed:
        print(f"{len(failed)} of {len(pictures)} pictures cannot be read: {', '.join(failed)}",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


def detect_film(model, args: argparse.Namespace) -> int:
    """Detects in the JPEG frames on standard input, one by one: the film may be endless.

    --draw writes them with boxes, again as motion JPEG.
    -> the exit status: 1 if a frame could not be read, else 0.
    """
    classes, rows, failed, begin = model.config.classes, [], 0, time.perf_counter()
    with open(args.draw or os.devnull, "wb") as film:
        for n, frame in enumerate(split_jpegs(sys.stdin.buffer)):
            try:
                image = as_rgb(Image.open(io.BytesIO(frame), formats=["JPEG"]))
            except Exception as error:  # image decoders raise all kinds of errors
                print(f"error: frame {n} cannot be decoded ({error})", file=sys.stderr)
                failed += 1
                continue
            # One scale: a film is to keep up with its camera.
            found = detect_image(model, image)
            rows.append(as_json(f"frame {n}", image, found, classes))
            print(f"frame {n}: {in_words(rows[-1], args.min_score)}", flush=True)
            if args.draw:
                boxes, scores, labels = (x[found.scores >= args.min_score] for x in found)
                draw_boxes(image, boxes, labels, scores, classes).save(film, "JPEG", quality=90)
    if not rows:
        raise ValueError(
            "-: no JPEG frame on standard input. ffmpeg -i FILM -f mjpeg - writes them"
        )
    rate = len(rows) / (time.perf_counter() - begin)
    print(f"{len(rows)} frames, {rate:.1f}/s" + (f", drawn: {args.draw}" if args.draw else ""))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if failed else 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, and in `found` the pictures. ValueError before anything is loaded or written."""
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
    add("--multi-scale", action="store_true", help="9 scales, mirrored: slower, finds more")
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
    args.found = [] if args.pictures == ["-"] else find_pictures(args.pictures)
    if args.pictures == ["-"]:
        check_file(args.draw, args.checkpoint, "/dev/stdin")  # the film itself
    for file in (args.json, args.export):  # fail now, not after all pictures
        check_file(file, args.checkpoint, *args.found)
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
