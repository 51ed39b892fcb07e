"""Draw pictures to try the photo detector on: an aeroplane, a room, the sea, a street.

    python -m experiments.demo                   demo/aeroplane.jpg, demo/room.jpg, ...
    python detect.py demo/ --draw drawn/

They are drawings, not photographs, so nobody's terms are in the way. A network that has seen only
photographs finds something in most of them, and not in all.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from plumbing.pictures import drawing_folder, save_drawn
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


def aeroplane() -> tuple[Image.Image, list]:
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
    return c.photograph(seed=0), [("aeroplane", (55, 95, 430, 290))]


def room() -> tuple[Image.Image, list]:
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
    return c.photograph(seed=2), [("tvmonitor", (190, 120, 380, 271))]


def sea() -> tuple[Image.Image, list]:
    c, rng = Canvas((120, 165, 215), (215, 225, 232)), np.random.default_rng(3)
    for y in range(210, 375, 3):  # darker towards us
        c.box((110 - y // 6, 140 - y // 6, 160 - y // 7), 0, y, 500, y + 3)
    c.shape((235, 235, 235), (120, 250), (390, 245), (350, 290), (160, 290))  # hull
    c.box((160, 40, 40), 140, 258, 372, 264)
    c.shape((215, 215, 210), (180, 246), (190, 215), (260, 213), (268, 246))
    for x in (196, 216, 236):
        c.box((50, 60, 75), x, 222, x + 13, 234)
    c.box((110, 90, 70), 250, 70, 254, 246)  # mast, sails
    c.shape((245, 243, 238), (258, 75), (258, 235), (350, 232))
    c.shape((238, 236, 230), (246, 90), (246, 230), (175, 228))
    for x, y, length in rng.integers((0, 225, 6), (500, 370, 26), (220, 3)).tolist():
        c.box((150, 175, 195), x, y, x + length, y + 1)
    return c.photograph(seed=3), [("boat", (120, 70, 390, 290))]


def street() -> tuple[Image.Image, list]:
    c = Canvas((150, 185, 220), (220, 228, 232))
    for x in range(0, 500, 90):  # houses
        top = 40 + x * 7 % 60
        c.box((120 + x * 3 % 60, 105 + x * 5 % 50, 95), x, top, x + 85, 240)
        for y in range(top + 20, 220, 32):
            for left in range(x + 10, x + 75, 24):
                c.box((70, 80, 95), left, y, left + 13, y + 18)
    c.box((105, 105, 108), 0, 235, 500, 375)
    c.box((160, 158, 152), 0, 232, 500, 250)
    c.shape((170, 30, 35), (70, 270), (110, 268), (145, 232), (245, 232), (285, 266), (335, 275),
            (340, 310), (65, 310))  # fmt: skip
    c.shape((50, 65, 80), (122, 266), (150, 239), (192, 239), (192, 266))
    c.shape((55, 70, 85), (200, 239), (240, 239), (268, 266), (200, 266))
    for x in (120, 285):
        c.oval((25, 25, 28), x - 26, 284, x + 26, 336)
        c.oval((170, 172, 176), x - 13, 297, x + 13, 323)
    c.oval((205, 160, 130), 408, 150, 436, 184)  # somebody
    c.box((50, 35, 25), 407, 147, 437, 164, corner=8)
    for x in (386, 444):
        c.box((40, 72, 128), x, 190, x + 14, 262, corner=7)
        c.oval((205, 160, 130), x - 1, 258, x + 15, 274)
    c.box((45, 80, 140), 396, 186, 448, 268, corner=14)
    for x in (400, 424):
        c.box((40, 42, 50), x, 258, x + 20, 348, corner=6)
        c.box((20, 20, 20), x - 3, 344, x + 22, 352)
    return c.photograph(seed=1), [("car", (65, 232, 340, 336)), ("person", (385, 147, 460, 352))]


SCENES = (aeroplane, room, sea, street)  # each: a picture, [(class, box)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="demo", metavar="DIR", help="default: demo")
    names = [f"{scene.__name__}.jpg" for scene in SCENES]
    folder = drawing_folder(parser.parse_args(argv).out, [], names, "--out")
    for scene, name in zip(SCENES, names, strict=True):
        save_drawn(scene()[0], folder / name, "--out", quality=92)
    print(f"{len(SCENES)} pictures in {folder}/: python detect.py {folder}/ --draw drawn/")


if __name__ == "__main__":
    run_program(main)
