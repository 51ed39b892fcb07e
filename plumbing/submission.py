"""Detections as files for the test servers of COCO and VOC."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from plumbing.coco import category_ids
from plumbing.files import Record, to_disk
from plumbing.program import check_file, make_folder

ARCHIVES = (".tar.gz", ".tgz", ".tar")


def write_results(
    path: str | Path, records: list[Record], detections: list[tuple],
    category_ids: Sequence[int | None],
) -> None:  # fmt: skip
    """COCO's results JSON: image_id, category_id (the official one), bbox [x, y, w, h], score.

    `detections`: for each record its (boxes_xyxy, scores, labels), as metrics.Detections.
    `category_ids` of the labels 1, 2, ...; detections of a label whose id is None are left out.
    """
    rows = []
    for record, found in zip(records, detections, strict=True):
        image_id = int(record.name) if record.name.isdecimal() else record.name
        for (x0, y0, x1, y1), score, label in zip(*(x.tolist() for x in found), strict=True):
            if category_ids[label - 1] is None:
                continue
            bbox = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            row = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": bbox}
            rows.append(row | {"score": round(score, 6)})
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def write_comp4(
    path: str | Path, records: list[Record], detections: list[tuple],
    classes: Sequence[str], year: int | str, split: str,
) -> None:  # fmt: skip
    """The VOC server's layout, as a folder or, for a name in .tar.gz, .tgz or .tar, an archive.

    results/VOC2012/Main/comp4_det_test_<class>.txt, with a line "image score xmin ymin xmax ymax"
    per detection. Pixels count from 1, as in the annotations.
    """
    path, inside = Path(path), f"results/VOC{year}/Main/comp4_det_{split}_"
    files = {}
    for c, name in enumerate(classes, start=1):
        lines = []
        for record, found in zip(records, detections, strict=True):
            boxes_xyxy, scores, labels = found
            mine = labels == c
            for score, box in zip(scores[mine], boxes_xyxy[mine], strict=True):
                corners = " ".join(f"{max(v, 1):.1f}" for v in box)
                lines.append(f"{record.name} {score:.6f} {corners}\n")
        files[f"{inside}{name.replace('/', '_')}.txt"] = "".join(lines)
    if path.name.endswith(ARCHIVES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, text in files.items():
                content = text.encode("utf-8", "surrogateescape")
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return
    for name, text in files.items():
        file = path / to_disk(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="surrogateescape")


def check_comp4(path: str | None, records: list[Record]) -> None:
    """ValueError before the evaluation where --comp4 could not be written after it."""
    if path and path.endswith(ARCHIVES):
        check_file(path, *(record.path for record in records))
    elif path:
        make_folder(Path(path), "--comp4")


def write(args, records: list[Record], found: list[tuple], classes: Sequence[str]) -> None:
    """Writes the files that --results and --comp4 of eval.py ask for."""
    if args.results:
        ids = range(1, len(classes) + 1)
        if args.data == "coco":  # its ids have gaps: 80 classes, ids from 1 to 90
            official = category_ids(args.coco_root, args.eval_sets[0])
            ids = [official.get(name) for name in classes]
        write_results(args.results, records, found, ids)
        unlisted = [name for name, i in zip(classes, ids, strict=True) if i is None]
        without = f", without {', '.join(unlisted)}: not in {args.eval_sets[0]}" if unlisted else ""
        print(f"results: {args.results}{without}")
    if args.comp4:  # "2012:test" -> year, split, which are in the names of the files
        year, _, split = args.eval_sets[0].rpartition(":")
        year = year or Path(args.voc_root).absolute().name  # the root is the tree of a year
        year = year.removeprefix("VOC")
        write_comp4(args.comp4, records, found, classes, year, split)
        print(f"comp4 files: {args.comp4}")
