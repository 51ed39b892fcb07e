"""Small trees of VOC, COCO and YOLO files for the tests of their readers; tests spoil them."""

import json
import re
import resource
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

from PIL import Image

from plumbing.check import check_sets
from plumbing.files import Findings
from plumbing.sources import open_data, sets_there

OBJECT = """<object>
<name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
</object>
"""


def xml_of(*objects, size=(60, 40), filename="a.jpg"):
    width, height = size
    return (
        f"<annotation>\n<filename>{filename}</filename>\n<size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>\n{''.join(objects)}</annotation>\n"
    )


def an_object(name="dog", box=(5, 6, 30, 31), difficult=0):
    return OBJECT.format(name=name, box=box, difficult=difficult)


def picture(path: Path, size=(60, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def write(path: Path, text: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def make_voc(root: Path) -> Path:
    """A good VOC tree of two images, a and b: -> its folder, VOC2007."""
    tree = root / "VOC2007"
    for name in "ab":
        picture(tree / f"JPEGImages/{name}.jpg")
        write(tree / f"Annotations/{name}.xml", xml_of(an_object()))
    write(tree / "ImageSets/Main/trainval.txt", "a\nb\n")
    return tree


def make_coco(root: Path) -> tuple[Path, dict]:
    """A good COCO tree of one image, without its JSON, and what that holds."""
    (root / "annotations").mkdir()
    picture(root / "train2017/000007.jpg")
    return root, {
        "images": [{"id": 7, "file_name": "000007.jpg", "width": 60, "height": 40}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [5, 6, 10.5, 9], "area": 50.0,
             "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 60, 40], "area": 9,
             "iscrowd": 1},
        ],
    }  # fmt: skip


def write_coco(root: Path, content, name="train2017"):
    text = content if isinstance(content, str) else json.dumps(content)
    write(root / f"annotations/instances_{name}.json", text)


def make_yolo(root: Path) -> Path:
    """A good YOLO tree: train has a and b, val has c, which shows nothing."""
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [bolt, nut]\n")
    for key, lines in (("train/a", "0 0.5 0.5 0.5 0.5\n"), ("train/b", "1 0.5 0.5 1 1\n")):
        picture(root / f"images/{key}.jpg")
        write(root / f"labels/{key}.txt", lines)
    picture(root / "images/val/c.jpg")
    write(root / "labels/val/c.txt", "")
    return root


def flags(**given) -> Namespace:
    """Arguments as the programs have them."""
    names = "data voc_root coco_root yolo_root classes drop_bad".split()
    return Namespace(**(dict.fromkeys(names) | given))


def run_check(capsys, sets=None, **given) -> tuple[int, str]:
    """The data check of these flags: (exit status, what it lists)."""
    args, found = flags(**given), Findings(collect=True)
    sources = {name: partial(open_data, args, [name], findings=found)
               for name in sets or sets_there(args)}  # fmt: skip
    status = check_sets(sources, found, workers=1)
    return status, capsys.readouterr().out


def listed(out: str, title: str, pattern: str) -> bool:
    """Whether the check lists such a line under this title."""
    return bool(re.search(rf"^{title} +{pattern}", out, re.MULTILINE))


def drop(reader, *arguments, **flags_):
    """A reader with --drop-bad: -> its records, {kind: how many were left out}."""
    found = Findings(drop=True)
    records = reader(*arguments, findings=found, **flags_)[0]
    return records, {kind: sum(n for *_, n in rows) for kind, rows in found.dropped.items()}


def bounded(seconds, megabytes):
    """Fails the block that takes longer, or whose process grows more."""

    class Bound:
        def __enter__(self):
            self.start = time.process_time()
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def __exit__(self, *_):
            assert time.process_time() - self.start < seconds
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before
            assert grown < megabytes * 1024

    return Bound()
