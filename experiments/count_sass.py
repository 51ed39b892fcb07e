"""What the compiled CUDA kernels cost, counted in their machine code. No GPU is needed.

    python -m experiments.count_sass [--ops FOLDER]      needs nvcc and nvdisasm; two minutes

nvdisasm comes with the CUDA toolkit, or with `pip install nvidia-cuda-nvdisasm`. A row per kernel:
registers, shared memory of a block, instructions in all; blocks that fit a multiprocessor (of an
H100 or H200); and for each of its hot loops, named by a piece of its source, how many instructions
and how many loads from memory and from shared memory it takes per item.

From them, and from how often each loop runs for the input that stands in the row, follow two lower
bounds for an H200: the time to issue the instructions (4 a cycle on each of 132 multiprocessors, at
1.98 GHz), and the time to move the bytes at 4.3 TB/s. Latency, launches (some 2 us each), bank
conflicts and divergence come on top. So: **estimated from counts, not measured**, and only good for
finding out what cannot be fast, and for comparing two versions of a kernel.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from experiments.compile_cuda import OPS, find, kernel_name

PROCESSORS, SCHEDULERS, CLOCK, BYTES_PER_S = 132, 4, 1.98e9, 4.3e12
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 << 10, 2048, 32  # of one multiprocessor, sm_90
P, C = 8732, 21


class Loop(NamedTuple):
    anchor: str  # a piece of a source line in the loop
    item: str  # the opcode that stands for one item of its work
    times: float  # items of a thread
    of: float = 1.0  # items that one such instruction handles
    share: float = 1.0  # how much of the loop's body a warp walks through: branches jump over some


class Work(NamedTuple):
    """One launch of a kernel on the input named by `case`."""

    case: str
    blocks: int
    threads: int
    megabytes: float  # read and written
    loops: tuple[Loop, ...] = ()
    shared: int = 0  # dynamic
    straight: float = 1.0  # how much of what is in no loop a warp walks through


def rows_of(n):
    return n * P


COPY = Loop("tile[i] = as_float", "LDG", C)
WORK = {
    "score_kernel<float>": Work(
        "batch 32, every score passes", 32 * 69, 128, rows_of(32) * (C + C - 1) * 4 / 1e6,
        (COPY, Loop("best = fmaxf", "LDS", C), Loop("expf(row[c] - best)", "MUFU.EX2", C),
         Loop("score > threshold", "STG", C - 1)), shared=128 * C * 4,
    ),
    "class_kernel<true>": Work(
        "batch 32, every score passes", 32 * 20, 256, rows_of(32) * 20 * 4 / 1e6,
        (Loop("d == last", "LDG", 5 * P / 256), Loop("even += unsorted", "LDS", 2 * 400, 1)),
        400 * 36,
    ),
    "match_kernel": Work(
        "batch 128, 7 boxes in the slowest image", 128, 1024, rows_of(128) * 8 / 1e6,
        (Loop("a.x1 < b.x2", "VOTE", 3 * 7, 1 / 3, share=0.4),), straight=0.5,
    ),
    "colour_kernel<BFloat16>": Work(
        "batch 128, every step on", 128 * 88, 256, 128 * 9e4 * 9 / 1e6,
        shared=1024 * 6, straight=0.55,
    ),
    "row_kernel<float>": Work(
        "batch 128", P, 128, rows_of(128) * (C * 4 + 16) / 1e6,
        (COPY, Loop("top = fmaxf", "LDS", C), Loop("expf(row[c] - top)", "MUFU.EX2", C)),
        128 * C * 4,
    ),
    "mine_kernel": Work(
        "batch 128", 128, 1024, rows_of(128) * 8 / 1e6, (Loop("d == last", "LDG", 4 * P / 1024),)
    ),
    "gradient_kernel<float>": Work(
        "batch 128, one row in 100 counts", P // 2, 256, rows_of(128) * (C * 4 + 4) / 1e6,
        (Loop("zeros[k]", "STG", C),), straight=0.3,
    ),
    "sort_kernel": Work(
        f"{P} boxes", 137, 256, P * 4 * 137 / 1e6,
        (Loop("even += some[k] >= least", "LDS", P / 4, 4),),
    ),
    "tile_kernel": Work("4096 boxes: a panel", 64 * 65 // 2, 64, 64 * 65 // 2 * 64 * 8 / 1e6,
                        (Loop("my_group", "LDS.128", 64, share=0.35),)),
}  # fmt: skip


class Instruction(NamedTuple):
    opcode: str
    line: str  # of the source
    target: int | None  # of a branch, as an index


def disassemble(text, folder):
    """nvdisasm's output -> {kernel: [Instruction]}."""
    kernels, lines, labels, branches = {}, {}, {}, []
    name = line = None

    def finish():
        for where, label in branches:
            code[where] = code[where]._replace(target=labels.get(label))

    code = []
    for row in text.splitlines():
        if found := re.match(r"\.text\.(\w+):", row):
            finish()
            name, code, labels, branches, line = found[1], [], {}, [], ""
            kernels[kernel_name(name)] = code
        elif found := re.match(r"(\.L_\w+):", row):
            labels[found[1]] = len(code)
        elif found := re.search(r'//## File "([^"]+)", line (\d+)', row):
            path = Path(found[1])
            if path not in lines:
                lines[path] = path.read_text().splitlines() if folder in path.parents else []
            number = int(found[2])
            line = lines[path][number - 1] if number <= len(lines[path]) else ""
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", row):
            label = re.search(r"`\((\.L_\w+)\)", found[2])
            if label and found[1].startswith("BRA"):
                branches.append((len(code), label[1]))
            code.append(Instruction(found[1], line, None))
    finish()
    return {k: v for k, v in kernels.items() if v}


