"""Checks before the first step: whether the flags make sense, what the run costs, whether it fits.

Where something does not fit, the error names the flag that helps.
"""

import itertools
import math
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plumbing.cores import ranks_here
from plumbing.machine import free_memory, free_space
from plumbing.program import as_words, check_range
from plumbing.workers import PREFETCH

# ------------------------------------------------------------------------------ the flags


SMALLEST = 96  # pixels, of --sizes: with smaller images gradients exploded
A_YEAR = 366 * 24 * 60  # minutes; nobody means more


def size_and_share(text: str) -> tuple[int, float]:
    """One value of --sizes: "160:.45" -> (160, 0.45)."""
    try:
        size, share = text.split(":")
        return int(size), float(share)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected SIZE:SHARE, such as 160:.5") from None


def check_flags(args: Namespace, given: Namespace) -> None:
    """ValueError where a number is out of range or two flags contradict each other."""
    check_range(args, "batch_size accumulate iterations save_every", 1)
    check_range(args, "overfit workers eval_every", 0)
    check_range(args, "lr", 0, sys.float_info.max)
    check_range(args, "seed", 0, 2**63 - 1)
    check_range(args, "warmup drops", 0, 1)
    check_range(args, "minutes", 0.01, A_YEAR)
    if not args.out:
        raise ValueError("--out '': expected the name of a folder, such as runs/NAME")
    if args.init == "":
        raise ValueError("--init '': expected a checkpoint, such as weights/photos.pt")
    if given.minutes and given.iterations:
        raise ValueError("--minutes and --iterations both say how long to train: give one")
    if given.drops and args.schedule == "linear":
        raise ValueError(f"--drops: recipe {args.recipe} falls on a line to zero and has none")
    if args.init is None or Path(args.init).exists():  # else only a run that it began can go on
        check_sizes(args)
    if args.sync_bn and not args.device.startswith("cuda"):
        raise ValueError(
            f"--sync-bn --device {args.device}: torch's SyncBatchNorm runs on GPUs only. Leave it "
            "out (each rank then normalises by its own images), or use --device cuda"
        )


def check_sizes(args: Namespace) -> None:
    """ValueError unless the sizes end with the network's, none is larger or below SMALLEST, and the
    shares grow."""
    grows = [(SMALLEST, 0.0), *args.sizes]
    if args.sizes and not (
        grows[-1] == (args.size, 1)
        and all(a[1] < b[1] and SMALLEST <= b[0] <= args.size for a, b in itertools.pairwise(grows))
    ):
        raise ValueError(
            f"--sizes {as_words(args.sizes)}: expected sizes of {SMALLEST} to {args.size} with "
            f"shares that grow, {args.size}:1 at the end, such as 160:.5 {args.size}:1"
        )


def micro_batch(args: Namespace, world: int) -> int:
    """Images per forward pass of one rank. ValueError if --batch-size does not divide, or BatchNorm
    would see a single image."""
    parts = world * args.accumulate
    micro, rest = divmod(args.batch_size, parts)
    if rest or micro < 1:
        raise ValueError(
            f"--batch-size {args.batch_size}: {world} rank(s) x --accumulate {args.accumulate} do "
            f"not divide it; {max(1, micro) * parts} or {(max(1, micro) + 1) * parts} would do"
        )
    if micro * (world if args.sync_bn else 1) == 1 and args.bn != "none":
        raise ValueError(
            f"--batch-size {args.batch_size} leaves a (micro-)batch of 1 image: BatchNorm has no "
            "statistics on the 1x1 map. Use a larger --batch-size, a smaller --accumulate, or "
            "--bn none"
        )
    return micro


# ------------------------------------------------------------------------------ the machine


def about_data(train: list, test: list, classes: tuple[str, ...]) -> str:
    """One line: how many images and classes there are; a warning if train and test overlap."""
    seen = len({r.path for r in train} & {r.path for r in test})
    note = f" ({seen:,} of them trained on: no measure of new images)" if seen else ""
    return (
        f"{len(train):,} training images, {len(test):,} to evaluate{note}, {len(classes)} classes"
    )


