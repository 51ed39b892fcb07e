"""Train ScratchDet from random weights and report its mAP.

    python train.py                                     shapes drawn on the spot, a narrow network:
                                                        minutes on a laptop
    python train.py --voc-root VOCdevkit                the paper's recipe: 100,000 steps of 128
                                                        images, Root-ResNet-34, VOC 07+12
    python train.py --voc-root VOCdevkit --minutes 60   a recipe for an hour of this machine
    torchrun --nproc-per-node 4 train.py --voc-root VOCdevkit        several GPUs

One step: a batch of images -> loc, logits -> loss -> gradients -> SGD. The run writes everything
into one folder (--out): last.pt (checkpoint), log.jsonl (one line per step), run.json (arguments,
commit, machine), detections drawn beside the ground truth, and report.html, which shows it all.

`--resume` continues from OUT/last.pt, bit for bit on a CPU with as many threads: the samples and
random numbers of step s depend only on (seed, s), and the checkpoint holds the rest.

Read in this order: RECIPES, learning_rate, parameter_groups, forward_backward, update, then the
loop, train_steps.
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

# Idle threads must sleep: threads that spin slow down every other process on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import eval as evaluation
import ops
from experiments import errors, report
from plumbing import cores, machine, plan, run_folder, sources
from plumbing.checkpoint import read_checkpoint, take_weights
from plumbing.program import Help, StopSignals, run_program
from plumbing.tables import results_text
from plumbing.threads import in_threads
from scratchdet import Config, ScratchDet, add_config_flags, multibox_loss, summary

# A recipe is the default of every flag that it names (`schedule` has no flag). `drops`: the
# fractions of the run after which the learning rate falls to a tenth (sections 4.1 to 4.4 of the
# paper; "released": as in its released code). The short recipes lower the rate linearly to zero:
# after 12,000 images the mAP was twice that with drops (docs/results.md). Behind BatchNorm the
# length of a weight vector changes nothing but the size of its steps: large early steps make it
# long, and all later ones turn it less. So they also raise the rate slowly, and in two of them
# `head_gamma` makes the first scores small. `A | B`: the settings of both; B's where they differ.
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
    # --minutes on a GPU, estimated to do 500 steps in some 20 s. Its rate, .1, is for 64 images.
    "budget": SHORT | dict(iterations=20_000, augment="ssd", batch_size=64, save_every=2_000),
    "shapes": SHORT | dict(iterations=350, augment="flip", batch_size=16, lr=0.4, warmup=0.6,
                           width=0.125, stem=(3, 1, 1), head_gamma=0.1,  # the quick start
                           sizes=((160, 0.55), (224, 0.75), (300, 1.0)), save_every=100),
    "overfit": SHORT | dict(iterations=300, augment="none", lr=0.05, warmup=0.1, width=0.25),
}
# "budget" on a CPU: 25 images/s per core and more, where SHORT's network does 1. A step has fixed
# costs: so 32 images for each of two cores. Small images first: they cost less, so there are more.
ON_CPU = dict(iterations=1_500, backbone="resnet18", width=0.25, augment=None, save_every=500,
              batch_size=32 * min(2, cores.CORES), lr=0.2, head_gamma=0.1,
              sizes=((160, 0.3), (224, 0.6), (300, 1.0)))
# fmt: on
# Flips alone teach so narrow a network a little more in a short run. In a long one it learns the
# images by heart. After 37 epochs: mAP .235 on new images, .455 on seen ones; crops .227 and .321.
CROPS_FROM = 60  # epochs; main decides, once the steps are known, if `augment` is None
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # section 4.1
LOGGED = ("loc", "conf", "positives", "grad_norm", "stop")  # forward_backward explains them


def make_parser() -> argparse.ArgumentParser:
    """All flags. What the recipe names replaces the default here."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=Help,
    )
    # fmt: off
    group = parser.add_argument_group("data (without a root: drawn shapes)")
    sources.add_data_flags(group)
    add = group.add_argument
    add("--train-sets", nargs="+", metavar="SET", help="VOC: YEAR:NAME, COCO: NAME")
    add("--eval-sets", nargs="+", metavar="SET", help="the same, for the evaluation")
    add("--augment", choices=data.AUGMENT,
        help="ssd: colour, expand, crop, flip; crop: colour, flip, and for half of "
        f"the images SSD's crop. Recipe budget on a CPU: below {CROPS_FROM} epochs flip, else crop")
    add("--overfit", type=int, default=0, metavar="N",
        help="train and evaluate on the first N training images")

    group = parser.add_argument_group("model")
    add_config_flags(group)
    group.add_argument("--init", metavar="FILE",
        help="start from this checkpoint's weights; for other classes the class scores start anew")

    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=list(RECIPES), help="default: follows from the data and --minutes")
    add("--batch-size", type=int, help="images per step, over all processes")
    add("--accumulate", type=int, default=1, help="micro-batches per step; BN sees one at a time")
    add("--lr", type=float, help="default: the recipe's, scaled linearly with the batch size")
    add("--iterations", type=int, help="default: the recipe's, scaled to see as many images")
    add("--minutes", type=float, help="as many iterations as fit; decided before the first step")
    add("--drops", type=float, nargs="*",
        help="fractions of the run after which the learning rate falls to a tenth")
    add("--warmup", type=float, help="fraction of the run in which the learning rate rises")
    add("--sizes", type=plan.size_and_share, nargs="*", default=(), metavar="SIZE:SHARE",
        help="growing images: this size in pixels until that share of the run's work is done")
    add("--seed", type=int, default=0, help="of the initial weights and of every sample")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--workers", type=int, default=cores.loaders(),
        help="loader processes per rank; none where all cores of a CPU train")
    add("--cache", metavar="DIR", help="keep the decoded images here, memory-mapped")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16; default: on, where the hardware computes it natively")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-bn", action="store_true", help="several GPUs: BatchNorm over all ranks' images")
    add("--out", metavar="DIR", help="default: runs/RECIPE; an older run there is moved aside")
    add("--resume", action="store_true", help="continue from OUT/last.pt if there is one")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint and pictures")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="measure mAP during training")
    add("--skip-nonfinite", action="store_true", help="do not stop at a NaN: skip such steps")
    # fmt: on
    return parser


