"""Train ScratchDet from random weights and report its mAP.

    python train.py                                     shapes drawn on the spot, a narrow network:
                                                        minutes on a laptop
    python train.py --voc-root VOCdevkit                the paper's recipe: 100,000 steps of 128
                                                        images, Root-ResNet-34, VOC 07+12
    python train.py --voc-root VOCdevkit --minutes 60   as good as it gets in an hour, here
    torchrun --nproc-per-node 4 train.py --voc-root VOCdevkit        several GPUs

One step: a batch of images -> loc, logits -> loss -> gradients -> SGD. Everything of the run is in
its folder (--out): last.pt (checkpoint), log.jsonl (a line a step), run.json (arguments, commit,
machine), detections drawn beside the ground truth, and at the end report.html, which shows it all.

`--resume` goes on from OUT/last.pt, bit for bit on a CPU: samples and random numbers of step s
depend on (seed, s) alone, and the checkpoint holds the rest.
"""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from bisect import bisect
from copy import deepcopy
from dataclasses import asdict, fields
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
import machine
import ops
from experiments import report, step_bench, transfer
from plumbing.halves import in_threads
from scratchdet import Config, ScratchDet, add_config_flags, load, multibox_loss, summary

# The recipes. `drops`: where the learning rate falls to a tenth, as a fraction of the iterations
# (sections 4.1 to 4.4 of the paper; "released": as in its released code). The short recipes fall on
# a line to zero and warm up for long: the first gradients are twenty times the later ones, and what
# they add to the norm of the weights, BN divides every later step by.
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
# "budget" on a CPU: 25 images/s a core in place of 1. Flips alone: so narrow a network learns too
# slowly from more, though it then learns less by heart (mAP of an hour .27, with crops .21). What
# did not help: drops for the line to zero, averaged weights, half the batch, less warm-up, other
# widths (docs/results.md has the numbers).
ON_CPU = dict(iterations=6_000, backbone="resnet18", width=0.25, augment="flip", batch_size=8)
ON_CPU |= dict(save_every=500, sizes=((160, 0.45), (224, 0.75), (300, 1.0)))  # twice the images
SYSTEM = ("out", "resume", "workers", "device", "cache", "save_every", "eval_every", "bench")
# A resumed run takes these from its checkpoint, too, but may be given others: its data may have
# moved, the machine may be another, and where it stopped at a step that was not finite, it may
# leave that out.
CHANGEABLE = ("voc_root", "coco_root", "shapes_root", "classes", "skip_nonfinite", "bf16")


