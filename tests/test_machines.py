"""Other people's machines and habits: nothing of theirs is touched, an answer that is not there
means unknown, and a run that is told to end is saved first."""

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageFont
from torch import nn
from trees import an_object, picture, write, xml_of

import data
import detect
import eval as evaluation
import train
from plumbing import cache, machine, pictures, plan, program, run_folder
from plumbing.program import Progress
from plumbing.shapes import draw_shapes
from plumbing.voc import read_voc
from runs import data_flags, steps_of

ROOT = Path(__file__).parents[1]
TINY = ["--backbone", "resnet18", "--width", "0.01", "--batch-size", "2", "--workers", "0"]
TINY += ["--no-bf16", "--device", "cpu", "--augment", "none"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=4, num_test=2)


@pytest.fixture(scope="module")
def flags(shapes) -> list[str]:
    return [*data_flags(shapes), *TINY, "--iterations", "1"]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory) -> Path:
    """The folder of a whole run of one step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main([*flags, "--out", str(out)])
    return out


def copy_run(run: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in run.rglob("*"):
        if path.is_file():
            write(to / path.relative_to(run), path.read_bytes())


# ------------------------------------------------------------------------- what is not its own


@pytest.mark.parametrize(
    "out", [".", "", "runs", "../project", "runs/..", "link", "notes.txt", "runs/notes.txt/run"]
)
def test_train_leaves_what_is_not_its_own(out, run, flags, tmp_path, monkeypatch):
    """A run in the current folder, with notes of the user's: a second run is refused."""
    here = tmp_path / "project"
    for folder in (here, here / "runs"):
        copy_run(run, folder)
        write(folder / "notes.txt", "the user's")
    (here / "link").symlink_to(here / "runs", target_is_directory=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.chdir(here)
    with pytest.raises((ValueError, OSError)):
        train.main([*flags, "--out", out])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("flag", ["--json", "--export"])
def test_results_are_not_written_over_what_they_come_from(flag, run, tmp_path):
    path = tmp_path / "photo.jpg"
    picture(path)
    (tmp_path / "link.jpg").symlink_to(path)
    before = path.read_bytes(), (run / "last.pt").read_bytes()
    for file in (path, tmp_path / "link.jpg", run / "last.pt", run / "../run/last.pt"):
        with pytest.raises(ValueError, match="would be overwritten"):
            detect.main([str(path), "--checkpoint", str(run / "last.pt"), flag, str(file)])
    with pytest.raises(ValueError, match="would be overwritten"):
        evaluation.main([str(run / "last.pt"), "--json", str(run / "last.pt")])
    with pytest.raises(ValueError, match=f"{flag} '': no name"):
        detect.main([str(path), "--checkpoint", str(run / "last.pt"), flag, ""])
    assert before == (path.read_bytes(), (run / "last.pt").read_bytes())


# ------------------------------------------------------------------------- answers that are missing


def cgroup(root: Path, files: dict[str, object]) -> dict:
    """A tree like /sys/fs/cgroup, as arguments of free_in_cgroup."""
    for name, content in files.items():
        write(root / name, f"{content}\n")
    return {"root": root / "fs", "own": root / "own"}


V1 = 0x7FFFFFFFFFFFF000  # version 1's word for no limit


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"own": "0::/job", "fs/job/memory.max": 500, "fs/job/memory.current": 200}, 300),
        ({"own": "0::/a/b", "fs/a/b/memory.max": "max", "fs/a/b/memory.current": 5,
          "fs/a/memory.max": 90, "fs/a/memory.current": 30}, 60),  # the limit of a parent
        ({"own": "0::/host/id", "fs/memory.max": 50, "fs/memory.current": 20}, 30),  # docker
        ({"own": "0::/job", "fs/job/memory.max": 500, "fs/job/memory.current": 400,
          "fs/job/memory.stat": "anon 1\ninactive_file 150"}, 250),  # pages that can be dropped
        ({"own": "0::/job", "fs/job/memory.max": 100, "fs/job/memory.current": 400}, 0),
        ({"own": "4:cpu:/x\n3:memory:/slurm/job\n0::/", "fs/memory/slurm/job/memory.limit_in_bytes":
          700, "fs/memory/slurm/job/memory.usage_in_bytes": 100}, 600),  # version 1
        ({"own": "3:cpu,memory:/docker/id", "fs/memory/memory.limit_in_bytes": 70,
          "fs/memory/memory.usage_in_bytes": 10}, 60),
        ({"own": "3:memory:/", "fs/memory/memory.limit_in_bytes": V1,
          "fs/memory/memory.usage_in_bytes": 10}, math.inf),
        ({"own": "0::/job", "fs/job/memory.max": "max", "fs/job/memory.current": 7}, math.inf),
        ({"own": "0::/job", "fs/job/memory.max": 500}, math.inf),  # the use is not said
        ({"own": "0::/job", "fs/job/memory.max": "many", "fs/job/memory.current": 7}, math.inf),
        ({"own": "garbage"}, math.inf),
        ({}, math.inf),
    ],
)  # fmt: skip
def test_the_memory_of_a_cgroup(files, free, tmp_path):
    assert machine.free_in_cgroup(**cgroup(tmp_path, files)) == free


