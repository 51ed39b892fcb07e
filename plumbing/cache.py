"""The decoded images of a data set in one memory-mapped file: `--cache DIR`."""

import contextlib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from plumbing.files import BadData, Record, decode_pixels, open_record
from plumbing.machine import free_space
from plumbing.program import Progress, make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def cache_starts(records: list[Record]) -> np.ndarray:
    """Where each decoded image starts in the cache, and the total: -> (len + 1,) int64 bytes."""
    return np.cumsum([0, *(w * h * 3 for w, h in (record.size for record in records))])


@functools.lru_cache(maxsize=8)
def memory_map(path: Path) -> np.ndarray:
    """The bytes of a file. The system reads each page from the disk when it is first used."""
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time. The system drops the lock when its holder dies.

    The first rank goes first, by half a second: cores.py lets only its messages through.
    """
    time.sleep(0.5 if int(os.environ.get("LOCAL_RANK", 0)) else 0)
    with open(path, "w") as file:
        # Without locks (Windows, some network file systems) two processes may both build the file;
        # the rename at the end keeps it whole.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_cache(records: list[Record], folder: str | Path) -> Path:
    """Decodes all images into one file, once, for all processes; -> its path.

    The file's name is a hash of the list of images. Its last 32 bytes are a hash of file sizes
    and times: when an image changes, the cache is built again. The file is renamed into place when
    it is complete, so nobody can read half of it. All workers and ranks of a machine read it
    through a memory map and share one copy in memory.
    """
    folder = make_folder(Path(folder), "--cache")
    total = int(cache_starts(records)[-1])
    files, stamp = hashlib.sha256(), hashlib.sha256()
    for record in records:
        files.update(f"{record.path.resolve()} {record.size}\n".encode("utf-8", "surrogateescape"))
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

    if is_fresh():  # without the lock: a cache may lie in a folder that is read-only
        return path
    part = path.with_suffix(".part")
    with file_lock(folder / f"{path.stem}.lock"):  # other ranks wait here for the one that builds
        if is_fresh():
            return path
        part.unlink(missing_ok=True)  # of a process that was killed: free its space
        free = free_space(folder)
        if free < total + (64 << 20):
            raise ValueError(
                f"--cache {folder}: {total / 1e9:.1f} GB needed for {len(records)} decoded images, "
                f"{free / 1e9:.1f} GB free; name another folder, or leave --cache out"
            )
        print(f"data: decoding {len(records)} images into {path}, {total / 1e9:.2f} GB, once",
              file=sys.stderr)  # fmt: skip
        progress = Progress(len(records), "decoding")
        try:
            with open(part, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
                for start in range(0, len(records), 256):  # bounds what waits to be written
                    some = records[start : start + 256]
                    for image in pool.map(
                        lambda r: decode_pixels(open_record(r), r).tobytes(), some
                    ):
                        file.write(image)
                    progress(min(start + 256, len(records)))
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
