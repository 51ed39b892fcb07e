"""Reads YOLO: one text file per image, a line per object: class, then fractions of the image.

    labels/train/a.txt      0 0.5 0.25 0.2 0.1          centre x, y, width, height
                            1 0.1 0.1 0.3 0.1 0.2 0.4   a polygon: x, y per corner; its box is used
    images/train/a.jpg
    data.yaml               names: [bolt, nut]          or classes.txt, obj.names: one per line

The files number classes from 0; in a record label 1 is the first name. Layouts of other tools:

    train/images + train/labels, valid/...     Roboflow; data.yaml beside them
    obj.names, train.txt, obj_train_data/      darknet and CVAT: lists, labels beside the pictures
    images/, labels/, classes.txt              Label Studio: the set `all`, or all@train and all@val

An image whose label file is empty or missing has no objects; missing files are counted and
reported. An image with an EXIF rotation is refused, because some tools measure the stored picture
and some the rotated one.
"""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from plumbing.files import (
    SUFFIXES,
    UNREADABLE,
    BadData,
    Findings,
    Record,
    check_box,
    exif_orientation,
    index_tree,
    is_background,
    note_similar,
    number,
    one_form,
    open_image,
    part_of,
    read_lines,
    read_text,
    spellings,
    split_of,
    stays_inside,
    stem_of,
    suggest,
)

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
LABEL_FOLDERS = ("labels", "label", "annotations")
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "darknet.labels", "labels.txt")
MANY = 20  # if more lines have the same fault, it is reported once
NO_LABELS = ("classes.txt", "labels.txt", "readme.txt", "notes.txt")

# ------------------------------------------------------------------------------ data.yaml


def read_yaml(path: Path) -> dict[str, object]:
    """Reads a data.yaml: {key: a text, a list of texts, or a mapping such as {"0": "bolt"}}.

    It understands what the YOLO tools write, not all of YAML: `key: value`, and lists and mappings
    in brackets or on lines of their own. The time is linear in the size of the file.
    """
    lines = []
    for n, line in enumerate(read_text(path).splitlines(), 1):
        text = without_comment(line.rstrip())
        if text.strip() and text not in ("---", "...") and not text.startswith("%YAML"):
            lines.append((text, f"{path}:{n}"))
    values: dict[str, object] = {}
    n = 0
    while n < len(lines):
        text, where = lines[n]
        n += 1
        key, colon, value = text.partition(":")
        key, value = unquoted(key), value.strip()
        if not value and n < len(lines) and lines[n][0].strip()[0] in "[{":  # on the next line
            value, n = lines[n][0].strip(), n + 1
        if not colon or text[0] in " \t-" or not key:
            raise BadData(where, f"expected `key: value`; got {text.strip()[:60]!r}")
        if value[:1] in ("[", "{") and value:
            closing, pieces = {"[": "]", "{": "}"}[value[0]], [value]
            while not pieces[-1].rstrip().endswith(closing) and n < len(lines):
                pieces.append(lines[n][0].strip())
                n += 1
            if not pieces[-1].rstrip().endswith(closing):
                raise BadData(where, f"{key}: no closing {closing}")
            items = split_items(" ".join(pieces).strip()[1:-1])
            pairs = closing == "}"
            values[key] = (
                dict(pair(i, where) for i in items) if pairs else list(map(unquoted, items))
            )
            continue
        block = []
        while n < len(lines) and (lines[n][0][0] in " \t" or lines[n][0].startswith("- ")):
            block.append((lines[n][0].strip(), lines[n][1]))
            n += 1
        if value:
            values[key] = unquoted(value)  # indented lines below it are ignored
        elif block and block[0][0].startswith("-"):
            values[key] = [unquoted(item.removeprefix("-")) for item, _ in block]
        elif block:
            values[key] = dict(pair(item, at) for item, at in block if ":" in item)
    return values


