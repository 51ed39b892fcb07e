"""Reads VOC: one XML file per image, and a list of names per set.

    VOC2007/Annotations/000005.xml      <annotation> with <size> and <object>s
            JPEGImages/000005.jpg
            ImageSets/Main/train.txt    000005 ...

Other tools write the same XML into other folders. These layouts are read as well:

    images/ + annotations/              Kaggle, Label Studio, fiftyone: any of the folders' names
    train/, valid/                      Roboflow: each folder is a set, pictures beside their XML
    images/train/ + annotations/train/  each pair of folders is a set
    no lists at all                     labelme: the set `all`, or its parts all@train and all@val

`<filename>`, `<path>` and `<folder>` are ignored: they describe the disk of whoever drew the boxes.
"""

import contextlib
import glob
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.parsers import expat

import numpy as np

from plumbing.files import (
    SUFFIXES,
    UNREADABLE,
    BadData,
    Findings,
    Record,
    check_box,
    check_size,
    check_units,
    crosses,
    index_tree,
    is_background,
    note_similar,
    number,
    of_a_run,
    one_form,
    open_image,
    part_of,
    read_bytes,
    read_lines,
    spellings,
    split_of,
    stays_inside,
    suggest,
)

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
MAX_DEPTH = 16  # of nested XML elements; VOC needs 4
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img", "pictures", "photos", "data")
XML_FOLDERS = ("annotations", "annotation", "annots", "annot", "xmls", "xml", "labels", "ann")
DIALECTS = {  # outermost elements of other formats, and what the user can do
    "annotations": "CVAT's own format: export as Pascal VOC",
    "html": "a web page, saved in place of the file",
    "dataset": "imglab's format: convert it to VOC",
}

# ------------------------------------------------------------------------------ one annotation


def parse_xml(path: Path) -> list[tuple[str, str, int]]:
    """[("size/width", "500", line), ...], and ("object", "", line) where each object starts.

    Safe on any input: at most 16 MiB and 16 levels, and no document type that declares entities or
    attributes (which can expand without bound, or read files of this machine), or that is in
    another file. Prefixes of namespaces are dropped.
    """
    data, encoding = in_utf8(read_bytes(path))
    parser = expat.ParserCreate(encoding)
    parser.buffer_text = True
    stack: list[str] = []
    text: list[str] = []
    leaves = []

    def start(tag, _):
        if len(stack) == MAX_DEPTH:
            raise ValueError(f"broken XML: elements nested more than {MAX_DEPTH} deep")
        tag = tag.rpartition(":")[2]
        if not stack and tag != "annotation":
            known = f" ({DIALECTS[tag.lower()]})" if tag.lower() in DIALECTS else ""
            raise ValueError(f"the outermost element is <{tag:.60}>, VOC's is <annotation>{known}")
        stack.append(tag)
        text.clear()
        if tag == "object":
            if len(stack) != 2:
                inside = "/".join(stack[:-1])
                raise ValueError(
                    f"broken XML: <object> in <{inside}>; expected in the outermost element"
                )
            leaves.append(("object", "", parser.CurrentLineNumber))
        elif stack[1:2] != ["object"] and tag.lower() in ("object", "bndbox", "xmin"):
            raise ValueError(
                f"<{tag}> in <{'/'.join(stack[:-1])}>: VOC's boxes are annotation/object/bndbox"
            )

    def end(_):
        if value := "".join(text).strip():
            leaves.append(("/".join(stack[1:]), value, parser.CurrentLineNumber))
        stack.pop()
        text.clear()

    def refuse(*_):
        raise ValueError(
            "broken XML: a document type that declares entities or attributes, or that is in "
            "another file, is refused; take <!DOCTYPE ...> out"
        )

    def doctype(_, system, public, has_declarations):
        if system or public:
            refuse()

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text.append, doctype
    parser.EntityDeclHandler = parser.AttlistDeclHandler = parser.SkippedEntityHandler = refuse
    try:
        parser.Parse(data, True)
    except (ValueError, LookupError, expat.ExpatError) as error:
        what = str(error) if type(error) is ValueError else f"broken XML: {error}"
        what = what.partition(": line")[0] if data else "the file is empty"
        if "invalid token" in what and not is_utf8(data):
            what = "not UTF-8, and the file declares no other encoding; save it as UTF-8"
        where = f"{path}:{parser.CurrentLineNumber}"
        raise BadData(where, what, "annotation that cannot be read") from None
    return leaves


