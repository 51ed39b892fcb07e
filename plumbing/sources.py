"""Opens the data that the flags of a program name: flags -> records and class names.

    group = parser.add_argument_group("data")
    add_data_flags(group)
    records, classes = open_data(args, ["2007:trainval"])
    test, _ = open_data(args, ["2007:test"], classes)         labelled in the order of `classes`

`args` has data, voc_root, coco_root, yolo_root, classes and drop_bad. The name of a
set may end in @train or @val: four fifths of it, and the rest, by a hash of the images' names.
"""

import copy
import os
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from plumbing import coco, voc, yolo
from plumbing.check import check_headers, leave_out_unreadable
from plumbing.files import (
    BadData,
    Findings,
    Record,
    one_form,
    read_classes,
)
from plumbing.machine import check_device
from plumbing.program import check_range
from plumbing.shapes import SHAPE_CLASSES, draw_shapes

KINDS = ("shapes", "voc", "coco", "yolo")
SETS = {  # by default: the sets to train on, the sets to measure on
    "voc": (["2007:trainval", "2012:trainval"], ["2007:test"]),
    "coco": (["train2017"], ["val2017"]),
    "yolo": (["train"], ["val"]),
    "shapes": (["2007:train"], ["2007:test"]),
}


def add_data_flags(group: _ArgumentGroup) -> None:
    """Adds the flags that say where the data is. Those that choose sets of it (--train-sets,
    --eval-sets, --sets) differ from program to program."""
    add = group.add_argument
    add("--voc-root", metavar="DIR", help="VOC: the folder that holds VOC2007/, or the one above")
    add("--coco-root", metavar="DIR", help="COCO: the folder that holds annotations/, train2017/")
    add("--yolo-root", metavar="DIR", help="YOLO: the folder that holds images/, labels/")
    add("--classes", metavar="FILE", help="class names, one per line, or 'auto': those in the "
        "annotations (default: VOC's 20; COCO and YOLO list their own)")  # fmt: skip
    add("--drop-bad", action="store_true", help="leave out bad boxes and images, and list them")


def add_eval_flags(parser: ArgumentParser) -> None:
    """The flags of all programs that measure a detector: on which data, and how it runs."""
    group = parser.add_argument_group("data (default: what the checkpoint was evaluated on)")
    add_data_flags(group)
    group.add_argument("--eval-sets", nargs="+", metavar="SET", help="as in train.py")
    add = parser.add_argument_group("system").add_argument
    add("--batch-size", type=int, default=8, help="images at once")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="loader processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")


def check_eval_flags(args: Namespace) -> None:
    """ValueError for a device that is not here, or a number out of its range."""
    check_device(args.device)
    check_range(args, "batch_size", 1)
    check_range(args, "workers", 0)


def kind_of(args: Namespace, default: str = "shapes") -> str:
    """voc, coco, yolo or shapes: what the given root means, or what is already known."""
    given = [
        kind for kind in ("voc", "coco", "yolo") if getattr(args, f"{kind}_root", None) is not None
    ]
    known = vars(args).get("data")
    if len(given) > 1 and not known:
        raise ValueError(f"{' and '.join(f'--{kind}-root' for kind in given)}: give one of them")
    return known or (given[0] if given else default)


def make_absolute(args: Namespace) -> None:
    """Writes the roots, and the files of --classes and --init, as absolute paths."""
    for name in ("voc_root", "coco_root", "yolo_root", "classes", "init"):
        if getattr(args, name, None) not in (None, "", "auto"):
            setattr(args, name, str(Path(getattr(args, name)).absolute()))


def root_of(args: Namespace) -> Path:
    """The folder of the data that the flags ask for; draws the shapes if they are not there."""
    kind = kind_of(args)
    if kind == "shapes":
        return draw_shapes("runs/shapes-data")
    root = getattr(args, f"{kind}_root", None)
    if not root:
        raise ValueError(f"{kind}: where is it? Expected --{kind}-root DIR")
    return Path(root)


def sets_there(args: Namespace) -> list[str]:
    """All sets of the data; the default sets if none are found."""
    kind = kind_of(args)
    readers = {"coco": coco, "yolo": yolo}
    return readers.get(kind, voc).list_sets(root_of(args)) or SETS[kind][0]


def other_format(root: Path, kind: str) -> str:
    """For an error message: which other format a folder seems to have, or ""."""
    has_names = any((root / name).is_file() for name in ("data.yaml", *yolo.NAME_FILES))
    there = {
        "yolo": has_names and yolo.labels_of(root),
        "coco": coco.list_sets(root),
        "voc": kind != "shapes" and voc.list_sets(root),
    }
    for other, found in there.items():
        if found and other != kind:
            return f"It looks like {other.upper()}: --{other}-root {root}"
    if kind != "coco" and (other := coco.others_format(root)):
        return other
    tables = sorted(root.glob("*.csv")) + sorted(root.glob("*/*.csv"))
    if tables:
        return (
            f"Labels in a table ({tables[0]}) are not read: export or convert them to VOC or COCO"
        )
    return ""


