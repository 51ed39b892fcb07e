"""The numbers of an evaluation: as plain data, and as the text that the programs print."""

from collections.abc import Sequence

import numpy as np

CURVE = 200  # points of a precision-recall curve, at most


def best_threshold(f1: np.ndarray) -> float | None:
    """The score at which F1 (101,), of scores 0, .01, ..., 1, is best; None where it is 0 or NaN.

    Of several it is the middle one.
    """
    best = np.flatnonzero(f1 == f1.max())
    return best[len(best) // 2].item() / 100 if f1.max() > 0 else None


def as_plain_data(voc: dict, coco: dict, classes: Sequence[str], metric: str, sizes: dict) -> dict:
    """What `voc_ap` and `coco_ap` return, without arrays and NaN, as JSON takes it.

    "threshold" is the score whose detections have the best F1, for each class and as a mean over
    the classes. `sizes`: metrics.SIZES. `coco` may be empty.
    """

    def plain(x):
        return None if np.isnan(x) else float(x)

    def both(eleven, area, kind):
        return {f"{kind}_11point": plain(eleven), f"{kind}_area": plain(area)}

    means, by_size, per_class, curves = both(*voc["mAP"], "mAP"), {}, {}, {}
    for name, (low, high) in sizes.items():  # sides in the network's image, as text
        by_size[name] = both(*voc["by_size"][name], "mAP") | {"sides": f"{low} to {min(high, 300)}"}
    for c, name in enumerate(classes):
        f1, (recall, precision) = voc["f1"][c], voc["curves"][c]
        per_class[name] = both(voc["ap11"][c], voc["area"][c], "ap")
        per_class[name] |= {"threshold": best_threshold(f1), "f1": plain(f1.max())}
        some = np.unique(np.linspace(0, max(0, len(recall) - 1), CURVE).astype(int))[: len(recall)]
        curves[name] = [recall[some].round(4).tolist(), precision[some].round(4).tolist()]
    result = {
        "mAP": means["mAP_11point" if metric == "voc07" else "mAP_area"],
        "metric": metric,
        **means,
        "per_class": per_class,
        "by_size": by_size,
        "threshold": best_threshold(np.nansum(voc["f1"], axis=0)),
        "curves": curves,
    }
    if coco:
        result |= {"coco": {k: v for k, v in coco.items() if k != "per_class"}, "mAP": coco["AP"]}
        for name, ap in zip(classes, coco["per_class"], strict=True):
            per_class[name]["ap_coco"] = plain(ap)
    return result


def results_text(result: dict) -> str:
    """What metrics.summarise returns, with a line per class."""

    def cell(x):
        return f"{'-' if x is None else format(x, '.4f'):>10}"

    columns = ["ap_11point", "ap_area"] + ["ap_coco"] * ("coco" in result)
    sizes = {f"{name}, {row['sides']} px": row for name, row in result["by_size"].items()}
    width = max(map(len, [*result["per_class"], *sizes])) + 1
    lines = [f"{'class':{width}}" + "".join(f"{c[3:]:>10}" for c in columns)]
    for name, row in result["per_class"].items():
        lines.append(f"{name:{width}}" + "".join(cell(row[c]) for c in columns))
    lines.append(f"{'mean':{width}}{cell(result['mAP_11point'])}{cell(result['mAP_area'])}")
    lines.append("by size: side of the object in a 300x300 image")
    for text, row in sizes.items():
        lines.append(f"{text:{width}}{cell(row['mAP_11point'])}{cell(row['mAP_area'])}")
    if "coco" in result:
        lines += [f"{name:{width}}{cell(value)}" for name, value in result["coco"].items()]
    kind = {"voc07": "11-point, VOC2007", "voc": "area", "coco": "COCO AP"}[result["metric"]]
    lines.append(
        f"mAP {cell(result['mAP']).strip()} ({kind}); {result['objects']} objects, "
        f"{result['detections']} detections in {result['images']} images"
    )
    return "\n".join(lines)
