"""Where the time of a training step goes, and how much of the machine it uses.

    python -m experiments.step_bench [the flags of train.py]

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
from unittest import mock

import torch

import data
import train
from plumbing import machine, plan, sources
from plumbing.network import count_macs
from plumbing.program import run_program

LOSS = "loss, matching"
PARTS = ("data wait", "copy, colour, mean", "forward", LOSS, "backward", "log", "optimizer")


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


def marked(function, mark, part: str):
    """The function; when it has returned, `part` ends."""

    def call(*args, **more):
        result = function(*args, **more)
        mark(part)
        return result

    return call


def step_in_parts(network, model, optimizer, batches, args, mark) -> None:
    """One step of train.py, with `mark(part)` called at the end of each of `PARTS`."""
    total_norm = torch.nn.utils.get_total_norm

    def after_backward(gradients):
        mark("backward")
        return total_norm(gradients)

    def loader():
        while True:
            batch = next(batches)
            mark("data wait")
            yield batch

    with (
        mock.patch.object(data, "prepare", marked(data.prepare, mark, "copy, colour, mean")),
        mock.patch.object(train, "multibox_loss", marked(train.multibox_loss, mark, LOSS)),
        mock.patch.object(torch.nn.utils, "get_total_norm", after_backward),
    ):
        forward = marked(network, mark, "forward")
        forward.no_sync = getattr(network, "no_sync", None)
        logged, _ = train.forward_backward(forward, model, loader(), args)
    mark("log")
    train.update(optimizer, 0, logged, args)
    mark("optimizer")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Time the parts of a step with the flags of train.py; -> what it prints."""
    args = train.parse_args(argv)
    rank, world, device = machine.start_ranks(args)
    micro, say = plan.micro_batch(args, world), print if rank == 0 else lambda *_: None
    machine.keep_large_tensors()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    records, _, classes, _ = sources.read_data(args)
    model = train.make_model(args, classes, None, say).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    args.bf16 = machine.has_bf16(device) if args.bf16 is None else args.bf16
    optimizer = train.make_optimizer(model, args)
    network = train.wrap(model, args, world)
    batches = data.batches(
        records, model.config.size, batch_size=micro, seed=args.seed,
        augment=args.augment or "crop", workers=args.workers, rank=rank, world=world,
        cache=args.cache, pin=device.type == "cuda",
    )  # fmt: skip
    say(f"commit {machine.commit()}, {machine.hardware(device)}, {world} process(es)")
    parts = f"{world} process(es) x {args.accumulate} x {micro} images"
    say(f"{args.backbone}, width {args.width:g}: a step of {parts}, {args.workers} workers")

    def one_step(mark):
        step_in_parts(network, model, optimizer, batches, args, mark)

    result = report(one_step, model, micro * args.accumulate, args.bf16, say)
    machine.end_ranks()
    return result


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
    flops = 6 * count_macs(model, model.config.size) * images * steps / busy
    product = product_flops(device, dtype)
    name = str(dtype).removeprefix("torch.")
    unit = "TFLOP/s" if gpu else "TFLOP a CPU second"
    say(f"{rate:.1f} images/s on each process (wall time)")
    say(f"{flops / 1e12:.3f} {unit} = {flops / product:.1%} of a matrix product's "
        f"{product / 1e12:.3f} ({name})")  # fmt: skip
    say(f"peak memory {peak / 2**30:.2f} GiB")
    ratio = {"images_per_s": rate, "tflops": flops / 1e12, "of_product": flops / product}
    return {**parts, **ratio, "peak_gib": peak / 2**30}


if __name__ == "__main__":
    run_program(main)
