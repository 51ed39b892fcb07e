"""The course's figures, one idea each, as SVG made by the very functions that they explain.

    python -m experiments.report --figures              docs/figures/*.svg

Every picture is a drawn scene of shapes, and boxes have the same colours everywhere: ground truth
green, priors grey, positives and detections orange, negatives blue. Boxes are `_xyxy`, in pixels of
a 300x300 image unless a name says otherwise.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import eval as evaluation
import metrics
import ops
from experiments import errors
from experiments.figures import page, text, ticks
from ops.reference import hard_negatives, pairwise_iou
from plumbing import shapes, sources
from plumbing.files import decode_pixels, open_record
from plumbing.pictures import letters
from scratchdet import (
    PRIORS,
    Config,
    ScratchDet,
    cxcywh_to_xyxy,
    load_detector,
    make_priors,
    priors_per_cell,
)

GREEN, GREY, ORANGE, BLUE = "#009e3c", "#808080", "#f58200", "#2763b8"
INK = "#222222"  # what is none of these
GROUND, FILL, MEAN = "#f3efe6", "#c9bfa8", "#7b7568"  # picture, its shapes, beside the picture
SIDE = 300  # of the scene

SCENE = (  # shape, box
    ("ring", (20, 128, 150, 258)),
    ("star", (168, 38, 228, 98)),
    ("triangle", (186, 170, 272, 262)),
    ("cross", (68, 30, 108, 70)),
)


# ------------------------------------------------------------------------------ the pen


def box(xyxy, colour, width=2.0, dash="", fill="none", opacity=1.0) -> str:
    """A rectangle from its corners."""
    x0, y0, x1, y1 = (float(v) for v in xyxy)
    return (
        f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" '
        f'stroke="{colour}" stroke-width="{width:g}" stroke-dasharray="{dash}" fill="{fill}" '
        f'opacity="{opacity:g}" vector-effect="non-scaling-stroke"/>'
    )


def dot(x, y, colour, radius=3.0) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def line(points, colour, width=2.0, dash="") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" stroke="{colour}" stroke-width="{width:g}" fill="none" '
        f'stroke-dasharray="{dash}"/>'
    )


def panel(x, y, parts, *, scale=1.0, title="", source_xyxy=(0, 0, SIDE, SIDE), clip="") -> list:
    """A scene of 300x300 placed at (x, y), with its title above.

    It shows `source_xyxy` of the picture, warped as the augmentation does; `clip` is a name that no
    other panel of the page has, for what must not leave the frame.
    """
    x0, y0, x1, y1 = source_xyxy
    sx, sy = scale * SIDE / (x1 - x0), scale * SIDE / (y1 - y0)
    inner = [f'<g transform="translate({x} {y}) scale({sx:.4f} {sy:.4f}) translate({-x0} {-y0})">']
    inner += [*parts, "</g>"]
    if clip:
        size = f'width="{scale * SIDE:g}" height="{scale * SIDE:g}"'
        inner = [
            f'<clipPath id="{clip}"><rect x="{x}" y="{y}" {size}/></clipPath>',
            f'<g clip-path="url(#{clip})">',
            *inner,
            "</g>",
        ]
    return [text(x, y - 9, title, weight="bold")] * bool(title) + inner


def picture(scene=SCENE) -> list:
    """The drawn picture: its ground and its shapes."""
    parts = [f'<rect width="{SIDE}" height="{SIDE}" fill="{GROUND}"/>']
    for shape, (x0, y0, x1, y1) in scene:
        points = shapes.outline(shape) * (x1 - x0, y1 - y0) + (x0, y0)  # (K, 2)
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polygon points="{corners}" fill="{FILL}"/>')
        if shape == "ring":
            rx, ry = (x1 - x0) / 4, (y1 - y0) / 4
            parts.append(
                f'<ellipse cx="{(x0 + x1) / 2}" cy="{(y0 + y1) / 2}" rx="{rx}" ry="{ry}" '
                f'fill="{GROUND}"/>'
            )
    return parts


def truth(scene=SCENE) -> list:
    return [box(xyxy, GREEN, 2.5) for _, xyxy in scene]


def tensor(scene) -> torch.Tensor:
    """The scene's boxes (G, 4) in units of the image."""
    return torch.tensor([xyxy for _, xyxy in scene], dtype=torch.float32) / SIDE


# ------------------------------------------------------------------------------ the figures