def in_utf8(data: bytes) -> tuple[bytes, str | None]:
    """The XML as expat can read it, and the encoding to tell it: it does not know those of several
    bytes, such as GBK. None: as the file declares."""
    declared = re.match(rb"""<\?xml[^>]*?encoding=["']([\w.-]+)["']""", data)
    try:
        expat.ParserCreate().Parse(declared[0] + b"?><a/>", True) if declared else None
    except (ValueError, LookupError, expat.ExpatError):
        with contextlib.suppress(ValueError, LookupError):  # unknown, or not what it says
            return data.decode(declared[1].decode()).encode(), "utf-8"
    return data, None


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def read_annotation(xml: Path, image: Path, found: Findings) -> tuple:
    """One VOC annotation -> (width, height), [(name, box, difficult, FILE:LINE), ...]."""
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
            if part.startswith("polygon/"):  # <x1> <y1> <x2> ..., or many of <pt><x> <y>
                axis = part.rpartition("/")[2][:1].lower()
                objects[-1].setdefault(f"all {axis}", []).append(number(text))
        else:
            head.setdefault(tag, text)
    width, height = (number(head.get(f"size/{side}", "0")) for side in ("width", "height"))
    if width == height == 0:
        width, height = open_image(image, UNREADABLE).size
        found.handle(xml, "sizes missing in the XML, taken from the image")
    if not (width >= 1 and height >= 1 and width % 1 == height % 1 == 0):
        given = " x ".join(head.get(f"size/{side}", "0")[:60] for side in ("width", "height"))
        what = f"size/width x size/height {given}: expected whole numbers of pixels"
        raise BadData(xml, what, "annotation that cannot be read")
    size = int(width), int(height)
    if not objects:
        found.note(xml, "no objects")
    rows = []
    if deleted := [entry for entry in objects if entry.get("deleted") == "1"]:
        found.handle(xml, "objects marked as deleted, left out", len(deleted))
        objects = [entry for entry in objects if entry not in deleted]
    for entry in objects:
        entry["given"] = [entry.get(f"bndbox/{s}") for s in ("xmin", "ymin", "xmax", "ymax")]
        entry["box"] = [number(text) for text in entry["given"]]
        if entry["given"] == [None] * 4:
            enclose(entry, xml, found)
    if any(crosses(entry["box"], size) for entry in objects):
        check_size(image, size, xml)
    for entry in objects:
        name, where, given, box = (entry.get(key) for key in ("name", "where", "given", "box"))
        difficult = entry.get("difficult", "0").lower()
        if name is None:
            found.refuse(where, "an object without a name", "object without a name")
        elif "twice" in entry:
            what = f"{name}: an object with two of <{entry['twice']}>; expected one"
            found.refuse(where, what, "object with two boxes or names")
        elif difficult not in DIFFICULT:
            what = f"{name}: difficult must be 0 or 1; got {difficult[:60]!r}"
            found.refuse(where, what, "difficult that is not 0 or 1")
        elif given == [None] * 4:
            has = ", ".join(f"<{part}>" for part in entry if "/" in part) or "nothing of the kind"
            what = (
                f"{name}: no <bndbox> with <xmin> <ymin> <xmax> <ymax>; the object has {has:.200}"
            )
            found.refuse(where, what, "object without a box")
        elif check_box(box, size, name, where, found, given):
            rows.append((one_form(" ".join(name.split())), box, DIFFICULT[difficult], where))
            if min(box[:2]) < 1:
                found.note(where, "box counts from 0 (VOC's count from 1); nothing is subtracted")
            if any(side % 1 for side in box):
                found.note(where, "box with fractions of a pixel, used as it is")
    return size, rows


