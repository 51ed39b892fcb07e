"""Random and nasty cases of the ops against the reference, under sanitizers.

    python tests/harness/fuzz_ops.py                       100,000 cases, CPU kernels, ASan + UBSan
    python tests/harness/fuzz_ops.py --kernels cuda --cases 1000    CUDA kernels and rungs, emulated
    python tests/harness/fuzz_ops.py --kernels cuda --sanitize thread --cases 100 --op nms

The ops take turns (op_table.py), or one is named. Case i of an op depends on the seed and on i
alone: `--op OP --first i --cases 1` runs it again. The exit status is not 0 if a result differs
from the reference or a sanitizer speaks.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SANITIZERS = {  # name: (library to load before Python, compiler flags)
    "address": ("libasan.so", ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]),
    "thread": ("libtsan.so", ["-fsanitize=thread"]),
    "none": (None, []),
}


def restart(args):
    """This script again, in a process that has the sanitizer's library from the start."""
    library, _ = SANITIZERS[args.sanitize]
    env = dict(os.environ, SCRATCHDET_FUZZ="1", SCRATCHDET_OPS="reference", OMP_NUM_THREADS="1")
    if library:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        found = subprocess.run(
            [*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not os.path.isabs(found):
            sys.exit(
                f"error: {compiler[0]} has no {library}: install the sanitizers, or set CXX=g++"
            )
        env["LD_PRELOAD"] = found
        env["ASAN_OPTIONS"] = "detect_leaks=0"  # Python itself keeps memory to the end
        env["UBSAN_OPTIONS"] = "print_stacktrace=1"
        env["TSAN_OPTIONS"] = "halt_on_error=1"
    command = [sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run(command, env=env).returncode


def check(op, i, seed, rungs):
    """Run case i; -> how many images differed from the reference by no more than rounding."""
    import torch
    from harness import op_table

    from ops import reference

    arguments = op_table.fuzz_case(op, torch.Generator().manual_seed((seed << 32) + i))
    excused = op_table.OPS[op].check(op, arguments) or 0
    if op == "mined_cross_entropy":  # and its gradient
        logits, labels, _ = arguments
        result = torch.ops.scratchdet.mined_cross_entropy(*arguments)
        arguments = result, logits, labels, result
        torch.testing.assert_close(
            torch.ops.scratchdet.mined_cross_entropy_backward(*arguments),
            reference.mined_cross_entropy_backward(*arguments),
            equal_nan=True, rtol=1e-2 if logits.dtype.itemsize == 2 else 1e-5, atol=1e-6,
        )  # fmt: skip
    for name, rung in rungs.items():
        if op_table.op_of_rung(name) == op:
            assert torch.equal(rung(*arguments), getattr(reference, op)(*arguments)), name
    return excused


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", help="this one alone")
    parser.add_argument("--kernels", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only-final", action="store_true", help="with cuda: no rungs")
    parser.add_argument("--full-blocks", action="store_true", help="with cuda: as on a GPU")
    parser.add_argument("--sanitize", choices=SANITIZERS, default="address")
    args = parser.parse_args()
    if "SCRATCHDET_FUZZ" not in os.environ:
        return restart(args)

    os.environ.pop("LD_PRELOAD", None)  # the sanitizer is in this process; the compiler needs none
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    import torch

    import ops
    from ops import ladder

    if args.op and args.op not in ops.NAMES:
        sys.exit(f"error: --op {args.op}: expected one of {', '.join(ops.NAMES)}")
    torch.set_num_threads(1)
    flags = ["-O1", "-g", *SANITIZERS[args.sanitize][1]]
    flags += ["-DEMULATE_FULL_BLOCKS"] * args.full_blocks
    emulate = args.kernels == "cuda"
    sources = [name + (".cu" if emulate else ".cpp") for name in ops.NAMES]
    ops.build(f"fuzz_{args.kernels}", sources, flags, emulate=emulate)  # in the reference's place
    rungs = ladder.load("emulate", flags) if emulate and not args.only_final else {}
    started, excused = time.process_time(), 0
    for i in range(args.first, args.first + args.cases):
        op = args.op or ops.NAMES[i % len(ops.NAMES)]
        try:
            excused += check(op, i, args.seed, rungs)
        except AssertionError:
            print(f"--op {op} --seed {args.seed} --first {i}: not the reference", file=sys.stderr)
            raise
        if (i + 1) % 10_000 == 0:
            print(f"{i + 1} cases, {time.process_time() - started:.0f} CPU s", flush=True)
    which = args.op or f"{len(ops.NAMES)} ops"
    print(
        f"{args.cases} cases of the {args.kernels} kernels of {which} equal the reference, "
        f"sanitizer {args.sanitize} silent, {time.process_time() - started:.0f} CPU s; "
        f"{excused} images differed by rounding at a threshold or a tie"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
