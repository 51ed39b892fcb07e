"""Other detectors from random weights, on the same images in the same time.

    python -m experiments.peer_run --voc-root DIR --minutes 15 [--peer NAME] [--out DIR]

torchvision's SSD300-VGG16 and SSDLite: its network, priors, loss and post-processing, and the
recipe of its references/detection, as in PEERS. Our batches feed them: --augment is SSD's by
default, which is SSD300's own; SSDLite's own has crops and flips alone. Ultralytics' YOLO, by name
(yolo11n): its own training from its own file, 320 pixels, on the same pictures as
`experiments.convert` writes them. Our evaluation measures all of them. `train.py --minutes` with
the same sets is the other half of the comparison.

Ctrl-C and SIGTERM save; --resume goes on (torchvision's). OUT/results.json as train.py's, with the
CPU minutes since the last start. Needs torchvision, or ultralytics.
"""

import argparse
import importlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
from experiments.convert_data import name_pictures, write_set
from metrics import Detections, summarise
from ops.reference import per_channel
from plumbing import machine, plan
from plumbing.program import Help, Progress, StopSignals, check_range, run_program
from plumbing.run_folder import write_checkpoint, write_json
from plumbing.tables import results_text
from plumbing.voc import VOC_CLASSES, read_voc
from scratchdet import Config

INPUT = Config(std=(255.0,) * 3)  # for prepare(): (pixel - mean) / 255


class Peer(NamedTuple):
    """One of torchvision's detectors, and the recipe of its references/detection."""

    size: int  # pixels
    rate: float  # the learning rate
    images: int  # for so many images per step, over its 8 GPUs
    decay: float  # of the weights
    drops: tuple[float, ...]  # to a tenth, at these shares of the run; none: a cosine to zero


PEERS = {
    "ssd300_vgg16": Peer(300, 0.002, 32, 5e-4, drops=(80 / 120, 110 / 120)),
    "ssdlite320_mobilenet_v3_large": Peer(320, 0.15, 192, 4e-5, drops=()),
}
WARMUP = 1000  # steps, or the first epoch if that is shorter (its engine.py)


def learning_rate(step: int, iterations: int, epoch: int, peer: Peer) -> float:
    """As a share of the peer's rate; `epoch` is in steps."""
    warm = min(1.0, 0.001 + step / max(1, min(WARMUP, epoch - 1)))
    if not peer.drops:
        return warm * (1 + math.cos(math.pi * step / iterations)) / 2
    return warm * 0.1 ** sum(step >= iterations * drop for drop in peer.drops)


def inputs(batch: data.Batch) -> list[Tensor]:
    """What torchvision wants: images (3,S,S) in 0..1; outside the photograph, the mean."""
    mean = per_channel(INPUT.mean, batch.images.device) / 255
    return list(data.prepare(batch, INPUT) + mean)


def targets(batch: data.Batch) -> list[dict[str, Tensor]]:
    """Boxes in pixels of SxS, and their labels, an entry an image."""
    starts, size = batch.offsets.tolist(), batch.images.shape[-1]
    return [{"boxes": size * batch.boxes_xyxy[a:b], "labels": batch.labels[a:b]}
            for a, b in zip(starts[:-1], starts[1:], strict=True)]  # fmt: skip


@torch.no_grad()
def detections(model, records, args, size: int, device) -> list[Detections]:
    """Of all records, in pixels of the original images."""
    found, progress = [], Progress(len(records), "evaluating")
    how = {"batch_size": args.batch_size, "workers": args.workers}
    for batch in data.ordered_batches(records, size, **how):
        for i, one in zip(batch.indices.tolist(), model(inputs(data.to_device(batch, device))),
                          strict=True):  # fmt: skip
            w, h = records[i].size
            boxes = one["boxes"].cpu() / size * torch.tensor([w, h, w, h])
            rest = (one[key].cpu().numpy() for key in ("scores", "labels"))
            found.append(Detections(boxes.numpy(), *rest))
        progress(len(found))
    return found


def import_peer(name: str):
    """The module that trains it: torchvision's, or Ultralytics'."""
    module = "torchvision.models.detection" if name in PEERS else "ultralytics"
    if name not in PEERS and not name.startswith(("yolo", "rtdetr")):
        raise ValueError(
            f"--peer {name}: expected one of {', '.join(PEERS)}, or a network of Ultralytics, such "
            "as yolo11n"
        )
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch than its own
        package = module.split(".")[0]
        raise ValueError(
            f"--peer {name}: {package} cannot be used ({error}): pip install {package}, in the "
            f"version that belongs to torch {torch.__version__}. Peers are {', '.join(PEERS)}, and "
            "the networks of Ultralytics, such as yolo11n"
        ) from None


