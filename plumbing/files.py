"""Shared by all readers of data files: records, findings, names of files, boxes, pictures.

Files come from anywhere, so no file is trusted: sizes and depths are bounded, names stay in their
folder, and an error names file and line. Data that can be corrected is used, and each kind of
correction is printed once (`Findings`). What happens to which input:

    refused    broken, deep or huge XML and JSON; files of another format; entities; NaN; names with
               `..`; unknown classes; a class named background; images listed twice; missing files;
               boxes that are inverted, empty, not numbers or outside the image; another size than
               the image's; no objects at all; images that are truncated, empty, no image, 32-bit,
               or above 89 megapixels (before any pixel is decoded); TIFFs with an orientation
    corrected  boxes that cross the border by more than a pixel are clipped for training; a missing
               size comes from the image; COCO: a missing area is width x height, a missing bbox
               that of the polygons, boxes of width or height 0 are left out
    fine       boxes with fractions, from 0, up to a pixel over the border; images in grey, CMYK,
               palette, 16-bit (scaled), with alpha (dropped) or an EXIF orientation (not applied:
               the boxes of VOC and COCO are in stored pixels); backslashes in names; names from a
               Mac, which stores "é" as two characters

A refusal of one box or image has a `kind`. With --drop-bad such boxes and images are left out.
"""

import math
import os
import re
import stat
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from PIL import Image

from plumbing.run_folder import FILES

# All that Pillow reads, except formats that start another program (EPS), that photographs never
# have, or that Pillow recognises by guessing. Some builds of Pillow lack some of these.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "MPO", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
SUFFIXES = tuple(sorted(s for s, name in Image.EXTENSION.items() if name in FORMATS))
MAX_BYTES = {".xml": 16 << 20, ".json": 4 << 30}  # other files hold lists: 64 MiB
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million; compared with the header, before decoding
MAX_FOLDERS = 6  # levels of folders that are searched
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses


class Record(NamedTuple):
    """One image and its objects. Boxes are as annotated: not clipped, nothing subtracted."""

    name: str  # "000005"; COCO: the image id
    path: Path
    size: tuple[int, int]  # width, height
    boxes_xyxy: np.ndarray  # (G, 4) float64, pixels
    labels: np.ndarray  # (G,) int64, 1..
    difficult: np.ndarray  # (G,) bool; COCO: iscrowd
    area: np.ndarray  # (G,) float64, square pixels; COCO: the annotation's own


class BadData(ValueError):
    """What is wrong with the data, and where: a file, or FILE:LINE.

    `kind` names the fault in a few words where it concerns one box or one image, which --drop-bad
    can leave out ("empty box"). It is "" where the whole data set is unusable.
    """

    def __init__(self, where: object, what: str, kind: str = ""):
        super().__init__(str(where), what, kind)
        self.where, self.what, self.kind = str(where), what, kind

    def __str__(self) -> str:
        hint = " (--drop-bad leaves out what is bad)" if self.kind else ""
        return f"{self.where}: {self.what}{hint}"


class Findings:
    """Collects what is wrong with the data. By default the first refusal is raised as BadData.

    collect: for the data check; lists everything and raises nothing.
    drop: leaves out, counts and lists bad boxes and images; raises all other refusals.
    """

    def __init__(self, *, collect: bool = False, drop: bool = False):
        self.collect, self.drop = collect, drop
        self.refused: dict[str, list[str]] = {}  # what -> the places; so are the next two
        self.handled: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}
        self.dropped: dict[str, list[tuple[str, str, int]]] = {}  # kind -> (where, what, how many)
        self._counts: dict[str, int] = {}  # of what was handled
        self._said: dict[str, int] = {}

    def refuse(self, where: object, what: str, kind: str = "", count: int = 1) -> None:
        """Training cannot use it: `count` boxes or images, for the same reason."""
        if self.drop and kind:
            self.dropped.setdefault(kind, []).append((str(where), what, count))
        elif self.collect:
            self.refused.setdefault(what, []).append(str(where))
        else:
            raise BadData(where, what, kind)

    def handle(self, where: object, what: str, count: int = 1) -> None:
        """Training can use it, after a correction that the user should know of."""
        self.handled.setdefault(what, []).append(str(where))
        self._counts[what] = self._counts.get(what, 0) + count

    def note(self, where: object, what: str) -> None:
        """Nothing is wrong, but a data check mentions it."""
        if self.collect:
            self.notes.setdefault(what, []).append(str(where))

    def say(self) -> None:
        """Prints what was corrected or left out since the last call; of several ranks only one."""
        if self.collect or (dist.is_initialized() and dist.get_rank() > 0):
            return
        lines = [(what, self._counts[what], places[0]) for what, places in self.handled.items()]
        for kind, entries in self.dropped.items():
            lines.append((f"left out, {kind}", sum(n for *_, n in entries), entries[0][0]))
        for what, count, first in lines:
            if self._said.get(what) != count:
                print(f"data: {what}: {count}, first {first}", file=sys.stderr)
                self._said[what] = count

    def dropped_text(self) -> str:
        """One line for everything that was left out, for a file in the run's folder."""
        lines = []
        for kind, entries in self.dropped.items():
            lines.append(f"# {kind}: {sum(n for *_, n in entries)}")
            lines += [f"{where}: {what}" for where, what, _ in entries]
        return "\n".join(lines) + "\n" if lines else ""


