"""Images and boxes, from files to batches: VOC, COCO, drawn shapes, and the SSD augmentation.

    python data.py                                   draws shapes; sheet.png: augmented, with boxes
    python data.py --voc-root DIR --sets 2007:trainval                  the same for a VOC tree
    python data.py --check --voc-root DIR            the loader run over everything: what is wrong
    python data.py --bench                           images/s of one core, beside ssd.pytorch's way

    files -> records -> source rectangle and boxes -> decode, one resize -> Batch of uint8
                                                  prepare, on the device: colour, mean -> network

Geometry comes first: expand, crop and flip are drawn from the boxes and the image *size* alone, as
one source rectangle, so the canvas of 16 times the image that SSD expands into never exists.
Letters: N images - S side of the input - G boxes of an image - T boxes of a batch. `_xyxy` boxes
are in units of the image, except in a Record, where they are the annotation's pixels.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
SHAPE_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no EPS: it runs a program
MAX_BYTES = {".xml": 16 << 20, ".txt": 64 << 20, ".json": 4 << 30}
MAX_DEPTH = 16  # of nested XML elements; VOC needs 4
warnings.simplefilter("error", Image.DecompressionBombWarning)  # refuse 89 Mpixel at the header


class Record(NamedTuple):
    """One image and what is on it. Boxes are as annotated: not clipped, nothing subtracted."""

    name: str  # "000005"; COCO: the image id
    path: Path
    size: tuple[int, int]  # width, height
    boxes_xyxy: np.ndarray  # (G, 4) float64, pixels
    labels: np.ndarray  # (G,) int64, 1..
    difficult: np.ndarray  # (G,) bool; COCO: iscrowd
    area: np.ndarray  # (G,) float64, square pixels; COCO: the annotation's own


class BadData(ValueError):
    """What is wrong with the data, and where: a file, or FILE:LINE."""

    def __init__(self, where: object, what: str):
        super().__init__(f"{where}: {what}")
        self.where, self.what = str(where), what


class Findings:
    """What the readers meet: refused at once when training, collected by `--check`.

    `refuse` is for what training cannot use, `handle` for what it can, saying once what it did,
    and `note` for what is fine and only a check mentions.
    """

    def __init__(self, *, collect: bool = False):
        self.collect = collect
        self.refused: dict[str, list[str]] = {}  # what -> where, as the two below
        self.handled: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def refuse(self, where: object, what: str) -> None:
        if not self.collect:
            raise BadData(where, what)
        self.refused.setdefault(what, []).append(str(where))

    def handle(self, where: object, what: str) -> None:
        self.handled.setdefault(what, []).append(str(where))

    def note(self, where: object, what: str) -> None:
        if self.collect:
            self.notes.setdefault(what, []).append(str(where))

    def say(self) -> None:
        for what, places in self.handled.items() if not self.collect else ():
            print(f"data: {what}: {len(places)}, first {places[0]}", file=sys.stderr)


def read_bytes(path: Path) -> bytes:
    """The content of a file that may come from anywhere: a regular one, of bounded size."""
    limit = MAX_BYTES[path.suffix]
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise BadData(path, f"expected a regular file of at most {limit >> 20} MiB")
    return path.read_bytes()


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """[(line, FILE:LINE), ...] of a text file, stripped, without the empty ones."""
    try:
        lines = read_bytes(Path(path)).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadData(path, f"not UTF-8 text ({error})") from None
    return [(line.strip(), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def read_classes(path: str | Path) -> list[str]:
    """Class names, one a line, without background: label 1 is the first."""
    if Path(path).suffix != ".txt" or not Path(path).is_file():
        raise ValueError(f"--classes {path}: expected a .txt file with one class name a line")
    names = [name for name, _ in read_lines(path)]
    if not names or len(set(names)) < len(names) or "background" in names:
        raise BadData(path, f"expected different names without background, one a line; got {names}")
    return names


def stays_inside(name: str) -> bool:
    """Whether a name that a file gives stays in its folder: no `..`, no absolute path, no NUL."""
    parts = name.replace("\\", "/").split("/")
    return ".." not in parts and parts[0] != "" and "\0" not in name and ":" not in parts[0]


def number(text: object) -> float:
    """A finite number, or NaN: for "12", 12 and "1.5", but not for "1_2", "inf", "x" or None."""
    try:
        value = float(text) if "_" not in str(text) else math.nan
    except (ValueError, TypeError, OverflowError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def check_box(box: list[float], size: tuple, name: str, where: str, found: Findings) -> bool:
    """Whether a box xyxy in pixels can be used; refuses what is not a box on the image."""
    (x0, y0, x1, y1), (w, h) = box, size
    if any(map(math.isnan, box)):
        found.refuse(where, f"{name}: the box must be four numbers")
    elif x1 < x0 or y1 < y0:
        found.refuse(where, f"{name}: box {box} is inverted; expected xmin < xmax, ymin < ymax")
    elif x1 == x0 or y1 == y0:
        found.refuse(where, f"{name}: box {box} is empty; expected xmin < xmax, ymin < ymax")
    elif min(x1, w) <= max(x0, 0) or min(y1, h) <= max(y0, 0):
        found.refuse(where, f"{name}: box {box} lies outside the {w}x{h} image")
    else:
        if max(-x0, -y0, x1 - w, y1 - h) > 1:
            found.handle(where, "boxes more than a pixel over the border, clipped for training")
        return True
    return False


# ------------------------------------------------------------------------------ VOC


def parse_xml(path: Path) -> list[tuple[str, str, int]]:
    """[("size/width", "500", line), ...], and ("object", "", line) where each object starts.

    Bounded on any input: 16 MiB, 16 levels, and no document type, the only place that declares
    entities (expansion bombs, files of this machine).
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    stack: list[str] = []
    text: list[str] = []
    leaves = []

    def start(tag, _):
        if len(stack) == MAX_DEPTH:
            raise ValueError(f"elements nested more than {MAX_DEPTH} deep")
        stack.append(tag)
        text.clear()
        if stack[1:] == ["object"]:
            leaves.append(("object", "", parser.CurrentLineNumber))

    def end(_):
        if value := "".join(text).strip():
            leaves.append(("/".join(stack[1:]), value, parser.CurrentLineNumber))
        stack.pop()
        text.clear()

    def doctype(*_):
        raise ValueError("a document type (which declares entities) is refused")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text.append, doctype
    data = read_bytes(path)
    try:
        parser.Parse(data, True)
    except (ValueError, LookupError, expat.ExpatError) as error:
        what = str(error).partition(": line")[0]
        where = f"{path}:{parser.CurrentLineNumber}"
        raise BadData(where, f"broken XML: {what}" if data else "the file is empty") from None
    return leaves


