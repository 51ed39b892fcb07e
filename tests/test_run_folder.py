"""The folder of a run: whole checkpoints at any moment, and nothing of anybody else's touched."""

import json
import os
import resource
import shutil
import signal
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import scratchdet
from plumbing import run_folder
from plumbing.run_folder import write_checkpoint
from scratchdet import Config, ScratchDet, load_detector

SMALL = Config(backbone="resnet18", width=0.01, classes=("a",))  # 16 channels everywhere


def in_fork(function) -> str:
    """What `function` raised in a process of its own, with limits of its own; "" if nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            function()
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def checkpoint(step: int = 1) -> dict:

    state = {"config": asdict(SMALL), "args": {}, "step": step, "skipped": 0}
    return state | {"model": ScratchDet(SMALL).state_dict(), "optimizer": {}}


# ----------------------------------------------------------------------------- checkpoints


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The system's own limit, not a stand-in: files may not grow beyond 100 kB."""
    path = tmp_path / "last.pt"
    write_checkpoint(path, checkpoint(1))
    assert path.stat().st_size > 200_000

    def with_little_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        write_checkpoint(path, checkpoint(2))

    said = in_fork(with_little_space)
    assert said.startswith("ValueError")
    assert "last.pt: cannot write the checkpoint" in said
    assert "--resume" in said
    assert load_detector(path)[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_cannot_be_written_leaves_the_last_checkpoint():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own are closed to others
        path = Path(folder) / "last.pt"
        write_checkpoint(path, checkpoint(1))
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)

        def as_nobody():
            if os.getuid() == 0:  # root may write anywhere
                os.setgroups([])
                os.setuid(65534)
            write_checkpoint(path, checkpoint(2))

        said = in_fork(as_nobody)
        os.chmod(folder, 0o755)
        assert "last.pt: cannot write the checkpoint" in said
        assert "Permission denied" in said
        assert load_detector(path)[1]["step"] == 1


def test_a_file_system_without_links_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        write_checkpoint(tmp_path / "last.pt", checkpoint(step))
    steps = [load_detector(tmp_path / name)[1]["step"] for name in ("previous.pt", "last.pt")]
    assert steps == [1, 2]


@pytest.mark.slow
def test_flipped_bits_in_a_checkpoint_are_found(tmp_path, monkeypatch, capsys):
    """One bit anywhere: refused, or without effect (padding between the tensors)."""
    path, rng, refused, harmless = tmp_path / "last.pt", np.random.default_rng(0), 0, 0
    write_checkpoint(path, checkpoint())
    whole, right = path.read_bytes(), torch.load(path, weights_only=True)
    # What is built from it does not matter here, and takes most of the time.
    model = ScratchDet(SMALL)
    monkeypatch.setattr(scratchdet, "ScratchDet", lambda config: model)
    tail = rng.integers(len(whole) - 12_000, len(whole), 100)  # the directory of the zip
    for at in [*range(100), *tail, *rng.integers(0, len(whole), 300)]:
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoiled)
        try:
            got = load_detector(path)[1]
        except ValueError:  # anything else fails the test
            refused += 1
            continue
        assert got["step"] == right["step"]
        assert got["config"] == right["config"]
        assert all(torch.equal(v, got["model"][k]) for k, v in right["model"].items())
        harmless += 1
    with capsys.disabled():
        print(f" [{refused} refused, {harmless} harmless]", end="")
    assert refused > 4 * harmless


