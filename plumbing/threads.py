"""One training step on all cores of a CPU: each thread takes a part of the batch.

torch's own threads wait for each other in every operator. If they sleep while they wait, two of
them train a small network hardly faster than one; if they spin, any other process on the machine
slows them down threefold. Here each thread takes its images through the whole network. The threads
wait for each other only in BatchNorm, whose statistics are those of the whole batch. So a step
computes the same as on one thread, up to rounding. Sums over the parts have a fixed order: with the
same number of threads the bits are the same, however busy the machine is. Several ranks (cores.py,
torchrun) have threads of their own each; the gradients are then the means of all ranks.

    network = in_threads(model, 8)
    loc, logits = network(images)          # each thread forward
    loss(loc, logits).backward()           # each thread backward: gradients of `model`

    for result in spread(function, items, 2):  # evaluation: whole items, results in their order
"""

import contextlib
import copy
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ops
from ops.jit import BuildError, build

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUT += (nn.AlphaDropout, nn.FeatureAlphaDropout)
THREADS = torch.get_num_threads()  # all that torch would use


def pool(threads: int, each: int = 1) -> ThreadPoolExecutor:
    """A pool of threads, each of which may use `each` threads of OpenMP (a setting per thread)."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,))


class JointNorm(torch.autograd.Function):
    """One part's x (n, C, H, W) -> y, by the statistics of all parts (joint_norm.cpp).

    A thread that waits there has released Python's lock, as in every operator of torch.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, mean, var, where: tuple, relu: bool, *numbers):
        x = x.contiguous(memory_format=torch.channels_last)
        y, *of_all = torch.ops.scratchdet.joint_norm(
            x, weight, bias, mean, var, *where, relu, *numbers
        )
        ctx.save_for_backward(x, weight, bias, *of_all)
        ctx.how = *where, relu
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dy = dy.contiguous(memory_format=torch.channels_last)
        gradients = torch.ops.scratchdet.joint_norm_backward(dy, *ctx.saved_tensors, *ctx.how)
        return *gradients, *[None] * 6


class JointBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the parts of all threads, which wait for each other here.

    `replica` sets the attributes `where`, (meeting, part of the batch, layer) and `relu`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return JointNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            self.where, self.relu, self.momentum, self.eps,
        )  # fmt: skip


def replica(model: nn.Module, part: int, meeting: int) -> nn.Module:
    """A copy of the network that shares its weights and buffers but has gradients of its own."""
    twin = copy.deepcopy(model)
    pairs = [*zip(twin.parameters(), model.parameters(), strict=True)]
    for ours, theirs in pairs + [*zip(twin.buffers(), model.buffers(), strict=True)]:
        ours.data, ours.grad = theirs.data, None
    for place, module in enumerate(twin.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.relu = JointBatchNorm, False
            module.where = meeting, part, place
    for module in twin.modules():
        if isinstance(module, nn.Sequential):
            for i in range(1, len(module)):
                if isinstance(module[i], nn.ReLU) and isinstance(module[i - 1], JointBatchNorm):
                    module[i - 1].relu, module[i] = True, nn.Identity()
    return twin


class Step(torch.autograd.Function):
    """Runs all parts forward, and later all parts backward -> the outputs of the whole batch."""

    @staticmethod
    def forward(ctx, threads: "Threads", images: Tensor, _: Tensor):
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def forward(twin: nn.Module, part: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=enabled):
                return twin(part)

        parts = images.tensor_split(len(threads.twins))
        ctx.threads, ctx.outputs = threads, threads.run(forward, threads.twins, parts)
        for name, count in threads.model.named_buffers():
            if name.endswith("num_batches_tracked"):
                count += 1
        return tuple(torch.cat([x.detach() for x in xs]) for xs in zip(*ctx.outputs, strict=True))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        sizes = [len(outputs[0]) for outputs in ctx.outputs]
        gradients = zip(*(g.split(sizes) for g in gradients), strict=True)
        ctx.threads.run(torch.autograd.backward, ctx.outputs, gradients)
        ctx.outputs = None
        ctx.threads.collect()
        return None, None, None


class Threads(nn.Module):
    """`model`, trained by `parts` threads, each with `each` threads of OpenMP.

    Each batch must have at least `parts` images.
    """

    def __init__(self, model: nn.Module, parts: int, each: int = 1):
        super().__init__()
        build("joint_norm", [Path(__file__).with_name("joint_norm.cpp")])
        self.model, self.pool, self.ops = model, pool(parts, each), torch.ops.scratchdet
        self.meeting = self.ops.meeting(parts)
        self.twins = [replica(model, part, self.meeting) for part in range(parts)]
        self.exchanges = True  # with other ranks, which begin with the same weights
        if dist.is_initialized():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.data, 0)
        self.anchor = torch.zeros(0, requires_grad=True)  # without it autograd would skip Step

    def __del__(self):
        if "meeting" in self.__dict__:
            self.ops.meeting_end(self.meeting)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return Step.apply(self, images, self.anchor)

    def run(self, function: Callable, *parts: Iterable) -> list:
        """Calls function(...) for all parts at once. If one fails, the others stop waiting."""

        def work(*part):
            try:
                return function(*part)
            except BaseException:
                self.ops.meeting_abort(self.meeting)
                raise

        self.ops.meeting_start(self.meeting)
        futures = [self.pool.submit(work, *part) for part in zip(*parts, strict=True)]
        wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        # The cause first, then those of the others that it kept from meeting.
        for error in sorted(errors, key=lambda e: "another part of the batch failed" in str(e)):
            raise error
        return [future.result() for future in futures]

    def collect(self) -> None:
        """Adds the gradients of the parts, in their order, to those of the model."""
        models = (self.model, *self.twins)
        for parameter, *twins in zip(*(m.parameters() for m in models), strict=True):
            for twin in twins:
                if parameter.grad is None:
                    parameter.grad = twin.grad
                elif twin.grad is not None:
                    parameter.grad += twin.grad
                twin.grad = None
        if dist.is_initialized() and self.exchanges:
            self.average_over_ranks()

    def average_over_ranks(self) -> None:
        """Gradients and BatchNorm's running statistics become their means over all ranks.

        One message: DistributedDataParallel's several, sent from hooks of autograd, cost more here.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        tensors = [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [x for norm in norms for x in (norm.running_mean, norm.running_var)]
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view(x.shape))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of this micro-batch stay in this rank, as DistributedDataParallel's would."""
        self.exchanges = False
        yield
        self.exchanges = True


def in_threads(model: nn.Module, images: int) -> nn.Module:
    """`model`, trained by all threads on batches of `images`. It is the model itself where nothing
    can be compiled, and where a layer is dropout: whose numbers are drawn first would vary."""
    if not ops.COMPILED["cpu"] or any(isinstance(m, DROPOUT) for m in model.modules()):
        return model
    parts = min(THREADS, images, 8)
    try:
        network = Threads(model, parts, THREADS // parts)
    except BuildError as error:
        if os.environ.get("SCRATCHDET_OPS") == "require":
            raise
        print(f"all cores at once need one library more: {error}", file=sys.stderr)
        return model
    torch.set_num_threads(1)  # loss and SGD between the parts: waking other threads costs more
    return network


def spread(function: Callable, items: Iterable, threads: int) -> Iterator:
    """function(item) for each item, in their order, by several threads. No gradients."""
    if threads == 1:
        yield from map(torch.no_grad()(function), items)
        return
    with pool(threads) as workers:
        waiting = deque()
        for item in items:
            waiting.append(workers.submit(torch.no_grad()(function), item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