def check_args(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """ValueError where a number is out of its range, or two flags say different things."""
    machine.check_range(args, "batch_size accumulate iterations save_every", 1)
    machine.check_range(args, "overfit lr weight_decay seed workers eval_every", 0)
    machine.check_range(args, "momentum ema warmup drops", 0, 1)
    machine.check_range(args, "minutes", 0.01)
    if given.minutes and given.iterations:
        raise ValueError("--minutes and --iterations both say how long to train: give one")
    if given.drops and args.schedule == "linear":
        raise ValueError("--drops: the schedule is a line to zero; they need --schedule steps")
    if not getattr(args, f"{args.data}_root"):
        raise ValueError(f"--data {args.data}: where is it? Expected --{args.data}-root DIR")
    if args.sizes and args.sizes[-1] != (args.size, 1):
        raise ValueError(
            f"--sizes {' '.join(f'{size}:{share:g}' for size, share in args.sizes)}: expected "
            f"{args.size}:1 at the end, as --size says; --sizes alone stays at one size"
        )
    if args.sizes and not all(a[1] < b[1] for a, b in itertools.pairwise(((0, 0), *args.sizes))):
        raise ValueError("--sizes: expected shares that grow to 1, such as 160:.45 300:1")
    if given.stem and args.backbone in ("vgg16", "dsod300", "ssd321"):
        raise ValueError(f"--stem: {args.backbone} has its own first layers. --stem is for ResNets")
    if args.data == "coco" and args.classes:
        raise ValueError(f"--classes {args.classes}: COCO's files list their own; leave it out")


def size_and_share(text: str) -> tuple[int, float]:
    """160:.45 of --sizes."""
    size, share = text.split(":")
    return int(size), float(share)


def parse_args(argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """The flags; those that the recipe sets take their defaults from it, `defaults` come last."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    yes_no = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument_group("data (no root given: drawn shapes)").add_argument
    add("--voc-root", metavar="DIR", help="folder that holds VOC2007/, or the one above")
    add("--coco-root", metavar="DIR", help="folder that holds annotations/ and train2017/")
    add("--shapes-root", metavar="DIR", default="runs/shapes-data", help="drawn there once")
    add("--data", choices=["shapes", "voc", "coco"], help="follows from the root given")
    add("--train-sets", nargs="+", metavar="SET", help="VOC: YEAR:NAME, COCO: NAME")
    add("--eval-sets", nargs="+", metavar="SET", help="likewise")
    add("--classes", metavar="FILE",
        help="names, one a line, or 'auto': those in the annotations; else the 20 of VOC")
    add("--augment", choices=data.AUGMENT,
        help="ssd: colour, expand, crop, flip; crop: the same without expand")
    add("--difficult", action=yes_no,
        help="train on objects marked difficult (VOC: yes) or crowd (COCO: no)")
    add("--overfit", type=int, default=0, metavar="N",
        help="train and evaluate on the first N training images")

    group = parser.add_argument_group("model")
    add_config_flags(group)
    group.add_argument("--pretrained", metavar="FILE", help="torchvision's vgg16 or vgg16_bn")
    group.add_argument("--init-from", metavar="CHECKPOINT", help="a detector of more classes")

    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=list(RECIPES), help="follows from the data and --minutes")
    add("--batch-size", type=int, help="images of a step, over all processes")
    add("--accumulate", type=int, default=1, help="micro-batches of a step; BN sees one of them")
    add("--lr", type=float, help="else the recipe's, times batch size / recipe's batch size")
    add("--iterations", type=int, help="else the recipe's, times recipe's batch size / batch size")
    add("--minutes", type=float, help="as many iterations as fit, fixed at the start")
    add("--schedule", choices=["steps", "linear"], help="drops to a tenth, or a line to zero")
    add("--drops", type=float, nargs="*", help="where, as fractions of the run")
    add("--warmup", type=float, help="fraction of the run in which the learning rate rises")
    add("--sizes", type=size_and_share, nargs="*", default=(), metavar="SIZE:SHARE",
        help="grow: images of so many pixels until that share of the run's work is done")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=5e-4, help="not on biases and the head's BN")
    add("--ema", type=float, default=0.0, help="decay of the averaged weights; 0: no averaging")
    add("--seed", type=int, default=0, help="of the weights and of every sample")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2),
        help="loader processes of each rank")
    add("--cache", metavar="DIR", help="keep the decoded images here, memory-mapped")
    add("--bf16", action=yes_no, help="autocast; else where the hardware is made for it")
    add("--channels-last", action=yes_no, default=True, help="memory format of the network")
    add("--compile", action=yes_no, default=False, help="torch.compile the network")
    add("--out", metavar="DIR", help="else runs/RECIPE; a run that is there moves aside")
    add("--resume", action=yes_no, default=False, help="go on from OUT/last.pt if there is one")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint and pictures")
    add("--eval-every", type=int, default=0, metavar="STEPS",
        help="measure mAP on the way, too (not of averaged weights), into the log")
    add("--log-gradients", action=yes_no, default=True, help="log their L2 norm (Figure 1)")
    add("--skip-nonfinite", action=yes_no, default=False, help="leave such steps out, and count")
    add("--sync-bn", action=yes_no, default=False,
        help="several GPUs: BatchNorm over the images of all ranks")
    add("--bench", action="store_true", help="no training: time the parts of a step, and end")
    # fmt: on

    words = sys.argv[1:] if argv is None else argv  # the help waits for the recipe's defaults
    given, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    kind = data.kind_of(given)
    recipe = given.recipe or {"voc": "voc07"}.get(kind, kind)
    if not given.recipe and given.overfit:
        recipe = "overfit"
    elif not given.recipe and given.minutes and kind != "shapes":
        recipe = "budget"
    base = {"data": kind, "recipe": recipe, "out": f"runs/{recipe}"}
    base |= {"priors": "coco" if kind == "coco" else "voc", "difficult": kind != "coco"}
    base |= zip(("train_sets", "eval_sets"), data.SETS[kind], strict=True)
    if recipe == "voc12" and kind == "voc":  # section 4.3; VOC2012 test has no public annotations
        base["train_sets"] = ["2007:trainval", "2007:test", "2012:trainval"]
    if given.init_from:
        defaults = transfer.network_flags(given.init_from) | defaults
    settings = RECIPES[recipe]
    if recipe == "budget" and not given.device.startswith("cuda"):
        settings = settings | ON_CPU
    parser.set_defaults(**(base | settings | {"lr": None, "iterations": None} | defaults))
    args = parser.parse_args(argv)
    check_args(args, given)
    if args.overfit:
        args.eval_sets = args.train_sets  # what is measured, and so what eval.py measures again
    scale = args.batch_size / settings["batch_size"]  # the linear rule: same epochs
    args.lr = settings["lr"] * scale if args.lr is None else args.lr
    args.iterations = args.iterations or round(settings["iterations"] / scale)
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
    """Of step 0, 1, ...: a linear warm-up, then drops to a tenth ("steps") or a line to zero."""
    done, after = progress(step, args)[0], progress(step + 1, args)[0]
    warm = min(1.0, after / max(1e-9, args.warmup))
    if args.schedule == "linear":
        return args.lr * min(warm, (1 - done) / max(1e-9, 1 - args.warmup))
    return args.lr * warm * 0.1 ** sum(done >= drop for drop in args.drops)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
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
        {"params": rest, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": head_bn, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": biases, "weight_decay": 0.0, "lr_factor": 2.0},
    ]


def average_weights(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights; running statistics likewise."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)


# ------------------------------------------------------------------------------ checkpoints


def checkpoint_of(model: ScratchDet, optimizer: torch.optim.Optimizer, args) -> dict:
    """The run as plain data and tensors, but for how far it is."""
    about = {"config": asdict(model.config), "args": vars(args), "commit": machine.commit()}
    about |= {"torch": str(torch.__version__)}
    return about | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save(path: Path, checkpoint: dict) -> None:
    """Write it whole or not at all; the one before it becomes previous.pt.

    At any moment that the machine may die, last.pt is a whole checkpoint.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            older = path.with_name("previous.tmp")
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)
            except OSError:  # a file system without links
                shutil.copyfile(path, older)
            os.replace(older, path.with_name("previous.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: cannot write the checkpoint ({e}). The one before it is intact; free some "
            "space or choose another --out, then go on with --resume"
        ) from None


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of `step` and later: they will be written again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] < step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


# ------------------------------------------------------------------------------ its start


def read_data(args: argparse.Namespace) -> tuple[list, list, tuple[str, ...]]:
    """Records to train on, records to evaluate, class names."""
    if args.data == "coco":
        train, classes = data.read_coco(args.coco_root, args.train_sets)
        test = train
        if not args.overfit:
            test, names = data.read_coco(args.coco_root, args.eval_sets)
            test = evaluation.align(test, names, classes, f"a network trained on {args.train_sets}")
    else:
        root, classes = args.voc_root, data.VOC_CLASSES
        if args.data == "shapes":
            root, classes = data.draw_shapes(args.shapes_root), data.SHAPE_CLASSES
        if args.classes:
            classes = None if args.classes == "auto" else data.read_classes(args.classes)
        train, classes = data.read_voc(root, args.train_sets, classes)
        test = train if args.overfit else data.read_voc(root, args.eval_sets, classes)[0]
    if args.overfit:
        train = test = train[: args.overfit]
    return train, test, tuple(classes)


def resolve(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, and the checkpoint to go on from, if --resume is given and there is one."""
    args = parse_args(argv)
    last = Path(args.out) / "last.pt"
    if not args.resume or not last.exists():
        return args, None
    checkpoint = load(last)[1]
    saved = {"sizes": ()} | {k: v for k, v in checkpoint["args"].items() if k not in SYSTEM}
    args = parse_args(argv, **saved)
    for key, value in saved.items():
        now, changeable = getattr(args, key), key in CHANGEABLE and value is not None
        same = json.dumps(now) == json.dumps(value)  # (1, 1) of a recipe and [1, 1] of a flag
        if not same and not changeable:
            raise ValueError(
                f"--{key.replace('_', '-')} {now}: {args.out} was started with {value}. A resumed "
                "run goes on as it began: leave the flag out, or choose another --out"
            )
    return args, checkpoint


def set_aside(out: Path) -> str:
    """Makes the folder of a new run. A run that is there moves to OUT-1, OUT-2, ...: says so."""
    text = ""
    if (out / "last.pt").exists():
        whole = out.absolute()
        names = (whole.with_name(f"{whole.name}-{n}") for n in itertools.count(1))
        aside = whole.rename(next(path for path in names if not path.exists()))
        text = f"{out} held another run, now in {aside.name} (--resume goes on with a run)\n"
    (out / "detections").mkdir(parents=True, exist_ok=True)
    return text


def micro_batch(args: argparse.Namespace, world: int) -> int:
    """Images of one forward on one rank."""
    parts = world * args.accumulate
    micro, rest = divmod(args.batch_size, parts)
    if rest or micro < 1:
        raise ValueError(
            f"--batch-size {args.batch_size}: {world} rank(s) x --accumulate {args.accumulate} do "
            f"not divide it; {max(1, micro) * parts} or {(micro + 1) * parts} would do"
        )
    if args.sync_bn and torch.device(args.device).type != "cuda":
        raise ValueError(
            f"--sync-bn --device {args.device}: torch's SyncBatchNorm runs on GPUs only. Leave it "
            "out (each rank then normalises by its own images), or use --device cuda"
        )
    if micro * (world if args.sync_bn else 1) == 1 and args.bn != "none":
        raise ValueError(
            f"--batch-size {args.batch_size} leaves a (micro-)batch of 1 image: BatchNorm has no "
            "statistics on the 1x1 map. Use a larger --batch-size, a smaller --accumulate, or "
            "--bn none"
        )
    return micro


def make_model(args, classes: tuple[str, ...], checkpoint: dict | None, device) -> ScratchDet:
    """The network: of the checkpoint, or from a file (--pretrained, --init-from), or random."""
    if checkpoint:  # its input may be --pretrained's, its priors --init-from's
        saved = checkpoint["config"]
        if tuple(saved["classes"]) != classes:
            raise ValueError(
                f"{args.out}/last.pt detects {saved['classes']}, the data has {classes}. Resume "
                "with the data it was started with, or choose another --out"
            )
        model = ScratchDet(Config.from_dict(saved))
        model.load_state_dict(checkpoint["model"])
    else:
        names = {field.name for field in fields(Config)}
        flags = {name: value for name, value in vars(args).items() if name in names}
        config = Config.from_dict(flags | {"classes": classes})
        model = transfer.start(config, args.pretrained, args.init_from)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_state(model: ScratchDet, args, checkpoint: dict | None) -> tuple:
    """(optimizer, averaged weights or None, step, steps skipped): new, or the checkpoint's."""
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
    for parameter in model.parameters():  # small images lack the last maps, so no gradient makes it
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    ema = deepcopy(model.state_dict()) if args.ema else None
    if not checkpoint:
        return optimizer, ema, 0, 0
    optimizer.load_state_dict(checkpoint["optimizer"])
    for key in ema or ():
        ema[key].copy_(checkpoint["ema"][key])  # which was read to the CPU
    return optimizer, ema, checkpoint["step"], checkpoint["skipped"]


def wrap(model: ScratchDet, args, world: int) -> nn.Module:
    """What a step calls: the model in threads, compiled, or shared between ranks."""
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; keeps the parameters
    network = torch.compile(model) if args.compile else model
    if world > 1:
        unused = bool(args.sizes)  # small images lack the last maps
        return nn.parallel.DistributedDataParallel(network, find_unused_parameters=unused)
    if args.compile or model.priors_cxcywh.is_cuda:
        return network
    return in_threads(model, micro_batch(args, world))


# ------------------------------------------------------------------------------ a step


def forward_backward(network, model, batches, args, *, stop=(), mark=lambda part: None) -> tuple:
    """The gradients of one step -> (log (5,), rows of `records` used).

    log: loss_loc, loss_conf, positives an image, L2 norm of the gradients, share of the ranks that
    were told to `stop`. The loss of each micro-batch is divided by its own positives, then they are
    averaged, as are ranks (Caffe). `mark` is called at the end of each part, for --bench.
    """
    device = model.priors_cxcywh.device
    log, images = torch.zeros(5, device=device), []
    for i in range(args.accumulate):
        batch = next(batches)
        images += batch.indices.tolist()
        mark("data wait")
        batch = data.to_device(batch, device)
        inputs = data.prepare(batch, model.config)  # (n, 3, S, S)
        mark("copy, colour, mean")
        ranks_wait = dist.is_initialized() and i < args.accumulate - 1  # gradients meet once a step
        with network.no_sync() if ranks_wait else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loc, logits = network(inputs)  # (n, P, 4), (n, P, C)
            mark("forward")
            loss_loc, loss_conf, positives = multibox_loss(
                loc, logits, model.priors_at(inputs.shape[-1]), batch.boxes_xyxy, batch.labels,
                batch.offsets,
            )  # fmt: skip
            mark("loss, matching")
            ((loss_loc + loss_conf) / args.accumulate).backward()
            mark("backward")
        log[:3] += torch.stack([loss_loc, loss_conf, positives / len(inputs)]).detach()
    log[:3] /= args.accumulate
    if args.log_gradients or args.skip_nonfinite:  # a finite loss may have other gradients
        gradients = [p.grad for p in model.parameters() if p.grad is not None]  # else frozen
        log[3] = nn.utils.get_total_norm(gradients)
    log[4] = float(bool(stop))
    if dist.is_initialized():
        dist.all_reduce(log)
        log /= dist.get_world_size()
    mark("log")
    return log, images


def update(optimizer: torch.optim.Optimizer, model: ScratchDet, ema: dict | None, step: int, args):
    """One step of SGD at the learning rate of `step`; clears the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args) * group["lr_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema:
        average_weights(ema, model, args.ema)


def seconds_a_step(one_step, states: tuple, at_least: float) -> float:
    """Of `one_step() -> log`, called again and again. Afterwards the `states` (modules, optimizer)
    are as they were."""
    before = [deepcopy(x.state_dict()) for x in states]
    times = []
    while len(times) < 3 or sum(times[1:]) < at_least:
        begin = time.perf_counter()
        one_step().tolist()  # waits for the device
        took = [time.perf_counter() - begin]
        if dist.is_initialized():  # all ranks must do, and answer, the same
            dist.broadcast_object_list(took, 0)
        times += took
    for x, state in zip(states, before, strict=True):
        x.load_state_dict(state)
    return sum(times[1:]) / (len(times) - 1)  # the first one warms up


# ------------------------------------------------------------------------------ what a run says


def about_data(train: list[data.Record], test: list[data.Record]) -> str:
    """How many images there are, and whether the mAP will be of images that are new."""
    seen = len({r.path for r in train} & {r.path for r in test})
    note = f" ({seen:,} of them trained on: no measure of new images)" if seen else ""
    return f"{len(train):,} training images, {len(test):,} to evaluate{note}"


def plan(args, images: int, step_seconds: float | None, gib: float, gb: float, device) -> str:
    """What the run will do and, where a step has been timed, what that takes."""
    text = (
        f"recipe {args.recipe}: {args.iterations:,} steps of {args.batch_size} images "
        f"({args.iterations * args.batch_size / images:.1f} epochs), learning rate {args.lr:g} "
        f"({args.schedule}), augmentation {args.augment}, {'bf16' if args.bf16 else 'fp32'}"
    )
    if args.sizes:
        text += ", images of " + ", ".join(f"{size}" for size, _ in args.sizes) + " px"
    if step_seconds:
        minutes = args.iterations * step_seconds / 60
        takes = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:,.0f} hours"
        text += f"\nthis will take about {takes}, {gib:.1f} GiB on {device}, {gb:.2g} GB of disk"
        if minutes > 7 * 24 * 60:
            text += "\nthat is more than a week: --minutes 60 trains as well as an hour allows"
    return text


def open_log(out: Path, step: int, args, config: Config, where: str, world: int):
    """Writes run.json; opens log.jsonl, without its lines of `step` and later."""
    cut_log(out / "log.jsonl", step)
    about = {"args": vars(args), "config": asdict(config), "commit": machine.commit()}
    about |= {"machine": where, "torch": str(torch.__version__), "processes": world}
    (out / "run.json").write_text(json.dumps(about, indent=1))
    return open(out / "log.jsonl", "a", buffering=1)


def report_nonfinite(line: dict, images: list[str], args: argparse.Namespace) -> None:
    """A loss or gradient that is not a number: stop, naming all that is known, or say so."""
    kept, parts = Path(args.out) / "nonfinite.json", [images]
    if dist.is_initialized():  # every rank is here: the losses are averaged
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, images)
    if not dist.is_initialized() or dist.get_rank() == 0:
        kept.write_text(json.dumps({**line, "images": sum(parts, [])}, indent=1))
    what = (
        f"step {line['step']}: loss {line['loss']:g} (loc {line['loc']:g}, conf {line['conf']:g}), "
        f"gradient norm {line['grad_norm']:g} at learning rate {line['lr']:g}"
    )
    if not args.skip_nonfinite:
        raise ValueError(
            f"not finite at {what}. The images of this step are listed in {kept}; last.pt, if "
            "there is one yet, is the checkpoint before it. Try a smaller --lr (without BN in the "
            "backbone 0.001), a --warmup, or --skip-nonfinite"
        )
    print(f"\nskipped, not finite: {what}")


def write_log(log_file, pending: list, rows: list, images_per_s: float, args) -> tuple[dict, bool]:
    """A line for every step of `pending`, (step, names of its images, ...), from the values of its
    log (5,) -> the last line, and whether it is finite."""
    for (step, names, _), (loc, conf, positives, norm, _) in zip(pending, rows, strict=True):
        line = {"step": step, "loss": loc + conf, "loc": loc, "conf": conf}
        line |= {"positives": positives, "grad_norm": norm, "lr": learning_rate(step, args)}
        line |= {"images_per_s": round(images_per_s, 2)}
        finite = all(map(math.isfinite, line.values()))
        if not finite:
            report_nonfinite(line, names, args)
        if log_file:
            log_file.write(json.dumps(line) + "\n")
    return line, finite


def numbers(results: dict) -> dict:
    """What of the results goes into the log: mAP by its names, and the cost."""
    return {k: v for k, v in results.items() if k.startswith("mAP") or k == "cpu_minutes"}


def show_progress(line: dict, seconds_left: float, total: int, shown: float) -> float:
    """The live line: each second on a terminal, else every 20 s. -> when it was last shown."""
    now, live, last = time.perf_counter(), sys.stdout.isatty(), line["step"] + 1 == total
    if not last and now - shown <= (1 if live else 20):
        return shown
    days = f"{int(seconds_left // 86400)}d " if seconds_left >= 86400 else ""
    left = time.strftime("%H:%M:%S", time.gmtime(seconds_left % 86400))
    print(
        f"step {line['step'] + 1}/{total}  loss {line['loss']:.3f} (loc {line['loc']:.3f} conf "
        f"{line['conf']:.3f})  {line['positives']:.1f} positives/image  gradient "
        f"{line['grad_norm']:.2f}  lr {line['lr']:.2g}  {line['images_per_s']:.1f} images/s  ETA "
        f"{days}{left}",
        end="\r" if live and not last else "\n",
        flush=True,
    )
    return now


# ------------------------------------------------------------------------------ the run


def main(argv: list[str] | None = None) -> dict:
    """Train, then evaluate. Returns the results of the evaluation."""
    args, checkpoint = resolve(argv)
    rank, world, device = machine.start_ranks(args)
    micro, lead, out = micro_batch(args, world), rank == 0, Path(args.out)
    say = print if lead else lambda *_: None
    machine.keep_large_tensors()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # of one shape, all: seek the fastest way once

    train, test, classes = read_data(args)
    if checkpoint and checkpoint.get("images", len(train)) != len(train):
        raise ValueError(
            f"{out} was started with {checkpoint['images']} training images, the data has "
            f"{len(train)}. Resume with the data it was started with, or choose another --out"
        )
    model = make_model(args, classes, checkpoint, device)
    args.bf16 = machine.has_bf16(device) if args.bf16 is None else args.bf16
    gib, gb = machine.check_memory(model, micro, args), machine.check_space(model, args)
    machine.check_shared_memory(micro, args)
    optimizer, ema, first, skipped = make_state(model, args, checkpoint)
    network = wrap(model.train(), args, world)

    def stream(step: int, images: int, size: int | None = None):
        return data.batches(
            train, lambda micro_step: size or progress(micro_step // args.accumulate, args)[1],
            batch_size=images, seed=args.seed, augment=args.augment,
            start_step=step * args.accumulate, workers=args.workers, rank=rank, world=world,
            keep_difficult=args.difficult, cache=args.cache, pin=device.type == "cuda",
        )  # fmt: skip

    def trial(batches, mark=lambda part: None) -> Tensor:
        """A step that is only measured."""
        log, _ = forward_backward(network, model, batches, args, mark=mark)
        update(optimizer, model, None, 0, args)
        mark("optimizer")
        return log

    def measure() -> dict:
        """The model's results on `test`, and the CPU minutes of all ranks until now."""
        metric = evaluation.metric_of(args.data, args.eval_sets)
        ranks = {"workers": args.workers, "rank": rank, "world": world}
        results = evaluation.evaluate(model, test, metric=metric, **ranks)
        cpu_seconds = torch.tensor(sum(os.times()[:4]), device=device)  # or since --resume
        if world > 1:
            dist.all_reduce(cpu_seconds)
        return results | {"cpu_minutes": round(cpu_seconds.item() / 60, 2)}

    where = machine.processor(device)
    say(f"commit {machine.commit()}, torch {torch.__version__}, {where}, {world} process(es)")
    if args.bench:
        batches, images = stream(0, micro, args.size), micro * args.accumulate
        parts = f"{world} process(es) x {args.accumulate} x {micro} images"
        say(f"{args.backbone}, width {args.width:g}: a step of {parts}, {args.workers} workers")
        return step_bench.report(lambda mark: trial(batches, mark), model, images, args.bf16, say)

    # The plan, said before the first step.
    if lead:  # fails now, if it does
        say((set_aside(out) if not checkpoint else "") + ops.describe())
    say(summary(model))
    say(f"{about_data(train, test)}, {len(classes)} classes")
    step_seconds = None
    if not checkpoint:
        # On a CPU an image costs the same in any batch: eight tell how long 128 take.
        probe = min(micro, 8) if device.type == "cpu" else micro
        sizes, _, ends = stages(args)
        at_least, step_seconds = 3 * (args.minutes or 0) / len(sizes), 0.0
        for size, share in zip(sizes, np.diff(ends, prepend=0), strict=True):
            step = partial(trial, stream(0, probe, size))
            seconds = seconds_a_step(step, (model, optimizer), at_least)
            step_seconds += share * seconds * micro / probe
        if args.minutes:
            args.iterations = max(1, int(args.minutes * 60 / step_seconds))
    say(plan(args, len(train), step_seconds, gib, gb, device))
    log_file = open_log(out, first, args, model.config, where, world) if lead else None

    # The loop. Logs wait on the device, `every` steps, so that nothing else waits for it.
    stop: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(s, lambda number, _: stop.append(number)) for s in signals]
    every = 1 if device.type == "cpu" or args.skip_nonfinite else 20
    batches, pending, shown, begin = stream(first, micro), [], 0.0, time.perf_counter()
    for step in range(first, args.iterations):
        torch.manual_seed(hash((args.seed, step, rank)))  # for dropout and such, if there is any
        statistics = [b.clone() for b in model.buffers()] if args.skip_nonfinite else []
        log, images = forward_backward(network, model, batches, args, stop=stop)
        pending.append((step, [train[i].name for i in images], log))
        last, finite = step + 1 == args.iterations, True
        saving = last or (step + 1) % args.save_every == 0
        # Several ranks stop at the same step: at a flush, once `stop` has gone through the log.
        stopping = world == 1 and bool(stop)
        if len(pending) == every or saving or stopping:
            rows = torch.stack([log for *_, log in pending]).tolist()  # the only sync of the loop
            rate = args.batch_size * (step + 1 - first) / (time.perf_counter() - begin)
            line, finite = write_log(log_file, pending, rows, rate, args)
            pending, stopping = [], stopping or any(row[4] > 0 for row in rows)
            if lead:
                done = progress(step + 1, args)[0]
                spent = (time.perf_counter() - begin) / (done - progress(first, args)[0])
                seconds_left = (1 - done) * spent
                shown = show_progress(line, seconds_left, args.iterations, shown)
        if finite:
            update(optimizer, model, ema, step, args)
        else:
            optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(before)  # BatchNorm's running statistics saw that batch
            skipped += 1
        if lead and (saving or stopping):
            done = {"step": step + 1, "ema": ema, "skipped": skipped, "images": len(train)}
            save(out / "last.pt", done | checkpoint_of(model, optimizer, args))
            evaluation.draw_sheet(model, test[:12], out / "detections" / f"{step + 1:07}.png")
        if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
            paused, results = time.perf_counter(), measure()
            begin += time.perf_counter() - paused
            if lead:
                log_file.write(json.dumps({"step": step} | numbers(results)) + "\n")
                say(f"\nmAP {results['mAP'] or 0:.4f} after {step + 1} steps")
        if stopping and not last:
            say(f"\nstopped after {step + 1} steps; the same command with --resume goes on")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    for number, handler in zip(signals, handlers, strict=True):
        signal.signal(number, handler)  # all is saved: from here on Ctrl-C just ends

    # The result, with the averaged weights where there are any.
    if ema:
        model.load_state_dict(ema)
    batches.close()  # its processes end, and count
    results = measure()
    if lead:
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(evaluation.report(results))
        report.write([out], out / "report.html")
        print(f"checkpoint {out}/last.pt, log {out}/log.jsonl, detections {out}/detections/")
        print(f"all of it as one page: {out}/report.html")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        full = getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)  # names no file
        more = ": --out or --cache. Free some space, then go on with --resume" if full else ""
        print(f"error: {e}{more}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as e:
        print(f"error: {str(e).splitlines()[0]} Try --accumulate 2", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step, or after the last
        sys.exit(130)
