"""What the bench compares with: how other codebases do the same. Nothing else imports this.

The ssd.pytorch recipe is written here anew from what amdegroot/ssd.pytorch computes, with its loops
in the same places (over images, boxes, classes and kept boxes), and frozen, so that a ratio means
the same in every run. The torchvision functions return None where torchvision is not installed.
"""

from types import SimpleNamespace

import torch

from ops.reference import decode


def overlap_matrix(a_xyxy, b_xyxy):
    """IoU (A,B) as the recipe forms it: three (A,B,...) tensors at full size."""
    shape = len(a_xyxy), len(b_xyxy), 2
    low = torch.max(a_xyxy[:, None, :2].expand(shape), b_xyxy[None, :, :2].expand(shape))
    high = torch.min(a_xyxy[:, None, 2:].expand(shape), b_xyxy[None, :, 2:].expand(shape))
    inter = (high - low).clamp(min=0).prod(dim=2)
    area_a, area_b = [(x[:, 2:] - x[:, :2]).prod(dim=1) for x in (a_xyxy, b_xyxy)]
    return inter / (area_a[:, None].expand_as(inter) + area_b[None].expand_as(inter) - inter)


def recipe_match(priors_xyxy, boxes_xyxy, offsets, iou_threshold):
    """Matching of the ssd.pytorch recipe, an image at a time, without its encoding.

    Each box claims its best prior in turn, so the last of two boxes with one best prior wins.
    """
    starts, rows = offsets.tolist(), []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        if start == end:
            rows.append(torch.full((len(priors_xyxy),), -1))
            continue
        iou = overlap_matrix(boxes_xyxy[start:end], priors_xyxy)
        _, best_prior = iou.max(dim=1)
        best_iou, best_box = iou.max(dim=0)
        best_iou.index_fill_(0, best_prior, 2)
        for box in range(end - start):
            best_box[best_prior[box]] = box
        best_box = best_box + start
        best_box[best_iou < iou_threshold] = -1
        rows.append(best_box)
    return torch.stack(rows)


def recipe_match_and_encode(priors_xyxy, boxes_xyxy, offsets, iou_threshold):
    """What its `match` function does in all: the offsets of every prior to its best box, too."""
    matched = recipe_match(priors_xyxy, boxes_xyxy, offsets, iou_threshold)
    size = priors_xyxy[:, 2:] - priors_xyxy[:, :2]
    targets = []
    for row in matched:
        box = boxes_xyxy[row.clamp(min=0)]  # (P, 4)
        shift = (box[:, :2] + box[:, 2:] - priors_xyxy[:, :2] - priors_xyxy[:, 2:]) / 2
        log_size = torch.log((box[:, 2:] - box[:, :2]) / size) / 0.2
        targets.append(torch.cat([shift / (0.1 * size), log_size], dim=1))
    return matched, torch.stack(targets)


