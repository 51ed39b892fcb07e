"""From annotated pictures to batches: SSD's augmentation, geometry first.

    python data.py                           writes sheet.png: drawn shapes, augmented, with boxes
    python data.py --voc-root DIR --sets 2007:trainval              the same for a VOC tree
    python data.py --check --voc-root DIR    reads and decodes everything, lists what is wrong
    python data.py --fetch voc2007 voc2012   downloads a data set

This file follows an image to the network:

    Record            what the annotation says: path, size, boxes, labels   (plumbing/files.py)
    expand, crop      -> the source rectangle, from the boxes and the image *size* alone
    place_boxes       -> the boxes in the coordinates of that rectangle
    snap, render      -> pixels: decode, then one resize
    Dataset, batches  -> Batch of uint8 images, made by worker processes; any step can be resumed
    prepare           -> on the device: colour, (x - mean) / std  ->  (N, 3, S, S)

Geometry comes first: SSD's expanded canvas has up to 16 times the area of the image, and here it is
never allocated. So augmentation is a rectangle and five numbers for the colours.

Letters: N images - S side of the input - G boxes in one image - T boxes in a batch.
`_xyxy` boxes are in units of the image, those of a Batch in units of the input; only those of a
Record are in pixels, as annotated.
"""

import argparse
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ops
from plumbing import check, fetch, sources
from plumbing.cache import build_cache, cache_starts, memory_map
from plumbing.files import BadData, Findings, Record, decode_pixels, open_record
from plumbing.pictures import draw_boxes, save_sheet
from plumbing.prefetch import copy_beside
from plumbing.program import Help, check_file, check_range, run_program
from plumbing.workers import run_workers

# ------------------------------------------------------------------------------ augmentation

AUGMENT = ("ssd", "crop", "flip", "none")  # all of SSD's; ours, milder; only flips; nothing
MIN_IOUS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])  # of samplers 1 to 5 of `crop`
TRIALS = 50  # random crops per sampler; all that miss its IoU are rejected
WHOLE = (0.0, 0.0, 1.0, 1.0)  # xyxy: the whole image
NEUTRAL = (0.0, 0.0, 1.0, 1.0, 0.0)  # colour parameters that change nothing: see sample_colour


def expand(rng: np.random.Generator) -> np.ndarray:
    """Zoom out: half of the time, a canvas whose sides are 1 to 4 times the image's, at random.

    -> (4,) xyxy in units of the image; (0, 0, 1, 1) is the image itself (Caffe ExpandImage).
    [-1, 0, 1, 2]: the image is the top right quarter of the canvas.
    """
    if rng.random() < 0.5:
        return np.array(WHOLE)
    ratio = rng.uniform(1.0, 4.0)
    corner = -rng.uniform(0.0, ratio - 1.0, 2)
    return np.concatenate([corner, corner + ratio])


def crop(boxes_xyxy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zoom in, by one of SSD's seven samplers: (G, 4) -> (4,) xyxy, both in units of the canvas.

    Sampler 0 keeps the whole canvas. Samplers 1 to 5 take the first of 50 random crops whose IoU
    with some box is at least 0.1, 0.3, 0.5, 0.7, 0.9. Sampler 6 takes any crop. One of the samplers
    that found a crop is chosen uniformly (Caffe GenerateBatchSamples). A canvas without boxes stays
    whole. All trials are sampled at once, K = 5 * 50 + 1.
    """
    if len(boxes_xyxy) == 0:
        return np.array(WHOLE)
    u = rng.random((4, len(MIN_IOUS) * TRIALS + 1))
    scale = 0.3 + 0.7 * u[0]
    # An aspect for which the crop would not fit is clamped, as in Caffe, not sampled again.
    # Therefore many crops are exactly as wide or as high as the canvas.
    aspect = (0.5 + 1.5 * u[1]).clip(scale**2, scale**-2.0)
    sides = scale[:, None] * np.stack([aspect, 1 / aspect], axis=1) ** 0.5  # (K, 2) width, height
    sides = sides.clip(max=1.0)  # rounding may exceed 1
    corner = u[2:].T * (1.0 - sides)
    crops = np.concatenate([corner, corner + sides], axis=1)  # (K, 4)

    left, top, right, bottom = crops[:-1].T[:, :, None]  # (K-1, 1) each
    x0, y0, x1, y1 = boxes_xyxy.T  # (G,) each
    inter = (np.minimum(right, x1) - np.maximum(left, x0)).clip(0.0)
    inter *= (np.minimum(bottom, y1) - np.maximum(top, y0)).clip(0.0)  # (K-1, G)
    union = (sides.prod(axis=1)[:-1, None] + (x1 - x0) * (y1 - y0)) - inter
    iou = (inter / union).max(axis=1).reshape(len(MIN_IOUS), TRIALS)  # with the best box
    success = iou >= MIN_IOUS[:, None]  # the other crops are rejected
    firsts = success.argmax(axis=1) + TRIALS * np.arange(len(MIN_IOUS))
    choices = [np.array(WHOLE), *crops[firsts[success.any(axis=1)]], crops[-1]]
    return choices[rng.integers(len(choices))]


def place_boxes(boxes_xyxy: np.ndarray, source_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the image in units of the source rectangle: (G, 4), (4,) -> (G, 4), kept (G,) bool.

    Boxes are clipped to the rectangle. A box is kept if its centre lies inside (Caffe's emit
    constraint CENTER) and some of its area is left. The result may be empty.
    """
    corner, size = source_xyxy[:2], source_xyxy[2:] - source_xyxy[:2]
    centre = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2 - corner) / size
    boxes = ((boxes_xyxy.reshape(-1, 2, 2) - corner) / size).clip(0.0, 1.0).reshape(-1, 4)
    keep = ((centre >= 0) & (centre <= 1)).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes, keep