# ------------------------------------------------------------------------------ text files


def read_bytes(path: Path) -> bytes:
    """The content of a file; refuses devices, pipes and files that are too large."""
    limit = MAX_BYTES.get(path.suffix.lower(), 64 << 20)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise BadData(path, f"expected a regular file of at most {limit >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise BadData(path, f"cannot be read ({error.strerror})") from None
    refuse_pointer(data, path)
    return data


def refuse_pointer(start: bytes, path: Path) -> None:
    """BadData for what Git LFS leaves in place of a large file, and for compressed files."""
    if start.startswith(b"version https://git-lfs"):
        raise BadData(path, "a pointer of Git LFS, not the file itself: run `git lfs pull` there")
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise BadData(path, "compressed; unpack it first")


def read_text(path: str | Path) -> str:
    """The content of a text file in UTF-8, or in UTF-16, as Windows' PowerShell writes it."""
    data = read_bytes(Path(path))
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(path, f"not UTF-8 text ({error}); save it as UTF-8") from None


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """[(line, FILE:LINE), ...] of a text file, stripped, without empty lines."""
    lines = ((line.strip(), n) for n, line in enumerate(read_text(path).splitlines(), 1))
    return [(line, f"{path}:{n}") for line, n in lines if line]


def read_classes(path: str | Path) -> list[str]:
    """Class names, one per line, without background: label 1 is the first. "# ..." is a comment;
    labelme's own "__ignore__" and "_background_" are skipped."""
    if not Path(path).is_file():
        raise ValueError(f"--classes {path}: no such file; expected one class name per line")
    names = [one_form(name) for name, _ in read_lines(path) if not name.startswith("#")]
    names = [name for name in names if name not in ("__ignore__", "_background_")]
    if not names or len(set(names)) < len(names) or any(map(is_background, names)):
        raise BadData(path, f"expected different names without background, one a line; got {names}")
    return names


def is_background(name: str) -> bool:
    """Whether a name means background: here that is label 0, never a class of boxes."""
    return name.strip("_ ").casefold() == "background"


def note_similar(classes: Iterable[str], where: object, found: Findings) -> None:
    """Notes pairs of names such as Bolt and bolt, which are probably the same class."""
    spelled: dict[str, str] = {}
    for name in classes:
        other = spelled.setdefault(re.sub(r"[\s_-]+", " ", name.casefold()), name)
        if other != name:
            found.note(where, f"classes {other!r} and {name!r}: one class, spelled in two ways?")


# ------------------------------------------------------------------------------ names of files


def stays_inside(name: str) -> bool:
    """Whether a name found in a file stays in its folder: no `..`, no absolute path, no NUL."""
    parts = name.replace("\\", "/").split("/")
    drive = re.match("[A-Za-z]:", name)  # "12:30.jpg" is a name
    return ".." not in parts and parts[0] != "" and "\0" not in name and not drive


def of_a_run(path: Path) -> bool:
    """Whether train.py wrote this into the folder of a run (--out), which may be among the data."""
    beside = (path.with_name(name).is_file() for name in ("run.json", "log.jsonl"))
    return path.name in (*FILES, "detections") and all(beside)


def one_form(name: str) -> str:
    """One spelling of a name: a Mac stores "é" as "e" and an accent, others as one character."""
    return unicodedata.normalize("NFC", name)


def index_files(
    folder: Path, suffixes: str | tuple[str, ...], roles: tuple[str, ...] = ()
) -> dict[str, Path]:
    """{"cam1/part00.jpg": path, ...}: the files below `folder` with one of these suffixes.

    The keys are the same in any locale. Hidden files and folders are skipped, such as a Mac's
    "._part00.jpg"; so is what a run has drawn. `roles` are names of folders that only say what lies
    in them ("images"): they are left out of the keys, so that a picture and its labels have the
    same key.
    """
    files, seen = [], set()
    top = str(folder)
    for place, folders, names in os.walk(top, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen and status.st_ino:  # links in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside = os.path.relpath(place, top)
        parts = [] if inside == "." else [on_disk(part) for part in inside.split(os.sep)]
        skipped = [f for f in folders if f == "__MACOSX" or of_a_run(Path(place, f))]
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in skipped)
        if len(parts) >= MAX_FOLDERS:
            folders.clear()
        start = "".join(f"{part}/" for part in parts if part.casefold() not in roles)
        files += [
            (start + on_disk(name), Path(place, name))
            for name in names
            if name[0] != "." and name.lower().endswith(suffixes)
        ]
    return dict(sorted(files))


def index_tree(
    tree: Path, suffixes: str | tuple[str, ...], own: tuple[str, ...], others: tuple[str, ...]
) -> dict[str, Path]:
    """`index_files` of the folders of `tree` whose names are in `own` (such as images/ for
    pictures), or of the whole tree if it has none. `others`: names of folders for other files."""
    folders = [path for path in tree.iterdir() if path.is_dir()] if tree.is_dir() else []
    index: dict[str, Path] = {}
    for top in sorted(path for path in folders if path.name.casefold() in own) or [tree]:
        index |= index_files(top, suffixes, own + others)
    return index


def on_disk(name: str) -> str:
    """`one_form` of a name that Python read from the disk, in any locale (in C names are bytes)."""
    return one_form(os.fsencode(name).decode("utf-8", "surrogateescape"))


def to_disk(name: str) -> str:
    """A name as Python must have it to write a file, in any locale: the inverse of `on_disk`."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def spellings(name: str, roles: tuple[str, ...] = ()) -> Iterator[str]:
    """Under which keys of `index_files` a name from a list may be found, the likeliest first: the
    name itself; with slashes for backslashes; without "./" and without folders that are roles."""
    name = one_form(name)
    yield name
    yield name.replace("\\", "/")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    *folders, last = parts or [""]
    yield "".join(f"{part}/" for part in folders if part.casefold() not in roles) + last


def split_of(name: str) -> tuple[str, str]:
    """The set and its part: "mine@train" -> ("mine", "train"); "mine" -> ("mine", "")."""
    name, _, part = name.partition("@")
    if part not in ("", "train", "val"):
        raise ValueError(f"set {name}@{part}: expected {name}@train or {name}@val")
    return name, part


def part_of(stems: Iterable[str], part: str) -> set[str]:
    """The images of a set that are in its part "train" or "val" ("": all), as names without folder
    and suffix. "val" is the fifth whose names have the smallest hashes: the same on any machine and
    for the same pictures in VOC's, COCO's or YOLO's format."""
    stems = sorted(set(stems), key=lambda stem: (zlib.crc32(stem.encode("utf-8", "replace")), stem))
    cut = 0 if not part else max(1, round(len(stems) / 5))
    return set(stems[:cut] if part == "val" else stems[cut:])


def stem_of(name: str) -> str:
    """The name of a picture without folder and suffix."""
    return one_form(name).replace("\\", "/").rpartition("/")[2].rpartition(".")[0]


def suggest(sets: list[str], everything: str = "") -> str:
    """For an error message: which sets there are, and flags that choose two of them. `everything`:
    the name of the set of all images, if there is one."""

    def first(*starts: str) -> str:
        names = (name for name in sets if name.rpartition(":")[2].casefold().startswith(starts))
        return next(names, "")

    train, test = first("train"), first("val", "test")
    if len(sets) == 1:  # four fifths of it, and the rest
        train, test = f"{sets[0]}@train", f"{sets[0]}@val"
    more = f" and {len(sets) - 20} more" if len(sets) > 20 else ""
    text = f"Sets there: {' '.join(sets[:20])}{more}. Choose: --train-sets {train or 'SET'} "
    text += f"--eval-sets {test or 'SET'}"
    if everything and not (train and test):
        text += f", or --train-sets {everything}@train --eval-sets {everything}@val"
    return text


# ------------------------------------------------------------------------------ numbers and boxes


def number(text: object) -> float:
    """A finite number, or NaN: for "12", 12 and "1.5", but not for "1_2", "inf", "x" or None."""
    try:
        value = float(text) if "_" not in str(text) else math.nan
    except (ValueError, TypeError, OverflowError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def whole(value: object) -> int:
    """An id: of 7, 7.0 and "7", but not of 7.5."""
    if isinstance(value, float) and value % 1:  # inf % 1 is NaN
        raise ValueError(f"{value} is no whole number")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r:.60} is no whole number") from None


def whole_or_name(value: object) -> int | str:
    """An image's id, which some tools make a text: of 7 and "7" the number, of "a7" the text."""
    if isinstance(value, str) and value.strip() and not value.strip().isdecimal():
        return value
    return whole(value)


def check_box(
    box: list[float], size: tuple, name: str, where: str, found: Findings, given: object = None
) -> bool:
    """Whether a box xyxy in pixels can be used. Refuses what is not a box on the image. `given` is
    what the file says, for the message."""
    (x0, y0, x1, y1), (w, h) = box, size
    if any(map(math.isnan, box)):
        what = f"{name}: the box must be four numbers; got {given or box}"
        found.refuse(where, f"{what:.300}", "box that is not four numbers")
    elif x1 < x0 or y1 < y0:
        what = f"{name}: box {box} is inverted; expected xmin < xmax, ymin < ymax"
        found.refuse(where, what, "inverted box")
    elif x1 == x0 or y1 == y0:
        what = f"{name}: box {box} is empty; expected xmin < xmax, ymin < ymax"
        found.refuse(where, what, "empty box")
    elif min(x1, w) <= max(x0, 0) or min(y1, h) <= max(y0, 0):
        what = f"{name}: box {box} lies outside the {w}x{h} image"
        found.refuse(where, what, "box outside its image")
    else:
        if crosses(box, size):
            found.handle(where, "boxes more than a pixel over the border, clipped for training")
        return True
    return False


def crosses(box: list[float], size: tuple) -> bool:
    """Whether a box crosses the border of the image by more than a pixel, or lies outside."""
    return max(-box[0], -box[1], box[2] - size[0], box[3] - size[1]) > 1


def check_size(path: Path, size: tuple, where: object) -> None:
    """Refuses a picture whose size is not the annotation's. Called where a box crosses the border,
    because a wrong size is then the reason; it is reported once instead of for every box."""
    if (true := open_image(path, UNREADABLE).size) != size:
        what = "the image {} is {}x{}, its annotation says {}x{}".format(path, *true, *size)
        raise BadData(where, what, "another size than the image's")


def check_units(records: list[Record], where: object, found: Findings) -> None:
    """Refuses data whose boxes all lie within one pixel: they must be fractions of the image."""
    boxes = [record.boxes_xyxy for record in records if len(record.boxes_xyxy)]
    if boxes and max(some.max() for some in boxes) <= 1:
        what = "every box lies within the first pixel: they look like fractions of the image"
        found.refuse(where, f"{what}; expected pixels")


# ------------------------------------------------------------------------------ images

UNREADABLE = "image that cannot be read"  # a kind of BadData


def open_image(path: Path, kind: str = "") -> Image.Image:
    """Reads the header only. Refuses what is not an image, or too large, before decoding a pixel.

    `kind` goes into the BadData: UNREADABLE for an image of a data set, so that --drop-bad can
    leave it out.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise BadData(path, "the file is empty, or no regular file", kind)
        if status.st_size < 500:
            refuse_pointer(path.read_bytes(), path)
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        return image
    except Image.DecompressionBombError as error:
        what = f"too large to be a photograph, not decoded ({error})"
        raise BadData(path, what, kind) from None
    except FileNotFoundError:
        raise BadData(path, "no such image", kind) from None
    except BadData:
        raise
    except Exception as error:  # image decoders raise all kinds of errors on damaged files
        raise BadData(path, f"not an image that can be read ({error})", kind) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits are scaled to 8, alpha is dropped, grey and CMYK are converted."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known white: save it with 8 or 16")
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def decode_pixels(image: Image.Image, record: Record) -> Image.Image:
    """Decodes an opened image into RGB. An EXIF orientation is not applied: the boxes of VOC and
    COCO refer to the stored pixels."""
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # truncated, broken, 32-bit
        raise BadData(record.path, f"cannot be decoded ({error})", UNREADABLE) from None


def open_record(record: Record) -> Image.Image:
    """Opens the image of a record without decoding it. Its size must be the annotation's."""
    image = open_image(record.path, UNREADABLE)
    if image.format == "TIFF" and exif_orientation(image) in range(2, 9):  # Pillow turns only these
        what = "a TIFF with an orientation: are the boxes in its stored pixels? Store it upright"
        raise BadData(record.path, what, "TIFF with an orientation")
    if image.size != record.size:
        hint = "; it has an EXIF orientation: store it upright" * (exif_orientation(image) != 1)
        sizes = "{}x{}, its annotation says {}x{}".format(*image.size, *record.size)
        raise BadData(record.path, f"the image is {sizes}{hint}", "another size than the image's")
    return image


def exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the picture may be fine although its EXIF is broken
        return 1
