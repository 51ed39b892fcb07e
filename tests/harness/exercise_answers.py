"""Answers to docs/exercises.md: a right one for each, and wrong ones that the checks must reject.

Spoilers. A student's file defines functions of the same names; see docs/exercises.md.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (areas - w * h)


def iou_of_far_boxes_multiplies_two_negatives(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (areas - w * h)


def iou_counts_the_intersection_twice(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]))


def iou_counts_pixels(a, b):
    return iou((a[0], a[1], a[2] + 1, a[3] + 1), (b[0], b[1], b[2] + 1, b[3] + 1))


def pairs(a_xyxy, b_xyxy):
    a, b = a_xyxy[:, None], b_xyxy[None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = sides.clamp(min=0).prod(dim=-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    union = areas - inter
    return torch.where(union > 0, inter / union, 0.0)


def pairs_transposed(a_xyxy, b_xyxy):
    return pairs(b_xyxy, a_xyxy)


def pairs_of_empty_boxes_are_nan(a_xyxy, b_xyxy):
    a, b = a_xyxy[:, None], b_xyxy[None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = sides.clamp(min=0).prod(dim=-1)
    return inter / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter)


def pairs_without_clamp(a_xyxy, b_xyxy):
    a, b = a_xyxy[:, None], b_xyxy[None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = sides.prod(dim=-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return torch.where(union > 0, inter / union, 0.0)


def priors(side, small, large, step, ratios, *, middle=0.5, second=None, swap=False):
    second = math.sqrt(small * large) if second is None else second
    sizes = [(small, small), (second, second)]
    for ratio in ratios:
        root = math.sqrt(ratio)
        sizes += [(small * root, small / root), (small / root, small * root)]
    rows = []
    for y in range(side):
        for x in range(side):
            cx, cy = (x + middle) * step, (y + middle) * step
            rows += [(cy, cx, *size) if swap else (cx, cy, *size) for size in sizes]
    return torch.tensor(rows)


def priors_column_by_column(*args):
    return priors(*args, swap=True)


def priors_at_the_corner_of_the_cell(*args):
    return priors(*args, middle=0.0)


def priors_with_the_large_side(side, small, large, step, ratios):
    return priors(side, small, large, step, ratios, second=large)


def encode(boxes_xyxy, priors_cxcywh, variances=(0.1, 0.2), log=torch.log):
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    centre = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    offset = (centre - priors_cxcywh[..., :2]) / priors_cxcywh[..., 2:] / variances[0]
    return torch.cat([offset, log(size / priors_cxcywh[..., 2:]) / variances[1]], dim=-1)


def decode(loc, priors_cxcywh, variances=(0.1, 0.2), exp=torch.exp):
    centre = priors_cxcywh[..., :2] + loc[..., :2] * variances[0] * priors_cxcywh[..., 2:]
    half = priors_cxcywh[..., 2:] * exp(loc[..., 2:] * variances[1]) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


coding = (encode, decode)
coding_swaps_the_variances = (
    lambda boxes, p: encode(boxes, p, (0.2, 0.1)),
    lambda loc, p: decode(loc, p, (0.2, 0.1)),
)
coding_without_variances = (
    lambda boxes, p: encode(boxes, p, (1, 1)),
    lambda loc, p: decode(loc, p, (1, 1)),
)
coding_is_linear_in_size = (
    lambda boxes, p: encode(boxes, p, log=lambda x: x - 1),
    lambda loc, p: decode(loc, p, exp=lambda x: x + 1),
)


def matching(iou, threshold):
    matched = by_threshold(iou, threshold)
    free = iou.clone()
    for _ in range(len(iou)):
        box, prior = divmod(free.argmax().item(), iou.shape[1])
        if free[box, prior] <= 1e-6:
            break
        matched[prior] = box
        free[box] = -1
        free[:, prior] = -1
    return matched


def by_threshold(iou, threshold):
    best, box = iou.max(dim=0)
    return torch.where(best >= threshold, box, -1)


def each_box_takes_its_best_prior(iou, threshold):
    matched = by_threshold(iou, threshold)
    for box, prior in enumerate(iou.argmax(dim=1).tolist()):
        matched[prior] = box
    return matched


def matching_lets_the_threshold_overrule(iou, threshold):
    first, second = matching(iou, 2.0), by_threshold(iou, threshold)
    return torch.where(second >= 0, second, first)


def mining(score, positive, ratio):
    keep = torch.zeros_like(positive)
    for n in range(len(score)):
        wanted = min(ratio * int(positive[n].sum()), int((~positive[n]).sum()))
        hardest = score[n].masked_fill(positive[n], -1.0).topk(wanted).indices
        keep[n, hardest] = True
    return keep


def mining_over_the_whole_batch(score, positive, ratio):
    return mining(score.reshape(1, -1), positive.reshape(1, -1), ratio).reshape(score.shape)


def mining_takes_positives(score, positive, ratio):
    keep = torch.zeros_like(positive)
    for n in range(len(score)):
        wanted = min(ratio * int(positive[n].sum()), score.shape[1])
        keep[n, score[n].topk(wanted).indices] = True
    return keep


def mining_takes_the_easiest(score, positive, ratio):
    return mining(score.max() - score, positive, ratio)


def loss(loc, logits, target_loc, target_labels, mined):
    positive = target_labels > 0
    total = max(1, int(positive.sum()))
    loss_loc = F.smooth_l1_loss(loc[positive], target_loc[positive], reduction="sum")
    chosen = positive | mined
    loss_conf = F.cross_entropy(logits[chosen], target_labels[chosen], reduction="sum")
    return loss_loc / total, loss_conf / total


def loss_without_a_lower_bound_of_positives(loc, logits, target_loc, target_labels, mined):
    total = (target_labels > 0).sum()
    parts = loss(loc, logits, target_loc, target_labels, mined)
    return tuple(x * total.clamp(min=1) / total for x in parts)


def loss_is_a_mean_over_the_chosen(loc, logits, target_loc, target_labels, mined):
    chosen = (target_labels > 0) | mined
    loss_conf = F.cross_entropy(logits[chosen], target_labels[chosen])
    loss_loc, _ = loss(loc, logits, target_loc, target_labels, mined)
    return loss_loc, loss_conf.nan_to_num()


def loss_of_all_offsets(loc, logits, target_loc, target_labels, mined):
    total = max(1, int((target_labels > 0).sum()))
    loss_conf = loss(loc, logits, target_loc, target_labels, mined)[1]
    return F.smooth_l1_loss(loc, target_loc, reduction="sum") / total, loss_conf


def nms(boxes_xyxy, scores, iou_threshold, *, stable=True, overlaps=torch.gt, forget=True):
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    if not stable:
        order = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
    keep, looked_at = torch.zeros(len(scores), dtype=torch.bool), []
    for i in order:
        iou_with = pairs(boxes_xyxy[i : i + 1], boxes_xyxy[looked_at])  # (1, J)
        keep[i] = not overlaps(iou_with, iou_threshold).any()
        if keep[i] or not forget:
            looked_at.append(i)
    return keep


def nms_where_the_suppressed_suppress(*args):
    return nms(*args, forget=False)


def nms_with_ties_from_the_end(*args):
    return nms(*args, stable=False)


def nms_at_the_threshold(*args):
    return nms(*args, overlaps=torch.ge)


def nms_in_the_order_that_came(boxes_xyxy, scores, iou_threshold):
    return nms(boxes_xyxy, torch.zeros_like(scores), iou_threshold)


def precision(scores, correct, objects, *, envelope=True, points=11):
    order = torch.sort(scores, descending=True, stable=True).indices
    hits = correct[order].cumsum(0)
    recall = hits / objects
    values = hits / torch.arange(1, len(hits) + 1)
    total = 0.0
    for k in range(points):
        reached = values[recall >= k / 10]
        total += float(reached.max() if envelope else reached[0]) if len(reached) else 0.0
    return total / points


def precision_without_envelope(*args):
    return precision(*args, envelope=False)


def precision_at_ten_points(*args):
    return precision(*args, points=10)


def precision_counts_recall_of_the_found(scores, correct, objects):
    return precision(scores, correct, int(correct.sum()))


KERNEL = """
__global__ void nms_mask(const Box* boxes, int count, float threshold, Key* mask) {
  __shared__ Box other[64];
  const int row = blockIdx.y * 64 + threadIdx.x, first = blockIdx.x * 64;
  if (first + threadIdx.x < count) other[threadIdx.x] = boxes[first + threadIdx.x];
  __syncthreads();
  if (row >= count) return;
  Key word = 0;
  for (int c = 0; c < 64 && first + c < count; ++c)
    if (first + c > row && iou(boxes[row], area(boxes[row]), other[c], area(other[c])) > threshold)
      word |= Key(1) << c;
  mask[row * gridDim.x + blockIdx.x] = word;
}
"""


def kernel(old="", new=""):
    assert old in KERNEL
    return KERNEL.replace(old, new)


WRONG = SimpleNamespace(
    iou=[
        iou_of_far_boxes_multiplies_two_negatives,
        iou_counts_the_intersection_twice,
        iou_counts_pixels,
    ],
    pairs=[pairs_transposed, pairs_of_empty_boxes_are_nan, pairs_without_clamp],
    priors=[
        priors_column_by_column,
        priors_at_the_corner_of_the_cell,
        priors_with_the_large_side,
    ],
    coding=[coding_swaps_the_variances, coding_without_variances, coding_is_linear_in_size],
    matching=[by_threshold, each_box_takes_its_best_prior, matching_lets_the_threshold_overrule],
    mining=[mining_over_the_whole_batch, mining_takes_positives, mining_takes_the_easiest],
    loss=[
        loss_without_a_lower_bound_of_positives,
        loss_is_a_mean_over_the_chosen,
        loss_of_all_offsets,
    ],
    nms=[
        nms_where_the_suppressed_suppress,
        nms_with_ties_from_the_end,
        nms_at_the_threshold,
        nms_in_the_order_that_came,
    ],
    precision=[
        precision_without_envelope,
        precision_at_ten_points,
        precision_counts_recall_of_the_found,
    ],
    kernel=[
        kernel("Key(1) << c", "1 << c"),  # 32 bits of int
        kernel("first + c > row && ", ""),  # boxes suppress themselves and better ones
        kernel("if (row >= count) return;", ""),  # writes behind the mask
        kernel("__syncthreads();", "if (row >= count) return; __syncthreads();"),  # waits for ever
    ],
)
RIGHT = SimpleNamespace(
    iou=iou, pairs=pairs, priors=priors, coding=coding, matching=matching, mining=mining,
    loss=loss, nms=nms, precision=precision, kernel=KERNEL,
)  # fmt: skip