def flip(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Boxes of the mirrored image: [[.1, .2, .3, .4]] -> [[.7, .2, .9, .4]]."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([1 - x1, y0, 1 - x0, y1], axis=1)


def sample_source(
    boxes_xyxy: np.ndarray, rng: np.random.Generator, *, zoom_out: bool = True
) -> np.ndarray:
    """Expand, then crop: the part of the image that the network sees, (4,) xyxy in its units.

    Without `zoom_out` (ours, not SSD's) half of the images skip the crop, too, and stay whole.
    """
    canvas = expand(rng) if zoom_out else np.array(WHOLE)
    if not zoom_out and rng.random() < 0.5:
        return canvas
    corner, side = canvas[:2], canvas[2:] - canvas[:2]
    boxes, keep = place_boxes(boxes_xyxy, canvas)
    part = crop(boxes[keep], rng)
    return np.concatenate([corner + part[:2] * side, corner + part[2:] * side])


def sample_colour(rng: np.random.Generator) -> tuple[float, ...]:
    """Parameters of `ops.colour`: order, brightness, contrast, saturation, hue.

    Each is used half of the time (Caffe ApplyDistort: 32, [.5, 1.5], [.5, 1.5], 18 of 180).
    """
    use, u = rng.random(5) < 0.5, rng.uniform(-1.0, 1.0, 4)
    drawn = (1.0, 32 * u[0], 1 + u[1] / 2, 1 + u[2] / 2, 18 * u[3])
    return tuple(np.where(use, drawn, NEUTRAL).tolist())


# ------------------------------------------------------------------------------ pixels


def snap(
    source_xyxy: np.ndarray, image_size: tuple[int, int], size: int
) -> tuple[np.ndarray, list[int], list[int], int]:
    """Rounds a source rectangle to whole pixels: -> source, part, inside, factor.

    `part` (x0 y0 x1 y1, pixels of the image) is what the source shows of the image. `inside` is
    where that lands on the input of size x size; the rest of the input lies beside the image.
    Both are rounded to whole pixels, and the returned source is exactly the one that these two
    describe, so boxes and pixels agree. A JPEG that shrinks by 2, 4 or 8 can be decoded directly at
    that fraction (`factor`), which is faster; then `part` consists of multiples of it.
    """
    source, part, inside = source_xyxy.tolist(), [0] * 4, [0] * 4
    # pixels of the image per pixel of the input, in x and in y
    units = [(source[a + 2] - source[a]) * image_size[a] / size for a in (0, 1)]
    factor = next(f for f in (8, 4, 2, 1) if f <= max(1.0, min(units)))
    if source == list(WHOLE):  # then no pixel may be cut off: the factor must divide both sides
        factor = math.gcd(factor, *image_size)
    for a, length in enumerate(image_size):  # a = 0: x, a = 1: y
        low, high, unit = source[a] * length, source[a + 2] * length, units[a]
        first = round(max(low, 0.0) / factor) * factor
        last = min(round(high / factor), length // factor) * factor
        start = 0 if low >= 0 else min(round((first - low) / unit), size)
        end = size if high <= length else min(round((last - low) / unit), size)
        if first >= last or start >= end:
            return source_xyxy, [0] * 4, [0] * 4, 1  # nothing of the image is seen
        part[a], part[a + 2], inside[a], inside[a + 2] = first, last, start, end
        unit = (last - first) / (end - start)
        source[a] = (first - start * unit) / length
        source[a + 2] = source[a] + size * unit / length
    return np.array(source), part, inside, factor


def render(
    record: Record, part: list[int], inside: list[int], factor: int, size: int,
    pixels: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    """Draws `part` of the image at `inside` on the input, as `snap` chose them: -> (3, S, S) uint8.

    One bilinear resize of just that part, antialiased where it shrinks; 0 beside the image.
    `pixels` (h, w, 3) is the whole image decoded, if a cache has it; a JPEG decoded at a fraction
    differs by some grey levels. torch's resize is faster than Pillow's and at most one level off.
    """
    output = torch.zeros((3, size, size), dtype=torch.uint8)
    x0, y0, x1, y1 = part
    left, top, right, bottom = inside
    if x0 == x1:
        return output  # the source shows nothing of the image: nothing to decode
    if pixels is None:
        image = open_record(record)
        if factor > 1 and image.format == "JPEG":
            # draft: Pillow decodes at a fraction of the size, or returns None if it cannot
            if image.draft(None, (image.width // factor, image.height // factor)):
                x0, y0, x1, y1 = (side // factor for side in part)
        pixels = np.asarray(decode_pixels(image, record))
    piece = torch.from_numpy(pixels[y0:y1, x0:x1].copy()).permute(2, 0, 1)[None]  # (1, 3, h, w)
    resized = torch.nn.functional.interpolate(
        piece, (bottom - top, right - left), mode="bilinear", antialias=True
    )
    output[:, top:bottom, left:right] = resized[0]
    return output


# ------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    """N images and their T boxes: those of image 0, then those of image 1, ..."""

    images: Tensor  # (N, 3, S, S) uint8 RGB; 0 outside `inside`
    inside: Tensor  # (N, 4) int64 x0 y0 x1 y1: the pixels that the image covers
    colour: Tensor  # (N, 5) float32, for `ops.colour`
    boxes_xyxy: Tensor  # (T, 4) float32, in units of the input
    labels: Tensor  # (T,) int64
    offsets: Tensor  # (N+1,) int64: image n owns boxes offsets[n]:offsets[n+1]
    indices: Tensor  # (N,) int64, rows of `records`


class Dataset(torch.utils.data.Dataset):
    """dataset[epoch, index, size] is one sample, for an input of size x size pixels.

    All its random numbers come from (seed, epoch, index), so any sample can be made again, by any
    worker, and in another size it is the same crop.
    """

    def __init__(
        self, records: list[Record], *, seed: int = 0, augment: str = "ssd",
        keep_difficult: bool = True, cache: str | Path | None = None,
    ):  # fmt: skip
        if augment not in AUGMENT:
            raise ValueError(f"augment is {augment!r}; expected one of {', '.join(AUGMENT)}")
        self.records, self.seed, self.augment = records, seed, augment
        self.keep_difficult = keep_difficult
        self.cache = None if cache is None else build_cache(records, cache)
        self.starts = cache_starts(records)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        epoch, index, size = key
        record = self.records[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        boxes = (record.boxes_xyxy / np.array(record.size * 2)).clip(0.0, 1.0)  # (G, 4)
        source, colour = np.array(WHOLE), NEUTRAL
        if self.augment in ("ssd", "crop"):
            source = sample_source(boxes, rng, zoom_out=self.augment == "ssd")
            colour = sample_colour(rng)
        source, part, inside, factor = snap(source, record.size, size)
        image = render(record, part, inside, factor, size, self.cached_pixels(index))
        boxes, keep = place_boxes(boxes, source)
        keep &= self.keep_difficult | ~record.difficult
        boxes, labels = boxes[keep], record.labels[keep]
        if self.augment != "none" and rng.random() < 0.5:
            image, boxes = image.flip(-1), flip(boxes)
            inside = [size - inside[2], inside[1], size - inside[0], inside[3]]
        return image, inside, colour, boxes, labels, index

    def cached_pixels(self, index: int) -> np.ndarray | None:
        """(h, w, 3) uint8 from the cache, if there is one."""
        if self.cache is None:
            return None
        (w, h), start = self.records[index].size, self.starts[index]
        return memory_map(self.cache)[start : start + w * h * 3].reshape(h, w, 3)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> "Batch | BadData":
        try:
            samples = [self[key] for key in keys]
        except BadData as error:
            return error  # run_workers raises it, as one line instead of a worker's traceback
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
    """The order of the images in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def batches(
    records: list[Record], size: int | Callable[[int], int], *, batch_size: int, seed: int,
    augment: str = "ssd", start_step: int = 0, workers: int = 0, rank: int = 0, world: int = 1,
    keep_difficult: bool = True, cache: str | Path | None = None, pin: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """The endless stream of training batches, from `start_step` on.

    Sample p of the stream is image permutation(seed, epoch)[p % len(records)] of epoch
    p // len(records). Batch s of rank r takes the batch_size samples from (s * world + r) *
    batch_size on. So a batch may contain the end of one epoch and the start of the next, every
    batch is full, any step can be resumed, and the stream is the same for any number of workers and
    ranks. `size` is a number, or a function of the step.
    """
    if not records:
        raise ValueError("no images to train on")
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch size {batch_size}, rank {rank} of {world}: expected >= 1, 0 <= r < w"
        )
    dataset = Dataset(
        records, seed=seed, augment=augment, keep_difficult=keep_difficult, cache=cache
    )

    def order():
        for step in itertools.count(start_step):
            first = (step * world + rank) * batch_size
            epochs = [divmod(p, len(records)) for p in range(first, first + batch_size)]
            now = size(step) if callable(size) else size
            yield [(e, int(permutation(seed, e, len(records))[i]), now) for e, i in epochs]

    return run_workers(dataset, order(), workers, pin=pin)


def ordered_batches(
    records: list[Record], size: int, *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """The records in their order, not augmented, for evaluation; the last batch may be smaller."""
    dataset = Dataset(records, augment="none")
    keys = [(0, index, size) for index in range(len(records))]
    order = (keys[i : i + batch_size] for i in range(0, len(keys), batch_size))
    return run_workers(dataset, order, workers)


# ------------------------------------------------------------------------------ on the device


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Copies a batch to the device; to a GPU while it still computes the step before."""
    return Batch(*copy_beside(batch, device))


def prepare(batch: Batch, config) -> Tensor:
    """The input of the network: (N, 3, S, S) float32, channels_last, on the device of the batch.

    Colour augmentation, then (x - mean) / std, then the order of the channels. Beside the image it
    is 0, which stands for the mean colour.
    """
    return ops.colour(
        batch.images, batch.inside, batch.colour, config.mean, config.std, config.channels
    )


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
        pictures.append(draw_boxes(Image.fromarray(image), boxes, labels, None, classes))
    return pictures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    sources.add_data_flags(parser.add_argument_group("data"))
    add("--sets", nargs="+", help="such as 2007:trainval; default: all; the sheet shows the first")
    add("--check", action="store_true", help="read and decode everything, list what is wrong")
    add("--fetch", nargs="+", metavar="NAME", help="download voc2007, voc2012 or coco2017")
    add("--to", default="data", metavar="DIR", help="folder for --fetch")
    add("--out", default="sheet.png", help="file for the sheet of augmented images")
    add("--augment", choices=AUGMENT, default="ssd", help="augmentation of the sheet")
    add("--seed", type=int, default=0, help="random numbers of the sheet")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads of --check")
    args = parser.parse_args(argv)
    check_range(args, "workers", 1)
    check_range(args, "seed", 0)
    if args.fetch:
        return fetch.main(args.fetch, args.to)
    sets = args.sets or sources.sets_there(args)
    if args.check:
        found = Findings(collect=True)
        read = {s: functools.partial(sources.open_data, args, [s], findings=found) for s in sets}
        return check.check_sets(read, found, args.workers)
    records, classes = sources.open_data(args, sets[:1])
    check_file(args.out, *(record.path for record in records))
    save_sheet(args.out, draw_batch(records, classes, args.seed, args.augment), columns=6)
    print(f"{args.out}: 24 of {len(records)} images, {len(classes)} classes, {args.augment}")
    return 0


if __name__ == "__main__":
    run_program(main)
