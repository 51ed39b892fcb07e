"""The machine under a run: what it is, whether the run has room on it, and its processes.

train.py asks before the first step, so that what does not fit is said then, with the flag that
helps, and not found out by the kernel's killer after an hour.
"""

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
from argparse import Namespace
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from data import PREFETCH
from plumbing.halves import THREADS
from scratchdet import ScratchDet

# ------------------------------------------------------------------------------ what is asked of it


def check_range(args: Namespace, names: str, low: float, high: float = math.inf) -> None:
    """ValueError where one of these arguments, or of its values, is not in [low, high]."""
    expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    for name in names.split():
        value = getattr(args, name)
        for v in value if isinstance(value, (list, tuple)) else [value]:
            if v is not None and not low <= v <= high:
                raise ValueError(f"--{name.replace('_', '-')} {v}: expected {expected}")


def check_device(name: str) -> None:
    """ValueError unless `name` is cpu, or a GPU that is here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:1")
    there = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= there:
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {there} GPUs here")


# ------------------------------------------------------------------------------ what it is


@functools.cache  # asked for at every checkpoint: it is that of the code which runs
def commit() -> str:
    """Of this code, with a + where files differ from it."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        rev = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
        return rev.stdout.strip() + ("+" if dirty.stdout else "") or "unknown"
    except OSError:
        return "unknown"


def processor(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's and how many of its threads are used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # no such file; no such line in it
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {THREADS} thread{'s' if THREADS > 1 else ''}"


def hardware(device: torch.device | str) -> str:
    """What a number was measured on."""
    return f"{processor(device)}, torch {torch.__version__}"


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is fast there, not just possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def keep_large_tensors() -> None:
    """Tell glibc not to give memory back at every step: 1.5x the images/s on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1 & 0x7FFFFFFF)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------ its room


def free_memory(device: torch.device) -> float:
    """Bytes; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable")) * 1024
    return math.inf


def memory_needed(model: ScratchDet, images: int, bf16: bool) -> int:
    """Bytes of a step: weights, and what is kept for backward (seen on the meta device)."""
    seen, total = set(), 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        key = t.untyped_storage()._cdata
        if key not in seen:
            seen.add(key)
            total += t.numel() * t.element_size()
        return t

    meta, size = deepcopy(model).to("meta").train(), model.config.size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = meta(torch.empty(2, 3, size, size, device="meta"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = (total - weights) / 2 * images * (0.5 if bf16 else 1) + 8 * size * size * images
    del outputs
    return int(1.2 * activations) + 4 * weights


def check_memory(model: ScratchDet, micro: int, args: Namespace) -> float:
    """GiB of a step; ValueError with the flag that helps where they are not free."""
    device = model.priors_cxcywh.device
    needed, free = memory_needed(model, micro, args.bf16), free_memory(device)
    if needed > free:
        parts = next((n for n in range(2, micro) if micro % n == 0
                      and memory_needed(model, micro // n, args.bf16) < free), None)  # fmt: skip
        remedy = (
            f"--accumulate {args.accumulate * parts} (BatchNorm then sees {micro // parts} images)"
            if parts
            else "--width 0.25 or a smaller --batch-size"
        )
        raise ValueError(
            f"a step of {micro} images of {args.backbone} needs about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on {device}. Try {remedy}"
        )
    return needed / 2**30


def check_space(model: ScratchDet, args: Namespace) -> float:
    """GB of the run's checkpoints; ValueError where the disk has less."""
    out = Path(args.out)
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    # weights, momentum and averaged weights; last.pt, previous.pt and the one being written
    size = sum(p.numel() * p.element_size() for p in model.parameters()) * (3 if args.ema else 2)
    missing = [n for n in ("last.pt", "previous.pt", "last.tmp") if not (out / n).exists()]
    needed = size * len(missing)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"--out {out}: its checkpoints need {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB "
            "are free. Free some space, or choose another --out"
        )
    return 3 * size / 1e9


def check_shared_memory(micro: int, args: Namespace) -> None:
    """Workers hand batches over in /dev/shm; ValueError where it is too small (64 MB in Docker)."""
    shm, local = Path("/dev/shm"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not args.workers or not shm.exists():
        return
    each = PREFETCH * local * micro * 3 * args.size**2  # bytes, for a worker of each rank
    needed, (total, _, free) = args.workers * each, shutil.disk_usage(shm)
    if total and needed > free:  # a total of 0 is a tmpfs without a limit
        raise ValueError(
            f"--workers {args.workers}: their batches need up to {needed / 1e9:.3f} GB of "
            f"/dev/shm, {free / 1e9:.3f} GB are free. Use --workers {int(free // each)}, or give "
            "it more (docker run --shm-size 4g)"
        )


# ------------------------------------------------------------------------------ its processes


def fresh_store() -> dict:
    """Arguments of init_process_group. torchrun on one node keeps its store when it restarts ranks,
    with the addresses of the dead ones in it (pytorch issue 135712): use other keys each time."""
    env = os.environ.get
    if env("TORCHELASTIC_USE_AGENT_STORE") != "True" or env("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart {env('TORCHELASTIC_RESTART_COUNT')}", store)
    return {"store": store, "rank": rank, "world_size": world}


def start_ranks(args: Namespace) -> tuple[int, int, torch.device]:
    """(rank, world, device); more than one process where torchrun started us."""
    check_device(args.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **fresh_store())
    return rank, world, device