def test_the_plan_takes_the_smaller_of_machine_and_cgroup(tmp_path, monkeypatch):
    meminfo, read_text = ["MemTotal: 9 kB\nMemAvailable:   700 kB\n"], Path.read_text

    def read(path, *args, **kwargs):
        return meminfo[0] if str(path) == "/proc/meminfo" else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    cpu = torch.device("cpu")
    for limit, free in ((math.inf, 700 * 1024), (1000, 1000), (0, 0)):
        monkeypatch.setattr(machine, "free_in_cgroup", lambda limit=limit: limit)
        assert machine.free_memory(cpu) == free
    monkeypatch.setattr(machine, "free_in_cgroup", lambda: math.inf)
    for text in ("MemTotal: 9 kB\n", "", "MemAvailable: some\n"):  # old kernels, gVisor
        meminfo[0] = text
        assert machine.free_memory(cpu) == math.inf


def no_disk(kind):
    def usage(_):
        if kind == "ENOSYS":
            raise OSError(errno.ENOSYS, "Function not implemented")
        return type("Usage", (tuple,), {})((0, 0, 0))

    return usage


@pytest.mark.parametrize("kind", ["0 of 0", "ENOSYS"])
def test_a_file_system_that_does_not_say_its_size_has_room(kind, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", no_disk(kind))
    assert machine.free_space(tmp_path) == math.inf
    args = Namespace(out=str(tmp_path / "run"), workers=2, device="cpu", size=300, resume=False)
    assert plan.check_space(nn.Linear(9, 9), args) > 0
    plan.check_shared_memory(128, args)
    records = read_voc(shapes, ["2007:test"], None)[0]
    assert cache.build_cache(records, tmp_path).exists()


def test_an_older_run_is_moved_aside_and_keeps_its_place(tmp_path, monkeypatch):
    """A new run needs room for all its checkpoints, a resumed one only for those it lacks."""
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).touch()
    model = nn.Linear(99, 99)
    one = 8 * sum(p.numel() for p in model.parameters())  # bytes of weights and momentum
    monkeypatch.setattr(plan, "free_space", lambda _: 1.5 * one)
    assert plan.check_space(model, Namespace(out=str(tmp_path), resume=True)) > 0
    with pytest.raises(ValueError, match="its checkpoints need 0.00 GB more"):
        plan.check_space(model, Namespace(out=str(tmp_path), resume=False))


