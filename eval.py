"""Measure a detector: VOC AP, COCO AP, AP by size, speed, pictures.

    python eval.py runs/shapes/last.pt                    on what it was trained for: AP a class
    python eval.py CHECKPOINT --voc-root DIR              VOC2007 test
    python eval.py CHECKPOINT --coco-root DIR             val2017: COCO's 12 numbers
    python eval.py CHECKPOINT --images DIR --draw OUT     your own pictures
    python eval.py CHECKPOINT --fps                       images/s, with and without NMS

    records --+--> run_detector --> one Detections an image --+--> summarise --> report
              +-----------------------------------------------+    (metrics.py)

Letters: N images, P priors, C classes with background, D detections of one image.
Boxes here are `_xyxy` in PIXELS of the original image, not in units of the image.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

import data
import machine
from metrics import Detections, coco_ap, report, summarise, voc_ap  # noqa: F401
from ops.reference import decode
from plumbing.halves import THREADS, spread
from records import Record
from scratchdet import ScratchDet, detect, load, make_priors

SECONDS = 5.0  # that each number of --fps is measured for


# ----------------------------------------------------------------------------- running a detector


def to_pixels(
    boxes: Tensor, scores: Tensor, labels: Tensor, count: Tensor, sizes: list[tuple[int, int]]
) -> list[Detections]:
    """The tensors of `detect` and the images' sizes [(w, h)] -> one `Detections` an image.

    Clipped to the image, as Caffe SSD does when it writes results.
    """
    boxes, scores, labels = (x.cpu().numpy() for x in (boxes, scores, labels))
    found = []
    for n, (k, (w, h)) in enumerate(zip(count.tolist(), sizes, strict=True)):
        scale = np.array([w, h, w, h], np.float32)
        xyxy = boxes[n, :k].clip(0, 1) * scale  # (D, 4)
        found.append(Detections(xyxy, scores[n, :k].copy(), labels[n, :k].copy()))
    return found


class Progress:
    """One live line on a terminal; elsewhere a line every half minute."""

    def __init__(self, total: int, what: str | None, unit: str = "images"):
        self.total, self.what, self.unit = total, what, unit
        self.start, self.said = time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        rate = done / max(1e-9, now - self.start)
        if now - self.said < (0.5 if self.live else 30) and not (self.live and done == self.total):
            return
        eta = round((self.total - done) / max(1e-9, rate))
        line = f"{self.what} {done}/{self.total}  {rate:.1f} {self.unit}/s  "
        line += f"ETA {eta // 60}:{eta % 60:02}"
        print(f"\r{line}  " if self.live else line, file=sys.stderr, flush=True,
              end="\n" if not self.live or done == self.total else "")  # fmt: skip
        self.said = now


@torch.no_grad()
def run_detector(
    model: ScratchDet, records: list[Record], *,
    batch_size: int = 8, workers: int = 0, what: str | None = "evaluating",
) -> list[Detections]:  # fmt: skip
    """One `Detections` a record, in their order.

    Each image is warped to the network's size (section 4.1), without augmentation. The network
    keeps its device and comes back in the mode it was in. `what` heads the line of progress; None
    for none.
    """
    device, mode = model.priors_cxcywh.device, model.training
    progress, found = Progress(len(records), what), []

    def run(batch: data.Batch) -> list[Detections]:
        batch = data.to_device(batch, device)
        loc, logits = model(data.prepare(batch, model.config))
        sizes = [records[i].size for i in batch.indices.tolist()]
        return to_pixels(*detect(loc.float(), logits.float(), model.priors_cxcywh), sizes)

    model.eval()
    try:
        batches = data.ordered_batches(
            records, model.config.size, batch_size=batch_size, workers=workers
        )
        for some in spread(run, batches, 1 if device.type == "cuda" else THREADS):
            found += some
            if what:
                progress(len(found))
    finally:
        model.train(mode)
    return found


def evaluate(
    model: ScratchDet, records: list[Record], *, metric: str = "voc",
    batch_size: int = 8, workers: int = 0, rank: int = 0, world: int = 1,
) -> dict:  # fmt: skip
    """Run the model over the records and measure: the dict of `summarise`.

    With several ranks of torch.distributed, rank r takes records[r::world] and all return the same.
    The buffers of rank 0 count: BatchNorm's running statistics differ between ranks.
    """
    if world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    found = run_detector(
        model, records[rank::world], batch_size=batch_size, workers=workers,
        what=None if rank else "evaluating",
    )  # fmt: skip
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found)
        found = [None] * len(records)
        for r, part in enumerate(parts):
            found[r::world] = part
    return summarise(records, found, model.config.classes, metric)


def metric_of(kind: str, sets: list[str]) -> str:
    """COCO's AP for COCO, the 11-point one for VOC2007, else the area: a name for `summarise`."""
    if kind == "coco":
        return "coco"
    years = {name.rpartition(":")[0].removeprefix("VOC") for name in sets}  # 2007 is VOC2007
    return "voc07" if years == {"2007"} else "voc"


