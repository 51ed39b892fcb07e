"""Reads COCO: one JSON file per set, with its images, annotations and categories.

annotations/instances_train2017.json + train2017/     COCO itself
annotations/instances_default.json + images/          CVAT: the set is `default`
train/_annotations.coco.json beside the pictures      Roboflow: train, valid, test
result.json + images/                                 Label Studio: the set is `result`
labels.json + data/                                   fiftyone: the set is `labels`
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.files import (
    MAX_PIXELS,
    SUFFIXES,
    UNREADABLE,
    BadData,
    Findings,
    Record,
    check_box,
    check_size,
    check_units,
    crosses,
    index_files,
    is_background,
    note_similar,
    number,
    of_a_run,
    one_form,
    open_image,
    part_of,
    read_bytes,
    spellings,
    split_of,
    stays_inside,
    stem_of,
    suggest,
    whole,
    whole_or_name,
)

OTHERS = {  # a key that other tools' JSON files have: whose it is, and what the user can do
    "shapes": "labelme's: convert it with labelme2coco",
    "_via_img_metadata": "a project of VIA: export the annotations as COCO",
    "_via_settings": "a project of VIA: export the annotations as COCO",
    "item": "Darwin's own format: export as COCO",
    "samples": "fiftyone's own format: export as COCODetectionDataset",
    "objects": "Supervisely's own format: export as COCO or Pascal VOC",
    "data": "Label Studio's own format: export as COCO",
    "image": "CreateML's: export as COCO",
    "score": "a list of detections: the annotations are in another file, instances_NAME.json",
}


class Entry(NamedTuple):
    """One annotation, as the file has it."""

    where: str
    image_id: int | str
    category: int
    xywh: object
    crowd: object
    area: object


class Listing(NamedTuple):
    """One JSON file, read but not yet checked."""

    path: Path
    categories: list[tuple[int, str, str]]  # id, name, supercategory; by id
    images: list[tuple]  # id, file name, width, height
    entries: list[Entry]
    image_ids: set[int | str] | None  # including images that are refused; None if some have no id
    category_ids: set[int] | None
    total: int  # images, including those that are refused


# ------------------------------------------------------------------------------ where things are


def listings(root: str | Path) -> dict[str, Path]:
    """All sets of a folder, in any of the layouts above: {set: its JSON file}."""
    root = Path(root)
    if not root.is_dir():
        return {}
    there = {path.stem: path for path in sorted(root.glob("*.json")) if seems_coco(path)}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = list(filter(seems_coco, sorted(folder.glob("*.json"))))
        if folder.name.lower() in ("annotations", "annotation"):
            there |= {path.stem.removeprefix("instances_"): path for path in files}
        elif len(files) == 1:
            there[folder.name] = files[0]
    return there


def seems_coco(path: Path) -> bool:
    """Whether a JSON file may list a set, by its name or its first bytes: other tools write one
    JSON file per image, which must not be mistaken for sets."""
    if path.name[0] == "." or not path.is_file() or of_a_run(path):
        return False
    if path.name.startswith(("instances", "_annotations.coco")):
        return True
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    return b'"images"' in start or b'"annotations"' in start


def others_format(root: Path) -> str:
    """For an error message: whose JSON files are in a folder and what the user can do, or ""."""
    for path in (*sorted(root.glob("*.json"))[:1], *sorted(root.glob("*/*.json"))[:3]):
        try:
            if path.stat().st_size < 64 << 20 and (who := whose(json.loads(read_bytes(path)))):
                return f"{path} is {who}"
        except (OSError, ValueError, RecursionError):
            continue
    return ""


def whose(data: object) -> str:
    """Whose format the content of a JSON file is, or "" if it is not known."""
    data = data[0] if isinstance(data, list) and data else data
    return next((who for key, who in OTHERS.items() if isinstance(data, dict) and key in data), "")


def list_sets(root: str | Path) -> list[str]:
    """The sets below `root`. If some files are named as COCO names them, only those."""
    there = listings(root)
    own = [name for name, path in there.items() if path.stem == f"instances_{name}"]
    return own or [name for name in there if not name.startswith(("captions_", "image_info_"))]


def find_listing(root: str | Path, split: str, annotated: bool = True) -> tuple[Path, list[Path]]:
    """The JSON file of a set, and the folders that may hold its images. Those of test-dev2017 are
    in test2017/."""
    root = Path(root)
    if not stays_inside(split or "/"):
        raise ValueError(f"set {split!r}: expected a name such as train2017")
    name, listing = split, listings(root).get(split)
    if not annotated and listing is None:
        name, info = split.replace("-dev", ""), root / "annotations" / f"image_info_{split}.json"
        listing = info if info.is_file() else None
    if listing is not None:
        near = listing.parent
        folders = [root / name, root / "images" / name, root / "images", root / "data"]
        folders += [near / "images", near / "data", near, root]
        return listing, [f for f in dict.fromkeys(folders) if f == folders[0] or f.is_dir()]
    kind = "instances" if annotated else "image_info"
    message = f"no annotations/{kind}_{split}.json and {name}/ below it"
    message = message if root.is_dir() else "no such folder"
    message += ". Expected the folder that contains both"
    message += " (a test set without annotations: eval.py --results takes it)" if annotated else ""
    if there := list_sets(root):
        message += f". {suggest(there)}"
    elif who := others_format(root):
        message += f". {who}"
    raise BadData(f"--coco-root {root}", message)


def find_pictures(images: list[tuple], folders: list[Path], listing: Path) -> dict[str, Path]:
    """The images of a listing in the folder that has most of them: {file name: path}."""
    best: dict[str, Path] = {}
    for folder in folders:
        index = index_files(folder, SUFFIXES)
        stems = {key.rpartition(".")[0]: path for key, path in index.items()}
        paths = {}
        for _, name, *_ in images:
            if not stays_inside(name):
                continue
            keys = list(spellings(name))
            path = next((index[key] for key in keys if key in index), None)
            path = path or next((stems[key] for key in keys if key in stems), None)
            try:
                path = path or ((folder / name).is_file() and folder / name)  # any other suffix
            except (OSError, ValueError):  # a name that no disk can hold
                path = None
            if path:
                paths[name] = path
        if len(paths) > len(best):
            best = paths
        if len(best) == len(images):
            break
    if images and not best and len(images) > 1:
        places = ", ".join(f"{folder}/" for folder in folders)
        what = f"none of its {len(images)} images is in {places}; the first is {images[0][1]!r:.80}"
        raise BadData(listing, what)
    return best


# ------------------------------------------------------------------------------ one file


def read_listing(path: Path, found: Findings) -> Listing:
    """The entries of one JSON file. An entry that lacks something is refused, with its position."""

    def refuse_constant(name):
        raise ValueError(f"{name} is no JSON number")

    content, data = read_bytes(path), None
    try:
        data = json.loads(content, parse_constant=refuse_constant)
        if path.name.startswith("image_info"):  # a test set's: without annotations
            data.setdefault("annotations", [])
        if isinstance(data, list) and not whose(data):
            raise TypeError("a list; expected an object with images, annotations and categories")
        for kind in ("categories", "images", "annotations"):
            if not isinstance(data[kind], list):
                raise TypeError(f"{kind} must be a list")
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        who = whose(data)
        what = f"it is {who}" if who else f"{type(error).__name__}: {error}"
        raise BadData(path, f"not an instances file of COCO ({what})") from None

    def rows(kind: str, take: Callable[[dict], tuple]) -> list[tuple]:
        good, bad = [], []
        for n, entry in enumerate(data[kind]):
            try:
                good.append(take(entry) + (n,))
            except KeyError as error:
                bad.append((n, f"no {error}"))
            except (TypeError, ValueError, AttributeError) as error:
                what = f"{entry!r:.40}: expected an object with names"
                bad.append((n, str(error) if isinstance(entry, dict) else what))
        if len(bad) > 1 and not good and len({what.partition(" ")[0] for _, what in bad}) == 1:
            raise BadData(path, f"none of its {len(bad)} {kind} is COCO's; the first: {bad[0][1]}")
        for n, what in bad:
            what = f"not an entry as COCO's ({what})"
            found.refuse(f"{path} {kind}[{n}]", what, f"broken entry of {kind}")
        return good

    def ids(kind: str) -> set[int | str] | None:
        """The ids of all entries, including refused ones: what refers to those is not a new
        error."""
        try:
            return {whole_or_name(entry["id"]) for entry in data[kind]}
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    categories = rows("categories", lambda c: (
        whole(c["id"]), named(c["name"]), str(c.get("supercategory")),
    ))  # fmt: skip
    images = rows("images", lambda i: (
        whole_or_name(i["id"]), str(i["file_name"]), i.get("width"), i.get("height"),
    ))  # fmt: skip
    entries = rows("annotations", lambda a: (
        a.get("id"), whole_or_name(a["image_id"]), whole(a["category_id"]), box_of(a),
        a.get("iscrowd"), a.get("area"),
    ))  # fmt: skip
    return Listing(
        path,
        sorted(row[:3] for row in categories),
        [row[:4] for row in images],
        [
            Entry(f"{path} annotation{f'[{n}]' if a is None else f' {a!s:.40}'}", *rest)
            for a, *rest, n in entries
        ],
        ids("images"),
        ids("categories"),
        len(data["images"]),
    )


def named(name: object) -> str:
    """The name of a category."""
    if isinstance(name, (str, int)) and one_form(str(name)).strip():
        return one_form(str(name)).strip()
    raise ValueError(f"name {name!r:.60}: expected a text")


def box_of(annotation: dict) -> object:
    """The bbox of an annotation, or if it has none, the box around its polygons."""
    if annotation.get("bbox"):
        return annotation["bbox"]
    polygons = annotation.get("segmentation")
    if isinstance(polygons, dict):
        raise ValueError(
            "a mask (RLE) without a bbox, which is needed: annotation['bbox'] = "
            "pycocotools.mask.toBbox(rle).tolist()"
        )
    if not isinstance(polygons, list) or not polygons:
        return annotation["bbox"]
    if not isinstance(polygons[0], list):  # a single one, not in a list of its own
        polygons = [polygons]
    points = [p for polygon in polygons for p in polygon]
    if len(points) < 6:
        raise ValueError("neither a bbox nor a polygon")
    x, y = [number(p) for p in points[::2]], [number(p) for p in points[1::2]]
    return FromPolygons([min(x), min(y), max(x) - min(x), max(y) - min(y)])


class FromPolygons(list):
    """A bbox that was computed from polygons, because the file does not have it."""


def size_of(width: object, height: object, path: Path, where: str, found: Findings) -> tuple:
    """The size of an image as the JSON file says; if that is missing or has fractions, the
    image's."""
    missing = width in (None, 0) and height in (None, 0)
    sides = number(width), number(height)
    if missing or any(side > 0 and side % 1 for side in sides):
        found.handle(where, "size missing or with fractions, taken from the image")
        return open_image(path, UNREADABLE).size
    if not all(side % 1 == 0 and 0 < side <= MAX_PIXELS for side in sides):  # NaN is neither
        what = f"size {width!r:.60} x {height!r:.60}: expected whole numbers of pixels"
        raise BadData(where, what, "image size that is not whole pixels")
    return int(sides[0]), int(sides[1])


