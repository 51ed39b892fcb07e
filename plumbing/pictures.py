"""Pictures with boxes, and sheets of pictures."""

import colorsys
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.files import (
    SUFFIXES,
    Record,
    decode_pixels,
    exif_orientation,
    open_image,
    open_record,
    to_rgb,
)  # fmt: skip
from plumbing.program import make_folder

GREEN, ORANGE = (0, 158, 60), (245, 130, 0)  # ground truth, detections
MARK = "drawn by ScratchDet"  # in the files that we draw: only those may be drawn again
MARKED = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "JPEG2000", "AVIF")  # formats that can hold it
CROWD = 8  # with so many boxes or more, colours and a legend replace the names


def class_colour(label: int) -> tuple[int, int, int]:
    """A colour per class; class 1 is orange. Classes that follow each other differ strongly."""
    hue = (0.089 + (label - 1) * 0.381966) % 1.0  # the golden angle
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 1.0, 0.92))


def letters(size: int):
    """A font of this height in pixels."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType
        return ImageFont.load_default()


def printable(text: str, font) -> str:
    """The text, with ? for what an old font without TrueType has not."""
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")


def draw_boxes(
    image: Image.Image, boxes_xyxy: np.ndarray, labels: np.ndarray, scores: np.ndarray | None,
    classes: Sequence[str], *, crowded: bool | None = None,
) -> Image.Image:  # fmt: skip
    """A copy of the picture with boxes in pixels, as RGB.

    Without scores (None) they are ground truth: green, with the name at the bottom. Detections are
    orange, with name and score at the top. If they are `crowded`, each class has a colour and a
    legend below the picture names it; None: if they are many, or most too small for their names.
    """
    image = image.convert("RGB").copy()
    pen, size = ImageDraw.Draw(image), max(11, max(image.size) // 34)
    font, truth = letters(size), scores is None
    boxes_xyxy = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    order = range(len(labels)) if truth else np.argsort(scores)  # the best comes on top
    classes = [printable(name, font) for name in classes]
    texts = [classes[label - 1] + ("" if truth else f" {scores[i]:.2f}")
             for i, label in enumerate(labels)]  # fmt: skip
    widths = np.array([pen.textlength(text, font=font) + 4 for text in texts])
    if crowded is None:
        narrow = widths > 1.6 * (boxes_xyxy[:, 2] - boxes_xyxy[:, 0])
        crowded = len(labels) >= CROWD or narrow.sum() > len(labels) / 2
    legend = crowded and not truth
    for i in order:
        x0, y0, x1, y1 = boxes_xyxy[i].tolist()
        colour = GREEN if truth else class_colour(int(labels[i])) if legend else ORANGE
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=1 + size // 8)
    if legend:
        return with_legend(image, labels, classes, font, size)
    if crowded:
        return image
    taken: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:  # the best has the first choice of a place
        x0, y0, _, y1 = boxes_xyxy[i].tolist()
        left, top, right, bottom = pen.textbbox((0, 0), texts[i], font=font)
        w, h = right - left + 4, bottom - top + 4
        x = max(0, min(x0, image.width - w))
        y = max(0, min(y1 - h if truth else y0 - h, image.height - h))
        free = free_place(taken, x, y, w, h, up=truth)  # further into its box
        y = free if 0 <= free <= image.height - h else y
        taken.append((x, y, x + w, y + h))
        pen.rectangle((x, y, x + w, y + h), fill=GREEN if truth else ORANGE)
        pen.text((x + 2 - left, y + 2 - top), texts[i], fill="white" if truth else "black",
                 font=font)  # fmt: skip
    return image


def free_place(taken: Sequence[tuple], x: float, y: float, w: float, h: float, up: bool) -> float:
    """The y of a plate of w x h, moved down or up until it lies on none of those `taken` (xyxy)."""
    for x0, y0, x1, y1 in sorted(taken, key=lambda place: place[1], reverse=up):
        if x0 < x + w and x < x1 and y0 < y + h and y < y1:
            y = y0 - h if up else y1
    return y


def with_legend(image: Image.Image, labels: np.ndarray, classes: Sequence[str], font, size: int):
    """The picture with a strip below it: colour, name and number of the boxes of each class."""
    found, counts = np.unique(labels, return_counts=True)
    entries, x, row, height = [], 4, 0, size + 8
    measure = ImageDraw.Draw(image)
    for label, count in zip(found.tolist(), counts.tolist(), strict=True):
        text = f"{classes[label - 1]} {count}"
        wide = size + 4 + measure.textlength(text, font=font) + 12
        if x > 4 and x + wide > image.width:
            x, row = 4, row + 1
        entries.append((x, row * height, class_colour(label), text))
        x += wide
    whole = Image.new("RGB", (image.width, image.height + (row + 1) * height), "white")
    whole.paste(image)
    pen = ImageDraw.Draw(whole)
    for x, y, colour, text in entries:
        y += image.height + 4
        pen.rectangle((x, y, x + size, y + size), fill=colour)
        pen.text((x + size + 4, y), text, fill="black", font=font)
    return whole


def save_sheet(path: str | Path, pictures: Sequence[Image.Image], columns: int) -> None:
    """Writes one picture that shows many, in columns 300 pixels wide."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: expected the name of a picture, such as sheet.png")
    side, gap = 300, 4
    heights = [0] * min(columns, max(1, len(pictures)))
    places = []
    for picture in pictures:
        picture = picture.resize((side, max(1, round(side * picture.height / picture.width))))
        column = heights.index(min(heights))  # the shortest so far, which wastes the least space
        places.append((picture, column * (side + gap), heights[column]))
        heights[column] += picture.height + gap
    size = len(heights) * (side + gap) - gap, max(1, max(heights) - gap)
    sheet = Image.new("RGB", size, "white")
    for picture, x, y in places:
        sheet.paste(picture, (x, y))
    sheet.save(path)


