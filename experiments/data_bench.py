"""What one core feeds: our input pipeline beside the recipe of ssd.pytorch, on the same images.

    python -m experiments.data_bench   (OMP_NUM_THREADS=1 keeps one core's work on one core)

CPU time of this process, not wall time, so that other work on the machine matters little; the
contestants take turns of eight images, and each has its median over the rounds. The pictures are
500x375 JPEGs of pink noise, about as large as the photographs of VOC2007 are. The recipe is
ours, written from its description (SSD section 2.2 as ssd.pytorch does it: float32 pixels, the
expanded canvas in full, a loop of trials), with the real OpenCV; without OpenCV it is left out.
"""

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
from plumbing.program import run_program

try:
    import cv2
except ImportError:
    cv2 = None

SIZE, MEAN_BGR = 300, np.array([104, 117, 123], np.float32)


def pink_noise(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """Amplitudes fall as 1 / frequency, as those of photographs do."""
    fy, fx = np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None]
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1 / width)
    shared = rng.normal(size=(height, width, 1))  # channels of a photograph go together
    white = shared + 0.15 * rng.normal(size=(height, width, 3))
    noise = np.fft.irfft2(np.fft.rfft2(white, axes=(0, 1)) * amplitude, (height, width), (0, 1))
    noise = noise / noise.std() * 33 + 115
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def make_records(folder: Path, count: int) -> list[data.Record]:
    rng, records = np.random.default_rng(0), []
    for i in range(count):
        image, boxes = pink_noise(rng), 1 + rng.poisson(1.5)
        image.save(folder / f"{i}.jpg", quality=90)
        side = np.array(image.size) * rng.uniform(0.1, 0.8, (boxes, 2))
        corner = rng.uniform(0, np.array(image.size) - side)
        xyxy, labels = np.concatenate([corner, corner + side], axis=1), np.ones(boxes, np.int64)
        records.append(
            data.Record(str(i), folder / f"{i}.jpg", image.size, xyxy, labels, labels == 0, labels)
        )
    return records


def overlap(boxes: np.ndarray, rectangle: np.ndarray) -> np.ndarray:
    sides = np.minimum(boxes[:, 2:], rectangle[2:]) - np.maximum(boxes[:, :2], rectangle[:2])
    inter = sides.clip(0).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return inter / (area + (rectangle[2:] - rectangle[:2]).prod() - inter)


def peer_colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """BGR float32: brightness, contrast first or last, saturation and hue in HSV, channels."""
    if rng.random() < 0.5:
        image = image + np.float32(rng.uniform(-32, 32))
    contrast_first, contrast = rng.random() < 0.5, np.float32(rng.uniform(0.5, 1.5))
    use_contrast = rng.random() < 0.5
    if contrast_first and use_contrast:
        image = image * contrast
    image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    if rng.random() < 0.5:
        image[:, :, 1] *= rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        image[:, :, 0] += rng.uniform(-18, 18)
        image[:, :, 0][image[:, :, 0] > 360] -= 360
        image[:, :, 0][image[:, :, 0] < 0] += 360
    image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if not contrast_first and use_contrast:
        image = image * contrast
    return image[:, :, rng.permutation(3)] if rng.random() < 0.5 else image


