"""The five ops in plain PyTorch: the specification that every kernel is tested against.

    colour               bytes -> the network's input: colour augmentation, mean, layout
    match                which box each prior has to learn             (training)
    mined_cross_entropy  the classes' loss, of the priors that count   (training)
    nms                  which of the overlapping boxes survive        (testing)
    postprocess          loc and logits -> boxes, scores and labels    (testing, all in one)

The bodies below are what runs on a machine without a compiler. They are written to be read; the
kernels beside them (`match.cpp`, `match.cu`, ...) are written to be fast, and must give the same.
`iou.h` states the same two formulas, IoU and decoding, for C++ and CUDA.

Letters: N images - P priors - C classes with background 0 - T boxes of a batch - K candidates -
D detections at most. Boxes are float32; `_xyxy` is (left, top, right, bottom), `_cxcywh` is
(centre x, centre y, width, height), both in units of the image.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCES = (0.1, 0.2)  # of centre and size (Caffe SSD's prior_variance)
MIN_BIPARTITE_IOU = 1e-6  # below it a box takes no prior at all (Caffe MatchBBox)


def pairwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """IoU of every pair. [[0,0,2,2]] x [[1,1,3,3]] -> [[1/7]]. (A,4),(B,4) xyxy -> (A,B).

    0 unless the union is positive, and 0 for a box that is not finite: so inverted, empty,
    huge (area overflows) and NaN boxes overlap nothing.
    """
    a, b = a_xyxy[:, None], b_xyxy[None]  # (A, 1, 4), (1, B, 4)
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    sides = sides.clamp(min=0)  # (A, B, 2)
    inter = sides[..., 0] * sides[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = area_a + area_b - inter  # this association: bit-equal to torchvision's
    finite = a.isfinite().all(-1) & b.isfinite().all(-1)
    return torch.where((union > 0) & finite, inter / union, 0.0)


def decode(loc: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Box codes (..., P, 4) on priors (P, 4) cxcywh -> boxes (..., P, 4) xyxy (Caffe DecodeBBox).

    Not clipped to the image: SSD suppresses unclipped boxes.
    """
    centre = priors_cxcywh[..., :2] + loc[..., :2] * VARIANCES[0] * priors_cxcywh[..., 2:]
    size = priors_cxcywh[..., 2:] * torch.exp(loc[..., 2:] * VARIANCES[1])
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


# ------------------------------------------------------------------------------ colour


def value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """V = max and V - min over the channels: (N, 3, H, W) -> (N, H, W) each."""
    value = x.amax(dim=1)
    return value, value - x.amin(dim=1)


def jitter_colour(images: Tensor, jitter: Tensor) -> Tensor:
    """SSD's colour augmentation (Caffe ApplyDistort): (N, 3, H, W) float RGB -> the same.

    `jitter` (N, 5) is order, brightness, contrast, saturation (>= 0) and hue of each image;
    0, 0, 1, 1, 0 changes nothing. The steps come in the order brightness, contrast, saturation,
    hue; where order is 1, contrast comes last. Pixels are whole numbers 0..255 before and after
    each step, as Caffe's 8-bit images are. Saturation and hue act in HSV: S is clamped at its
    maximum, H (the circle has 180) is clamped at 0 and wraps above 180. Not reproduced: Caffe's
    rounding of H and S themselves to 8 bits.
    """
    order, brightness, contrast, saturation, hue = jitter.float()[:, :, None, None].unbind(1)
    first = contrast.where(order == 0, 1.0)  # (N, 1, 1), as all five
    last = contrast.where(order > 0, 1.0)
    x = (images + brightness[:, None]).round().clamp(0, 255)
    x = (x * first[:, None]).round().clamp(0, 255)

    value, chroma = value_and_chroma(x)  # (N, H, W)
    most = value / chroma.clamp(min=1.0)  # S grows at most so many times: then it is at its maximum
    factor = torch.minimum(saturation, most)
    x = (value[:, None] - (value[:, None] - x) * factor[:, None]).round()

    value, chroma = value_and_chroma(x)
    r, g, b = x.unbind(1)  # (N, H, W)
    safe = chroma.clamp(min=1.0)
    h = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    h = torch.where(value == r, (g - b) / safe, h)  # sixths of the circle
    h = torch.where(h < 0, h + 6, h)
    h = (h + hue / hue.new_tensor(30)).clamp(min=0)  # a Python 30 would be * (1 / 30) on a GPU
    h = torch.where(h >= 6, h - 6, h)
    x = torch.stack([(h - 3).abs() - 1, 2 - (h - 2).abs(), 2 - (h - 4).abs()], dim=1)
    x = (x.clamp(0, 1) * chroma[:, None] + (value - chroma)[:, None]).round()

    return (x * last[:, None]).round().clamp(0, 255)