def test_a_packed_checkpoint_is_refused_before_it_unfolds(tmp_path):
    """100 MB of zeros in 100 kB: torch.load would fill the memory."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", b"\0" * 100_000_000)
    begin = time.process_time()
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_detector(path)
    assert time.process_time() - begin < 0.1


def test_save_keeps_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        write_checkpoint(path, {"step": step})
    assert torch.load(path)["step"] == 3
    assert torch.load(tmp_path / "previous.pt")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("failing", ["write", "disk full", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"step": step})

    def half_written(checkpoint, file):
        file.write(b"half a check")
        if failing == "disk full":  # as torch says it
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        raise OSError(28, "No space left on device")

    def refuse(*_):
        raise OSError(5, "Input/output error")

    if failing in ("write", "disk full"):
        monkeypatch.setattr(torch, "save", half_written)
    else:
        monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(ValueError, match=r"last\.pt: cannot write the checkpoint"):
        write_checkpoint(path, {"step": 3})
    monkeypatch.undo()
    assert torch.load(path)["step"] == 2
    assert torch.load(tmp_path / "previous.pt")["step"] in (1, 2)
    write_checkpoint(path, {"step": 4})  # and what was left behind is in nobody's way
    assert torch.load(path)["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_cut_log_drops_later_and_half_written_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    run_folder.cut_log(log, 3)  # nothing there yet
    assert not log.exists()
    lines = [json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(5)]
    log.write_text("".join(lines) + '{"step": 5, "lo')
    run_folder.cut_log(log, 3)
    assert log.read_text() == "".join(lines[:3])


# ------------------------------------------------------------------------------ others' files


def a_run(folder: Path) -> None:
    """What a run leaves."""
    (folder / "detections").mkdir(parents=True)
    for name in ("last.pt", "run.json", "log.jsonl", "report.html", "detections/0000500.png"):
        (folder / name).write_text(name)


def test_a_run_that_is_there_moves_as_a_whole(tmp_path):
    out = tmp_path / "run"
    assert run_folder.start_folder(out) == ""
    a_run(tmp_path / "other")
    os.rename(tmp_path / "other", out / "x")
    os.rename(out / "x", tmp_path / "x")
    shutil.rmtree(out)
    os.rename(tmp_path / "x", out)
    assert "now in run-1" in run_folder.start_folder(out)
    assert (tmp_path / "run-1/last.pt").read_text() == "last.pt"
    assert sorted(p.name for p in out.iterdir()) == ["detections", "run.lock"]


def test_resume_says_if_there_is_nothing_to_resume(tmp_path):
    said = run_folder.start_folder(tmp_path / "typo", resume=True)
    assert said == f"--resume: no last.pt in {tmp_path / 'typo'} yet, so this is a new run\n"


@pytest.mark.parametrize("name", ["notes.txt", ".git", "detections/mine.jpg", "results.csv"])
def test_a_folder_with_anything_else_stays_where_it_is(tmp_path, name):
    """A run, and in its folder something of the user's: refused, and nothing has moved."""
    out = tmp_path / "run"
    a_run(out)
    (out / name).write_text("the user's")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="--out .*other files than a run's.*Choose another --out"):
        run_folder.start_folder(out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_does_not_start_where_one_is_writing(tmp_path):
    """Whether the folder is new or holds an older run; nothing of either moves."""
    fresh, second = tmp_path / "fresh", tmp_path / "run"
    a_run(second)
    for out in (fresh, second):
        run_folder.start_folder(out)
        before = sorted(tmp_path.rglob("*"))
        for _ in range(2):
            said = in_fork(lambda out=out: run_folder.start_folder(out))
            assert f"--out {out}: another train.py is writing there. Choose another" in said
        (out / "run.json").write_text("{}")  # which the log writes
        assert "another train.py" in in_fork(lambda out=out: run_folder.start_folder(out))
        (out / "run.json").unlink()
        assert sorted(tmp_path.rglob("*")) == before
        run_folder.release(out)
        assert in_fork(lambda out=out: run_folder.start_folder(out)) == ""
        run_folder.start_folder(out)  # that process has ended, and its lock with it
        run_folder.release(out)


@pytest.mark.parametrize("name", ["report.html", "log.jsonl", "results.json", "last.pt"])
def test_files_that_only_have_our_names_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("the user's")
    with pytest.raises(ValueError, match=f"holds {name}, and a new run would"):
        run_folder.start_folder(tmp_path)
    assert (tmp_path / name).read_text() == "the user's"


def test_the_current_folder_never_moves(tmp_path, monkeypatch):
    a_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    for out in (Path("."), Path(), tmp_path / "runs"):
        with pytest.raises(ValueError, match="holds the current folder"):
            run_folder.start_folder(out)
    (tmp_path / "runs/inside").mkdir()
    monkeypatch.chdir(tmp_path / "runs/inside")
    with pytest.raises(ValueError, match="--out"):  # nor a folder above it
        run_folder.start_folder(Path(".."))
    monkeypatch.chdir(tmp_path)
    assert run_folder.start_folder(Path("fresh")) == ""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("the user's")
    assert run_folder.start_folder(Path("notes")) == ""  # nothing there is in the way
    assert (tmp_path / "notes/mine.txt").read_text() == "the user's"
