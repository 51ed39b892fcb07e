"""Downloading a data set, from a server on this machine that behaves as bad as servers do."""

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from trees import make_voc

from plumbing import fetch as fetching
from plumbing import machine
from plumbing.fetch import SOURCES, Archive, NotTheData, Source
from plumbing.voc import read_voc


class Server(ThreadingHTTPServer):
    """Serves `content`; `faults` are taken from its start, one for each request."""

    daemon_threads = True
    content, faults, requests, ranges = b"", (), (), True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.faults = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # connections that break are what is tested


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range", ""))
        fault, argument = server.faults.pop(0) if server.faults else ("", 0)
        content = server.content
        start = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0) if server.ranges else 0
        if fault == "status":
            return self.send_error(argument)
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        length = len(content) - start
        if fault == "announce":
            length = argument
        if fault != "no length":
            self.send_header("Content-Length", str(length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:]
        if fault == "break":
            body = body[:argument]
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def tar_of(*members):
    """A tar of (name, content) or (TarInfo, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(*members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def source_of(server, content, name="VOC.tar", md5=None, unpacked=None, **more):
    """{"voc2007": what the server has}, with its right size and MD5."""
    server.content = content
    md5 = hashlib.md5(content).hexdigest() if md5 is None else md5
    unpacked = unpacked or len(content)
    url = more.pop("urls", (f"{server.url}/{name}",))
    archive = Archive(name, ".", url, len(content), unpacked, md5, **more)
    return {"voc2007": Source("Free", (archive,)), "voc2012": Source("Free", (archive,))}


def run(sources, folder, names=("voc2007",)):
    return fetching.main(list(names), folder, sources=sources, wait=0)


@pytest.fixture
def tree(tmp_path):
    """A VOC tree as a tar."""
    make_voc(tmp_path / "source")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(tmp_path / "source", "VOCdevkit")
    return out.getvalue()


def test_it_says_the_size_and_licence_first_and_ends_with_the_command(
    server, tree, tmp_path, capsys
):
    folder = tmp_path / "my data"
    assert run(source_of(server, tree), folder) == 0
    out, err = capsys.readouterr()
    assert re.match(r"voc2007: 0.00 GB to download. Free.\n", out)
    command = f'python train.py --voc-root "{folder}/VOCdevkit"'
    assert out.endswith(f"\nTrain on it:\n    {command}\n")  # voc2012 is the same archive here
    assert "VOC.tar  0 of 0 MB" in err
    assert "ETA 0:00:00" in err
    assert len(read_voc(folder / "VOCdevkit", ["2007:trainval"])[0]) == 2
    assert sorted(p.name for p in folder.iterdir()) == [".VOC.tar.done", "VOCdevkit"]
    assert run(source_of(server, tree), folder) == 0  # nothing is asked for again
    assert len(server.requests) == 1
    assert "VOC.tar: is there" in capsys.readouterr().out


def test_a_connection_that_breaks_goes_on_where_it_broke(server, tree, tmp_path, capsys):
    server.faults = [("break", 700), ("status", 503), ("break", 1000), ("break", 0)]
    assert run(source_of(server, tree), tmp_path / "data") == 0
    assert server.requests == ["", "bytes=700-", "bytes=700-", "bytes=1700-", "bytes=1700-"]
    assert "VOC.tar: HTTP 503 Service Unavailable; trying again in 0 s" in capsys.readouterr().err


def test_another_run_goes_on_where_the_first_stopped(server, tree, tmp_path):
    folder = tmp_path / "data"
    server.faults = [("break", 900), *[("break", 0)] * 5]
    with pytest.raises(ValueError, match=r"VOC.tar cannot be downloaded .*broke after 900 bytes"):
        run(source_of(server, tree), folder)
    assert (folder / "VOC.tar.part").stat().st_size == 900
    assert run(source_of(server, tree), folder) == 0
    assert server.requests[-1] == "bytes=900-"


def test_a_part_that_is_whole_or_of_another_file(server, tree, tmp_path):
    for part in (tree, tree + b"more"):
        folder = tmp_path / str(len(part))
        folder.mkdir()
        (folder / "VOC.tar.part").write_bytes(part)
        assert run(source_of(server, tree), folder) == 0


def test_a_server_without_ranges_starts_again(server, tree, tmp_path):
    server.ranges, server.faults = False, [("break", 800)]
    assert run(source_of(server, tree), tmp_path / "data") == 0
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("announce", 5000), None),  # more than comes: the rest is asked for, and there is none
        (("announce", 10**13), r"announces 10,000,000,000,000 bytes in place of"),
        (("announce", 3000), r"MD5 \w+ of 3,000 bytes; published is"),
        (("no length", 0), None),
        (("status", 404), "HTTP 404"),
        (("status", 500), "HTTP 500"),
    ],
)
def test_a_server_that_lies(server, tree, tmp_path, fault, message):
    server.faults = [fault] * 9
    if message is None:
        server.faults = [(fault[0], len(tree) + fault[1])]
        assert run(source_of(server, tree), tmp_path / "data") == 0
        return
    with pytest.raises(ValueError, match=message):
        run(source_of(server, tree), tmp_path / "data")
    assert not (tmp_path / "data/VOCdevkit").exists()
    assert not (tmp_path / "data/VOC.tar").exists()


def test_an_endless_answer_without_a_length_is_cut(server, tmp_path, monkeypatch):
    content = bytes(3 << 20)
    server.faults = [("no length", 0)]
    sources = source_of(server, content)
    archive = sources["voc2007"].archives[0]._replace(size=1 << 20)
    with pytest.raises(ValueError, match="it sends more than the 1,048,576 bytes"):
        run({"voc2007": Source("", (archive,))}, tmp_path / "data")
    assert not (tmp_path / "data/VOC.tar.part").exists()


def test_the_mirror_is_asked_next(server, tree, tmp_path):
    urls = ("http://127.0.0.1:9/VOC.tar", f"{server.url}/a", f"{server.url}/b", f"{server.url}/c")
    server.faults = [("status", 404), ("announce", 100)]  # gone; the page of a hotel's network
    assert run(source_of(server, tree, urls=urls), tmp_path / "data") == 0
    assert len(server.requests) == 3


def test_a_file_that_is_there_is_used_and_never_removed(server, tree, tmp_path):
    path = tmp_path / "VOC.tar"
    path.write_bytes(tree)
    assert run(source_of(server, tree), tmp_path) == 0
    assert (server.requests, path.exists()) == ([], True)
    (tmp_path / ".VOC.tar.done").unlink()
    path.write_bytes(tree[:-1] + b"x")
    with pytest.raises(NotTheData, match="VOC.tar: MD5 .* remove it, and the same command"):
        run(source_of(server, tree), tmp_path)
    assert path.exists()


def test_names_and_space(server, tree, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--fetch voc2008: expected voc2007, voc2012"):
        run(source_of(server, tree), tmp_path, ["voc2008"])
    with pytest.raises(ValueError, match=r"GB needed to download and unpack, \S+ GB free"):
        run(source_of(server, tree, unpacked=1 << 60), tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: (0, 0, 0))  # it does not say
    assert run(source_of(server, tree), tmp_path / "a") == 0
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--to .*file: "):
        run(source_of(server, tree), tmp_path / "file")


def test_the_disk_that_is_full_is_one_line(server, tree, tmp_path, monkeypatch):
    def write(file, piece, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(fetching, "write", write)
    with pytest.raises(ValueError, match="--to .*: No space left on device. The same command goes"):
        run(source_of(server, tree), tmp_path / "data")
    assert len(server.requests) == 1


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil", b"x")], "member '../evil' leaves its folder"),
        ([("VOCdevkit/../../evil", b"x")], "leaves its folder"),
        ([("/tmp/evil", b"x")], "leaves its folder"),
        ([("a\\..\\evil", b"x")], "leaves its folder"),
        ([(link("VOCdevkit", "/tmp"), b""), ("VOCdevkit/evil", b"x")], "is no regular file"),
        ([(link("a", "/etc/passwd", tarfile.LNKTYPE), b"")], "is no regular file"),
        ([(link("a", "", tarfile.FIFOTYPE), b"")], "is no regular file"),
        ([(link("a", "", tarfile.CHRTYPE), b"")], "is no regular file"),
        ([("a", bytes(5 << 20))], "its files are more than"),
    ],
)
def test_a_tar_that_means_harm(server, tmp_path, members, message):
    content = tar_of(*members)
    with pytest.raises(ValueError, match=message):
        run(source_of(server, content, unpacked=1000), tmp_path / "data")
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.name for path in written} <= {"VOC.tar", "a"}
    assert sum(path.stat().st_size for path in written if path.name == "a") <= 3 << 20
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_of(("a", bytes(300 << 20))), "its files are more than"),  # 0.3 MB: a bomb
        (zip_of(*[(f"{n}", bytes(1 << 20)) for n in range(9)]), "its files are more than"),
        (zip_of(("../evil", b"x")), "leaves its folder"),
        (zip_of(("C:/evil", b"x")), "leaves its folder"),
        (zip_of(("a", b"x" * 5000))[:-30], "damaged .*Remove it, and the same command"),
        (zip_of(("a", bytes(range(250))))[:60] + b"?" + zip_of(("a", bytes(range(250))))[61:],
         "damaged .*Bad CRC|damaged"),
        (b"<html>404</html>", "damaged .*not a zip"),
        (b"", "damaged|broke after 0 bytes"),
    ],
)  # fmt: skip
def test_a_zip_that_means_harm(server, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        run(source_of(server, content, "x.zip", md5="", unpacked=1000), tmp_path / "data")
    assert not list(tmp_path.rglob("evil"))


def test_links_in_a_zip(server, tmp_path):
    info = zipfile.ZipInfo("a")
    info.external_attr = (0o120777 << 16) | 0
    with pytest.raises(ValueError, match="'a' is no regular file"):
        run(source_of(server, zip_of((info, "/etc/passwd")), "x.zip", md5=""), tmp_path / "data")


def test_only_what_is_needed_is_unpacked_and_never_through_a_link(server, tmp_path):
    content = zip_of(("annotations/instances_a.json", "1"), ("annotations/captions.json", "2"))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "data/annotations").mkdir(parents=True)
    (tmp_path / "data/annotations/instances_a.json").symlink_to(mine)
    more = {"md5": "", "only": "annotations/instances_"}
    assert run(source_of(server, content, "x.zip", **more), tmp_path / "data") == 0
    names = [path.name for path in (tmp_path / "data/annotations").iterdir()]
    assert (names, mine.read_text()) == (["instances_a.json"], "mine")


def test_what_is_published(capsys):
    """The MD5 of VOC's pages, and a command for each choice."""
    md5 = {a.name: a.md5 for name in ("voc2007", "voc2012") for a in SOURCES[name].archives}
    assert md5 == {
        "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
        "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
        "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
    }
    for names, end in (
        (["voc2007", "voc2012"], "VOCdevkit"),
        (["voc2007"], "--train-sets 2007:trainval"),
        (["voc2012"], "--train-sets 2012:train --eval-sets 2012:val"),
        (["coco2017"], "--coco-root data/coco"),
    ):
        command = fetching.training_command(names, names, fetching.Path("data"))
        assert command.endswith(end)