def classes_of(listing: Listing, used: Counter, found: Findings) -> dict[int, str]:
    """The classes, ordered by id: {category id: name}. Categories that only group others are left
    out."""
    left = list(listing.categories)
    for category in listing.categories:
        number_, name, above = category
        others = [other for other in left if other is not category]
        groups = name != above and any(other[2] == name for other in others)
        twice = any(other[1] == name for other in others)
        if not used[number_] and (groups or twice or is_background(name)):
            what = "categories that no box uses, and that group others or are background: left out"
            found.handle(f"{listing.path} category {number_} {name!r}", what)
            left = others
        elif is_background(name):
            what = f"class {name!r} ({used[number_]} objects): background is what no box covers"
            where = f"{listing.path} category {number_}"
            found.refuse(where, what, "class named background", used[number_])
            left = others
    for what, keys in (
        ("category id", [category[0] for category in left]),
        ("category", [category[1] for category in left]),
    ):
        for key, count in Counter(keys).items():
            if count > 1:
                found.refuse(listing.path, f"{what} {key} is there {count} times")
    note_similar([name for _, name, _ in left], listing.path, found)
    return {number_: name for number_, name, _ in left}


def to_records(
    listing: Listing, folders: list[Path], part: str, labels: dict[int, int], found: Findings
) -> list[Record]:
    """The records of one file; `labels`: {category id: label}."""
    path = listing.path
    for what, keys in (
        ("image id", [image[0] for image in listing.images]),
        ("file name", [image[1] for image in listing.images]),
    ):
        for key, count in Counter(keys).items():
            if count > 1:
                what = f"{what} {key} is there {count} times"
                found.refuse(path, what, "image listed twice", count - 1)
    paths = find_pictures(listing.images, folders, path)
    images: dict[int | str, tuple[Path, tuple[int, int]]] = {}
    names: set[str] = set()
    chosen = part_of([stem_of(image[1]) for image in listing.images], part)
    for image_id, name, width, height in listing.images:
        where = f"{path} image {image_id}"
        try:
            if image_id in images or name in names:
                continue  # reported above
            if stem_of(name) not in chosen:
                continue
            names.add(name)
            if not stays_inside(name):
                what = f"file name {name[:60]!r} leaves its folder"
                raise BadData(where, what, "name that leaves its folder")
            if name not in paths:
                raise BadData(where, f"no image {folders[0] / name}", "missing image")
            size = size_of(width, height, paths[name], where, found)
            images[image_id] = paths[name], size
        except BadData as error:
            found.refuse(error.where, error.what, error.kind)
    objects = boxes_of(listing, images, labels, found)
    records = []
    for image_id, (picture, size) in images.items():
        if not objects[image_id] and not path.name.startswith("image_info"):
            found.note(f"{path} image {image_id}", "no objects")
        rows = np.array(objects[image_id], np.float64).reshape(-1, 7)
        boxes, label, crowd, area = rows[:, :4], rows[:, 4], rows[:, 5], rows[:, 6]
        label = label.astype(np.int64)
        records.append(Record(str(image_id), picture, size, boxes, label, crowd == 1, area))
    return records


