"""Download a data set: python data.py --fetch voc2007 voc2012 --to DIR.

    DIR/NAME.part    being downloaded; the same command continues where it stopped
    DIR/NAME         downloaded and checked; an archive that you put there yourself is used and kept
    DIR/.NAME.done   says that it was unpacked into DIR/VOCdevkit or DIR/coco, and then removed

VOC's archives are compared with their published MD5. COCO publishes none: there the length and the
checksums inside the zip file are checked. Whatever an archive says, nothing is unpacked outside of
DIR, no links, and not much more than the size of the data set.
"""

import hashlib
import http.client
import os
import re
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple
from zlib import error as zlib_error

from plumbing.files import stays_inside
from plumbing.machine import free_space
from plumbing.program import duration


class Archive(NamedTuple):
    """One file to download."""

    name: str
    folder: str  # of DIR, to unpack into
    urls: tuple[str, ...]  # tried in this order
    size: int  # bytes
    unpacked: int  # bytes
    md5: str = ""
    only: str = ""  # regular expression: unpack the members whose names begin like this


class NotTheData(ValueError):
    """The download is damaged, or it is another file."""


class Source(NamedTuple):
    """The archives behind a name on the command line, and their licence."""

    licence: str
    archives: tuple[Archive, ...]


VOC_LICENCE = (
    "The pictures are from Flickr and fall under its terms of use; the annotations are for research"
    " (http://host.robots.ox.ac.uk/pascal/VOC/)"
)


def voc_archive(year: int, name: str, size: int, md5: str) -> Archive:
    urls = (
        f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
        f"https://pjreddie.com/media/files/{name}",  # a mirror
    )
    return Archive(name, ".", urls, size, unpacked=int(1.1 * size), md5=md5)


def coco_archive(path: str, size: int, unpacked: int, only: str = "") -> Archive:
    url = f"http://images.cocodataset.org/{path}"
    return Archive(path.rpartition("/")[2], "coco", (url,), size, unpacked, only=only)