def from_run(args: Namespace, saved: dict) -> tuple[Namespace, list[str], int | None]:
    """What to measure a checkpoint on: what the flags say, else the data of its run.

    `saved`: the arguments in the checkpoint. -> (args for open_data, sets, how many of their images
    or None for all). An --overfit run is measured on the images that it was trained on.
    """
    kind = kind_of(args, saved.get("data") or "shapes")
    saved = saved if saved.get("data") == kind else {}
    args = copy.copy(args)
    args.data = kind
    for name in (f"{kind}_root", "drop_bad"):
        setattr(args, name, getattr(args, name, None) or saved.get(name))
    if kind == "yolo":  # the names may be in a file of their own
        args.classes = getattr(args, "classes", None) or saved.get("classes")
    first = None if args.eval_sets else saved.get("overfit") or None
    return args, args.eval_sets or saved.get("eval_sets") or SETS[kind][1], first


def open_data(
    args: Namespace,
    sets: Sequence[str],
    classes: Iterable[str] | None = None,
    *,
    findings: Findings | None = None,
    annotated: bool = True,
) -> tuple[list[Record], tuple[str, ...]]:
    """The records of some sets, and the class names: label 1 is the first.

    `classes`: the classes of a network; labels then follow its order, and objects of other classes
    are refused. annotated=False: a test set may come without annotations. `findings` collects what
    is wrong; with --drop-bad it holds what was left out.
    """
    kind, root = kind_of(args), root_of(args)
    file = getattr(args, "classes", None)
    found = findings or Findings(drop=bool(getattr(args, "drop_bad", False)))
    if kind == "coco" and file not in (None, "auto"):
        raise ValueError(f"--classes {file}: COCO's files list their own; leave it out")
    names = None if file in (None, "auto") else read_classes(file)
    try:
        if kind == "coco":
            records, names = coco.read_coco(root, sets, found, annotated=annotated)
        elif kind == "yolo":
            records, names = yolo.read_yolo(root, sets, names, found, annotated=annotated)
        else:
            if classes is not None:
                names = None  # all that there are; relabel compares them with the network's
            elif file is None:
                names = SHAPE_CLASSES if kind == "shapes" else voc.VOC_CLASSES
            records, names = voc.read_voc(root, sets, names, found, annotated=annotated)
    except BadData as error:
        hint = other_format(root, kind) if error.where.startswith("--") else ""
        if not hint:
            raise
        raise BadData(error.where, f"{error.what.rstrip('.')}. {hint}") from None
    if found.drop:
        records = leave_out_unreadable(records, found)
    if classes is not None:
        classes = tuple(classes)
        records, names = relabel(records, names, classes, sets, found), classes
    if found.drop and annotated and not any(len(record.labels) for record in records):
        raise BadData(root, f"--drop-bad leaves no object at all of {' '.join(sets)}")
    found.say()
    return records, tuple(names)


def read_data(args: Namespace) -> tuple[list[Record], list[Record], tuple[str, ...], str]:
    """-> (records to train on, records to evaluate, class names, what --drop-bad left out).

    BadData also where the size of an image is not its annotation's.
    """
    found = Findings(drop=args.drop_bad)
    train, classes = open_data(args, args.train_sets, findings=found)
    if args.overfit:
        train = test = train[: args.overfit]
    else:
        test, _ = open_data(args, args.eval_sets, classes, findings=found)
    if not found.drop and kind_of(args) != "yolo":  # its reader takes the sizes from the images
        check_headers(train + test)
    return train, test, classes, found.dropped_text()


def relabel(
    records: list[Record],
    names: Sequence[str],
    classes: tuple[str, ...],
    sets: Sequence[str],
    found: Findings,
) -> list[Record]:
    """The records with labels in the order of the network's `classes`. Refuses objects of other
    classes."""
    label = {one_form(name): n for n, name in enumerate(classes, start=1)}
    lookup = np.array([0] + [label.get(name, 0) for name in names])
    counts = sum((np.bincount(r.labels, minlength=len(lookup)) for r in records), 0 * lookup)
    unknown = [name for n, name in enumerate(names, 1) if counts[n] and not lookup[n]]
    if unknown:
        what = (
            f"objects of {', '.join(unknown)}. The network detects {', '.join(classes)}. It cannot "
            f"be measured on {', '.join(unknown)}: choose the data it was trained for, or train "
            "it with all names: --classes FILE"
        )
        count = sum(int(counts[n]) for n, name in enumerate(names, 1) if name in unknown)
        found.refuse(" ".join(sets), what, "class that the network does not detect", count)
    aligned = []
    for record in records:
        labels = lookup[record.labels]
        if not labels.all():
            known = labels > 0
            record = record._replace(
                boxes_xyxy=record.boxes_xyxy[known],
                difficult=record.difficult[known],
                area=record.area[known],
            )
            labels = labels[known]
        aligned.append(record._replace(labels=labels))
    return aligned


def open_test_set(args: Namespace, saved: dict, classes: Sequence[str]) -> list[Record]:
    """The records to measure a checkpoint on: those that the flags name, else those of its run.

    `saved`: the arguments in the checkpoint. Writes its choice into `args` (data, eval_sets and the
    root), which the caller reads. Labels follow the network's `classes`.
    """
    found, sets, first = from_run(args, saved)
    vars(args).update(vars(found), eval_sets=sets)
    submission_of = vars(args).get("comp4"), vars(args).get("results")
    if submission_of[0] and (args.data in ("coco", "yolo") or len(sets) > 1):
        raise ValueError(
            "--comp4 is the submission of one set of VOC, such as --eval-sets 2012:test; asked of "
            f"{args.data}, {' '.join(sets)}"
        )
    annotated = not any(submission_of)  # the servers' test sets come without annotations
    records, _ = open_data(args, sets, tuple(classes), annotated=annotated)
    return records[:first]