def pieces_of(text: str, stop: str) -> Iterator[int]:
    """The positions of `stop` in a line of YAML outside of quotes. A quote opens only at the start
    of a value: "driver's" has none."""
    quote, start = "", True
    for n, letter in enumerate(text):
        if quote:
            quote, start = ("", True) if letter == quote else (quote, False)  # '' is one quote
            continue
        if letter in "'\"" and start:
            quote = letter
        elif letter == stop:
            yield n
        start = letter in "[{,:-" or (start and letter == " ")


def without_comment(text: str) -> str:
    """The text without its comment: a # at the start or after a space, and all behind it."""
    for n in pieces_of(text, "#"):
        if n == 0 or text[n - 1] in " \t":
            return text[:n].rstrip()
    return text


def split_items(text: str) -> list[str]:
    """ "a, 'b, c'" -> ["a", "'b, c'"]."""
    cuts = [-1, *pieces_of(text, ","), len(text)]
    items = [text[first + 1 : last].strip() for first, last in itertools.pairwise(cuts)]
    return [item for item in items if item]


def unquoted(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) >= 2 and text[0] == text[-1] == '"':  # escapes, such as PyYAML's "\\xE9crou"
        with contextlib.suppress(ValueError):
            return json.loads(re.sub(r"\\x([0-9A-Fa-f]{2})", r"\\u00\1", text))
        return text[1:-1]
    return text


def pair(text: str, where: str) -> tuple[str, str]:
    """ "0: bolt" -> ("0", "bolt")."""
    key, colon, value = text.partition(":")
    if not colon:
        raise BadData(where, f"expected `number: name`; got {text[:60]!r}")
    return unquoted(key), unquoted(value)


# ------------------------------------------------------------------------------ what is there


def folder_of(root: str | Path) -> Path:
    """The root folder; `root` may also be the data.yaml in it."""
    root = Path(root)
    return root.parent if root.is_file() and root.suffix in (".yaml", ".yml") else root


def settings_of(root: Path) -> tuple[dict[str, object], Path | None]:
    """The content and path of data.yaml, dataset.yaml or another .yaml of the folder; ({}, None)
    if there is none."""
    files = sorted(p for s in ("*.yaml", "*.yml") for p in root.glob(s) if p.name[0] != ".")
    named = [p for p in files if p.stem in ("data", "dataset")] or files
    if not named:
        return {}, None
    return read_yaml(named[0]), named[0]


def names_of(root: Path, settings: dict, file: Path | None) -> tuple[list[str], object]:
    """The class names in the order of their numbers, and the file they were found in."""
    names = settings.get("names")
    if isinstance(names, dict):
        numbers = sorted((int(number(key)), name) for key, name in names.items() if key.isdigit())
        if [n for n, _ in numbers] != list(range(len(names))):
            raise BadData(file, f"names: expected the numbers 0 to {len(names) - 1}, each once")
        names = [name for _, name in numbers]
    if isinstance(names, list) and not all(names):
        raise BadData(file, f"names: the name of class {names.index('')} is empty")
    if isinstance(names, list) and names:
        return [one_form(name) for name in names], file
    for folder in (root, root / "labels", root / "images", *sorted(root.glob("obj_*_data"))):
        there = [folder / name for name in NAME_FILES] + sorted(folder.glob("*.names"))
        for path in filter(Path.is_file, there):
            return [one_form(line) for line, _ in read_lines(path)], path
    what = "no data.yaml with names, classes.txt or obj.names there"
    raise BadData(f"--yolo-root {root}", f"{what}; expected the class names: --classes FILE")


def which_names(
    root: Path, settings: dict, file: Path | None, classes: Iterable[str] | None
) -> tuple[list[str], object]:
    """`names_of`, or `classes` if the data has no names. If both exist they must agree."""
    if classes is None:
        return names_of(root, settings, file)
    classes = list(classes)
    try:
        names, source = names_of(root, settings, file)
    except BadData:
        return classes, "--classes"
    if names != classes:
        what = f"{source} lists {', '.join(names)}: leave --classes out"
        raise BadData(f"--classes {', '.join(classes)}", what)
    return names, source


def pictures_of(root: Path) -> dict[str, Path]:
    """The pictures below the root: {"train/a.jpg": path, ...}."""
    return index_tree(root, SUFFIXES, IMAGE_FOLDERS, LABEL_FOLDERS)