def peer_crop(image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple:
    """One sampler at a time, up to 50 trials each, until one gives a crop with a centre in it."""
    height, width, _ = image.shape
    while True:
        low = [None, 0.1, 0.3, 0.7, 0.9, -np.inf][rng.integers(6)]
        if low is None:
            return image, boxes
        for _ in range(50):
            w, h = rng.uniform(0.3 * width, width), rng.uniform(0.3 * height, height)
            if not 0.5 <= h / w <= 2:
                continue
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            rectangle = np.array([int(x), int(y), int(x + w), int(y + h)])
            if overlap(boxes, rectangle).max() < low:
                continue
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            keep = ((rectangle[:2] < centre) & (centre < rectangle[2:])).all(axis=1)
            if keep.any():
                part = image[rectangle[1] : rectangle[3], rectangle[0] : rectangle[2]]
                corner = np.tile(rectangle[:2], 2)
                return part, boxes[keep].clip(corner, np.tile(rectangle[2:], 2)) - corner


def peer(record: data.Record, rng: np.random.Generator, decoded: np.ndarray | None = None) -> tuple:
    image = cv2.imread(str(record.path)) if decoded is None else decoded
    image, boxes = peer_colour(image.astype(np.float32), rng), record.boxes_xyxy.copy()
    if rng.random() < 0.5:
        ratio, (height, width, _) = rng.uniform(1, 4), image.shape
        left, top = rng.uniform(0, width * ratio - width), rng.uniform(0, height * ratio - height)
        canvas = np.empty((int(height * ratio), int(width * ratio), 3), np.float32)
        canvas[:] = MEAN_BGR
        canvas[int(top) : int(top) + height, int(left) : int(left) + width] = image
        image, boxes = canvas, boxes + np.tile([int(left), int(top)], 2)
    image, boxes = peer_crop(image, boxes, rng)
    if rng.random() < 0.5:
        x0, y0, x1, y1 = boxes.T
        image, width = image[:, ::-1], image.shape[1]
        boxes = np.stack([width - x1, y0, width - x0, y1], axis=1)
    image = cv2.resize(np.ascontiguousarray(image), (SIZE, SIZE)) - MEAN_BGR
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1])).permute(2, 0, 1), boxes


def main(count: int = 48, rounds: int = 7) -> int:
    torch.set_num_threads(1)
    config = SimpleNamespace(mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0), channels="rgb")
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder), count)
        plain = data.Dataset(records)
        cached = data.Dataset(records, cache=Path(folder) / "cache")

        def ours(dataset, colour):
            def run(epoch, turn):
                batch = dataset.__getitems__([(epoch, i, SIZE) for i in turn])
                return data.prepare(batch, config) if colour else batch

            return run

        def theirs(pixels):
            def run(epoch, turn):
                for i in turn:
                    peer(records[i], np.random.default_rng((epoch, i)), pixels and pixels[i])

            return run

        contestants = {
            "ours from JPEG, to uint8": ours(plain, False),
            "ours from the cache, to uint8": ours(cached, False),
            "ours from JPEG, colour and mean too": ours(plain, True),
            "ours from the cache, colour and mean too": ours(cached, True),
        }
        if cv2 is not None:
            cv2.setNumThreads(0)
            contestants["ssd.pytorch's recipe from JPEG"] = theirs(None)
            decoded = [cv2.imread(str(record.path)) for record in records]
            contestants["ssd.pytorch's recipe from pixels"] = theirs(decoded)
        times = {name: np.zeros(rounds + 1) for name in contestants}
        for epoch in range(rounds + 1):
            for first in range(0, count, 8):
                for name, run in contestants.items():
                    start = time.process_time()
                    run(epoch, range(first, first + 8))
                    times[name][epoch] += time.process_time() - start
        kb = np.mean([record.path.stat().st_size for record in records]) / 1024
    print(f"{count} JPEGs of 500x375, {kb:.0f} KB each, {rounds} rounds, one core, CPU time")
    cost = {name: float(np.median(row[1:])) / count for name, row in times.items()}  # 0: warming up
    for name, seconds in cost.items():
        print(f"  {name:42} {1e3 * seconds:6.2f} ms  {1 / seconds:6.0f} images/s")
    if cv2 is None:
        print(
            "OpenCV is not installed: nothing to compare with (pip install opencv-python-headless)"
        )
        return 0
    for source in ("JPEG", "the cache"):
        theirs = cost["ssd.pytorch's recipe from JPEG"]
        pixels = cost["ssd.pytorch's recipe from pixels"]
        for rest in ("to uint8", "colour and mean too"):
            mine = cost[f"ours from {source}, {rest}"]
            print(f"from {source}, {rest}: {theirs / mine:.1f} times the recipe from JPEG, "
                  f"{pixels / mine:.1f} times the recipe from decoded pixels")  # fmt: skip
    return 0


if __name__ == "__main__":
    run_program(main)
