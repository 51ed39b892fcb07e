"""Five ops on the device of their tensors: colour, match, mined_cross_entropy, nms, postprocess.

An op is a `torch.library.custom_op` whose body is the readable PyTorch of `reference.py`. The
kernels (`match.cpp`, `match.cu`, ...) register themselves for the CPU or the CUDA key of the same
op, and torch's dispatcher then prefers them: no call site asks what was compiled.

SCRATCHDET_OPS chooses at import:
    auto       (default) build what can be built; where that fails, one message, and PyTorch runs
    reference  build nothing
    require    a build that fails raises (CI: so that a fallback never passes for a kernel)
    emulate    the CUDA kernels on CPU threads (emulate.h), in the place of the CPU ones
"""

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .jit import BuildError, _say, build

NAMES = ("colour", "match", "mined_cross_entropy", "nms", "postprocess")
__all__ = ["COMPILED", "BuildError", "build", "describe", *NAMES]
MODES = ("auto", "reference", "require", "emulate")
COMPILED = {"cpu": False, "cuda": False}  # which kernels are loaded; _load() fills it in
_library = torch.library.Library("scratchdet", "FRAGMENT")  # lives as long as the module


def _op(meaning, *, autograd=False):
    """Makes a function of reference.py an op of its name, schema and fallback.

    It decorates the op's fake kernel, which says only what shape comes out, for torch.compile:
    none may depend on data, so that no op ever synchronises.
    """

    def register(fake):
        name = meaning.__name__
        op = torch.library.custom_op(f"scratchdet::{name}", meaning, mutates_args=())
        op.register_fake(fake)
        if not autograd:
            # custom_op puts a layer of Python before every kernel that only serves autograd: 10 us
            # per call, as long as the NMS of 400 boxes itself. Ops without a gradient skip it.
            for key in ("AutogradCPU", "AutogradCUDA"):
                _library.impl(name, torch.library.fallthrough_kernel, key)
        return op

    return register


@_op(reference.colour)
def _colour(images, inside, jitter, mean, std, channels, dtype):
    like = dict(dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return torch.empty(images.shape, **like)


@_op(reference.match)
def _match(priors_xyxy, boxes_xyxy, offsets, iou_threshold):
    return offsets.new_empty((offsets.shape[0] - 1, priors_xyxy.shape[0]))


@_op(reference.nms)
def _nms(boxes_xyxy, scores, groups, iou_threshold):
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


@_op(reference.postprocess)
def _postprocess(loc, logits, priors_cxcywh, score_threshold, top_k, iou_threshold, max_detections):
    shape = (logits.shape[0], max_detections)
    boxes = loc.new_empty((*shape, 4), dtype=torch.float32)
    labels = loc.new_empty(shape, dtype=torch.int64)
    return boxes, boxes.new_empty(shape), labels, labels.new_empty(shape[:1])


# The one op with a gradient, in the logits. Its backward is another op. That has none, but keeps
# the layer for one: so a second derivative is an error, and not silently wrong.
@_op(reference.mined_cross_entropy, autograd=True)
def _mined(logits, labels, negatives_per_positive):
    return logits.new_empty(labels.shape, dtype=torch.float32)


@_op(reference.mined_cross_entropy_backward, autograd=True)
def _mined_backward(gradient, logits, labels, cross_entropy):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)


def _backward(ctx, gradient):
    return _mined_backward(gradient, *ctx.saved_tensors), None, None


_mined.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------------------ the calls