@functools.lru_cache(maxsize=8)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1); kept, because copying it to a GPU for each batch would wait for the GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def normalise(images: Tensor, mean: list[float], std: list[float], channels: str) -> Tensor:
    """RGB (N, 3, H, W), 0..255 -> float32, (x - mean) / std, in the order "rgb" or "bgr"."""
    x = images.float() - per_channel(tuple(mean), images.device)
    x = x / per_channel(tuple(std), images.device)
    return x if channels == "rgb" else x.flip(1)


def colour(
    images: Tensor,
    inside: Tensor,
    jitter: Tensor,
    mean: list[float],
    std: list[float],
    channels: str,
    dtype: torch.dtype,
) -> Tensor:
    """A batch of bytes -> the network's input: (N,3,H,W) uint8 RGB -> (N,3,H,W), channels_last.

    `inside` (N,4) int64 x0 y0 x1 y1: the pixels that the image covers. They get jitter_colour and
    normalise; beside the image the input is 0, which is the mean.
    """
    out = torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    ).zero_()
    is_neutral = (jitter[:, 1:] == jitter.new_tensor([0.0, 1.0, 1.0, 0.0])).all(dim=1).tolist()
    for n, (x0, y0, x1, y1) in enumerate(inside.tolist()):  # one image stays in the cache
        part = slice(n, n + 1), slice(None), slice(y0, y1), slice(x0, x1)
        x = images[part].float()
        if not is_neutral[n]:
            x = jitter_colour(x, jitter[n : n + 1])
        out[part] = normalise(x, mean, std, channels).to(dtype)
    return out


# ------------------------------------------------------------------------------ matching


def match(priors_xyxy: Tensor, boxes_xyxy: Tensor, offsets: Tensor, iou_threshold: float) -> Tensor:
    """The box each prior has to learn: (P,4), (T,4), (N+1,) int64 -> (N,P) int64.

    Image n owns rows offsets[n]:offsets[n+1] of `boxes_xyxy`. The result is a row of
    `boxes_xyxy`, or -1 for background. Caffe MatchBBox with PER_PREDICTION:

    1. Greedy bipartite, best pair first: the best (prior, box) pair of all that are still free is
       matched, until no box is free. So every box gets a prior of its own, even where two boxes
       share their best prior. A pair needs IoU > 1e-6.
    2. Each prior that is still free takes its best box if their IoU >= iou_threshold.

    Ties go to the lowest box, then to the lowest prior.
    """
    num_priors, num_images = len(priors_xyxy), len(offsets) - 1
    matched = torch.full((num_images, num_priors), -1, dtype=torch.int64, device=offsets.device)
    starts = offsets.tolist()
    for n, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if start == end or num_priors == 0:
            continue  # an image without boxes is all background
        iou = pairwise_iou(boxes_xyxy[start:end], priors_xyxy)  # (G, P)
        free = iou.clone()  # step 1
        for _ in range(end - start):
            flat = (free == free.max()).flatten().to(torch.int8).argmax()  # lowest box, then prior
            box, prior = flat // num_priors, flat % num_priors
            if free[box, prior] <= MIN_BIPARTITE_IOU:
                break
            matched[n, prior] = box + start
            free[box] = -1.0
            free[:, prior] = -1.0

        best_iou = iou.amax(dim=0)  # (P,), step 2
        best_box = (iou == best_iou).to(torch.int8).argmax(dim=0)  # the lowest box on ties
        takes = (matched[n] < 0) & (best_iou >= iou_threshold)
        matched[n] = torch.where(takes, best_box + start, matched[n])
    return matched


# ------------------------------------------------------------------------------ loss


def hard_negatives(score: Tensor, eligible: Tensor, how_many: Tensor) -> Tensor:
    """The `how_many` (N,) eligible priors of the highest score in each image -> (N,P) bool.

    score (N,P) >= 0. Ties at the border go to the lowest prior. No sort: the order of positive
    floats is that of their bits, so the k-th largest is found by setting one bit after another.
    """
    bits = torch.where(eligible, score.contiguous().view(torch.int32), -1)  # (N, P)
    how_many = torch.minimum(how_many, eligible.sum(dim=1))[:, None].int()  # (N, 1)
    border = torch.zeros_like(how_many)
    for bit in reversed(range(31)):
        higher = border | (1 << bit)
        # counts bits >= higher; in integers, for a comparison and its sum take twice as long
        count = (bits - (higher - 1)).clamp_(0, 1).sum(1, keepdim=True, dtype=torch.int32)
        border = torch.where(count >= how_many, higher, border)
    above = bits > border
    at = bits == border
    return above | (at & (at.cumsum(dim=1) <= how_many - above.sum(1, keepdim=True)))


