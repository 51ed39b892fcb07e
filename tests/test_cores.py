"""train.py on several cores: a process for each, started, stopped and watched by the first one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train
from plumbing import cores
from runs import ROOT, assert_same_run, log_of, ranks_of, start_train, voc_flags, wait_for_step

PROC = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@pytest.mark.parametrize(
    ("threads", "images", "flags", "expected"),
    [
        (2, 32, {}, 2),
        (2, 16, {}, 2),
        (2, 15, {}, 1),  # 7 images each
        (2, 17, {}, 1),  # cannot be divided
        (4, 32, {}, 4),
        (6, 32, {}, 2),  # of three threads each: 4 would leave two cores idle
        (7, 32, {}, 2),
        (3, 24, {}, 3),
        (16, 32, {}, 4),  # of four threads each
        (2, 32, {"accumulate": 2}, 2),
        (2, 16, {"accumulate": 2}, 1),
        (1, 32, {}, 1),
        (2, 32, {"device": "cuda"}, 1),
        (2, 32, {"compile": True}, 1),
    ],
)
def test_as_many_processes_as_have_eight_images(threads, images, flags, expected, monkeypatch):
    monkeypatch.setattr(cores, "THREADS", threads)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-O", "train.py", "--seed", "1"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = {"batch_size": images, "accumulate": 1, "device": "cpu", "compile": False}
    assert cores.processes(Namespace(**(args | flags))) == expected
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's, or our own: they are started
    assert cores.processes(Namespace(**(args | flags))) == 1


def test_other_programs_and_resumed_runs(monkeypatch):
    """A notebook, a profiler, a debugger are not started again; a resumed run stays as it is."""
    args = Namespace(batch_size=32, accumulate=1, device="cpu", compile=False)
    monkeypatch.setattr(cores, "THREADS", 4)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for words in (["-m", "ipykernel_launcher"], ["-m", "cProfile", "train.py"], ["-c", "..."]):
        monkeypatch.setattr(sys, "orig_argv", ["python", *words])
        assert cores.processes(args) == 1, words
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    assert cores.processes(args) == 4
    assert cores.processes(args, {"processes": 2}) == 2
    assert cores.processes(args, {"processes": 1}) == 1
    assert cores.processes(args, {}) == 1  # of before there were processes
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    assert cores.processes(args) == 1


def test_a_rank_knows_of_all_cores():
    """The recipe's batch follows from their number, and must be the same in each rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    line = "from plumbing import cores; print(cores.CORES)"
    said = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert said.stdout == "2\n", said.stderr


def flags_of(root: Path, out: Path, *more: object) -> list[str]:
    flags = ["--batch-size", 16, "--iterations", 12, "--save-every", 100, "--lr", 0.01]
    return voc_flags(root, *flags, "--width", 0.01, "--no-bf16", "--out", out, *more)


def run(folder: Path, flags: list[str], threads: int = 2) -> tuple[int, str]:
    """-> exit status, what it printed."""
    process = start_train(folder, *flags, threads=threads)
    try:
        return process.wait(timeout=300), (folder / "printed.txt").read_text()
    finally:
        process.kill()