def recipe_nms(boxes_xyxy, scores, iou_threshold, top_k):
    """Indices kept, best first: one kept box a turn, compared with all that are left."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(dim=1)
    area = (x2 - x1) * (y2 - y1)
    left = scores.sort().indices[-top_k:]
    kept = []
    while len(left):
        best, left = left[-1], left[:-1]
        kept.append(best)
        w = (torch.minimum(x2[left], x2[best]) - torch.maximum(x1[left], x1[best])).clamp(min=0)
        h = (torch.minimum(y2[left], y2[best]) - torch.maximum(y1[left], y1[best])).clamp(min=0)
        inter = w * h
        left = left[inter / (area[left] + area[best] - inter) <= iou_threshold]
    return torch.stack(kept) if kept else left


def recipe_postprocess(loc, logits, priors, score_threshold, top_k, iou_threshold, keep):
    """Detection of the ssd.pytorch recipe: a loop over images and classes -> (K,6) an image."""
    result = []
    for offsets, probabilities in zip(loc, logits.softmax(dim=-1), strict=True):
        boxes, found = decode(offsets, priors), []  # all 8,732, whatever their score
        for label in range(1, probabilities.shape[1]):
            score = probabilities[:, label]
            mask = score > score_threshold
            if not mask.any():
                continue
            score, box = score[mask], boxes[mask[:, None].expand_as(boxes)].view(-1, 4)
            kept = recipe_nms(box, score, iou_threshold, top_k)
            of_class = torch.full((len(kept), 1), float(label))
            found.append(torch.cat([box[kept], score[kept, None], of_class], dim=1))
        found = torch.cat(found) if found else boxes.new_zeros((0, 6))
        result.append(found[found[:, 4].sort(descending=True, stable=True).indices[:keep]])
    return result


def steps_colour(images, inside, jitter, mean, std, channels, dtype):
    """Colour, mean and layout in PyTorch as this repository did it before it had a kernel: an image
    at a time, a step only where it changes something, in place where it can."""
    out = torch.zeros_like(images, dtype=dtype, memory_format=torch.channels_last)
    scale = [torch.tensor(v)[:, None, None] for v in (mean, std)]
    for n, (x0, y0, x1, y1) in enumerate(inside.tolist()):
        part = slice(n, n + 1), slice(None), slice(y0, y1), slice(x0, x1)
        x = (steps_jitter(images[part].float(), jitter[n].tolist()) - scale[0]) / scale[1]
        out[part] = x if channels == "rgb" else x.flip(1)
    return out


def steps_jitter(x, row):
    order, brightness, contrast, saturation, hue = (torch.tensor(v) for v in row)
    if brightness != 0:
        x = (x + brightness).round_().clamp_(0, 255)
    if contrast != 1 and order == 0:
        x = (x * contrast).round_().clamp_(0, 255)
    if saturation != 1:
        value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
        factor = torch.minimum(saturation, value / (value - lowest).clamp_(min=1.0))
        x = (value - (value - x) * factor).round_()
    if hue != 0:
        r, g, b = x.unbind(1)
        value, lowest = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
        chroma = value - lowest
        safe = chroma.clamp(min=1.0)
        h = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
        h = torch.where(value == r, (g - b) / safe, h)
        h = (torch.where(h < 0, h + 6, h) + hue / 30).clamp_(min=0)
        h = torch.where(h >= 6, h - 6, h)
        x = torch.stack([(h - 3).abs_() - 1, 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], dim=1)
        x = x.clamp_(0, 1).mul_(chroma[:, None]).add_(lowest[:, None]).round_()
    if contrast != 1 and order > 0:
        x = (x * contrast).round_().clamp_(0, 255)
    return x


def torchvision_nms():
    try:
        from torchvision.ops import nms
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        return None
    return nms


def torchvision_match(iou_threshold=0.5):
    """SSDMatcher(box_iou) in a loop over the images, as torchvision's SSD trains."""
    try:
        from torchvision.models.detection._utils import SSDMatcher
        from torchvision.ops import box_iou
    except (ImportError, RuntimeError):
        return None
    matcher = SSDMatcher(iou_threshold)

    def match(priors_xyxy, boxes_xyxy, offsets):
        pieces = boxes_xyxy.split(offsets.diff().tolist())
        return [
            matcher(box_iou(boxes, priors_xyxy))
            if len(boxes)
            else torch.full((len(priors_xyxy),), -1, device=boxes.device)
            for boxes in pieces
        ]

    return match


def torchvision_postprocess(score_threshold, top_k, iou_threshold, keep):
    """SSD.postprocess_detections, in units of the image. It clips boxes before it suppresses."""
    try:
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.models.detection.ssd import SSD
    except (ImportError, RuntimeError):
        return None
    settings = SimpleNamespace(
        box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
        score_thresh=score_threshold,
        topk_candidates=top_k,
        nms_thresh=iou_threshold,
        detections_per_img=keep,
    )

    def postprocess(loc, logits, priors_xyxy):
        n = len(loc)
        outputs = {"bbox_regression": loc, "cls_logits": logits}
        return SSD.postprocess_detections(settings, outputs, [priors_xyxy] * n, [(1, 1)] * n)

    return postprocess
