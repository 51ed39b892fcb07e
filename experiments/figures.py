"""Curves and dots as SVG, by hand: no plotting package is needed to read a run's log."""

import json
import math
from html import escape

COLOURS = ("#1f5fbf", "#c23b22", "#2e8b57", "#b8860b", "#7b3fa0", "#444444")
POINTS = 240  # of a drawn curve


def read_log(folder, what="loss"):
    """The rows of log.jsonl that are training steps, or measurements on the way (what="mAP")."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = (line for line in lines if line.endswith("\n"))  # the last may be half written
    return [row for row in map(json.loads, whole) if what in row]


def fluctuation(norms):
    """|g(t) - g(t-1)| of the gradient's norm: one value less than there are steps."""
    return [abs(b - a) for a, b in zip(norms, norms[1:], strict=False)]


def moving_average(values, window):
    """Mean of the last `window` values, fewer at the start. [1, 3, 5], 2 -> [1, 2, 4]."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def gradients(logs):
    """Figure 1. {name: rows of read_log} -> SVG: loss, gradient's norm and its fluctuation."""
    panels = {"training loss": {}, "L2 norm of the gradient": {}, "its fluctuation, smoothed": {}}
    loss, norm, jitter = panels.values()
    for name, log in logs.items():
        steps, norms = [row["step"] for row in log], [row["grad_norm"] for row in log]
        window = max(1, len(log) // 50)
        loss[name] = list(zip(steps, moving_average([r["loss"] for r in log], window), strict=True))
        norm[name] = list(zip(steps, moving_average(norms, window), strict=True))
        smooth = moving_average(fluctuation(norms), window)
        jitter[name] = list(zip(steps[1:], smooth, strict=True))
    return curves(panels)


def curves(panels, width=330, height=240):
    """{title: {name: [(x, y)]}} -> SVG, panels side by side, one legend below. y starts at 0."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    parts = []
    for i, (title, lines) in enumerate(panels.items()):
        left, top, w, h = i * width + 46, 28, width - 62, height - 62
        points = [p for line in lines.values() for p in line]
        x_max = max((x for x, _ in points), default=1) or 1
        tall = sorted(y for _, y in points)  # single peaks may leave the frame
        y_max = axis_end(tall[math.ceil(0.995 * (len(tall) - 1))] if tall else 0.0)
        parts.append(f'<clipPath id="frame{i}"><rect x="{left}" y="{top}" width="{w}" '
                     f'height="{h}"/></clipPath>')  # fmt: skip
        parts.append(f'<rect x="{left}" y="{top}" width="{w}" height="{h}" class="frame"/>')
        parts.append(text(left + w / 2, top - 10, title, "middle"))
        for k in range(5):
            y = top + h - h * k / 4
            parts.append(text(left - 6, y + 4, f"{y_max * k / 4:.3g}", "end"))
            if 0 < k < 4:
                parts.append(f'<path d="M{left} {y:.1f}h{w}" class="grid"/>')
        parts.append(text(left, top + h + 16, "0", "middle"))
        parts.append(text(left + w, top + h + 16, f"{round(x_max, 1):,g}", "end"))
        for name, line in lines.items():
            some = line[:: max(1, len(line) // POINTS)] + line[-1:]
            places = [(left + w * x / x_max, top + h - h * y / y_max) for x, y in some]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" stroke="{colour[name]}" fill="none" '
                         f'stroke-width="1.5" clip-path="url(#frame{i})"/>')  # fmt: skip
            for x, y in places[: len(line)] if len(line) < 20 else ():  # few enough to tell apart
                circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour[name]}"/>'
                parts.append(circle)
    for i, name in enumerate(names):
        y = height + 4 + 18 * i
        parts.append(f'<path d="M46 {y}h24" stroke="{colour[name]}" stroke-width="3"/>')
        parts.append(text(78, y + 4, name))
    return page(len(panels) * width, height + 18 * len(names) + 8, parts)


def dots(rows, title, unit="mAP in %"):
    """[(name, [a number a seed], remark)] -> SVG, a row each: a dot a seed, a bar to the mean."""
    left, width, step = 330, 420, 22
    x_max = axis_end(max((n for _, numbers, _ in rows for n in numbers), default=1.0))
    parts = [text(10, 18, f"{title}; {unit}", weight="bold")]
    bottom = 34 + step * len(rows)
    for k in range(5):
        x = left + width * k / 4
        parts.append(f'<path d="M{x:.1f} 30V{bottom}" class="grid"/>')
        parts.append(text(x, bottom + 16, f"{x_max * k / 4:.3g}", "middle"))
    for i, (name, numbers, remark) in enumerate(rows):
        y = 44 + step * i
        parts.append(text(left - 10, y + 4, name, "end"))
        longest = left + width * max(numbers, default=0) / x_max
        parts += [text(longest + 8, y + 4, remark)] if remark else []
        if not numbers:
            continue
        mean = left + width * sum(numbers) / len(numbers) / x_max
        parts.append(f'<path d="M{left} {y}H{mean:.1f}" stroke="#9db7d9" stroke-width="10"/>')
        for number in numbers:
            x = left + width * number / x_max
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="3.5" fill="{COLOURS[0]}"/>')
    return page(left + width + 30, bottom + 28, parts)


def axis_end(largest):
    """A little above the largest value; its quarters are round numbers."""
    quarter = 1.05 * largest / 4 if largest > 0 else 0.25
    power = 10 ** math.floor(math.log10(quarter))
    return 4 * next(power * s for s in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * s >= quarter)


def text(x, y, words, anchor="start", weight="normal"):
    """One line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def page(width, height, parts):
    """The SVG file, on white: it is read on dark pages, too."""
    style = (
        "text{font-size:12px;font-family:sans-serif;fill:#222}"
        ".frame{fill:none;stroke:#888}.grid{stroke:#ddd}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    )
    return "\n".join([head, f"<style>{style}</style>", '<rect width="100%" height="100%" '
                      'fill="#fff"/>', *parts, "</svg>", ""])  # fmt: skip
