"""Train ScratchDet from random weights and report its mAP.

    python train.py                                     shapes drawn on the spot, a narrow network:
                                                        minutes on a laptop
    python train.py --voc-root VOCdevkit                the paper's recipe: 100,000 steps of 128
                                                        images, Root-ResNet-34, VOC 07+12
    python train.py --voc-root VOCdevkit --minutes 60   the best this machine can do in an hour
    torchrun --nproc-per-node 4 train.py --voc-root VOCdevkit        several GPUs

One step: a batch of images -> loc, logits -> loss -> gradients -> SGD. Everything of the run is in
its folder (--out): last.pt (checkpoint), log.jsonl (one line per step), run.json (arguments,
commit, machine), detections drawn beside the ground truth, and report.html, which shows it all.

`--resume` goes on from OUT/last.pt, bit for bit on a CPU: samples and random numbers of step s
depend on (seed, s) alone, and the checkpoint holds the rest.
"""

import argparse
import contextlib
import os
import signal
import sys
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

# Idle threads sleep: spinning, they slow everything down wherever the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import eval as evaluation
import ops
from experiments import page, report
from plumbing import machine, plan, run_folder, sources
from plumbing.checkpoint import read_checkpoint, take_weights
from plumbing.halves import in_threads
from plumbing.program import StopSignals, run_program
from scratchdet import Config, ScratchDet, add_config_flags, multibox_loss, summary

# The recipes. `drops`: where the learning rate falls to a tenth, as fractions of the run (sections
# 4.1 to 4.4 of the paper; "released": as in its released code). The short recipes fall on a line to
# zero and warm up for long: large early gradients inflate the weights' norm, and under BatchNorm
# that shrinks every later effective step.
# fmt: off
PAPER = dict(batch_size=128, lr=0.05, schedule="steps", warmup=0.0, augment="ssd")
SHORT = dict(batch_size=8, lr=0.1, schedule="linear", drops=(), warmup=0.3)
SHORT |= dict(backbone="root-resnet18")
RECIPES = {
    "voc07": PAPER | dict(iterations=100_000, drops=(0.45, 0.75, 0.95)),
    "voc12": PAPER | dict(iterations=100_000, drops=(0.45, 0.75, 0.95)),
    "coco": PAPER | dict(iterations=320_000, drops=(150 / 320, 250 / 320, 310 / 320)),
    "ssd120k": PAPER | dict(iterations=120_000, drops=(80 / 120, 100 / 120)),  # Table 1
    "released": PAPER | dict(iterations=100_000, drops=(0.40, 0.75, 0.90)),
    "budget": SHORT | dict(iterations=20_000, augment="ssd", batch_size=64,  # --minutes, on a GPU:
                           save_every=2_000),  # it does 500 such steps in some 20 s
    "shapes": SHORT | dict(iterations=1_150, augment="flip", batch_size=4, lr=0.12, warmup=0.4,
                           width=0.125, stem=(3, 1, 1)),  # the quick start
    "overfit": SHORT | dict(iterations=300, augment="none", lr=0.05, warmup=0.1, width=0.25),
}
# fmt: on
# "budget" on a CPU: 25 images/s per core instead of 1. Flips only: a network this narrow underfits
# stronger augmentation (mAP after an hour .27, with crops .21). What did not help stands in
# docs/results.md: drops instead of the line, averaged weights, half the batch, less warm-up.
ON_CPU = dict(iterations=6_000, backbone="resnet18", width=0.25, augment="flip", batch_size=8)
ON_CPU |= dict(save_every=500, sizes=((160, 0.45), (224, 0.75), (300, 1.0)))  # twice the images
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # section 4.1
LOGGED = ("loc", "conf", "positives", "grad_norm", "stop")  # see forward_backward


