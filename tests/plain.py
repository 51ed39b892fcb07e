"""IoU, matching, NMS and colour as one would write them first: loops over single numbers.

Slow and plainly right: what the tests compare with. They share nothing with ops/reference.py. A box
is (left, top, right, bottom), anything that holds four numbers. The arithmetic of `iou` is float32
in the order of the definition, so that whoever computes the same gets the same bits.
"""

import colorsys

import numpy as np


def iou(a, b):
    """Of two boxes; 0 where the union is not positive or a number is not finite."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    zero = np.float32(0)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return zero
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
        shared = width * height
        both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        return shared / both if both > 0 else zero


def match(priors, boxes, threshold=0.5):
    """The box of each prior in one image, or -1: a list as long as `priors`.

    All pairs, best first: a pair is taken if its box and its prior are both still free. Then a
    prior that is still free takes its best box, if that is good enough.
    """
    pairs = {
        (g, p): iou(box, prior) for g, box in enumerate(boxes) for p, prior in enumerate(priors)
    }
    matched = [-1] * len(priors)
    free_boxes, free_priors = set(range(len(boxes))), set(range(len(priors)))
    for g, p in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
        if g in free_boxes and p in free_priors and pairs[g, p] > np.float32(1e-6):
            matched[p] = g
            free_boxes.remove(g)
            free_priors.remove(p)
    for p in free_priors:
        best = max(range(len(boxes)), key=lambda g: (pairs[g, p], -g), default=None)  # noqa: B023
        if best is not None and pairs[best, p] >= np.float32(threshold):
            matched[p] = best
    return matched


def nms(boxes, scores, groups, threshold):
    """Whether each box is kept: no better kept box of its group overlaps it by more. A list."""
    usable = [i for i in range(len(boxes)) if np.isfinite([*boxes[i], scores[i]]).all()]
    kept = []
    for i in sorted(usable, key=lambda i: (-scores[i], i)):
        rivals = [k for k in kept if groups[k] == groups[i]]
        if all(iou(boxes[k], boxes[i]) <= np.float32(threshold) for k in rivals):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


def jitter_colour(pixel, order, brightness, contrast, saturation, hue):
    """The colour augmentation of one (R, G, B) pixel, with the standard library's HSV."""

    def whole(values):
        return [min(255, max(0, round(v))) for v in values]

    def contrasted(p):
        return whole([v * contrast for v in p])

    p = whole([v + brightness for v in pixel])
    if not order:
        p = contrasted(p)
    h, s, v = colorsys.rgb_to_hsv(*p)
    p = whole(colorsys.hsv_to_rgb(h, min(1.0, s * saturation), v))
    h, s, v = colorsys.rgb_to_hsv(*p)
    p = whole(colorsys.hsv_to_rgb(max(0.0, h + hue / 180), s, v))
    return contrasted(p) if order else p