def draw_found(record: Record, found, classes: Sequence[str], min_score: float) -> Image.Image:
    """The picture of a record: ground truth green, `Detections` from min_score on orange."""
    image = decode_pixels(open_record(record), record)
    image = draw_boxes(image, record.boxes_xyxy, record.labels, None, classes)
    boxes, scores, labels = found.above(min_score)
    return draw_boxes(image, boxes, labels, scores, classes)


# ------------------------------------------------------------------------------ users' pictures


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """A PIL picture of any mode, or an array (h,w), (h,w,1), (h,w,3) or (h,w,4) of uint8 -> RGB."""
    if isinstance(image, np.ndarray):
        array = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
            raise ValueError(
                f"an array {image.shape} of {image.dtype}: expected a picture (h,w), (h,w,3) RGB "
                "or (h,w,4) RGBA of uint8, 0 to 255"
            )
        if not array.size:
            raise ValueError(f"an array {image.shape}: an empty picture; expected 1x1 or more")
        image = Image.fromarray(np.ascontiguousarray(array))
    if not isinstance(image, Image.Image):
        raise ValueError(f"a picture of type {type(image).__name__}: expected PIL or NumPy")
    if 0 in image.size:
        raise ValueError(f"an empty picture, {image.width}x{image.height}; expected 1x1 or more")
    image.load()  # decodes it; a truncated file fails here
    return to_rgb(image)


