"""Images and boxes, from files to batches: VOC, COCO, drawn shapes, and the SSD augmentation.

    python data.py                                   draws shapes; sheet.png: augmented, with boxes
    python data.py --voc-root DIR --sets 2007:trainval                  the same for a VOC tree
    python data.py --check --voc-root DIR            the loader run over everything: what is wrong
    python data.py --bench                           images/s of one core, beside ssd.pytorch's way

This file follows an image to the network:

    Record           what a file says: path, size, boxes (records.py; shapes.py draws the default)
    expand, crop     -> the source rectangle, from the boxes and the image *size* alone, and project
    snap, render     -> pixels: decode, one resize                       (build_cache: decode once)
    Dataset, batches -> Batch of uint8, by worker processes; any step can be resumed
    prepare          -> on the device: colour, (x - mean) / std -> (N, 3, S, S)

Geometry comes first, so that the canvas of 16 times the image that SSD expands into never exists.
Letters: N images - S side of the input - G boxes of an image - T boxes of a batch. `_xyxy` boxes
are in units of the image, except in a Record, where they are the annotation's pixels.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from records import (  # noqa: F401  (the other programs find all about data here)
    SUFFIXES,
    VOC_CLASSES,
    BadData,
    Findings,
    Record,
    decode,
    exif_orientation,
    find_listing,
    find_set,
    list_sets,
    open_image,
    open_record,
    read_classes,
    read_coco,
    read_lines,
    read_voc,
    to_rgb,
)
from shapes import SHAPE_CLASSES, draw_shapes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# What is trained and measured on, unless told otherwise: VOC's are YEAR:NAME, COCO's NAME.
SETS = {
    "voc": (["2007:trainval", "2012:trainval"], ["2007:test"]),
    "coco": (["train2017"], ["val2017"]),
    "shapes": (["2007:train"], ["2007:test"]),
}


def kind_of(args: argparse.Namespace, default: str = "shapes") -> str:
    """voc, coco or shapes: as --data says, or as follows from the root that is given."""
    if args.voc_root and args.coco_root and not args.data:
        raise ValueError("--voc-root and --coco-root: say which, --data voc or --data coco")
    return args.data or (args.voc_root and "voc") or (args.coco_root and "coco") or default


# ------------------------------------------------------------------------------ augmentation

# ssd: colour, expand, crop, flip; crop: the same, not expanded; flip; none
AUGMENT = ("ssd", "crop", "flip", "none")
MIN_IOUS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])  # samplers 1 to 5; 0 is the whole, 6 any crop
TRIALS = 50
PREFETCH = 4  # batches that wait, for each worker
WHOLE = (0.0, 0.0, 1.0, 1.0)
PLAIN = (0.0, 0.0, 1.0, 1.0, 0.0)  # parameters of `distort` that change nothing


def expand(rng: np.random.Generator) -> np.ndarray:
    """Half the time, a canvas of 1 to 4 times the image, which lies anywhere in it: -> (4,) xyxy
    in units of the image, (0, 0, 1, 1) being the image itself (Caffe ExpandImage)."""
    if rng.random() < 0.5:
        return np.array(WHOLE)
    ratio = rng.uniform(1.0, 4.0)
    corner = -rng.uniform(0.0, ratio - 1.0, 2)
    return np.concatenate([corner, corner + ratio])


def crop(boxes_xyxy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of SSD's seven samplers: (G, 4) -> (4,) xyxy, all in units of what is cropped.

    Samplers 1 to 5 take the first of 50 random crops that overlaps at least one box with IoU >=
    0.1, 0.3, 0.5, 0.7, 0.9; sampler 6 takes any crop; all six need a box. One of those that
    succeeded, or the whole, is picked uniformly (Caffe batch_sampler). Drawn all at once.
    """
    if len(boxes_xyxy) == 0:
        return np.array(WHOLE)
    u = rng.random((4, len(MIN_IOUS) * TRIALS + 1))
    scale = 0.3 + 0.7 * u[0]
    # Clamped, not drawn anew: so many crops are exactly as wide or as high as the image.
    aspect = (0.5 + 1.5 * u[1]).clip(scale**2, scale**-2.0)
    sides = scale[:, None] * np.stack([aspect, 1 / aspect], axis=1) ** 0.5  # (K, 2)
    sides = sides.clip(max=1.0)  # of rounding
    corner = u[2:].T * (1.0 - sides)
    crops = np.concatenate([corner, corner + sides], axis=1)  # (K, 4)

    left, top, right, bottom = crops[:-1].T[:, :, None]  # (K-1, 1) each
    x0, y0, x1, y1 = boxes_xyxy.T  # (G,) each
    inter = (np.minimum(right, x1) - np.maximum(left, x0)).clip(0.0)
    inter *= (np.minimum(bottom, y1) - np.maximum(top, y0)).clip(0.0)  # (K-1, G)
    union = (sides.prod(axis=1)[:-1, None] + (x1 - x0) * (y1 - y0)) - inter
    iou = (inter / union).max(axis=1).reshape(len(MIN_IOUS), TRIALS)
    success = iou >= MIN_IOUS[:, None]
    firsts = success.argmax(axis=1) + TRIALS * np.arange(len(MIN_IOUS))
    choices = [-2, *firsts[success.any(axis=1)], -1]  # -2: the whole
    choice = choices[rng.integers(len(choices))]
    return np.array(WHOLE) if choice == -2 else crops[choice]