def recipe_for(given: argparse.Namespace) -> tuple[dict, dict]:
    """Chooses the recipe: flags given by the user -> (defaults of other flags, the recipe)."""
    kind = sources.kind_of(given)
    name = given.recipe or {"voc": "voc07", "yolo": "voc07"}.get(kind, kind)
    if not given.recipe and given.overfit:
        name = "overfit"
    elif not given.recipe and given.minutes and kind != "shapes":
        name = "budget"
    base = {"data": kind, "recipe": name, "out": f"runs/{name}"}
    base |= {"priors": "coco" if kind == "coco" else "voc"}  # COCO's objects are smaller
    base |= zip(("train_sets", "eval_sets"), sources.SETS[kind], strict=True)
    if name == "voc12" and kind == "voc":  # Section 4.3. VOC2012 test has no public annotations: so
        # without --eval-sets the mAP is of 2007:test, which is trained on here.
        base["train_sets"] = ["2007:trainval", "2007:test", "2012:trainval"]
    recipe = RECIPES[name]
    if name == "budget" and not given.device.startswith("cuda"):
        recipe = recipe | ON_CPU
    if given.init and Path(given.init).exists():  # a resumed run does not need it
        saved = read_checkpoint(given.init)["config"]  # its network is the default
        recipe = recipe | {k: v for k, v in saved.items() if k != "classes"}  # those of the data
    return base, recipe


