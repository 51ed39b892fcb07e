"""Make a shipped file again, from random weights, as its card says.

    python -m experiments.again weights/photos.pt                    what it would run, and how long
    python -m experiments.again weights/photos.pt --voc-root DIR --out runs/again

    card --> its runs, each in the code of its commit --> their means (ship) --> the file

A run begins with what came before it (--init), and so do the runs that were averaged with it. The
same command goes on where it was stopped. Flags after `--` go to every run: `-- --cache FOLDER`.
Another processor or torch rounds in another way: then weights differ, and mAP by some tenths.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from experiments.ship import all_hours, key
from plumbing import sources
from plumbing.checkpoint import read_checkpoint
from plumbing.program import StopSignals, own_and_others, run_program

ROOT = Path(__file__).resolve().parents[1]


class Job(NamedTuple):
    """A run of train.py, or, with `of`, the mean of the weights of earlier jobs."""

    name: str
    run: dict  # what the card says of it; of a mean: of its first run
    init: str | None = None  # the job whose weights it begins with
    of: tuple[str, ...] = ()


def jobs_of(card: dict) -> list[Job]:
    """All that made a shipped file, in an order in which it can be made again.

    The last job is the file itself: the mean of one run or of several.
    """
    jobs, trained, means, init = [], {}, {}, None
    runs = [*card.get("before", []), card]
    for n, run in enumerate(runs, start=1):
        name, others = f"run{n}", []
        for m, other in enumerate(run.get("averaged", []), start=1):
            if "averaged" in other and key(other) not in means:
                raise ValueError(
                    f"{name} was averaged with a file whose runs the card does not say"
                )
            if key(other) not in trained:  # it began where this run did
                trained[key(other)] = f"{name}-{m}"
                jobs.append(Job(f"{name}-{m}", other, init))
            others.append((means if "averaged" in other else trained)[key(other)])
        jobs.append(Job(name, run, init))
        trained[key(run)] = init = name
        if others or n == len(runs):
            init = means[key(run)] = f"mean{n}"
            jobs.append(Job(init, run, of=(name, *others)))
    return jobs


def code_of(commit: str, out: Path) -> Path:
    """The repository as it was at a commit, in a folder of its own."""
    folder = out / f"code-{commit}"
    steps = [] if folder.exists() else [["clone", "--no-checkout", "--shared", ROOT, folder]]
    steps += [] if (folder / "train.py").exists() else [["-C", folder, "checkout", commit]]
    for words in steps:
        done = subprocess.run(["git", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"commit {commit} cannot be had: {done.stderr.strip()}. Expected a clone with its "
                "whole history; --today runs all with today's code"
            )
    return folder


def at_its_end(checkpoint: Path) -> bool:
    """A run that is at its end has results in its checkpoint."""
    return checkpoint.exists() and bool(read_checkpoint(checkpoint).get("results"))


def words_of(command: str, root: list[str], classes: str | None) -> list[str]:
    """The flags of a card's command, with the data's folder for DIR and --classes for FILE."""
    words = shlex.split(command)[2:]
    if root:
        words[:2] = root
    if "FILE" in words:
        if not classes:
            raise ValueError("its classes were read from a file: expected --classes FILE")
        words[words.index("FILE")] = classes
    return words


def run(command: list[str], folder: Path, env: dict[str, str]) -> int:
    """Runs a program in a folder -> its exit status. A signal is passed on; then we end, too."""
    with StopSignals() as stop:
        process, told = subprocess.Popen(command, cwd=folder, env=env), 0
        while (status := process.poll()) is None:
            time.sleep(0.1)
            if stop.number != told:
                told = stop.number
                process.terminate()
    if stop.number:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    return status


def remake(shipped: dict, jobs: list[Job], args: argparse.Namespace, more: list[str]) -> Path:
    """Does all jobs that are not done yet -> the new file. `more`: flags for every run."""
    card, out, name = shipped["card"], Path(args.out).absolute(), Path(args.file).name
    args.data = shipped["args"]["data"]
    sources.make_absolute(args)
    root = [] if args.data == "shapes" else [f"--{args.data}-root", str(sources.root_of(args))]
    out.mkdir(parents=True, exist_ok=True)
    files = {job.name: out / job.name / (name if job.of else "last.pt") for job in jobs}
    threads = re.search(r", (\d+) thread", card["machine"])  # a GPU's has none
    env = os.environ | ({"OMP_NUM_THREADS": threads[1]} if threads else {})
    for n, job in enumerate(jobs, start=1):
        file, code = files[job.name], ROOT
        if file.exists() if job.of else at_its_end(file):
            continue
        if job.of:
            first, *others = [str(files[part]) for part in job.of]
            command = ["-m", "experiments.ship", first, *root, "--out", str(file)]
            command += ["--average", *others] if others else []
            command += ["--size", str(shipped["config"]["size"])] if job is jobs[-1] else []
        else:
            command = ["train.py", *words_of(job.run["command"], root, args.classes), *more]
            command += ["--init", str(files[job.init])] if job.init else []
            command += ["--out", str(file.parent), "--resume"]
            code = ROOT if args.today else code_of(job.run["commit"], out)
        print(f"\n{n} of {len(jobs)}: {job.name}", flush=True)
        if (status := run([sys.executable, *command], code, env)) or not file.exists():
            raise ValueError(f"{job.name}: exit status {status}; the same command goes on")
    return files[jobs[-1].name]


def main(argv: list[str] | None = None) -> None:
    own, for_runs = own_and_others(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", help="of experiments.ship, such as weights/photos.pt")
    for kind in ("voc", "coco", "yolo"):
        parser.add_argument(f"--{kind}-root", metavar="DIR", help="as in train.py")
    parser.add_argument("--classes", metavar="FILE", help="where a run of the card has FILE")
    parser.add_argument("--out", metavar="DIR", help="for all runs; without it nothing is run")
    parser.add_argument("--today", action="store_true", help="today's code, not each commit's")
    args = parser.parse_args(own)
    shipped = read_checkpoint(args.file)
    if not (card := shipped.get("card")):
        raise ValueError(f"{args.file}: no card; expected a file of `python -m experiments.ship`")
    jobs = jobs_of(card)
    print(f"{all_hours(card):.2f} CPU hours on {card['machine']}")
    for job in jobs:
        begin = f"from {job.init or 'random weights'}: {job.run['command']}"
        how = f"commit {job.run['commit']}, {job.run['cpu_hours']:.2f} CPU hours"
        what = f"the mean of {', '.join(job.of)}" if job.of else f"{begin} ({how})"
        print(f"{job.name}, {what}")
    if args.out:
        new = remake(shipped, jobs, args, for_runs)
        again = read_checkpoint(new)["card"]
        weights = "the same weights" if again["sha256"] == card["sha256"] else "other weights"
        have, had = (one["measured"]["mAP_11point"] for one in (again, card))
        print(f"{new}: {weights}, mAP {have:.4f}; the card's {had:.4f}")


if __name__ == "__main__":
    run_program(main)