def enclose(entry: dict, xml: Path, found: Findings) -> None:
    """The box around an object that has a polygon or a rotated box instead of one, if it has."""
    if "all x" in entry and "all y" in entry:
        xs, ys = entry["all x"], entry["all y"]
    elif "robndbox/angle" in entry:  # roLabelImg: centre, sides, and the angle in radians
        cx, cy, w, h, angle = (
            number(entry.get(f"robndbox/{part}")) for part in ("cx", "cy", "w", "h", "angle")
        )
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        half = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
        xs, ys = [cx - half[0], cx + half[0]], [cy - half[1], cy + half[1]]
    else:
        return
    entry["box"] = [min(xs), min(ys), max(xs), max(ys)]
    entry["given"] = list(map(str, entry["box"]))
    found.handle(xml, "polygons or rotated boxes: the upright box around each is used")


DIFFICULT = {"0": False, "1": True, "false": False, "true": True, "unspecified": False}

# ------------------------------------------------------------------------------ sets of a tree


def pictures_of(tree: Path) -> dict[str, Path]:
    """The pictures of a tree: {"000005.jpg": path, ...}."""
    return index_tree(tree, SUFFIXES, IMAGE_FOLDERS, XML_FOLDERS)


def annotations_of(tree: Path) -> dict[str, Path]:
    """The annotations of a tree: {"000005": path, ...}."""
    index = index_tree(tree, ".xml", XML_FOLDERS, IMAGE_FOLDERS)
    return {key[:-4]: path for key, path in index.items()}


def trees_of(root: Path, name: str) -> list[Path]:
    """The folders in which the tree of "2007:trainval" may be; without a year `root` itself."""
    year = name.rpartition(":")[0]
    folder = f"VOC{year}" if year.isdigit() else year
    trees = [root / folder, root / "VOCdevkit" / folder] if folder else [root]
    if folder in (root.absolute().name, root.resolve().name):  # a link may have another name
        trees.append(root)
    return trees


def list_sets(root: str | Path) -> list[str]:
    """The sets in `root`, as read_voc takes them: lists, else folders, else ["all"]; [] if there
    are no annotations. The devkit's lists of one class are left out, such as dog_train.txt with its
    "000005 -1"."""
    root, sets = Path(root), []
    for tree in (root, *sorted(root.glob("*")), *sorted(root.glob("VOCdevkit/*"))):
        year = "" if tree == root else re.sub(r"^VOC(?=\d+$)", "", tree.name) + ":"
        lists = sorted((tree / "ImageSets" / "Main").glob("*.txt"))
        for listing in lists:
            first, (_, _, end) = b"", listing.stem.rpartition("_")
            ends = ("train", "val", "trainval", "test", *(other.stem for other in lists))
            if end != listing.stem and end in ends and listing.is_file():
                with open(listing, "rb") as file:
                    first = file.readline(4096)
            if not re.search(rb"\s(-1|0|1)\s*$", first) and not of_a_run(listing):
                sets.append(year + listing.stem)
    if not sets and root.is_dir():
        keys = annotations_of(root)
        sets = sorted({key.partition("/")[0] for key in keys if "/" in key}) or ["all"] * bool(keys)
    return sets


