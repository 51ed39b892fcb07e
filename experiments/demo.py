"""Draw pictures to try the photo detector on: an aeroplane, and a television in a room.

    python -m experiments.demo                   demo/aeroplane.jpg, demo/room.jpg
    python detect.py demo/ --draw drawn/

They are drawings, not photographs, so nobody's terms are in the way. That a network which has only
seen photographs finds something in them is luck of the kind that one may show in a lecture.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from plumbing.program import run_program

WIDTH, HEIGHT = 500, 375
FINER = 2  # drawn at twice the size and shrunk, so that edges are smooth


class Canvas:
    """A picture whose background runs from one colour at the top to another at the bottom."""

    def __init__(self, top: tuple, bottom: tuple):
        down = np.linspace(0, 1, HEIGHT * FINER)[:, None, None]
        rows = (1 - down) * np.array(top) + down * np.array(bottom)
        pixels = np.repeat(rows, WIDTH * FINER, axis=1).astype(np.uint8)
        self.image = Image.fromarray(pixels)
        self.pen = ImageDraw.Draw(self.image)

    def shape(self, fill: tuple, *points: tuple[float, float]) -> None:
        self.pen.polygon([(x * FINER, y * FINER) for x, y in points], fill=fill)

    def box(self, fill: tuple, *xyxy: float, corner: float = 0) -> None:
        self.pen.rounded_rectangle([v * FINER for v in xyxy], corner * FINER, fill=fill)

    def oval(self, fill: tuple, *xyxy: float) -> None:
        self.pen.ellipse([v * FINER for v in xyxy], fill=fill)

    def photograph(self, seed: int) -> Image.Image:
        """The picture as a camera would have it: a little blurred, with noise."""
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        pixels = np.asarray(small.filter(ImageFilter.GaussianBlur(0.6))).astype(float)
        pixels += np.random.default_rng(seed).normal(0, 4, pixels.shape[:2])[..., None]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def aeroplane() -> Image.Image:
    c = Canvas((88, 140, 205), (190, 215, 235))
    c.shape((150, 155, 165), (230, 190), (150, 290), (185, 290), (300, 195))  # wings
    c.shape((180, 185, 195), (250, 170), (225, 95), (250, 95), (310, 172))
    c.shape((200, 60, 50), (95, 175), (60, 105), (92, 105), (150, 172))  # tail
    c.shape((150, 155, 165), (90, 185), (55, 205), (75, 207), (130, 192))
    c.oval((225, 228, 232), 80, 158, 430, 208)
    c.shape((225, 228, 232), (78, 182), (70, 165), (160, 160), (160, 205))
    c.box((60, 90, 160), 120, 190, 400, 196)
    for x in range(130, 390, 14):
        c.oval((70, 80, 100), x, 173, x + 6, 181)
    c.shape((40, 50, 70), (405, 172), (424, 178), (420, 184), (402, 180))
    return c.photograph(seed=0)


def room() -> Image.Image:
    c = Canvas((205, 195, 180), (190, 178, 160))
    c.box((120, 85, 55), 0, 290, 500, 375)  # floor, table
    c.box((90, 60, 40), 150, 270, 420, 285)
    for x in (165, 390):
        c.box((80, 52, 35), x, 285, x + 15, 340)
    c.box((25, 25, 28), 190, 120, 380, 250, corner=5)  # television
    c.box((60, 95, 140), 200, 130, 370, 236)
    c.box((85, 125, 170), 200, 130, 290, 180)
    c.box((30, 30, 33), 265, 250, 305, 262)
    c.box((30, 30, 33), 240, 262, 330, 271)
    return c.photograph(seed=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="demo", metavar="DIR", help="default: demo")
    folder = Path(parser.parse_args(argv).out)
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (aeroplane, room):
        draw().save(folder / f"{draw.__name__}.jpg", quality=92)
    print(f"{folder}/aeroplane.jpg, {folder}/room.jpg: python detect.py {folder}/ --draw drawn/")


if __name__ == "__main__":
    run_program(main)
