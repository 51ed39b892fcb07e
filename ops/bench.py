"""Times the ops against their rungs, their reference and their peers, on this machine.

    python -m ops.bench            some three minutes; rewrites the table in ops/README.md
    python -m ops.bench --quick    half a minute; prints only

All candidates of a row run in turn in one process, on the same tensors and, on the CPU, on one
thread; a time is the median. Equality is checked in the same run: with the reference always, with
a peer where its rules and ours coincide. A ratio between two columns of one run holds elsewhere,
too; a time alone does not. torchvision joins in where it is installed.
"""

import argparse
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import ops
from scratchdet import Config, cxcywh_to_xyxy, make_priors

from . import ladder, peers, reference

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
LIMITS = (0.01, 400, 0.45, 200)  # score, top k, IoU, detections: the SSD's


# ------------------------------------------------------------------------------- regimes


def random_boxes(n, rng):
    corner = torch.rand(n, 2, generator=rng)
    return torch.cat([corner, corner + torch.rand(n, 2, generator=rng) * 0.2 + 0.02], dim=1)


def clustered_boxes(n, rng):
    """Ten objects, each found n / 10 times."""
    centre = random_boxes(10, rng)[torch.randint(10, (n,), generator=rng)]
    return centre + torch.randn(n, 4, generator=rng) * 0.005


def objects(num_images, mean, rng):
    """Boxes (T,4) and offsets (N+1,): 1 + Poisson(mean - 1) objects an image."""
    counts = torch.poisson(torch.full((num_images,), mean - 1.0), generator=rng).long() + 1
    size = torch.rand(int(counts.sum()), 2, generator=rng) * 0.6 + 0.05
    corner = torch.rand(size.shape, generator=rng) * (1 - size)
    return torch.cat([corner, corner + size], 1), torch.cat([counts[:1] * 0, counts.cumsum(0)])


def outputs(num_images, regime, rng):
    """loc, logits as of a trained network (some 3,200 pairs > .01 an image) or an untrained one."""
    loc = torch.randn(num_images, 8732, 4, generator=rng) * 0.3
    if regime == "untrained":  # every score is about 1/21: all 174,640 pairs pass
        return loc, torch.randn(num_images, 8732, 21, generator=rng) * 0.3
    logits = torch.randn(num_images, 8732, 21, generator=rng)
    logits[..., 0] += 8.3
    for image in logits:
        near = torch.randint(8732, (400,), generator=rng)  # priors that see an object
        image[near, 0] -= 4
        image[near, torch.randint(1, 21, (400,), generator=rng)] += 4
    return loc, logits


# ------------------------------------------------------------------------------- measuring


def measure(candidates, seconds):
    """{name: call} in turn -> {name: (wall ms, CPU ms)}, medians, until `seconds` are spent.

    A sample is as many calls as take 2 ms: a single short call would pay for the caches that a
    long one before it has swept out.
    """
    repeats, samples = {}, {name: [] for name in candidates}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = 1 + int(2e-3 / (time.perf_counter() - start))
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
        for name, call in candidates.items():
            if (
                rounds > 5
                and sum(wall for wall, _ in samples[name]) * repeats[name] > 1e3 * seconds
            ):
                continue  # slow, and known well enough by now
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            samples[name].append([1e3 * x / repeats[name] for x in spent])
    return {k: tuple(map(statistics.median, zip(*v, strict=True))) for k, v in samples.items()}


class Table:
    """Rows of the result, printed as they come and kept as Markdown."""

    def __init__(self):
        self.lines = [
            "| op | input | who | ms | CPU ms | kernel is faster by |",
            "|---|---|---|---|---|---|",
        ]

    def add(self, op, case, times, scale=None):
        """`times` of measure(), ours first; `scale` {name: factor} where a part was timed."""
        ours = next(iter(times.values()))[1]
        for name, (wall, cpu) in times.items():
            factor = (scale or {}).get(name, 1)
            cells = [f"{x * factor:.3g}" for x in (wall, cpu)]
            ratio = "" if name == next(iter(times)) else f"{cpu * factor / ours:.1f}x"
            about = "" if factor == 1 else f" (1/{factor} timed)"
            self.line(f"| {op} | {case} | {name}{about} | {cells[0]} | {cells[1]} | {ratio} |")

    def line(self, text):
        print(text, flush=True)
        self.lines.append(text)


def check(condition, message):
    if not condition:
        raise SystemExit(f"error: {message}: a kernel is wrong, or was built from other sources")


# ------------------------------------------------------------------------------- the three ops