def project(
    boxes_xyxy: np.ndarray, labels: np.ndarray, source_xyxy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the image -> boxes of the source rectangle: those whose centre lies in it, clipped
    to it, without those of no area (Caffe's emit constraint CENTER). Possibly none."""
    corner, size = source_xyxy[:2], source_xyxy[2:] - source_xyxy[:2]
    centre = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2 - corner) / size
    boxes = ((boxes_xyxy.reshape(-1, 2, 2) - corner) / size).clip(0.0, 1.0).reshape(-1, 4)
    keep = ((centre >= 0) & (centre <= 1)).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[keep], labels[keep]


def flip(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Boxes of the mirrored image: [[.1, .2, .3, .4]] -> [[.7, .2, .9, .4]]."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([1 - x1, y0, 1 - x0, y1], axis=1)


def draw_source(
    boxes_xyxy: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, expands: bool = True
) -> np.ndarray:
    """Expand, then crop: what the network will see of the image, (4,) xyxy in units of it."""
    canvas = expand(rng) if expands else np.array(WHOLE)
    corner, side = canvas[:2], canvas[2:] - canvas[:2]
    part = crop(project(boxes_xyxy, labels, canvas)[0], rng)
    return np.concatenate([corner + part[:2] * side, corner + part[2:] * side])


def draw_colour(rng: np.random.Generator) -> tuple[float, ...]:
    """Parameters of `distort`: order, brightness, contrast, saturation, hue, each used half the
    time (Caffe ApplyDistort: 32, [.5, 1.5], [.5, 1.5], 18 of 180)."""
    use, u = rng.random(5) < 0.5, rng.uniform(-1.0, 1.0, 4)
    drawn = (1.0, 32 * u[0], 1 + u[1] / 2, 1 + u[2] / 2, 18 * u[3])
    return tuple(np.where(use, drawn, PLAIN).tolist())


# ------------------------------------------------------------------------------ pixels


def snap(
    source_xyxy: np.ndarray, image_size: tuple[int, int], size: int
) -> tuple[np.ndarray, list[int], list[int], int]:
    """Moves a source rectangle to whole pixels: -> source, part, inside, factor.

    `part` (x0 y0 x1 y1, pixels of the image) is what the source shows of the image, and `inside`
    where that lands on the canvas of size x size; the rest of the canvas lies beside the image.
    Both are rounded to the nearest pixel, and the returned source is the one that the two mean,
    so boxes and pixels agree exactly. An image that shrinks by 2, 4 or 8 can be decoded at that
    fraction if it is a JPEG (`factor`), and `part` keeps to multiples of it.
    """
    source, part, inside = source_xyxy.tolist(), [0] * 4, [0] * 4
    units = [(source[a + 2] - source[a]) * image_size[a] / size for a in (0, 1)]
    factor = next(f for f in (8, 4, 2, 1) if f <= max(1.0, min(units)))
    if source == list(WHOLE):  # a whole image stays whole
        factor = math.gcd(factor, *image_size)
    for a, length in enumerate(image_size):
        low, high, unit = source[a] * length, source[a + 2] * length, units[a]
        first = round(max(low, 0.0) / factor) * factor
        last = min(round(high / factor), length // factor) * factor
        start = 0 if low >= 0 else min(round((first - low) / unit), size)
        end = size if high <= length else min(round((last - low) / unit), size)
        if first >= last or start >= end:
            return source_xyxy, [0] * 4, [0] * 4, 1  # nothing of the image is on the canvas
        part[a], part[a + 2], inside[a], inside[a + 2] = first, last, start, end
        unit = (last - first) / (end - start)
        source[a] = (first - start * unit) / length
        source[a + 2] = source[a] + size * unit / length
    return np.array(source), part, inside, factor


def render(
    record: Record, part: list[int], inside: list[int], factor: int, size: int,
    pixels: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    """Shows `part` of the image at `inside` on a canvas, as from `snap`: -> (3, S, S) uint8.

    One bilinear resize, antialiased where it shrinks, of just that part; 0 beside the image.
    `pixels` (h, w, 3) is the decoded image, from the cache. torch's resize of bytes is Pillow's,
    to one grey level, and three times as fast.
    """
    canvas = torch.zeros((3, size, size), dtype=torch.uint8)
    x0, y0, x1, y1 = part
    left, top, right, bottom = inside
    if x0 == x1:
        return canvas  # all of it lies beside the image: nothing to decode
    if pixels is None:
        image = open_record(record)
        if factor > 1 and image.format == "JPEG":
            if image.draft(None, (image.width // factor, image.height // factor)):
                x0, y0, x1, y1 = (side // factor for side in part)
        pixels = np.asarray(decode(image, record))
    piece = torch.from_numpy(pixels[y0:y1, x0:x1].copy()).permute(2, 0, 1)[None]  # (1, 3, h, w)
    resized = torch.nn.functional.interpolate(
        piece, (bottom - top, right - left), mode="bilinear", antialias=True
    )
    canvas[:, top:bottom, left:right] = resized[0]
    return canvas


# ------------------------------------------------------------------------------ the cache


def cache_starts(records: list[Record]) -> np.ndarray:
    """Where each decoded image starts in the cache, and the total: -> (len + 1,) int64 bytes."""
    return np.cumsum([0, *(w * h * 3 for w, h in (record.size for record in records))])


@functools.lru_cache(maxsize=8)
def memory_map(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process dies."""
    with open(path, "w") as file:
        if fcntl is not None:  # elsewhere two processes may both build; the rename stays whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_cache(records: list[Record], folder: str | Path) -> Path:
    """A file of all decoded images, one after the other, made once and shared by all processes.

    Its name is a hash of the list of images; its last 32 bytes a hash of their sizes and times, so
    that changed images rebuild it. It appears by a rename, whole or not at all. Reading it through
    a memory map, all workers and ranks of a machine share one copy in memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = int(cache_starts(records)[-1])
    files, stamp = hashlib.sha256(), hashlib.sha256()
    for record in records:
        files.update(f"{record.path.resolve()} {record.size}\n".encode())
        try:
            status = os.stat(record.path)
        except FileNotFoundError:
            raise BadData(record.path, "no such image") from None
        stamp.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    path = folder / f"decoded-{files.hexdigest()[:16]}.bin"

    def is_fresh() -> bool:
        if not path.is_file() or path.stat().st_size != total + 32:
            return False
        with open(path, "rb") as file:
            file.seek(total)
            return file.read() == stamp.digest()

    if is_fresh():  # whoever made it: one may read it where one may not write
        return path
    part = path.with_suffix(".part")
    with file_lock(folder / f"{path.stem}.lock"):  # other ranks wait here for the one that builds
        if is_fresh():
            return path
        part.unlink(missing_ok=True)  # of a process that was killed: its space is free, too
        free = shutil.disk_usage(folder).free
        if free < total + (64 << 20):
            raise ValueError(
                f"--cache {folder}: {total / 1e9:.1f} GB needed for {len(records)} decoded images, "
                f"{free / 1e9:.1f} GB free; name another folder, or leave --cache out"
            )
        print(f"data: decoding {len(records)} images into {path}, {total / 1e9:.2f} GB, once",
              file=sys.stderr)  # fmt: skip
        try:
            with open(part, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
                for start in range(0, len(records), 256):  # bounds what waits to be written
                    some = records[start : start + 256]
                    for image in pool.map(lambda r: decode(open_record(r), r).tobytes(), some):
                        file.write(image)
                file.write(stamp.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:  # the disk is full
            raise ValueError(
                f"--cache {folder}: cannot be written ({error}); free some space, name another "
                "folder, or leave --cache out"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        memory_map.cache_clear()
    return path


# ------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    images: Tensor  # (N, 3, S, S) uint8 RGB; 0 outside `inside`
    inside: Tensor  # (N, 4) int64 x0 y0 x1 y1: the pixels that the image covers
    colour: Tensor  # (N, 5) float32, for `distort`
    boxes_xyxy: Tensor  # (T, 4) float32, in units of the canvas
    labels: Tensor  # (T,) int64
    offsets: Tensor  # (N+1,) int64: image n owns boxes offsets[n]:offsets[n+1]
    indices: Tensor  # (N,) int64, rows of `records`


class Dataset(torch.utils.data.Dataset):
    """dataset[epoch, index] or dataset[epoch, index, size] is one sample; all its randomness is
    that of (seed, epoch, index)."""

    def __init__(
        self, records: list[Record], size: int, *, seed: int = 0, augment: str = "ssd",
        keep_difficult: bool = True, cache: str | Path | None = None,
    ):  # fmt: skip
        if augment not in AUGMENT:
            raise ValueError(f"augment is {augment!r}; expected one of {', '.join(AUGMENT)}")
        self.records, self.size, self.seed, self.augment = records, size, seed, augment
        self.keep_difficult = keep_difficult
        self.cache = None if cache is None else build_cache(records, cache)
        self.starts = cache_starts(records)

    def __getitem__(self, key: tuple[int, ...]) -> tuple:
        epoch, index, size = (*key, self.size)[:3]
        record = self.records[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        boxes = (record.boxes_xyxy / np.array(record.size * 2)).clip(0.0, 1.0)
        labels = record.labels
        if not self.keep_difficult:
            boxes, labels = boxes[~record.difficult], labels[~record.difficult]
        source, colour = np.array(WHOLE), PLAIN
        if self.augment in ("ssd", "crop"):
            source = draw_source(boxes, labels, rng, expands=self.augment == "ssd")
            colour = draw_colour(rng)
        source, part, inside, factor = snap(source, record.size, size)
        boxes, labels = project(boxes, labels, source)
        pixels = None
        if self.cache is not None:
            (w, h), start = record.size, self.starts[index]
            pixels = memory_map(self.cache)[start : start + w * h * 3].reshape(h, w, 3)
        image = render(record, part, inside, factor, size, pixels)
        if self.augment != "none" and rng.random() < 0.5:
            image, boxes = image.flip(-1), flip(boxes)
            inside = [size - inside[2], inside[1], size - inside[0], inside[3]]
        return image, inside, colour, boxes, labels, index

    def __getitems__(self, keys: list[tuple[int, int]]) -> "Batch | BadData":
        try:
            samples = [self[key] for key in keys]
        except BadData as error:
            return error  # raised by `load`, in one line, not with a worker's traceback
        images, inside, colour, boxes, labels, indices = zip(*samples, strict=True)
        return Batch(
            torch.stack(images),
            torch.tensor(inside),
            torch.tensor(colour, dtype=torch.float32),
            torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            torch.from_numpy(np.concatenate(labels)),
            torch.tensor([0, *itertools.accumulate(map(len, labels))]),
            torch.tensor(indices),
        )


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def as_it_is(batch):
    return batch


def start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C, and SIGTERM where `timeout` sends it to the whole group, are for the main process,
    # which has a step to finish. SIGTERM to a worker itself still ends it.
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load(dataset: Dataset, order: Iterator, workers: int, pin: bool = False) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pin,
        worker_init_fn=start_worker,
        prefetch_factor=PREFETCH if workers else None,
        generator=torch.Generator(),  # else it draws from the global one
    )
    # torch reports a dead worker from a signal handler, that is in the middle of anything, such as
    # writing a checkpoint. Without it the wait for the next batch finds out, within 5 s.
    handler = signal.getsignal(signal.SIGCHLD) if fcntl else None
    stream = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        for batch in stream:
            if isinstance(batch, BadData):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        ours = "DataLoader worker", "Pin memory thread"
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in ours):
            raise
        raise ChildProcessError(
            f"a data worker died ({repr(error).splitlines()[0]}). If it was killed, memory or "
            f"/dev/shm ran out: use fewer --workers (now {workers}) or a smaller --batch-size"
        ) from error


def batches(
    records: list[Record], size: int | Callable[[int], int], *, batch_size: int, seed: int,
    augment: str = "ssd", start_step: int = 0, workers: int = 0, rank: int = 0, world: int = 1,
    keep_difficult: bool = True, cache: str | Path | None = None, pin: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """The endless stream of training batches, from `start_step` on.

    Sample p of the stream is image permutation(seed, epoch)[p % len(records)] of epoch
    p // len(records). Batch s of rank r takes the samples (s * world + r) * batch_size and on: so
    batches straddle epochs, none is ever partial, any step can be resumed, and neither the number
    of workers nor of ranks changes what is in the stream. `size` may be a function of the step.
    """
    if not records:
        raise ValueError("no images to train on")
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch size {batch_size}, rank {rank} of {world}: expected >= 1, 0 <= r < w"
        )
    dataset = Dataset(
        records, size, seed=seed, augment=augment, keep_difficult=keep_difficult, cache=cache
    )

    def order():
        for step in itertools.count(start_step):
            first = (step * world + rank) * batch_size
            epochs = [divmod(p, len(records)) for p in range(first, first + batch_size)]
            now = size(step) if callable(size) else size
            yield [(e, int(permutation(seed, e, len(records))[i]), now) for e, i in epochs]

    return load(dataset, order(), workers, pin)


def ordered_batches(
    records: list[Record], size: int, *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """The records in order, whole and undistorted, for evaluation; the last batch may be short."""
    dataset = Dataset(records, size, augment="none")
    keys = [(0, index) for index in range(len(records))]
    order = (keys[i : i + batch_size] for i in range(0, len(keys), batch_size))
    return load(dataset, order, workers)


# ------------------------------------------------------------------------------ on the device


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    return Batch(*(x.to(device, non_blocking=True) for x in batch))


def value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """V = max and V - min over the channels: (N, 3, H, W) -> (N, H, W) each."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    return value, value - torch.minimum(torch.minimum(r, g), b)


def distort(images: Tensor, colour: Tensor) -> Tensor:
    """SSD's colour steps: (N, 3, H, W) float RGB with whole values 0..255, (N, 5) -> the same.

    Brightness, contrast, saturation, hue; or with order 1 contrast last. Each step ends in whole
    values 0..255, as Caffe's 8-bit images do. Saturation and hue act in HSV: S is clamped at its
    maximum, H (180 to the circle) at 0, and wraps above 180. Not reproduced: the rounding of H and
    S themselves to 8 bits. Same arithmetic for any N and on any device.
    """
    order, brightness, contrast, saturation, hue = colour.float()[:, :, None, None].unbind(1)
    last = contrast.where(order > 0, 1.0)
    first = contrast.where(order == 0, 1.0)
    x = images

    def used(values: Tensor, nothing: float) -> bool:  # on a GPU asking would cost a sync
        return values.is_cuda or bool((values != nothing).any())

    if used(brightness, 0.0):
        x = (x + brightness[:, None]).round_().clamp_(0, 255)
    if used(first, 1.0):
        x = (x * first[:, None]).round_().clamp_(0, 255)
    if used(saturation, 1.0):
        value, chroma = value_and_chroma(x)
        factor = torch.minimum(saturation, value / chroma.clamp(min=1.0))  # S <= its maximum
        x = (value[:, None] - (value[:, None] - x) * factor[:, None]).round_()
    if used(hue, 0.0):
        value, chroma = value_and_chroma(x)
        r, g, b = x.unbind(1)  # (N, H, W)
        safe = chroma.clamp(min=1.0)
        h = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
        h = torch.where(value == r, (g - b) / safe, h)  # sixths of the circle
        h = torch.where(h < 0, h + 6, h)
        h = (h + hue / 30).clamp_(min=0)
        h = torch.where(h >= 6, h - 6, h)
        lowest = value - chroma
        x = torch.stack([(h - 3).abs_() - 1, 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], dim=1)
        x = x.clamp_(0, 1).mul_(chroma[:, None]).add_(lowest[:, None]).round_()
    if used(last, 1.0):
        x = (x * last[:, None]).round_().clamp_(0, 255)
    return x


@functools.lru_cache(maxsize=8)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1); kept, because copying it to a GPU for each batch would wait for the GPU."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images: Tensor, config) -> Tensor:
    """RGB (N, 3, H, W), 0..255 -> float32, (x - mean) / std, in the order of `config.channels`."""
    mean = per_channel(tuple(config.mean), images.device)
    std = per_channel(tuple(config.std), images.device)
    x = (images.float() - mean) / std
    return x if config.channels == "rgb" else x.flip(1)


def prepare(batch: Batch, config) -> Tensor:
    """What the network sees: (N, 3, S, S) float32, channels_last, on the device of the batch.

    Colour and mean; outside the image the mean, which is 0 then.
    """
    images = batch.images
    if images.is_cuda:
        pixel = torch.arange(images.shape[-1], device=images.device)  # (S,)
        x0, y0, x1, y1 = batch.inside[:, :, None].unbind(1)  # (N, 1) each
        columns, rows = (pixel >= x0) & (pixel < x1), (pixel >= y0) & (pixel < y1)  # (N, S)
        covered = rows[:, None, :, None] & columns[:, None, None, :]  # (N, 1, S, S)
        x = normalise(distort(images.float(), batch.colour), config).where(covered, 0.0)
        return x.contiguous(memory_format=torch.channels_last)
    out = torch.zeros_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    for n, (x0, y0, x1, y1) in enumerate(batch.inside.tolist()):  # one image stays in the cache
        part = slice(n, n + 1), slice(None), slice(y0, y1), slice(x0, x1)
        out[part] = normalise(distort(images[part].float(), batch.colour[n : n + 1]), config)
    return out


# ------------------------------------------------------------------------------ pictures

GREEN, ORANGE = (0, 158, 60), (245, 130, 0)  # ground truth, detections


def draw(
    image: Image.Image, boxes_xyxy: np.ndarray, labels: np.ndarray, scores: np.ndarray | None,
    classes: Sequence[str],
) -> Image.Image:  # fmt: skip
    """A copy of the picture with boxes in pixels: orange, named and scored.

    Without scores (None) they are ground truth: green, named inside at the bottom. Letters stay
    legible in pictures of 300 to 500 pixels and grow with larger ones.
    """
    image = image.convert("RGB").copy()
    pen, letters = ImageDraw.Draw(image), max(12, max(image.size) // 32)
    box_colour, ink = (GREEN, "white") if scores is None else (ORANGE, "black")
    try:
        font = ImageFont.load_default(letters)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType
        font = ImageFont.load_default()
    order = range(len(labels)) if scores is None else np.argsort(scores)  # the best comes on top
    for x0, y0, x1, y1 in np.asarray(boxes_xyxy, float)[order].tolist():
        corners = (x0, y0, max(x0, x1), max(y0, y1))
        pen.rectangle(corners, outline=box_colour, width=1 + letters // 8)
    for i in order:
        x0, y0, _, y1 = (float(v) for v in boxes_xyxy[i])
        text = classes[labels[i] - 1] + ("" if scores is None else f" {scores[i]:.2f}")
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        w, h = right - left + 4, bottom - top + 4
        x = max(0, min(x0, image.width - w))
        y = max(0, min(y1 - h if scores is None else y0 - h, image.height - h))
        pen.rectangle((x, y, x + w, y + h), fill=box_colour)
        pen.text((x + 2 - left, y + 2 - top), text, fill=ink, font=font)
    return image


def save_sheet(path: str | Path, pictures: Sequence[Image.Image], columns: int) -> None:
    """Writes one picture of many, each within 300x300 pixels."""
    side = 300
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        picture.thumbnail((side, side))
        sheet.paste(picture, (i % columns * side, i // columns * side))
    sheet.save(path)


# ------------------------------------------------------------------------------ command line


def draw_batch(records: list[Record], classes: list[str], seed: int, augment: str) -> list:
    """The first 24 images of the training stream as the network gets them, with boxes."""
    config = SimpleNamespace(mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0), channels="rgb")
    batch = next(batches(records, 300, batch_size=24, seed=seed, augment=augment))
    pixels = prepare(batch, config) + torch.tensor(config.mean)[:, None, None]
    pixels = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = []
    for n, image in enumerate(pixels):
        rows = slice(batch.offsets[n], batch.offsets[n + 1])
        boxes, labels = batch.boxes_xyxy[rows].numpy() * 300, batch.labels[rows].numpy()
        pictures.append(draw(Image.fromarray(image), boxes, labels, None, classes))
    return pictures


def check(sources: dict[str, Callable], found: Findings, workers: int) -> int:
    """Reads and decodes everything, prints every problem with its place; -> the exit status."""
    records: dict[Path, Record] = {}
    names: dict[str, list[str]] = {}
    for name, read in sources.items():
        try:
            some, names[name] = read()
            records.update((record.path, record) for record in some)
        except BadData as error:  # nothing of this set can be read
            found.refuse(error.where, error.what)
    for name, classes in names.items():
        if lacks := sorted(set(itertools.chain(*names.values())) - set(classes)):
            what = f"lacks {', '.join(lacks)}: a network trained on it alone cannot be measured on"
            found.note(f"set {name}", f"{what} the sets that have them")

    def inspect(record: Record) -> None:
        try:
            image = open_record(record)
            if image.mode != "RGB":
                found.note(record.path, f"mode {image.mode}, converted to RGB")
            if exif_orientation(image) != 1:
                found.note(record.path, "EXIF orientation, not applied: boxes are in stored pixels")
            decode(image, record)
        except BadData as error:
            found.refuse(error.where, error.what)

    sys.stdout.reconfigure(errors="backslashreplace")  # names that are no text: none ends the list
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:  # the decoders let go of the interpreter's lock
        for done, _ in enumerate(pool.map(inspect, records.values()), start=1):
            rate = done / (time.monotonic() - start)
            if done % 100 == 0 or done == len(records):
                left = (len(records) - done) / rate
                end = "\n" if done == len(records) else ""
                print(f"\r{done}/{len(records)} images, {rate:.0f}/s, {left:.0f} s left ", end=end,
                      file=sys.stderr, flush=True)  # fmt: skip
    for title, kinds, most in (
        ("refused", found.refused, None),
        ("handled", found.handled, None),
        ("note", found.notes, 20),
    ):
        for what, places in kinds.items():
            places = list(dict.fromkeys(places))  # a file may be in several sets
            for place in places[:most]:
                print(f"{title:8} {place}  {what}")
            if len(places) > len(places[:most]):
                print(f"{title:8} ... and {len(places) - most} more: {what}")
    refused, handled, notes = (
        len(set(itertools.chain(*kinds.values())))
        for kinds in (found.refused, found.handled, found.notes)
    )
    objects = sum(len(record.labels) for record in records.values())
    print(f"{len(records)} images, {objects} objects: {refused} places that training refuses, "
          f"{handled} that it handles, {notes} notes")  # fmt: skip
    return 1 if refused or handled else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, root = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    root("--voc-root", help="folder with VOC2007/ (or the one above), or a tree without years")
    root("--coco-root", help="folder with annotations/ and train2017/, val2017/")
    add("--sets", nargs="+", help="such as 2007:trainval; else all there are. The sheet: the first")
    add("--classes", help="VOC: file, one name a line; or `auto`: from the annotations")
    add("--shapes-root", default="runs/shapes-data", help="where the shapes are drawn, once")
    add("--check", action="store_true", help="read and decode everything, list what is wrong")
    add("--bench", action="store_true", help="measure images/s of one core")
    add("--out", default="sheet.png", help="the contact sheet")
    add("--augment", choices=AUGMENT, default="ssd")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads of --check")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1 or args.seed < 0:
            given = f"--workers {args.workers} --seed {args.seed}"
            raise ValueError(f"{given}: expected 1 or more, and 0 or more")
        if args.bench:
            from experiments import input_bench

            return input_bench.main()
        found = Findings(collect=args.check)
        root, classes = args.voc_root, VOC_CLASSES
        if args.coco_root:
            if args.classes:
                raise ValueError("--classes: COCO's files list their own; leave it out")
            listings = sorted(Path(args.coco_root, "annotations").glob("instances_*.json"))
            there = [p.stem.removeprefix("instances_") for p in listings]
            sets = args.sets or there or ["train2017"]
            sources = {s: functools.partial(read_coco, args.coco_root, [s], found) for s in sets}
        else:
            if root is None:
                root, classes = draw_shapes(args.shapes_root), SHAPE_CLASSES
            if args.classes:
                classes = None if args.classes == "auto" else read_classes(args.classes)
            sets = args.sets or list_sets(root) or ["2007:trainval"]
            sources = {s: functools.partial(read_voc, root, [s], classes, found) for s in sets}
        if args.check:
            return check(sources, found, args.workers)
        records, classes = sources[sets[0]]()
        save_sheet(args.out, draw_batch(records, classes, args.seed, args.augment), columns=6)
        print(f"{args.out}: 24 of {len(records)} images, {len(classes)} classes, {args.augment}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