# ------------------------------------------------------------------------------ multi-scale testing

# Our recipe, for the paper's "multi-scale testing" is not described: RefineDet320's (same authors),
# rescaled to this network. Input side and short side as factors; kept are boxes with long side > a
# and short side < b in pixels of the image. Each pass runs mirrored, too.
ONE_SCALE = ((1.0, 1.0, 0, np.inf),)
MULTI_SCALE = (
    *ONE_SCALE,
    (1.0, 0.6, 0, np.inf),
    (0.6, 1.0, 32, np.inf),
    (1.2, 1.0, 0, 160),
    (1.4, 1.0, 0, 128),
    (1.6, 1.0, 0, 96),
    (1.8, 1.0, 0, 64),
    (2.0, 1.0, 0, 48),
    (2.2, 1.0, 0, 32),
)


def vote_boxes(
    found: Detections, *, soft: bool = False,
    iou_threshold: float = 0.45, min_score: float = 0.01, max_detections: int = 200,
) -> Detections:  # fmt: skip
    """Box voting (Gidaris and Komodakis 2015): overlapping detections of a class become their mean.

    The best detection takes all of IoU >= iou_threshold (+1 pixel) with it: score the best's, box
    the mean weighted by the scores. `soft` (for COCO): the members stay, too, with their score
    times 1 - IoU where that is min_score or more. Score descending.
    """
    rows = [np.empty((0, 6))]
    for label in np.unique(found.labels):
        mine = found.labels == label
        boxes, scores = found.boxes_xyxy[mine].astype(float), found.scores[mine].astype(float)
        order = np.argsort(-scores, kind="stable")
        boxes, scores = boxes[order], scores[order]
        area = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
        while len(scores):
            corners = np.minimum(boxes[0, 2:], boxes[:, 2:]) - np.maximum(
                boxes[0, :2], boxes[:, :2]
            )
            inter = np.prod((corners + 1).clip(0), axis=1)
            iou = inter / (area[0] + area - inter)
            near = iou >= iou_threshold
            near[0] = True
            box = np.average(boxes[near], axis=0, weights=scores[near])
            rows.append(np.array([[*box, scores[0], label]]))
            if soft:
                softer = scores * (1 - iou)
                again = near & (softer >= min_score)
                rows.append(np.c_[boxes[again], softer[again], np.full(again.sum(), label)])
            boxes, scores, area = boxes[~near], scores[~near], area[~near]
    rows = np.concatenate(rows)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[:max_detections]]
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


