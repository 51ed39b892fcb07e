"""Training on all cores of a CPU: train.py once more for each core, as ranks of one run.

Threads that share a step wait for each other, and for Python's lock. Processes wait once per step,
for the mean of the gradients. So where each core has EACH images of a step, it gets a process.
The first process only starts the others and waits; OMP_NUM_THREADS=1 trains in the first one.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from typing import IO

from plumbing.program import LOST, OURS, StopSignals
from plumbing.threads import THREADS

EACH = 8  # images: BatchNorm's statistics are those of the images of one process


def processes(args: Namespace) -> int:
    """How many processes train.py should start for these arguments; 1: it trains in its own."""
    started = "WORLD_SIZE" in os.environ or args.device != "cpu" or args.compile
    ours = sys.argv[0] in sys.orig_argv and not sys.gettrace()  # no %run of a notebook, no debugger
    if started or not ours:
        return 1
    images = args.batch_size // args.accumulate
    return max(n for n in range(1, THREADS + 1) if n == 1 or not images % n and images // n >= EACH)


def share(args: Namespace, argv: list[str] | None) -> None:
    """Lets all cores run this command, if they should, and then ends with their exit status.

    Not where a program called train.main(argv): its own command is another one.
    """
    if argv is None and processes(args) > 1:
        sys.exit(run_ranks(processes(args)))


def run_ranks(count: int) -> int:
    """Runs this command as `count` ranks -> exit status.

    Only rank 0 prints, except where another rank fails alone. A signal ends all, as it would end
    one process: after the step, with a checkpoint.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(THREADS // count),
        OURS: str(os.getpid()),
    }  # fmt: skip
    command = [sys.executable, *sys.orig_argv[1:]]
    with contextlib.ExitStack() as stack, StopSignals() as stop:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        ranks = [
            subprocess.Popen(
                command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL if rank else None,
                stdout=subprocess.DEVNULL if rank else None, stderr=said[rank] if rank else None,
            )
            for rank in range(count)
        ]  # fmt: skip
        first = wait(ranks, stop)
        if stop.number:
            return 128 + stop.number
        if ranks[0].returncode == LOST or ranks[0].returncode < 0:  # then it has not said why
            print(f"error: {why(ranks[first], first, said[first])}", file=sys.stderr)
            return 2
    return ranks[0].returncode


def wait(ranks: list[subprocess.Popen], stop: StopSignals) -> int:
    """Waits until all have ended, and passes a signal on -> the rank that failed first, or 0."""
    told, first, since = 0, 0, math.inf
    codes = [None]
    while None in codes:
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]  # above 128: told to stop, and has saved
        failed = [i for i, code in enumerate(codes) if code and code != LOST and code <= 128]
        if failed and since == math.inf:
            first, since = failed[0], time.monotonic()
        if stop.number != told:
            told = stop.number
            for rank in ranks:
                rank.terminate()
        if time.monotonic() > since + 10:  # the others should have noticed by now
            for rank in ranks:
                rank.kill()
    return first


def why(process: subprocess.Popen, rank: int, said: IO) -> str:
    """Why a rank ended, in one line."""
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        what = "" if process.returncode != -9 else " (the system's, if memory ran out)"
        return f"process {rank} was ended by signal {-process.returncode}{what}; --resume goes on"
    return lines[-1].removeprefix("error: ") if lines else f"process {rank} ended"


def end_with_parent() -> None:
    """In a rank: when the process that started it has gone, SIGTERM. So it saves and stops."""

    def watch() -> None:
        while os.getppid() == int(os.environ[OURS]):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if OURS in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def loaders() -> int:
    """The default of --workers: loader processes of each rank. These ranks leave no core idle."""
    return 0 if OURS in os.environ else min(8, (os.cpu_count() or 2) // 2)
