"""What the programs print: the network, and the numbers of an evaluation, as text."""

import math

from torch import nn

from plumbing.network import count_macs


def network_table(model: nn.Module, per_cell: list[int], priors: tuple) -> str:
    """The six maps of a ScratchDet, a line each, and what the network costs.

    `per_cell`: the priors per cell of each map; `priors`: its row of scratchdet.PRIORS.
    """
    config = model.config
    sizes = model.map_sizes(config.size, config.size)
    lines = [
        f"{config.backbone}, BN {config.bn}, width {config.width:g}, "
        f"{config.size}x{config.size}, {config.num_classes} classes with background",
        "map      size  channels  priors per cell  priors  sides in pixels",
    ]
    rows = zip(sizes, model.features.channels, per_cell, priors, strict=True)
    for i, ((h, w), c, a, (small, large, *_)) in enumerate(rows, 1):
        pixel = config.size / 100
        side = f"{pixel * small:g}, {pixel * math.sqrt(small * large):.1f}"
        lines.append(f"{i:<5}{f'{h}x{w}':>8}{c:>10}{a:>17}{h * w * a:>8}  {side}")
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f"{len(model.priors_cxcywh):,} priors")
    lines.append(f"{parameters:,} parameters, {count_macs(model, config.size) / 1e9:.2f} GMACs")
    return "\n".join(lines)


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