def read_annotation(xml: Path, image: Path, found: Findings) -> tuple:
    """size, names, boxes, difficult, FILE:LINE of the objects of one VOC annotation."""
    head: dict[str, str] = {}
    objects: list[dict] = []
    for tag, text, line in parse_xml(xml):
        if tag == "object":
            objects.append({"where": f"{xml}:{line}"})
        elif tag.startswith("object/"):
            objects[-1].setdefault(tag.removeprefix("object/"), text)
        else:
            head.setdefault(tag, text)
    if not stays_inside(head.get("filename", "-")):
        found.refuse(xml, f"file name {head['filename']!r} leaves its folder")
    width, height = (number(head.get(f"size/{side}", "0")) for side in ("width", "height"))
    if width == height == 0:
        width, height = open_image(image).size
        found.handle(xml, "sizes missing in the XML, taken from the image")
    if not (width >= 1 and height >= 1 and width % 1 == height % 1 == 0):
        raise BadData(xml, "size/width and size/height must be whole numbers of pixels")
    rows = []
    for entry in objects:
        name, where = entry.get("name"), entry["where"]
        box = [number(entry.get(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = entry.get("difficult", "0")
        if name is None:
            found.refuse(where, "an object without a name")
        elif difficult not in ("0", "1"):
            found.refuse(where, f"{name}: difficult must be 0 or 1; got {difficult!r}")
        elif check_box(box, (width, height), name, where, found):
            rows.append((name, box, difficult == "1", where))
            if min(box[:2]) < 1:
                found.note(where, "box counts from 0 (VOC's count from 1); nothing is subtracted")
            if any(side % 1 for side in box):
                found.note(where, "box with fractions of a pixel, used as it is")
    return (int(width), int(height)), rows


def list_sets(root: str | Path) -> list[str]:
    """The sets of the trees in `root`, as read_voc takes them; lists of one class are left out."""
    sets = []
    for tree in (
        Path(root),
        *sorted(Path(root).glob("*")),
        *sorted(Path(root).glob("VOCdevkit/*")),
    ):
        year = "" if tree == Path(root) else tree.name.removeprefix("VOC") + ":"
        for listing in sorted((tree / "ImageSets" / "Main").glob("*.txt")):
            if not re.search("_(train|val|trainval|test)$", listing.stem):
                sets.append(year + listing.stem)
    return sets


def find_set(root: str | Path, name: str) -> tuple[Path, Path]:
    """("data", "2007:trainval") -> data/VOC2007 and its ImageSets/Main/trainval.txt."""
    year, _, split = name.rpartition(":")
    folder = f"VOC{year}" if year.isdigit() else year
    if not split or not stays_inside(split) or not stays_inside(folder or "-"):
        raise ValueError(f"set {name!r}: expected YEAR:SPLIT such as 2007:trainval, or SPLIT")
    root = Path(root)
    trees = [root / folder, root / "VOCdevkit" / folder] if folder else [root]
    if root.resolve().name == folder:
        trees.append(root)
    for tree in trees:
        listing = tree / "ImageSets" / "Main" / f"{split}.txt"
        if listing.is_file():
            return tree, listing
    message = f"--voc-root {root}: no {Path(folder, 'ImageSets/Main', split)}.txt below it."
    if not root.is_dir():
        message = f"--voc-root {root}: no such folder."
    message += f" Expected the folder that contains {folder or 'ImageSets'}/"
    message += ", or the one above it." if folder else ", Annotations/ and JPEGImages/."
    if there := list_sets(root):
        message += f" Sets there: {' '.join(there)}."
        if year == "2012" and "2007:trainval" in there:
            message += " To train without VOC2012: --train-sets 2007:trainval"
    raise ValueError(message)


def read_voc(
    root: str | Path,
    sets: Iterable[str],
    classes: Iterable[str] | None = None,
    findings: Findings | None = None,
) -> tuple[list[Record], list[str]]:
    """Records of some sets of VOC trees, and the class names: label 1 is the first.

    `root` holds VOC2007/ (or VOCdevkit/VOC2007/) and the sets are "2007:trainval"; or `root` is
    itself a tree of Annotations, ImageSets/Main and JPEGImages and the sets are "train". Without
    `classes` the names are those of the annotations, sorted. Raises ValueError, naming the file.
    """
    if isinstance(classes, str) or isinstance(sets, str):
        raise ValueError(f"sets and classes are lists of names; got {sets!r}, {classes!r}")
    found = findings or Findings()
    images: list[tuple] = []  # image id, path, size, objects
    seen: dict[Path, str] = {}
    for name in sets:
        tree, listing = find_set(root, name)
        folder = tree / "JPEGImages"
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected the images there")
        files = sorted(os.listdir(folder), key=lambda f: (f.lower().endswith(".jpg"), f))
        paths = {Path(f).stem: folder / f for f in files if f.lower().endswith(SUFFIXES)}
        lines = read_lines(listing)
        if not lines:
            raise BadData(listing, "lists no images")
        for line, where in lines:
            # "000005", "000005.jpg", and "000005 -1" as in the devkit's lists of one class
            image_id = re.sub(r"\s+(-1|0|1)$", "", line)
            if image_id.lower().endswith(SUFFIXES):
                image_id = image_id.rpartition(".")[0]
            xml = tree / "Annotations" / f"{image_id}.xml"
            try:
                if not stays_inside(image_id):
                    raise BadData(where, f"image id {image_id!r} leaves its folder")
                if xml in seen:
                    raise BadData(where, f"{image_id} is listed twice, first at {seen[xml]}")
                seen[xml] = where
                if image_id not in paths:
                    raise BadData(where, f"no image {folder / image_id}.jpg")
                if not xml.is_file():
                    raise BadData(where, f"no annotation {xml}")
                images.append(
                    (image_id, paths[image_id], *read_annotation(xml, paths[image_id], found))
                )
            except BadData as error:
                found.refuse(error.where, error.what)
    if classes is None:
        classes = sorted({row[0] for *_, rows in images for row in rows})
    classes = list(classes)
    records = []
    for image_id, path, size, rows in images:
        for name, _, _, where in rows:
            if name not in classes:
                found.refuse(
                    where, f"class {name!r} is none of {', '.join(classes)}; --classes FILE"
                )
        rows = [row for row in rows if row[0] in classes]
        boxes = np.array([box for _, box, _, _ in rows], np.float64).reshape(-1, 4)
        labels = np.array([classes.index(name) + 1 for name, *_ in rows], np.int64)
        difficult = np.array([row[2] for row in rows], bool)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        records.append(Record(image_id, path, size, boxes, labels, difficult, area))
    if not any(len(record.labels) for record in records):
        found.refuse(root, f"no objects at all in the {len(records)} images of {' '.join(sets)}")
    found.say()
    return records, classes


# ------------------------------------------------------------------------------ COCO


def read_coco(
    root: str | Path, split: str, findings: Findings | None = None
) -> tuple[list[Record], list[str]]:
    """Records of annotations/instances_<split>.json with the images in <split>/, and class names.

    Label k is the k-th category by id. Crowd regions come as `difficult`. Boxes without area (two
    in train2017) are left out, and said. Raises ValueError, naming the file and the id.
    """
    found = findings or Findings()
    listing, folder = Path(root, "annotations", f"instances_{split}.json"), Path(root, split)
    if not listing.is_file() or not folder.is_dir():
        raise ValueError(
            f"--coco-root {root}: no annotations/{listing.name} and {split}/ below it. "
            "Expected the folder that contains both"
        )

    def refuse_constant(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        data = json.loads(read_bytes(listing), parse_constant=refuse_constant)
        categories = sorted((int(c["id"]), str(c["name"])) for c in data["categories"])
        images = [
            (int(i["id"]), str(i["file_name"]), i["width"], i["height"]) for i in data["images"]
        ]
        annotations = [
            (a["id"], a["image_id"], a["category_id"], [number(v) for v in a["bbox"]],
             a.get("iscrowd", 0), number(a.get("area")))
            for a in data["annotations"]
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BadData(listing, f"not an instances file of COCO ({what})") from None
    labels = {category: label for label, (category, _) in enumerate(categories, start=1)}
    for what, ids in (
        ("category", [c for c, _ in categories]),
        ("image", [i[0] for i in images]),
        ("annotation", [a[0] for a in annotations]),
    ):
        if len(set(ids)) < len(ids):
            twice = next(i for n, i in enumerate(sorted(ids)[1:]) if i == sorted(ids)[n])
            found.refuse(listing, f"{what} id {twice} is there twice")
    files = set(os.listdir(folder))
    sizes, objects = {}, {}
    for image_id, file_name, width, height in images:
        where = f"{listing} image {image_id}"
        if not stays_inside(file_name):
            found.refuse(where, f"file name {file_name!r} leaves its folder")
        elif file_name not in files and not (folder / file_name).is_file():
            found.refuse(where, f"no image {folder / file_name}")
        elif not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
            found.refuse(where, f"size {width!r} x {height!r}: expected whole numbers of pixels")
        else:
            sizes[image_id], objects[image_id] = (width, height), []
    known = {image[0] for image in images}
    for a, image_id, category, xywh, crowd, area in annotations:
        where = f"{listing} annotation {a}"
        if image_id not in known:
            found.refuse(where, f"no image {image_id} in the file")
        elif category not in labels:
            found.refuse(where, f"no category {category} in the file")
        elif len(xywh) != 4 or crowd not in (0, 1) or math.isnan(area):
            found.refuse(where, "expected a bbox of four numbers, an area, and iscrowd 0 or 1")
        elif image_id in sizes:
            x, y, w, h = xywh
            if w == 0 or h == 0:
                found.handle(where, "boxes without area, left out")
            elif check_box([x, y, x + w, y + h], sizes[image_id], f"{xywh}", where, found):
                row = (x, y, x + w, y + h, labels[category], crowd, area)
                objects[image_id].append(row)
    records = []
    for image_id, file_name, *_ in images:
        if image_id in sizes:
            rows = np.array(objects[image_id], np.float64).reshape(-1, 7)
            boxes, label, crowd, area = rows[:, :4], rows[:, 4], rows[:, 5], rows[:, 6]
            path, label = folder / file_name, label.astype(np.int64)
            size = sizes[image_id]
            records.append(Record(str(image_id), path, size, boxes, label, crowd == 1, area))
    if not any(len(record.labels) for record in records):
        found.refuse(listing, f"no objects at all in {len(records)} images")
    found.say()
    return records, [name for _, name in categories]


# ------------------------------------------------------------------------------ images


def open_image(path: Path) -> Image.Image:
    """Reads the header only. Refuses what is no image, and one too large, before any pixel."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise BadData(path, "the file is empty, or no regular file")
        return Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadData(path, f"too large to be a photograph, not decoded ({error})") from None
    except FileNotFoundError:
        raise BadData(path, "no such image") from None
    except BadData:
        raise
    except Exception as error:  # whatever a decoder raises on bytes from anywhere
        raise BadData(path, f"not an image that can be read ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits are scaled to 8, alpha is dropped, grey and CMYK are converted."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known white: save it with 8 or 16")
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def decode(image: Image.Image, record: Record) -> Image.Image:
    """The pixels of an opened image, as stored: an EXIF orientation is not applied, because the
    boxes of VOC and COCO are in stored pixels."""
    try:
        return to_rgb(image)
    except Exception as error:  # truncated, broken, 32-bit
        raise BadData(record.path, f"cannot be decoded ({error})") from None


def open_record(record: Record) -> Image.Image:
    """The image of a record, not yet decoded; its size must be the annotation's."""
    image = open_image(record.path)
    if image.size != record.size:
        hint = "; it has an EXIF orientation: store it upright" * (exif_orientation(image) != 1)
        sizes = "{}x{}, its annotation says {}x{}".format(*image.size, *record.size)
        raise BadData(record.path, f"the image is {sizes}{hint}")
    return image


def exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF does not make a broken picture
        return 1


def render(
    record: Record, source_xyxy: tuple, size: int, pixels: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A rectangle of the image, which may reach beyond it, as a canvas of `size` x `size`.

    Returns the canvas (S, S, 3) uint8 and `inside`, the pixels x0 y0 x1 y1 of it that the image
    covers whole; the others are left 0. One bilinear resize (antialiased where it shrinks) of just
    the source of those pixels, so boxes and pixels agree exactly. `pixels` (h, w, 3) is the decoded
    image, from the cache.
    """
    canvas = np.zeros((size, size, 3), np.uint8)
    inside, box = [0] * 4, [0.0] * 4
    for axis, length in enumerate(record.size):
        low, high = source_xyxy[axis], source_xyxy[axis + 2]
        unit = (high - low) / size  # of one canvas pixel, in units of the image
        first = math.ceil(max(0.0, -low / unit) - 1e-6)
        last = math.floor(min(size, (1 - low) / unit) + 1e-6)
        if last <= first:
            return canvas, (0, 0, 0, 0)  # all of it lies beside the image: nothing to decode
        inside[axis], inside[axis + 2] = first, last
        box[axis] = max(0.0, (low + first * unit) * length)
        box[axis + 2] = min(float(length), (low + last * unit) * length)
    x0, y0, x1, y1 = inside
    shrink = min((box[2] - box[0]) / (x1 - x0), (box[3] - box[1]) / (y1 - y0))
    if pixels is None:
        image = open_record(record)
        if image.format == "JPEG" and shrink >= 2:  # decode at 1/2, 1/4 or 1/8: DCT scaling
            factor = min(8, 1 << int(math.log2(shrink)))
            image.draft(None, (image.width // factor, image.height // factor))
            factor = round(record.size[0] / image.width)
            box = [min(side / factor, image.size[i % 2]) for i, side in enumerate(box)]
        image = decode(image, record)
    else:  # only the part that the filter reads; 4: its support at most, on either side
        margin = math.ceil(max(box[2] - box[0], box[3] - box[1]) / size) + 4
        left, top = max(0, int(box[0]) - margin), max(0, int(box[1]) - margin)
        part = pixels[top : int(box[3]) + margin + 1, left : int(box[2]) + margin + 1]
        image = Image.fromarray(np.ascontiguousarray(part))
        box = [box[0] - left, box[1] - top, box[2] - left, box[3] - top]
    resized = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=tuple(box))
    canvas[y0:y1, x0:x1] = np.asarray(resized)
    return canvas, (x0, y0, x1, y1)


# ------------------------------------------------------------------------------ augmentation

MIN_IOUS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])  # samplers 1 to 5; 0 is the whole, 6 any crop
TRIALS = 50


def expand(rng: np.random.Generator) -> np.ndarray:
    """Half the time, a canvas of 1 to 4 times the image, which lies anywhere in it: -> (4,) xyxy
    in units of the image, (0, 0, 1, 1) being the image itself (Caffe ExpandImage)."""
    if rng.random() < 0.5:
        return np.array([0.0, 0.0, 1.0, 1.0])
    ratio = rng.uniform(1.0, 4.0)
    corner = -rng.uniform(0.0, ratio - 1.0, 2)
    return np.concatenate([corner, corner + ratio])


def crop(boxes_xyxy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of SSD's seven samplers: (G, 4) -> (4,) xyxy, all in units of what is cropped.

    Samplers 1 to 5 take the first of 50 random crops that overlaps at least one box with IoU >=
    0.1, 0.3, 0.5, 0.7, 0.9; sampler 6 takes any crop; all six need a box. One of those that
    succeeded, or the whole, is picked uniformly (Caffe batch_sampler). Drawn all at once.
    """
    if len(boxes_xyxy) == 0:
        return np.array([0.0, 0.0, 1.0, 1.0])
    u = rng.random((4, len(MIN_IOUS) * TRIALS + 1))
    scale = 0.3 + 0.7 * u[0]
    low, high = np.maximum(0.5, scale**2), np.minimum(2.0, scale**-2.0)
    root = np.sqrt(low + (high - low) * u[1])  # of the aspect ratio
    sides = np.stack([scale * root, scale / root], axis=1)  # (K, 2), both <= 1
    corner = u[2:].T * (1.0 - sides)
    crops = np.concatenate([corner, corner + sides], axis=1)  # (K, 4)

    left, top, right, bottom = crops[:-1].T[:, :, None]  # (K-1, 1) each
    x0, y0, x1, y1 = boxes_xyxy.T  # (G,) each
    inter = (np.minimum(right, x1) - np.maximum(left, x0)).clip(0.0)
    inter *= (np.minimum(bottom, y1) - np.maximum(top, y0)).clip(0.0)  # (K-1, G)
    union = (sides.prod(axis=1)[:-1, None] + (x1 - x0) * (y1 - y0)) - inter
    iou = (inter / union).max(axis=1).reshape(len(MIN_IOUS), TRIALS)
    success = iou >= MIN_IOUS[:, None]
    firsts = success.argmax(axis=1) + TRIALS * np.arange(len(MIN_IOUS))
    choices = [-2, *firsts[success.any(axis=1)], -1]  # -2: the whole
    choice = choices[rng.integers(len(choices))]
    return np.array([0.0, 0.0, 1.0, 1.0]) if choice == -2 else crops[choice]


def project(
    boxes_xyxy: np.ndarray, labels: np.ndarray, source_xyxy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the image -> boxes of the source rectangle: those whose centre lies in it, clipped
    to it, without those of no area (Caffe's emit constraint CENTER). Possibly none."""
    corner, size = source_xyxy[:2], source_xyxy[2:] - source_xyxy[:2]
    centre = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2 - corner) / size
    boxes = ((boxes_xyxy.reshape(-1, 2, 2) - corner) / size).clip(0.0, 1.0).reshape(-1, 4)
    keep = ((centre >= 0) & (centre <= 1)).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[keep], labels[keep]


def flip(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Boxes of the mirrored image: [[.1, .2, .3, .4]] -> [[.7, .2, .9, .4]]."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([1 - x1, y0, 1 - x0, y1], axis=1)


def draw_colour(rng: np.random.Generator) -> tuple[float, ...]:
    """Parameters of `distort`: order, brightness, contrast, saturation, hue, each used half the
    time (Caffe ApplyDistort: 32, [.5, 1.5], [.5, 1.5], 18 of 180). (0, 0, 1, 1, 0) does nothing."""
    use, u = rng.random(5) < 0.5, rng.uniform(-1.0, 1.0, 4)
    return (
        float(use[0]),
        32 * u[0] if use[1] else 0.0,
        1 + u[1] / 2 if use[2] else 1.0,
        1 + u[2] / 2 if use[3] else 1.0,
        18 * u[3] if use[4] else 0.0,
    )


def distort(images: Tensor, colour: Tensor) -> Tensor:
    """SSD's colour steps: (N, 3, H, W) float RGB with whole values 0..255, (N, 5) -> the same.

    Brightness, contrast, saturation, hue; or with order 1 contrast last. Each step ends in whole
    values 0..255, as Caffe's 8-bit images do. Saturation and hue act in HSV: S is clamped at its
    maximum, H (180 to the circle) at 0, and wraps above 180. Not reproduced: the rounding of H and
    S themselves to 8 bits. Same arithmetic for any N and on any device.
    """
    order, brightness, contrast, saturation, hue = colour.float()[:, :, None, None].unbind(1)
    last = contrast.where(order > 0, 1.0)
    first = contrast.where(order == 0, 1.0)
    x = images

    def used(values: Tensor, nothing: float) -> bool:  # on a GPU asking would cost a sync
        return values.is_cuda or bool((values != nothing).any())

    if used(brightness, 0.0):
        x = (x + brightness[:, None]).round_().clamp_(0, 255)
    if used(first, 1.0):
        x = (x * first[:, None]).round_().clamp_(0, 255)
    if used(saturation, 1.0):
        value, chroma = value_and_chroma(x)
        factor = torch.minimum(saturation, value / chroma.clamp(min=1.0))  # S <= its maximum
        x = (value[:, None] - (value[:, None] - x) * factor[:, None]).round_()
    if used(hue, 0.0):
        value, chroma = value_and_chroma(x)
        r, g, b = x.unbind(1)  # (N, H, W)
        safe = chroma.clamp(min=1.0)
        h = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
        h = torch.where(value == r, (g - b) / safe, h)  # sixths of the circle
        h = torch.where(h < 0, h + 6, h)
        h = (h + hue / 30).clamp_(min=0)
        h = torch.where(h >= 6, h - 6, h)
        lowest = value - chroma
        x = torch.stack([(h - 3).abs_() - 1, 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], dim=1)
        x = x.clamp_(0, 1).mul_(chroma[:, None]).add_(lowest[:, None]).round_()
    if used(last, 1.0):
        x = (x * last[:, None]).round_().clamp_(0, 255)
    return x


def value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """V = max and V - min over the channels: (N, 3, H, W) -> (N, H, W) each."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    return value, value - torch.minimum(torch.minimum(r, g), b)


def prepare(batch: "Batch", config) -> Tensor:
    """What the network sees: (N, 3, S, S) float32, channels_last, on the device of the batch.

    Colour, then `config.mean` outside the image, then (x - mean) / std in `config.channels`.
    """
    images = batch.images
    mean = torch.tensor(config.mean, device=images.device)[:, None, None]  # (3, 1, 1), 0..255
    std = torch.tensor(config.std, device=images.device)[:, None, None]
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
    pixel = torch.arange(images.shape[-1], device=images.device)  # (S,)
    x0, y0, x1, y1 = batch.inside[:, :, None].unbind(1)  # (N, 1) each
    columns, rows = (pixel >= x0) & (pixel < x1), (pixel >= y0) & (pixel < y1)  # (N, S)
    covered = (rows[:, None, :, None] & columns[:, None, None, :]).float()  # (N, 1, S, S)
    step = len(images) if images.is_cuda else 1  # on a CPU one image at a time stays in its cache
    for n in range(0, len(images), max(1, step)):
        some = slice(n, n + step)
        x = images[some].float().contiguous()
        x = (distort(x, batch.colour[some]) - mean) / std * covered[some]
        out[some] = x if config.channels == "rgb" else x.flip(1)
    return out


# ------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    images: Tensor  # (N, 3, S, S) uint8 RGB, channels_last; 0 outside `inside`
    inside: Tensor  # (N, 4) int64 x0 y0 x1 y1: the pixels that the image covers
    colour: Tensor  # (N, 5) float32, for `distort`
    boxes_xyxy: Tensor  # (T, 4) float32, in units of the canvas
    labels: Tensor  # (T,) int64
    offsets: Tensor  # (N+1,) int64: image n owns boxes offsets[n]:offsets[n+1]
    indices: Tensor  # (N,) int64, rows of `records`


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    return Batch(*(x.to(device, non_blocking=True) for x in batch))


class Dataset(torch.utils.data.Dataset):
    """dataset[epoch, index] is one sample; all its randomness is that of (seed, epoch, index)."""

    def __init__(
        self,
        records: list[Record],
        size: int,
        *,
        seed: int = 0,
        augment: str = "ssd",
        keep_difficult: bool = True,
        cache: str | Path | None = None,
    ):
        if augment not in ("ssd", "flip", "none"):
            raise ValueError(f"augment is {augment!r}; expected ssd, flip or none")
        self.records, self.size, self.seed, self.augment = records, size, seed, augment
        self.keep_difficult = keep_difficult
        self.cache = None if cache is None else build_cache(records, cache)
        self.starts = cache_starts(records) if cache else None

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        record = self.records[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        boxes = (record.boxes_xyxy / np.array(record.size * 2)).clip(0.0, 1.0)
        labels = record.labels
        if not self.keep_difficult:
            boxes, labels = boxes[~record.difficult], labels[~record.difficult]
        source, colour = np.array([0.0, 0.0, 1.0, 1.0]), (0.0, 0.0, 1.0, 1.0, 0.0)
        if self.augment == "ssd":
            source = expand(rng)
            corner, side = source[:2], source[2:] - source[:2]
            part = crop(project(boxes, labels, source)[0], rng)
            source = np.concatenate([corner + part[:2] * side, corner + part[2:] * side])
            colour = draw_colour(rng)
        boxes, labels = project(boxes, labels, source)
        pixels = None
        if self.cache is not None:
            (w, h), start = record.size, self.starts[index]
            pixels = memory_map(self.cache)[start : start + w * h * 3].reshape(h, w, 3)
        image, (x0, y0, x1, y1) = render(record, tuple(source.tolist()), self.size, pixels)
        if self.augment != "none" and rng.random() < 0.5:
            image, boxes = image[:, ::-1], flip(boxes)
            x0, x1 = self.size - x1, self.size - x0
        return image, (x0, y0, x1, y1), colour, boxes, labels, index

    def __getitems__(self, keys: list[tuple[int, int]]) -> "Batch | BadData":
        try:
            samples = [self[key] for key in keys]
        except BadData as error:
            return error  # raised by `load`, in one line, not with a worker's traceback
        images, inside, colour, boxes, labels, indices = zip(*samples, strict=True)
        return Batch(
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            torch.tensor(inside),
            torch.tensor(colour, dtype=torch.float32),
            torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            torch.from_numpy(np.concatenate(labels)),
            torch.tensor([0, *itertools.accumulate(map(len, labels))]),
            torch.tensor(indices),
        )


def batches(
    records: list[Record],
    size: int,
    *,
    batch_size: int,
    seed: int,
    augment: str = "ssd",
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    keep_difficult: bool = True,
    cache: str | Path | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """The endless stream of training batches, or `num_steps` of it, from `start_step` on.

    Sample p of the stream is image permutation(seed, epoch)[p % len(records)] of epoch
    p // len(records). Batch s of rank r takes the samples (s * world + r) * batch_size and on: so
    batches straddle epochs, none is ever partial, any step can be resumed, and neither the number
    of workers nor of ranks changes what is in the stream.
    """
    if not records:
        raise ValueError("no images to train on")
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch size {batch_size}, rank {rank} of {world}: expected >= 1, 0 <= r < w"
        )
    dataset = Dataset(
        records, size, seed=seed, augment=augment, keep_difficult=keep_difficult, cache=cache
    )

    def order():
        steps = itertools.count() if num_steps is None else range(num_steps)
        for step in steps:
            first = ((start_step + step) * world + rank) * batch_size
            epochs = [divmod(p, len(records)) for p in range(first, first + batch_size)]
            yield [(e, int(permutation(seed, e, len(records))[i])) for e, i in epochs]

    return load(dataset, order(), workers, pin)


def ordered_batches(
    records: list[Record],
    size: int,
    *,
    batch_size: int,
    workers: int = 0,
    cache: str | Path | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """The records in order, whole and undistorted, for evaluation; the last batch may be short."""
    dataset = Dataset(records, size, augment="none", cache=cache)
    keys = [(0, index) for index in range(len(records))]
    order = (keys[i : i + batch_size] for i in range(0, len(keys), batch_size))
    return load(dataset, order, workers, pin)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def load(dataset: Dataset, order: Iterator, workers: int, pin: bool) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pin,
        worker_init_fn=start_worker,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else it draws from the global one, which resuming restores
    )
    try:
        for batch in loader:
            if isinstance(batch, BadData):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"a data worker died ({str(error).splitlines()[0]}). If it was killed, memory or "
            f"/dev/shm ran out: use fewer --workers (now {workers}) or a smaller --batch-size"
        ) from error


def as_it_is(batch):
    return batch


def start_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and so is its handler


# ------------------------------------------------------------------------------ cache


def cache_starts(records: list[Record]) -> np.ndarray:
    """Where each decoded image starts in the cache, and the total: -> (len + 1,) int64 bytes."""
    return np.cumsum([0, *(w * h * 3 for w, h in (record.size for record in records))])


@functools.lru_cache(maxsize=8)
def memory_map(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="r")


def build_cache(records: list[Record], folder: str | Path) -> Path:
    """A file of all decoded images, one after the other, made once and shared by all processes.

    Its name is a hash of the list of images; its last 32 bytes a hash of their sizes and times, so
    that changed images rebuild it. It appears by a rename, whole or not at all. Reading it through
    a memory map, all workers and ranks of a machine share one copy in memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = int(cache_starts(records)[-1])
    files, stamp = hashlib.sha256(), hashlib.sha256()
    for record in records:
        files.update(f"{record.path.resolve()} {record.size}\n".encode())
        try:
            status = os.stat(record.path)
        except FileNotFoundError:
            raise BadData(record.path, "no such image") from None
        stamp.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    path = folder / f"decoded-{files.hexdigest()[:16]}.bin"

    def is_fresh() -> bool:
        if not path.is_file() or path.stat().st_size != total + 32:
            return False
        with open(path, "rb") as file:
            file.seek(total)
            return file.read() == stamp.digest()

    with file_lock(folder / f"{path.stem}.lock"):  # other ranks wait here for the one that builds
        if is_fresh():
            return path
        free = shutil.disk_usage(folder).free
        if free < total + (64 << 20):
            raise ValueError(
                f"--cache {folder}: {total / 1e9:.1f} GB needed for {len(records)} decoded images, "
                f"{free / 1e9:.1f} GB free; name another folder, or leave --cache out"
            )
        print(f"data: decoding {len(records)} images into {path}, {total / 1e9:.2f} GB, once",
              file=sys.stderr)  # fmt: skip
        part = path.with_suffix(".part")
        with open(part, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(records), 256):  # bounds what waits to be written
                some = records[start : start + 256]
                for image in pool.map(lambda r: decode(open_record(r), r).tobytes(), some):
                    file.write(image)
            file.write(stamp.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        memory_map.cache_clear()
    return path


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process dies."""
    with open(path, "w") as file:
        if fcntl is not None:  # elsewhere two processes may both build; the rename stays whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------ shapes


def outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Corners of a shape, turned by at most 20 degrees, filling the unit square: (K, 2)."""
    count = {"square": 4, "triangle": 3, "star": 10, "cross": 12}.get(shape, 48)
    angle = 2 * np.pi * np.arange(count) / count - np.pi / (4 if shape == "square" else 2)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # on the unit circle, (K, 2)
    if shape == "star":
        points[1::2] *= 0.45
    if shape == "cross":
        arm = np.array([[-0.33, -1], [0.33, -1], [0.33, -0.33]])
        turn = np.array([[0, 1], [-1, 0]])  # by 90 degrees
        points = np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])
    cos, sin = np.cos(t := rng.uniform(-np.pi / 9, np.pi / 9)), np.sin(t)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    return (points - points.min(axis=0)) / np.ptp(points, axis=0)


def texture(width: int, height: int, around: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A gradient, stripes, checks or clouds of two colours that differ from `around` alike."""
    kind, angle, period = rng.integers(4), rng.uniform(0, np.pi), rng.uniform(8, 24)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))  # (height, width)
    if kind == 0:
        mask = (u - u.min()) * (255 / np.ptp(u))
    elif kind == 1:
        mask = np.sin(u * np.float32(2 * np.pi / period)) > 0
    elif kind == 2:
        v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        wave = np.float32(2 * np.pi / period)
        mask = (np.sin(u * wave) > 0) ^ (np.sin(v * wave) > 0)
    else:
        mask = rng.integers(0, 256, (5, 5), dtype=np.uint8)
    mask = np.uint8(255) * mask if mask.dtype == bool else mask.astype(np.uint8)
    mask = Image.fromarray(mask).resize((width, height), Image.Resampling.BICUBIC)
    apart = rng.uniform(-30, 30, 3)
    two = [tuple((around + sign * apart).clip(0, 255).astype(int).tolist()) for sign in (1, -1)]
    return Image.composite(*(Image.new("RGB", (width, height), colour) for colour in two), mask)


def place(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """1 to 6 boxes in an image, the largest first: (G, 4) xyxy, whole pixels.

    The longer side is log-uniform from 20 to 220 px. Boxes are 3 px apart, except that about every
    fifth lies partly on an earlier one, of which half at least stays uncovered.
    """
    boxes = np.zeros((0, 4))
    covered = np.zeros(0)  # part of each box that later ones hide, at most
    for side in sorted(20 * 11 ** rng.random(rng.integers(1, 7)), reverse=True):
        onto = len(boxes) > 0 and rng.random() < 0.28  # the first of an image lies on none
        for _ in range(20):  # smaller each time, until it finds room
            aspect = np.exp(rng.uniform(-0.25, 0.25))
            w, h = np.round(side * min(1, aspect)), np.round(side * min(1, 1 / aspect))
            corner = np.floor(rng.uniform(2, [width - w - 1, height - h - 1], (80, 2)))
            tries = np.concatenate([corner, corner + (w, h)], axis=1)  # (80, 4)
            gap = 0 if onto else 3
            inter = np.minimum(tries[:, None, 2:], boxes[:, 2:] + gap)
            inter = (inter - np.maximum(tries[:, None, :2], boxes[:, :2] - gap)).clip(0).prod(2)
            hides = inter / (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (80, G)
            good = (
                (covered + hides <= 0.5).all(1) & (inter.max(1) >= 0.15 * w * h)
                if onto
                else ~inter.any(1)
            )
            if good.any():
                best = good.argmax()
                boxes = np.concatenate([boxes, tries[best : best + 1]])
                covered = np.append(covered + hides[best] * onto, 0.0)
                break
            side = max(20.0, side * 0.85)
    return boxes


def draw_image(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """One picture of shapes: image, boxes (G, 4) xyxy in whole pixels, labels (G,)."""
    width, height = ((300, 300), (400, 300), (300, 400), (360, 270), (270, 360))[rng.integers(5)]
    boxes = place(width, height, rng)
    labels = rng.integers(1, len(SHAPE_CLASSES) + 1, len(boxes))
    ground = rng.uniform(40, 216, 3)
    image = texture(width, height, ground, rng)
    used = [ground]
    for (x0, y0, x1, y1), label in zip(boxes.astype(int).tolist(), labels, strict=True):
        w, h, shape = x1 - x0, y1 - y0, SHAPE_CLASSES[label - 1]
        colours = rng.uniform(0, 255, (32, 3))  # the first that stands out from all others
        apart = np.abs(colours[:, None] - np.array(used)).max(axis=2).min(axis=1)  # (32,)
        used.append(colour := colours[(apart > 80).argmax()])
        mask = Image.new("L", (w, h))
        pen = ImageDraw.Draw(mask)
        pen.polygon((outline(shape, rng) * (w - 1, h - 1)).ravel().tolist(), fill=255)
        if shape == "ring":
            pen.ellipse([0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h], fill=0)
        image.paste(texture(w, h, colour, rng), (x0, y0), mask)
    grain = Image.fromarray(rng.integers(0, 25, (height, width), dtype=np.uint8))
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), offset=-12), boxes, labels


def draw_shapes(
    folder: str | Path, *, num_train: int = 2000, num_test: int = 400, seed: int = 0
) -> Path:
    """Draws the default data set once and returns its root, for `read_voc(root, ["2007:train"])`.

    A VOC tree with the sets 2007:train and 2007:test from different seeds; six classes whose
    colour and texture say nothing about the class. Boxes are the whole outline, covered parts
    included, in pixel edges (xmax - xmin is the width).
    """
    root = Path(folder) / f"shapes-1-{num_train}-{num_test}-{seed}"  # 1: version of the drawing
    if root.is_dir():
        return root
    Path(folder).mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".shapes-", dir=folder))  # appears whole, or not at all
    tree = part / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tree / name).mkdir(parents=True)
    print(f"data: drawing {num_train} + {num_test} images of shapes into {root}", file=sys.stderr)
    for split, (name, count) in enumerate((("train", num_train), ("test", num_test))):
        ids = [f"{name}{i:05d}" for i in range(count)]
        (tree / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(ids) + "\n")
        for i, image_id in enumerate(ids):
            image, boxes, labels = draw_image(np.random.default_rng((seed, split, i)))
            image.save(tree / "JPEGImages" / f"{image_id}.jpg", quality=90)
            objects = "".join(
                f"  <object>\n    <name>{SHAPE_CLASSES[label - 1]}</name><difficult>0</difficult>\n"
                f"    <bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
                "</bndbox>\n  </object>\n"
                for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True)
            )
            (tree / "Annotations" / f"{image_id}.xml").write_text(
                f"<annotation>\n  <filename>{image_id}.jpg</filename>\n"
                f"  <size><width>{image.width}</width><height>{image.height}</height>"
                f"<depth>3</depth></size>\n{objects}</annotation>\n"
            )
    try:
        os.rename(part, root)
    except OSError:  # another process was faster
        shutil.rmtree(part)
        if not root.is_dir():
            raise
    return root


# ------------------------------------------------------------------------------ command line

GREEN = (0, 170, 60)


def draw_boxes(
    image: Image.Image, boxes_xyxy: np.ndarray, captions: list[str], colour: tuple = GREEN
) -> None:
    """Draws boxes (G, 4) in pixels into the image, each with its caption at the upper left."""
    pen = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), caption in zip(boxes_xyxy, captions, strict=True):
        pen.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colour, width=2)
        y = max(0, y0 - 11)
        pen.rectangle(pen.textbbox((x0 + 1, y), caption), fill=colour)
        pen.text((x0 + 1, y), caption, fill="white")


def draw_sheet(path: Path, records: list[Record], classes: list[str], *, seed: int, augment: str):
    """The first 24 images of the training stream as the network gets them, 6 a row, with boxes."""
    from types import SimpleNamespace

    size = 300
    config = SimpleNamespace(mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0), channels="rgb")
    batch = next(batches(records, size, batch_size=24, seed=seed, augment=augment))
    pixels = prepare(batch, config) + torch.tensor(config.mean)[:, None, None]
    pixels = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (6 * size, 4 * size))
    for n in range(24):
        rows = slice(batch.offsets[n], batch.offsets[n + 1])
        image = Image.fromarray(pixels[n])
        names = [classes[label - 1] for label in batch.labels[rows]]
        draw_boxes(image, batch.boxes_xyxy[rows].numpy() * size, names)
        sheet.paste(image, (n % 6 * size, n // 6 * size))
    sheet.save(path)


def check(sources: list, found: Findings, workers: int) -> int:
    """Reads and decodes everything, prints every problem with its place; -> the exit status."""
    records: dict[Path, Record] = {}
    for read in sources:
        records.update((record.path, record) for record in read()[0])

    def inspect(record: Record) -> None:
        try:
            image = open_record(record)
            if image.mode != "RGB":
                found.note(record.path, f"mode {image.mode}, converted to RGB")
            if exif_orientation(image) != 1:
                found.note(record.path, "EXIF orientation, not applied: boxes are in stored pixels")
            decode(image, record)
        except BadData as error:
            found.refuse(error.where, error.what)

    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:  # the decoders let go of the interpreter's lock
        for done, _ in enumerate(pool.map(inspect, records.values()), start=1):
            rate = done / (time.monotonic() - start)
            if done % 100 == 0 or done == len(records):
                left = (len(records) - done) / rate
                end = "\n" if done == len(records) else ""
                print(f"\r{done}/{len(records)} images, {rate:.0f}/s, {left:.0f} s left ", end=end,
                      file=sys.stderr, flush=True)  # fmt: skip
    for title, kinds, most in (
        ("refused", found.refused, None),
        ("handled", found.handled, None),
        ("note", found.notes, 20),
    ):
        for what, places in kinds.items():
            places = list(dict.fromkeys(places))  # a file may be in several sets
            for place in places[:most]:
                print(f"{title:8} {place}  {what}")
            if len(places) > len(places[:most]):
                print(f"{title:8} ... and {len(places) - most} more: {what}")
    counts = [len({p for places in kinds.values() for p in places})
              for kinds in (found.refused, found.handled, found.notes)]  # fmt: skip
    objects = sum(len(record.labels) for record in records.values())
    print(f"{len(records)} images, {objects} objects: {counts[0]} places that training refuses, "
          f"{counts[1]} that it handles, {counts[2]} notes")  # fmt: skip
    return 1 if counts[0] or counts[1] else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--voc-root", help="folder with VOC2007/ (or the one above), or a tree without years")
    add("--sets", nargs="+", help="VOC sets such as 2007:trainval; the default is all there are")
    add("--classes", help=".txt file with one class name a line, or `auto`: from the annotations")
    add("--coco-root", help="folder with annotations/ and train2017/, val2017/")
    add("--shapes-root", default="build/shapes", help="where the shapes are drawn, once")
    add("--check", action="store_true", help="read and decode everything, list what is wrong")
    add("--bench", action="store_true", help="measure images/s of one core")
    add("--out", default="sheet.png", help="the contact sheet")
    add("--augment", choices=("ssd", "flip", "none"), default="ssd")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count(), help="threads of --check")
    args = parser.parse_args()
    try:
        if args.bench:
            from experiments import input_bench

            return input_bench.main()
        found = Findings(collect=args.check)
        root, classes = args.voc_root, VOC_CLASSES
        if args.coco_root:
            listings = sorted(Path(args.coco_root, "annotations").glob("instances_*.json"))
            sets = (
                args.sets or [p.stem.removeprefix("instances_") for p in listings] or ["train2017"]
            )
            sources = [functools.partial(read_coco, args.coco_root, s, found) for s in sets]
        else:
            if root is None:
                root, classes = draw_shapes(args.shapes_root), SHAPE_CLASSES
            if args.classes:
                classes = None if args.classes == "auto" else read_classes(args.classes)
            sets = args.sets or list_sets(root) or ["2007:trainval"]
            sources = [functools.partial(read_voc, root, [s], classes, found) for s in sets]
        if args.check:
            return check(sources, found, args.workers)
        records, classes = sources[0]()
        draw_sheet(Path(args.out), records, classes, seed=args.seed, augment=args.augment)
        print(f"{args.out}: 24 of {len(records)} images, {len(classes)} classes, {args.augment}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