def make_parser() -> argparse.ArgumentParser:
    """All flags. Those without a default here take theirs from the recipe."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    group = parser.add_argument_group("data (without a root: drawn shapes)")
    sources.add_data_flags(group)
    add = group.add_argument
    add("--train-sets", nargs="+", metavar="SET", help="VOC: YEAR:NAME, COCO: NAME")
    add("--eval-sets", nargs="+", metavar="SET", help="likewise")
    add("--augment", choices=data.AUGMENT,
        help="ssd: colour, expand, crop, flip; crop: the same without expand")
    add("--overfit", type=int, default=0, metavar="N",
        help="train and evaluate on the first N training images")

    group = parser.add_argument_group("model")
    add_config_flags(group)
    group.add_argument("--init", metavar="FILE",
        help="start from this checkpoint's weights; with other classes the scores start anew")

    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=list(RECIPES), help="default: follows from the data and --minutes")
    add("--batch-size", type=int, help="images of a step, over all processes")
    add("--accumulate", type=int, default=1, help="micro-batches of a step; BN sees one of them")
    add("--lr", type=float, help="default: the recipe's, scaled linearly with the batch size")
    add("--iterations", type=int, help="default: the recipe's, scaled to see as many images")
    add("--minutes", type=float, help="as many iterations as fit, fixed at the start")
    add("--drops", type=float, nargs="*",
        help="where the learning rate falls to a tenth, as fractions of the run")
    add("--warmup", type=float, help="fraction of the run in which the learning rate rises")
    add("--sizes", type=plan.size_and_share, nargs="*", default=(), metavar="SIZE:SHARE",
        help="grow: images of so many pixels until that share of the run's work is done")
    add("--seed", type=int, default=0, help="of the weights and of every sample")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2),
        help="loader processes of each rank")
    add("--cache", metavar="DIR", help="keep the decoded images here, memory-mapped")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="autocast; default: where the hardware is made for it")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-bn", action="store_true", help="several GPUs: BatchNorm over all ranks' images")
    add("--out", metavar="DIR", help="default: runs/RECIPE; a run that is there moves aside")
    add("--resume", action="store_true", help="go on from OUT/last.pt if there is one")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint and pictures")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="measure mAP on the way, too")
    add("--skip-nonfinite", action="store_true", help="leave such steps out, and count them")
    add("--page", action="store_true", help="at the end, the detector as a page: OUT/page.html")
    # fmt: on
    return parser


def recipe_for(given: argparse.Namespace) -> tuple[dict, dict]:
    """What follows from the flags that were given: (other flags' defaults, the recipe's own)."""
    kind = sources.kind_of(given)
    name = given.recipe or {"voc": "voc07", "yolo": "voc07"}.get(kind, kind)
    if not given.recipe and given.overfit:
        name = "overfit"
    elif not given.recipe and given.minutes and kind != "shapes":
        name = "budget"
    base = {"data": kind, "recipe": name, "out": f"runs/{name}"}
    base |= {"priors": "coco" if kind == "coco" else "voc"}  # COCO's objects are smaller
    base |= zip(("train_sets", "eval_sets"), sources.SETS[kind], strict=True)
    if name == "voc12" and kind == "voc":  # section 4.3; VOC2012 test has no public annotations
        base["train_sets"] = ["2007:trainval", "2007:test", "2012:trainval"]
    recipe = RECIPES[name]
    if name == "budget" and not given.device.startswith("cuda"):
        recipe = recipe | ON_CPU
    if given.init and Path(given.init).exists():  # a resumed run may find it gone
        saved = read_checkpoint(given.init)["config"]  # its network is the default
        recipe = recipe | {k: v for k, v in saved.items() if k != "classes"}  # a flag of its own
    return base, recipe


def parse_args(argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """The flags, complete; `defaults` override the recipe's, and what is given overrides both.

    Parsed twice: first to learn which recipe is asked for, then with its defaults.
    """
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    base, recipe = recipe_for(given)
    parser.set_defaults(**(base | recipe | {"lr": None, "iterations": None} | defaults))
    args = parser.parse_args(argv)  # --help ends here, and shows the recipe's numbers
    plan.check_flags(args, given)
    if args.overfit:
        args.eval_sets = args.train_sets  # what is measured, and so what eval.py measures again
    for root in ("voc_root", "coco_root", "yolo_root", "shapes_root"):
        if getattr(args, root):  # so that eval.py finds it from any folder
            setattr(args, root, str(Path(getattr(args, root)).absolute()))
    if args.classes not in (None, "auto"):
        args.classes = str(Path(args.classes).absolute())
    # The linear rule (Goyal et al. 2017): twice the batch, twice the rate, half the steps.
    scale = args.batch_size / recipe["batch_size"]
    args.lr = recipe["lr"] * scale if args.lr is None else args.lr
    args.iterations = args.iterations or round(recipe["iterations"] / scale)
    return args


# ------------------------------------------------------------------------------ optimisation


def stages(args: argparse.Namespace) -> tuple[tuple, tuple, np.ndarray]:
    """The image sizes of the run; until which share of its work, and of its steps, each is used.

    Work is pixels: ((150, 0.5), (300, 1)) are four of five steps at 150 pixels.
    """
    sizes, work = zip(*(args.sizes or [(args.size, 1.0)]), strict=True)
    steps = np.cumsum(np.diff(work, prepend=0) / np.square(sizes))
    return sizes, work, steps / steps[-1]


def progress(step: int, args: argparse.Namespace) -> tuple[float, int]:
    """Before step 0, 1, ...: the share of the run's work that is done, and the next image size."""
    sizes, work, steps = stages(args)
    ends, work = [0.0, *np.rint(steps * args.iterations).tolist()], [0.0, *work]
    i = min(bisect(ends, step), len(sizes)) - 1
    of_stage = (step - ends[i]) / max(1.0, ends[i + 1] - ends[i])
    return work[i] + (work[i + 1] - work[i]) * of_stage, sizes[i]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, ...: a linear warm-up, then drops to a tenth ("steps") or a line to zero.

    The paper drops it after 45, 75 and 95 % of the run (section 4.1) and has no warm-up.
    """
    done, after = progress(step, args)[0], progress(step + 1, args)[0]
    warm = min(1.0, after / max(1e-9, args.warmup))
    if args.schedule == "linear":
        return args.lr * min(warm, (1 - done) / max(1e-9, 1 - args.warmup))
    return args.lr * warm * 0.1 ** sum(done >= drop for drop in args.drops)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Caffe's multipliers. Biases of convolutions (there are some only without BN) learn twice as
    fast and do not decay; the head's BN does not decay; the backbone's does."""
    head_bn, biases, rest = [], [], []
    for name, module in model.named_modules():
        bn = isinstance(module, nn.BatchNorm2d)
        for kind, parameter in module.named_parameters(recurse=False):
            if bn and "head." in f"{name}.":
                head_bn.append(parameter)
            elif kind == "bias" and not bn:
                biases.append(parameter)
            else:
                rest.append(parameter)
    return [
        {"params": rest, "weight_decay": WEIGHT_DECAY, "lr_factor": 1.0},
        {"params": head_bn, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": biases, "weight_decay": 0.0, "lr_factor": 2.0},
    ]


def forward_backward(
    network: nn.Module, model: ScratchDet, batches: Iterator, args: argparse.Namespace,
    stopping: bool = False,
) -> tuple[dict[str, Tensor], list[int]]:  # fmt: skip
    """The gradients of one step -> ({name: scalar} of LOGGED, rows of `records` used).

    "loc" and "conf" are the two losses, "positives" is per image, "grad_norm" the L2 norm (Figure
    1), "stop" the share of the ranks that were told to stop. The loss of each micro-batch is
    divided by its own positives; then micro-batches are averaged, as are ranks (Caffe).
    """
    device, images, parts = model.priors_cxcywh.device, [], []
    for i in range(args.accumulate):
        batch = next(batches)
        images += batch.indices.tolist()
        batch = data.to_device(batch, device)
        inputs = data.prepare(batch, model.config)  # (n, 3, S, S)
        # Ranks exchange gradients once per step, behind the last micro-batch.
        waits = dist.is_initialized() and i < args.accumulate - 1
        with network.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loc, logits = network(inputs)  # (n, P, 4), (n, P, C)
            loss_loc, loss_conf, positives = multibox_loss(
                loc, logits, model.priors_at(inputs.shape[-1]),
                batch.boxes_xyxy, batch.labels, batch.offsets,
            )  # fmt: skip
            # Each micro-batch is divided by its own positives, then by how many there are.
            ((loss_loc + loss_conf) / args.accumulate).backward()
        parts.append(torch.stack([loss_loc, loss_conf, positives / len(inputs)]).detach())
    loc, conf, positives = torch.stack(parts).sum(0) / args.accumulate
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # None: frozen
    norm = nn.utils.get_total_norm(gradients)
    logged = torch.stack([loc, conf, positives, norm, norm.new_tensor(stopping)])
    if dist.is_initialized():
        dist.all_reduce(logged)
        logged /= dist.get_world_size()
    return dict(zip(LOGGED, logged, strict=True)), images


def update(optimizer: torch.optim.Optimizer, step: int, logged: dict, args) -> Tensor:
    """One step of SGD at the learning rate of `step`; clears the gradients. -> whether it counted.

    A step whose loss or gradient is not finite changes nothing. The device decides that by itself
    (`found_inf` of torch's fused optimizers), so the host need not wait for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args) * group["lr_factor"]
    finite = (logged["loc"] + logged["conf"] + logged["grad_norm"]).isfinite()
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


# ------------------------------------------------------------------------------ the run


def read_data(args: argparse.Namespace, checkpoint: dict | None) -> tuple[list, list, tuple, str]:
    """Records to train on, records to evaluate, class names, and what --drop-bad left out."""
    found = sources.Findings(drop=args.drop_bad)
    train, classes = sources.open_data(args, args.train_sets, findings=found)
    test = train
    if not args.overfit:
        test, _ = sources.open_data(args, args.eval_sets, classes, findings=found)
    if args.overfit:
        train = test = train[: args.overfit]
    if checkpoint and checkpoint.get("images", len(train)) != len(train):
        raise ValueError(
            f"{args.out} was started with {checkpoint['images']} training images, the data has "
            f"{len(train)}. Resume with the data it was started with, or choose another --out"
        )
    return train, test, classes, found.dropped_text()


def make_model(args, classes: tuple[str, ...], checkpoint: dict | None, say=print) -> ScratchDet:
    """The network of the flags: with the checkpoint's weights, with those of --init, or random."""
    start = checkpoint or (read_checkpoint(args.init) if args.init else {"config": {}})
    names = [field.name for field in fields(Config) if hasattr(args, field.name)]
    flags = {name: getattr(args, name) for name in names} | {"classes": classes}
    model = ScratchDet(Config.from_dict(start["config"] | flags))
    detects = tuple(start["config"].get("classes", classes))
    if checkpoint and detects != classes:
        raise ValueError(
            f"{args.out}/last.pt detects {', '.join(detects)}, the data has {', '.join(classes)}. "
            "Resume with the data it was started with, or choose another --out"
        )
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.init:
        say(take_weights(model, start, args.init))
    return model


def wrap(model: ScratchDet, args, world: int) -> nn.Module:
    """What a step calls: the model shared between ranks, compiled, or in all threads of a CPU."""
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; keeps the parameters
    if world == 1 and not args.compile and model.priors_cxcywh.is_cpu:
        return in_threads(model, plan.micro_batch(args, world))
    network = model
    if world > 1:  # at small sizes the last maps are missing, and their layers have no gradient
        unused = bool(args.sizes)
        network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    return torch.compile(network) if args.compile else network


def measure(model: ScratchDet, test: list, args, rank: int, world: int) -> dict:
    """The model's results on `test`, with the CPU minutes of all ranks so far."""
    metric = evaluation.metric_of(args.data, args.eval_sets)
    ranks = {"workers": args.workers, "rank": rank, "world": world}
    results = evaluation.evaluate(model, test, metric=metric, **ranks)
    seconds = torch.tensor(sum(os.times()[:4]), device=model.priors_cxcywh.device)
    if world > 1:
        dist.all_reduce(seconds)
    return results | {"cpu_minutes": round(seconds.item() / 60, 2)}


def time_a_step(network, model, optimizer, stream: Callable, args) -> float:
    """Mean seconds of a step over the sizes of the run; model and optimizer stay as they were.

    `stream(size)` gives batches of that size.
    """
    sizes, _, ends = stages(args)
    at_least, total = 3 * (args.minutes or 0) / len(sizes), 0.0
    for size, share in zip(sizes, np.diff(ends, prepend=0), strict=True):
        batches = stream(size)

        def one_step(batches=batches) -> Tensor:
            logged, _ = forward_backward(network, model, batches, args)
            update(optimizer, 0, logged, args)
            return logged["loc"]

        total += share * plan.seconds_per_step(one_step, (model, optimizer), at_least)
    return total


def main(argv: list[str] | None = None) -> dict:
    """Train, then evaluate. Returns the results of the evaluation."""
    args, checkpoint = run_folder.resume(parse_args, argv)
    rank, world, device = machine.start_ranks(args)
    micro, lead, out = plan.micro_batch(args, world), rank == 0, Path(args.out)
    say = print if lead else lambda *_, **__: None
    machine.keep_large_tensors()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: find the fastest way once

    train, test, classes, left_out = read_data(args, checkpoint)
    model = make_model(args, classes, checkpoint, say)
    model = model.to(device, memory_format=torch.channels_last).train()
    args.bf16 = machine.has_bf16(device) if args.bf16 is None else args.bf16
    optimizer = torch.optim.SGD(parameter_groups(model), lr=args.lr, momentum=MOMENTUM, fused=True)
    for parameter in model.parameters():  # at small sizes not all have a gradient to begin with
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    costs = plan.check(model, micro, args)  # what does not fit ends the program here
    network = wrap(model, args, world)
    about = run_folder.describe(args, model.config, machine.processor(device), world)
    say(f"commit {about['commit']}, torch {about['torch']}, {about['machine']}")
    if lead and not checkpoint:
        say(run_folder.start_folder(out, left_out), end="")
    say(f"{ops.describe()}\n{summary(model)}\n{plan.about_data(train, test, classes)}")

    def stream(step: int, images: int, size: int | None = None) -> Iterator[data.Batch]:
        return data.batches(
            train, lambda i: size or progress(i // args.accumulate, args)[1],
            batch_size=images, seed=args.seed, augment=args.augment,
            start_step=step * args.accumulate, workers=args.workers, rank=rank, world=world,
            keep_difficult=args.data != "coco",  # there it marks crowds (Caffe's ssd_coco.py)
            cache=args.cache, pin=device.type == "cuda",
        )  # fmt: skip

    first, seconds = checkpoint["step"] if checkpoint else 0, None
    if not checkpoint:
        # On a CPU an image costs the same in any batch: eight tell how long 128 take.
        probe = min(micro, 8) if device.type == "cpu" else micro
        trial = partial(stream, 0, probe)
        seconds = time_a_step(network, model, optimizer, trial, args) * micro / probe
        if args.minutes:
            args.iterations = max(1, int(args.minutes * 60 / seconds))
    say(plan.plan(args, len(train), seconds, *costs, device))

    # The loop. Its numbers stay on a GPU for 20 steps, so that nothing waits for them.
    log = run_folder.RunLog(args, about, first, every=1 if device.type == "cpu" else 20)
    log.skipped, batches = checkpoint["skipped"] if checkpoint else 0, stream(first, micro)
    with StopSignals() as stop:
        for step in range(first, args.iterations):
            torch.manual_seed(hash((args.seed, step, rank)))  # of dropout and such, if there is any
            statistics = [b.clone() for b in model.buffers()] if args.skip_nonfinite else []
            logged, rows = forward_backward(network, model, batches, args, stop.number > 0)
            finite = update(optimizer, step, logged, args)
            for buffer, before in zip(model.buffers(), statistics, strict=False):
                buffer.copy_(buffer.where(finite, before))
            lr, done = learning_rate(step, args), progress(step + 1, args)[0]
            log.write(step, logged, lr, done, [train[i].name for i in rows])
            last = step + 1 == args.iterations
            saves = last or (step + 1) % args.save_every == 0
            if saves or (stop.number and world == 1):  # several ranks stop at a common step
                log.flush()
            if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
                log.measured(step, lambda: measure(model, test, args, rank, world))
            if lead and (saves or log.stopping):
                log.save(step + 1, model, optimizer, images=len(train))
                evaluation.draw_sheet(model, test[:12], out / "detections" / f"{step + 1:07}.png")
            if log.stopping and not last:
                say(f"stopped after {step + 1} steps; the same command with --resume goes on")
                sys.exit(128 + (stop.number or signal.SIGTERM))
    log.close()
    batches.close()  # its processes end, and their CPU time counts

    results = measure(model, test, args, rank, world)
    if lead:
        log.save(args.iterations, model, optimizer, images=len(train), results=results)
        print(evaluation.results_text(results))
        report.write([out], out / "report.html")
        if args.page:
            page.write_page(out / "last.pt", out / "page.html")
        print(f"checkpoint {out}/last.pt, log {out}/log.jsonl, detections {out}/detections/")
        print(f"all of it as one page: {out}/report.html")
    machine.end_ranks()
    return results


if __name__ == "__main__":
    run_program(main)