def parse_args(argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """All flags with their final values. The user's win over `defaults`, those over the recipe's.

    The command line is parsed twice: first to find the recipe, then with the recipe's defaults.
    """
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    base, recipe = recipe_for(given)
    left_open = {"lr": None, "iterations": None}  # scale_to_batch_size fills them in
    parser.set_defaults(**(base | recipe | left_open | defaults))
    args = parser.parse_args(argv)  # --help ends here, and shows the recipe's numbers
    if args.sizes and not given.sizes and "sizes" not in defaults:  # the recipe's end at 300 pixels
        args.sizes = tuple((round(size * args.size / 300), share) for size, share in args.sizes)
    plan.check_flags(args, given)
    if args.overfit:
        args.eval_sets = args.train_sets  # the checkpoint says so, and eval.py measures the same
    sources.make_absolute(args)  # so that eval.py finds the data from any folder
    scale_to_batch_size(args, recipe)
    return args


def scale_to_batch_size(args: argparse.Namespace, recipe: dict) -> None:
    """The linear rule (Goyal et al. 2017): twice the batch size, twice the rate, half the steps.

    It sets what the user left open of --lr and --iterations.
    """
    scale = args.batch_size / recipe["batch_size"]
    args.lr = recipe["lr"] * scale if args.lr is None else args.lr
    args.iterations = args.iterations or round(recipe["iterations"] / scale)


# ------------------------------------------------------------------------------ optimisation


def stages(args: argparse.Namespace) -> tuple[tuple, tuple, np.ndarray]:
    """The image sizes of the run, and the share of its work and of its steps done after each.

    Work counts pixels. ((150, 0.5), (300, 1)): half of the work at 150 pixels is four of five
    steps, because a step at 300 pixels costs four times as much.
    """
    sizes, work = zip(*(args.sizes or [(args.size, 1.0)]), strict=True)
    steps = np.cumsum(np.diff(work, prepend=0) / np.square(sizes))
    return sizes, work, steps / steps[-1]


def work_and_size(step: int, args: argparse.Namespace) -> tuple[float, int]:
    """Before step 0, 1, ...: (share of the run's work that is done, image size of this step).

    Without --sizes that is (step / iterations, args.size).
    """
    sizes, work, steps = stages(args)
    starts = [0.0, *np.rint(steps * args.iterations).tolist()]  # the first step of each stage
    stage = min(bisect(starts, step), len(sizes)) - 1  # the one that this step belongs to
    part = (step - starts[stage]) / max(1.0, starts[stage + 1] - starts[stage])
    start, end = [0.0, *work][stage : stage + 2]
    return start + (end - start) * part, sizes[stage]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of step 0, 1, ...

    It rises linearly during the warm-up. Then it drops to a tenth at each of `drops` (schedule
    "steps") or falls linearly to zero ("linear"). The paper drops it after 45, 75 and 95 % of the
    run and has no warm-up (section 4.1).
    """
    done, _ = work_and_size(step, args)
    done_after, _ = work_and_size(step + 1, args)  # or the first step's rate would be zero
    warm = min(1.0, done_after / max(1e-9, args.warmup))
    if args.schedule == "linear":
        return args.lr * min(warm, (1 - done) / max(1e-9, 1 - args.warmup))
    return args.lr * warm * 0.1 ** sum(done >= drop for drop in args.drops)


def parameter_groups(model: nn.Module) -> list[dict]:
    """The parameters in three groups, with Caffe's multipliers of learning rate and weight decay.

    Biases of convolutions, which exist only without BatchNorm, learn twice as fast and do not
    decay. The head's BatchNorm does not decay; the backbone's does, as all weights.
    """
    head_bn, biases, rest = [], [], []
    for name, module in model.named_modules():
        bn = isinstance(module, nn.BatchNorm2d)
        for kind, parameter in module.named_parameters(recurse=False):
            if bn and "head" in name.split("."):
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


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum, as in section 4.1."""
    optimizer = torch.optim.SGD(parameter_groups(model), lr=args.lr, momentum=MOMENTUM, fused=True)
    # With --sizes some layers have no gradient at first, but fused SGD wants all momenta at once.
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def forward_backward(
    network: nn.Module, model: ScratchDet, batches: Iterator, args: argparse.Namespace,
    stopping: bool = False,
) -> tuple[dict[str, Tensor], list[int]]:  # fmt: skip
    """Computes the gradients of one step -> ({name: scalar} of LOGGED, indices of its records).

    `network` is `model` as `wrap` prepared it. "loc" and "conf" are the two losses, "positives" the
    positives per image, "grad_norm" the L2 norm of the gradient (Figure 1), "stop" the share of the
    ranks that were told to stop. The loss of each micro-batch is divided by its own positives, then
    averaged over micro-batches and ranks (as Caffe averages over GPUs).
    """
    device, indices, parts = model.priors_cxcywh.device, [], []
    for micro_step in range(args.accumulate):
        batch = next(batches)
        indices += batch.indices.tolist()
        batch = data.to_device(batch, device)
        inputs = data.prepare(batch, model.config)  # (n, 3, S, S)
        # Ranks exchange gradients once per step, after the last micro-batch.
        more_to_come = dist.is_initialized() and micro_step < args.accumulate - 1
        with network.no_sync() if more_to_come else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loc, logits = network(inputs)  # (n, P, 4), (n, P, C)
            loss_loc, loss_conf, count = multibox_loss(
                loc, logits, model.priors_at(inputs.shape[-1]),
                batch.boxes_xyxy, batch.labels, batch.offsets,
            )  # fmt: skip
            # The mean over the micro-batches: backward adds to the gradients that are there.
            ((loss_loc + loss_conf) / args.accumulate).backward()
        parts.append(torch.stack([loss_loc, loss_conf, count / len(inputs)]).detach())
    means = torch.stack(parts).sum(0) / args.accumulate  # loss_loc, loss_conf, positives
    # A small image has fewer maps (--sizes): layers that it does not reach have no gradient.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    logged = torch.stack([*means, norm, norm.new_tensor(stopping)])
    if dist.is_initialized():
        dist.all_reduce(logged)
        logged /= dist.get_world_size()
    return dict(zip(LOGGED, logged, strict=True)), indices


def update(optimizer: torch.optim.Optimizer, step: int, logged: dict, args) -> Tensor:
    """One step of SGD at the learning rate of `step`; clears the gradients. -> whether it counts.

    A step whose loss or gradient is not finite changes no weight: fused SGD reads `found_inf` on
    the GPU and skips it there, so the CPU need not wait for the number. Such a step then ends the
    run (RunLog.flush), unless --skip-nonfinite is given.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args) * group["lr_factor"]
    finite = (logged["loc"] + logged["conf"] + logged["grad_norm"]).isfinite()
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


# ------------------------------------------------------------------------------ the run


def make_model(args, classes: tuple[str, ...], checkpoint: dict | None, say=print) -> ScratchDet:
    """The network of the flags, with the checkpoint's weights, those of --init, or random ones."""
    start = checkpoint or (read_checkpoint(args.init) if args.init else {"config": {}})
    # `args.classes` is the file of --classes; the names come from the data.
    flags = {f.name: getattr(args, f.name) for f in fields(Config)} | {"classes": classes}
    model = ScratchDet(Config.from_dict(start["config"] | flags))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.init:
        say(take_weights(model, start, args.init))
    return model


def wrap(model: ScratchDet, args, world: int) -> nn.Module:
    """The module that a step calls. Its parameters are the model's.

    On a CPU it is the model on all threads of this process; else the model, compiled if asked, in
    DistributedDataParallel if there are several ranks.
    """
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; keeps the parameters
    network = model
    if model.priors_cxcywh.is_cpu and not args.compile:
        network = in_threads(model, plan.micro_batch(args, world))
    if world > 1 and network is model:
        unused = bool(args.sizes)  # small images do not reach the layers of the last maps
        network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    return torch.compile(network) if args.compile else network


def measure(model: ScratchDet, test: list, log: run_folder.RunLog, args, world: int) -> tuple:
    """Evaluates the model -> results, with the CPU minutes of the run so far, and detections."""
    metric = evaluation.metric_of(args.data, args.eval_sets)
    how = {"workers": args.workers, "rank": log.rank, "world": world}
    results, found = evaluation.evaluate(model, test, metric=metric, **how)
    return results | {"cpu_minutes": round(log.cpu_seconds() / 60, 2)}, found


def time_a_step(network, model, optimizer, stream: Callable, micro: int, args) -> float:
    """Mean seconds of a step over the image sizes of the run.

    The steps change model and optimizer; `mean_step_time` puts both back.
    `stream(step, images, size)`: micro-batches from that step on; `micro`: their usual size.
    """
    # On a CPU an image costs the same in any large batch: time 32 to know 128.
    probe = min(micro, 32) if model.priors_cxcywh.is_cpu else micro
    sizes, _, steps_done = stages(args)
    streams = {size: stream(0, probe, size) for size in sizes}

    def one_step(size: int) -> Tensor:
        logged, _ = forward_backward(network, model, streams[size], args)
        update(optimizer, 0, logged, args)
        return logged["loc"]  # who reads it waits for the GPU

    seconds = plan.mean_step_time(
        one_step, sizes, steps_done, states=(model, optimizer), minutes=args.minutes or 0
    )
    return seconds * micro / probe


def train_steps(
    network: nn.Module, model: ScratchDet, optimizer: torch.optim.Optimizer, batches: Iterator,
    log: run_folder.RunLog, save: Callable, measure_now: Callable, args: argparse.Namespace,
) -> None:  # fmt: skip
    """The loop. `save(step)` writes a checkpoint, `measure_now()` evaluates the model on the way.

    What a step logs stays on the GPU: the log fetches it every 20 steps, the only wait for it.
    """
    with StopSignals() as stop:
        for step in range(log.first, args.iterations):
            # A resumed run repeats the random numbers of each step (of dropout, if there is any).
            torch.manual_seed(hash((args.seed, step, log.rank)))
            buffers = list(model.buffers()) if args.skip_nonfinite else []
            before = [buffer.clone() for buffer in buffers]
            logged, indices = forward_backward(network, model, batches, args, stop.number > 0)
            finite = update(optimizer, step, logged, args)
            # The forward pass of a bad step has spoiled BatchNorm's running statistics: undo it.
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(buffer.where(finite, value))
            done, _ = work_and_size(step + 1, args)
            log.write(step, logged, learning_rate(step, args), done, indices)
            last = step + 1 == args.iterations
            saves = last or (step + 1) % args.save_every == 0
            # A signal reaches several ranks at different steps; at a flush all see the same "stop".
            if saves or (stop.number and not dist.is_initialized()):
                log.flush()
            if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
                log.measured(step, lambda: measure_now()[0])
            if saves or log.stopping:
                save(step + 1)
            if log.stopping and not last:
                if log.lead:
                    print(f"stopped after {step + 1} steps; the same command with --resume goes on")
                sys.exit(128 + (stop.number or signal.SIGTERM))  # 0: another rank has it


def main(argv: list[str] | None = None) -> dict:
    """Train, then evaluate. Returns the results of the evaluation."""
    args, checkpoint = run_folder.resume(parse_args, argv)
    cores.share(args, checkpoint, argv)
    rank, world, device = machine.start_ranks(args)
    micro, lead, out = plan.micro_batch(args, world), rank == 0, Path(args.out)
    say = print if lead else lambda *_, **__: None
    machine.keep_large_tensors()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # few shapes occur: find the fastest way once each

    train, test, classes, left_out = sources.read_data(args)
    if checkpoint:
        run_folder.check_data(args.out, checkpoint, len(train), classes)
    model = make_model(args, classes, checkpoint, say)
    model = model.to(device, memory_format=torch.channels_last).train()
    args.bf16 = machine.has_bf16(device) if args.bf16 is None else args.bf16
    optimizer = make_optimizer(model, args)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    costs = plan.costs(model, micro, args)  # a run that does not fit ends here, with a remedy
    network = wrap(model, args, world)
    about = run_folder.describe(args, model.config, machine.processor(device), world)
    say(f"commit {about['commit']}, torch {about['torch']}, {about['machine']}")
    if lead and not checkpoint:
        say(run_folder.start_folder(out, left_out, args.resume), end="")
    say(f"{ops.describe()}\n{summary(model)}\n{plan.about_data(train, test, classes)}")

    def stream(step: int, images: int, size: int | None = None) -> Iterator[data.Batch]:
        return data.batches(
            train, lambda micro_step: size or work_and_size(micro_step // args.accumulate, args)[1],
            batch_size=images, seed=args.seed, augment=args.augment or "crop",
            start_step=step * args.accumulate, workers=args.workers, rank=rank, world=world,
            keep_difficult=args.data != "coco",  # COCO's crowds (Caffe's ssd_coco.py)
            cache=args.cache, pin=device.type == "cuda",
        )  # fmt: skip

    seconds = time_a_step(network, model, optimizer, stream, micro, args) if not checkpoint else 0
    if args.minutes and not checkpoint:
        args.iterations = max(1, int(args.minutes * 60 / seconds))
    epochs = args.iterations * args.batch_size / len(train)
    args.augment = args.augment or ("crop" if epochs >= CROPS_FROM else "flip")
    say(plan.plan(args, len(train), seconds, *costs, device))
    log = run_folder.RunLog(args, about, checkpoint, train, every=1 if device.type == "cpu" else 20)
    batches = stream(log.first, micro)  # 0, or the step of the checkpoint

    def save(step: int) -> None:
        if lead:
            log.save(step, model, optimizer, images=len(train))
            evaluation.draw_sheet(model, test[:12], out / "detections" / f"{step:07}.png")

    measure_now = partial(measure, model, test, log, args, world)
    train_steps(network, model, optimizer, batches, log, save, measure_now, args)
    batches.close()  # ends the loader processes, whose CPU time `measure` then counts

    results, found = measure_now()
    if lead:
        log.save(args.iterations, model, optimizer, images=len(train), results=results)
        print(results_text(results))
        errors.write(out, test, found, classes, results)
        report.write([out], out / "report.html")
        print(f"checkpoint {out}/last.pt, log {out}/log.jsonl, detections {out}/detections/")
        print(f"all of it as one page: {out}/report.html")
    log.close()
    machine.end_ranks()
    return results


if __name__ == "__main__":
    run_program(main)
