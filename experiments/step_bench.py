"""Where the time of a training step goes, and how much of the machine it uses.

    python train.py --bench [the usual flags]

On a GPU the parts are timed by CUDA events on its stream, so that nothing waits while it runs; the
wait for data is the host's, in wall time. On a CPU all parts are CPU seconds of this process, all
threads, so that other work on the machine matters little: "data wait" is then the loading itself
with --workers 0, and next to nothing with workers, which are other processes.

"backward" is that of the loss as well as the network's: autograd runs them as one. The copy of a
batch runs beside the step before it (plumbing/prefetch.py); what is left of it is the wait.

FLOP/s count the multiplications and additions of the convolutions, times 3 for forward and
backward, and stand beside a matrix product of the same type in the same run.
"""

import resource
import statistics
import sys
import time

import torch

from scratchdet import count_macs

PARTS = ("data wait", "copy, colour, mean", "forward", "loss, matching", "backward", "log",
         "optimizer")  # fmt: skip


class Clock:
    """`mark(part)` ends a part. Afterwards `seconds()` gives each part's total."""

    def __init__(self, device: torch.device):
        self.gpu, self.marks = device.type == "cuda", []
        self("start")

    def __call__(self, part: str) -> None:
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.process_time()
        self.marks.append((part, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        total = dict.fromkeys(PARTS, 0.0)
        for (_, wall0, at0), (part, wall1, at1) in zip(self.marks, self.marks[1:], strict=False):
            if not self.gpu:
                total[part] += at1 - at0
            elif part == "data wait":
                total[part] += wall1 - wall0
            else:
                total[part] += at0.elapsed_time(at1) / 1e3
        return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device: torch.device) -> tuple[float, float]:
    """(wall seconds, seconds as the parts have them: of the GPU, or CPU time)."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, wall if device.type == "cuda" else cpu


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, in TF32 where float32 convolutions are, too: the
    median of nine."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device)[1] for _ in range(12)][3:]
    return 2 * n**3 / statistics.median(times)


def report(one_step, model, images: int, bf16: bool, say=print) -> dict[str, float]:
    """Run and time `one_step(mark)` of so many images on this rank; -> what it prints."""
    device = model.priors_cxcywh.device
    gpu, dtype = device.type == "cuda", torch.bfloat16 if bf16 else torch.float32
    steps = 50 if gpu else 5
    for _ in range(10 if gpu else 2):  # compilers, cuDNN's choice of algorithms, filled queues
        one_step(lambda part: None)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    clocks = []

    def run():
        for _ in range(steps):
            clocks.append(Clock(device))
            one_step(clocks[-1])

    wall, busy = timed(run, device)
    parts = dict.fromkeys(PARTS, 0.0)
    for clock in clocks:
        for part, seconds in clock.seconds().items():
            parts[part] += seconds / steps
    if gpu:
        peak = torch.cuda.max_memory_allocated(device)
    else:  # KiB on Linux, bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024

    say(f"{steps} steps, {'GPU time; the data wait is wall time' if gpu else 'CPU time'}")
    total = sum(parts.values())
    for part, seconds in parts.items():
        say(f"  {part:20} {1e3 * seconds:9.2f} ms  {seconds / total:6.1%}")
    outside = 1 - (parts["forward"] + parts["backward"]) / total
    say(f"  {'in all':20} {1e3 * total:9.2f} ms  {outside:6.1%} outside the network")
    rate = images * steps / wall
    flops = 6 * count_macs(model) * images * steps / busy
    product = product_flops(device, dtype)
    name = str(dtype).removeprefix("torch.")
    unit = "TFLOP/s" if gpu else "TFLOP a CPU second"
    say(f"{rate:.1f} images/s on each process (wall time)")
    say(f"{flops / 1e12:.3f} {unit} = {flops / product:.1%} of a matrix product's "
        f"{product / 1e12:.3f} ({name})")  # fmt: skip
    say(f"peak memory {peak / 2**30:.2f} GiB")
    ratio = {"images_per_s": rate, "tflops": flops / 1e12, "of_product": flops / product}
    return {**parts, **ratio, "peak_gib": peak / 2**30}
