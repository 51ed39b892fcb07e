"""Time the loss and the mining of negatives beside torchvision's SSD.compute_loss.

    python -m experiments.loss_bench [--batch-size 32] [--rounds 9] [--threads 1]

CPU seconds of this process; the two take turns, and each has its median over the rounds. Matching
is done before, once, and both get it. The rules coincide (mining by the background's cross-entropy,
three negatives a positive of the same image, division by the positives of the batch), so both
losses must be equal, or there is no number. Without torchvision only ours is timed.
"""

import argparse
import statistics
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

import ops
from plumbing.machine import hardware
from scratchdet import Config, cxcywh_to_xyxy, make_priors, multibox_loss

try:
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.ssd import SSD
except (ImportError, RuntimeError):  # RuntimeError: built for another torch
    SSD = None


def make_case(n: int, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of multibox_loss, as in training: 2.4 objects an image, background likely."""
    rng = torch.Generator().manual_seed(seed)
    priors_cxcywh = make_priors(Config())
    counts = torch.poisson(torch.full((n,), 2.4), generator=rng).long()
    size = 0.05 + 0.6 * torch.rand(int(counts.sum()), 2, generator=rng)
    corner = torch.rand(len(size), 2, generator=rng) * (1 - size)
    logits = torch.randn(n, len(priors_cxcywh), num_classes, generator=rng)
    logits[..., 0] += 5
    return {
        "loc": torch.randn(n, len(priors_cxcywh), 4, generator=rng),
        "logits": logits,
        "priors_cxcywh": priors_cxcywh,
        "boxes_xyxy": torch.cat([corner, corner + size], dim=1),
        "labels": torch.randint(1, num_classes, (len(size),), generator=rng),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    }


def peer_loss(case: dict[str, Tensor], matched: Tensor):
    """A function that calls torchvision's loss on the same tensors -> (loss_loc, loss_conf)."""
    detector = SimpleNamespace(box_coder=BoxCoder((10, 10, 5, 5)), neg_to_pos_ratio=3)
    starts = case["offsets"].tolist()
    rows = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    targets = [{"boxes": case["boxes_xyxy"][r], "labels": case["labels"][r]} for r in rows]
    anchors = [cxcywh_to_xyxy(case["priors_cxcywh"])] * len(rows)
    own = [torch.where(m >= 0, m - r.start, -1) for m, r in zip(matched, rows, strict=True)]
    outputs = {"bbox_regression": case["loc"], "cls_logits": case["logits"]}

    def call():
        losses = SSD.compute_loss(detector, targets, outputs, anchors, own)
        return losses["bbox_regression"], losses["classification"]

    return call


def median_ms(functions: list, rounds: int) -> list[float]:
    """CPU milliseconds of each: the median of `rounds`, taken in turns, after one to warm up."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, of in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            of.append(1e3 * (time.process_time() - start))
    return [statistics.median(of[1:]) for of in times]


def main(argv: list[str] | None = None) -> float | None:
    """Print the table; -> the ratio of the forward pass in training, None without torchvision."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=21, help="with background")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    case = make_case(args.batch_size, args.classes)
    matched = ops.match(
        cxcywh_to_xyxy(case["priors_cxcywh"]), case["boxes_xyxy"], case["offsets"]
    )  # (N, P)
    positives = int((matched >= 0).sum())
    print(f"{args.batch_size} images, {positives} positives, {args.classes} classes; "
          f"{hardware('cpu')}")  # fmt: skip
    ratios = {}
    for what in ("as in training", "with backward", "without a graph"):
        keeps_graph, with_backward = what != "without a graph", what == "with backward"
        case["loc"].requires_grad_(keeps_graph)
        case["logits"].requires_grad_(keeps_graph)

        def run(losses, with_backward=with_backward):
            case["loc"].grad = case["logits"].grad = None
            return sum(losses()[:2]).backward() if with_backward else losses()

        with mock.patch.object(ops, "match", lambda *_: matched):  # noqa: PT008  both get it

            def ours():
                return multibox_loss(**case)

            if SSD is None:
                print(f"{what:16} ours {median_ms([partial(run, ours)], args.rounds)[0]:.1f} ms")
                continue
            theirs = peer_loss(case, matched)
            for mine, other in zip(ours()[:2], theirs(), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            a, b = median_ms([partial(run, ours), partial(run, theirs)], args.rounds)
        ratios[what] = b / a
        print(f"{what:16} ours {a:.1f} ms, torchvision {b:.1f} ms: {b / a:.1f} times")
    if SSD is None:
        print("torchvision is not installed (or not for this torch): nothing to compare with")
    return ratios.get("as in training")


if __name__ == "__main__":
    main()
