"""torchvision's SSD300-VGG16 from random weights, on the same images in the same time.

    python -m experiments.peer_run --voc-root DIR --minutes 15 [--out runs/peer] [--resume]

Its network, priors, loss and post-processing, and the recipe of its references/detection: SGD,
0.002 for 32 images, momentum 0.9, decay 5e-4, a tenth at 80/120 and at 110/120 of the run. Our
batches feed it (its own augmentation is SSD's, too) and our evaluation measures it, so the two runs
differ in nothing else. `train.py --minutes` with the same sets is the other half of the comparison.

Ctrl-C and SIGTERM save; --resume goes on. OUT/results.json as train.py's. Needs torchvision.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor

import data
import eval as evaluation
from metrics import Detections, summarise
from ops.reference import per_channel
from plumbing import machine, plan
from plumbing.program import Progress, StopSignals, run_program
from plumbing.run_folder import write_checkpoint, write_json
from plumbing.tables import results_text
from plumbing.voc import VOC_CLASSES, read_voc
from scratchdet import Config

INPUT = Config(std=(255.0,) * 3)  # for prepare(): (pixel - mean) / 255


def inputs(batch: data.Batch) -> list[Tensor]:
    """What torchvision wants: images (3,300,300) in 0..1; outside the photograph, the mean."""
    mean = per_channel(INPUT.mean, batch.images.device) / 255
    return list(data.prepare(batch, INPUT) + mean)


def targets(batch: data.Batch) -> list[dict[str, Tensor]]:
    """Boxes in pixels of 300x300, and their labels, an entry an image."""
    starts = batch.offsets.tolist()
    return [{"boxes": 300 * batch.boxes_xyxy[a:b], "labels": batch.labels[a:b]}
            for a, b in zip(starts[:-1], starts[1:], strict=True)]  # fmt: skip


@torch.no_grad()
def detections(model, records, batch_size: int, workers: int, device) -> list[Detections]:
    """Of all records, in pixels of the original images."""
    found, progress = [], Progress(len(records), "evaluating")
    for batch in data.ordered_batches(records, 300, batch_size=batch_size, workers=workers):
        for i, one in zip(batch.indices.tolist(), model(inputs(data.to_device(batch, device))),
                          strict=True):  # fmt: skip
            w, h = records[i].size
            boxes = one["boxes"].cpu() / 300 * torch.tensor([w, h, w, h])
            rest = (one[key].cpu().numpy() for key in ("scores", "labels"))
            found.append(Detections(boxes.numpy(), *rest))
        progress(len(found))
    return found


def main(argv: list[str] | None = None) -> dict:
    """Train, evaluate; -> the results."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--voc-root", metavar="DIR", required=True)
    add("--train-sets", nargs="+", default=["2007:trainval", "2012:trainval"])
    add("--eval-sets", nargs="+", default=["2007:test"])
    add("--minutes", type=float, default=15, help="turned into iterations at the start")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    add("--cache", metavar="DIR")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--out", default="runs/peer")
    add("--resume", action="store_true")
    args = parser.parse_args(argv)
    try:
        from torchvision.models.detection import ssd300_vgg16
    except ImportError:
        raise ValueError(
            "torchvision is not installed, and its network is the peer: pip install torchvision, "
            f"in the version that belongs to torch {torch.__version__}"
        ) from None
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    machine.check_device(args.device)
    machine.keep_large_tensors()
    device, out = torch.device(args.device), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    records, classes = read_voc(args.voc_root, args.train_sets, VOC_CLASSES)
    test, _ = read_voc(args.voc_root, args.eval_sets, classes)

    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=1 + len(classes))
    model = model.to(device, memory_format=torch.channels_last).train()
    rate = 0.002 * args.batch_size / 32
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    bf16 = machine.has_bf16(device)
    first, iterations = 0, 0
    if args.resume and (out / "last.pt").exists():
        saved = torch.load(out / "last.pt", weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, iterations = saved["step"], saved["iterations"]

    def stream(step):
        return data.batches(
            records, 300, batch_size=args.batch_size, seed=args.seed, start_step=step,
            workers=args.workers, cache=args.cache, pin=device.type == "cuda",
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
    print(f"{iterations:,} steps of {args.batch_size} images on {machine.processor(device)}, "
          f"torch {torch.__version__}, {'bf16' if bf16 else 'fp32'}", flush=True)  # fmt: skip
    stop, begin = StopSignals().__enter__(), time.perf_counter()
    shown = begin
    for step in range(first, iterations):
        drops = (step >= iterations * 80 / 120) + (step >= iterations * 110 / 120)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.1**drops
        loss, last = one_step(batches), step + 1 == iterations
        if last or time.perf_counter() - shown > 20:
            shown = time.perf_counter()
            speed = (step + 1 - first) / (shown - begin)
            left = (iterations - step - 1) / speed
            print(
                f"step {step + 1}/{iterations}  loss {loss.item():.3f}  "
                f"{args.batch_size * speed:.1f} images/s  ETA {left:.0f} s",
                flush=True,
            )
        if last or stop.number:
            state = {"step": step + 1, "iterations": iterations, "model": model.state_dict()}
            write_checkpoint(out / "last.pt", state | {"optimizer": optimizer.state_dict()})
        if stop.number and not last:
            print(f"stopped after {step + 1} steps; the same command with --resume goes on")
            return 128 + stop.number
    found = detections(model.eval(), test, args.batch_size, args.workers, device)
    results = summarise(test, found, classes, evaluation.metric_of("voc", args.eval_sets))
    write_json(out / "results.json", results)
    print(results_text(results))
    return results


if __name__ == "__main__":
    run_program(main)
