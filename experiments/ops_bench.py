"""Times the ops against their rungs, their reference and their peers, on this machine.

    python -m experiments.ops_bench            three minutes; rewrites the table in docs/kernels.md
    python -m experiments.ops_bench --quick    half a minute; prints only

All candidates of a row run in turn in one process, on the same tensors and, on the CPU, on one
thread; a time is the median. Equality is checked in the same run: with the reference always, with
a peer where its rules and ours coincide. A ratio between two columns of one run holds elsewhere,
too; a time alone does not. torchvision joins in where it is installed. mined_cross_entropy is timed
as a part of the whole loss, by experiments/loss_bench.py. An op that has no bench of its own here
is timed beside its reference, on the inputs of tests/harness/op_table.py.
"""

import argparse
import os
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
from ops import ladder, reference
from plumbing import machine
from scratchdet import Config, cxcywh_to_xyxy, make_priors

from . import peers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
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
    """Boxes (T,4) and offsets (N+1,): 1 + Poisson(mean - 1) objects an image; in one, `mean`."""
    counts = torch.tensor([int(mean)])
    if num_images > 1:
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
            "| op | input | who | ms | CPU ms | CPU ms / kernel's |",
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


# ------------------------------------------------------------------------------- the ops


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
    """Counts, scores and labels equal the reference's, the recipe's and torchvision's.

    torchvision clips boxes to the image first, so the priors are moved where nothing is clipped. A
    score or an IoU within rounding of its threshold may change some of 200 detections, so an image
    may differ, which is printed; all of them may not.
    """
    inside = torch.cat([priors[:, :2] * 0.4 + 0.3, priors[:, 2:] * 0.3], dim=1)

    def images(result):  # (boxes, scores, labels, count) -> [(scores, labels)]
        return [(s[:k], y[:k]) for s, y, k in zip(*result[1:], strict=True)]

    mine = images(ops.postprocess(loc, logits, inside, *LIMITS))
    recipe = peers.recipe_postprocess(loc, logits, inside, *LIMITS)
    others = {
        "reference": images(reference.postprocess(loc, logits, inside, *LIMITS)),
        "ssd.pytorch recipe": [(x[:, 4], x[:, 5].long()) for x in recipe],
    }
    if torchvision := peers.torchvision_postprocess(*LIMITS):
        theirs = torchvision(loc, logits, cxcywh_to_xyxy(inside))
        others["torchvision"] = [(x["scores"], x["labels"]) for x in theirs]
    for name, other in others.items():
        same = [same_image(*a, *b) for a, b in zip(mine, other, strict=True)]
        if not all(same):
            print(f"{regime}, {name}: {same.count(False)} of {len(same)} images differ (rounding)")
        check(any(same), f"postprocess, {regime}, {name}")


def same_image(scores, labels, other_scores, other_labels):
    """Equal but for the order of equal scores."""
    return (
        len(scores) == len(other_scores)
        and torch.allclose(scores, other_scores.sort(descending=True).values, rtol=0, atol=1e-6)
        and torch.equal(labels.sort().values, other_labels.sort().values)
    )


def bench_colour(table, batches, seconds, rng):
    """A batch of training, where each step of the jitter is on half the time; and of evaluation."""
    neutral = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    for n in batches:
        images = torch.randint(0, 256, (n, 3, 300, 300), dtype=torch.uint8, generator=rng)
        inside = torch.tensor([[0, 0, 300, 300]] * n)
        drawn = (torch.rand(n, 5, generator=rng) * 2 - 1) * torch.tensor([1, 32, 0.5, 0.5, 18])
        is_used = torch.rand(n, 5, generator=rng) < 0.5
        jitter = torch.where(is_used, neutral + drawn, neutral)
        for regime, rows in (("training", jitter), ("evaluation", neutral.expand(n, 5))):
            settings = [123.0, 117.0, 104.0], [1.0, 1.0, 1.0], "rgb", torch.float32
            args = images, inside, rows, *settings
            check(torch.equal(ops.colour(*args), reference.colour(*args)), "colour, reference")
            check(torch.equal(ops.colour(*args), peers.steps_colour(*args)), "colour, steps")
            candidates = {
                "kernel": partial(ops.colour, *args),
                "PyTorch, image by image": partial(peers.steps_colour, *args),
                "reference": partial(reference.colour, *args),
            }
            table.add("colour", f"batch {n}, {regime}", measure(candidates, seconds))


def bench_others(table, seconds, rng):
    """Ops without a bench of their own: the kernel beside the reference."""
    sys.path.append(str(ROOT / "tests"))
    from harness.op_table import OPS

    known = ("colour", "match", "mined_cross_entropy", "nms", "postprocess")
    for op in [name for name in OPS if name not in known]:
        arguments = OPS[op].full_case(rng)
        OPS[op].check(op, arguments)
        calls = {"kernel": getattr(ops, op), "reference": getattr(reference, op)}
        candidates = {name: partial(call, *arguments) for name, call in calls.items()}
        table.add(op, "full size", measure(candidates, seconds))


# ------------------------------------------------------------------------------- the build


def bench_build(table):
    """CPU seconds of the first import of ops, with an empty build folder, and of the second."""
    code = (
        "import torch, time, resource as r; c = time.process_time(); import ops;"
        "u = r.getrusage(r.RUSAGE_CHILDREN);"
        "print(time.process_time() - c + u.ru_utime + u.ru_stime)"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "ops", Path(folder) / "ops")
        seconds = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # without nvcc's minute
            )  # fmt: skip
            check(done.returncode == 0, f"import ops: {done.stderr}")
            seconds.append(float(done.stdout.split()[-1]))
    table.line(f"| build | all CPU ops | first import | | {1e3 * seconds[0]:.0f} | |")
    table.line(f"| build | all CPU ops | later imports | | {1e3 * seconds[1]:.0f} | |")


# ------------------------------------------------------------------------------- the report


def write_page(text):
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer inputs; the page stays")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    if not ops.COMPILED["cpu"] or ops.MODE == "emulate":
        raise SystemExit(f"error: the CPU kernels are not loaded ({ops.describe()})")
    rng = torch.Generator().manual_seed(0)
    # Now, before the minutes in which somebody may commit.
    where = f"{machine.hardware('cpu')}, commit {machine.commit()}"
    print(where, "\n" + ops.describe(), flush=True)
    seconds = 0.1 if quick else 1.0
    cpu = Table()
    print(*cpu.lines, sep="\n")
    bench_colour(cpu, (8,) if quick else (8, 32), seconds, rng)
    bench_others(cpu, seconds, rng)
    bench_nms(cpu, (400, 8732) if quick else (400, 1000, 2000, 8732), seconds, rng)
    many = [(32, 2.4), (128, 2.4)]
    single = [(1, 1), (1, 5), (1, 20), (1, 100), *many, (32, 7.3), (128, 7.3)]
    bench_match(cpu, many[:1] if quick else single, seconds, rng)
    bench_postprocess(cpu, (1,) if quick else (1, 32), seconds, rng)
    if not quick:
        bench_build(cpu)
    text = [f"`python -m experiments.ops_bench`, {where}.", "", *cpu.lines]
    if torch.cuda.is_available() and ops.COMPILED["cuda"]:
        from . import ops_bench_cuda

        text += ["", f"On {torch.cuda.get_device_name()}:", "", *ops_bench_cuda.bench(rng)]
    else:
        text += ["", "CUDA: not measured (no GPU with built kernels at hand)."]
        print(text[-1])
    if not quick:
        write_page("\n".join(text))
        print(f"wrote the table into {PAGE}")


if __name__ == "__main__":
    main()