@torch.no_grad()
def detect_image(
    model: ScratchDet, image: Image.Image, passes: tuple = ONE_SCALE, *, soft: bool = False
) -> Detections:
    """`Detections` of one RGB picture of any size, over several passes joined by `vote_boxes`.

    The priors keep their sides in pixels and lie where the actual maps are; a map too small for
    the next layer ends the pyramid. A single pass is not mirrored and not voted on.
    """
    config, device, (w, h) = model.config, model.priors_cxcywh.device, image.size
    several, parts = len(passes) > 1, []
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w) uint8
    for scale, aspect, longer, shorter in passes:
        side = round(config.size * scale)
        sides = (side, round(side * aspect)) if w >= h else (round(side * aspect), side)
        x = torch.nn.functional.interpolate(pixels, sides[::-1], mode="bilinear", antialias=True)
        x = data.normalise(x.to(device), config)
        x = torch.cat([x, x.flip(3)]) if several else x  # (N, 3, H, W), N = 1 or 2
        maps = model.features(x)
        priors = make_priors(config, [m.shape[-2:] for m in maps], sides[::-1]).to(device)
        loc, logits = model.head(maps)
        found = to_pixels(*detect(loc.float(), logits.float(), priors), [(w, h)] * len(x))
        for mirrored, (xyxy, scores, labels) in enumerate(found):
            if mirrored:
                xyxy = np.stack([w - xyxy[:, 2], xyxy[:, 1], w - xyxy[:, 0], xyxy[:, 3]], axis=1)
            sizes = xyxy[:, 2:] - xyxy[:, :2] + 1
            keep = (sizes.max(axis=1) > longer) & (sizes.min(axis=1) < shorter)
            parts.append(Detections(xyxy[keep], scores[keep], labels[keep]))
    joined = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return vote_boxes(joined, soft=soft) if several else joined


# ----------------------------------------------------------------------------------------- pictures


def draw_found(
    record: Record, found: Detections, classes: Sequence[str], min_score: float
) -> Image.Image:
    """The picture of a record: ground truth green, detections of min_score and more orange."""
    image, keep = data.decode(data.open_record(record), record), found.scores >= min_score
    image = data.draw(image, record.boxes_xyxy, record.labels, None, classes)
    boxes, scores, labels = (x[keep] for x in found)
    return data.draw(image, boxes, labels, scores, classes)


def draw_sheet(model: ScratchDet, records: list[Record], path: str | Path) -> None:
    """Writes one picture of a few records' detections (.3 and more) beside their ground truth."""
    rows = zip(records, run_detector(model, records, what=None), strict=True)
    pictures = [draw_found(record, found, model.config.classes, 0.3) for record, found in rows]
    data.save_sheet(path, pictures, columns=4)


# ---------------------------------------------------------------------------------- files and speed


