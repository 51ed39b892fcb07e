"""Kill a training run with SIGKILL again and again, resume it, and compare with one left alone.

    python tests/harness/kill_runs.py [--kills 20] [--seed 0]

Half of the kills come at random moments, half inside the writing of a checkpoint: after some of its
bytes, or before or after one of the system calls. The number of data workers changes every time.
Prints where the kills struck; exits with 1 unless weights, momentum, and every
line of the log are equal to the last bit.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

import train  # noqa: E402
from plumbing.checkpoint import read_checkpoint  # noqa: E402
from plumbing.shapes import SHAPE_CLASSES, draw_shapes  # noqa: E402

STEPS = 48
PLACES_OF = {  # the calls of write_checkpoint: name in os, end of the last argument
    "fsync": ("fsync", ""),
    "the link": ("link", "previous.tmp"),
    "the rename to previous.pt": ("replace", "previous.pt"),
    "the rename to last.pt": ("replace", "last.pt"),
}
PLACES = ("write", *PLACES_OF)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def place_in_save(rng: random.Random):
    """Somewhere in the writing of a checkpoint: (in words, function that sets the trap there)."""
    where, before, share = rng.choice(PLACES), rng.random() < 0.5, rng.random()
    if where == "write":
        return "during the write", lambda: die_writing(share)
    name, suffix = PLACES_OF[where]
    when = "before" if before else "after"
    return f"{when} {where}", lambda: die_around(name, suffix, before)


def die_writing(share: float) -> None:
    save = torch.save

    def partly(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: int(share * whole.tell())])
        file.flush()
        die()

    torch.save = partly


def die_around(name: str, suffix: str, before: bool) -> None:
    call = getattr(os, name)

    def dying(*arguments):
        mine = str(arguments[-1]).endswith(suffix)  # not of another file
        if mine and before:
            die()
        call(*arguments)
        if mine:
            die()

    setattr(os, name, dying)


def fork_run(flags: list[str], prepare=None) -> int:
    """train.main(flags) in a fork, which saves importing torch; -> its process id."""
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(Path(flags[flags.index("--out") + 1]).with_suffix(".txt"),
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # fmt: skip
        os.dup2(log, 1)
        os.dup2(log, 2)
        if prepare:
            prepare()
        train.main(flags)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at_random(child: int, log: Path, rng: random.Random) -> None:
    """After a few more steps and a part of one; leaves it alone if it ends before."""
    wanted, look = lines(log) + rng.randrange(5), os.WEXITED | os.WNOHANG | os.WNOWAIT
    while lines(log) < wanted and os.waitid(os.P_PID, child, look) is None:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal between two runs."""
    one, two = (torch.load(p / "last.pt", weights_only=True) for p in (a, b))
    found = [key for key in ("step", "skipped") if one[key] != two[key]]
    weights = two["model"]
    found += [f"model {k}" for k, v in one["model"].items() if not torch.equal(v, weights[k])]
    for k, v in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][k]["momentum_buffer"]
        found += [] if torch.equal(v["momentum_buffer"], other) else [f"momentum {k}"]
    logs = [[json.loads(s) for s in (p / "log.jsonl").read_text().splitlines()] for p in (a, b)]
    for log in logs:
        for line in log:
            line.pop("images_per_s")  # the clock's
    return found + ([] if logs[0] == logs[1] else ["log"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, struck = random.Random(args.seed), Counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = draw_shapes(folder / "shapes", num_train=6, num_test=2)
        (folder / "names.txt").write_text("\n".join(SHAPE_CLASSES))
        flags = ["--voc-root", str(root), "--classes", str(folder / "names.txt")]
        flags += ["--train-sets", "2007:train", "--eval-sets", "2007:test", "--augment", "ssd"]
        flags += ["--backbone", "resnet18", "--width", "0.01", "--batch-size", "2", "--lr", "0.01"]
        flags += ["--iterations", str(STEPS), "--save-every", "2", "--no-bf16"]
        whole, killed = folder / "whole", folder / "killed"

        def run(out: Path, workers: int, prepare=None) -> int:
            return fork_run(
                [*flags, "--out", str(out), "--workers", str(workers), "--resume"], prepare
            )

        def finish(child: int, out: Path) -> None:
            status = os.waitpid(child, 0)[1]
            if status:
                sys.exit(f"exit status {status}:\n{out.with_suffix('.txt').read_text()[-3000:]}")

        begin = time.monotonic()
        finish(run(whole, 0), whole)
        print(f"left alone: {STEPS} steps in {time.monotonic() - begin:.1f} s", flush=True)
        kept, restarts = killed / "last.pt", []
        for i in range(args.kills):
            if i % 2:
                where, trap = place_in_save(rng)
                child = run(killed, i % 3, trap)
            else:
                where, child = "at a random moment", run(killed, i % 3)
                kill_at_random(child, killed / "log.jsonl", rng)
            died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            struck[where if died else "ended before the kill"] += 1
            restarts.append(read_checkpoint(kept)["step"] if kept.exists() else 0)
        finish(run(killed, 1), killed)
        for where, count in struck.most_common():
            print(f"{count:3} {where}")
        print(f"resumed at steps {restarts} of {STEPS}")
        unequal = differences(whole, killed)
        print(f"unequal: {unequal}" if unequal else "equal to the last bit")
        return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