@pytest.mark.parametrize("kind", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, None])
def test_a_file_system_without_locks_gets_its_cache(kind, shapes, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(kind, os.strerror(kind))

    if kind is None:  # Windows
        monkeypatch.setattr(cache, "fcntl", None)
    else:
        monkeypatch.setattr(cache.fcntl, "flock", refuse)
    records = read_voc(shapes, ["2007:test"], None)[0]
    path = cache.build_cache(records, tmp_path)
    assert path.stat().st_size == cache.cache_starts(records)[-1] + 32


def in_fork(function, *args) -> str:
    """Calls it in a process of its own -> what it raised there, "" for nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                function(*args)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="needs root, to become another")
def test_a_user_without_a_name_and_a_home_trains(flags, run):
    """As docker run --user 54321 does. `run`: the ops are built."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)

        def as_54321():
            for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
                os.environ.pop(name, None)
            os.environ["SCRATCHDET_OPS"] = "auto"  # a library that cannot be built is no error
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            tree = draw_shapes(Path(folder) / "shapes", num_train=4, num_test=2)
            train.main([*data_flags(tree), *TINY, "--iterations", "1", "--out", f"{folder}/run"])

        assert in_fork(as_54321) == ""
        assert (Path(folder) / "run/report.html").exists()


@pytest.mark.parametrize("length", [60, 120, 200])
def test_workers_with_a_long_tmpdir(length, shapes, tmp_path, monkeypatch):
    """Their sockets' paths have room for 108 bytes; beyond that they hung for ever."""
    folder = tmp_path / ("x" * length)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    records = read_voc(shapes, ["2007:train"], None)[0]
    stream = data.batches(records, 60, batch_size=2, seed=0, workers=1)
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(60)
    try:
        assert next(stream).images.shape[0] == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        stream.close()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),  # a shell has kept it
        ({"RANK": "x", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR=None.*unset RANK"),
        ({"WORLD_SIZE": "two", "MASTER_ADDR": "a"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0", "MASTER_ADDR": "a"}, "RANK=0 WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=-1"),
    ],
)
def test_ranks_that_are_left_in_the_environment(environment, wanted, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("would wait"))
    args = Namespace(device="cpu")
    if isinstance(wanted, tuple):
        assert machine.start_ranks(args) == (*wanted, torch.device("cpu"))
        return
    with pytest.raises(ValueError, match=wanted):
        machine.start_ranks(args)


def test_an_apple_gpu_is_asked_for_by_name(monkeypatch, capsys):
    """Nobody ran it: that is said. The ops are registered for every device, as plain PyTorch."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: torch .* sees no Apple GPU here"):
        machine.check_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    machine.check_device("mps")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not machine.has_bf16(torch.device("mps"))
    assert "Apple GPU" in machine.processor("mps")
    for wrong in ("MPS", "mps:1", "cuda:x", "gpu", "", "cpu:0"):
        with pytest.raises(ValueError, match="expected cpu, cuda"):
            machine.check_device(wrong)
    for name in ("colour", "match", "mined_cross_entropy", "nms", "postprocess"):
        table = torch._C._dispatch_dump_table(f"scratchdet::{name}")
        row = next(line for line in table.splitlines() if line.startswith("MPS:"))
        assert "default backend kernel" in row


def test_ddp_does_not_warn_of_strides(monkeypatch):
    """pytorch 157862: for 1x1 weights in channels_last, on GPUs; every other warning is shown."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        machine.start_ranks(Namespace(device="cpu"))
        warnings.warn("Grad strides do not match bucket view strides. This may", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(w.message) for w in said] == ["another"]


# ----------------------------------------------------------------------- consoles, interpreters


def programs(folder: Path, tree: Path) -> str:
    """A script that runs them all in one process, as their command lines do."""
    return f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import detect, eval, train
from experiments import compare, report
from plumbing.program import run_program
tree, folder = {str(tree)!r}, {str(folder)!r}
def run(main, *words):
    sys.argv = ["program", *words]
    try:
        run_program(main)
    except SystemExit as end:
        print(main.__module__, end.code, flush=True)
last = folder + "/run/last.pt"
run(train.main, "--voc-root", tree, "--classes", "auto", "--train-sets", "train", "--eval-sets",
    "val", *{TINY!r}, "--iterations", "1", "--out", folder + "/run")
run(eval.main, last, "--draw", folder + "/eval", "--comp4", folder + "/comp4")
run(detect.main, tree + "/JPEGImages", "--checkpoint", last, "--min-score", "0",
    "--json", folder + "/found.json", "--draw", folder + "/detect")
run(report.main, folder + "/run", "--out", folder + "/report.html")
run(compare.main, last, last, "--draws", "10", "--out", folder + "/compare.html")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ([], {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
        (["-OO"], {"PYTHONIOENCODING": "cp1252"}),  # and no assert, no __doc__
    ],
    ids=["ascii", "cp1252"],
)
def test_class_names_that_the_console_cannot_print(options, environment, tmp_path):
    """From training to every page and file: nothing ends in an encoding error."""
    tree, script = tmp_path / "VOC2007", tmp_path / "all.py"
    for i, name in enumerate(["螺栓", "écrou", "écrou"]):
        picture(tree / f"JPEGImages/p{i}.jpg")
        write(tree / f"Annotations/p{i}.xml", xml_of(an_object(name)))
    write(tree / "ImageSets/Main/train.txt", "p0\np1\n")
    write(tree / "ImageSets/Main/val.txt", "p2\n")
    write(script, programs(tmp_path, tree))
    command = [sys.executable, *options, str(script)]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT | environment)
    said = done.stdout.decode("latin-1") + done.stderr.decode("latin-1")
    for name in ("train", "eval", "detect", "experiments.report", "experiments.compare"):
        assert f"{name} 0\n" in said, said
    assert "\\u87ba\\u6813" in said
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {d["label"] for row in rows for d in row["detections"]} <= {"螺栓", "écrou"}
    comp4 = [p.name for p in (tmp_path / "comp4").rglob("*.txt")]
    assert sorted(comp4) == ["comp4_det_val_écrou.txt", "comp4_det_val_螺栓.txt"]
    assert "螺栓" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_font_without_truetype_draws_any_name():
    """Pillow without FreeType has letters of Latin-1 only."""
    font = ImageFont.load_default_imagefont()
    assert pictures.printable("écrou 螺栓", font) == "écrou ??"
    real, pictures.letters = pictures.letters, lambda size: font
    try:
        for k in (1, 9):  # names, and a legend
            boxes = np.tile([[5.0, 5, 50, 50]], (k, 1))
            args = boxes, np.ones(k, int), np.full(k, 0.9)
            pictures.draw_boxes(Image.new("RGB", (99, 99)), *args, ("螺栓",))
    finally:
        pictures.letters = real


def test_no_program_needs_its_docstring():
    """-OO: __doc__ is None in all of them."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        assert "__doc__." + "split" not in path.read_text(encoding="utf-8"), path


WINDOWS = """
import os, signal, sys
sys.path.insert(0, {root!r})
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.setpgrp, signal.SIGHUP, signal.SIGPIPE, os.sched_getaffinity
import torch
torch.set_num_threads(1)
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    import train
    train.main({flags!r})
"""


@pytest.mark.slow
def test_what_windows_lacks_is_not_needed(flags, run, tmp_path):
    """No fcntl, no groups, no fork, fewer signals: workers start anew, the losses are the same.
    What this cannot show: Windows' paths, and its compiler (SCRATCHDET_OPS=reference)."""
    script, out = tmp_path / "windows.py", tmp_path / "run"
    more = ["--workers", "1", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    script.write_text(WINDOWS.format(root=str(ROOT), flags=[*flags, *more]))
    environment = ENVIRONMENT | {"SCRATCHDET_OPS": "reference"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert steps_of(out)[0]["loss"] == pytest.approx(steps_of(run)[0]["loss"], rel=1e-5)


# ------------------------------------------------------------------------- ends


def start_child(main, ours: int, fd: int) -> int:
    """A process that calls run_program(main) and prints to `fd`; `ours` is its reader's end, here.
    -> its number."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # it must not hang
        os.close(ours)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1) for n in (1, 2))
        try:
            program.run_program(main)
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(77)  # a traceback
    os.close(fd)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_steps(out: Path, child: int) -> None:
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 3:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def long_run(flags, out: Path, *more):
    words = [*flags, "--iterations", "4000", "--save-every", "100000", "--out", str(out), *more]
    return lambda: train.main(words)


def test_a_lost_terminal_saves_and_ends(flags, run, tmp_path):
    """SIGHUP, and a terminal that takes no word more."""
    out, (ours, theirs) = tmp_path / "run", os.openpty()
    child = start_child(long_run(flags, out), ours, theirs)
    wait_for_steps(out, child)
    os.kill(child, signal.SIGHUP)
    os.close(ours)
    assert status_of(child) == 128 + signal.SIGHUP
    assert torch.load(out / "last.pt")["step"] == len(steps_of(out))


@pytest.mark.parametrize("more", [["--eval-every", "1"], []], ids=["measuring", "training"])
def test_a_closed_pipe_saves_and_ends(more, flags, run, tmp_path, monkeypatch):
    """`python train.py 2>&1 | head -1`."""
    often = lambda *args, **more: Progress(*args, **more | {"every": 0})  # noqa: E731
    monkeypatch.setattr(run_folder, "Progress", often)  # not each 20 seconds
    out, (ours, theirs) = tmp_path / "run", os.pipe()
    child = start_child(long_run(flags, out, *more), ours, theirs)
    wait_for_steps(out, child)
    os.close(ours)
    assert status_of(child) == 128 + signal.SIGTERM
    assert torch.load(out / "last.pt")["step"] == len(steps_of(out))


def test_no_console_at_all(run, tmp_path, monkeypatch):
    """`>&- 2>&-`: Python has None for both."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    words = [str(run / "last.pt"), "--json", str(tmp_path / "a.json"), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        program.run_program(lambda: evaluation.main([*words, "--workers", "0"]))
    assert end.value.code == 0
    assert "mAP" in json.loads((tmp_path / "a.json").read_text())


@pytest.mark.slow
def test_a_film_from_a_closed_input(tmp_path):
    """`detect.py - <&-`: Python has None for it."""
    words = "exec 0<&-; exec " + " ".join([sys.executable, str(ROOT / "detect.py"), "-"])
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "error: -: no JPEG frame on standard input. ffmpeg" in done.stderr


def test_train_in_a_thread_of_somebodys_program(flags, run, tmp_path):
    """Signals stay with the program; the losses are those of the main thread."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            train.main([*flags, "--workers", "1", "--out", str(tmp_path / "run")])
        )
    )
    thread.start()
    thread.join()
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert "mAP" in results[0]
    assert steps_of(tmp_path / "run")[0]["loss"] == steps_of(run)[0]["loss"]


def test_measured_again_from_another_folder(shapes, tmp_path, monkeypatch):
    """The run was started with relative paths, of the data and of its classes."""
    monkeypatch.chdir(shapes)
    words = [*data_flags(shapes), *TINY, "--iterations", "1", "--out", str(tmp_path / "run")]
    words = [os.path.relpath(w) if w.startswith(str(shapes)) else w for w in words]
    assert words[words.index("--voc-root") + 1] == "."
    assert train.parse_args(words).classes == str(shapes / "names.txt")
    results = train.main(words)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    evaluation.main(["../run/last.pt", "--json", "again.json", "--device", "cpu"])
    again = json.loads(Path("again.json").read_text())
    assert again["mAP"] == results["mAP"]
    assert [p.name for p in elsewhere.iterdir()] == ["again.json"]


def test_init_with_other_classes_says_what_starts_anew(flags, run, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("star\ncircle\nsquare\ntriangle\ncross\nring\n")  # same ones, another order
    words = [*flags, "--classes", str(names), "--out", str(tmp_path / "run")]
    train.main([*words, "--init", str(run / "last.pt")])
    said = capsys.readouterr().out
    assert "the others random; it detects circle" in said


@pytest.mark.parametrize("flag", [["--iterations", "9"], ["--minutes", "5"]])
def test_the_refusal_names_the_way_to_train_longer(flag, flags, run, tmp_path):
    copy_run(run, tmp_path / "run")
    words = flags[:-2]  # without its --iterations
    words += [*flag, "--resume", "--out", f"{tmp_path}/run"]
    with pytest.raises(ValueError, match="To train longer, start a new run from it: --init .*last"):
        run_folder.resume(train.parse_args, words)


def test_signals_come_back_behind_a_block():
    before = signal.getsignal(signal.SIGTERM)
    with program.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "1000000"], "a step of 1000000 images of resnet18 needs about"),
        (["--accumulate", "3"], "do not divide it; 3 or 6 would do"),
        (["--lr", "inf"], "--lr inf: expected 0 or more, finite"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: expected 0 to"),
        (["--init", "/dev/zero"], "/dev/zero: not a checkpoint.*a folder or a device"),
    ],
)
def test_absurd_numbers_and_names_are_refused_at_once(more, message, flags, tmp_path):
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        train.main([*flags, "--out", str(tmp_path / "run"), *more])
    assert time.process_time() - begin < 5
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_that_much_memory_is_one_line(capsys):
    def allocate():
        torch.empty(1 << 60, dtype=torch.uint8)

    def exhausted():
        raise MemoryError

    def faulty():
        raise RuntimeError("a fault")

    for function in (allocate, exhausted):
        with pytest.raises(SystemExit) as end:
            program.run_program(function)
        assert end.value.code == 2
        assert "error: " in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault"):  # of ours: its traceback is wanted
        program.run_program(faulty)