def write_results(
    path: str | Path, records: list[Record], detections: list[Detections],
    category_ids: Sequence[int | None],
) -> None:  # fmt: skip
    """COCO's results JSON: image_id, category_id (the official one), bbox [x, y, w, h], score.

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
    Path(path).write_text(json.dumps(rows))


def write_comp4(
    path: str | Path, records: list[Record], detections: list[Detections],
    classes: Sequence[str], year: int | str, split: str,
) -> None:  # fmt: skip
    """The VOC server's layout, as a folder or, for a name in .tar.gz, .tgz or .tar, an archive.

    results/VOC2012/Main/comp4_det_test_<class>.txt, a line "image score xmin ymin xmax ymax" each;
    pixels count from 1, as in the annotations.
    """
    path, inside = Path(path), f"results/VOC{year}/Main/comp4_det_{split}_"
    files = {}
    for c, name in enumerate(classes, start=1):
        lines = []
        for record, found in zip(records, detections, strict=True):
            mine = found.labels == c
            for score, box in zip(found.scores[mine], found.boxes_xyxy[mine], strict=True):
                corners = " ".join(f"{max(v, 1):.1f}" for v in box)
                lines.append(f"{record.name} {score:.6f} {corners}\n")
        files[f"{inside}{name.replace('/', '_')}.txt"] = "".join(lines)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        return
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


class Exported(nn.Module):
    """pixels (N,3,S,S) RGB 0..255 -> boxes (N,P,4) xyxy in image units, probabilities (N,P,C)."""

    def __init__(self, model: ScratchDet):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        loc, logits = self.model(data.normalise(pixels, self.model.config))
        return decode(loc, self.model.priors_cxcywh), logits.softmax(dim=-1)


def export(model: ScratchDet, path: str | Path) -> None:
    """Network and decoding as a torch.export file, for any batch size.

    `torch.export.load(path, extra_files=extra)` reads it without this code; extra["classes.json"]
    holds the class names, background first. NMS is left to the caller.
    """
    size = model.config.size
    pixels = torch.zeros(2, 3, size, size, device=model.priors_cxcywh.device)
    data.normalise(pixels, model.config)  # keeps its constants: not to be made while tracing
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Exported(model).eval(), (pixels,), dynamic_shapes=shapes)
    classes = json.dumps(["background", *model.config.classes])
    torch.export.save(program, path, extra_files={"classes.json": classes})


@torch.no_grad()
def frames_per_second(model: ScratchDet, records: list[Record], batch_size: int) -> list[float]:
    """Images/s (network alone, network and detect), float32, on warped images already in memory."""
    device = model.priors_cxcywh.device
    some = (records * batch_size)[:batch_size]
    batch = next(data.ordered_batches(some, model.config.size, batch_size=batch_size))
    x = data.prepare(data.to_device(batch, device), model.config)
    rates = []
    for with_nms in (False, True):
        done, start = -2, None  # two rounds to warm up
        while start is None or time.perf_counter() - start < SECONDS:
            loc, logits = model(x)
            if with_nms:
                detect(loc, logits, model.priors_cxcywh)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 1
            if done == 0:
                start = time.perf_counter()
        rates.append(done * batch_size / (time.perf_counter() - start))
    return rates


# ---------------------------------------------------------------------------------- command line


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What to measure on, and with what: also of experiments/compare.py."""
    g = parser.add_argument_group("data (none given: what the checkpoint was evaluated on)")
    g.add_argument("--data", choices=["shapes", "voc", "coco"], help="follows from the root given")
    g.add_argument("--voc-root", metavar="DIR", help="folder that holds VOC2007/, or the one above")
    g.add_argument("--coco-root", metavar="DIR", help="folder that holds annotations/, val2017/")
    g.add_argument("--shapes-root", metavar="DIR", help="default runs/shapes-data")
    g.add_argument("--eval-sets", nargs="+", metavar="SET", help="as of train.py")
    g = parser.add_argument_group("system")
    g.add_argument("--batch-size", type=int, default=8)
    g.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_shared(args: argparse.Namespace) -> None:
    """ValueError for a device that is not here, or a number out of its range."""
    machine.check_device(args.device)
    machine.check_range(args, "batch_size", 1)
    machine.check_range(args, "workers", 0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file of train.py; it knows its network and classes")
    add_shared_flags(parser)
    g = parser.add_argument_group("detection")
    g.add_argument("--images", metavar="DIR|FILE", help="your own pictures: detect, do not measure")
    g.add_argument("--multi-scale", action="store_true", help="our recipe: 9 scales, mirrored")
    g.add_argument("--min-score", type=float, default=0.3, help="of what is drawn or printed")
    g = parser.add_argument_group("output")
    g.add_argument("--draw", metavar="DIR", help="write the images with boxes, labels and scores")
    g.add_argument("--json", metavar="FILE", help="the numbers; with --images, all detections")
    g.add_argument("--results", metavar="FILE", help="COCO results JSON, of a test set, too")
    g.add_argument("--comp4", metavar="DIR|FILE", help="VOC server files; FILE.tar.gz: the archive")
    g.add_argument("--export", metavar="FILE", help="write network + decoding by torch.export")
    g.add_argument("--fps", action="store_true", help="time batch 1 and 8, with and without NMS")
    return parser.parse_args(argv)


def data_source(
    args: argparse.Namespace, checkpoint: dict
) -> tuple[str, str | Path, list[str], int | None]:
    """What to measure on, from the flags or else as train.py evaluated: (kind, root, sets, how many
    of their images). None are all; of an --overfit run they are those it was measured on."""
    saved = checkpoint.get("args") or {}
    kind = data.kind_of(args, saved.get("data", "shapes"))
    saved = saved if saved.get("data") == kind else {}
    root = getattr(args, f"{kind}_root") or saved.get(f"{kind}_root")
    if kind == "shapes":
        root = data.draw_shapes(root or "runs/shapes-data")
    if not root:
        raise ValueError(f"--data {kind}: where is it? Expected --{kind}-root DIR")
    first = None if args.eval_sets else saved.get("overfit") or None
    return kind, root, args.eval_sets or saved.get("eval_sets") or data.SETS[kind][1], first


def align(
    records: list[Record], names: list[str], classes: tuple[str, ...], where: str
) -> list[Record]:
    """The records with labels in the checkpoint's order of classes."""
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(
            f"{where} detects {', '.join(classes)}; the data has {', '.join(names)}. It cannot be "
            f"measured on {', '.join(unknown)}: choose the data it was trained for"
        )
    lookup = np.array([0] + [classes.index(name) + 1 for name in names])
    return [record._replace(labels=lookup[record.labels]) for record in records]


def read_records(
    kind: str, root: str | Path, sets: list[str], first: int | None,
    classes: tuple[str, ...], where: str, **flags,
) -> list[Record]:  # fmt: skip
    """What `data_source` found, with labels as the checkpoint `where` counts its `classes`."""
    read = data.read_coco if kind == "coco" else data.read_voc
    return align(*read(root, sets, **flags), classes, where)[:first]


def output_folder(path: str, sources: list[Path]) -> Path:
    """Makes the folder; refuses one that holds the pictures themselves."""
    folder = Path(path)
    if any(folder.resolve() == source.resolve().parent for source in sources):
        raise ValueError(f"--draw {path}: the pictures are there and would be overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def upright(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, turned as its EXIF says.

    ImageOps.exif_transpose would write the EXIF anew, and fail where any other tag is broken.
    """
    how = Image.Transpose
    turns = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
             6: how.ROTATE_270, 7: how.TRANSVERSE, 8: how.ROTATE_90}  # fmt: skip
    image.load()  # Pillow turns a TIFF here
    turn, image = turns.get(data.exif_orientation(image)), data.to_rgb(image)
    return image if turn is None else image.transpose(turn)


def own_pictures(model: ScratchDet, args: argparse.Namespace) -> None:
    """Detect in pictures without annotations; print, draw, and write JSON."""
    path, classes, rows, anything = Path(args.images), model.config.classes, [], False
    pictures = [path]
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in data.SUFFIXES)
    if not path.exists() or not pictures:
        raise ValueError(f"--images {path}: no picture there ({' '.join(data.SUFFIXES)})")
    folder = output_folder(args.draw, pictures) if args.draw else None
    passes = MULTI_SCALE if args.multi_scale else ONE_SCALE
    for picture in pictures:
        image = data.open_image(picture)
        try:
            image = upright(image)
        except Exception as error:  # whatever a decoder raises on bytes from anywhere
            raise ValueError(f"{picture}: cannot be decoded ({error})") from None
        found = detect_image(model, image, passes)
        detections = [
            {"label": classes[label - 1], "score": float(score),
             "box_xyxy": [round(float(v), 1) for v in xyxy]}
            for xyxy, score, label in zip(*found, strict=True)
        ]  # fmt: skip
        rows.append({"image": str(picture), "size": image.size, "detections": detections})
        good = int((found.scores >= args.min_score).sum())  # the best come first
        said = [f"{d['label']} {d['score']:.2f}" for d in detections]
        text = ", ".join(said[:good])
        if not good:
            best = f"best guess {said[0]}" if said else "not even a guess"
            text = f"nothing above {args.min_score:g} ({best})"
        if len(said) > good:
            text += f", {len(said) - good} weaker"
        print(f"{picture}: {text}")
        anything |= good > 0
        if folder:
            boxes, scores, labels = (x[:good] for x in found)
            data.draw(image, boxes, labels, scores, classes).save(folder / picture.name)
    if not anything:
        print(
            f"nothing found in {len(pictures)} pictures. This checkpoint knows {', '.join(classes)}"
            ", and objects like those it was trained on; --min-score lists weaker detections"
        )
    if folder:
        print(f"drawn: {folder}/")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_shared(args)
    if args.images and (args.fps or args.results or args.comp4 or args.voc_root or args.coco_root):
        raise ValueError("--images measures nothing: of the outputs it takes --draw and --json")
    if args.fps and (args.draw or args.json or args.results or args.comp4):
        raise ValueError("--fps measures speed alone: ask for the other outputs without it")
    for file in filter(None, (args.json, args.results, args.export)):
        Path(file).resolve().parent.mkdir(parents=True, exist_ok=True)  # fail now, not at the end
        if Path(file).is_dir():
            raise ValueError(f"{file}: a folder; expected the name of a file to write")
    model, checkpoint = load(args.checkpoint, args.device)
    classes, device = model.config.classes, model.priors_cxcywh.device
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # as its inputs: else cuDNN turns every weight
        torch.backends.cudnn.benchmark = args.fps
    print(
        f"{args.checkpoint}: {model.config.backbone}, {len(classes)} classes, step "
        f"{checkpoint.get('step')}, commit {checkpoint.get('commit')}; on "
        f"{machine.hardware(device)}"
    )
    if args.export:
        export(model, args.export)
        print(f"exported: {args.export}, pixels (N,3,{model.config.size},{model.config.size}) -> "
              "boxes (N,P,4) xyxy, probabilities (N,P,C)")  # fmt: skip
    if args.images:
        own_pictures(model, args)
        return
    asked = (args.data, args.voc_root, args.coco_root, args.eval_sets, args.draw, args.json)
    if args.export and not any((*asked, args.results, args.comp4, args.fps)):
        return
    source = data_source(args, checkpoint)
    kind, root, sets, _ = source
    if args.comp4 and (kind == "coco" or len(sets) > 1):
        raise ValueError(
            f"--comp4 is the submission of one set of VOC, such as --eval-sets 2012:test; asked of "
            f"{kind}, {' '.join(sets)}"
        )
    test_set = args.results if kind == "coco" else args.comp4  # comes without annotations
    records = read_records(*source, classes, args.checkpoint, annotated=not test_set)
    metric = metric_of(kind, sets)
    if args.json and not any(len(r.labels) for r in records):
        raise ValueError(f"--json {args.json}: {' '.join(sets)} has no annotations to measure by")
    if args.fps:
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        print(f"float32{', convolutions in TF32' * tf32}, {model.config.size} px, images/s")
        for n in (1, 8):
            alone, whole = frames_per_second(model, records, batch_size=n)
            print(f"batch {n}: network {alone:.1f}, with decoding and NMS {whole:.1f}")
        return
    folder = output_folder(args.draw, [r.path for r in records]) if args.draw else None

    if args.multi_scale:
        print("multi-scale: our recipe (the paper does not give its own)")
        found, progress = [], Progress(len(records), "multi-scale")
        for record in records:
            image = data.decode(data.open_record(record), record)
            found.append(detect_image(model, image, MULTI_SCALE, soft=metric == "coco"))
            progress(len(found))
    else:
        found = run_detector(model, records, batch_size=args.batch_size, workers=args.workers)
    if any(len(r.labels) for r in records):
        result = summarise(records, found, classes, metric)
        print(report(result))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    if not any(len(f.scores) for f in found):
        print("nothing found in any image: is the checkpoint trained?")
    if args.results:
        ids = range(1, len(classes) + 1)
        if kind == "coco":
            listing = data.find_listing(root, sets[0], annotated=False)[0]
            categories = json.loads(listing.read_bytes())["categories"]
            official = {category["name"]: category["id"] for category in categories}
            ids = [official.get(name) for name in classes]
        write_results(args.results, records, found, ids)
        unlisted = [name for name, i in zip(classes, ids, strict=True) if i is None]
        without = f", without {', '.join(unlisted)}: no category of {sets[0]}" if unlisted else ""
        print(f"results: {args.results}{without}")
    if args.comp4:
        year, _, split = sets[0].rpartition(":")
        year = year or data.find_set(root, split)[0].absolute().name  # the tree itself was given
        write_comp4(args.comp4, records, found, classes, year.removeprefix("VOC"), split)
        print(f"comp4 files: {args.comp4}")
    if args.draw:
        for record, one in zip(records, found, strict=True):
            name = record.name.replace("/", "_")
            draw_found(record, one, classes, args.min_score).save(folder / f"{name}.jpg")
        print(f"drawn: {folder}/ (ground truth green, detections of {args.min_score:g} up orange)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as e:
        print(f"error: {str(e).splitlines()[0]} A smaller --batch-size may fit", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