def find_set(root: str | Path, name: str) -> tuple[Path, Path]:
    """("data", "2007:trainval") -> data/VOC2007 and its ImageSets/Main/trainval.txt. If the set is
    not a list but a folder, the folder comes instead of the list; for "all" that is the tree."""
    root, (year, _, split) = Path(root), name.rpartition(":")
    if not split or not stays_inside(split) or not stays_inside(year or "-"):
        raise ValueError(f"set {name!r}: expected YEAR:SPLIT such as 2007:trainval, or SPLIT")
    for tree in trees_of(root, name):
        for listing in (tree / f"ImageSets/Main/{split}.txt", tree / f"ImageSets/{split}.txt"):
            if listing.is_file():
                return tree, listing
    for tree in filter(Path.is_dir, trees_of(root, name)):
        keys = annotations_of(tree)
        if split == "all" and keys:
            return tree, tree
        if any(key.startswith(f"{one_form(split)}/") for key in keys):
            return tree, tree / split
    folder = f"VOC{year}" if year.isdigit() else year
    message = f"no {Path(folder, 'ImageSets/Main', split)}.txt below it."
    if not root.is_dir():
        message = "no such folder."
    message += f" Expected the folder that contains {folder or 'ImageSets'}/"
    message += ", or the one above it." if folder else ", Annotations/ and JPEGImages/."
    there = list_sets(root)
    if there == ["all"]:
        count = len(annotations_of(root))
        message = (
            f"no lists there (ImageSets/Main/*.txt) that say what to train on, but {count} "
            "annotations. --train-sets all@train --eval-sets all@val trains on four fifths, chosen "
            "by a hash of their names, and measures on the rest; the set `all` is all of them"
        )
    elif there:
        if "2007:trainval" in there and year == "2012":
            message += f" Sets there: {' '.join(there)}. To train without VOC2012: "
            message += "--train-sets 2007:trainval"
        else:
            message += f" {suggest(there, 'all')}"
    raise BadData(f"--voc-root {root}", message)


def names_in(
    tree: Path, listing: Path, pictures: dict[str, Path], xmls: dict[str, Path], annotated: bool
) -> list[tuple[str, object]]:
    """The names of a set, from its list or its folder: [("000005", FILE:LINE), ...]."""
    if listing.is_file():
        if lines := read_lines(listing):
            return lines
        raise BadData(listing, "lists no images")
    start = "" if listing == tree else f"{one_form(listing.relative_to(tree).as_posix())}/"
    if annotated:
        return [(key, path) for key, path in xmls.items() if key.startswith(start)]
    names = {key.rpartition(".")[0]: path for key, path in pictures.items()}
    return [(name, path) for name, path in names.items() if name.startswith(start)]


# ------------------------------------------------------------------------------ all of it


def read_voc(
    root: str | Path,
    sets: Iterable[str],
    classes: Iterable[str] | None = None,
    findings: Findings | None = None,
    annotated: bool = True,
) -> tuple[list[Record], list[str]]:
    """Reads sets of VOC trees -> (records, class names); label 1 is the first name.

    Either `root` holds VOC2007/ (or VOCdevkit/VOC2007/) and a set is called "2007:trainval", or
    `root` is a tree itself and a set is called "train". Without `classes` the names are those of
    the annotations, sorted. annotated=False: a set may have no annotations at all, as VOC2012 test.
    ValueError names the file.
    """
    if isinstance(classes, str) or isinstance(sets, str):
        raise ValueError(f"sets and classes are lists of names; got {sets!r}, {classes!r}")
    found = findings or Findings()
    sets = list(sets)
    images: list[tuple] = []  # image id, path, size, objects
    seen: dict[Path, str] = {}
    for name in sets:
        images += read_set(root, name, annotated, seen, found)
    if classes is None:
        classes = sorted({row[0] for *_, rows in images for row in rows})
        note_similar(classes, f"sets {' '.join(sets)}", found)
        classes = [name for name in classes if not is_background(name)]
    records = to_records(images, [one_form(name) for name in classes], found)
    if annotated and not any(len(record.labels) for record in records):
        found.refuse(root, f"no objects at all in the {len(records)} images of {' '.join(sets)}")
    check_units(records, root, found)
    found.say()
    return records, list(classes)


