"""Records, one for each image: what VOC and COCO files say is on it, and how it is opened.

Files come from anywhere, so none is trusted: sizes and depths are bounded, names stay in their
folder, and whatever is wrong is an error that names file and line. What can be used all the same
is used, and said (`Findings`). What happens to which input:

    refused   broken, deep or huge XML and JSON; entities; NaN; names with `..`; unknown classes;
              ids listed twice; missing files; boxes that are inverted, empty, not numbers or off
              the image; another size than the image's; no objects at all; images that are
              truncated, empty, no image, 32-bit, or above 89 Mpixel (before any is decoded);
              TIFFs with an orientation
    handled   boxes over the border by more than a pixel are clipped for training; a missing size
              is taken from the image; COCO boxes without area are left out
    fine      boxes with fractions, from 0, up to a pixel over the border; images in grey, CMYK,
              palette, 16-bit (scaled), with alpha (dropped) or an EXIF orientation (not applied:
              the boxes of VOC and COCO are in stored pixels)
"""

import json
import math
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from PIL import Image

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no EPS: it runs a program
MAX_BYTES = {".xml": 16 << 20, ".json": 4 << 30}  # else 64 MiB: lists of names
MAX_DEPTH = 16  # of nested XML elements; VOC needs 4
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, from the header, before any is decoded
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses


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
        super().__init__(str(where), what)
        self.where, self.what = str(where), what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


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
    limit = MAX_BYTES.get(path.suffix, 64 << 20)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise BadData(path, f"expected a regular file of at most {limit >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise BadData(path, f"cannot be read ({error.strerror})") from None


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """[(line, FILE:LINE), ...] of a text file, stripped, without the empty ones."""
    try:
        lines = read_bytes(Path(path)).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadData(path, f"not UTF-8 text ({error})") from None
    return [(line.strip(), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def read_classes(path: str | Path) -> list[str]:
    """Class names, one a line, without background: label 1 is the first. "# ..." is a comment."""
    if not Path(path).is_file():
        raise ValueError(f"--classes {path}: no such file; expected one class name a line")
    names = [name for name, _ in read_lines(path) if not name.startswith("#")]
    if not names or len(set(names)) < len(names) or "background" in names:
        raise BadData(path, f"expected different names without background, one a line; got {names}")
    return names


def stays_inside(name: str) -> bool:
    """Whether a name that a file gives stays in its folder: no `..`, no absolute path, no NUL."""
    parts = name.replace("\\", "/").split("/")
    drive = re.match("[A-Za-z]:", name)  # "12:30.jpg" is a name
    return ".." not in parts and parts[0] != "" and "\0" not in name and not drive


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
    return int(value)


def check_box(box: list[float], size: tuple, name: str, where: str, found: Findings) -> bool:
    """Whether a box xyxy in pixels can be used; refuses what is not a box on the image."""
    (x0, y0, x1, y1), (w, h) = box, size
    if any(map(math.isnan, box)):
        found.refuse(where, f"{name}: the box must be four numbers; got {box}")
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
        if tag == "object":
            if len(stack) != 2:
                inside = "/".join(stack[:-1])
                raise ValueError(f"<object> in <{inside}>; expected in the outermost element")
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
            part = tag.removeprefix("object/")
            if part in objects[-1] and part.startswith(("name", "difficult", "bndbox/")):
                objects[-1]["twice"] = part.partition("/")[0]
            objects[-1].setdefault(part, text)
        else:
            head.setdefault(tag, text)
    if not stays_inside(head.get("filename", "-")):
        found.refuse(xml, f"file name {head['filename'][:60]!r} leaves its folder")
    width, height = (number(head.get(f"size/{side}", "0")) for side in ("width", "height"))
    if width == height == 0:
        width, height = open_image(image).size
        found.handle(xml, "sizes missing in the XML, taken from the image")
    if not (width >= 1 and height >= 1 and width % 1 == height % 1 == 0):
        given = " x ".join(head.get(f"size/{side}", "0")[:60] for side in ("width", "height"))
        raise BadData(xml, f"size/width x size/height {given}: expected whole numbers of pixels")
    size = int(width), int(height)
    if not objects:
        found.note(xml, "no objects")
    rows = []
    for entry in objects:
        name, where = entry.get("name"), entry["where"]
        box = [number(entry.get(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = entry.get("difficult", "0")
        if name is None:
            found.refuse(where, "an object without a name")
        elif "twice" in entry:
            found.refuse(where, f"{name}: an object with two of <{entry['twice']}>; expected one")
        elif difficult not in ("0", "1"):
            found.refuse(where, f"{name}: difficult must be 0 or 1; got {difficult[:60]!r}")
        elif check_box(box, size, name, where, found):
            rows.append((name, box, difficult == "1", where))
            if min(box[:2]) < 1:
                found.note(where, "box counts from 0 (VOC's count from 1); nothing is subtracted")
            if any(side % 1 for side in box):
                found.note(where, "box with fractions of a pixel, used as it is")
    return size, rows


def list_sets(root: str | Path) -> list[str]:
    """The sets of the trees in `root`, as read_voc takes them. The devkit's lists of one class are
    left out, such as dog_train.txt with its "000005 -1"."""
    root, sets = Path(root), []
    for tree in (root, *sorted(root.glob("*")), *sorted(root.glob("VOCdevkit/*"))):
        year = "" if tree == root else re.sub(r"^VOC(?=\d+$)", "", tree.name) + ":"
        for listing in sorted((tree / "ImageSets" / "Main").glob("*.txt")):
            first = b""
            if re.search("_(train|val|trainval|test)$", listing.stem) and listing.is_file():
                with open(listing, "rb") as file:
                    first = file.readline(4096)
            if not re.search(rb"\s(-1|0|1)\s*$", first):
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
    if folder in (root.absolute().name, root.resolve().name):  # a link may have another name
        trees.append(root)
    for tree in trees:
        listing = tree / "ImageSets" / "Main" / f"{split}.txt"
        if listing.is_file():
            return tree, listing
    message = f"no {Path(folder, 'ImageSets/Main', split)}.txt below it."
    if not root.is_dir():
        message = "no such folder."
    message += f" Expected the folder that contains {folder or 'ImageSets'}/"
    message += ", or the one above it." if folder else ", Annotations/ and JPEGImages/."
    if there := list_sets(root):
        message += f" Sets there: {' '.join(there)}."
        if year == "2012" and "2007:trainval" in there:
            message += " To train without VOC2012: --train-sets 2007:trainval"
    raise BadData(f"--voc-root {root}", message)


def read_voc(
    root: str | Path,
    sets: Iterable[str],
    classes: Iterable[str] | None = None,
    findings: Findings | None = None,
    annotated: bool = True,
) -> tuple[list[Record], list[str]]:
    """Records of some sets of VOC trees, and the class names: label 1 is the first.

    `root` holds VOC2007/ (or VOCdevkit/VOC2007/) and the sets are "2007:trainval"; or `root` is
    itself a tree of Annotations, ImageSets/Main and JPEGImages and the sets are "train". Without
    `classes` the names are those of the annotations, sorted. Not `annotated`: a set may lack all of
    its annotations, as VOC2012 test does. Raises ValueError, naming the file.
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
            raise BadData(folder, "no such folder; expected the images there")
        files = sorted(os.listdir(folder), key=lambda f: (f.lower().endswith(".jpg"), f))
        paths = {Path(f).stem: folder / f for f in files if f.lower().endswith(SUFFIXES)}
        named = set(files)
        lines = read_lines(listing)
        if not lines:
            raise BadData(listing, "lists no images")
        bare = 0  # images without an annotation
        for line, where in lines:
            # "000005", "000005.jpg", and "000005 -1" as in the devkit's lists of one class, unless
            # an image is called just so: "scan 1.jpg"
            image_id = line if line in paths else re.sub(r"\s+(-1|0|1)$", "", line)
            if image_id not in paths and image_id.lower().endswith(SUFFIXES):
                image_id = image_id.rpartition(".")[0]
            xml = tree / "Annotations" / f"{image_id}.xml"
            try:
                if not stays_inside(image_id):
                    raise BadData(where, f"image id {image_id[:60]!r} leaves its folder")
                if xml in seen:
                    raise BadData(where, f"{image_id} is listed twice, first at {seen[xml]}")
                seen[xml] = where
                if image_id not in paths:
                    raise BadData(where, f"no image {folder / image_id}.jpg")
                path = folder / line if line in named else paths[image_id]  # of a.jpg and a.png
                if xml.is_file():
                    images.append((image_id, path, *read_annotation(xml, path, found)))
                elif annotated:
                    raise BadData(where, f"no annotation {xml}")
                else:
                    bare += 1
                    with open_image(path) as image:
                        images.append((image_id, path, image.size, []))
            except BadData as error:
                found.refuse(error.where, error.what)
        if 0 < bare < len(lines):
            what = f"{bare} of its {len(lines)} images lack an annotation: expected all or none"
            found.refuse(listing, what)
    if classes is None:
        classes = sorted({row[0] for *_, rows in images for row in rows})
    classes = list(classes)
    records = []
    for image_id, path, size, rows in images:
        for name, _, _, where in rows:
            if name not in classes:
                what = f"class {name[:60]!r} is none of {', '.join(classes)}; --classes FILE"
                found.refuse(where, what)
        rows = [row for row in rows if row[0] in classes]
        boxes = np.array([box for _, box, _, _ in rows], np.float64).reshape(-1, 4)
        labels = np.array([classes.index(name) + 1 for name, *_ in rows], np.int64)
        difficult = np.array([row[2] for row in rows], bool)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        records.append(Record(image_id, path, size, boxes, labels, difficult, area))
    if annotated and not any(len(record.labels) for record in records):
        found.refuse(root, f"no objects at all in the {len(records)} images of {' '.join(sets)}")
    found.say()
    return records, classes


# ------------------------------------------------------------------------------ COCO


def read_coco(
    root: str | Path,
    sets: Sequence[str],
    findings: Findings | None = None,
    *,
    annotated: bool = True,
) -> tuple[list[Record], list[str]]:
    """Records of annotations/instances_<set>.json with the images in <set>/, and class names.
    Not `annotated`: a test set may be annotations/image_info_<set>.json instead.

    Label k is the k-th category by id, which has to be the same in all sets. Crowd regions come as
    `difficult`. Boxes without area (two in train2017) are left out, and said. Raises ValueError,
    naming the file and the id.
    """
    if isinstance(sets, str) or not sets:
        raise ValueError(f"sets is a list of one or more names; got {sets!r}")
    found, records, classes, seen = findings or Findings(), [], None, {}
    for name in sets:
        more, names = read_instances(*find_listing(root, name, annotated), found)
        if names != (classes or names):
            where = find_listing(root, name, annotated)[0]
            found.refuse(where, f"its categories are not those of the sets before: {names}")
        for record in more:
            if record.name in seen:
                found.refuse(f"{name} image {record.name}", f"the set {seen[record.name]} has it")
            seen[record.name] = name
        records, classes = records + more, names
    found.say()
    return records, classes


def find_listing(root: str | Path, split: str, annotated: bool = True) -> tuple[Path, Path]:
    """COCO's file of a set, and the folder of its images; test-dev2017's are in test2017/."""
    listing, folder = Path(root, "annotations", f"instances_{split}.json"), Path(root, split)
    if not annotated and not listing.is_file():
        listing = listing.with_name(f"image_info_{split}.json")
        folder = folder.with_name(split.replace("-dev", ""))
    if not listing.is_file() or not folder.is_dir():
        raise BadData(
            f"--coco-root {root}",
            f"no annotations/{listing.name} and {folder.name}/ below it. "
            "Expected the folder that contains both"
            + " (a test set without annotations: only eval.py --results takes it)"
            * annotated,
        )
    return listing, folder


def read_instances(listing: Path, folder: Path, found: Findings) -> tuple[list[Record], list[str]]:
    """One set of read_coco."""

    def refuse_constant(name):
        raise ValueError(f"{name} is no JSON number")

    infos = listing.name.startswith("image_info")  # a test set's: without annotations
    try:
        data = json.loads(read_bytes(listing), parse_constant=refuse_constant)
        if infos:
            data.setdefault("annotations", [])
        for kind in ("categories", "images", "annotations"):
            if not isinstance(data[kind], list):
                raise TypeError(f"{kind} must be a list")
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BadData(listing, f"not an instances file of COCO ({what})") from None

    def rows(kind: str, take: Callable[[dict], tuple]) -> Iterator[tuple]:
        """What `take` finds in each entry; one that lacks it is refused by its place."""
        for n, entry in enumerate(data[kind]):
            try:
                yield take(entry)
            except (KeyError, TypeError, ValueError) as error:
                what = f"{type(error).__name__}: {error}"
                found.refuse(f"{listing} {kind}[{n}]", f"not an entry as COCO's ({what})")

    categories = sorted(rows("categories", lambda c: (whole(c["id"]), str(c["name"]))))
    images = list(
        rows("images", lambda i: (whole(i["id"]), str(i["file_name"]), i["width"], i["height"]))
    )
    annotations = list(
        rows("annotations", lambda a: (
            whole(a["id"]), whole(a["image_id"]), whole(a["category_id"]), a["bbox"],
            a.get("iscrowd", 0), a.get("area"),
        ))
    )  # fmt: skip
    labels = {category: label for label, (category, _) in enumerate(categories, start=1)}
    for what, keys in (
        ("category id", [c for c, _ in categories]),
        ("category", [name for _, name in categories]),
        ("image id", [i[0] for i in images]),
        ("file name", [i[1] for i in images]),
        ("annotation id", [a[0] for a in annotations]),
    ):
        for key, count in Counter(keys).items():
            if count > 1:
                found.refuse(listing, f"{what} {key} is there {count} times")
    files = set(os.listdir(folder))
    sizes, objects = {}, {}
    for image_id, file_name, width, height in images:
        where = f"{listing} image {image_id}"
        if not stays_inside(file_name):
            found.refuse(where, f"file name {file_name[:60]!r} leaves its folder")
        elif file_name not in files and not os.path.isfile(folder / file_name):
            found.refuse(where, f"no image {folder / file_name}")
        elif not all(isinstance(n, int) and 0 < n <= MAX_PIXELS for n in (width, height)):
            what = f"size {width!r:.60} x {height!r:.60}: expected whole numbers of pixels"
            found.refuse(where, what)
        else:
            sizes[image_id], objects[image_id] = (width, height), []
    known = {image[0] for image in images}
    for a, image_id, category, bbox, crowd, given in annotations:
        where, area = f"{listing} annotation {a}", number(given)
        xywh = [number(v) for v in bbox] if isinstance(bbox, list) else []
        if image_id not in known:
            found.refuse(where, f"no image {image_id} in the file")
        elif category not in labels:
            found.refuse(where, f"no category {category} in the file")
        elif len(xywh) != 4 or crowd not in (0, 1) or math.isnan(area):
            got = f"{bbox!r:.60}, {given!r:.60}, {crowd!r:.60}"
            what = f"expected a bbox of four numbers, an area, and iscrowd 0 or 1; got {got}"
            found.refuse(where, what)
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
            if not infos and not objects[image_id]:
                found.note(f"{listing} image {image_id}", "no objects")
            rows = np.array(objects[image_id], np.float64).reshape(-1, 7)
            boxes, label, crowd, area = rows[:, :4], rows[:, 4], rows[:, 5], rows[:, 6]
            path, label = folder / file_name, label.astype(np.int64)
            size = sizes[image_id]
            records.append(Record(str(image_id), path, size, boxes, label, crowd == 1, area))
    if not infos and not any(len(record.labels) for record in records):
        found.refuse(listing, f"no objects at all in {len(records)} images")
    return records, [name for _, name in categories]


# ------------------------------------------------------------------------------ images


def open_image(path: Path) -> Image.Image:
    """Reads the header only. Refuses what is no image, and one too large, before any pixel."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise BadData(path, "the file is empty, or no regular file")
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        return image
    except Image.DecompressionBombError as error:
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
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known white: save it with 8 or 16")
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def decode(image: Image.Image, record: Record) -> Image.Image:
    """The pixels of an opened image, as stored: an EXIF orientation is not applied, because the
    boxes of VOC and COCO are in stored pixels."""
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # truncated, broken, 32-bit
        raise BadData(record.path, f"cannot be decoded ({error})") from None


def open_record(record: Record) -> Image.Image:
    """The image of a record, not yet decoded; its size must be the annotation's."""
    image = open_image(record.path)
    if image.format == "TIFF" and exif_orientation(image) in range(2, 9):  # Pillow turns only these
        what = "a TIFF with an orientation: are the boxes in its stored pixels? Store it upright"
        raise BadData(record.path, what)
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