def iou() -> str:
    """Intersection over union of three pairs, from apart to alike."""
    parts = []
    truth_xyxy = (40, 40, 140, 140)
    for i, other in enumerate([(112, 96, 212, 196), (74, 58, 174, 158), (48, 46, 148, 146)]):
        pair = torch.tensor([truth_xyxy, other], dtype=torch.float32)
        value = pairwise_iou(pair[:1], pair[1:]).item()
        both = [max(truth_xyxy[0], other[0]), max(truth_xyxy[1], other[1])]
        both += [min(truth_xyxy[2], other[2]), min(truth_xyxy[3], other[3])]
        x = 10 + 240 * i
        parts.append(f'<g transform="translate({x} 0)">')
        parts += [box(r, "none", fill="#e3e3e3") for r in (truth_xyxy, other)]
        parts += [box(both, "none", fill="#f9c98f")]
        parts += [box(truth_xyxy, GREEN, 3), box(other, GREY, 3)]
        meaning = ("negative", "negative", "positive")[i]
        parts.append(text(40, 226, f"IoU {value:.2f}", weight="bold"))
        parts.append(text(112, 226, f"{'<' if value < 0.5 else '≥'} 0.5: {meaning}"))
        parts.append("</g>")
    parts.append(text(50, 24, "intersection (orange) / union (all that is filled)"))
    return page(740, 244, parts)


def augmentation() -> str:
    """What the SSD augmentation shows of a picture: three source rectangles, three results."""
    boxes = tensor(SCENE).double().numpy()
    parts, sources, results = [], [], []
    for seed in (16, 4, 26):  # a canvas around the picture; a part of one; a crop
        rng = np.random.default_rng(seed)
        source = data.sample_source(boxes, rng)
        sources.append(source * SIDE)
        placed, kept = data.place_boxes(boxes, source)
        results.append((source * SIDE, placed[kept]))
    outside = max(0, *(max(-s[:2].min(), s[2:].max() - SIDE) for s in sources))
    shrink = SIDE / (SIDE + 2 * outside)
    frame = (-outside, -outside, SIDE + outside, SIDE + outside)
    names = "ABC"
    rectangles = [box(s, INK, 2, dash="6 4") for s in sources]
    letters = [
        f'<text x="{s[2] - 26:.0f}" y="{s[1] + 26:.0f}" style="font-size:{15 / shrink:.0f}px;'
        f'fill:{INK}">{names[i]}</text>'
        for i, s in enumerate(sources)
    ]
    title = "the picture, and three sources"
    parts += panel(
        10, 34, [*picture(), *truth(), *rectangles, *letters],
        scale=0.8, source_xyxy=frame, title=title, clip="whole",
    )  # fmt: skip
    for i, (source, placed) in enumerate(results):
        x = 270 + 260 * i
        parts.append(f'<rect x="{x}" y="34" width="240" height="240" fill="{MEAN}"/>')
        title = f"{names[i]}: what the network sees"
        parts += panel(x, 34, picture(), scale=0.8, source_xyxy=source, title=title, clip=names[i])
        parts += panel(x, 34, [box(b * SIDE, GREEN, 2.5) for b in placed], scale=0.8)
        what = f"{len(placed)} of {len(SCENE)} boxes: their centre is inside"
        parts.append(text(x, 292, what))
    return page(1050, 304, parts)


