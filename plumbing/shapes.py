"""The default data set: pictures of drawn shapes, written as a real VOC tree.

Six classes on textured backgrounds, 1 to 6 objects per image. Colours and textures are random, so
only the outline tells the class.
"""

import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from plumbing.cache import file_lock
from plumbing.program import Progress

SHAPE_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")


def outline(shape: str) -> np.ndarray:
    """Corners of a shape that fills the unit square: (K, 2)."""
    count = {"square": 4, "triangle": 3, "star": 10, "cross": 12}.get(shape, 48)
    angle = 2 * np.pi * np.arange(count) / count - np.pi / (4 if shape == "square" else 2)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # on the unit circle, (K, 2)
    if shape == "star":
        points[1::2] *= 0.45
    if shape == "cross":
        arm = np.array([[-0.33, -1], [0.33, -1], [0.33, -0.33]])
        turn = np.array([[0, 1], [-1, 0]])  # by 90 degrees
        points = np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])
    return (points - points.min(axis=0)) / np.ptp(points, axis=0)


def texture(width: int, height: int, around: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A gradient, stripes, checks or clouds of two colours, one on each side of `around`."""
    kind, angle, period = rng.integers(4), rng.uniform(0, np.pi), rng.uniform(8, 24)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))  # (height, width)
    if kind == 0:
        mask = (u - u.min()) * (255 / np.ptp(u))
    elif kind == 1:
        mask = np.sin(u * np.float32(2 * np.pi / period)) > 0
    elif kind == 2:
        v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        wave = np.float32(2 * np.pi / period)
        mask = (np.sin(u * wave) > 0) ^ (np.sin(v * wave) > 0)
    else:
        mask = rng.integers(0, 256, (5, 5), dtype=np.uint8)
    mask = np.uint8(255) * mask if mask.dtype == bool else mask.astype(np.uint8)
    mask = Image.fromarray(mask).resize((width, height), Image.Resampling.BICUBIC)
    apart = rng.uniform(-12, 12, 3)
    two = [tuple((around + sign * apart).clip(0, 255).astype(int).tolist()) for sign in (1, -1)]
    return Image.composite(*(Image.new("RGB", (width, height), colour) for colour in two), mask)


def lay_out(sides: np.ndarray, width: int, height: int, rng: np.random.Generator):
    """Places boxes with these longer sides, one after another; None if there is no room for one."""
    boxes, covered = np.zeros((0, 4)), np.zeros(0)  # covered: the share that later boxes hide
    for side in sides:
        onto = len(boxes) > 0 and rng.random() < 0.26  # whether it lies partly on an earlier one
        aspect = np.exp(rng.uniform(-0.15, 0.15))
        w, h = np.round(side * min(1, aspect)), np.round(side * min(1, 1 / aspect))
        corner = np.floor(rng.uniform(2, [width - w - 1, height - h - 1], (80, 2)))
        tries = np.concatenate([corner, corner + (w, h)], axis=1)  # (80, 4)
        gap = 0 if onto else 3
        inter = np.minimum(tries[:, None, 2:], boxes[:, 2:] + gap)
        inter = (inter - np.maximum(tries[:, None, :2], boxes[:, :2] - gap)).clip(0).prod(2)
        if onto:
            hides = inter / (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (80, G)
            good = (covered + hides <= 0.5).all(1) & (inter.max(1) >= 0.15 * w * h)
        else:
            good = ~inter.any(1)
        if not good.any():
            return None
        best = good.argmax()
        covered = np.append(covered + hides[best] if onto else covered, 0.0)
        boxes = np.concatenate([boxes, tries[best : best + 1]])
    return boxes


def place(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """1 to 6 boxes in an image, the largest first: (G, 4) xyxy, whole pixels.

    The longer side is log-uniform from 20 to 220 px. Boxes are 3 px or more apart, but about every
    fifth lies partly on an earlier one, of which at least half stays uncovered.
    """
    how_many = rng.integers(1, 7, 2).max()  # more boxes per image need fewer images to learn from
    sides = np.sort(20 * 11 ** rng.random(how_many))[::-1]  # (G,)
    for attempt in itertools.count(1):
        boxes = lay_out(sides, width, height, rng)
        if boxes is not None:
            return boxes
        if attempt % 20 == 0:  # hardly any room: make the largest smaller
            sides = np.sort(np.append(sides[1:], max(20.0, sides[0] * 0.9)))[::-1]


def draw_image(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """One picture of shapes: image, boxes (G, 4) xyxy in whole pixels, labels (G,)."""
    width, height = ((300, 300), (320, 280), (280, 320), (340, 265), (265, 340))[rng.integers(5)]
    boxes = place(width, height, rng)
    labels = rng.integers(1, len(SHAPE_CLASSES) + 1, len(boxes))
    ground = rng.uniform(40, 216, 3)
    image = texture(width, height, ground, rng)
    used = [ground]
    for (x0, y0, x1, y1), label in zip(boxes.astype(int).tolist(), labels, strict=True):
        w, h, shape = x1 - x0, y1 - y0, SHAPE_CLASSES[label - 1]
        colours = rng.uniform(0, 255, (32, 3))  # take the first that differs from all others
        apart = np.abs(colours[:, None] - np.array(used)).max(axis=2).min(axis=1)  # (32,)
        used.append(colour := colours[(apart > 120).argmax()])
        mask = Image.new("L", (w, h))
        pen = ImageDraw.Draw(mask)
        pen.polygon((outline(shape) * (w - 1, h - 1)).ravel().tolist(), fill=255)
        if shape == "ring":
            pen.ellipse([0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h], fill=0)
        image.paste(texture(w, h, colour, rng), (x0, y0), mask)
    grain = Image.fromarray(rng.integers(0, 13, (height, width), dtype=np.uint8))
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), offset=-6), boxes, labels


def draw_shapes(
    folder: str | Path, *, num_train: int = 2000, num_test: int = 300, seed: int = 0
) -> Path:
    """Draws the default data set, if it is not there -> its root, for `read_voc(root, [...])`.

    A VOC tree with the sets 2007:train and 2007:test, from different seeds. A box surrounds the
    whole shape, covered parts included, in pixel edges (xmax - xmin is the width).
    """
    root = Path(folder) / f"shapes-4-{num_train}-{num_test}-{seed}"  # 4: version of the drawing
    if root.is_dir():
        return root
    Path(folder).mkdir(parents=True, exist_ok=True)
    print(f"data: drawing {num_train} + {num_test} images of shapes into {root}", file=sys.stderr)
    with file_lock(Path(folder) / ".lock"):  # one rank draws, the others wait here
        if root.is_dir():
            return root
        part = Path(tempfile.mkdtemp(prefix=".shapes-", dir=folder))  # renamed when it is complete
        for split, (name, count) in enumerate((("train", num_train), ("test", num_test))):
            draw_set(part / "VOC2007", name, count, (seed, split))
        try:
            os.rename(part, root)
        except OSError:  # without locks another process may have made it meanwhile
            shutil.rmtree(part)
            if not root.is_dir():
                raise
    return root


def draw_set(tree: Path, name: str, count: int, seed: tuple[int, int]) -> None:
    """Draws `count` pictures into a VOC tree, as the set `name`."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    ids, progress = [f"{name}{i:05d}" for i in range(count)], Progress(count, f"drawing {name}")
    (tree / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    for i, image_id in enumerate(ids):
        image, boxes, labels = draw_image(np.random.default_rng((*seed, i)))
        image.save(tree / "JPEGImages" / f"{image_id}.jpg", quality=90)
        objects = "".join(
            f"  <object>\n    <name>{SHAPE_CLASSES[label - 1]}</name><difficult>0</difficult>\n"
            f"    <bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            "</bndbox>\n  </object>\n"
            for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True)
        )
        (tree / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation>\n  <filename>{image_id}.jpg</filename>\n"
            f"  <size><width>{image.width}</width><height>{image.height}</height>"
            f"<depth>3</depth></size>\n{objects}</annotation>\n"
        )
        progress(i + 1)