def boxes_of(
    listing: Listing, images: dict[int, tuple], labels: dict[int, int], found: Findings
) -> dict[int, list[tuple]]:
    """The objects of each image: {image id: [(x0, y0, x1, y1, label, crowd, area), ...]}."""
    objects: dict[int, list[tuple]] = {image_id: [] for image_id in images}
    lost: dict[str, list[str]] = {}  # what -> places: many boxes may have the same fault
    derived: Counter = Counter()
    checked: set[int] = set()  # images whose size was compared with the file's
    for where, image_id, category, bbox, crowd, given in listing.entries:
        xywh = [number(v) for v in bbox] if isinstance(bbox, list) else []
        size = xywh[2] * xywh[3] if len(xywh) == 4 else math.nan
        area = size if given is None else number(given)
        crowd = 0 if crowd is None else number(crowd)
        if listing.image_ids is not None and image_id not in listing.image_ids:
            lost.setdefault(f"no image {image_id} in the file", []).append(where)
        elif listing.category_ids is not None and category not in listing.category_ids:
            lost.setdefault(f"no category {category} in the file", []).append(where)
        elif image_id not in images or category not in labels:
            continue  # its image or category was refused, or is in another part of the set
        elif len(xywh) != 4 or crowd not in (0, 1) or (math.isnan(area) and not math.isnan(size)):
            got = f"{bbox!r:.60}, {given!r:.60}, {crowd!r:.60}"
            what = f"expected a bbox of four numbers, an area, and iscrowd 0 or 1; got {got}"
            found.refuse(where, what, "annotation that is not COCO's")
        else:
            x, y, w, h = xywh
            if (w == 0 or h == 0) and not math.isnan(x + y + w + h):
                found.handle(where, "boxes without area, left out")
                continue
            box, (path, size) = [x, y, x + w, y + h], images[image_id]
            if crosses(box, size) and image_id not in checked:
                checked.add(image_id)
                try:
                    check_size(path, size, f"{listing.path} image {image_id}")
                except BadData as error:
                    found.refuse(error.where, error.what, error.kind)
                    del objects[image_id], images[image_id]
                    continue
            if check_box(box, size, f"{xywh}", where, found, bbox):
                objects[image_id].append((*box, labels[category], crowd, area))
                derived["bbox", "its polygons'"] += isinstance(bbox, FromPolygons)
                derived["area", "width x height"] += given is None
    for what, places in lost.items():
        more = f" ({len(places)} annotations)" if len(places) > 1 else ""
        found.refuse(places[0], what + more, "annotation of nothing in the file", len(places))
    for (field, value), count in derived.items():
        if count:
            what = f"annotations without {field}, {value} taken"
            found.handle(listing.path, what, count)
    return objects


