"""The machine under a run: what it is, what is free on it, and the processes of a run."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from plumbing.cores import end_with_parent
from plumbing.program import OURS
from plumbing.threads import THREADS


def check_device(name: str) -> None:
    """ValueError unless `name` is a device of this machine."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1 or mps")
    there = torch.cuda.device_count()
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= there:
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {there} GPUs here")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"--device mps: torch {torch.__version__} sees no Apple GPU here")
        print("--device mps: nobody has run this code on an Apple GPU yet; its ops run there as "
              "plain PyTorch. Compare with --device cpu", file=sys.stderr)  # fmt: skip


# ------------------------------------------------------------------------------ what it is


@functools.cache  # asked once, at the start: files may change while a run goes on
def commit() -> str:
    """The git commit of this code, with a + if files differ from it."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        rev = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
        return rev.stdout.strip() + ("+" if dirty.stdout else "") or "unknown"
    except OSError:
        return "unknown"


def cpu_seconds() -> float:
    """CPU time of this process, and of its children that have ended."""
    return sum(os.times()[:4])


def processor(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's and how many of its threads are used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return f"Apple GPU of {platform.machine()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file; no such line in it
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {THREADS} thread{'s' if THREADS > 1 else ''}"


def hardware(device: torch.device | str) -> str:
    """The machine and torch's version, which belong beside every measured number."""
    return f"{processor(device)}, torch {torch.__version__}"


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 natively: elsewhere it works, but slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    with contextlib.suppress(OSError):
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def keep_large_tensors() -> None:
    """Tell glibc not to give memory back at every step: 1.14x the images/s of the quick start."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1 & 0x7FFFFFFF)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------ its room


def free_space(folder: Path) -> float:
    """Bytes that may still be written there; infinity where the file system does not say."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return free if total else math.inf  # 0 of 0: unknown, or without a limit


def free_memory(device: torch.device) -> float:
    """Bytes of memory that a run may still take; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
        free = int(found[1]) * 1024 if found else math.inf
    return min(free, free_in_cgroup())


def free_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")):
    """Bytes left in this process's cgroup (Docker, Slurm), v2 or v1; infinity without a limit.

    A limit may be set on any parent, so the tightest of all levels counts.
    """
    free = math.inf
    with contextlib.suppress(OSError, ValueError):
        for entry in own.read_text().splitlines():
            _, controllers, inside = entry.split(":", 2)
            names = ("memory.max", "memory.current")  # v2
            base = root
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                base = root / "memory"
            folder = base / inside.lstrip("/")
            if not folder.is_dir():  # a container sees the host's path, but has its files at `base`
                folder = base
            for level in (folder, *folder.parents):
                free = min(free, limit_minus_use(level, *names))
                if level == base:
                    break
    return free


def limit_minus_use(folder: Path, limit_name: str, use_name: str) -> float:
    """Bytes left below a limit; infinity if there is none. Cached pages of files do not count."""
    try:
        limit, use = (folder / limit_name).read_text().strip(), (folder / use_name).read_text()
        if not limit.isdigit() or int(limit) > 1 << 60:  # "max", or v1's largest number
            return math.inf
        cached = 0
        with contextlib.suppress(OSError, ValueError):
            found = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
            cached = int(found[1]) if found else 0
        return max(0, int(limit) - int(use) + cached)
    except (OSError, ValueError):
        return math.inf


# ------------------------------------------------------------------------------ its processes


def fresh_store() -> dict:
    """Arguments for init_process_group with which ranks can be restarted.

    On one machine torchrun keeps its key-value store when it restarts ranks, and in it the
    addresses of the dead ones (pytorch issue 135712). So each restart uses keys of its own.
    """
    env = os.environ.get
    if env("TORCHELASTIC_USE_AGENT_STORE") != "True" or env("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart {env('TORCHELASTIC_RESTART_COUNT')}", store)
    return {"store": store, "rank": rank, "world_size": world}


def start_ranks(args: Namespace) -> tuple[int, int, torch.device]:
    """Joins the processes of torchrun or cores.py, if there are any -> (rank, world, device)."""
    check_device(args.device)
    env = os.environ.get
    rank, world, address = env("RANK", "0"), env("WORLD_SIZE", "1"), env("MASTER_ADDR")
    if world == "1":
        rank = "0"  # a RANK that is left over in the shell means nothing
    elif not (rank.isdigit() and world.isdigit() and address):
        raise ValueError(
            f"RANK={rank} WORLD_SIZE={world} MASTER_ADDR={address} in the environment: torchrun "
            "sets all three. For one process: unset RANK WORLD_SIZE LOCAL_RANK"
        )
    rank, world = int(rank), int(world)
    if not rank < world:
        raise ValueError(f"RANK={rank} WORLD_SIZE={world} in the environment: ranks count from 0")
    device = torch.device(args.device)
    if device.type == "cuda":
        local = int(env("LOCAL_RANK", 0)) if world > 1 else device.index or 0
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        if not {"TORCHELASTIC_RUN_ID", OURS} & {*os.environ}:  # not by torchrun, nor by cores.py
            print(f"rank {rank} waits for the others of WORLD_SIZE={world} at {address}; for one "
                  "process: unset RANK WORLD_SIZE", file=sys.stderr)  # fmt: skip
        end_with_parent()
        # pytorch 157862: 1x1 weights in channels_last make DDP warn, and nothing is slower for it
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        how = fresh_store()
        if OURS in os.environ:
            how |= {"timeout": timedelta(days=30)}  # a run may be suspended; cores.py watches it
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **how)
    return rank, world, device


def end_ranks() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
