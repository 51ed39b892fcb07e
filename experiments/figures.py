"""Curves and dots as SVG, by hand: no plotting package is needed to read a run's log."""

import json
import math
import statistics
from html import escape

COLOURS = ("#1f5fbf", "#c23b22", "#2e8b57", "#b8860b", "#7b3fa0", "#444444")
POINTS = 300  # of a drawn curve


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
    panels = {
        "training loss": {},
        "L2 norm of the gradient": {},
        "its change from step to step": {},
    }
    loss, norm, jitter = panels.values()
    for name, log in logs.items():
        steps, norms = [row["step"] for row in log], [row["grad_norm"] for row in log]
        window = max(1, len(log) // 50)
        loss[name] = list(zip(steps, moving_average([r["loss"] for r in log], window), strict=True))
        norm[name] = list(zip(steps, moving_average(norms, window), strict=True))
        smooth = moving_average(fluctuation(norms), window)
        jitter[name] = list(zip(steps[1:], smooth, strict=True))
    return curves(panels, x_name="step", log=True)


# ------------------------------------------------------------------------------ one chart


def ticks(high):
    """Round numbers from 0 to at least `high`, three to six of them."""
    unit = 10.0 ** math.floor(math.log10(high))
    step = next(s * unit for s in (0.2, 0.25, 0.5, 1.0, 2.0) if high / (s * unit) <= 5)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten around low to high; the powers alone if that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    all_of_them = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    first = max((i for i, t in enumerate(all_of_them) if t <= low), default=0)
    last = next((i for i, t in enumerate(all_of_them) if t >= high), len(all_of_them) - 1)
    marks = all_of_them[first : last + 1]
    marks = marks if len(marks) <= 7 else [10.0**p for p in powers]
    return marks if len(marks) > 1 else [marks[0], 10 * marks[0]]


def top_of(lines):
    """How high an axis must reach: to all but single peaks, and not to a run that diverges, which
    may leave the frame at twice the lower half of the runs."""
    tops = []
    for line in lines:
        values = sorted(y for _, y in line)
        tops.append(values[math.ceil(0.995 * (len(values) - 1))])
    return min(max(tops), 2 * statistics.median_low(tops)) or 1.0 if tops else 1.0


def whole(lines):
    """How high an axis must reach to show every point, of curves that cannot diverge."""
    return ticks(max((y for line in lines for _, y in line), default=0.0) or 1.0)[-1]


def chart(
    lines, key, x0=0, y0=0, width=360, height=230, *, x_max=None, y_max=None, x_name="", log=False
):
    """One panel at (x0, y0): {number: [(x, y)]} -> SVG elements. Line n has the class `run<n>`,
    which the style of the page or of the file gives a colour. `key`: a name of the panel's own.
    """
    left, top, w, h = x0 + 52, y0 + 12, width - 66, height - 50
    points = [p for line in lines.values() for p in line]
    x_high = x_max or max((x for x, _ in points), default=0) or 1.0
    if log:
        positive = sorted(y for _, y in points if y > 0) or [1.0]
        marks = log_ticks(positive[0], positive[math.ceil(0.995 * (len(positive) - 1))])
    else:
        marks = ticks(y_max or top_of(lines.values()))
    high = math.log(marks[-1] / marks[0]) if log else y_max or marks[-1]

    def place(x, y):
        share = (math.log(max(y, 1e-9) / marks[0]) if log else y) / high
        return left + w * x / x_high, top + h - h * share

    def label(x, y, anchor, words):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    frame = f'<rect x="{left}" y="{top}" width="{w}" height="{h}"'
    parts = [f'<clipPath id="{key}">{frame}/></clipPath>']
    for y in marks:
        at = place(0, y)[1]
        if at > top - 1:
            parts.append(f'<path class="grid" d="M{left} {at:.1f}h{w}" fill="none"/>')
            parts.append(label(left - 6, at + 4, "end", f"{y:,g}"))
    for x in ticks(x_high):
        if x <= x_high * 1.01:
            at = min(place(x, marks[0])[0], x0 + width - 3.5 * len(f"{x:,g}"))  # all of it inside
            parts.append(label(at, top + h + 16, "middle", f"{x:,g}"))
    parts.append(label(left + w / 2, y0 + height - 4, "middle", x_name))
    for number, line in lines.items():
        some = [place(*p) for p in line[:: max(1, len(line) // POINTS)] + line[-1:]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in some)
        parts.append(f'<polyline class="line run{number}" points="{path}" fill="none" '
                     f'clip-path="url(#{key})"/>')  # fmt: skip
        for x, y in some[: len(line)] if len(line) < 20 else ():  # few enough to tell apart
            parts.append(f'<circle class="run{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return parts


def curves(panels, width=330, height=250, **axes):
    """{title: {name: [(x, y)]}} -> SVG file: panels side by side, one legend below."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} lines: a figure has colours for {len(COLOURS)}")
    parts = []
    for i, (title, lines) in enumerate(panels.items()):
        numbered = {names.index(name): line for name, line in lines.items()}
        parts.append(text(i * width + 52, 18, title, weight="bold"))
        parts += chart(numbered, f"frame{i}", i * width, 20, width, height, **axes)
    for i, name in enumerate(names):
        y = height + 36 + 18 * i
        parts.append(f'<path class="line run{i}" d="M52 {y}h24" fill="none"/>')
        parts.append(text(84, y + 4, name))
    return page(len(panels) * width, height + 18 * len(names) + 36, parts)


def dots(rows, title, unit="mAP in %"):
    """[(name, [a number a seed], remark)] -> SVG, a row each: a dot a seed, a bar to the mean."""
    left, width, step = 330, 420, 22
    marks = ticks(1.05 * max((n for _, numbers, _ in rows for n in numbers), default=1.0) or 1.0)
    x_max = marks[-1]
    parts = [text(10, 18, f"{title}; {unit}", weight="bold")]
    bottom = 34 + step * len(rows)
    for mark in marks:
        x = left + width * mark / x_max
        parts.append(f'<path d="M{x:.1f} 30V{bottom}" class="grid"/>')
        parts.append(text(x, bottom + 16, f"{mark:.3g}", "middle"))
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
        ".grid{stroke:#ddd}.line{stroke-width:1.6;stroke-linejoin:round}"
        + "".join(f".line.run{i}{{stroke:{c}}}circle.run{i}{{fill:{c}}}"
                  for i, c in enumerate(COLOURS))
    )  # fmt: skip
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    )
    return "\n".join([head, f"<style>{style}</style>", '<rect width="100%" height="100%" '
                      'fill="#fff"/>', *parts, "</svg>", ""])  # fmt: skip
