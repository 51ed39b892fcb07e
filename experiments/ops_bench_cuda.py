"""The part of `python -m experiments.ops_bench` that needs a GPU: kernels, rungs, torchvision."""

import statistics
import time

import torch

import ops
from ops import ladder, reference
from scratchdet import Config, cxcywh_to_xyxy, make_priors

from . import peers
from .ops_bench import LIMITS, check, objects, outputs, random_boxes

HOST_IN_THE_LOOP = ("nms_1_pairs", "nms_2_tiles")  # no CUDA graph can record these


def graph_us(call, inputs):
    """Microseconds of a graph replay of call(*tensors), from cold and from warm L2; medians.

    `inputs` are copies of the same tensors, together twice the L2 cache: going round them, each
    replay reads from memory.
    """
    graphs = []
    for tensors in inputs:
        call(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(*tensors)
        graphs.append(graph)

    def median(graphs):
        spent = []
        for i in range(50 + len(graphs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[i % len(graphs)].replay()
            end.record()
            end.synchronize()
            spent.append(1e3 * start.elapsed_time(end))
        return statistics.median(spent)

    return median(graphs), median(graphs[:1])


def wall_us(call, inputs):
    """Microseconds of a call until the GPU is done, Python and launches included; the median."""
    spent = []
    for i in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs[i % len(inputs)])
        torch.cuda.synchronize()
        spent.append(1e6 * (time.perf_counter() - start))
    return statistics.median(spent)


def bench(rng):
    """The lines of the table. Kernels and rungs are CUDA graphs; what waits for the GPU is not."""
    rungs, priors = ladder.load("cuda"), make_priors(Config())
    priors_xyxy = cxcywh_to_xyxy(priors)
    lines = ["| op | input | who | graph, cold L2, us | warm, us | with Python, us | slower by |"]
    lines.append("|---|---|---|---|---|---|---|")
    print(*lines, sep="\n")

    def compare(op, case, tensors, calls, peer):
        """`calls` {name: op}, the kernel first; `peer` may be None, and may wait for the GPU."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        copies = min(64, 2 * torch.cuda.get_device_properties(0).L2_cache_size // size + 1)
        inputs = [[t.cuda() for t in tensors] for _ in range(copies)]
        expected = calls["kernel"](*tensors)  # the CPU's kernel, or the reference
        kernel_us = None
        for name, call in {**calls, **({"torchvision": peer} if peer else {})}.items():
            cells = ["", ""]
            if name != "torchvision":
                check(close(call(*inputs[0]), expected), f"{op}, {case}, {name} on CUDA")
            if name not in ("torchvision", *HOST_IN_THE_LOOP):
                cells = [f"{x:.1f}" for x in graph_us(call, inputs)]
            us = wall_us(call, inputs)
            kernel_us = kernel_us or us
            cells += [f"{us:.1f}", f"{us / kernel_us:.1f}x"]
            lines.append(f"| {op} | {case} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)

    images = torch.randint(0, 256, (128, 3, 300, 300), dtype=torch.uint8, generator=rng)
    inside, most = torch.tensor([[0, 0, 300, 300]] * 128), torch.tensor([1, 32, 0.5, 0.5, 18])
    neutral = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    jitter = neutral + (torch.rand(128, 5, generator=rng) * 2 - 1) * most
    jitter = torch.where(torch.rand(128, 5, generator=rng) < 0.5, jitter, neutral)
    for dtype in (torch.float32, torch.bfloat16):
        settings = [123.0, 117.0, 104.0], [1.0, 1.0, 1.0], "rgb", dtype
        calls = {"kernel": lambda *t, s=settings: ops.colour(*t, *s)}
        case = f"batch 128, {str(dtype).removeprefix('torch.')}"
        compare("colour", case, (images, inside, jitter), calls, None)
    for n in (400, 8732):
        tensors = random_boxes(n, rng), torch.rand(n, generator=rng), torch.zeros(n).long()
        names = [x for x in ladder.NMS if x != "nms_4_block" or n <= 1024]
        calls = {"kernel": torch.ops.scratchdet.nms.default, **{x: rungs[x] for x in names}}
        calls = {name: lambda *t, f=f: f(*t, 0.45) for name, f in calls.items()}
        peer = peers.torchvision_nms()
        peer = peer and (lambda b, s, g, f=peer: f(b, s, 0.45))
        compare("nms", f"{n} random", tensors, calls, peer)
    for mean in (2.4, 7.3):
        calls = {"kernel": torch.ops.scratchdet.match.default}
        calls |= {name: rungs[name] for name in ladder.MATCH}
        calls = {name: lambda *t, f=f: f(*t, 0.5) for name, f in calls.items()}
        tensors, peer = (priors_xyxy, *objects(128, mean, rng)), peers.torchvision_match()
        compare("match", f"batch 128, {mean} boxes an image", tensors, calls, peer)
    logits = outputs(128, "trained", rng)[1]
    labels = torch.where(torch.rand(128, 8732, generator=rng) < 0.003, 1, 0)  # 26 an image
    calls = {"kernel": ops.mined_cross_entropy, "reference": reference.mined_cross_entropy}
    calls = {name: lambda *t, f=f: f(*t, 3) for name, f in calls.items()}
    compare("mined_cross_entropy", "batch 128, forward", (logits, labels), calls, None)
    for regime in ("trained", "untrained"):
        for dtype in (torch.float32, torch.bfloat16):
            loc, logits = [x.to(dtype) for x in outputs(32, regime, rng)]
            peer, anchors = peers.torchvision_postprocess(*LIMITS), priors_xyxy.cuda()
            peer = peer and (lambda a, b, _, f=peer, p=anchors: f(a.float(), b.float(), p))
            calls = {"kernel": lambda *t: ops.postprocess(*t, *LIMITS)}
            case = f"batch 32, {regime}, {str(dtype).removeprefix('torch.')}"
            compare("postprocess", case, (loc, logits, priors), calls, peer)
    return lines


def close(result, expected):
    """Equal, but for rounding in one image of a batch of detections or of cross-entropies."""
    if torch.is_tensor(result) and not result.is_floating_point():
        return torch.equal(result.cpu(), expected)
    if torch.is_tensor(result) and result.dim() == 4:  # of colour, every bit
        return torch.equal(result.cpu(), expected)
    if torch.is_tensor(result):
        same = ((result.cpu() - expected).abs() < 1e-5).all(1)
        return int((~same).sum()) <= len(same) // 16
    same = (result[3].cpu() == expected[3]) & ((result[1].cpu() - expected[1]).abs() < 1e-6).all(1)
    return int((~same).sum()) <= len(same) // 16
