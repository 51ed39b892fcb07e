"""Start from weights that exist: ImageNet's VGG-16 (Table 1), a detector of more classes (Table 5).

    python train.py --voc-root DIR --backbone vgg16 --bn all --pretrained vgg16_bn.pth
    python train.py --voc-root DIR --init-from runs/coco/last.pt

The first is a state dict of torchvision (vgg16 or vgg16_bn), the second a checkpoint of train.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scratchdet import Config, ScratchDet, load

# torchvision's input: (RGB / 255 - mean) / std, here in units of 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

COCO_NAMES = {  # VOC's name: COCO's, where they differ (coco_voc_map.txt of Caffe SSD)
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


# The flags that --init-from brings along from its checkpoint.
NETWORK = ("backbone", "bn", "width", "stem", "extras", "priors", "size", "std")


def network_flags(init_from: str | Path) -> dict:
    """Defaults of train.py's flags: the checkpoint's network. {} if it is gone, as a run that was
    started from it and is resumed may find it."""
    if not Path(init_from).exists():
        return {}
    config = load(init_from)[0].config
    return {field: getattr(config, field) for field in NETWORK}


def start(
    config: Config, pretrained: str | Path | None = None, init_from: str | Path | None = None
) -> ScratchDet:
    """The network of `config`, from random weights or from a file; its `.config` says what became
    of input normalisation (--pretrained) and priors (--init-from). ValueError: it does not fit."""
    if pretrained and init_from:
        raise ValueError("--pretrained and --init-from both give the first weights: choose one")
    if init_from:
        return from_detector(config, init_from)
    return with_vgg16(config, pretrained) if pretrained else ScratchDet(config)


# ------------------------------------------------------------------------------ from ImageNet


def with_vgg16(config: Config, path: str | Path) -> ScratchDet:
    """SSD-VGG16 whose backbone up to fc7 is torchvision's; extras and head stay random.

    fc6 and fc7 become convolutions by sub-sampling (SSD, section 3.1): every 4th of the 4096
    outputs, and of fc6's 7x7 window every 3rd row and column, which dilation 6 spreads out. With BN
    the convolutions here have no bias: the file's moves into the running mean, so that the
    network in evaluation mode is the file's; fc6 and fc7, which have no BN there, get a new one.
    """
    if config.backbone != "vgg16" or config.width != 1:
        raise ValueError(
            f"--pretrained {path}: VGG-16 weights for --backbone {config.backbone} --width "
            f"{config.width:g}. They fit --backbone vgg16 --width 1 alone"
        )
    if config.std not in (Config.std, IMAGENET_STD):
        std = " ".join(f"{s:g}" for s in config.std)
        raise ValueError(f"--std {std}: --pretrained brings the input's own; leave one of them out")
    state = read_vgg16(path)
    has_bn, wants_bn = "features.1.running_mean" in state, config.bn in ("all", "backbone")
    if has_bn != wants_bn:
        raise ValueError(
            f"--pretrained {path} is VGG-16 {'with' if has_bn else 'without'} BatchNorm, but --bn "
            f"{config.bn} is a backbone {'with' if wants_bn else 'without'} it. Use --bn "
            f"{'all or backbone' if has_bn else 'head or none'}, or torchvision's "
            f"{'vgg16_bn' if wants_bn else 'vgg16'}"
        )
    config = replace(config, mean=IMAGENET_MEAN, std=IMAGENET_STD, channels="rgb")
    model = ScratchDet(config)
    body = nn.ModuleList([model.features.to_conv4_3, model.features.to_fc7])
    convs = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]

    layers = sorted(int(k.split(".")[1]) for k in state if k.startswith("features."))
    layers = [f"features.{i}." for i in dict.fromkeys(layers)]
    sources = [p for p in layers if state[p + "weight"].ndim == 4]  # the 13 convolutions
    norm_sources = [p for p in layers if state[p + "weight"].ndim == 1]
    weights = [(state[p + "weight"], state[p + "bias"]) for p in sources]
    fc6 = state["classifier.0.weight"].reshape(4096, 512, 7, 7)[::4, :, ::3, ::3]
    fc7 = state["classifier.3.weight"].reshape(4096, 4096, 1, 1)[::4, ::4]
    weights.append((fc6, state["classifier.0.bias"][::4]))
    weights.append((fc7, state["classifier.3.bias"][::4]))
    with torch.no_grad():
        for norm, p in zip(norms, norm_sources, strict=False):  # not those of fc6 and fc7
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).copy_(state[p + name])
        for i, (conv, (weight, bias)) in enumerate(zip(convs, weights, strict=True)):
            conv.weight.copy_(weight)
            (norms[i].running_mean.sub_(bias) if norms else conv.bias.copy_(bias))
    return model


def read_vgg16(path: str | Path) -> dict[str, Tensor]:
    """The state dict, once its names and shapes are found to be torchvision's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except FileNotFoundError:
        raise ValueError(f"--pretrained {path}: no such file") from None
    except Exception as e:  # whatever torch raises on bytes from anywhere
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"--pretrained {path}: not a state dict ({why[:150]})") from None
    expected = vgg16_shapes(batchnorm="features.1.running_mean" in shapes)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(
                f"--pretrained {path}: {name} is {shapes.get(name, 'missing')}, expected {shape} "
                "as in torchvision's vgg16 and vgg16_bn"
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


def from_detector(config: Config, path: str | Path) -> ScratchDet:
    """The detector of a checkpoint, for the classes of `config` (section 4.5, Table 5).

    All weights but the confidence head's are copied; of that the rows of the wanted classes, BN
    included. Priors and input stay those of the checkpoint, for which it was trained.
    """
    source, _ = load(path)
    for field in NETWORK:
        ours, theirs = getattr(config, field), getattr(source.config, field)
        if ours != theirs:
            words = " ".join(map(str, theirs)) if isinstance(theirs, tuple) else theirs
            raise ValueError(
                f"--init-from {path} has {field} {theirs}, this run {ours}. Leave --{field} out, "
                f"or give {words}"
                if theirs is not None
                else f"--init-from {path} has its backbone's own {field}: leave out --{field}"
            )
    rows = class_rows(config.classes, source.config.classes, path)
    model = ScratchDet(replace(source.config, classes=config.classes))
    state = source.state_dict()
    for name, tensor in state.items():
        if name.startswith("head.conf.") and tensor.ndim:  # (A * C, ...), C fastest
            per_prior = tensor.unflatten(0, (-1, source.config.num_classes))
            state[name] = per_prior[:, rows].flatten(0, 1)
    model.load_state_dict(state)
    return model


def class_rows(classes: tuple[str, ...], source: tuple[str, ...], path: str | Path) -> list[int]:
    """For each class of ours, background first, its row in the source's scores.

    By equal names, and by COCO's names for VOC's. ("dog", "sofa") of ("couch", "dog") -> [0, 2, 1].
    """
    at = {name: row for row, name in enumerate(source, start=1)}
    found = [at.get(name, at.get(COCO_NAMES.get(name, name))) for name in classes]
    missing = [name for name, row in zip(classes, found, strict=True) if row is None]
    if missing:
        raise ValueError(
            f"--init-from {path} does not know {', '.join(missing)}: it detects "
            f"{', '.join(source)}. Classes are found by name; rename or leave out those"
        )
    return [0, *found]
