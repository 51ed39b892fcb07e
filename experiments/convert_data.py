"""Rewrite a data set in another format: VOC, COCO, YOLO. Boxes keep a millionth of a pixel.

    python -m experiments.convert --to yolo --out mine-yolo --voc-root mydata --classes auto
    python -m experiments.convert --to coco --out voc-coco --voc-root VOCdevkit --sets 2007:test

All sets that there are, or those named, with the flags of train.py for the data. The first one
named is to train on, the last one to measure on. Pictures are copied, each once, whatever the
number of its sets:

    voc     JPEGImages/, Annotations/, ImageSets/Main/SET.txt
    coco    images/, annotations/instances_SET.json
    yolo    images/, labels/, SET.txt, data.yaml

At the end the new data set is read and compared. What a format has no place for is said: VOC's
difficult objects become objects like others, which training takes them for, COCO's crowds are left
out, as in training, and the area of COCO's outlines stays in COCO.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from plumbing.coco import read_coco
from plumbing.files import Findings, Record, exif_orientation, on_disk, open_image, to_disk
from plumbing.sources import add_data_flags, kind_of, open_data, relabel, sets_there
from plumbing.voc import read_voc
from plumbing.yolo import read_yolo


class Picture(NamedTuple):
    """One picture of the new data set."""

    name: str  # without suffix
    file: str  # with it
    record: Record


def text_of(value: float) -> str:
    """1.0 -> "1", 1.25 -> "1.25"."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def write(path: Path, text: str) -> None:
    path = Path(to_disk(str(path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------ the formats


def write_voc(out: Path, sets: dict[str, list[Picture]], classes: tuple[str, ...]) -> Path:
    for name, pictures in sets.items():
        write(out / f"ImageSets/Main/{name}.txt", "".join(f"{p.name}\n" for p in pictures))
        for picture in pictures:
            record, objects = picture.record, []
            for box, label, difficult in zip(
                record.boxes_xyxy, record.labels, record.difficult, strict=True
            ):
                sides = zip(("xmin", "ymin", "xmax", "ymax"), map(text_of, box), strict=True)
                corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
                objects.append(
                    f"  <object>\n    <name>{escape(classes[label - 1])}</name>"
                    f"<difficult>{int(difficult)}</difficult>\n    <bndbox>{corners}</bndbox>\n"
                    "  </object>\n"
                )
            width, height = record.size
            size = f"<width>{width}</width><height>{height}</height><depth>3</depth>"
            write(
                out / f"Annotations/{picture.name}.xml",
                f"<annotation>\n  <filename>{escape(picture.file)}</filename>\n"
                f"  <size>{size}</size>\n{''.join(objects)}</annotation>\n",
            )
    write(out / "classes.txt", "".join(f"{name}\n" for name in classes))
    return out / "JPEGImages"


def write_coco(out: Path, sets: dict[str, list[Picture]], classes: tuple[str, ...]) -> Path:
    everything = {p.name: p for pictures in sets.values() for p in pictures}
    ids = {name: int(name) if name.isdecimal() else n for n, name in enumerate(everything, 1)}
    if len(set(ids.values())) < len(ids):  # "7" and "007", or a number that is another's place
        ids = {name: n for n, name in enumerate(everything, 1)}
    categories = [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
    for name, pictures in sets.items():
        images, annotations = [], []
        for picture in pictures:
            record, image_id = picture.record, ids[picture.name]
            (width, height), file = record.size, picture.file
            images.append({"id": image_id, "file_name": file, "width": width, "height": height})
            for (x0, y0, x1, y1), label, area in zip(
                record.boxes_xyxy.tolist(), record.labels.tolist(), record.area.tolist(),
                strict=True,
            ):  # fmt: skip
                bbox = [round(v, 6) for v in (x0, y0, x1 - x0, y1 - y0)]
                row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
                annotations.append(row | {"bbox": bbox, "area": area, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(out / f"annotations/instances_{name}.json", json.dumps(content))
    return out / "images"


def write_yolo(out: Path, sets: dict[str, list[Picture]], classes: tuple[str, ...]) -> Path:
    for name, pictures in sets.items():
        write(out / f"{name}.txt", "".join(f"./images/{p.file}\n" for p in pictures))
        for picture in pictures:
            record, lines = picture.record, []
            width, height = record.size
            for (x0, y0, x1, y1), label in zip(
                record.boxes_xyxy.tolist(), record.labels.tolist(), strict=True
            ):
                box = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
                box += (x1 - x0) / width, (y1 - y0) / height
                lines.append(f"{label - 1} {' '.join(f'{v:.12g}' for v in box)}\n")
            write(out / f"labels/{picture.name}.txt", "".join(lines))
    first, last = next(iter(sets)), list(sets)[-1]
    folders = {"train": first, "val": last} | {name: name for name in sets}
    lines = [f"{key}: {name}.txt\n" for key, name in folders.items()]
    names = ["  {}: '{}'\n".format(n, name.replace("'", "''")) for n, name in enumerate(classes)]
    write(out / "data.yaml", f"{''.join(lines)}names:\n{''.join(names)}")
    return out / "images"


WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo}
READERS = {"voc": read_voc, "coco": read_coco, "yolo": read_yolo}


def write_set(
    to: str, out: Path, sets: dict[str, list[Picture]], classes: tuple[str, ...], link: bool = False
) -> list[Path]:
    """Writes labels and pictures to `out` in the format `to` -> the paths of their originals."""
    folder = WRITERS[to](out, sets, classes)
    folder.mkdir(parents=True, exist_ok=True)
    sources = {p.file: p.record.path for some in sets.values() for p in some}
    for file, path in sources.items():
        (os.link if link else shutil.copyfile)(path, folder / to_disk(file))
    return list(sources.values())


# ------------------------------------------------------------------------------ the command


def training_first(sets: list[str]) -> list[str]:
    """The set to train on first, the one to measure on last, if their names say so."""
    roles = {re.sub("[^a-z]", "", name.lower()): name for name in reversed(sets)}
    for pair in (("train", "val"), ("train", "valid"), ("trainval", "test"), ("train", "test")):
        if set(pair) <= set(roles):
            first, last = (roles[role] for role in pair)
            return [first, *(name for name in sets if name not in (first, last)), last]
    return sets


def read_sets(args: argparse.Namespace, found: Findings) -> tuple[dict, tuple[str, ...]]:
    """{set: its records} and the class names, which all sets share."""
    read = {name: open_data(args, [name], findings=found) for name in args.sets}
    names = list(dict.fromkeys(name for _, some in read.values() for name in some))
    if kind_of(args) == "voc" and args.classes == "auto":
        names.sort()
    classes = tuple(names)
    return {
        name: relabel(records, some, classes, [name], found)
        for name, (records, some) in read.items()
    }, classes


def name_pictures(sets: dict[str, list[Record]]) -> dict[str, list[Picture]]:
    """A name for each picture, the same in all of its sets; those of one name get a number."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    new = {}
    for name, records in sets.items():
        new[name] = []
        for record in records:
            if record.path not in names:
                stem, n = on_disk(record.path.stem), 1
                while (unique := stem if n == 1 else f"{stem}-{n}").casefold() in taken:
                    n += 1
                names[record.path] = unique
                taken.add(unique.casefold())
            unique = names[record.path]
            new[name].append(Picture(unique, f"{unique}{record.path.suffix}", record))
    return new


def without_crowds(record: Record) -> Record:
    keep = ~record.difficult
    columns = ("boxes_xyxy", "labels", "difficult", "area")
    return record._replace(**{name: getattr(record, name)[keep] for name in columns})


def largest_difference(
    to: str, out: Path, sets: dict[str, list[Picture]], classes: tuple[str, ...]
) -> float:
    """Reads the new data set: -> how far a side of a box is from what it was, in pixels."""
    apart = [0.0]
    for name, pictures in sets.items():
        if to == "voc":
            records = read_voc(out, [name], classes, Findings(collect=True))[0]
        else:
            records = READERS[to](out, [name], findings=Findings(collect=True))[0]
        if len(records) != len(pictures):
            raise RuntimeError(f"{out}: {len(records)} of {len(pictures)} images of {name} read")
        for old, new in zip((p.record for p in pictures), records, strict=True):
            if old.size != new.size or not np.array_equal(old.labels, new.labels):
                raise RuntimeError(f"{new.path}: not what {old.path} was")
            apart.append(np.abs(old.boxes_xyxy - new.boxes_xyxy).max(initial=0.0))
    return max(apart)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.convert",
        description=(__doc__ or "").split("\n\n")[0])  # fmt: skip
    parser.add_argument("--to", choices=list(WRITERS), required=True, help="the format to write")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    add_data_flags(parser.add_argument_group("data (no root given: drawn shapes)"))
    parser.add_argument("--sets", nargs="+", metavar="SET", help="default: all there are")
    parser.add_argument("--link", action="store_true", help="hard links in place of copies")
    args = parser.parse_args(argv)
    out, found = Path(args.out), Findings(drop=args.drop_bad)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: it is not empty; name a new folder")
    args.sets = args.sets or training_first(sets_there(args))
    sets, classes = read_sets(args, found)
    difficult = sum(int(r.difficult.sum()) for records in sets.values() for r in records)
    if difficult and kind_of(args) == "coco":
        sets = {name: list(map(without_crowds, records)) for name, records in sets.items()}
        print(f"{difficult} crowds are left out")
    elif difficult and args.to != "voc":
        print(f"{difficult} objects are difficult, which {args.to.upper()} has no mark for: they "
              "become objects like others")  # fmt: skip
    pictures = name_pictures({name.translate(SAFE): some for name, some in sets.items()})
    sources = write_set(args.to, out, pictures, classes, args.link)
    turned = 0
    for path in sources if args.to == "yolo" else ():
        with open_image(path) as image:
            turned += exif_orientation(image) in range(2, 9)
    if turned:
        print(f"{turned} pictures are turned by their EXIF: YOLO tools differ in what they do then")
    objects = sum(len(p.record.labels) for some in pictures.values() for p in some)
    print(f"{out}: {len(sources)} images, {objects} objects, {len(classes)} classes, sets "
          f"{' '.join(pictures)}")  # fmt: skip
    if not turned:
        apart = largest_difference(args.to, out, pictures, classes)
        print(f"read again: boxes differ by {apart:.2g} pixels at most")
    given = f"--classes {out}/classes.txt " if args.to == "voc" else ""
    print(f"python train.py --{args.to}-root {out} {given}--train-sets {next(iter(pictures))} "
          f"--eval-sets {list(pictures)[-1]}")  # fmt: skip
    return 0


SAFE = str.maketrans(":@/\\", "____")  # what no file name may have somewhere

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
