"""A film as a stream of JPEG pictures (motion JPEG), as `ffmpeg -f mjpeg -` writes it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA  # markers: start and end of an image, start of a scan
MAX_FRAME = 256 << 20  # bytes; a frame without an end would fill the memory


def split_jpegs(stream: BinaryIO) -> Iterator[bytes]:
    """The JPEG files in a stream, one after another; bytes between them are skipped.

    It follows the markers, so a preview inside a picture's header is not mistaken for a picture. If
    the stream ends inside a picture, the part is returned and the decoder reports it.
    """
    data, start = b"", 0
    while True:
        found = data.find(b"\xff\xd8\xff", start)
        end = end_of_jpeg(data, found) if found >= 0 else -1
        if end > 0:
            yield data[found:end]
            start = end
            continue
        data, start = data[found if found >= 0 else max(start, len(data) - 2) :], 0
        more = stream.read1(1 << 16) if hasattr(stream, "read1") else stream.read(1 << 16)
        if not more or len(data) > MAX_FRAME:
            if data.startswith(b"\xff\xd8\xff"):
                yield data
            return
        data += more


def end_of_jpeg(data: bytes, start: int) -> int:
    """The position after the JPEG that begins at `start`, or -1 if `data` ends before it does."""
    at = start + 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # not a marker, or a fill byte: the next one
            at += 1
        elif marker == EOI:
            return at + 2
        elif marker == 0 or 0xD0 <= marker <= SOI or marker == 1:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == SOS:  # coded pixels: FF is followed by 00 or a restart marker
                while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
                    if data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7:
                        break
                    at += 2
                if at < 0:
                    return -1
    return at + 2 if data[at : at + 2] == b"\xff\xd9" else -1


@contextlib.contextmanager
def film_writer(path: str | None) -> Iterator[Callable[[Image.Image], None]]:
    """`with film_writer(path) as add:` each add(picture) writes a frame of motion JPEG.

    The first one opens the file, so a stream without a frame empties no older film.
    """
    with contextlib.ExitStack() as stack:
        files: list[BinaryIO] = []

        def add(picture: Image.Image) -> None:
            if not files:
                files.append(stack.enter_context(open(path, "wb")))
            picture.save(files[0], "JPEG", quality=90)

        yield add