def plan(args: Namespace, images: int, seconds: float | None, gib: float, gb: float, device) -> str:
    """Lines to print: what the run will do and, if a step has been timed (`seconds`), its cost."""
    text = (
        f"recipe {args.recipe}: {args.iterations:,} steps of {args.batch_size} images "
        f"({args.iterations * args.batch_size / images:.1f} epochs), learning rate {args.lr:g} "
        f"({args.schedule}), augmentation {args.augment}, {'bf16' if args.bf16 else 'fp32'}"
    )
    if args.sizes:
        text += ", images of " + ", ".join(f"{size}" for size, _ in args.sizes) + " px"
    if seconds:
        minutes = args.iterations * seconds / 60
        units = ((2, 60, "seconds"), (120, 1, "minutes"), (math.inf, 1 / 60, "hours"))
        takes = next(f"{minutes * n:,.0f} {unit}" for below, n, unit in units if minutes < below)
        text += f"\nthis will take about {takes}, {gib:.1f} GiB on {device}, {gb:.2g} GB of disk"
        if minutes > 7 * 24 * 60:
            text += "\nthat is more than a week: --minutes 60 takes a recipe for an hour"
    return text


def seconds_per_step(one_step: Callable[[], Tensor], states: tuple, at_least: float) -> float:
    """Runs `one_step` 3 times or more, for `at_least` seconds -> mean seconds of a step.

    Afterwards the `states` (modules, optimizer) are as before. Fetching the result of a step waits
    for the device.
    """
    before = [deepcopy(x.state_dict()) for x in states]
    times = []
    while len(times) < 3 or sum(times[1:]) < at_least:
        begin = time.perf_counter()
        one_step().item()
        took = [time.perf_counter() - begin]
        if dist.is_initialized():  # all ranks must take as many steps, and return the same
            dist.broadcast_object_list(took, 0)
        times += took
    for x, state in zip(states, before, strict=True):
        x.load_state_dict(state)
    return sum(times[1:]) / (len(times) - 1)  # the first one warms up


def mean_step_time(
    one_step: Callable, sizes: tuple, steps_done, states: tuple, minutes: float
) -> float:
    """Mean seconds of a step of the run, which trains at each of `sizes` until that share of its
    steps, `steps_done`. `one_step(size)` does a step; the plan is for `minutes` of training, or 0.
    """
    at_least, before = min(30, 3 * minutes) / len(sizes), [0.0, *steps_done]  # seconds
    shares = [end - start for start, end in itertools.pairwise(before)]
    seconds = [seconds_per_step(partial(one_step, size), states, at_least) for size in sizes]
    return sum(share * each for share, each in zip(shares, seconds, strict=True))


def costs(model: nn.Module, micro: int, args: Namespace) -> tuple[float, float]:
    """(GiB of memory per step, GB of checkpoints); ValueError with a remedy if they do not fit."""
    check_shared_memory(micro, args)
    return check_memory(model, micro, args), check_space(model, args)


def memory_needed(model: nn.Module, images: int, bf16: bool) -> int:
    """Bytes per step: weights, and all that backward needs, counted on the meta device."""
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


def check_memory(model: nn.Module, micro: int, args: Namespace) -> float:
    """GiB of memory per step; if they are not free, ValueError with the flag that helps."""
    device = model.priors_cxcywh.device
    here = ranks_here() if device.type == "cpu" else 1
    needed, free = memory_needed(model, micro, args.bf16), free_memory(device) / here
    if needed > free:
        weights = memory_needed(model, 0, args.bf16)
        parts = next((n for n in range(2, micro) if micro % n == 0
                      and weights + (needed - weights) / n < free), None)  # fmt: skip
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


def check_space(model: nn.Module, args: Namespace) -> float:
    """GB of the run's checkpoints; ValueError if the disk has less."""
    out = Path(args.out)
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    # weights and momentum, in three files: last.pt, previous.pt and the one being written; those of
    # an older run are moved aside, not replaced
    size = sum(p.numel() * p.element_size() for p in model.parameters()) * 2
    files = [out / name for name in ("last.pt", "previous.pt", "last.tmp")]
    needed = size * sum(not (args.resume and file.exists()) for file in files)
    free = free_space(existing)
    if needed > free:
        raise ValueError(
            f"--out {out}: its checkpoints need {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB "
            "are free. Free some space, or choose another --out"
        )
    return 3 * size / 1e9


def check_shared_memory(micro: int, args: Namespace) -> None:
    """ValueError if /dev/shm is too small for the batches of the workers (Docker: 64 MB)."""
    shm = Path("/dev/shm")
    if not args.workers or not shm.exists():
        return
    ahead = 2 if args.device.startswith("cuda") else PREFETCH
    each = ahead * ranks_here() * micro * 3 * args.size**2  # bytes, for a worker of each rank
    needed, free = args.workers * each, free_space(shm)
    if needed > free:
        raise ValueError(
            f"--workers {args.workers}: their batches need up to {needed / 1e9:.3f} GB of "
            f"/dev/shm, {free / 1e9:.3f} GB are free. Use --workers {int(free // each)}, or give "
            "it more (docker run --shm-size 4g)"
        )