def labels_of(root: Path) -> dict[str, Path]:
    """The label files below the root, which may lie beside the pictures: {"train/a": path, ...}."""
    index = index_tree(root, ".txt", LABEL_FOLDERS + IMAGE_FOLDERS, ())
    return {key[:-4]: path for key, path in index.items()}


def list_sets(root: str | Path) -> list[str]:
    """The sets: lists, else folders, else ["all"]; [] if there are no pictures."""
    root = folder_of(root)
    if not root.is_dir():
        return []
    pictures, lists = pictures_of(root), []
    tails, stems = tails_of(pictures), {key.rpartition(".")[0] for key in pictures}
    for path in sorted(root.glob("*.txt")):  # some may be labels of pictures beside them
        if path.name[0] != "." and path.name.lower() not in NO_LABELS and path.stem not in stems:
            with contextlib.suppress(BadData):  # not a text file
                first = next(iter(read_lines(path)), ("", ""))[0]
                if key_of(first, pictures, tails) in pictures:
                    lists.append(path.stem)
    folders = sorted({key.partition("/")[0] for key in pictures if "/" in key})
    return lists or folders or ["all"] * bool(pictures)


def find_set(
    root: Path, name: str, pictures: dict[str, Path], settings: dict
) -> list[tuple[str, object]]:
    """The pictures of a set, which is a list, a folder, an entry of data.yaml, or all:
    [(key of `pictures`, where it is listed), ...]."""
    by_tail = tails_of(pictures)

    def listed(path: Path) -> list[tuple[str, object]]:
        lines = read_lines(path)
        if not lines:
            raise BadData(path, "lists no images")
        return [(key_of(line, pictures, by_tail), where) for line, where in lines]

    def folder(start: str) -> list[tuple[str, object]]:
        start = one_form(start).strip("/")
        return [(key, pictures[key]) for key in pictures if key.startswith(f"{start}/")]

    def entry_of_yaml(text: str) -> list[tuple[str, object]]:
        parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if parts and parts[-1].lower().endswith(".txt"):
            tails = [root / Path(*parts[n:]) for n in range(len(parts))]
            path = next(filter(Path.is_file, tails), None)
            return listed(path) if path else []
        parts = [part for part in parts if part.casefold() not in IMAGE_FOLDERS]
        if not parts:  # the root, or images/
            return list(pictures.items())
        starts = ("/".join(parts[n:]) for n in range(len(parts)))
        return next(filter(None, map(folder, starts)), [])

    if not stays_inside(name or "/"):
        raise ValueError(f"set {name!r}: expected a name such as train")
    entry = settings.get(name)
    texts = [entry] if isinstance(entry, str) else list(entry or [])
    texts = [text for text in texts if text.lower() not in ("", "~", "null")]
    own = root / f"{name}.txt"  # comes before what the .yaml says, unless that is a list, too
    if own.is_file() and not any(text.lower().endswith(".txt") for text in texts):
        return listed(own)
    found = [(text, entry_of_yaml(text)) for text in texts]
    lost = next((text for text, rows in found if not rows), None)
    if found and lost is None:  # the .yaml counts, as for the tools that wrote it
        return [row for _, rows in found for row in rows]
    if len(found) < 2 and (some := listed(own) if own.is_file() else folder(name)):
        return some
    if lost is not None and pictures:
        what = f"no pictures in {lost!r:.80}, which its .yaml names as {name!r}; expected a folder"
        raise BadData(f"--yolo-root {root}", f"{what}, or a list of pictures, below {root}")
    if pictures and name == "all":
        return list(pictures.items())
    message = f"no set {name!r}: expected images/{name}/ and labels/{name}/, or a list {name}.txt"
    if not root.is_dir():
        message = "no such folder; expected the one that contains images/ and labels/"
    elif not pictures:
        message = "no pictures below it; expected the folder that contains images/ and labels/"
    elif (there := list_sets(root)) == ["all"]:
        message += (
            f". There are {len(pictures)} images in one folder. --train-sets all@train --eval-sets "
            "all@val trains on four fifths, chosen by a hash of their names, and measures on the "
            "rest"
        )
    else:
        message += f". {suggest(there, 'all')}"
    raise BadData(f"--yolo-root {root}", message)