def priors() -> str:
    """The six maps: every cell's centre, and all priors of one cell."""
    config, parts, first = Config(), [], 0
    boxes = cxcywh_to_xyxy(make_priors(config)) * SIDE  # (P, 4)
    rows = zip([38, 19, 10, 5, 3, 1], priors_per_cell(config), PRIORS[config.priors], strict=True)
    for i, (n, a, (small, large, _, ratios)) in enumerate(rows):
        mine = boxes[first : first + n * n * a].reshape(n, n, a, 4)
        first += n * n * a
        centre = (mine[..., :2] + mine[..., 2:])[:, :, 0] / 2  # (n, n, 2)
        inner = [*picture()]
        places = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in centre.reshape(-1, 2).tolist())
        inner.append(f'<path d="{places}" stroke="{GREY}" stroke-width="{min(6.0, 44 / n):.1f}" '
                     'stroke-linecap="round"/>')  # fmt: skip
        cell = mine[n // 2, n // 2]
        inner += [box(b, GREY, 2) for b in cell.tolist()]
        inner += truth()
        x, y = 40 + 340 * (i % 3), 44 + 350 * (i // 3)
        title = f"map {i + 1}: {n}x{n} cells x {a} priors = {n * n * a:,}"
        parts += panel(x, y, inner, title=title, clip=f"map{i}")
        sides = f"{3 * small} and {3 * (small * large) ** 0.5:.0f} px"
        parts.append(text(x, y + 318, f"squares of {sides}, "
                          f"ratios {', '.join(f'{r}:1, 1:{r}' for r in ratios)}"))  # fmt: skip
    parts.append(text(40, 738, f"{first:,} priors in all. Dots: centres of the cells; "
                      "grey rectangles: the priors of one cell; green: ground truth"))  # fmt: skip
    return page(1060, 752, parts)


MATCHED = (  # an easy box, a tiny one and a thin one
    ("ring", (30, 120, 160, 250)),
    ("star", (215, 92, 231, 108)),
    ("square", (50, 48, 230, 64)),
)


def matching() -> str:
    """Positives by the threshold alone, and with the bipartite step before it."""
    priors_xyxy, boxes = cxcywh_to_xyxy(make_priors(Config())), tensor(MATCHED)
    best, row = pairwise_iou(boxes, priors_xyxy).max(dim=0)
    threshold = torch.where(best >= 0.5, row, -1)
    matched = ops.match(priors_xyxy, boxes, torch.tensor([0, len(boxes)]))[0]
    parts = []
    for i, (title, rows) in enumerate(
        [
            ("by the threshold alone (IoU ≥ 0.5)", threshold),
            ("as in SSD: best pairs first", matched),
        ]
    ):
        counts = torch.bincount(rows[rows >= 0], minlength=len(boxes)).tolist()
        positives = (priors_xyxy[rows >= 0] * SIDE).tolist()
        inner = picture(MATCHED) + [box(b, ORANGE, 1.5, opacity=0.8) for b in positives]
        x = 20 + 340 * i
        parts += panel(x, 40, inner + truth(MATCHED), title=title, clip=f"match{i}")
        names = [f"{n} {count}" for n, count in zip(("ring", "star", "bar"), counts, strict=True)]
        parts.append(text(x, 360, f"positive priors: {', '.join(names)}"))
    return page(680, 376, parts)


def negatives() -> str:
    """Which negatives are mined, for made-up scores: higher near the objects, and with noise."""
    scene = SCENE[:2]
    priors_xyxy, boxes = cxcywh_to_xyxy(make_priors(Config())), tensor(scene)
    best = pairwise_iou(boxes, priors_xyxy).amax(dim=0)  # (P,)
    matched = ops.match(priors_xyxy, boxes, torch.tensor([0, len(boxes)]))[0]
    positive = matched >= 0
    noise = torch.rand(len(best), generator=torch.Generator().manual_seed(0))
    score = 0.02 + 2.5 * best**2 * noise + 0.15 * noise**8
    wanted = 3 * positive.sum()
    mined = hard_negatives(score[None], ~positive[None], wanted[None])[0]
    inner = picture(scene)
    inner += [box(b, BLUE, 1, opacity=0.5) for b in (priors_xyxy[mined] * SIDE).tolist()]
    inner += [box(b, ORANGE, 1.5) for b in (priors_xyxy[positive] * SIDE).tolist()]
    title = f"{int(positive.sum())} positives, {int(mined.sum())} hard negatives"
    parts = panel(20, 40, inner + truth(scene), title=title, clip="mined")

    left, top, width, height = 430, 40, 330, 260
    some = 8 * int(mined.sum())
    order = score[~positive].sort(descending=True).values[:some].tolist()
    parts.append(box((left, top, left + width, top + height), "#888", 1))
    parts.append(text(left, top - 9, f"the {some} hardest negatives, sorted", weight="bold"))
    cut, marks = int(mined.sum()), ticks(order[0])
    high = marks[-1]
    for mark in marks:
        y = top + height * (1 - mark / high)
        parts += [
            line([(left - 4, y), (left, y)], "#888", 1),
            text(left - 8, y + 4, f"{mark:g}", "end"),
        ]
    middle = top + height / 2
    name = text(left - 40, middle, "loss: -log p(background)", "middle")
    parts.append(f'<g transform="rotate(-90 {left - 40} {middle})">{name}</g>')
    for place in (0, cut, some):
        x = left + width * place / some
        parts.append(text(x, top + height + 16, f"{place}", "middle"))
    parts.append(text(left + width / 2, top + height + 32, "rank", "middle"))
    place = [(left + width * i / some, top + height * (1 - s / high)) for i, s in enumerate(order)]
    ground = top + height
    area = [(left, ground), *place[:cut], (place[cut - 1][0], ground)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in area)
    parts.append(f'<polygon points="{corners}" fill="{BLUE}" opacity="0.35"/>')
    parts.append(line(place, BLUE))
    parts.append(text(left + 100, ground - 150, f"the {cut} hardest are learnt,"))
    rest = len(score) - int(positive.sum()) - cut
    parts.append(text(left + 100, ground - 132, f"the other {rest:,} are left out"))
    parts.append(text(20, 360, "green: ground truth; orange: positive priors; blue: mined negatives"
                      " (the scores are invented for this picture)"))  # fmt: skip
    return page(790, 376, parts)


def map_sizes(backbone: str) -> dict[str, tuple[int, int]]:
    """{"stem": (channels, side), ...} of every part of a network of the ResNet family."""
    with torch.device("meta"):  # shapes alone
        model, seen = ScratchDet(Config(backbone=backbone)).eval(), {}

    def remember(name):
        return lambda _, __, out: seen.update({name: (out.shape[1], out.shape[2])})

    body = model.features
    body.stem.register_forward_hook(remember("root"))
    body.pool.register_forward_hook(remember("pool"))
    for kind, blocks in (("stage", body.stages), ("extra", body.extras)):
        for i, block in enumerate(blocks, 1):
            block.register_forward_hook(remember(f"{kind} {i}"))
    body(torch.empty(1, 3, SIDE, SIDE, device="meta"))
    return seen


def network() -> str:
    """Root-ResNet-34 from the image to the six maps, every map as large as it is."""
    rows = {"image": (3, SIDE), **map_sizes("root-resnet34")}
    parts, heads, x, base = [], [], 20, 190
    per_cell = priors_per_cell(Config())
    taps = list(rows)[-6:]
    for name, (channels, side) in rows.items():
        high = max(3.0, side * 0.36)
        deep = 3 + channels / 22  # its thickness
        tap = name in taps
        colour = ORANGE if tap else GREY
        skew = high * 0.32  # the map itself, seen from the side
        fill = "#fde3c4" if tap else "#e9e9e9"
        front = [
            (x, base),
            (x, base - high),
            (x + skew, base - 1.3 * high),
            (x + skew, base - 0.3 * high),
        ]
        roof = [(x, base - high), (x + deep, base - high), (x + deep + skew, base - 1.3 * high),
                (x + skew, base - 1.3 * high)]  # fmt: skip
        right = [(px + deep, py) for px, py in front]
        for face, shade in ((front, fill), (roof, "#ffffff"), (right, fill)):
            corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in face)
            parts.append(f'<polygon points="{corners}" fill="{shade}" stroke="{colour}"/>')
        parts.append(box((x, base - high, x + deep, base), colour, 1, fill="#ffffff"))
        wide = max(deep + skew, 60)
        parts.append(text(x, base + 18, name, weight="bold"))
        parts.append(text(x, base + 34, f"{side}x{side}"))
        parts.append(text(x, base + 50, f"{channels} ch."))
        if tap:
            heads.append((x, side, per_cell[taps.index(name)]))
        x += wide + 12
    parts += head_of(heads, base + 62)
    parts.append(text(20, 24, "Root-ResNet-34: height = side of the map, thickness = channels"))
    return page(x + 44, base + 240, parts)


def head_of(maps: list[tuple], top: float) -> list:
    """The head below the six maps (x, side, priors per cell): two convolutions on each."""
    parts, total = [], sum(side * side * a for _, side, a in maps)
    rows = (("boxes: 3x3 conv.", 4), ("classes: 3x3 conv.", 21))
    for r, (what, values) in enumerate(rows):
        y = top + 20 + 54 * r
        parts.append(text(maps[0][0] - 12, y + 22, what, "end", weight="bold"))
        for x, side, a in maps:
            if r == 0:
                parts.append(line([(x + 28, top - 4), (x + 28, y)], ORANGE, 1.2))
            else:
                way = [(x + 28, top + 8), (x + 62, top + 8), (x + 62, y + 19), (x + 56, y + 19)]
                parts.append(line(way, ORANGE, 1.2))
            parts.append(box((x, y, x + 56, y + 38), ORANGE, 1.2, fill="#ffffff"))
            parts.append(text(x + 28, y + 16, f"{side}x{side}", "middle"))
            parts.append(text(x + 28, y + 31, f"{a * values} ch.", "middle"))
    y = top + 142
    parts.append(text(maps[0][0] - 12, y, "priors", "end", weight="bold"))
    for x, side, a in maps:
        parts.append(text(x + 28, y, f"{side * side * a:,}", "middle"))
    left, last = maps[0][0], maps[-1][0]
    parts.append(line([(left, y + 8), (last + 56, y + 8)], ORANGE, 1.5))
    words = f"joined: {total:,} priors, each with 4 offsets and 21 scores (VOC: 20 and background)"
    parts.append(text(left, y + 26, words))
    return parts


def root() -> str:
    """A 20 px star as the first residual stage gets it, behind both kinds of stem."""
    canvas = Image.new("L", (SIDE * 4, SIDE * 4), 240)
    points = shapes.outline("star") * 80 + (560, 560)
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=70)
    image = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), float)  # (300, 300)
    parts, zoom, low, high = [], 7.0, 132, 168
    for i, (title, what, side) in enumerate(
        [
            ("a star of 20 pixels", "the image", SIDE),
            ("Root-ResNet", "no stride, one pooling", map_sizes("root-resnet18")["pool"][1]),
            ("ResNet-18", "stride 2, one pooling", map_sizes("resnet18")["pool"][1]),
        ]
    ):  # fmt: skip
        step = SIDE // side
        cells = image.reshape(side, step, side, step).mean(axis=(1, 3))  # (side, side)
        x = 20 + 280 * i
        parts.append(text(x, 24, f"{title}: {side}x{side}", weight="bold"))
        window = cells[low // step : high // step, low // step : high // step]
        wide = zoom * step
        parts.append(box((x, 34, x + len(window) * wide, 34 + len(window) * wide), "#fff", 0.5))
        for (r, c), value in np.ndenumerate(window.round().astype(int)):
            parts.append(f'<rect x="{x + c * wide:g}" y="{34 + r * wide:g}" width="{wide - 0.5:g}" '
                         f'height="{wide - 0.5:g}" fill="#{f"{value:02x}" * 3}"/>')  # fmt: skip
        object_xyxy = [(v - low) * zoom for v in (140, 140, 160, 160)]
        shifted = [v + (x, 34)[k % 2] for k, v in enumerate(object_xyxy)]
        parts.append(box(shifted, GREEN, 2.5))
        parts.append(text(x, 306, f"{what}: {20 / step:g} x {20 / step:g} cells"))
    return page(860, 320, parts)


def suppression() -> str:
    """Detections before and after ops.nms."""
    rng = np.random.default_rng(1)
    rows = []
    for label, (_, xyxy) in enumerate(SCENE):
        x0, y0, x1, y1 = xyxy
        for _ in range(6):
            moved = np.array(xyxy) + rng.normal(0, 0.07, 4) * (x1 - x0)
            pair = torch.tensor(np.stack([moved, xyxy]), dtype=torch.float32)
            score = 0.95 * pairwise_iou(pair[:1], pair[1:]).item() + rng.normal(0, 0.02)
            rows.append((*moved, min(0.99, score), label))
    table = torch.tensor(np.array(rows), dtype=torch.float32)  # (K, 6)
    keep = ops.nms(table[:, :4].contiguous(), table[:, 4].contiguous(), table[:, 5].long())
    parts = []
    for i, (title, some) in enumerate(
        [
            (f"before: {len(table)} candidates", table),
            (f"after: {int(keep.sum())} kept", table[keep]),
        ]
    ):
        inner = picture()
        for *xyxy, score, _ in some.tolist():
            inner.append(box(xyxy, ORANGE, 2, opacity=0.9))
            if i:
                inner.append(
                    box((xyxy[0], xyxy[1] - 16, xyxy[0] + 32, xyxy[1]), "none", fill=ORANGE)
                )
                inner.append(text(xyxy[0] + 3, xyxy[1] - 4, f"{score:.2f}"))
        parts += panel(20 + 340 * i, 40, inner, title=title, clip=f"nms{i}")
    parts.append(text(20, 360, "per class: the best score is kept, and all that overlap it with "
                      "IoU > 0.45 go; then the best of the rest ..."))  # fmt: skip
    return page(680, 376, parts)


def average_precision() -> str:
    """A precision-recall curve by metrics.average_precision, its envelope and the 11 points."""
    right = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0])  # or wrong, best score first
    objects = 9
    ap11, area, recall, precision = metrics.average_precision(right, 1 - right, objects)

    left, top, width, height = 60, 40, 420, 260

    def at(r, p):
        return left + width * r, top + height * (1 - p)

    parts = [box((left, top, left + width, top + height), "#888", 1)]
    for k in range(11):
        x, _ = at(k / 10, 0)
        parts.append(text(x, top + height + 18, f"{k / 10:g}", "middle"))
        if k % 2 == 0:
            parts.append(text(left - 8, at(0, k / 10)[1] + 4, f"{k / 10:g}", "end"))
    hits = np.cumsum(right)
    raw = [at(h / objects, h / n) for n, h in enumerate(hits, 1)]
    parts.append(line(raw, GREY, 1.5))
    envelope, before = [], 0.0
    for r, p in zip(recall, metrics.best_precision(recall, precision, recall), strict=True):
        envelope += [at(before, p), at(r, p)]
        before = r
    envelope += [at(before, 0), at(1, 0)]
    parts.append(line(envelope, ORANGE, 2.5))
    points = np.arange(0, 1.1, 0.1)
    for r, p in zip(points, metrics.best_precision(recall, precision, points), strict=True):
        parts.append(dot(*at(r, p), GREEN, 5))
    parts.append(text(left + width / 2, top + height + 38, "recall: found / objects", "middle"))
    parts.append(text(left, top - 12, "precision: found / detections so far", weight="bold"))
    x = left + width + 30
    parts += [line([(x, 74), (x + 26, 74)], GREY, 1.5), text(x + 36, 78, "detection by detection")]
    parts += [line([(x, 104), (x + 26, 104)], ORANGE, 2.5)]
    parts += [text(x + 36, 108, "best precision at this recall or more")]
    parts += [text(x + 36, 126, f"its area: AP {area:.3f}")]
    parts += [dot(x + 13, 152, GREEN, 5), text(x + 36, 156, "the 11 points of VOC2007")]
    parts += [text(x + 36, 174, f"their mean: AP {ap11:.3f}")]
    return page(780, 360, parts)