def bench_nms(table, sizes, seconds, rng):
    rungs, torchvision = ladder.load("cpu"), peers.torchvision_nms()
    for regime, draw in (("random", random_boxes), ("clustered", clustered_boxes)):
        for n in sizes:
            boxes, scores = draw(n, rng), torch.rand(n, generator=rng)
            groups = torch.zeros(n, dtype=torch.int64)
            args = boxes, scores, groups, 0.45
            keep = ops.nms(*args)
            best_first = scores.sort(descending=True, stable=True).indices
            kept = best_first[keep[best_first]]
            candidates = {"kernel": partial(ops.nms, *args)}
            for name, rung in rungs.items():
                check(torch.equal(rung(*args), keep), f"{name} of {n} {regime} boxes")
                candidates[name] = partial(rung, *args)
            if n <= 2000 or regime == "clustered":  # else it takes seconds
                check(torch.equal(reference.nms(*args), keep), f"nms of {n} {regime} boxes")
                candidates["reference"] = partial(reference.nms, *args)
                candidates["ssd.pytorch recipe"] = partial(peers.recipe_nms, boxes, scores, 0.45, n)
            if torchvision:
                check(torch.equal(torchvision(boxes, scores, 0.45), kept), "nms, torchvision")
                candidates["torchvision"] = partial(torchvision, boxes, scores, 0.45)
            table.add("nms", f"{n} {regime}, {len(kept)} kept", measure(candidates, seconds))


def bench_match(table, cases, seconds, rng):
    priors = cxcywh_to_xyxy(make_priors(Config()))
    torchvision = peers.torchvision_match()
    for num_images, mean in cases:
        boxes, offsets = objects(num_images, mean, rng)
        args = priors, boxes, offsets
        matched = ops.match(*args)
        alone = no_shared_prior(*args)
        few = offsets[: 4 + 1]
        expected = reference.match(priors, boxes, few, 0.5)
        check(torch.equal(matched[: len(few) - 1], expected), "match, reference")
        recipe = peers.recipe_match(*args, 0.5)
        check(torch.equal(recipe[alone], matched[alone]), "match, ssd.pytorch recipe")
        candidates = {
            "kernel": partial(ops.match, *args),
            "ssd.pytorch recipe": partial(peers.recipe_match, *args, 0.5),
            "the same, with encoding": partial(peers.recipe_match_and_encode, *args, 0.5),
        }
        if torchvision:
            theirs = torch.stack(torchvision(*args))
            theirs = torch.where(theirs >= 0, theirs + offsets[:-1, None], -1)
            check(torch.equal(theirs[alone], matched[alone]), "match, torchvision")
            candidates["torchvision"] = partial(torchvision, *args)
        if num_images == 1:
            candidates["reference"] = partial(reference.match, *args, 0.5)
        case = f"batch {num_images}, {len(boxes) / num_images:.1f} boxes an image"
        table.add("match", case, measure(candidates, seconds))


def no_shared_prior(priors, boxes, offsets):
    """Images where no two boxes share their best prior: only there the peers lose no box."""
    best = [
        reference.pairwise_iou(b, priors).argmax(1) for b in boxes.split(offsets.diff().tolist())
    ]
    return torch.tensor([len(set(b.tolist())) == len(b) for b in best])


