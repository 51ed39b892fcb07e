"""The folder of a run (--out): its checkpoints and its log. Other files in it are never touched.

last.pt previous.pt   checkpoints, each whole at any moment
log.jsonl             one JSON object per line: a step, or a measurement on the way
run.json              arguments, network, commit, machine
nonfinite.json        the images of the last step with a NaN or Inf, if there was one
detections/           sheets of detections beside the ground truth
results.json, errors.json, report.html    written at the end
suspects.html         of experiments.errors --suspects
left_out.txt          what --drop-bad left out
run.lock              empty; locked while a train.py writes here
"""

import argparse
import errno
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing import machine
from plumbing.checkpoint import read_checkpoint
from plumbing.program import Progress, as_words, make_folder, silence_output

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILES = ("last.pt", "previous.pt", "last.tmp", "previous.tmp", "log.jsonl", "log.tmp", "run.json")
FILES += ("nonfinite.json", "results.json", "report.html", "page.html", "left_out.txt")
FILES += ("errors.json", "suspects.html")

# A resumed run takes all arguments from its checkpoint, except those of MACHINE. The user may
# change those of CHANGEABLE: the data may have moved, or a bad step is to be skipped.
MACHINE = ("out", "resume", "workers", "device", "cache", "save_every", "eval_every")
CHANGEABLE = ("voc_root", "coco_root", "yolo_root", "classes", "skip_nonfinite", "bf16")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def describe(args: argparse.Namespace, config, where: str, world: int) -> dict:
    """All that the results of a run depend on, as plain data for run.json and every checkpoint.

    It holds `args` itself, so it also has what train.main decides later.
    """
    about = {"args": vars(args), "config": asdict(config), "commit": machine.commit()}
    about |= {"torch": str(torch.__version__), "processes": world}
    return about | {"machine": where + (f", {world} processes" if world > 1 else "")}


# ------------------------------------------------------------------------------ beginning

LOCKS: dict[Path, IO] = {}  # the open run.lock of each folder that this process writes


def hold(out: Path) -> None:
    """Locks the folder of a run for this process. ValueError if another one writes there.

    The lock (POSIX) is not inherited by loader processes, and ends with the process. Without locks
    (Windows, some network file systems) two runs in one folder are the user's affair.
    """
    release(out)  # a forked process has inherited the file, but not the lock
    if fcntl is None:
        return
    try:
        file = LOCKS[out] = open(out / "run.lock", "a")  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of other numbers: a file system without locks
        if error.errno in (errno.EAGAIN, errno.EACCES) and out in LOCKS:
            release(out)
            raise ValueError(
                f"--out {out}: another train.py is writing there. Choose another --out, or wait "
                "until it has ended"
            ) from None


def release(out: Path) -> None:
    """Ends the lock of `hold`, if this process has it."""
    if out in LOCKS:
        LOCKS.pop(out).close()


def start_folder(out: Path, left_out: str = "", resume: bool = False) -> str:
    """Makes the folder of a new run, with the list of what --drop-bad left out -> lines to print.

    An earlier run in the folder moves to OUT-1, OUT-2, ... as a whole. ValueError, and nothing is
    moved, if other files lie beside it, or if files there would be overwritten.
    """
    if (out / "run.lock").exists():
        hold(out)
    said, ours = "", [name for name in FILES if (out / name).exists()]
    if out.is_dir() and ours:
        others = sorted(p.name for p in out.iterdir() if not is_ours(p))
        here = out.resolve() in (Path.cwd(), *Path.cwd().parents)
        if others or here or "run.json" not in ours:
            what = f"other files than a run's ({', '.join(others[:5])})" if others else ours[0]
            what = "the current folder" if here and not others else what
            raise ValueError(
                f"--out {out}: holds {what}, and a new run would move or overwrite them. Choose "
                "another --out, such as runs/NAME; --resume goes on with a run that is there"
            )
        hold(out)
        names = (out.with_name(f"{out.name}-{n}") for n in itertools.count(1))
        aside = out.rename(next(path for path in names if not path.exists()))
        said = f"{out} held another run, now in {aside.name} (--resume goes on with a run)\n"
    make_folder(out, "--out")
    make_folder(out / "detections", "--out")
    hold(out)
    if resume:
        said += f"--resume: no last.pt in {out} yet, so this is a new run\n"
    if left_out:
        path = out / "left_out.txt"
        path.write_text(left_out, encoding="utf-8", errors="backslashreplace")
        said += f"what --drop-bad left out is listed in {path}\n"
    return said