def upright(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, turned as its EXIF says.

    ImageOps.exif_transpose would rewrite the whole EXIF, and fail if any other tag is broken.
    """
    how = Image.Transpose
    turns = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
             6: how.ROTATE_270, 7: how.TRANSVERSE, 8: how.ROTATE_90}  # fmt: skip
    image.load()  # Pillow turns a TIFF here
    turn, image = turns.get(exif_orientation(image)), to_rgb(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # its EXIF would turn it once more
    return turned


def open_picture(path: Path) -> Image.Image:
    """A user's picture, upright; says so if it is the first of several frames."""
    image = open_image(path)
    # The further pictures of a telephone's JPEG (MPO) are previews and depths of the same one.
    try:
        many = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged; the first one may be whole
        many = 1
    if many > 1:
        print(f"{path}: only the first of {many} frames", file=sys.stderr)
    return upright(open_image(path))  # from the start: counting may have moved on


def drawing_folder(
    path: str | Path, pictures: Sequence[Path], names: Iterable[str], flag: str = "--draw"
) -> Path:
    """Makes the folder for drawn pictures of these names.

    Refuses the folder that holds the original pictures, and one where a name is taken by a file
    that we did not draw.
    """
    if not str(path):
        raise ValueError(f"{flag} '': expected the name of a folder, such as drawn/")
    folder = Path(path)
    real = os.path.realpath  # as Path.resolve, but a link in a circle is no error
    places = [(real(path.parent), os.path.dirname(real(path))) for path in pictures]
    if any(real(folder) in place for place in places):
        raise ValueError(f"{flag} {path}: the pictures are there and would be overwritten")
    make_folder(folder, flag)
    for name in names:
        drawing_path(folder / name, flag)
    return folder


def drawing_path(path: Path, flag: str = "--draw") -> Path:
    """Where a drawing goes: `path`, with a name that the system allows.

    ValueError where that is a link, or a file without our mark: somebody's original.
    """
    if len(os.fsencode(path.name)) > 255:  # the end of it, behind a number that is its own
        end = os.fsencode(path.name)[-200:].decode(sys.getfilesystemencoding(), "ignore")
        path = path.with_name(f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}_{end}")
    if path.is_symlink():
        raise ValueError(f"{flag} {path.parent}: {path.name} there is a link; choose another")
    if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()):
        raise ValueError(
            f"{flag} {path.parent}: {path.name} there was not drawn by this program and would be "
            "overwritten; choose another folder"
        )
    return path


def save_drawn(picture: Image.Image, path: Path, flag: str = "--draw", **options) -> None:
    """Saves a drawn picture with our mark; `options` of PIL's save."""
    exif = Image.Exif()
    exif[0x0131] = MARK  # "software"
    # These have no EXIF in Pillow. Elsewhere not: a JPEG keeps its comment when somebody edits it.
    if Image.registered_extensions().get(path.suffix.lower()) in ("GIF", "JPEG2000"):
        options["comment"] = MARK
    picture.save(drawing_path(path, flag), exif=exif, **options)


def find_pictures(names: list[str]) -> list[Path]:
    """The pictures named, and those inside the folders named, without hidden files."""
    pictures = []
    for name in names:
        path = Path(name)
        if not name:
            raise ValueError("PICTURE|FOLDER '': no name; expected a picture or a folder")
        if not path.exists():
            raise ValueError(f"{name}: no such picture or folder")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        # Only a folder is filtered by suffix: whoever names a file means it.
        inside = [p for p in inside if not p.name.startswith(".") or not path.is_dir()]
        folders = {p for p in inside if p.is_dir()}
        some = [p for p in inside if p.suffix.lower() in SUFFIXES or not path.is_dir()]
        some = [p for p in some if p not in folders]
        left = f"{len(folders)} folder{'s' * (len(folders) > 1)} inside left out"
        if not some:
            more = f"; {left}: name them, such as {min(folders)}" if folders else ""
            raise ValueError(f"{name}: no picture there ({' '.join(sorted(SUFFIXES))}){more}")
        if folders:
            print(f"{name}: {left}: {' '.join(sorted(p.name for p in folders))}", file=sys.stderr)
        others = Counter(p.suffix for p in set(inside) - set(some) if p.is_file())
        if others:
            what = f"{others.total()} files left out, which are no pictures by their suffix"
            print(f"{name}: {what}: {' '.join(sorted(others))}", file=sys.stderr)
        pictures += some
    return pictures


def names_to_draw(pictures: list[Path]) -> dict[Path, str]:
    """A file name for each drawn picture, all different: its own, where several have it with the
    folders above. Where its format cannot hold our mark, .jpg is added."""
    own, names, used = Counter(path.name for path in pictures), {}, set()
    for path in dict.fromkeys(pictures):
        parts, all_parts = 1 if own[path.name] == 1 else 2, path.absolute().parts[1:]
        kind = Image.registered_extensions().get(path.suffix.lower())
        end = "" if kind in MARKED else ".jpg"
        while (name := "_".join(all_parts[-parts:]) + end) in used and parts < len(all_parts):
            parts += 1
        names[path] = name
        used.add(name)
    return names