def bench_postprocess(table, batches, seconds, rng):
    priors = make_priors(Config())
    priors_xyxy = cxcywh_to_xyxy(priors)
    torchvision = peers.torchvision_postprocess(*LIMITS)
    for regime in ("trained", "untrained"):
        for n in batches:
            loc, logits = outputs(n, regime, rng)
            few = min(n, 2)  # of the slow ones
            check_postprocess(loc[:2], logits[:2], priors, regime)
            recipe = partial(peers.recipe_postprocess, loc[:few], logits[:few], priors, *LIMITS)
            candidates = {
                "kernel": partial(ops.postprocess, loc, logits, priors, *LIMITS),
                "ssd.pytorch recipe": recipe,
            }
            if n == 1:
                args = loc, logits, priors, *LIMITS
                candidates["reference"] = partial(reference.postprocess, *args)
            if torchvision:
                candidates["torchvision"] = partial(torchvision, loc, logits, priors_xyxy)
            times = measure(candidates, seconds)
            table.add(
                "postprocess", f"batch {n}, {regime}", times, {"ssd.pytorch recipe": n // few}
            )


def check_postprocess(loc, logits, priors, regime):
    """Scores, labels and counts equal the reference's, and torchvision's where nothing is clipped.

    A score or an IoU within rounding of its threshold may change a few of 200 detections: one
    image of the two may differ, and it is said.
    """
    inside = priors.clone()  # boxes that stay in the image however loc moves them
    inside[:, :2] = inside[:, :2] * 0.4 + 0.3
    inside[:, 2:] *= 0.3
    _, scores, labels, count = ops.postprocess(loc, logits, inside, *LIMITS)
    _, ref_scores, ref_labels, ref_count = reference.postprocess(loc, logits, inside, *LIMITS)
    same = (count == ref_count) & ((scores - ref_scores).abs() < 1e-6).all(1)
    same &= (
        (labels == ref_labels)
        | ((scores - scores.roll(1, 1)).abs() < 1e-6)
        | ((scores - scores.roll(-1, 1)).abs() < 1e-6)
    ).all(1)
    report(same, f"postprocess, {regime}, reference")
    recipe = peers.recipe_postprocess(loc, logits, inside, *LIMITS)
    report(equal_scores(scores, count, [x[:, 4] for x in recipe]), f"postprocess, {regime}, recipe")
    torchvision = peers.torchvision_postprocess(*LIMITS)
    if torchvision:
        theirs = torchvision(loc, logits, cxcywh_to_xyxy(inside))
        same = equal_scores(scores, count, [x["scores"] for x in theirs])
        report(same, f"postprocess, {regime}, torchvision")


def equal_scores(scores, count, theirs):
    return torch.tensor(
        [
            len(t) == k and bool(((s[:k] - t.sort(descending=True).values).abs() < 1e-6).all())
            for s, k, t in zip(scores, count.tolist(), theirs, strict=True)
        ]
    )


def report(same, what):
    if not same.all():
        print(f"{what}: {int((~same).sum())} of {len(same)} images differ (rounding)", flush=True)
    check(same.any(), what)


# ------------------------------------------------------------------------------- the build


def bench_build(table):
    """CPU seconds of the first import of ops, with an empty build folder, and of the second."""
    code = (
        "import torch, time, resource as r; c = time.process_time(); import ops;"
        "u = r.getrusage(r.RUSAGE_CHILDREN);"
        "print(time.process_time() - c + u.ru_utime + u.ru_stime)"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(__file__).parent, Path(folder) / "ops")
        seconds = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
            )
            check(done.returncode == 0, f"import ops: {done.stderr}")
            seconds.append(float(done.stdout.split()[-1]))
    table.line(f"| build | all CPU ops | first import | | {1e3 * seconds[0]:.0f} | |")
    table.line(f"| build | all CPU ops | later imports | | {1e3 * seconds[1]:.0f} | |")


# ------------------------------------------------------------------------------- a GPU