def colour(
    images: Tensor,
    inside: Tensor,
    jitter: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    channels: str = "rgb",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The network's input: (N,3,H,W) uint8 RGB, (N,4) int64, (N,5) -> (N,3,H,W), channels_last.

    Colour augmentation, mean, std, order of the channels and 0 beside the image, in one pass: see
    reference.colour. Raises ValueError for a wrong shape, type, device or number.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        _fail("colour", "images", "(N,3,H,W) uint8", _seen(images))
    n = images.shape[0]
    if inside.shape != (n, 4) or inside.dtype != torch.int64:
        _fail("colour", "inside", f"(N,4) int64, N={n}", _seen(inside))
    if jitter.shape != (n, 5) or jitter.dtype != torch.float32:
        _fail("colour", "jitter", f"(N,5) float32, N={n}", _seen(jitter))
    _check_device("colour", images, inside=inside, jitter=jitter)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            _fail("colour", name, "3 numbers, of R, G and B", values)
    if channels not in ("rgb", "bgr"):
        _fail("colour", "channels", "rgb or bgr", repr(channels))
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        _fail("colour", "dtype", "float32, float16 or bfloat16", dtype)
    return torch.ops.scratchdet.colour.default(
        images, inside, jitter, list(mean), list(std), channels, dtype
    )


def match(
    priors_xyxy: Tensor, boxes_xyxy: Tensor, offsets: Tensor, iou_threshold: float = 0.5
) -> Tensor:
    """The box each prior has to learn: (P,4), (T,4), (N+1,) int64 -> (N,P) int64 row or -1.

    See reference.match. Raises ValueError for a wrong shape, type or device and, on the CPU, for
    offsets that do not rise from 0 to T (on a GPU that check would wait for the GPU).
    """
    _check_rows("match", "priors_xyxy", priors_xyxy)
    _check_rows("match", "boxes_xyxy", boxes_xyxy)
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64:
        _fail("match", "offsets", "(N+1,) int64", _seen(offsets))
    _check_device("match", offsets, priors_xyxy=priors_xyxy, boxes_xyxy=boxes_xyxy)
    _check_unit("match", "iou_threshold", iou_threshold)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = offsets.tolist()
        if rows[0] != 0 or rows[-1] != boxes_xyxy.shape[0] or rows != sorted(rows):
            _fail("match", "offsets", f"rising from 0 to T={boxes_xyxy.shape[0]}", rows)
    return torch.ops.scratchdet.match.default(priors_xyxy, boxes_xyxy, offsets, iou_threshold)


def mined_cross_entropy(logits: Tensor, labels: Tensor, negatives_per_positive: int = 3) -> Tensor:
    """The classes' loss of each prior: (N,P,C) floating, (N,P) int64 -> (N,P) float32.

    0 for priors that do not count: see reference.mined_cross_entropy. The gradient flows to
    `logits`. Raises ValueError for a wrong shape, type or device and, on the CPU, for a label that
    is no class (on a GPU that check would wait; its loss is NaN there).
    """
    if logits.dim() != 3 or logits.shape[2] < 1 or not logits.is_floating_point():
        _fail("mined_cross_entropy", "logits", "(N,P,C) floating, C > 0", _seen(logits))
    if labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
        like = f"(N,P) int64 like logits {_seen(logits)}"
        _fail("mined_cross_entropy", "labels", like, _seen(labels))
    _check_device("mined_cross_entropy", logits, labels=labels)
    if negatives_per_positive < 0:
        _fail("mined_cross_entropy", "negatives_per_positive", "at least 0", negatives_per_positive)
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = map(int, labels.aminmax())
        if low < 0 or high >= logits.shape[2]:
            classes = f"from 0 to C-1={logits.shape[2] - 1}"
            _fail("mined_cross_entropy", "labels", classes, f"{low} to {high}")
    return torch.ops.scratchdet.mined_cross_entropy.default(logits, labels, negatives_per_positive)


def nms(
    boxes_xyxy: Tensor, scores: Tensor, groups: Tensor | None = None, iou_threshold: float = 0.45
) -> Tensor:
    """Greedy suppression: (K,4), (K,), (K,) int64 or None (one group) -> (K,) bool, True if kept.

    See reference.nms. `boxes_xyxy[keep]` is in the order that came in: sort it if you need to.
    Raises ValueError for a wrong shape, type or device.
    """
    _check_rows("nms", "boxes_xyxy", boxes_xyxy)
    shape = boxes_xyxy.shape[:1]
    if scores.shape != shape or scores.dtype != torch.float32:
        _fail("nms", "scores", f"(K,) float32 like boxes (K,4), K={shape[0]}", _seen(scores))
    if groups is None:
        groups = torch.zeros_like(scores, dtype=torch.int64)
    if groups.shape != shape or groups.dtype != torch.int64:
        _fail("nms", "groups", f"(K,) int64 like boxes (K,4), K={shape[0]}", _seen(groups))
    _check_device("nms", boxes_xyxy, scores=scores, groups=groups)
    _check_unit("nms", "iou_threshold", iou_threshold)
    return torch.ops.scratchdet.nms.default(boxes_xyxy, scores, groups, iou_threshold)


def postprocess(
    loc: Tensor,
    logits: Tensor,
    priors_cxcywh: Tensor,
    score_threshold: float = 0.01,
    top_k: int = 400,
    iou_threshold: float = 0.45,
    max_detections: int = 200,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,P,4), (N,P,C), (P,4) -> boxes (N,D,4) xyxy, scores (N,D), labels (N,D), count (N,).

    See reference.postprocess. `loc` and `logits` may be of any floating type and stride; no
    gradient flows. Raises ValueError for a wrong shape, type, device or number.
    """
    _check_rows("postprocess", "priors_cxcywh", priors_cxcywh)
    p = priors_cxcywh.shape[0]
    for name, x, last in (("loc", loc, "4"), ("logits", logits, "C")):
        if x.dim() != 3 or x.shape[1] != p or not x.is_floating_point():
            like = f"(N,P,{last}) floating with P={p} priors"
            _fail("postprocess", name, like, _seen(x))
    if loc.shape[2] != 4 or loc.shape[0] != logits.shape[0] or logits.shape[2] < 1:
        _fail("postprocess", "loc", f"(N,P,4) like logits {_seen(logits)}", _seen(loc))
    _check_device("postprocess", logits, loc=loc, priors_cxcywh=priors_cxcywh)
    _check_unit("postprocess", "score_threshold", score_threshold)
    _check_unit("postprocess", "iou_threshold", iou_threshold)
    for name, value in (("top_k", top_k), ("max_detections", max_detections)):
        if value < 1:
            _fail("postprocess", name, "at least 1", value)
    return torch.ops.scratchdet.postprocess.default(
        loc.detach(),
        logits.detach(),
        priors_cxcywh,
        score_threshold,
        top_k,
        iou_threshold,
        max_detections,
    )


def _check_rows(op, name, x):
    if x.dim() != 2 or x.shape[1] != 4 or x.dtype != torch.float32:
        _fail(op, name, "(rows,4) float32", _seen(x))


def _check_device(op, first, **others):
    for name, x in others.items():
        if x.device != first.device:
            _fail(op, name, f"on {first.device} like the others", _seen(x))


def _check_unit(op, name, value):
    if not 0 <= value <= 1:  # also catches NaN
        _fail(op, name, "between 0 and 1", value)


def _seen(x):
    where = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"({','.join(map(str, x.shape))}) {str(x.dtype).removeprefix('torch.')}{where}"


def _fail(op, argument, contract, got):
    raise ValueError(f"{op}: {argument} must be {contract}; got {got}")


def describe() -> str:
    """One line: `ops: colour match mined_cross_entropy nms postprocess - cpu+cuda`."""
    compiled = "+".join(device for device, is_built in COMPILED.items() if is_built)
    what = compiled or "plain PyTorch"
    if MODE == "emulate":
        what = "the CUDA kernels, emulated on the CPU"
    return f"ops: {' '.join(NAMES)} - {what}"


def _load():
    """Build and load what SCRATCHDET_OPS asks for."""
    if MODE not in MODES:
        raise ValueError(f"SCRATCHDET_OPS={MODE}: expected one of {', '.join(MODES)}")
    wanted = []
    if MODE == "emulate":
        wanted = [("cpu", "emulate", ".cu")]
    elif MODE != "reference":
        wanted = [("cpu", "cpu", ".cpp")]
        if torch.cuda.is_available():
            wanted.append(("cuda", "cuda", ".cu"))
    for device, name, suffix in wanted:
        try:
            build(name, [op + suffix for op in NAMES], emulate=MODE == "emulate")
            COMPILED[device] = True
        except BuildError as error:
            if MODE != "auto":
                raise
            _say(
                f"no {device.upper()} kernels: {error}.\n  So on {device.upper()} tensors the ops "
                "run as plain PyTorch: the same results, but slower (on a CPU, detection takes "
                "about a second per image).\n  "
                "SCRATCHDET_OPS=reference silences this, SCRATCHDET_OPS=require makes it an error."
            )


MODE = os.environ.get("SCRATCHDET_OPS") or "auto"
try:
    _load()
except ValueError as error:  # in the imports of a program, before it can catch anything
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
