"""Random and nasty cases of the ops against the reference, under sanitizers.

    python tests/fuzz_ops.py                                100,000 cases, CPU kernels, ASan + UBSan
    python tests/fuzz_ops.py --kernels cuda --cases 1000    the CUDA kernels and rungs, emulated
    python tests/fuzz_ops.py --kernels cuda --sanitize thread --cases 100

Case i depends on the seed and on i alone: `--first i --cases 1` runs it again. The exit status is
not 0 if a result differs from the reference or a sanitizer speaks.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SANITIZERS = {  # name: (library to load before Python, compiler flags)
    "address": ("libasan.so", ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]),
    "thread": ("libtsan.so", ["-fsanitize=thread"]),
    "none": (None, []),
}
INF, NAN = math.inf, math.nan
NASTY = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-20, 1e18, 2e19, 3e38, -3e38, 0.5]


def restart(args):
    """This script again, in a process that has the sanitizer's library from the start."""
    library, _ = SANITIZERS[args.sanitize]
    env = dict(os.environ, SCRATCHDET_FUZZ="1", SCRATCHDET_OPS="reference", OMP_NUM_THREADS="1")
    if library:
        compiler = os.environ.get("CXX", "c++")
        found = subprocess.run(
            [compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not os.path.isabs(found):
            sys.exit(f"error: {compiler} has no {library}: install the sanitizers, or CXX=g++")
        env["LD_PRELOAD"] = found
        env["ASAN_OPTIONS"] = "detect_leaks=0"  # Python itself keeps memory to the end
        env["UBSAN_OPTIONS"] = "print_stacktrace=1"
        env["TSAN_OPTIONS"] = "halt_on_error=1"
    command = [sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run(command, env=env).returncode


def nasty(x, rng, share):
    """Some elements replaced by numbers that break careless code."""
    import torch

    which = torch.randint(len(NASTY), x.shape, generator=rng)
    replaced = torch.rand(x.shape, generator=rng) < share
    return torch.where(replaced, torch.tensor(NASTY)[which], x)


def odd_strides(x, rng):
    """The same values: dense, behind an offset of one element, every other row, or turned."""
    import torch

    style = int(torch.randint(5, (), generator=rng))
    if style == 1:
        flat = torch.cat([x.new_zeros(1), x.reshape(-1)])
        return flat[1:].view(x.shape)
    if style == 2:
        return torch.stack([x, x.new_zeros(()).expand_as(x)], dim=1).flatten(0, 1)[::2]
    if style == 3 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if style == 4 and len(x):
        return x.flip(0).contiguous().flip(0)
    return x


def check(i, seed, rungs):
    """Run case i; -> how many images of a postprocess differed by no more than rounding."""
    import test_ops
    import torch

    import ops
    from ops import reference

    rng = torch.Generator().manual_seed((seed << 32) + i)
    share = (0.0, 0.02, 0.3)[int(torch.randint(3, (), generator=rng))]
    op = ("match", "nms", "postprocess", "mined_cross_entropy")[i % 4]
    if op == "mined_cross_entropy":
        n, p, c = (int(torch.randint(high, (), generator=rng)) for high in (3, 40, 40))
        logits, labels = test_ops.mined_case(rng, n, p, c + 1, levels=i // 4 % 3)
        logits = odd_strides(nasty(logits, rng, share / 4), rng)
        test_ops.check_mined(logits, odd_strides(labels, rng), i // 4 % 5)
        result = ops.mined_cross_entropy(logits, labels)
        arguments = result, logits, labels, result
        torch.testing.assert_close(
            torch.ops.scratchdet.mined_cross_entropy_backward(*arguments),
            reference.mined_cross_entropy_backward(*arguments),
            equal_nan=True, rtol=1e-5, atol=1e-6,
        )  # fmt: skip
        return 0
    if op == "postprocess":
        sizes = [int(torch.randint(high, (), generator=rng)) for high in (3, 40, 6)]
        tensors = list(test_ops.post_case(rng, sizes[0], sizes[1], sizes[2] + 1))
        limits = (0.01, 1 + sizes[1] // 2, 0.45, 1 + int(torch.randint(20, (), generator=rng)))
        tensors = [odd_strides(nasty(x, rng, share / 4), rng) for x in tensors]
        return test_ops.check_postprocess(*tensors, *limits)
    if op == "nms":
        boxes, scores, groups, threshold = test_ops.nms_case(rng, 80)
        case = nasty(boxes, rng, share), nasty(scores, rng, share), groups, threshold
    else:
        priors, boxes, offsets, threshold = test_ops.match_case(rng, 60, 6)
        case = nasty(priors, rng, share), nasty(boxes, rng, share), offsets, threshold
    expected = getattr(reference, op)(*case)
    case = [odd_strides(x, rng) if torch.is_tensor(x) else x for x in case]
    getattr(test_ops, f"check_{op}")(*case, expected=expected)
    for name, rung in rungs.items():
        if name.startswith(op):
            assert torch.equal(rung(*case), expected), (name, case)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
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

    torch.set_num_threads(1)
    flags = ["-O1", "-g", *SANITIZERS[args.sanitize][1]]
    flags += ["-DEMULATE_FULL_BLOCKS"] * args.full_blocks
    emulate = args.kernels == "cuda"
    sources = [name + (".cu" if emulate else ".cpp") for name in ops.NAMES]
    ops.build(f"fuzz_{args.kernels}", sources, flags, emulate=emulate)  # in the reference's place
    rungs = ladder.load("emulate", flags) if emulate and not args.only_final else {}
    started, excused = time.process_time(), 0
    for i in range(args.first, args.first + args.cases):
        try:
            excused += check(i, args.seed, rungs)
        except AssertionError:
            print(f"case {i} of seed {args.seed} differs from the reference", file=sys.stderr)
            raise
        if (i + 1) % 10_000 == 0:
            print(f"{i + 1} cases, {time.process_time() - started:.0f} CPU s", flush=True)
    print(
        f"{args.cases} cases of the {args.kernels} kernels equal the reference, sanitizer "
        f"{args.sanitize} silent, {time.process_time() - started:.0f} CPU s; {excused} images "
        "differed by rounding at a threshold or a tie"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