def loops_of(code):
    """Ranges of instructions that a branch at their end repeats; the innermost ones alone."""
    every = {
        (x.target, i + 1) for i, x in enumerate(code) if x.target is not None and x.target <= i
    }
    every = {(a, b) for a, b in every if b - a > 10}  # shorter: an atomic that is tried again
    return [a for a in every if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in every)]


def per_item(code, loop):
    """Of the innermost loop with that line and most of those opcodes: (instructions, loads from
    memory, loads from shared memory) per item; or None."""
    candidates = []
    for start, end in loops_of(code):
        body = code[start:end]
        items = sum(x.opcode.startswith(loop.item) for x in body) * loop.of
        if items and any(loop.anchor in x.line for x in body):
            count = Counter(x.opcode.split(".")[0] for x in body)
            candidates.append(
                (items, len(body) / items, count["LDG"] / items, count["LDS"] / items)
            )
    return max(candidates)[1:] if candidates else None


def occupancy(registers, shared, threads):
    """Blocks that fit one multiprocessor."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    by = [BLOCKS, THREADS // threads, REGISTERS // (per_warp * threads // 32)]
    return min(*by, SHARED // (shared + 1024))


def estimate(code, work):
    """-> microseconds to issue, microseconds to move the bytes, instructions of a warp."""
    inside = {i for start, end in loops_of(code) for i in range(start, end)}
    instructions = work.straight * (len(code) - len(inside))
    for loop in work.loops:
        cost = per_item(code, loop)
        if cost is None:
            return None
        instructions += cost[0] * loop.times * loop.share
    of_one = math.ceil(work.blocks / PROCESSORS) * work.threads / 32 / SCHEDULERS * instructions
    return 1e6 * of_one / CLOCK, 1e12 * work.megabytes / BYTES_PER_S, instructions


def compile_and_count(source, ops, nvcc, nvdisasm, folder):
    from torch.utils.cpp_extension import include_paths

    from ops.jit import NVCC_FLAGS

    cubin = f"{folder}/{source.stem}.cubin"
    flags = [f for f in NVCC_FLAGS if not f.startswith("-I")] + [f"-I{ops}"]
    flags += [f"-I{path}" for path in include_paths()]
    command = [nvcc, *flags, "-arch=sm_90", "-Xptxas", "-v", "-cubin", "-o", cubin, str(source)]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"error: {source}: nvcc failed\n{said.stderr}")
    resources, name = {}, None
    for line in said.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = kernel_name(found[1])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            resources[name] = int(found[1]), int(shared[1]) if shared else 0
    text = subprocess.run([nvdisasm, "-g", "-c", cubin], capture_output=True, text=True).stdout
    return resources, disassemble(text, ops)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ops", type=Path, default=OPS, help="another version's folder of kernels")
    ops = parser.parse_args().ops.resolve()
    os.environ["SCRATCHDET_OPS"] = "reference"  # import ops without building anything
    tools = {name: find(name) for name in ("nvcc", "nvdisasm")}
    if missing := [name for name, path in tools.items() if path is None]:
        hint = "pip install nvidia-cuda-nvdisasm, or a CUDA toolkit, and CUDA_HOME"
        print(f"no {' and no '.join(missing)} on this machine: nothing was counted ({hint})")
        return 0
    print("Estimated from counts, not measured: lower bounds for an H200.\n")
    print("| kernel | registers | shared bytes | blocks per multiprocessor | instructions "
          "| a loop: instructions, loads, shared loads per item "
          "| input | issue, us | bytes, us |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(ops.glob("*.cu")):
            resources, kernels = compile_and_count(source, ops, *tools.values(), folder)
            for name, code in sorted(kernels.items()):
                work = WORK.get(name)
                registers, static = resources[name]
                if work is None:
                    print(f"| `{name}` | {registers} | {static} | | {len(code)} | | | | |")
                    continue
                shared = static + work.shared
                cells = [registers, shared, occupancy(registers, shared, work.threads), len(code)]
                costs = [(loop, per_item(code, loop)) for loop in work.loops]
                about = "; ".join(
                    f"`{loop.anchor}` {cost[0]:.1f}, {cost[1]:.1f}, {cost[2]:.1f}"
                    if cost
                    else f"`{loop.anchor}` not found"
                    for loop, cost in costs
                )
                times = estimate(code, work)
                us = [f"{x:.1f}" for x in times[:2]] if times else ["?", "?"]
                print("|", " | ".join(map(str, [f"`{name}`", *cells, about, work.case, *us])), "|")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
