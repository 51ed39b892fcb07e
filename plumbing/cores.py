"""Training on all cores of a CPU: train.py once more for each core, as ranks of one run.

Threads that share a step wait for each other, and for Python's lock. Processes wait once per step,
for the mean of the gradients. So train.py starts itself several times, if each process has EACH
images of a step. The first process only waits for the others. OMP_NUM_THREADS=1: it trains itself.
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


def ranks_here() -> int:
    """How many ranks of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


CORES = THREADS * ranks_here()  # that they all use


def processes(args: Namespace, checkpoint: dict | None = None) -> int:
    """How many processes train.py should start for these arguments; 1: it trains in its own.

    A resumed run keeps its number: another one would show BatchNorm other numbers of images.
    """
    words = sys.orig_argv  # python [flags] FILE ...: no notebook's %run, no -c or -m, no debugger
    ours = words[-len(sys.argv) :] == sys.argv and "-m" not in words[: -len(sys.argv)]
    ours = ours and os.path.isfile(sys.argv[0]) and not sys.gettrace()
    # Windows has no signal with which to ask a process to save.
    if not ours or "WORLD_SIZE" in os.environ or args.device != "cpu" or os.name == "nt":
        return 1
    if checkpoint is not None:
        return checkpoint.get("processes", 1)
    images = args.batch_size // args.accumulate
    counts = [n for n in range(2, THREADS + 1) if images % n == 0 and images // n >= EACH]
    if args.compile or not counts:
        return 1
    return max(counts, key=lambda n: (n * (THREADS // n), n))  # that leaves fewest cores idle


def share(args: Namespace, checkpoint: dict | None, argv: list[str] | None) -> None:
    """Lets all cores run this command, if they should, and then ends with their exit status.

    Not where a program called train.main(argv): its own command is another one.
    """
    count = processes(args, checkpoint) if argv is None else 1
    if count > 1:
        sys.exit(run_ranks(count))


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
        "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(max(1, THREADS // count)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
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
        code = ranks[0].returncode
        if stop.number and (code > 128 or code == -signal.SIGTERM):
            return 128 + stop.number
        if code == LOST or code < 0:  # then rank 0 has not said why
            print(f"error: {why(ranks[first], first, said[first])}", file=sys.stderr)
            return 2
    return code


def wait(ranks: list[subprocess.Popen], stop: StopSignals) -> int:
    """Waits until all have ended, and passes a signal on -> the rank that failed first, or 0."""
    told, first, since, codes = 0, None, math.inf, [None]
    while None in codes:
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
        # Above 128: told to stop, and has saved. A signal may strike before the run listens.
        fine = (None, 0, -signal.SIGTERM) if stop.number else (None, 0)
        failed = [i for i, code in enumerate(codes) if code not in fine and code <= 128]
        if failed:
            since = min(since, time.monotonic())
        if first is None:
            first = next((i for i in failed if codes[i] != LOST), None)
        if stop.number != told:
            told = stop.number
            for rank in ranks:
                rank.terminate()
        if time.monotonic() > since + 10:  # the others should have noticed by now
            for rank in ranks:
                rank.kill()
    return first or 0


def why(process: subprocess.Popen, rank: int, said: IO) -> str:
    """Why a rank ended: its error, or all that it said, such as a traceback."""
    if process.returncode < 0:
        what = "" if process.returncode != -9 else " (the system's, if memory ran out)"
        return f"process {rank} was ended by signal {-process.returncode}{what}; --resume goes on"
    said.seek(0)
    text = said.read().decode(errors="replace").strip()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    lost = "the processes of this run lost each other; --resume goes on"
    return errors[-1].removeprefix("error: ") if errors else text or lost


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