def train_torchvision(module, args, records, test, classes) -> list[Detections] | int:
    """Trains the peer; its detections in `test`, or the exit status of a stopped run."""
    device, out = torch.device(args.device), Path(args.out)
    peer = PEERS[args.peer]
    random = {"weights": None, "weights_backbone": None}
    model = getattr(module, args.peer)(**random, num_classes=1 + len(classes))
    model = model.to(device, memory_format=torch.channels_last).train()
    rate = peer.rate * args.batch_size / peer.images
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=peer.decay)
    bf16 = machine.has_bf16(device)
    first, iterations, epoch = 0, 0, len(records) // args.batch_size
    if args.resume and (out / "last.pt").exists():
        saved = torch.load(out / "last.pt", weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, iterations = saved["step"], saved["iterations"]
        args.seconds_before = saved.get("cpu_seconds", 0.0)

    def stream(step):
        return data.batches(
            records, peer.size, batch_size=args.batch_size, seed=args.seed, start_step=step,
            augment=args.augment, workers=args.workers, cache=args.cache, pin=device.type == "cuda",
        )  # fmt: skip

    def one_step(batches) -> Tensor:
        batch = data.to_device(next(batches), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = sum(model(inputs(batch), targets(batch)).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    batches = stream(first)
    if not iterations:
        states = model, optimizer
        each = plan.seconds_per_step(lambda: one_step(batches), states, 3 * args.minutes)
        iterations = max(1, int(60 * args.minutes / each))
        batches = stream(0)
    print(f"{args.peer}: {iterations:,} steps of {args.batch_size} images on "
          f"{machine.processor(device)}, torch {torch.__version__}, {'bf16' if bf16 else 'fp32'}",
          flush=True)  # fmt: skip
    progress = Progress(iterations, "step", unit="steps", first=first / iterations)
    with StopSignals() as stop:
        for step in range(first, iterations):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(step, iterations, epoch, peer)
            loss, last = one_step(batches), step + 1 == iterations
            progress(step + 1, f"loss {loss.item():.3f}")
            if last or stop.number or (step + 1) % args.save_every == 0:
                state = {"step": step + 1, "iterations": iterations, "model": model.state_dict()}
                state |= {"cpu_seconds": args.seconds_before + machine.cpu_seconds()}
                write_checkpoint(out / "last.pt", state | {"optimizer": optimizer.state_dict()})
            if stop.number and not last:
                print(f"stopped after {step + 1} steps; the same command with --resume goes on")
                return 128 + stop.number
    return detections(model.eval(), test, args, peer.size, device)


def train_ultralytics(module, args, records, test, classes) -> list[Detections]:
    """Ultralytics' network and training, from random weights; its detections in `test`."""
    out = Path(args.out).resolve()
    tree = out / "yolo"
    if tree.exists():
        raise ValueError(f"--out {args.out}: a run was there before; name a new folder")
    write_set("yolo", tree, name_pictures({"train": records, "val": test}), classes)
    model = module.YOLO(f"{args.peer}.yaml")
    model.train(
        data=str(tree / "data.yaml"), imgsz=320, time=args.minutes / 60, batch=args.batch_size,
        workers=args.workers, device=args.device, seed=args.seed, pretrained=False, val=False,
        plots=False, cache="ram", project=str(out), name="ultralytics", exist_ok=True,
    )  # fmt: skip
    model, found = module.YOLO(out / "ultralytics/weights/last.pt"), []
    progress = Progress(len(test), "evaluating")
    for record in test:
        one = model.predict(record.path, imgsz=320, conf=0.01, device=args.device, verbose=False)
        boxes = one[0].boxes.cpu().numpy()
        found.append(Detections(boxes.xyxy, boxes.conf, 1 + boxes.cls.astype(np.int64)))
        progress(len(found))
    return found


def main(argv: list[str] | None = None) -> dict:
    """Train, evaluate; -> the results."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--voc-root", metavar="DIR", required=True)
    add("--train-sets", nargs="+", default=["2007:trainval", "2012:trainval"])
    add("--eval-sets", nargs="+", default=["2007:test"])
    add("--peer", default="ssd300_vgg16", help=f"{', '.join(PEERS)}, or Ultralytics' yolo11n ...")
    add("--augment", choices=data.AUGMENT, default="ssd", help="torchvision's peers")
    add("--minutes", type=float, default=15, help="turned into iterations at the start")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    add("--cache", metavar="DIR")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=500, metavar="STEPS", help="torchvision's peers")
    add("--out", metavar="DIR", help="default: runs/PEER")
    add("--resume", action="store_true")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.peer}"
    args.seconds_before = 0.0  # of CPU time, of the run's earlier starts
    check_range(args, "minutes", 0.01, plan.A_YEAR)
    check_range(args, "batch_size save_every", 1)
    check_range(args, "workers", 0)
    module = import_peer(args.peer)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    machine.check_device(args.device)
    machine.keep_large_tensors()
    records, classes = read_voc(args.voc_root, args.train_sets, VOC_CLASSES)
    test, _ = read_voc(args.voc_root, args.eval_sets, classes)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.peer in PEERS:
        found = train_torchvision(module, args, records, test, classes)
    else:
        found = train_ultralytics(module, args, records, test, classes)
    if isinstance(found, int):
        return found
    results = summarise(test, found, classes, evaluation.metric_of("voc", args.eval_sets))
    results["cpu_minutes"] = round((args.seconds_before + machine.cpu_seconds()) / 60, 2)
    write_json(Path(args.out) / "results.json", results)
    print(results_text(results))
    return results


if __name__ == "__main__":
    run_program(main)
