"""A checkpoint -> one HTML page that runs its network in the browser and explains every step.

    python -m experiments.page runs/shapes/last.pt --out page.html       with drawn pictures
    python -m experiments.page runs/voc/last.pt --images PATH ...        with pictures of yours
    python -m experiments.page runs/voc/last.pt --voc-root DIR           of a test set, with boxes
    python -m experiments.page docs/shapes.html --out docs/shapes.html   the same, built again

The page is one file: no network, no library, the weights inside. BatchNorm is folded into the
convolutions (at test time it is a fixed shift and scale), and the weights are stored as float16.
The network becomes a list of steps, convolutions and poolings; page.js runs them, page_view.js
draws, and page.html holds the words. For the ResNet family, strided or root, at any width.
"""

import argparse
import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from detect import find_pictures, threshold
from experiments import baselines, demo  # noqa: F401  their checkpoints can be read, too
from plumbing.files import Record, decode_pixels, open_image, open_record
from plumbing.network import count_macs
from plumbing.pictures import upright
from plumbing.program import check_file, run_program
from plumbing.shapes import SHAPE_CLASSES, draw_image
from plumbing.sources import add_data_flags, kind_of, open_test_set
from scratchdet import PRIORS, BasicBlock, Config, Head, ResNet, ScratchDet, load_detector

HERE = Path(__file__).parent
PICTURES = 24  # in the page, at most, of the drawn or of another test set: the first of it
START = 14  # the one that is shown first: objects of all sizes, of which some overlap
LONGEST = 640  # side in pixels that a picture in the page is shrunk to
POLICY = (
    "default-src 'none'; script-src {scripts}; worker-src blob:; style-src {style}; "
    "img-src data: blob:; media-src blob:; base-uri 'none'; form-action 'none'"
)


# ------------------------------------------------------------------------------ the network