def detections(run: str, side: int = 360, min_score: float = 0.5) -> Image.Image:
    """What a run on shapes detects in the first six square test pictures of 3 to 6 shapes."""
    parser = argparse.ArgumentParser()
    sources.add_eval_flags(parser)
    path = errors.checkpoint_of(run)
    model, checkpoint = load_detector(path)
    where, sets, _ = sources.from_run(parser.parse_args([]), checkpoint["args"])
    records = sources.open_data(where, sets, model.config.classes)[0]
    square = [record for record in records if record.size[0] == record.size[1]]
    records = [record for record in square if 3 <= len(record.labels) <= 6][:6]
    found, gap = evaluation.run_detector(model, records, what=None), 6
    sheet = Image.new("RGB", (3 * side + 2 * gap, 2 * side + gap), "white")
    for n, (record, one) in enumerate(zip(records, found, strict=True)):
        image = decode_pixels(open_record(record), record)
        scale = side / max(image.size)
        image = image.resize([round(v * scale) for v in image.size], Image.Resampling.LANCZOS)
        pen, font = ImageDraw.Draw(image), letters(side // 19)
        order = np.argsort(one.scores)  # the best comes on top
        order = order[one.scores[order] >= min_score]
        for box_xyxy in (one.boxes_xyxy[order] * scale).tolist():
            pen.rectangle(box_xyxy, outline=ORANGE, width=3)
        for i in order:
            x0, y0, _, _ = (one.boxes_xyxy[i] * scale).tolist()
            words = f"{model.config.classes[one.labels[i] - 1]} {one.scores[i]:.2f}"
            x = min(x0, image.width - pen.textlength(words, font=font) - 6)
            y = y0 - side // 16 if y0 > side // 16 else y0
            left, top, right, bottom = pen.textbbox((x + 3, y), words, font=font)
            pen.rectangle((left - 3, top - 3, right + 3, bottom + 3), ORANGE)
            pen.text((x + 3, y), words, fill="black", font=font)
        sheet.paste(image, ((n % 3) * (side + gap), (n // 3) * (side + gap)))
    return sheet


FIGURES = {
    "iou": iou,
    "augmentation": augmentation,
    "network": network,
    "priors": priors,
    "matching": matching,
    "negatives": negatives,
    "root": root,
    "nms": suppression,
    "ap": average_precision,
}