SOURCES = {
    "voc2007": Source(
        VOC_LICENCE,
        (
            voc_archive(2007, "VOCtrainval_06-Nov-2007.tar", 460_032_000,
                        "c52e279531787c972589f7e41ab4ae64"),
            voc_archive(2007, "VOCtest_06-Nov-2007.tar", 451_020_800,
                        "b6e924de25625d8de591ea690078ad9f"),
        ),
    ),
    "voc2012": Source(
        VOC_LICENCE,
        (
            voc_archive(2012, "VOCtrainval_11-May-2012.tar", 1_999_639_040,
                        "6cd6e144f989b92b3379bac3b3de84fd"),
        ),
    ),
    "coco2017": Source(
        "The annotations are under CC BY 4.0; the pictures are from Flickr and fall under its terms"
        " of use (https://cocodataset.org/#termsofuse)",
        (
            coco_archive("annotations/annotations_trainval2017.zip", 252_907_541, 500_000_000,
                         only="annotations/instances_"),
            coco_archive("zips/val2017.zip", 815_585_330, 850_000_000),
            coco_archive("zips/train2017.zip", 19_336_861_798, 20_000_000_000),
        ),
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ the command


def main(
    names: Sequence[str], folder: str | Path, *, sources: dict[str, Source] = SOURCES,
    wait: float = 1.0,
) -> int:  # fmt: skip
    """Downloads, checks and unpacks these data sets -> exit status 0. ValueError says what went
    wrong; the same command continues where it stopped. `wait`: seconds before the second try."""
    folder, names = Path(folder), list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in sources]:
        raise ValueError(f"--fetch {' '.join(unknown)}: expected {', '.join(sources)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archives = [a for name in names for a in sources[name].archives]
        todo = [archive for archive in archives if not done(archive, folder).exists()]
        for name in names:
            size = sum(archive.size for archive in sources[name].archives)
            print(f"{name}: {size / 1e9:.2f} GB to download. {sources[name].licence}.")
        check_space(todo, folder)
        for archive in archives:
            if archive in todo:
                path = folder / archive.name
                if own := not path.exists():
                    download(archive, folder, wait)
                else:
                    check_md5(archive, path)
                unpack(archive, path, folder / archive.folder)
                done(archive, folder).touch()
                if own:
                    path.unlink()
                else:
                    print(f"{path} was there before and is kept; it is not needed any more")
            else:
                print(f"{archive.name}: is there")
    except OSError as error:
        raise ValueError(
            f"--to {folder}: {error.strerror or error}. The same command goes on where it stopped"
        ) from None
    there = [n for n, s in sources.items() if all(done(a, folder).exists() for a in s.archives)]
    print(f"\nTrain on it:\n    {training_command(names, there, folder)}")
    return 0


def training_command(names: Sequence[str], there: Sequence[str], folder: Path) -> str:
    """The command that trains on the data sets asked for. `there`: all that were ever fetched."""
    if "coco2017" in names:
        return f"python train.py --coco-root {quoted(folder / 'coco')}"
    command = f"python train.py --voc-root {quoted(folder / 'VOCdevkit')}"
    if "voc2007" in there and "voc2012" in there:
        return command
    if "voc2012" in there:  # its test set has no public annotations
        return f"{command} --train-sets 2012:train --eval-sets 2012:val"
    return f"{command} --train-sets 2007:trainval"


def quoted(path: Path) -> str:
    return str(path) if re.fullmatch(r"[\w./~-]+", str(path)) else f'"{path}"'


def done(archive: Archive, folder: Path) -> Path:
    """The file that says that an archive was unpacked."""
    return folder / f".{archive.name}.done"


def check_space(todo: Sequence[Archive], folder: Path) -> None:
    """ValueError if the disk is too small. Each archive is removed as soon as it is unpacked."""
    if not todo:
        return
    parts = (folder / f"{a.name}{end}" for a in todo for end in ("", ".part"))
    needed = sum(a.unpacked for a in todo) + max(a.size for a in todo) - sum(map(size_of, parts))
    free = free_space(folder)
    if free < needed:
        raise ValueError(
            f"--to {folder}: {needed / 1e9:.1f} GB needed to download and unpack, {free / 1e9:.1f} "
            "GB free. Name another folder"
        )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# ------------------------------------------------------------------------------ download


class Progress:
    """One live line on a terminal; elsewhere a line every half minute."""

    def __init__(self, what: str, total: int, start: int):
        self.what, self.total, self.start = what, total, start
        self.begin = self.said = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if now - self.said < (0.5 if self.live else 30) and not last:
            return
        self.said = now
        rate = (done - self.start) / max(1e-9, now - self.begin)
        left = round(max(0, self.total - done) / rate) if rate > 0 else 0
        line = f"{self.what}  {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB  "
        line += f"{rate / 1e6:.1f} MB/s  ETA {duration(left)}"
        print(f"\r{line}  " if self.live else line, file=sys.stderr, flush=True,
              end="" if self.live and not last else "\n")  # fmt: skip


def download(archive: Archive, folder: Path, wait: float) -> None:
    """Downloads and checks DIR/NAME. Continues a part that is there. Tries again if the connection
    breaks, and the next address if one fails."""
    part, faults = folder / f"{archive.name}.part", []
    for url in archive.urls:
        fruitless = tries = 0
        while fruitless < 5 and tries < 1000:
            before = size_of(part)
            try:
                if continue_download(archive, url, part):
                    check_md5(archive, part)
                    os.replace(part, folder / archive.name)
                    return
                fault = f"the connection broke after {size_of(part):,} bytes"
            except NotTheData as error:
                part.unlink(missing_ok=True)
                fault = str(error)
                break
            except urllib.error.HTTPError as error:
                fault = f"HTTP {error.code} {error.reason}"
                if error.code in (401, 403, 404, 410):
                    break
            except (http.client.HTTPException, OSError) as error:  # also urllib's URLError
                if isinstance(error, OSError) and error.filename is not None:
                    raise  # our own file: the disk is full, or may not be written
                fault = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            tries += 1
            fruitless = 0 if size_of(part) > before else fruitless + 1
            pause = wait * 2 ** (fruitless - 1) if fruitless else 0
            if fruitless < 5:
                print(f"{archive.name}: {fault}; trying again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)
        faults.append(f"{url}: {fault}")
    raise ValueError(
        f"{archive.name} cannot be downloaded ({'; '.join(faults)}). The same command goes on "
        f"where it stopped. Or put the file into {folder}/ yourself: it is checked and unpacked"
    )


def continue_download(archive: Archive, url: str, part: Path) -> bool:
    """Appends what the server sends to `part` -> whether the file is complete."""
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "we have no such range"
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == have:
            return True
        part.unlink()  # of another file
        return False
    with response:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status != 206 or not given or int(given[1]) != have:
            have = 0  # the server starts at the beginning
        length = response.headers.get("Content-Length", "")
        total = int(given[2]) if have else int(length) if length.isdecimal() else None
        most = int(1.1 * archive.size) + (1 << 20)
        if total is not None and total > most:
            raise NotTheData(f"it announces {total:,} bytes in place of {archive.size:,}")
        say, got = Progress(archive.name, total or archive.size, have), have
        try:
            with open(part, "ab" if have else "wb") as file:
                while piece := response.read(1 << 18):
                    got += len(piece)
                    if got > most:
                        raise NotTheData(f"it sends more than the {archive.size:,} bytes")
                    write(file, piece, part)
                    say(got)
        finally:
            say(got, last=True)
    return got >= (archive.size if total is None else total)


def write(file: IO[bytes], piece: bytes, path: Path) -> None:
    """Writes to the file. Gives an error of the disk the file's name, since `download` tells it by
    that from an error of the network."""
    try:
        file.write(piece)
        file.flush()
    except OSError as error:
        error.filename = str(path)
        raise


def check_md5(archive: Archive, path: Path) -> None:
    """NotTheData if the MD5 of the file is not the published one."""
    if not archive.md5:
        return
    print(f"{archive.name}: checking its MD5", file=sys.stderr)
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != archive.md5:
        raise NotTheData(
            f"{path}: MD5 {digest.hexdigest()} of {path.stat().st_size:,} bytes; published is "
            f"{archive.md5}, of {archive.size:,} bytes. It is damaged or another file: remove it, "
            "and the same command downloads it again"
        )


# ------------------------------------------------------------------------------ unpack


def unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Writes the regular files of an archive below `folder`; refuses everything else."""
    print(f"{archive.name}: unpacking into {folder}/", file=sys.stderr)
    left = int(1.2 * archive.unpacked) + (1 << 20)
    try:
        for name, source in members(path):
            if not stays_inside(name) or "\\" in name:
                raise ValueError(f"{path}: member {name[:100]!r} leaves its folder; not unpacked")
            if archive.only and not re.match(archive.only, name):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_symlink():
                target.unlink()  # never write through a link
            with open(target, "wb") as file:
                while piece := source.read(1 << 20):
                    left -= len(piece)
                    if left < 0:
                        raise ValueError(
                            f"{path}: its files are more than {1.2 * archive.unpacked / 1e9:.1f} GB"
                            ". It is not the data set"
                        )
                    file.write(piece)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib_error) as e:
        raise NotTheData(
            f"{path}: damaged ({e}). Remove it, and the same command downloads it again"
        ) from None


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, file to read) of each regular file in a tar or a zip."""
    if path.suffix == ".tar":
        with tarfile.open(path, "r:") as archive:  # not compressed
            for member in archive:
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise ValueError(f"{path}: member {member.name[:100]!r} is no regular file")
                yield member.name, archive.extractfile(member)
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            mode = member.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise ValueError(f"{path}: member {member.filename[:100]!r} is no regular file")
            if member.flag_bits & 1:
                raise ValueError(f"{path}: member {member.filename[:100]!r} is encrypted")
            with archive.open(member) as source:  # compares the checksum at its end
                yield member.filename, source