def is_ours(path: Path) -> bool:
    """Whether a run of this program wrote this file or folder."""
    if path.name == "detections" and path.is_dir():
        return all(re.fullmatch(r"\d{7}\.png", p.name) for p in path.iterdir())
    return path.name in (*FILES, "run.lock") and path.is_file()  # the lock alone is no run


def resume(parse_args: Callable, argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, and the checkpoint to continue from, if --resume is given and there is one.

    `parse_args(argv, **defaults)` is the program's. ValueError: the user gives an argument that
    differs from the one that the run was started with.
    """
    args = parse_args(argv)
    last = Path(args.out) / "last.pt"
    if not args.resume or not last.exists():
        return args, None
    checkpoint = read_checkpoint(last)
    saved = {"sizes": ()} | checkpoint["args"]  # older runs did not grow
    saved = {k: v for k, v in saved.items() if k not in MACHINE and hasattr(args, k)}
    args = parse_args(argv, **saved)
    only_config = set(checkpoint["config"]) - {"backbone", "bn", "width", "size", "classes"}
    for key, value in saved.items():
        now, changeable = getattr(args, key), key in CHANGEABLE and value is not None
        same = json.dumps(now) == json.dumps(value)  # (1, 1) of a recipe and [1, 1] of a flag
        if not same and not changeable:
            longer = ". To train longer, start a new run from it: --init" if key in LENGTH else ""
            flag = f"--config {key}=" if key in only_config else f"--{key.replace('_', '-')} "
            raise ValueError(
                f"{flag}{as_words(now)}: {args.out} was started with {as_words(value)}. A resumed "
                f"run goes on as it began: leave the flag out, or choose another --out{longer}"
                + f" {last} --out OTHER"
                * (key in LENGTH)
            )
    return args, checkpoint


LENGTH = ("iterations", "minutes")


def check_data(out: str, checkpoint: dict, images: int, classes: tuple[str, ...]) -> None:
    """ValueError where a resumed run would go on with other data than it was started with."""
    before = checkpoint.get("images", images)
    if before != images:
        what = f"{out} was started with {before} training images, the data has {images}"
    elif tuple(checkpoint["config"].get("classes", classes)) != classes:
        detects = ", ".join(checkpoint["config"]["classes"])
        what = f"{out}/last.pt detects {detects}, the data has {', '.join(classes)}"
    else:
        return
    raise ValueError(f"{what}. Resume with the data it was started with, or choose another --out")


# ------------------------------------------------------------------------------ checkpoints


def write_checkpoint(path: Path, checkpoint: dict, *, keep_previous: bool = True) -> None:
    """Write it whole or not at all; the one before it becomes previous.pt.

    At any moment at which the machine may die, last.pt is a whole checkpoint.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and keep_previous:
            older = path.with_name("previous.tmp")
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)
            except OSError:  # a file system without links
                shutil.copyfile(path, older)
            os.replace(older, path.with_name("previous.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: cannot write the checkpoint ({e}). The one before it is intact; free some "
            "space or choose another --out, then go on with --resume"
        ) from None


# ------------------------------------------------------------------------------ the log


def cut_log(path: Path, step: int) -> None:
    """Removes the lines of `step` and later, which the resumed run will write again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] < step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


class RunLog:
    """Writes log.jsonl and the progress line, and stops a run at a NaN or Inf.

    The values of a step stay on the device until `flush`, so that the loop waits for the device
    only once in `every` steps. All ranks have a RunLog, but only the first one writes the file.
    """

    def __init__(
        self, args: argparse.Namespace, about: dict, before: dict | None, records: list, *,
        every: int,
    ):  # fmt: skip
        self.args, self.about, self.out, self.records = args, about, Path(args.out), records
        self.every, self.pending = every, []
        before = before or {"step": 0, "skipped": 0}  # the checkpoint from which the run goes on
        self.first, self.skipped = before["step"], before["skipped"]
        self.seconds_before, self.ended = before.get("cpu_seconds", 0.0), before.get("results")
        self.begin, self.stopping = time.perf_counter(), False
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.lead = self.rank == 0
        self.file, self.progress = None, None
        if self.lead:
            hold(self.out)
            cut_log(self.out / "log.jsonl", self.first)
            write_json(self.out / "run.json", about)
            self.file = open(self.out / "log.jsonl", "a", buffering=1, encoding="utf-8")

    def write(
        self, step: int, values: dict[str, Tensor], lr: float, done: float, images: list[int]
    ) -> None:
        """Notes a step: its scalars, learning rate and the indices of its images. `done` is the
        share of the run's work that is done after it."""
        if self.lead and self.progress is None:
            self.progress = Progress(self.args.iterations, "step", every=20, first=done)
        self.pending.append((step, values, lr, done, [self.records[i].name for i in images]))
        if len(self.pending) == self.every:
            self.flush()

    def flush(self) -> None:
        """Fetches the noted steps from the device and writes them. Sets `stopping` if a rank was
        told to stop. ValueError at a NaN or Inf, unless --skip-nonfinite."""
        if not self.pending:
            return
        names = list(self.pending[0][1])
        rows = torch.stack([torch.stack(list(v.values())) for _, v, *_ in self.pending]).tolist()
        rate = self.args.batch_size * (self.pending[-1][0] + 1 - self.first)
        rate /= time.perf_counter() - self.begin
        for (step, _, lr, done, images), row in zip(self.pending, rows, strict=True):
            values, share = dict(zip(names, row, strict=True)), done
            self.stopping |= values.pop("stop") > 0
            line = {"step": step, "loss": values["loc"] + values["conf"], **values, "lr": lr}
            line["images_per_s"] = round(rate, 2)
            if not all(map(math.isfinite, line.values())):
                self.skipped += 1
                self.report_nonfinite(line, images)
            if self.file:
                self.file.write(json.dumps(line) + "\n")
        self.pending = []
        if self.stopping:
            silence_output()  # where the terminal is gone, printing would fail
        if self.progress:
            text = (
                f"loss {line['loss']:.3f} (loc {line['loc']:.3f} conf {line['conf']:.3f})  "
                f"{line['positives']:.1f} positives/image  gradient {line['grad_norm']:.2f}  "
                f"lr {line['lr']:.2g}  {rate:.1f} images/s"
            )
            self.say(self.progress, line["step"] + 1, text, share=share)

    def say(self, function: Callable, *args, **kwargs) -> object:
        """Calls what prints. If nobody reads it any more, the run is saved and ends."""
        try:
            return function(*args, **kwargs)
        except OSError:
            if not silence_output():
                raise
            self.stopping = True

    def cpu_seconds(self) -> float:
        """Of all ranks and all starts of the run up to its end. All ranks must call it. Loader
        processes count once they have ended."""
        if self.ended:  # what is done after the end is no part of the run
            return 60 * self.ended.get("cpu_minutes", 0.0)
        parts = [machine.cpu_seconds()]
        if self.world > 1:
            parts *= self.world
            dist.all_gather_object(parts, parts[0])
        return self.seconds_before + sum(parts)

    def save(self, step: int, model, optimizer, *, images: int, results: dict | None = None):
        """Writes last.pt after `step` steps; at the end also the results, and results.json.

        The other ranks may be at other steps: their CPU time is taken to be that of this one."""
        seconds = self.seconds_before + self.world * machine.cpu_seconds()
        done = {"step": step, "skipped": self.skipped, "images": images, "results": results}
        done |= {"cpu_seconds": seconds}  # of the run so far, for its next start
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        last = self.out / "last.pt"
        write_checkpoint(last, self.about | done | state, keep_previous=not results)
        if results:
            write_json(self.out / "results.json", results)

    def measured(self, step: int, measure: Callable[[], dict]) -> None:
        """Calls `measure` during training, and logs its mAPs and the CPU minutes."""
        begin = time.perf_counter()
        results = self.say(measure)
        self.begin += time.perf_counter() - begin  # images/s count the time of steps only
        if self.file and results:
            numbers = {k: v for k, v in results.items() if k.startswith("mAP")}
            numbers["cpu_minutes"] = results["cpu_minutes"]
            self.file.write(json.dumps({"step": step} | numbers) + "\n")
            self.say(print, f"\nmAP {results['mAP'] or 0:.4f} after {step + 1} steps", flush=True)

    def report_nonfinite(self, line: dict, images: list[str]) -> None:
        """At a NaN or Inf: writes nonfinite.json, then stops the run, or reports and goes on."""
        kept, parts = self.out / "nonfinite.json", [images]
        if dist.is_initialized():  # all ranks get here, since their losses are averaged
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, images)
        if self.lead:
            write_json(kept, {**line, "images": sum(parts, [])})
        what = (
            f"step {line['step']}: loss {line['loss']:g} (loc {line['loc']:g}, conf "
            f"{line['conf']:g}), gradient norm {line['grad_norm']:g} at learning rate "
            f"{line['lr']:g}"
        )
        if not self.args.skip_nonfinite:
            raise ValueError(
                f"not finite at {what}. No weight was changed by it. The images of this step are "
                f"listed in {kept}; last.pt, if there is one yet, is the checkpoint before it. Try "
                "a smaller --lr (without BN in the backbone 0.001), a --warmup, or --skip-nonfinite"
            )
        self.say(print, f"\nskipped, not finite: {what}", file=sys.stderr)

    def close(self) -> None:
        if self.file:
            self.file.close()
            release(self.out)
