"""Cheap runs of train.py for the tests: their flags, their logs, small data."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from plumbing.shapes import SHAPE_CLASSES

ROOT = Path(__file__).parents[1]
FAST = ("--backbone", "resnet18", "--width", "0.25", "--workers", "0")


def data_flags(root: Path) -> list[str]:
    """The flags of a tree of drawn shapes, whose six names the program reads from a file."""
    names = root / "names.txt"
    names.write_text("\n".join(SHAPE_CLASSES))
    sets = ["--train-sets", "2007:train", "--eval-sets", "2007:test"]
    return ["--voc-root", str(root), *sets, "--classes", str(names), "--augment", "flip"]


def voc_flags(root: Path, *more: object) -> list[str]:
    """The flags of a cheap run."""
    return [*data_flags(root), *FAST, *map(str, more)]


def run_flags(root: Path, out: Path, *more) -> list[str]:
    flags = ["--batch-size", 4, "--iterations", 5, "--save-every", 2, "--lr", 0.02]
    flags += ["--sizes", "160:.5", "300:1"]  # grows at the last step
    return voc_flags(root, *flags, "--out", out, *more)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict]:
    return [line for line in log_of(out) if "loss" in line]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, running statistics, momentum, and every loss."""
    one, two = torch.load(a / "last.pt"), torch.load(b / "last.pt")
    assert one["step"] == two["step"]
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    for key, value in one["optimizer"]["state"].items():
        assert torch.equal(
            value["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"]
        )
    keys = ("step", "loss", "loc", "conf", "positives", "grad_norm", "lr")
    rows = [[{k: line[k] for k in keys} for line in steps_of(out)] for out in (a, b)]
    assert rows[0] == rows[1]


def small_tree(root: Path, source: Path, sets: dict[str, list[str]]) -> Path:
    """VOC2007 in `root`, with some images of another tree."""
    tree = root / "VOC2007"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tree / name).mkdir(parents=True)
    for split, names in sets.items():
        (tree / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for file in (f"{part}/{n}" for n in names for part in ("JPEGImages", "Annotations")):
            for found in (source / "VOC2007").glob(f"{file}.*"):
                (tree / file).with_suffix(found.suffix).write_bytes(found.read_bytes())
    return root


def ranks_of(parent_id: int) -> dict[int, int]:
    """Rank -> process id of its children that train."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        rank = [v for v in environment if v.startswith(b"RANK=")]
        if parent == parent_id and rank:
            found[int(rank[0].split(b"=")[1])] = int(folder.name)
    return found


def wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not log.exists() or len(log.read_text().splitlines()) <= step:
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_train(folder: Path, *flags: object, threads: int = 1) -> subprocess.Popen:
    """`python train.py FLAGS` in a process of its own; what it prints goes to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "printed.txt", "a") as printed:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, flags)],
            cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
