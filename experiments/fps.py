"""Images/s of a detector: the network alone, and with decoding and NMS, for batches of 1 and 8.

    python -m experiments.fps CHECKPOINT [the flags of eval.py]

Warped images that are already in memory, float32.
"""

import time

import torch

import data
import eval as evaluation
from detect import load_and_describe
from plumbing.files import Record
from plumbing.program import run_program
from plumbing.sources import open_test_set
from scratchdet import ScratchDet, detect

SECONDS = 5.0  # that each number is measured for


@torch.no_grad()
def frames_per_second(model: ScratchDet, records: list[Record], batch_size: int) -> list[float]:
    """Images/s: [network alone, network and `detect`]."""
    device = model.priors_cxcywh.device
    some = (records * batch_size)[:batch_size]
    batch = next(data.ordered_batches(some, model.config.size, batch_size=batch_size))
    x = data.prepare(data.to_device(batch, device), model.config)
    rates = []
    for with_nms in (False, True):
        done, start = -2, None  # two rounds to warm up
        while start is None or time.perf_counter() - start < SECONDS:
            loc, logits = model(x)
            if with_nms:
                detect(loc, logits, model.priors_cxcywh)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 1
            if done == 0:
                start = time.perf_counter()
        rates.append(done * batch_size / (time.perf_counter() - start))
    return rates


def main(argv: list[str] | None = None) -> None:
    args = evaluation.parse_args(argv)
    model, checkpoint = load_and_describe(args)
    torch.backends.cudnn.benchmark = True
    records = open_test_set(args, checkpoint.get("args") or {}, model.config.classes)
    tf32 = args.device != "cpu" and torch.backends.cudnn.allow_tf32
    print(f"float32{', convolutions in TF32' * tf32}, {model.config.size} px, images/s")
    for n in (1, 8):
        alone, whole = frames_per_second(model, records, batch_size=n)
        print(f"batch {n}: network {alone:.1f}, with decoding and NMS {whole:.1f}")


if __name__ == "__main__":
    run_program(main)
