"""Write a start checkpoint for `train.py --init` from weights that exist; or convert a data set.

    python -m experiments.convert vgg16 vgg16_bn.pth --out start.pt          ImageNet (Table 1)
    python -m experiments.convert detector runs/coco/last.pt --out start.pt  COCO -> VOC (Table 5)
    python train.py --voc-root DIR --init start.pt
    python -m experiments.convert --to yolo --out DIR --voc-root DIR   see convert_data.py

The first file is a state dict of torchvision (vgg16 or vgg16_bn), the second a checkpoint of
train.py. What a start checkpoint does not hold (the head and the extra layers of a network from
ImageNet) gets random weights in train.py. Its network is the default of train.py's flags.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments import baselines, convert_data  # noqa: F401  a detector may have any network
from plumbing.files import read_classes
from plumbing.program import Help, check_file, run_program
from plumbing.voc import VOC_CLASSES
from scratchdet import Config, ScratchDet, load_detector

# The input of torchvision's networks: (RGB / 255 - mean) / std, here in units of 0..255.
IMAGENET = {"channels": "rgb", "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}

COCO_NAMES = {  # VOC's name: COCO's name, where they differ (coco_voc_map.txt of Caffe SSD)
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


# ------------------------------------------------------------------------------ from ImageNet


def from_vgg16(path: str | Path) -> dict:
    """A start checkpoint with the backbone of SSD300, up to fc7, from torchvision's VGG-16.

    fc6 and fc7 become convolutions by sub-sampling (SSD, section 3.1): every 4th of the 4096
    outputs, and of fc6's 7x7 window every 3rd row and column, which dilation 6 spreads out.

    In a network with BN the convolutions have no bias. The file's biases move into the running
    means, so that the network in evaluation mode computes what the file's does. fc6 and fc7, which
    have no BN there, get a new one.
    """
    state = read_vgg16(path)
    bn = "all" if "features.1.running_mean" in state else "head"
    model = ScratchDet(Config("vgg16", bn))
    body = nn.ModuleList([model.features.to_conv4_3, model.features.to_fc7])
    convs = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]

    layers = sorted({int(k.split(".")[1]) for k in state if k.startswith("features.")})
    layers = [f"features.{i}." for i in layers]
    conv_layers = [p for p in layers if state[p + "weight"].ndim == 4]  # 13
    norm_layers = [p for p in layers if state[p + "weight"].ndim == 1]  # 13 or 0
    weights = [(state[p + "weight"], state[p + "bias"]) for p in conv_layers]
    fc6 = state["classifier.0.weight"].reshape(4096, 512, 7, 7)[::4, :, ::3, ::3]
    fc7 = state["classifier.3.weight"].reshape(4096, 4096, 1, 1)[::4, ::4]
    weights.append((fc6, state["classifier.0.bias"][::4]))
    weights.append((fc7, state["classifier.3.bias"][::4]))
    with torch.no_grad():
        for norm, p in zip(norms, norm_layers, strict=False):  # those of fc6 and fc7 stay new
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).copy_(state[p + name])
        for i, (conv, (weight, bias)) in enumerate(zip(convs, weights, strict=True)):
            conv.weight.copy_(weight)
            (norms[i].running_mean.sub_(bias) if norms else conv.bias.copy_(bias))
    held = ("features.to_conv4_3.", "features.to_fc7.")
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(held)}
    # nothing of classes, priors and size: these follow from the data, as without --init
    return {"config": {"backbone": "vgg16", "bn": bn} | IMAGENET, "model": kept}


def read_vgg16(path: str | Path) -> dict[str, Tensor]:
    """The state dict, after checking that its names and shapes are torchvision's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as e:  # whatever torch raises on bytes from anywhere
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path}: not a state dict ({why[:150]})") from None
    expected = vgg16_shapes(batchnorm="features.1.running_mean" in shapes)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(
                f"{path}: {name} is {shapes.get(name, 'missing')}, expected {shape} as in "
                "torchvision's vgg16 and vgg16_bn"
            )
    return {name: state[name] for name in expected}


def vgg16_shapes(*, batchnorm: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's state dict, without its last layer."""
    shapes, i, c_in = {}, 0, 3
    for c, convs in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        for _ in range(convs):
            shapes |= {f"features.{i}.weight": (c, c_in, 3, 3), f"features.{i}.bias": (c,)}
            if batchnorm:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"features.{i + 1}.{name}"] = (c,)
            i, c_in = i + (3 if batchnorm else 2), c  # convolution, BN, ReLU
        i += 1  # pooling
    shapes |= {"classifier.0.weight": (4096, 25088), "classifier.0.bias": (4096,)}
    return shapes | {"classifier.3.weight": (4096, 4096), "classifier.3.bias": (4096,)}


# ------------------------------------------------------------------------------ from a detector


def from_detector(path: str | Path, classes: tuple[str, ...]) -> dict:
    """A start checkpoint that detects `classes` with the weights of another detector (Table 5).

    All weights are copied, of the class scores those of the wanted classes, BN included. The
    priors stay the ones that the weights were trained for.
    """
    source, _ = load_detector(path)
    rows = class_rows(classes, source.config.classes, path)
    state = source.state_dict()
    for name, tensor in state.items():
        if name.startswith("head.conf.") and tensor.ndim:  # (A * C, ...), C fastest
            per_prior = tensor.unflatten(0, (-1, source.config.num_classes))
            state[name] = per_prior[:, rows].flatten(0, 1)
    return {"config": asdict(replace(source.config, classes=classes)), "model": state}


def class_rows(classes: tuple[str, ...], source: tuple[str, ...], path: str | Path) -> list[int]:
    """For each of our classes, background first, its row in the scores of the source.

    By equal names, and by COCO's names for VOC's. ("dog", "sofa") of ("couch", "dog") -> [0, 2, 1].
    """
    at = {name: row for row, name in enumerate(source, start=1)}
    found = [at.get(name, at.get(COCO_NAMES.get(name, name))) for name in classes]
    missing = [name for name, row in zip(classes, found, strict=True) if row is None]
    if missing:
        raise ValueError(
            f"{path} does not know {', '.join(missing)}: it detects {', '.join(source)}. Classes "
            "are found by name; rename or leave out those"
        )
    return [0, *found]


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--to" for word in words):
        convert_data.main(words)
        return
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="To convert a data set: python -m experiments.convert --to {voc,coco,yolo} --help",
        formatter_class=Help,
    )
    parser.add_argument("kind", choices=["vgg16", "detector"], help="what FILE is")
    parser.add_argument("file", metavar="FILE", help="torchvision's weights, or a checkpoint")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the start is written")
    parser.add_argument(
        "--classes", metavar="FILE", help="detector: names, one per line (default: VOC's 20)"
    )
    args = parser.parse_args(argv)
    check_file(args.out, args.file, *filter(None, [args.classes]))
    if args.kind == "vgg16" and args.classes:
        raise ValueError(f"--classes {args.classes}: ImageNet's VGG-16 brings no class scores")
    if args.kind == "vgg16":
        start = from_vgg16(args.file)
    else:
        classes = VOC_CLASSES
        if args.classes:
            classes = tuple(read_classes(args.classes))
        start = from_detector(args.file, classes)
    torch.save(start, args.out)
    print(f"wrote {args.out}: {len(start['model'])} tensors; python train.py --init {args.out}")


if __name__ == "__main__":
    run_program(main)