@torch.no_grad()
def fold(model: ScratchDet) -> ScratchDet:
    """The same network without BatchNorm: weight * g / s, bias = b - mean * g / s."""
    config = replace(model.config, bn="none", head_bn_eps=Config.head_bn_eps)
    folded = ScratchDet(config).eval()
    target = {name: conv for name, conv in folded.named_modules() if isinstance(conv, nn.Conv2d)}
    modules = dict(model.named_modules())
    for name, conv in target.items():
        source, parent = modules[name], name.rpartition(".")[0]
        behind = modules.get(f"{parent}.1")  # conv_bn: convolution, BatchNorm, ReLU
        weight, bias = source.weight.double(), torch.zeros(len(source.weight)).double()
        if isinstance(behind, nn.BatchNorm2d):
            scale = behind.weight.double() / (behind.running_var.double() + behind.eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = behind.bias.double() - behind.running_mean.double() * scale
        elif source.bias is not None:
            bias = source.bias.double()
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return folded


def make_steps(model: ScratchDet) -> tuple[list[dict], list[nn.Conv2d], list[int], list[int]]:
    """A network without BatchNorm -> its steps, their convolutions, and the steps of the head.

    A step reads the output of step `from` (-1: the image) and, in a residual block, adds that of
    step `add`: {"name", "op": "conv" | "pool", "from", "kernel", "stride", "pad", ...}.
    """
    body = model.features
    steps, convs = [], []

    def add_conv(name, sequence, source, *, relu=None, add=None, crop=0) -> int:
        conv = sequence[0]
        relu = any(isinstance(m, nn.ReLU) for m in sequence) if relu is None else relu
        steps.append({
            "name": name, "op": "conv", "from": source, "add": add, "relu": relu,
            "kernel": conv.kernel_size[0], "stride": conv.stride[0],
            "pad": conv.padding[0] - crop, "in": conv.in_channels, "out": conv.out_channels,
        })  # fmt: skip
        convs.append(conv)
        return len(steps) - 1

    def add_block(name, block, source) -> int:
        if not isinstance(block, BasicBlock):  # SSD's extra layers
            for i, sequence in enumerate(block):
                source = add_conv(f"{name}.{i}", sequence, source)
            return source
        first = add_conv(f"{name}.conv1", block.conv1, source)
        if not isinstance(block.shortcut, nn.Identity):  # a block that shrinks crops it by a pixel
            source = add_conv(f"{name}.shortcut", block.shortcut, source, crop=int(block.shrink))
        return add_conv(f"{name}.conv2", block.conv2, first, relu=True, add=source)

    last, maps = -1, []
    for i, sequence in enumerate(body.stem):
        last = add_conv(f"stem.{i}", sequence, last)
    if isinstance(body.pool, nn.MaxPool2d):
        kernel, stride, pad = (getattr(body.pool, k) for k in ("kernel_size", "stride", "padding"))
        steps.append({"name": "pool", "op": "pool", "from": last, "add": None,
                      "kernel": kernel, "stride": stride, "pad": pad})  # fmt: skip
        last = len(steps) - 1
    for i, stage in enumerate(body.stages):
        for j, block in enumerate(stage):
            last = add_block(f"stages.{i}.{j}", block, last)
        if i >= body.first_map:
            maps.append(last)
    for i, block in enumerate(body.extras):
        last = add_block(f"extras.{i}", block, last)
        maps.append(last)
    head = [
        [add_conv(f"head.{what}.{m}", convs_of_map[m], maps[m]) for m in range(len(maps))]
        for what, convs_of_map in (("loc", model.head.loc), ("conf", model.head.conf))
    ]
    return steps, convs, *head


def describe(model: ScratchDet) -> tuple[dict, np.ndarray]:
    """The network for page.js, and all its weights as float16, step by step, biases behind."""
    known = type(model.features) is ResNet and all(
        isinstance(block, BasicBlock) for stage in model.features.stages for block in stage
    )
    if not known or type(model.head) is not Head:
        raise ValueError(
            f"{model.config.backbone}: the page runs the ResNet family with basic blocks, "
            "such as root-resnet18, root-resnet34 or resnet18"
        )
    folded = fold(model)
    steps, convs, loc, conf = make_steps(folded)
    weights = torch.cat([w.flatten() for conv in convs for w in (conv.weight, conv.bias)])
    half = weights.detach().numpy().astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a weight of the network is not finite, or beyond float16 (65,504)")
    config = folded.config
    about = {
        "config": asdict(config), "steps": steps, "loc": loc, "conf": conf,
        "priors": PRIORS[config.priors], "parameters": len(half),
        "macs": count_macs(model, config.size),
    }  # fmt: skip
    return about, half


def read_page(path: str | Path) -> tuple[ScratchDet, dict]:
    """A page -> its network (without BatchNorm, weights as stored) and what it says of it."""
    text = Path(path).read_text(encoding="utf-8")

    def block(name: str) -> str:
        return text.split(f'id="{name}">', 1)[1].split("</script>", 1)[0]

    about = json.loads(block("data"))
    model = ScratchDet(replace(Config.from_dict(about["network"]["config"]), bn="none")).eval()
    weights = np.frombuffer(base64.b64decode(block("weights")), np.float16).astype(np.float32)
    weights, at = torch.from_numpy(weights), 0
    for conv in make_steps(model)[1]:
        for parameter in (conv.weight, conv.bias):
            parameter.data.copy_(weights[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
    return model, about


def read_network(path: str | Path) -> tuple[ScratchDet, dict]:
    """A checkpoint, or a page, -> the network and what the file says of it."""
    return (read_page if Path(path).suffix == ".html" else load_detector)(path)


def load_network(path: str | Path) -> tuple[ScratchDet, dict]:
    """A checkpoint, or a page, -> the network and what the page says about its training."""
    model, checkpoint = read_network(path)
    if "training" in checkpoint:  # it is a page
        return model, checkpoint["training"]
    args = checkpoint.get("args") or {}
    training = {key: args.get(key) for key in ("data", "recipe", "seed")}
    training |= {"bn": model.config.bn, "commit": checkpoint.get("commit")}
    training |= {"threshold": threshold(checkpoint)}
    return model, training


# ------------------------------------------------------------------------------ the pictures


def picture(image: Image.Image, name: str, boxes=(), labels=(), difficult=()) -> dict:
    """A picture for the page: a JPEG inside it, and its ground truth in its pixels."""
    width, height = image.size
    image.thumbnail((LONGEST, LONGEST))
    scale = np.array([image.width / width, image.height / height] * 2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    boxes = np.asarray(boxes, float).reshape(-1, 4) * scale
    return {
        "name": name,
        "src": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "boxes": boxes.round(2).tolist(),
        "labels": [int(label) for label in labels],
        "difficult": [bool(one) for one in difficult] or [False] * len(boxes),
    }


def drawn_pictures(classes: Sequence[str], count: int = PICTURES, seed: int = 0) -> list[dict]:
    """Pictures that no training has seen: the first of the drawn test set; for a network that does
    not know its shapes the scenes of the demo, with the boxes of classes that it knows."""
    if set(classes) & set(SHAPE_CLASSES):
        drawn = (draw_image(np.random.default_rng((seed, 1, i))) for i in range(count))
        named = ((f"drawn picture {i + 1}", *one) for i, one in enumerate(drawn))
        scenes = [
            (name, image, zip((SHAPE_CLASSES[label - 1] for label in labels), boxes, strict=True))
            for name, image, boxes, labels in named
        ]
    else:
        scenes = [(f"drawn: {scene.__name__}", *scene()) for scene in demo.SCENES]
    found = []
    for name, image, objects in scenes:
        known = [(classes.index(what) + 1, box) for what, box in objects if what in classes]
        labels, boxes = ([row[i] for row in known] for i in (0, 1))
        found.append(picture(image, name, np.reshape(boxes, (-1, 4)), np.array(labels, np.int64)))
    return found


def read_pictures(images: Sequence[Record | str | Path]) -> list[dict]:
    """Of records with their ground truth; of files and folders without: the reader can draw it."""
    found = []
    for one in images:
        if isinstance(one, Record):
            image = decode_pixels(open_record(one), one)
            found.append(
                picture(image, one.name, one.boxes_xyxy, one.labels, one.difficult.astype(bool))
            )
        else:
            found += [picture(upright(open_image(p)), p.stem) for p in find_pictures([str(one)])]
    return found


# ------------------------------------------------------------------------------ the page


def hashed(text: str) -> str:
    """The policy's name for a script or a style: nothing else may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def make_page(about: dict, weights: bytes) -> str:
    """The template with everything in it."""
    template = (HERE / "page.html").read_text(encoding="utf-8")
    code, view = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page_view.js"))
    style = template.split("<style>", 1)[1].split("</style>", 1)[0]
    policy = POLICY.format(scripts=f"{hashed(code)} {hashed(view)}", style=hashed(style))
    data = json.dumps(about, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"POLICY": policy, "ABOUT": data, "CODE": code, "VIEW": view,
             "WEIGHTS": base64.b64encode(weights).decode()}  # fmt: skip
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


def write_page(
    checkpoint: str | Path, out: str | Path, images: Sequence[Record | str | Path] = ()
) -> None:
    """The page of a checkpoint (or of a page). `images`: records or paths; none: drawn shapes."""
    model, training = load_network(checkpoint)
    network, half = describe(model)
    if images:
        pictures = read_pictures(images)
    elif Path(checkpoint).suffix == ".html":
        pictures = read_page(checkpoint)[1]["pictures"]
    else:
        pictures = drawn_pictures(model.config.classes)
    start = START if pictures[0]["name"].startswith("drawn picture") else 0
    about = {"network": network, "training": training, "pictures": pictures, "start": start}
    html = make_page(about, half.tobytes())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(html, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("checkpoint", help="runs/NAME/last.pt, or a page that this command wrote")
    add("--images", nargs="+", metavar="PATH", help="pictures, or folders of them")
    add("--out", default="page.html", help="(default: page.html)")
    group = parser.add_argument_group("test set of which the page has the first 24 pictures")
    add_data_flags(group)
    group.add_argument("--eval-sets", nargs="+", metavar="SET", help="as of train.py")
    args = parser.parse_args(argv)
    images = args.images or []
    check_file(args.out, *([args.checkpoint] if args.checkpoint.endswith(".pt") else []), *images)
    if args.eval_sets and kind_of(args) == "shapes":
        raise ValueError(
            "--eval-sets: of which data? Expected --voc-root DIR or another root beside"
        )
    if not images and kind_of(args) != "shapes":
        model, run = read_network(args.checkpoint)
        records = open_test_set(args, run.get("args") or {}, model.config.classes)
        images = [record for record in records if len(record.labels)][:PICTURES]
    write_page(args.checkpoint, args.out, images)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
