"""Run folders of train.py -> one HTML page with all that is known; and the course's figures.

    python -m experiments.report RUN [RUN ...] --out report.html       several runs: overlaid
    python -m experiments.report --figures [RUN ...]                   docs/figures/*.svg
    python -m experiments.report --budget budget.svg RUN [RUN ...]     mAP against their cost

The page is one file without a script: it opens from the disk, offline, for ever. Curves, colours
for light and dark, and the switches that hide a run are SVG and CSS. train.py calls `write` at its
end: OUT/report.html.

A run folder holds log.jsonl and run.json and, when it has ended, results.json and detections/.
With errors.json (python -m experiments.errors RUN) the page shows what the detector gets wrong.
"""

import argparse
import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from experiments import figures
from plumbing.program import run_program

ROOT = Path(__file__).parents[1]
LIGHT = ("#1f5fbf", "#c23b22", "#2e8b57", "#9a6b00", "#7b3fa0", "#555555")
DARK = ("#7fb0ff", "#ff8f78", "#74d3a0", "#e8b84a", "#cf9df0", "#bbbbbb")
PICTURE = 1200  # width in pixels that a sheet of detections is shrunk to
WHOLE = ("mAP", "learning rate", "images/s, since the start")  # curves of which none diverges
SHOWN = ("backbone", "bn", "width", "lr", "batch_size", "iterations", "recipe", "data", "seed")
WHERE = ("commit", "torch", "machine")


class Run(NamedTuple):
    name: str
    about: dict  # run.json
    log: list[dict]  # one row a step
    measured: list[dict]  # mAP on the way (--eval-every) and at the end
    results: dict | None  # results.json, once the run has ended
    sheet: Path | None  # the last picture of detections
    errors: dict | None  # errors.json


def read_run(folder: str | Path) -> Run:
    """What is in a run's folder. ValueError where it is none, naming what is missing."""
    folder = Path(folder)
    if not (folder / "log.jsonl").is_file() or not (folder / "run.json").is_file():
        raise ValueError(
            f"{folder}: no log.jsonl and run.json there. Expected the folder of a run, such as "
            "runs/shapes; `python train.py` writes one"
        )
    try:
        about = json.loads((folder / "run.json").read_text())
        log = figures.read_log(folder)
        results = folder / "results.json"
        results = json.loads(results.read_text()) if results.is_file() else None
        errors = folder / "errors.json"
        errors = json.loads(errors.read_text()) if errors.is_file() else None
    except ValueError as e:
        raise ValueError(f"{folder}: a file of the run is damaged ({e})") from None
    if not log:
        raise ValueError(f"{folder}/log.jsonl: no step yet; wait for the first one")
    measured = figures.read_log(folder, "mAP")
    measured += [results | {"step": log[-1]["step"]}] if results else []
    sheets = sorted((folder / "detections").glob("[0-9]" * 7 + ".png"))  # of steps, no others
    name = folder.resolve().name
    return Run(name, about, log, measured, results, sheets[-1] if sheets else None, errors)


# ------------------------------------------------------------------------------ curves


def series(run: Run) -> dict[str, list[tuple[float, float]]]:
    """The curves of one run: {title: [(step, value)]}, smoothed as the page says."""
    steps, window = [row["step"] + 1 for row in run.log], smoothing(run)

    def column(key):
        return [row[key] for row in run.log]

    def smooth(values):
        """The moving average; a value that is not finite is left out, as are those it spoils."""
        usable = [(s, v) for s, v in zip(steps[len(steps) - len(values) :], values, strict=True)
                  if math.isfinite(v)]  # fmt: skip
        means = figures.moving_average([v for _, v in usable], window)
        return [(s, m) for (s, _), m in zip(usable, means, strict=True)]

    norms = column("grad_norm")
    curves = {
        "training loss": smooth(column("loss")),
        "of it: offsets": smooth(column("loc")),
        "of it: classes": smooth(column("conf")),
        "gradient norm (L2)": smooth(norms),
        "fluctuation of the gradient norm": smooth(figures.fluctuation(norms)),
        "learning rate": list(zip(steps, column("lr"), strict=True)),
        "positive priors per image": smooth(column("positives")),
        "images/s, since the start": list(zip(steps, column("images_per_s"), strict=True)),
    }
    if len(run.measured) > bool(run.results):  # --eval-every
        curves["mAP"] = [(row["step"] + 1, row["mAP"] or 0.0) for row in run.measured]
    if not any(norms):  # --no-log-gradients
        curves = {title: points for title, points in curves.items() if "gradient" not in title}
    return curves