def tails_of(pictures: dict[str, Path]) -> dict[str, list[str]]:
    """The keys of the pictures by the name of the file alone: {"a.jpg": ["train/a.jpg"], ...}."""
    tails: dict[str, list[str]] = {}
    for key in pictures:
        tails.setdefault(key.rpartition("/")[2], []).append(key)
    return tails


def key_of(line: str, pictures: dict[str, Path], by_tail: dict[str, list[str]]) -> str:
    """The key of the picture that a line of a list means. The line may be a path on another
    machine: its longest end that is a picture here counts. The path itself is never opened."""
    *_, text = spellings(line, IMAGE_FOLDERS)
    parts = text.split("/")
    ends = ("/".join(parts[n:]) for n in range(len(parts)))
    if (end := next((end for end in ends if end in pictures), None)) is not None:
        return end
    same = by_tail.get(parts[-1], [])
    return same[0] if len(same) == 1 else text


# ------------------------------------------------------------------------------ labels


def read_labels(
    path: Path, size: tuple[int, int], names: Sequence[str], pose: bool, found: Findings,
    bad: dict[str, list[tuple[str, str]]], unknown: dict[str, list[str]],
) -> list[tuple[int, list[float]]]:  # fmt: skip
    """Reads one label file -> [(class, box xyxy in pixels), ...]. `pose`: keypoints follow each
    box. Lines that are not YOLO's are added to `bad`, classes without a name to `unknown`."""
    rows, (w, h) = [], size
    for line, where in read_lines(path):
        words = line.split()
        values = [number(word) for word in words]
        polygon = len(words) >= 7 and len(words) % 2 == 1 and not pose
        what = ""
        if len(words) != 5 and not polygon and not (pose and len(words) > 5):
            score = ": is the last one a score?" if len(words) == 6 else ""
            what = f"{len(words)} values{score}; expected class x y width height, or a polygon"
        elif any(value != value for value in values):
            what = "expected numbers"
        elif values[0] < 0 or values[0] % 1:
            what = "the class must be 0, 1, ..."
        elif max(values[1:] if polygon else values[1:5]) > 2:
            what = "expected fractions of the image, from 0 to 1; are these pixels?"
        if what:
            bad.setdefault(what, []).append((where, line))
            continue
        number_ = int(values[0])
        if number_ >= len(names):
            unknown.setdefault(f"class {number_}", []).append(where)
            continue
        if polygon:
            x, y = values[1::2], values[2::2]
            corners = min(x), min(y), max(x), max(y)
        else:
            x, y, bw, bh = values[1:5]
            corners = x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2
        # rounded to a millionth of a pixel: whole pixels that became fractions are whole again
        box = [round(c * side, 6) for c, side in zip(corners, (w, h, w, h), strict=True)]
        if check_box(box, size, names[number_], where, found, line):
            rows.append((number_, box))
    return rows