# ------------------------------------------------------------------------------ all of it


def read_coco(
    root: str | Path,
    sets: Sequence[str],
    findings: Findings | None = None,
    *,
    annotated: bool = True,
) -> tuple[list[Record], list[str]]:
    """Reads sets -> (records, class names). Label k is the k-th category by id; all sets must have
    the same categories. annotated=False: a test set may be annotations/image_info_<set>.json.

    Crowd regions are marked as `difficult`. ValueError names the file and the id.
    """
    if isinstance(sets, str) or not sets:
        raise ValueError(f"sets is a list of one or more names; got {sets!r}")
    found, parts = findings or Findings(), []
    for name in sets:
        name, part = split_of(name)
        path, folders = find_listing(root, name, annotated)
        parts.append((name, part, folders, read_listing(path, found)))
    first = parts[0][3]
    for *_, listing in parts[1:]:
        names = [category[:2] for category in listing.categories]
        if names != [category[:2] for category in first.categories]:
            names = [name for _, name in names]
            found.refuse(listing.path, f"its categories are not those of the sets before: {names}")
    used = Counter(entry.category for *_, listing in parts for entry in listing.entries)
    classes = classes_of(first, used, found)
    labels = {category: label for label, category in enumerate(classes, start=1)}
    records, seen = [], {}
    for name, part, folders, listing in parts:
        some = to_records(listing, folders, part, labels, found)
        seems_empty = not any(len(record.labels) for record in some)
        if annotated and seems_empty and (some or not listing.total):  # else it was reported
            found.refuse(listing.path, f"no objects at all in {len(some)} images")
        for record in some:
            if record.name in seen:
                what = f"the set {seen[record.name]} has it"
                found.refuse(f"{name} image {record.name}", what, "image listed twice")
            else:
                seen[record.name] = name
                records.append(record)
        check_units(some, listing.path, found)
    found.say()
    return records, list(classes.values())


def category_ids(root: str | Path, split: str) -> dict[str, int]:
    """The official ids, which the results for COCO's server need: {class name: id}. If two
    categories have the same name, it is the id of the one that has boxes."""
    listing = read_listing(find_listing(root, split, annotated=False)[0], Findings(collect=True))
    used = {entry.category for entry in listing.entries}
    categories = sorted(listing.categories, key=lambda category: category[0] in used)
    return {name: category for category, name, _ in categories}