def read_set(
    root: str | Path, name: str, annotated: bool, seen: dict[Path, str], found: Findings
) -> list[tuple]:
    """One set -> [(image id, path, size, rows), ...]. `seen`: where each image was listed."""
    name, part = split_of(name)
    tree, listing = find_set(root, name)
    pictures, xmls = pictures_of(tree), annotations_of(tree)
    if not pictures:
        raise BadData(tree / "JPEGImages", "no pictures there; expected the images of the set")
    by_id = {key.rpartition(".")[0]: path for key, path in pictures.items()}
    by_id |= {key[:-4]: path for key, path in pictures.items() if key.lower().endswith(".jpg")}
    lines = names_in(tree, listing, pictures, xmls, annotated)

    def last_names():
        for line, where in lines if part else ():
            with contextlib.suppress(BadData):  # reported in the loop below
                yield find_image(line, where, pictures, by_id)[0].rpartition("/")[2]

    chosen = part_of(last_names(), part)
    images, bare = [], []
    for line, where in lines:
        try:
            image_id, path = find_image(line, where, pictures, by_id)
            if part and image_id.rpartition("/")[2] not in chosen:
                continue
            xml = xmls.get(image_id, tree / "Annotations" / f"{image_id}.xml")
            if xml in seen:
                what = f"{image_id} is listed twice, first at {seen[xml]}"
                raise BadData(where, what, "image listed twice")
            seen[xml] = where
            if path is None:
                expected = tree / "JPEGImages" / f"{image_id}.jpg"
                other = next(expected.parent.glob(f"{glob.escape(expected.stem)}.*"), None)
                what = f"no image {expected}" + (f", but {other.name}" if other else "")
                raise BadData(where, what, "missing image")
            if xml.is_file():
                images.append((image_id, path, *read_annotation(xml, path, found)))
            elif annotated:
                raise BadData(where, f"no annotation {xml}", "missing annotation")
            else:
                bare.append(where)
                with open_image(path, UNREADABLE) as image:
                    images.append((image_id, path, image.size, []))
        except BadData as error:
            found.refuse(error.where, error.what, error.kind)
    if 0 < len(bare) < len(lines):
        what = f"{len(bare)} of its {len(lines)} images lack an annotation: expected all or none"
        found.refuse(listing, what)
    return images


def find_image(
    line: str, where: object, pictures: dict[str, Path], by_id: dict[str, Path]
) -> tuple[str, Path | None]:
    """The id and the picture that a line of a list means; (id, None) if there is no such picture.

    Lines are "000005", "000005.jpg", "cam1/part00", or "000005 -1" in the devkit's lists of one
    class; but "scan 1" is a name if there is a scan 1.jpg.
    """
    if not stays_inside(line):
        what = f"image id {line[:60]!r} leaves its folder"
        raise BadData(where, what, "name that leaves its folder")
    without_number = re.sub(r"\s+(-1|0|1)$", "", line)
    for text in (line, without_number, without_number.strip('"')):
        for key in spellings(text, IMAGE_FOLDERS + XML_FOLDERS):
            if key in by_id:
                return key, by_id[key]
            if key in pictures:  # of a.jpg and a.png the one that is named
                return key.rpartition(".")[0], pictures[key]
    for key in spellings(text):  # the list says .jpg, the picture is a .png
        stem, _, suffix = key.rpartition(".")
        if f".{suffix.lower()}" in SUFFIXES and stem in by_id:
            return stem, by_id[stem]
    return (stem if f".{suffix.lower()}" in SUFFIXES else key), None


def to_records(images: Sequence[tuple], classes: list[str], found: Findings) -> list[Record]:
    """What `read_set` returned -> records. Refuses unknown class names, once for each name."""
    unknown: dict[str, list[str]] = {}
    for *_, rows in images:
        for name, _, _, where in rows:
            if name not in classes:
                unknown.setdefault(name, []).append(where)
    for name, places in unknown.items():
        more = f" ({len(places)} objects)" if len(places) > 1 else ""
        if is_background(name):
            what = f"class {name!r}{more}: background is what no box covers, not a class"
            found.refuse(places[0], what, "class named background", len(places))
        else:
            what = (
                f"class {name[:60]!r} is none of {', '.join(classes)}; --classes auto or FILE{more}"
            )
            found.refuse(places[0], what, "unknown class", len(places))
    labels = {name: label for label, name in enumerate(classes, start=1)}
    records = []
    for image_id, path, size, rows in images:
        rows = [row for row in rows if row[0] in labels]
        boxes = np.array([box for _, box, _, _ in rows], np.float64).reshape(-1, 4)
        label = np.array([labels[name] for name, *_ in rows], np.int64)
        difficult = np.array([row[2] for row in rows], bool)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        records.append(Record(image_id, path, size, boxes, label, difficult, area))
    return records