def read_yolo(
    root: str | Path,
    sets: Sequence[str],
    classes: Iterable[str] | None = None,
    findings: Findings | None = None,
    annotated: bool = True,
) -> tuple[list[Record], list[str]]:
    """Reads sets -> (records, class names). Label k is class k - 1 of the files. `classes` names
    them if the data does not. ValueError names file and line."""
    if isinstance(classes, str) or isinstance(sets, str) or not sets:
        raise ValueError(f"sets and classes are lists of names; got {sets!r}, {classes!r}")
    root, found = folder_of(root), findings or Findings()
    settings, file = settings_of(root)
    pictures, label_files = pictures_of(root), labels_of(root)
    images, seen = [], {}
    for name in sets:
        name, part = split_of(name)
        listed = find_set(root, name, pictures, settings)
        chosen = part_of([stem_of(key) for key, _ in listed], part)
        for key, where in listed:
            if stem_of(key) not in chosen:
                continue
            if key not in pictures:
                found.refuse(where, f"no image {key[:200]}", "missing image")
            elif key in seen:
                what = f"{key} is listed twice, first at {seen[key]}"
                found.refuse(where, what, "image listed twice")
            else:
                seen[key] = where
                images.append(key)
    names, source = which_names(root, settings, file, classes)
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise BadData(source, f"class {twice!r} is there twice")
    if "nc" in settings and number(settings["nc"]) != len(names):  # the YOLO tools refuse it, too
        what = f"nc is {settings['nc']!r:.60}, but {source} has {len(names)} names"
        found.refuse(file, f"{what}: {', '.join(names):.200}. Make them agree, or delete nc")
    note_similar(names, source, found)

    bad: dict[str, list[tuple[str, str]]] = {}  # what -> (where, line)
    unknown: dict[str, list[str]] = {}
    pose, rows = "kpt_shape" in settings, []
    for key in images:
        path, labels = pictures[key], label_files.get(key.rpartition(".")[0])
        try:
            with open_image(path, UNREADABLE) as image:
                size, turned = image.size, exif_orientation(image) in range(2, 9)
            if turned:
                what = "its EXIF turns it: are the labels of the stored picture? Store it upright"
                raise BadData(path, what, "picture with an EXIF orientation")
            if labels is None:
                if annotated:
                    found.handle(path, "pictures without a label file, taken as without objects")
                objects = []
            else:
                objects = read_labels(labels, size, names, pose, found, bad, unknown)
                if not objects:
                    found.note(labels, "no objects")
            rows.append((key.rpartition(".")[0], path, size, objects))
        except BadData as error:
            found.refuse(error.where, error.what, error.kind)
    for what, lines in bad.items():
        count = len(lines)
        if count > MANY:  # probably one reason: report it once
            lines = [(lines[0][0], f"{lines[0][1]}, and in {count - 1} other lines")]
        for where, line in lines:
            text = f"{what}; got {line[:100]!r}"
            found.refuse(where, text, "line that is not YOLO's", count // len(lines))
    for what, places in unknown.items():
        more = f" ({len(places)} objects)" if len(places) > 1 else ""
        what = f"{what}{more} is none of the {len(names)} of {source}, 0 to {len(names) - 1}"
        found.refuse(places[0], what, "unknown class", len(places))

    used = Counter(number_ for *_, objects in rows for number_, _ in objects)
    keep = []
    for number_, name in enumerate(names):
        if not is_background(name):
            keep.append(number_)
        elif used[number_]:
            what = f"class {name!r} ({used[number_]} objects): background is what no box covers"
            found.refuse(source, what, "class named background", used[number_])
        else:
            found.handle(source, f"class {name!r}, which no box uses, left out")
    owners: dict[Path, Path] = {}
    for key in images:
        if labels := label_files.get(key.rpartition(".")[0]):
            other = owners.setdefault(labels, pictures[key])
            if other != pictures[key]:
                where = f"{other.name} and {pictures[key].name} of {labels}"
                found.handle(where, "pairs of pictures that share one label file, used for both")
    label_of = {number_: label for label, number_ in enumerate(keep, start=1)}
    records = []
    for name, path, size, objects in rows:
        objects = [(label_of[n], box) for n, box in objects if n in label_of]
        boxes = np.array([box for _, box in objects], np.float64).reshape(-1, 4)
        labels = np.array([label for label, _ in objects], np.int64)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        records.append(Record(name, path, size, boxes, labels, np.zeros(len(labels), bool), area))
    if annotated and not any(len(record.labels) for record in records):
        what = f"no objects at all in the {len(records)} images of {' '.join(sets)}"
        found.refuse(root, f"{what}; expected labels/NAME.txt for images/NAME.jpg")
    with_picture = {key.rpartition(".")[0] for key in pictures}
    for key, path in label_files.items():
        if "/" in key and key not in with_picture and path.name.lower() not in NO_LABELS:
            found.handle(path, "label files without a picture, left out")
    found.say()
    return records, [names[number_] for number_ in keep]
