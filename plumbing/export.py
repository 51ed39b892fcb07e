"""The detector as one file that runs without this code: `python detect.py --export FILE`.

    net.pt2     torch.export.load("net.pt2").module()(pixels)
    net.onnx    onnxruntime.InferenceSession("net.onnx").run(None, {"pixels": pixels})

Both take pixels (N,3,S,S) float32, RGB 0..255, of any N, and give what `detect` does: boxes (N,D,4)
xyxy in units of the image, scores (N,D), labels (N,D) int64; D = 200, behind the last one zeros.
The class names, background first, are in the file: extra file "classes.json", ONNX metadata
"classes".
"""

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ops.reference import decode, normalise, pairwise_iou

SCORE, TOP_K, IOU, MOST = 0.01, 400, 0.45, 200  # as ops.postprocess


def surviving(boxes_xyxy: Tensor, scores: Tensor) -> Tensor:
    """NMS of M lists at once, each by falling score: (M,K,4), (M,K) -> (M,K) bool.

    A box stays if no better one that stays overlaps it. Starting from all boxes, each round of that
    settles at least one more of each list, from the best on; it ends where nothing changes.
    """
    k = scores.shape[1]
    better = torch.ones(k, k, dtype=torch.bool, device=scores.device).triu(1)  # row before column
    overlaps = torch.vmap(pairwise_iou)(boxes_xyxy, boxes_xyxy) > IOU  # (M, K, K)
    overlaps = (overlaps & better).float()
    candidate = scores > SCORE

    def settle(keep: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        beaten = torch.bmm(keep.float()[:, None], overlaps)[:, 0] > 0  # (M, K)
        now = candidate & ~beaten
        return now, (now != keep).any()

    start = candidate, torch.ones((), dtype=torch.bool, device=scores.device)
    return torch.while_loop(lambda _, changed: changed.clone(), settle, start)[0]


class Exported(nn.Module):
    """pixels -> boxes, scores, labels; `nms` as `surviving`."""

    def __init__(self, model: nn.Module, nms: Callable):
        super().__init__()
        self.model, self.nms = model, nms

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.model.config
        loc, logits = self.model(normalise(pixels, config.mean, config.std, config.channels))
        boxes_xyxy = decode(loc, self.model.priors_cxcywh)  # (N, P, 4)
        scores = logits.softmax(dim=-1)[..., 1:].mT  # (N, C-1, P)
        k = min(TOP_K, scores.shape[2])
        scores, prior = (x[..., :k] for x in scores.sort(stable=True, descending=True))
        n, c = scores.shape[:2]
        rows = prior.reshape(n, c * k, 1).expand(-1, -1, 4)
        boxes_xyxy = boxes_xyxy.gather(1, rows)  # (N, (C-1)*K, 4), class by class
        scores = scores.reshape(n, c * k) * boxes_xyxy.isfinite().all(dim=-1)  # the others drop out
        keep = self.nms(boxes_xyxy.reshape(n * c, k, 4), scores.reshape(n * c, k))
        scores = scores.where(keep.reshape(n, c * k), 0.0)
        scores, best = (x[:, :MOST] for x in scores.sort(stable=True, descending=True))  # (N, D)
        there = scores > 0
        boxes_xyxy = boxes_xyxy.gather(1, best[..., None].expand(-1, -1, 4))
        return boxes_xyxy.where(there[..., None], 0.0), scores, (best // k + 1) * there


def check_ending(path: str | Path | None) -> None:
    """ValueError where the name of the file does not say which format it is to have."""
    if path and Path(path).suffix.lower() not in (".onnx", ".pt2"):
        raise ValueError(f"--export {path}: expected a name that ends in .onnx or .pt2")


def export(model: nn.Module, path: str | Path) -> None:
    """Writes the whole detector: ONNX where the name ends in .onnx, torch.export where in .pt2."""
    check_ending(path)
    path, config, model = Path(path), model.config, copy.deepcopy(model).cpu()
    pixels = torch.zeros(2, 3, config.size, config.size)
    normalise(pixels, config.mean, config.std, config.channels)  # makes its constants, untraced
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    classes = json.dumps(["background", *config.classes])
    if path.suffix.lower() == ".onnx":
        write_onnx(Exported(model, node).eval(), pixels, shapes, classes, path)
        return
    whole = Exported(model, surviving).eval()
    program = torch.export.export(whole, (pixels,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"classes.json": classes})


# ------------------------------------------------------------------------------ ONNX


@torch.library.custom_op("scratchdet::surviving", mutates_args=())
def node(boxes_xyxy: Tensor, scores: Tensor) -> Tensor:
    """`surviving` as one node, which becomes ONNX's NonMaxSuppression."""
    return surviving(boxes_xyxy, scores)


@node.register_fake
def _(boxes_xyxy, scores):
    return torch.empty_like(scores, dtype=torch.bool)


def write_onnx(whole: nn.Module, pixels: Tensor, shapes: dict, classes: str, path: Path) -> None:
    """Through torch.onnx, which needs two packages more."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"--export {path}: ONNX needs more: pip install {' '.join(missing)}")
    from onnxscript import opset18 as op

    def suppress(boxes_xyxy, scores):
        """A list is an image to ONNX, with one class; its answer are rows (list, 0, box)."""
        rows = op.NonMaxSuppression(
            boxes_xyxy, op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[TOP_K]), op.Constant(value_floats=[IOU]),
            op.Constant(value_floats=[SCORE]),
        )  # fmt: skip
        where = op.Gather(rows, op.Constant(value_ints=[0, 2]), axis=1)  # (R, 2)
        ones = op.ConstantOfShape(op.Slice(op.Shape(where), [0], [1]))  # (R,) of 0.
        none = op.ConstantOfShape(op.Shape(scores))
        return op.Greater(op.ScatterND(none, where, op.Add(ones, op.Constant(value_float=1.0))),
                          op.Constant(value_float=0.0))  # fmt: skip

    def sort(x, stable=True, dim=-1, descending=False):
        """TopK of all: equal values keep their order there, too."""
        size = op.Slice(op.Shape(x), [-1], [9])
        return op.TopK(x, size, axis=dim, largest=int(descending))

    table = {torch.ops.scratchdet.surviving.default: suppress, torch.ops.aten.sort.stable: sort}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            whole, (pixels,), input_names=["pixels"], dynamic_shapes=shapes, dynamo=True,
            output_names=["boxes_xyxy", "scores", "labels"], verbose=False,
            custom_translation_table=table,
        )  # fmt: skip
    program.model.metadata_props["classes"] = classes
    program.save(path)
