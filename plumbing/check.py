"""The data check: reads and decodes everything, and lists what is wrong, with its place."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from plumbing.files import (
    BadData,
    Findings,
    Record,
    decode_pixels,
    exif_orientation,
    open_record,
)
from plumbing.program import Progress

LIST = 20  # print at most so many notes of one kind, but everything that is refused or corrected


def check_sets(
    sources: dict[str, Callable[[], tuple]], found: Findings, workers: int | None = None
) -> int:
    """Reads and decodes all sets and prints what is wrong -> the exit status: 1 if training would
    refuse or correct something, else 0.

    `sources`: {name of a set: function that reads it and returns (records, class names)}. The
    readers report to `found`, which must collect.
    """
    records: dict[Path, Record] = {}
    names: dict[str, list[str]] = {}
    for name, read in sources.items():
        try:
            some, names[name] = read()
            records.update((record.path, record) for record in some)
        except BadData as error:  # nothing of this set can be read
            found.refuse(error.where, error.what)
    everything = set(itertools.chain(*names.values()))
    for name, classes in names.items():
        if lacks := sorted(everything - set(classes)):
            what = f"lacks {', '.join(lacks)}: a network trained on it alone cannot be measured on"
            found.note(f"set {name}", f"{what} the sets that have them")
    for error in decode_all(list(records.values()), found, workers):
        if error:
            found.refuse(error.where, error.what, error.kind)

    for title, kinds, most in (
        ("refused", found.refused, None),
        ("handled", found.handled, None),
        ("note", found.notes, LIST),
    ):
        for what, places in kinds.items():
            places = list(dict.fromkeys(places))  # a file may be in several sets
            for place in places[:most]:
                print(f"{title:8} {place}  {what}")
            if len(places) > len(places[:most]):
                print(f"{title:8} ... and {len(places) - LIST} more: {what}")
    refused, handled, notes = (
        len(set(itertools.chain(*kinds.values())))
        for kinds in (found.refused, found.handled, found.notes)
    )
    objects = sum(len(record.labels) for record in records.values())
    print(f"{len(records)} images, {objects} objects: {refused} places that training refuses, "
          f"{handled} that it handles, {notes} notes")  # fmt: skip
    return 1 if refused or handled else 0


def decode_all(
    records: list[Record], found: Findings, workers: int | None = None, *, silent: bool = False
) -> list[BadData | None]:
    """Decodes every image, as training will -> for each record its error, or None."""

    def fault(record: Record) -> BadData | None:
        try:
            image = open_record(record)
            if image.mode != "RGB":
                found.note(record.path, f"mode {image.mode}, converted to RGB")
            if exif_orientation(image) != 1:
                found.note(record.path, "EXIF orientation, not applied: boxes are in stored pixels")
            decode_pixels(image, record)
            return None
        except BadData as error:
            return error

    return for_all(records, fault, "decoding", workers, silent=silent)


def for_all(
    records: list[Record], call: Callable, what: str, workers: int | None = None, *, silent=False
) -> list:
    """What `call` returns for each record, on several threads: Pillow releases Python's lock."""
    progress, results = Progress(len(records), what), []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for result in pool.map(call, records):
            results.append(result)
            if not silent:
                progress(len(results))
    return results


def check_headers(records: list[Record]) -> None:
    """BadData where an image is no image, or of another size than its annotation says: before the
    first step, since such an image would end a run in its middle. Nothing is decoded: 0.1 ms each.
    """
    silent = dist.is_initialized() and dist.get_rank() > 0
    for_all(records, lambda record: open_record(record).close(), "opening", silent=silent)


def leave_out_unreadable(records: list[Record], found: Findings) -> list[Record]:
    """For --drop-bad: the records whose image can be decoded; `found` lists the others.

    Rank r of several decodes records[r::world], and tells the others.
    """
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    parts: list = [decode_all(records[rank::world], found, silent=rank > 0)]
    if several:
        mine, parts = parts[0], [None] * world
        dist.all_gather_object(parts, mine)
    faults: list[BadData | None] = [None] * len(records)
    for r, part in enumerate(parts):
        faults[r::world] = part
    for error in faults:
        if error:
            found.refuse(error.where, error.what, error.kind)
    return [record for record, error in zip(records, faults, strict=True) if error is None]