def gpu_times(call, inputs):
    """Microseconds of call(*tensors): a graph replay from cold and from warm L2, and with Python.

    `inputs` are copies of the same tensors, together twice the L2 cache: going round them, each
    call reads from memory.
    """
    graphs = []
    for tensors in inputs:
        call(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(*tensors)
        graphs.append(graph)

    def median(run, rounds=50):
        spent = []
        for i in range(rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(i)
            end.record()
            end.synchronize()
            spent.append(1e3 * start.elapsed_time(end))
        return statistics.median(spent)

    def with_python(i):
        call(*inputs[i % len(inputs)])

    cold = median(lambda i: graphs[i % len(graphs)].replay())
    return cold, median(lambda i: graphs[0].replay()), wall_us(with_python)


def wall_us(run, rounds=20):
    spent = []
    for i in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(i)
        torch.cuda.synchronize()
        spent.append(1e6 * (time.perf_counter() - start))
    return statistics.median(spent)


def bench_cuda(table, rng):
    """The kernels and rungs as CUDA graphs; peers, which synchronise, by wall time alone."""
    rungs = ladder.load("cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    priors = make_priors(Config())
    priors_xyxy = cxcywh_to_xyxy(priors)
    cases = []  # op, input, tensors, {name: call}, {peer: call}
    for n in (400, 8732):
        tensors = random_boxes(n, rng), torch.rand(n, generator=rng), torch.zeros(n).long()
        calls = {"kernel": lambda *t: ops.nms(*t, 0.45)}
        slow = {}
        for name in ladder.NMS:
            if name == "nms_4_block" and n > 1024:
                continue
            where = slow if name in ("nms_1_pairs", "nms_2_tiles") else calls  # host in the loop
            where[name] = lambda *t, rung=rungs[name]: rung(*t, 0.45)
        if torchvision := peers.torchvision_nms():
            slow["torchvision"] = lambda b, s, g, nms=torchvision: nms(b, s, 0.45)
        cases.append(("nms", f"{n} random", tensors, calls, slow))
    for mean in (2.4, 7.3):
        tensors = priors_xyxy, *objects(128, mean, rng)
        calls = {
            "kernel": torch.ops.scratchdet.match.default,
            **{n: rungs[n] for n in ladder.MATCH},
        }
        calls = {name: lambda *t, f=f: f(*t, 0.5) for name, f in calls.items()}
        slow = {"torchvision": peers.torchvision_match()} if peers.torchvision_match() else {}
        cases.append(("match", f"batch 128, {mean} boxes an image", tensors, calls, slow))
    for regime in ("trained", "untrained"):
        for dtype in (torch.float32, torch.bfloat16):
            loc, logits = [x.to(dtype) for x in outputs(32, regime, rng)]
            calls = {"kernel": lambda *t: ops.postprocess(*t, *LIMITS)}
            slow = {}
            if torchvision := peers.torchvision_postprocess(*LIMITS):
                anchors = priors_xyxy.cuda()
                slow["torchvision"] = lambda a, b, _, f=torchvision, p=anchors: f(
                    a.float(), b.float(), p
                )
            case = f"batch 32, {regime}, {str(dtype).split('.')[1]}"
            cases.append(("postprocess", case, (loc, logits, priors), calls, slow))
    for op, case, tensors, calls, slow in cases:
        size = sum(t.numel() * t.element_size() for t in tensors)
        copies = min(64, 2 * cache // size + 1)
        inputs = [[t.cuda() for t in tensors] for _ in range(copies)]
        expected = calls["kernel"](*tensors)  # the CPU's kernel, or the reference
        ours = None
        for name, call in calls.items():
            check(close(call(*inputs[0]), expected), f"{op}, {case}, {name} on CUDA")
            cold, warm, wall = gpu_times(call, inputs)
            ours = ours or wall
            cells = [f"{x:.1f}" for x in (cold, warm, wall)]
            table.line(f"| {op} | {case} | {name} | {' | '.join(cells)} | {wall / ours:.1f}x |")
        for name, call in slow.items():
            call(*inputs[0])
            wall = wall_us(lambda i, call=call, inputs=inputs: call(*inputs[i % len(inputs)]), 5)
            table.line(f"| {op} | {case} | {name} | | | {wall:.0f} | {wall / ours:.1f}x |")


def close(result, expected):
    """Equal, but for rounding in one image of a batch of detections."""
    if torch.is_tensor(result):
        return torch.equal(result.cpu(), expected)
    same = (result[3].cpu() == expected[3]) & ((result[1].cpu() - expected[1]).abs() < 1e-6).all(1)
    return int((~same).sum()) <= len(same) // 16


# ------------------------------------------------------------------------------- the report


def hardware():
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = found[1]
    try:
        git = ["git", "-C", str(README.parent), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{name}, 1 thread, torch {torch.__version__}, commit {commit}"


def write_readme(text):
    readme = README.read_text() if README.exists() else "# ops\n"
    if BEGIN not in readme:
        readme += f"\n## Measured\n\n{BEGIN}\n{END}\n"
    head, tail = readme.split(BEGIN)[0], readme.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer inputs; README.md stays")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    if not ops.COMPILED["cpu"] or ops.MODE == "emulate":
        raise SystemExit(f"error: the CPU kernels are not loaded ({ops.describe()})")
    rng = torch.Generator().manual_seed(0)
    print(hardware(), "\n" + ops.describe(), flush=True)
    seconds = 0.1 if quick else 1.0
    cpu = Table()
    print(*cpu.lines, sep="\n")
    bench_nms(cpu, (400, 8732) if quick else (400, 1000, 2000, 8732), seconds, rng)
    many = [(32, 2.4), (128, 2.4)]
    single = [(1, 1), (1, 5), (1, 20), (1, 100), *many, (32, 7.3), (128, 7.3)]
    bench_match(cpu, many[:1] if quick else single, seconds, rng)
    bench_postprocess(cpu, (1,) if quick else (1, 32), seconds, rng)
    text = [f"`python -m ops.bench`, {hardware()}.", "", *cpu.lines]
    if not quick:
        bench_build(cpu)
        text = [text[0], "", *cpu.lines]
    if torch.cuda.is_available() and ops.COMPILED["cuda"]:
        gpu = Table()
        gpu.lines = [
            "| op | input | who | graph, cold L2, us | warm, us | with Python, us | slower by |"
        ]
        gpu.lines += ["|---|---|---|---|---|---|---|"]
        print(*gpu.lines, sep="\n")
        bench_cuda(gpu, rng)
        text += ["", f"On {torch.cuda.get_device_name()}:", "", *gpu.lines]
    else:
        text += ["", "CUDA: not measured (no GPU with built kernels at hand)."]
        print(text[-1])
    if not quick:
        write_readme("\n".join(text))
        print(f"wrote the table into {README}")


if __name__ == "__main__":
    main()