def assert_alike(one: Path, two: Path) -> None:
    """The same losses and weights, up to rounding. BatchNorm's running statistics differ: the mean
    over ranks, or one micro-batch after the other."""
    losses = [[line["loss"] for line in log_of(out)] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = (torch.load(out / "last.pt")["model"] for out in (one, two))
    keys = [key for key in a if "running" not in key and "num_batches" not in key]
    assert max((a[key] - b[key]).abs().max().item() for key in keys) < 1e-5


def wait_until_gone(process_ids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in process_ids):
        assert time.monotonic() < deadline, process_ids
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(shapes_root, tmp_path_factory) -> Path:
    """12 steps of two processes, 8 images each."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, printed = run(out, flags_of(shapes_root, out / "run"))
    assert code == 0, printed
    assert "1 thread, 2 processes" in printed
    assert printed.count("training images") == 1  # rank 0 alone prints
    return out / "run"


@pytest.mark.slow
def test_two_processes_learn_what_two_micro_batches_do(shapes_root, tmp_path, undisturbed):
    train.main(flags_of(shapes_root, tmp_path / "run", "--accumulate", 2))
    assert_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_two_processes_without_a_compiler(shapes_root, tmp_path, monkeypatch):
    """Then DistributedDataParallel averages the gradients. Not compared with the compiled run:
    BatchNorm of a 1x1 map loses .6 % of its gradients to rounding in torch, .05 % in ours."""
    monkeypatch.setenv("SCRATCHDET_OPS", "reference")
    for name, threads, more in (("one", 1, ["--accumulate", 2]), ("two", 2, [])):
        flags = flags_of(shapes_root, tmp_path / name, *more)
        flags[flags.index("--iterations") + 1] = "3"
        code, printed = run(tmp_path, flags, threads)
        assert code == 0, printed
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@PROC
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_resume_repeats_the_bits(number, shapes_root, tmp_path, undisturbed):
    flags = flags_of(shapes_root, tmp_path / "run", "--resume")
    process = start_train(tmp_path, *flags, threads=2)
    try:
        wait_for_step(tmp_path / "run" / "log.jsonl", 2, process)
        ranks = ranks_of(process.pid)
        process.send_signal(number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    printed = (tmp_path / "printed.txt").read_text()
    assert code == 128 + number, printed
    assert "--resume goes on" in printed
    assert "Traceback" not in printed
    assert len(ranks) == 2
    wait_until_gone([*ranks.values()])
    assert 3 <= torch.load(tmp_path / "run" / "last.pt")["step"] < 12
    code, printed = run(tmp_path, flags)
    assert code == 0, printed
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@PROC
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_with_one_error(killed, shapes_root, tmp_path):
    process = start_train(tmp_path, *flags_of(shapes_root, tmp_path / "run"), threads=2)
    try:
        wait_for_step(tmp_path / "run" / "log.jsonl", 2, process)
        ranks = ranks_of(process.pid)
        os.kill(ranks[killed], signal.SIGKILL)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    printed = (tmp_path / "printed.txt").read_text()
    assert code == 2, printed
    assert printed.count("error: ") == 1
    assert f"process {killed} was ended by signal 9 (the system's, if memory ran out)" in printed
    assert "Traceback" not in printed
    wait_until_gone([*ranks.values()])


@pytest.mark.slow
@PROC
def test_ranks_do_not_outlive_the_process_that_started_them(shapes_root, tmp_path):
    flags = flags_of(shapes_root, tmp_path / "run")
    flags[flags.index("--iterations") + 1] = "10000"
    process = start_train(tmp_path, *flags, threads=2)
    wait_for_step(tmp_path / "run" / "log.jsonl", 2, process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    wait_until_gone([*ranks.values()])
    assert torch.load(tmp_path / "run" / "last.pt")["step"] >= 3  # they have saved


@pytest.mark.slow
def test_an_error_is_said_once(shapes_root, tmp_path):
    """Of all ranks: a set that is not there. Of one alone: a picture that only it should read."""
    flags = flags_of(shapes_root, tmp_path / "run", "--train-sets", "2007:nowhere")
    code, printed = run(tmp_path / "all", flags)
    assert (code, printed.count("error: ")) == (2, 1), printed
    assert "nowhere" in printed
    root = shutil.copytree(shapes_root, tmp_path / "root")
    picture = min((root / "VOC2007" / "JPEGImages").glob("train*"))
    picture.write_bytes(picture.read_bytes()[:300])
    code, printed = run(tmp_path / "one", flags_of(root, tmp_path / "run"))
    assert (code, printed.count("error: ")) == (2, 1), printed
    assert picture.name in printed
    assert "Traceback" not in printed