def smoothing(run: Run) -> int:
    return max(1, len(run.log) // 50)


def chart(title: str, lines: dict[int, list], *, width=360, height=230, **axes) -> str:
    """One panel of figures.chart as an SVG of the page; lines by the number of their run."""
    key = "".join(c if c.isalnum() else "-" for c in title)
    parts = figures.chart(lines, key, width=width, height=height, **axes)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return "".join([head, *parts, "</svg>"])


# ------------------------------------------------------------------------------ the page


def shown(x, digits=4) -> str:
    """A cell of a table."""
    if x is None:
        return "–"
    if not isinstance(x, float):
        return escape(str(x))
    return f"{x:.{digits}f}" if math.isfinite(x) else "not finite"


def plain(x) -> str:
    """An argument or a number of the log: 0.05, not 0.0500."""
    if isinstance(x, float):
        return f"{x:.4g}" if math.isfinite(x) else "not finite"
    return escape(str(x))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already; the first of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return (f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip


def names(runs: list[Run]) -> list[str]:
    """The runs' names as HTML, each with a square of its colour."""
    return [f'<i class="key run{i}"></i>{escape(run.name)}' for i, run in enumerate(runs)]


METRICS = {"voc07": "11-point, VOC2007", "voc": "area", "coco": "COCO"}


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}"


def lead(runs: list[Run], *, compared: bool = False) -> str:
    """What a reader wants first: mAP in large digits, and a sentence on each run."""
    parts = []
    for i, run in enumerate(runs):
        name = f'<i class="key run{i}"></i>{escape(run.name)}' if len(runs) > 1 else ""
        number = f"mAP {percent(run.results['mAP'])} %" if run.results else "not measured yet"
        parts.append(f'<div class="of run{i}"><p class="big">{number}<small> {name}</small></p>'
                     f"<p>{escape(sentence(run))}</p></div>")  # fmt: skip
    if len(runs) > 1 and not compared:
        parts.append("<p>How sure the difference is, and what changed: <code>python -m "
                     "experiments.compare RUN RUN --out page.html</code>.</p>")  # fmt: skip
    return "".join(parts)


def sentence(run: Run) -> str:
    """The results in words."""
    if not run.results:
        step, last = run.log[-1]["step"] + 1, run.about["args"]["iterations"]
        return f"The run has not ended: step {step:,} of {last:,}, loss {run.log[-1]['loss']:.3g}."
    r, errors = run.results, run.errors
    words = f"{METRICS.get(r['metric'], r['metric'])} mAP"
    if "objects" in r:
        words += f" on {r['images']:,} images with {r['objects']:,} objects"
    words += "."
    if errors:
        cost = {name: row["cost"] for name, row in errors["kinds"].items()}
        most = max(cost, key=cost.get)
        words += (
            f" At each class's best threshold it finds {errors['found']:,} of {errors['objects']:,}"
            f" objects, and {errors['right']:,} of the {errors['shown']:,} detections that it shows"
            f" are right. {ERRORS[most][0]} cost most: {cost[most]:.1f} points of AP50."
        )
    key = class_key(r)
    ranked = sorted((v[key], name) for name, v in r["per_class"].items() if v[key] is not None)
    if len(ranked) > 1:
        words += (f" Best class: {ranked[-1][1]} ({percent(ranked[-1][0])} %), weakest: "
                  f"{ranked[0][1]} ({percent(ranked[0][0])} %).")  # fmt: skip
    return words


def class_key(result: dict) -> str:
    """The name of the AP per class that the run's metric averages."""
    by_metric = {"voc07": "ap_11point", "voc": "ap_area", "coco": "ap_coco"}
    return by_metric.get(result["metric"], "ap_area")


def overview(runs: list[Run]) -> str:
    """One column per run: what it was, what it reached."""
    columns = []
    for run in runs:
        args, result = run.about["args"], run.results or {}
        ended = "yes" if run.results else f"no, at step {run.log[-1]['step'] + 1}"
        columns.append([shown(result.get("mAP")), shown(result.get("metric")), ended,
                        shown(run.log[-1]["loss"], 3), *(plain(args.get(key)) for key in SHOWN),
                        *(shown(run.about.get(key)) for key in WHERE)])  # fmt: skip
    head = ["mAP", "metric", "ended", "last loss", *SHOWN, *WHERE]
    rows = [[name.replace("_", " "), *cells] for name, *cells in zip(head, *columns, strict=True)]
    return table(["run", *names(runs)], rows)


def training(runs: list[Run]) -> str:
    """The curves over the steps, all runs overlaid, and some of their numbers as a table."""
    curves = [series(run) for run in runs]
    titles = list(dict.fromkeys(title for some in curves for title in some))
    parts = ['<div class="panels">']
    for title in titles:
        lines = {i: some[title] for i, some in enumerate(curves) if some.get(title)}
        top = figures.whole(lines.values()) if title in WHOLE else None
        caption, panel = escape(title), chart(title, lines, y_max=top, x_name="step")
        parts.append(f"<figure>{panel}<figcaption>{caption}</figcaption></figure>")
    parts.append("</div>")
    windows = ", ".join(f"{escape(r.name)} {smoothing(r)}" for r in runs)
    parts.append(
        "<p>The fluctuation is |g<sub>t</sub> − g<sub>t−1</sub>|, the change of the gradient's L2 "
        "norm from one step to the next. This definition is ours: the paper's Figure 1 (c) gives "
        "none. Loss, norm, fluctuation and positives are moving averages over the last steps "
        f"({windows}). A curve that diverges leaves its frame.</p>"
    )
    rows = []
    for i, run in enumerate(runs):
        for tenth in range(0, 11, 2):
            row = run.log[min(len(run.log) - 1, tenth * len(run.log) // 10)]
            keys = ("loss", "loc", "conf", "grad_norm", "lr", "positives", "images_per_s")
            rows.append([names(runs)[i], f"{row['step'] + 1:,}", *(plain(row[k]) for k in keys)])
    head = ["run", "step", "loss", "offsets", "classes", "gradient norm", "learning rate",
            "positives", "images/s"]  # fmt: skip
    return "".join([*parts, "<details><summary>The numbers, six steps per run</summary>",
                    table(head, rows), "</details>"])  # fmt: skip


def bars(values: dict[int, float | None], whole: float = 1.0, digits: int = 3) -> str:
    """A bar per run, as long as its share of `whole`."""
    return "".join(
        f'<div class="bar run{i}"><i style="width:{100 * (v or 0) / whole:.1f}%"></i>'
        f"<span>{shown(v, digits)}</span></div>"
        for i, v in values.items()
    )


def results(runs: list[Run]) -> str:
    """AP per class as bars, AP by size, precision-recall curves."""
    done = {i: run.results for i, run in enumerate(runs) if run.results}
    if not done:
        return "<p>No results.json: the run has not ended, so nothing has been measured.</p>"
    first = next(iter(done.values()))
    key = class_key(first)
    kind = {"ap_coco": "COCO AP", "ap_11point": "11-point AP, VOC2007", "ap_area": "area AP"}[key]
    classes = list(dict.fromkeys(c for r in done.values() for c in r["per_class"]))

    def mean(r: dict) -> float | None:
        """Of the metric that heads the column, which need not be the run's own."""
        if key == "ap_coco":
            return r.get("coco", {}).get("AP")
        return r[key.replace("ap", "mAP")]

    rows = [["<b>mean</b>", bars({i: mean(r) for i, r in done.items()})]]
    for name in classes:
        values = {i: r["per_class"].get(name, {}).get(key) for i, r in done.items()}
        rows.append([escape(name), bars(values)])
    parts = [
        "<h3>AP of each class</h3>",
        table(["class", kind], rows).replace("<td>", '<td class="bars">'),
    ]
    sizes = [[escape(size), bars({i: r["by_size"][size]["mAP_area"] for i, r in done.items()})]
             for size in first.get("by_size", {})]  # fmt: skip
    parts.append("<h3>AP by size of the object</h3>")
    parts.append(
        table(["size", "area AP, mean of the classes"], sizes).replace("<td>", '<td class="bars">')
    )
    f1 = {i: run.errors["f1"] for i, run in enumerate(runs) if run.errors}
    if f1:
        lines = {i: [(t / 100, y) for t, y in enumerate(line)] for i, line in f1.items()}
        panel = chart("F1", lines, x_max=1.0, y_max=1.0, x_name="score threshold")
        parts.append("<h3>F1 over the score threshold, mean of the classes</h3>"
            f'<div class="panels"><figure>{panel}</figure></div><p>F1 is the harmonic mean of '
            "precision and recall. Where it is best, few objects are missed and little that is "
            "shown is wrong: the threshold that detect.py uses.</p>")  # fmt: skip
    panels = []
    for name in classes:
        lines = {}
        for i, r in done.items():
            recall, precision = r["curves"].get(name, ([], []))
            if recall:
                lines[i] = [(0.0, precision[0]), *zip(recall, precision, strict=True)]
        small = chart(f"curve {name}", lines, width=220, height=190, x_max=1.0, y_max=1.0,
                      x_name="recall")  # fmt: skip
        panels.append(f"<figure>{small}<figcaption>{escape(name)}</figcaption></figure>")
    few = " open" if len(classes) <= 20 else ""
    parts.append(f'<details{few}><summary>Precision over recall, class by class</summary>'
                 f'<div class="panels small">{"".join(panels)}</div></details>')  # fmt: skip
    return "".join(parts)


def pictures(runs: list[Run]) -> str:
    """The last sheet of detections of each run, inside the page."""
    parts = []
    for i, run in enumerate(runs):
        if run.sheet is None:
            continue
        words = f"{run.name}, step {int(run.sheet.stem):,}: ground truth green, detections orange"
        parts.append(f'<figure class="of run{i}"><img alt="{escape(words)}" src="data:image/jpeg;'
                     f'base64,{base64.b64encode(shrunk(run.sheet)).decode()}">'
                     f"<figcaption>{escape(words)}</figcaption></figure>")  # fmt: skip
    return "".join(parts) or "<p>No sheet of detections in the run's folder yet.</p>"


def shrunk(path: Path, width: int = PICTURE) -> bytes:
    """A picture as a JPEG of at most that width."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((width, 4 * width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def arguments(runs: list[Run]) -> str:
    """All arguments side by side, those that differ first."""
    everything = [run.about["args"] | {f"config.{k}": v for k, v in run.about["config"].items()}
                  for run in runs]  # fmt: skip
    keys = list(dict.fromkeys(k for some in everything for k in some))

    def differs(key):
        return len({json.dumps(some.get(key)) for some in everything}) > 1

    rows = []
    for key in sorted(keys, key=lambda k: not differs(k)):  # stable: else in their order
        cells = [escape(json.dumps(some.get(key))) for some in everything]
        mark = f"<mark>{escape(key)}</mark>" if differs(key) else escape(key)
        rows.append([mark, *(f"<code>{cell}</code>" for cell in cells)])
    return ("<details><summary>All arguments and the network's Config (marked: what differs)"
            f"</summary>{table(['argument', *names(runs)], rows)}</details>")  # fmt: skip


ERRORS = {  # of experiments/errors.py: plural, what it is
    "classification": ("Wrong classes", "IoU of .5 or more with an object of another class"),
    "localisation": ("Wrong boxes", "IoU of .1 to .5 with an object of its class"),
    "both": ("Wrong classes and boxes", "overlaps an object of another class somewhat"),
    "duplicate": ("Duplicates", "a better detection has found the same object"),
    "background": ("Detections of nothing", "IoU of .1 or less with every object"),
    "missed": ("Missed objects", "no detection finds it; shown: none of those shown"),
}


def gallery(rows: list[dict]) -> str:
    """Crops with what is shown (orange) and what is there (green); rows of errors.picture."""
    figures = []
    for row in rows:
        words = f'<b class="said">{escape(row["said"])}</b>'
        if row["there"]:
            words += f' <b class="there">{escape(row["there"])}</b>'
        words += f"<br>{escape(row['words'])}" if row["words"] else ""
        figures.append(
            f'<figure><img loading="lazy" alt="{escape(row["said"])}, {escape(row["image"])}" '
            f'src="data:image/jpeg;base64,{row["jpeg"]}">'
            f"<figcaption>{words}<br>{escape(row['image'])}</figcaption></figure>"
        )
    return f'<div class="panels crops">{"".join(figures)}</div>'


def errors(runs: list[Run]) -> str:
    """What each kind of error costs, the worst of each as pictures, the confusion matrix."""
    known = {i: run.errors for i, run in enumerate(runs) if run.errors}
    if not known:
        return ("<p>Not looked at yet: <code>python -m experiments.errors RUN</code> says what "
                "kinds of error there are, what each costs, and shows the worst.</p>")  # fmt: skip
    most = max(row["cost"] for e in known.values() for row in e["kinds"].values()) or 1.0
    rows = []
    for name, (words, what) in ERRORS.items():
        costs = {i: e["kinds"][name]["cost"] for i, e in known.items()}
        counts = ", ".join(f"{e['kinds'][name]['shown']:,}" for e in known.values())
        rows.append([f"{words}<br><small>{what}</small>", bars(costs, most, 1), counts])
    parts = [
        table(["error", "cost in points of AP50", "shown"], rows).replace(
            "</th><td>", '</th><td class="bars">'
        ),
        "<p>Cost: what AP50 would gain if all errors of the kind were mended (TIDE, Bolya et al. "
        "2020). Shown: how many there are from each class's best threshold up.</p>",
    ]
    for i, e in known.items():
        inner = "".join(
            f"<h4>{ERRORS[name][0]}</h4>{gallery(some)}"
            for name, some in e["pictures"].items() if some
        )  # fmt: skip
        parts.append(
            f'<details class="of run{i}"{" open" * (len(known) == 1)}><summary>The worst of each '
            f'kind: {names(runs)[i]}</summary><p>Detections <b class="said">orange</b>, ground '
            f'truth <b class="there">green</b>.</p>{inner}</details>'
            f'<details class="of run{i}"><summary>What is taken for what: {names(runs)[i]}'
            f"</summary>{matrix(e)}</details>"
        )
    return "".join(parts)


def matrix(errors: dict, largest: int = 24) -> str:
    """The confusion matrix; of many classes only the pairs that are most often confused."""
    counts, labels = errors["confusion"], [*errors["classes"], "background"]
    if len(labels) > largest:
        pairs = [(n, labels[r], labels[c]) for r, row in enumerate(counts)
                 for c, n in enumerate(row) if n and r != c and c < len(row) - 1]  # fmt: skip
        pairs.sort(key=lambda pair: -pair[0])
        rows = [[escape(there), escape(said), f"{n:,}"] for n, there, said in pairs[:largest]]
        return table(["what is there", "is shown as", "times"], rows)
    rows = []
    for r, row in enumerate(counts):
        total = sum(row) or 1
        cells = [
            f'<div class="cell{" good" * (r == c)}" style="--share:{100 * n / total:.0f}%">'
            f"{n if n else '·'}</div>"
            for c, n in enumerate(row)
        ]
        rows.append([escape(labels[r]), *cells])
    rows[-1][-1] = ""
    head = ["there \\ shown as", *map(escape, labels[:-1]), "nothing"]
    return table(head, rows) + (
        "<p>Rows: what is there; columns: what is shown of it. The last row has detections that "
        "belong to no object.</p>"
    )


STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--soft:#5a5a5a;--paper:#fff;--rule:#d9d9d9;
--band:#f4f4f4;--said:#b35900;--there:#00752c}
LIGHT
@media (prefers-color-scheme:dark){
:root{--ink:#ececec;--soft:#b0b0b0;--paper:#16181b;--rule:#3b3f44;--band:#22262a;--said:#ffa64d;--there:#5fd68a}
DARK}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper)}
h1{font-size:1.6rem;margin:.2rem 0}h2{margin:2rem 0 .5rem;scroll-margin-top:3rem;
border-bottom:1px solid var(--rule)}
a{color:inherit}nav{display:flex;flex-wrap:wrap;gap:0 1rem}
:focus-visible{outline:3px solid #f58200;outline-offset:2px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
.big{font-size:2.2rem;margin:.5rem 0 0;font-variant-numeric:tabular-nums}
.big small{font-size:1rem;color:var(--soft)}
.crops{grid-template-columns:repeat(6,minmax(0,1fr))}
@media screen and (max-width:40rem){.crops{grid-template-columns:repeat(3,minmax(0,1fr))}}
.crops img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--band)}
.said{color:var(--said)}.there{color:var(--there)}h4{margin:1rem 0 .3rem}
td:has(.cell){padding:0}.cell{padding:.25rem .5rem;text-align:right;
background:color-mix(in srgb,var(--said) var(--share),transparent)}
.cell.good{background:color-mix(in srgb,var(--there) calc(var(--share)*.6),transparent)}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,12rem),1fr))}
figure{margin:0}figcaption{font-size:.9rem;text-align:center;color:var(--soft)}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--rule)}.line{stroke:var(--run);stroke-width:1.6;stroke-linejoin:round}
circle{fill:var(--run)}
img{max-width:100%;height:auto;display:block;margin:0 auto}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th[scope=row]{font-weight:normal;white-space:nowrap}thead th{background:var(--band)}
td{white-space:nowrap}td:has(code){white-space:normal}td.bars{width:100%;min-width:12rem}
.bar{display:flex;align-items:center;height:1.25rem;position:relative;padding-right:3.5rem}
.bar i{display:block;height:.8rem;background:var(--run);min-width:1px}
.bar span{padding-left:.4rem;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;background:var(--run)}
.switches{position:sticky;top:0;background:var(--paper);padding:.5rem 0;z-index:1}
.switches label{margin-right:1.2rem;white-space:nowrap}
summary{cursor:pointer;padding:.4rem 0}code{font-size:.85rem;overflow-wrap:anywhere}
p{max-width:45rem}
@media print{body{max-width:none;padding:0;font-size:11px}.switches,nav{display:none}
figure,tr{break-inside:avoid}
h2,h3,h4,summary{break-after:avoid}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(runs: list[Run], changed: str = "") -> str:
    """The whole report. `changed`: HTML of experiments.compare, what differs between two runs."""
    if len(runs) > len(LIGHT):
        raise ValueError(f"{len(runs)} runs: {len(LIGHT)} at most can be told apart on one page")
    several = len(runs) > 1
    sections = {
        "What changed": changed,
        "Result": lead(runs, compared=bool(changed)) + pictures(runs) * (not several),
        "Errors": errors(runs),
        "Measures": results(runs),
        "Detections": pictures(runs) * several,
        "Training": training(runs),
        "Arguments": overview(runs) + arguments(runs),
    }
    title = ", ".join(run.name for run in runs)
    return document(title, {k: v for k, v in sections.items() if v}, names(runs))


def document(title: str, sections: dict[str, str], runs: Sequence[str] = ("",)) -> str:
    """A page of its own. sections: {heading: HTML}; runs: names as HTML, each gets a colour."""
    light, dark = ("".join(f".run{i}{{--run:{c}}}" for i, c in enumerate(colours[: len(runs)]))
                   for colours in (LIGHT, DARK))  # fmt: skip
    style = STYLE.replace("LIGHT", light).replace("DARK", dark)
    switches = ""
    if len(runs) > 1:
        for i in range(len(runs)):
            style += (f"body:has(#show{i}:not(:checked)) :is(.line,.bar,.of,circle).run{i}"
                      "{display:none}")  # fmt: skip
        boxes = "".join(
            f'<label><input type="checkbox" id="show{i}" checked> {name}</label>'
            for i, name in enumerate(runs)
        )
        switches = f'<div class="switches" role="group" aria-label="runs shown">{boxes}</div>'
    keys = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{key}">{name}</a>' for name, key in keys.items())
    body = "".join(f'<h2 id="{keys[name]}">{name}</h2>{html}' for name, html in sections.items())
    title = escape(title)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>ScratchDet: {title}</title>'
        f"<style>{style}</style></head><body><header><h1>{title}</h1>"
        f'<nav aria-label="sections">{links}</nav></header>{switches}<main>{body}</main>'
        "</body></html>\n"
    )


def write(folders: list[str | Path], path: str | Path, changed: str = "") -> None:
    """The report of these run folders as one HTML file."""
    html = page([read_run(folder) for folder in folders], changed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(html, encoding="utf-8")


def write_figures(folder: Path, runs: list[str]) -> None:
    """The course's figures; with runs also their gradients, and what the first detects."""
    from experiments import drawings  # it needs the network, the page does not

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings.FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(folder / f"{name}.svg")
    if not runs:
        print("bn.svg and detections.jpg are made of runs: name their folders to have them, too")
        return
    logs, read = {}, [read_run(run) for run in runs]
    for run in read:
        args = run.about["args"]
        kind = {"all": "BatchNorm everywhere", "none": "no BatchNorm"}.get(args["bn"], args["bn"])
        logs[f"{kind}, learning rate {args['lr']:g}"] = [
            row for row in run.log if math.isfinite(row["loss"] + row["grad_norm"])
        ]
    (folder / "bn.svg").write_text(figures.gradients(logs), encoding="utf-8")
    print(folder / "bn.svg")
    if read[0].about["args"]["data"] == "shapes":  # no photograph of others
        sheet = drawings.detections(runs[0])
        sheet.save(folder / "detections.jpg", quality=78, optimize=True)
        print(folder / "detections.jpg")


def write_budget(path: Path, folders: list[str]) -> None:
    """mAP against what it cost as SVG: a line per run (`train.py --eval-every`), or a point.

    In place of folders that are gone, a .json: {name: [[CPU minutes, thousands of images, mAP]]}.
    """
    panels = {"mAP against CPU minutes": {}, "mAP against thousands of images": {}}
    minutes, images = panels.values()
    for folder in map(Path, folders):
        if folder.suffix == ".json":
            for name, rows in json.loads(folder.read_text()).items():
                minutes[name] = [(minute, ap) for minute, _, ap in rows]
                images[name] = [(thousands, ap) for _, thousands, ap in rows]
            continue
        run = read_run(folder)
        args, measured = run.about["args"], [r for r in run.measured if "cpu_minutes" in r]
        if not measured:
            raise ValueError(f"{folder}: nothing was measured there. A run that has ended, or one "
                             "with --eval-every, would do")  # fmt: skip
        minutes[run.name] = [(row["cpu_minutes"], row["mAP"]) for row in measured]
        images[run.name] = [((row["step"] + 1) * args["batch_size"] / 1000, row["mAP"])
                            for row in measured]  # fmt: skip
    top = figures.whole(minutes.values())
    path.write_text(figures.curves(panels, y_max=top), encoding="utf-8")
    print(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", help="the page; default report.html. With --figures the folder")
    parser.add_argument("--figures", action="store_true", help="draw docs/figures instead")
    parser.add_argument("--budget", metavar="SVG", help="draw mAP against its cost")
    args = parser.parse_args(argv)
    if args.budget:
        return write_budget(Path(args.budget), args.runs)
    if args.figures:
        return write_figures(Path(args.out or ROOT / "docs" / "figures"), args.runs)
    if not args.runs:
        parser.error("no RUN: expected folders that train.py wrote, such as runs/shapes")
    out = args.out or "report.html"
    write(args.runs, out)
    print(f"{out}: {len(args.runs)} run(s), {Path(out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