def mined_cross_entropy(logits: Tensor, labels: Tensor, negatives_per_positive: int) -> Tensor:
    """Cross-entropy where it counts, else 0: (N,P,C), (N,P) int64 -> (N,P) float32 (SSD eq. 3).

    It counts for the positive priors (label > 0) and, in each image, for the hardest negatives,
    those of the highest -log p(background): `negatives_per_positive` for each of its positives. Of
    equals at the border the lowest priors count. What is not finite is as hard as can be, and
    always stays: mining hides no infinity and no NaN.
    """
    positive = labels > 0
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    cross_entropy = cross_entropy.view_as(labels).abs()  # (N, P); abs: of -0.
    finite = cross_entropy.isfinite()
    score = torch.where(finite, cross_entropy, float("inf"))
    mined = hard_negatives(score, ~positive, negatives_per_positive * positive.sum(dim=1))
    return torch.where(positive | mined | ~finite, cross_entropy, 0.0)


def mined_cross_entropy_backward(
    gradient: Tensor, logits: Tensor, labels: Tensor, cross_entropy: Tensor
) -> Tensor:
    """Gradients (N,P) of mined_cross_entropy's result (N,P) -> its logits' (N,P,C), of their type.

    softmax - one-hot, where the result is not 0. (A cross-entropy that counts may round to 0. Then
    all that is lost is less than 6e-8.)
    """
    one_hot = F.one_hot(labels, logits.shape[2])
    row = gradient[..., None] * (logits.float().softmax(dim=2) - one_hot)  # (N, P, C)
    return torch.where(cross_entropy[..., None] != 0, row, 0.0).to(logits.dtype)


# ------------------------------------------------------------------------------ detection


def nms(boxes_xyxy: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: (K,4), (K,), (K,) int64 -> (K,) bool, True where kept.

    Boxes are visited by (score descending, index ascending); one is kept unless a kept box of the
    same group overlaps it with IoU > iou_threshold. Groups (classes) never touch each other, and
    no coordinate is shifted to make it so: that trick rounds. A box or a score that is not finite
    is never kept and never suppresses.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    alive = boxes_xyxy.isfinite().all(dim=1) & scores.isfinite()
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[alive[order]]
    while len(order):
        best, rest = order[0], order[1:]
        keep[best] = True
        iou = pairwise_iou(boxes_xyxy[best][None], boxes_xyxy[rest])[0]
        order = rest[(iou <= iou_threshold) | (groups[rest] != groups[best])]
    return keep


def postprocess(
    loc: Tensor,
    logits: Tensor,
    priors_cxcywh: Tensor,
    score_threshold: float,
    top_k: int,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of a batch: (N,P,4), (N,P,C), (P,4) cxcywh -> the best D of each image.

    Softmax; then for each class but background: priors with score > score_threshold, the best
    `top_k` of them (score descending, prior ascending), decoded, NMS; then the best
    D = `max_detections` over all classes (score descending, class ascending, prior ascending)
    (Caffe DetectionOutput).

    Returns boxes (N,D,4) xyxy, scores (N,D), labels (N,D) int64 and count (N,) int64; rows from
    count[n] on are zero. A score that is not finite is no candidate; a decoded box that is not
    finite is dropped after the selection.
    """
    num_images, _, num_classes = logits.shape
    boxes = loc.new_zeros((num_images, max_detections, 4), dtype=torch.float32)
    scores = boxes.new_zeros((num_images, max_detections))
    labels = torch.zeros_like(scores, dtype=torch.int64)
    count = labels.new_zeros(num_images)
    probabilities = logits.float().softmax(dim=-1)  # (N, P, C)
    for n in range(num_images):
        found = []  # (K, 6) rows: xyxy, score, label; class by class, score descending
        for label in range(1, num_classes):
            score = probabilities[n, :, label]  # (P,)
            prior = torch.nonzero(score > score_threshold)[:, 0]
            best = torch.sort(score[prior], descending=True, stable=True).indices[:top_k]
            prior = prior[best]
            box = decode(loc[n, prior].float(), priors_cxcywh[prior])  # (K, 4) xyxy
            keep = nms(box, score[prior], torch.full_like(prior, label), iou_threshold)
            box, score = box[keep], score[prior][keep, None]
            found.append(torch.cat([box, score, torch.full_like(score, label)], dim=1))
        if not found:
            continue  # background is the only class
        found = torch.cat(found)
        best = torch.sort(found[:, 4], descending=True, stable=True).indices[:max_detections]
        found, k = found[best], len(best)
        boxes[n, :k], scores[n, :k], labels[n, :k] = found[:, :4], found[:, 4], found[:, 5].long()
        count[n] = k
    return boxes, scores, labels, count
