"""ScratchDet300: a single-shot object detector that trains from random weights.

    image (N,3,300,300)
      -> root (N,64,300,300) -> pool (N,64,150,150)              un-strided: small objects survive
      -> stages 64@150, 128@75, 256@38*, 512@19*                 * = the six maps that predict
      -> extras 128@10*, 128@5*, 128@3*, 128@1*
      -> head, on every map: offsets (N,A*4,H,W) and class scores (N,A*C,H,W)
      -> loc (N,P,4), logits (N,P,C)                             ScratchDet.forward

    training:  loc, logits, priors, boxes -> loss                multibox_loss
    testing:   loc, logits, priors -> boxes, scores, labels      detect

Letters, here and everywhere: N images - P = 8732 priors - C classes with background (21 for VOC) -
A priors of a cell - G boxes of an image - T boxes of a batch - D detections of an image at most.
Boxes are float32 in units of the image (priors and decoded boxes may lie outside [0, 1]); a name
says the format: `_xyxy` is (left, top, right, bottom), `_cxcywh` is (centre x, centre y, w, h).

Memory order, which the head, the priors and the loss share: map, row, column, prior of the cell.

`python scratchdet.py [--backbone NAME] [--bn MODE] [--width W]` prints the network as a table.

Papers: ScratchDet, Zhu et al., CVPR 2019. SSD, Liu et al., ECCV 2016. "Caffe SSD" below is the
reference code of SSD (weiliu89/caffe, branch ssd), on which ScratchDet's own code stands.
"""

import argparse
import copy
import math
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ops.reference import VARIANCES
from records import VOC_CLASSES

MAPS_300 = (38, 19, 10, 5, 3, 1)  # sides of the six maps of a 300x300 image
BLOCKS = {  # residual blocks of the four stages
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
}  # fmt: skip

# The ResNet family of section 3.2 and Table 2. depth; the stem's convolutions as (kernel, how many,
# stride of the first); max-pooling behind it as (kernel, padding) with stride 2, or None.
BACKBONES = {
    "root-resnet18": (18, (3, 3, 1), (2, 0)),  # the root block: three 3x3, no stride
    "root-resnet34": (34, (3, 3, 1), (2, 0)),
    "resnet18": (18, (7, 1, 2), (3, 1)),  # Fig. 3 (a), the classification network
    "resnet34": (34, (7, 1, 2), (3, 1)),
    "resnet18-a": (18, (7, 1, 2), None),  # Fig. 3 (b), without the max-pooling
    "resnet18-b": (18, (7, 1, 1), (3, 1)),  # Fig. 3 (c), without the first stride
    "vgg16": None,
}
BASELINES = (  # networks that the paper compares with: experiments/baselines.py
    "resnet50", "resnet101", "root-resnet50", "root-resnet101", "root-resnet18-preact",
    "root-resnet34-preact", "root-resnet34-caffe-compat", "dsod300", "scratchdet512", "ssd321",
)  # fmt: skip

# Priors of one map: smallest and largest side in pixels, distance of two cells in pixels (None:
# the image's side / the map's), aspect ratios besides 1 (each also as its inverse). Caffe SSD,
# ssd_pascal.py and ssd_coco.py.
PRIORS = {
    "voc": (
        (30, 60, 8, (2,)),
        (60, 111, 16, (2, 3)),
        (111, 162, 32, (2, 3)),
        (162, 213, 64, (2, 3)),
        (213, 264, None, (2,)),
        (264, 315, None, (2,)),
    ),
    "coco": (
        (21, 45, 8, (2,)),
        (45, 99, 16, (2, 3)),
        (99, 153, 32, (2, 3)),
        (153, 207, 64, (2, 3)),
        (207, 261, None, (2,)),
        (261, 315, None, (2,)),
    ),
    "coco512": (  # of 512x512 images: scratchdet512
        (20, 51, 8, (2,)),
        (51, 133, 16, (2, 3)),
        (133, 215, 32, (2, 3)),
        (215, 296, 64, (2, 3)),
        (296, 378, None, (2, 3)),
        (378, 460, None, (2,)),
        (460, 542, None, (2,)),
    ),
    "voc321": (  # of 321x321 images. The ratios are the DSSD paper's; its code was not seen
        (32, 64, 8, (1.6, 2, 3)),
        (64, 121, 16, (1.6, 2, 3)),
        (121, 179, 32, (1.6, 2, 3)),
        (179, 237, 64, (1.6, 2, 3)),
        (237, 295, None, (1.6, 2, 3)),
        (295, 353, None, (1.6, 2, 3)),
    ),
}


@dataclass(frozen=True)
class Config:
    """All that defines the network and its input: plain data, saved in every checkpoint."""

    backbone: str = "root-resnet34"
    bn: str = "all"  # BatchNorm in: all | backbone | head | none (Table 1)
    width: float = 1.0  # of all channels but the head's; rounded up to a multiple of 16
    stem: tuple[int, int, int] | None = None  # overrides the backbone's (Table 2)
    extras: str = "residual"  # maps 3 to 6 by residual blocks | conv (as SSD's); VGG-16 has conv
    classes: tuple[str, ...] = VOC_CLASSES  # without background, which is class 0
    priors: str = "voc"  # a table of PRIORS
    size: int = 300  # side of the input in pixels
    channels: str = "rgb"  # order of the network's input: rgb | bgr
    mean: tuple[float, float, float] = (123.0, 117.0, 104.0)  # of red, green, blue in 0..255
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # input = (pixel - mean) / std

    def __post_init__(self):
        for name, allowed in {
            "backbone": (*BACKBONES, *BASELINES),
            "bn": ("all", "backbone", "head", "none"),
            "extras": ("residual", "conv"),
            "priors": PRIORS,
            "channels": ("rgb", "bgr"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        if not 0 < self.width <= 4:
            raise ValueError(f"width = {self.width}: expected a number in (0, 4]; 1 is the paper's")
        names = () if isinstance(self.classes, str) else self.classes  # ("dog") is no tuple
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"classes = {self.classes!r}: expected a tuple of different names, one: ('dog',)"
            )
        if self.size < 1:
            raise ValueError(f"size = {self.size}: expected pixels; 300 is the paper's")
        if len(self.std) != 3 or not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std = {self.std}: expected 3 numbers above 0, of red, green, blue")
        stem = self.stem or (3, 3, 1)
        if len(stem) != 3 or stem[0] % 2 == 0 or min(stem) < 1:
            raise ValueError(f"stem = {stem}: expected (odd kernel, convolutions, stride), all > 0")

    @property
    def num_classes(self) -> int:
        """C, with background."""
        return len(self.classes) + 1

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of dataclasses.asdict; lists (as JSON has them) become tuples."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown Config fields {sorted(unknown)}: from a newer version?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ------------------------------------------------------------------------------- the network


def conv_bn(
    c_in: int,
    c_out: int,
    kernel: int,
    *,
    bn: bool,
    relu: bool = True,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> nn.Sequential:
    """Convolution -> BatchNorm -> ReLU. With BN the convolution has no bias: BN would remove it."""
    padding = kernel // 2 if padding is None else padding
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=not bn)]
    if bn:
        layers.append(nn.BatchNorm2d(c_out))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """3x3, 3x3, and a shortcut; ReLU behind the sum (He et al. 2016, post-activation).

    `shrink`: the first convolution has stride 2 and no padding, so that a 3x3 map becomes 1x1. The
    shortcut then starts at the second pixel, the centre of the first 3x3 window. Only the last
    extra block needs it: with padding, stride 2 leads from 3 to 2 (Deviations in the README).
    """

    expansion = 1  # output channels / those of the 3x3 convolutions

    def __init__(self, c_in: int, c_out: int, *, stride: int, bn: bool, shrink: bool = False):
        super().__init__()
        self.shrink = shrink
        self.conv1 = conv_bn(c_in, c_out, 3, stride=stride, padding=0 if shrink else 1, bn=bn)
        self.conv2 = conv_bn(c_out, c_out, 3, bn=bn, relu=False)
        same = stride == 1 and c_in == c_out
        self.shortcut = (
            nn.Identity() if same else conv_bn(c_in, c_out, 1, stride=stride, bn=bn, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        x = x[:, :, 1:-1, 1:-1] if self.shrink else x
        return F.relu(y + self.shortcut(x), inplace=True)


def channel_rounding(width: float):
    """c -> c * width, up to a multiple of 16: vector units want it, and oneDNN fails on 8."""
    return lambda c: 16 * math.ceil(c * width / 16)


def convs_of(module: nn.Module):
    """Its convolutions, in order."""
    return (m for m in module.modules() if isinstance(m, nn.Conv2d))


def run_extras(extras: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """One map per block. Stops where that of a small test image is less than a window."""
    maps = []
    for block in extras:
        side = min(x.shape[-2:])
        if any(side + 2 * m.padding[0] < m.kernel_size[0] for m in convs_of(block)):
            break
        x = block(x)
        maps.append(x)
    return maps


def conv_extras(c_in: int, how_many: int, ch, *, bn: bool) -> list[nn.Module]:
    """SSD's extra layers: 1x1 to halve the channels, then 3x3 to shrink the map.

    The last two have no padding: 5 -> 3 -> 1. `ch` applies the width.
    """
    blocks = []
    for c_out, stride, padding in [(512, 2, 1), (256, 2, 1), (256, 1, 0), (256, 1, 0)][-how_many:]:
        half = ch(c_out // 2)
        conv3 = conv_bn(half, ch(c_out), 3, stride=stride, padding=padding, bn=bn)
        blocks.append(nn.Sequential(conv_bn(c_in, half, 1, bn=bn), conv3))
        c_in = ch(c_out)
    return blocks


class ResNet(nn.Module):
    """Stem, pooling, four stages, extra blocks: images (N,3,H,W) -> the six maps.

    The maps are the stages of total stride 8 and more; as many extra blocks follow as make six.
    So a stem without stride taps stages 3 and 4 (section 3.2), the classification network's taps
    stages 2, 3 and 4.
    """

    def __init__(self, config: Config, layout: tuple | None = None, block: type = BasicBlock):
        super().__init__()
        depth, stem, pool = layout or BACKBONES[config.backbone]
        kernel, convs, stride = config.stem or stem
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)

        self.stem = nn.Sequential(
            *[
                conv_bn(3 if i == 0 else ch(64), ch(64), kernel, stride=1 if i else stride, bn=bn)
                for i in range(convs)
            ]
        )
        self.pool = nn.MaxPool2d(pool[0], stride=2, padding=pool[1]) if pool else nn.Identity()
        stride *= 2 if pool else 1

        self.stages, self.channels = nn.ModuleList(), []
        c_in = ch(64)
        for i, blocks in enumerate(BLOCKS[depth]):
            c_out, step = ch(64 << i) * block.expansion, 1 if i == 0 else 2
            stage = [block(c_in, c_out, stride=step, bn=bn)]
            stage += [block(c_out, c_out, stride=1, bn=bn) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            c_in, stride = c_out, stride * step
            if stride >= 8:
                self.channels.append(c_out)
        self.first_map = len(self.stages) - len(self.channels)

        how_many = len(MAPS_300) - len(self.channels)
        if config.extras == "conv":
            self.extras = nn.ModuleList(conv_extras(c_in, how_many, ch, bn=bn))
            self.channels += [ch(c) for c in (512, 256, 256, 256)[-how_many:]]
        else:  # section 3.2: residual blocks of 128 channels and stride 2
            c_ins = [c_in] + [ch(128)] * (how_many - 1)
            self.extras = nn.ModuleList(
                BasicBlock(c, ch(128), stride=2, bn=bn, shrink=i == how_many - 1)
                for i, c in enumerate(c_ins)
            )
            self.channels += [ch(128)] * how_many

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.pool(self.stem(x))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i >= self.first_map:
                maps.append(x)
        return maps + run_extras(self.extras, x)


class VGG16(nn.Module):
    """SSD300's VGG-16: fc6 and fc7 as convolutions, no L2 normalisation (section 4.1)."""

    def __init__(self, config: Config):
        super().__init__()
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)
        layers, c_in = [], 3
        for i, (c_out, convs) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
            for _ in range(convs):
                layers.append(conv_bn(c_in, ch(c_out), 3, bn=bn))
                c_in = ch(c_out)
            # ceil_mode: 75 -> 38, as Caffe pools. The fifth pooling keeps the size.
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True) if i < 4 else nn.MaxPool2d(3, 1, 1))
        layers.append(conv_bn(c_in, ch(1024), 3, padding=6, dilation=6, bn=bn))  # fc6
        layers.append(conv_bn(ch(1024), ch(1024), 1, bn=bn))  # fc7
        # ten convolutions and three poolings lead to conv4_3
        self.to_conv4_3 = nn.Sequential(*layers[:13])
        self.to_fc7 = nn.Sequential(*layers[13:])
        self.extras = nn.ModuleList(conv_extras(ch(1024), 4, ch, bn=bn))
        self.channels = [ch(c) for c in (512, 1024, 512, 256, 256, 256)]

    def forward(self, x: Tensor) -> list[Tensor]:
        conv4_3 = self.to_conv4_3(x)  # (N, 512, 38, 38)
        fc7 = self.to_fc7(conv4_3)  # (N, 1024, 19, 19)
        return [conv4_3, fc7, *run_extras(self.extras, fc7)]


def make_body(config: Config) -> nn.Module:
    """The backbone that the config names: images -> maps, of `.channels` channels.

    One whose maps of a 300x300 image are not MAPS_300 has `.maps_300`.
    """
    if config.backbone in BASELINES:
        from experiments import baselines  # here, because it builds on this file

        return baselines.BODIES[config.backbone](config)
    return VGG16(config) if config.backbone == "vgg16" else ResNet(config)


class Head(nn.Module):
    """Two 3x3 convolutions on every map: offsets and class scores of the A priors of each cell.

    With BN, which is what lets the learning rate grow (section 3.1), but no ReLU: scores and
    offsets have both signs.
    """

    def __init__(self, channels: list[int], priors_per_cell: list[int], config: Config):
        super().__init__()
        bn, self.num_classes = config.bn in ("all", "head"), config.num_classes
        self.loc, self.conf = nn.ModuleList(), nn.ModuleList()
        for c, a in zip(channels, priors_per_cell, strict=True):
            self.loc.append(conv_bn(c, a * 4, 3, bn=bn, relu=False))
            self.conf.append(conv_bn(c, a * self.num_classes, 3, bn=bn, relu=False))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        def flatten(x: Tensor, k: int) -> Tensor:  # (N, A*k, H, W) -> (N, H*W*A, k)
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, k)

        # zip stops at the shorter: a small test image has fewer maps
        loc = [flatten(conv(m), 4) for m, conv in zip(maps, self.loc, strict=False)]
        conf = [
            flatten(conv(m), self.num_classes) for m, conv in zip(maps, self.conf, strict=False)
        ]
        return torch.cat(loc, dim=1), torch.cat(conf, dim=1)  # (N, P, 4), (N, P, C)


# ------------------------------------------------------------------- priors and box coding


def make_priors(
    config: Config,
    map_sizes: list[tuple[int, int]] | None = None,
    image_hw: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The default boxes: (P,4) cxcywh in units of the image, not clipped (Caffe PriorBox).

    `map_sizes` [(H, W)] default to those of a 300x300 image, `image_hw` to the config's input. In
    any image the priors keep their sides (times `scale`) and distances in pixels. Order in a
    cell: the small square, the square of side sqrt(smallest * largest), then for each ratio the
    wide and the tall one.
    """
    map_sizes = map_sizes or [(s, s) for s in MAPS_300]
    image_h, image_w = image_hw or (config.size, config.size)
    priors = []
    for (h, w), (small, large, step, ratios) in zip(map_sizes, PRIORS[config.priors], strict=False):
        small, large = small * scale, large * scale
        sides = [(small, small), (math.sqrt(small * large),) * 2]  # (w, h) in pixels
        for ratio in ratios:
            root = math.sqrt(ratio)
            sides += [(small * root, small / root), (small / root, small * root)]
        cx = (torch.arange(w, dtype=torch.float64) + 0.5) * (step or image_w / w)
        cy = (torch.arange(h, dtype=torch.float64) + 0.5) * (step or image_h / h)
        cell = torch.zeros(h, w, len(sides), 4, dtype=torch.float64)  # row, column, prior
        cell[..., 0] = cx[None, :, None]
        cell[..., 1] = cy[:, None, None]
        cell[..., 2:] = torch.tensor(sides, dtype=torch.float64)
        priors.append(cell.reshape(-1, 4))
    unit = torch.tensor([image_w, image_h, image_w, image_h], dtype=torch.float64)
    return (torch.cat(priors) / unit).float()


def priors_per_cell(config: Config) -> list[int]:
    """A of each map."""
    return [2 + 2 * len(ratios) for *_, ratios in PRIORS[config.priors]]


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return torch.cat([boxes_xyxy[..., :2] + size / 2, size], dim=-1)


def log_size(boxes_cxcywh: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (cx, cy, ln w, ln h), in which the coding is linear. (..., 4) -> same."""
    return torch.cat([boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:].log()], dim=-1)


def offset_unit(priors_cxcywh: Tensor) -> Tensor:
    """What an offset of 1 is worth: the prior's (w, h, 1, 1) times the variances. (P,4) -> same."""
    size = priors_cxcywh[..., 2:]
    return torch.cat([size * VARIANCES[0], torch.full_like(size, VARIANCES[1])], dim=-1)


def encode(boxes_xyxy: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """What the network has to say for these boxes: (..., P, 4) on priors (P, 4) -> (..., P, 4).

    Inverse of `decode`. [(gx - px) / pw / .1, ..., ln(gw / pw) / .2, ...] (SSD eq. 2 with Caffe's
    variances).
    """
    offsets = log_size(xyxy_to_cxcywh(boxes_xyxy)) - log_size(priors_cxcywh)
    return offsets / offset_unit(priors_cxcywh)


# ------------------------------------------------------------------------------- the loss


def assign_targets(
    priors_cxcywh: Tensor, boxes_xyxy: Tensor, labels: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """What each prior has to learn: labels (N,P) int64, 0 = background, and offsets (N,P,4).

    priors (P,4); boxes (T,4), labels (T,) of the whole batch; image n owns rows
    offsets[n]:offsets[n+1]. Offsets of background priors are 0 (the loss leaves them out).
    """
    matched = ops.match(cxcywh_to_xyxy(priors_cxcywh), boxes_xyxy, offsets)  # (N, P)
    # A background prior stands for itself, so that its offsets are 0 without another pass.
    t, p = len(boxes_xyxy), len(priors_cxcywh)
    log_priors = log_size(priors_cxcywh)
    table = torch.cat([log_size(xyxy_to_cxcywh(boxes_xyxy)), log_priors])  # (T + P, 4)
    itself = torch.arange(t, t + p, device=matched.device)
    rows = torch.where(matched >= 0, matched, itself)  # (N, P)
    targets = F.embedding(rows, table)  # (N, P, 4); `encode` in place: a third of the time
    targets = targets.sub_(log_priors).div_(offset_unit(priors_cxcywh))
    return F.pad(labels, (0, p)).index_select(0, rows.flatten()).view_as(rows), targets


def multibox_loss(
    loc: Tensor,
    logits: Tensor,
    priors_cxcywh: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    offsets: Tensor,
    *,
    negatives_per_positive: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """SSD's loss (eq. 1; Caffe MultiBoxLoss): (loss_loc, loss_conf, number of positives).

    Smooth L1 of the positive priors' offsets, and cross-entropy of the positive and the hardest
    negative priors, three negatives for each positive *of the same image*; both are summed and
    divided by max(1, positives of the batch). An image without boxes adds nothing.

    Masks of a fixed shape, no indexing by them: nothing waits for the GPU.
    """
    target_labels, target_loc = assign_targets(priors_cxcywh, boxes_xyxy, labels, offsets)
    positive = target_labels > 0  # (N, P)
    total = positive.sum()
    norm = total.clamp(min=1)
    loc = loc.float() * positive[..., None]  # in float32 under autocast, too, as the op's logits
    loss_loc = F.smooth_l1_loss(loc, target_loc, reduction="sum") / norm
    cross_entropy = ops.mined_cross_entropy(logits, target_labels, negatives_per_positive)
    loss_conf = cross_entropy.sum() / norm
    return loss_loc, loss_conf, total


# --------------------------------------------------------------------------- the detector


class ScratchDet(nn.Module):
    """Backbone and head with random weights: images (N,3,H,W), normalised -> loc, logits.

    `priors_cxcywh` (P,4) are the priors of the config's input size. For another size ask
    `features` for the maps and `make_priors` for their priors.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.features = make_body(config)
        channels = self.features.channels
        if len(channels) != len(PRIORS[config.priors]):
            fitting = [name for name, maps in PRIORS.items() if len(maps) == len(channels)]
            raise ValueError(
                f"priors {config.priors!r} are for {len(PRIORS[config.priors])} maps, "
                f"{config.backbone} has {len(channels)}: expected {' or '.join(fitting)}"
            )
        self.head = Head(channels, priors_per_cell(config), config)
        for conv in convs_of(self):  # Caffe's xavier: variance 1 / fan_in
            bound = math.sqrt(3 / conv.weight[0].numel())
            nn.init.uniform_(conv.weight, -bound, bound)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

        sizes = self.map_sizes(config.size, config.size)
        if len(sizes) < len(channels):
            raise ValueError(
                f"size = {config.size}: {config.backbone} makes {len(sizes)} maps of such an "
                f"image, not {len(channels)}. Choose a larger one: 300 is the paper's"
            )
        expected = getattr(self.features, "maps_300", MAPS_300)
        if config.size == 300 and sizes != [(s, s) for s in expected]:
            raise ValueError(
                f"{config.backbone} with stem {config.stem}: maps {sizes}, not {expected}"
            )
        priors = make_priors(config, sizes)
        if config.size == 300 and expected == MAPS_300 and len(priors) != 8732:
            raise ValueError(f"priors {config.priors!r}: {len(priors)} default boxes, not 8732")
        self.register_buffer("priors_cxcywh", priors, persistent=False)
        self.priors_of_size: dict[int, Tensor] = {}

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H, W) of each map of such an image; on the meta device, so nothing is computed."""
        body = copy.deepcopy(self.features).to("meta").eval()
        maps = body(torch.empty(1, 3, height, width, device="meta"))
        return [tuple(m.shape[-2:]) for m in maps]

    def priors_at(self, size: int) -> Tensor:
        """The priors of square images of another size: as large a part of the image as ever."""
        if size == self.config.size:
            return self.priors_cxcywh
        if size not in self.priors_of_size:
            maps, scale = self.map_sizes(size, size), size / self.config.size
            priors = make_priors(self.config, maps, (size, size), scale)
            self.priors_of_size[size] = priors.to(self.priors_cxcywh.device)
        return self.priors_of_size[size]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.features(images))  # (N, P, 4), (N, P, C)


# loc (N,P,4), logits (N,P,C), priors -> boxes (N,D,4) xyxy, scores (N,D), labels (N,D), count (N,):
# softmax; of each class the best 400 above 0.01, NMS; the best 200 of all (Caffe DetectionOutput).
detect = ops.postprocess


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[ScratchDet, dict]:
    """A checkpoint of train.py -> (the network in evaluation mode, the whole checkpoint).

    Takes the averaged weights where there are any. Only tensors and plain data are read: a
    checkpoint cannot run code. Its checksums are verified, which torch.load does not do.
    """
    try:
        with zipfile.ZipFile(path) as file:
            # torch stores plain files: a bomb packs them, a flipped bit makes folders of them
            odd = [e.filename for e in file.infolist() if e.compress_type or e.external_attr]
            bad = odd[0] if odd else file.testzip()
            if bad:
                raise zipfile.BadZipFile(f"{bad} is not what was written")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model = ScratchDet(Config.from_dict(checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; `python train.py` writes one") from None
    except Exception as e:  # whatever torch raises on bytes from anywhere
        why = " ".join(str(e).split()) or type(e).__name__
        if "loading state_dict" in why:  # the file is whole
            raise ValueError(
                f"{path}: of another network than this code's ({why[:250]}). Commit "
                f"{checkpoint.get('commit')} wrote it: take its code, or train again"
            ) from None
        raise ValueError(
            f"{path}: not a checkpoint of train.py, or damaged ({why[:150]}). Expected a file such "
            "as runs/NAME/last.pt; runs/NAME/previous.pt is the one before it"
        ) from None
    return model.eval(), checkpoint


def count_macs(model: ScratchDet) -> int:
    """Multiplications of one image's forward pass, in the convolutions."""
    macs, size = 0, model.config.size

    def count(conv: nn.Conv2d, _, out: Tensor):
        nonlocal macs
        macs += out.numel() * conv.weight[0].numel()

    meta = copy.deepcopy(model).to("meta").eval()
    for conv in convs_of(meta):
        conv.register_forward_hook(count)
    meta(torch.empty(1, 3, size, size, device="meta"))
    return macs


def summary(model: ScratchDet) -> str:
    """The network as a table: each map's size, channels and priors; parameters and MACs."""
    config = model.config
    sizes = model.map_sizes(config.size, config.size)
    lines = [
        f"{config.backbone}, BN {config.bn}, width {config.width:g}, "
        f"{config.size}x{config.size}, {config.num_classes} classes with background",
        "map      size  channels  priors a cell  priors  sides in pixels",
    ]
    priors = priors_per_cell(config), PRIORS[config.priors]
    rows = zip(sizes, model.features.channels, *priors, strict=True)
    for i, ((h, w), c, a, (small, large, *_)) in enumerate(rows, 1):
        side = f"{small}, {math.sqrt(small * large):.1f}"
        lines.append(f"{i:<5}{f'{h}x{w}':>8}{c:>10}{a:>15}{h * w * a:>8}  {side}")
    parameters = sum(p.numel() for p in model.parameters())
    lines.append(f"{len(model.priors_cxcywh):,} priors")
    lines.append(f"{parameters:,} parameters, {count_macs(model) / 1e9:.2f} GMACs")
    return "\n".join(lines)


def add_config_flags(group: argparse._ActionsContainer) -> None:
    """The flags that define the network, for this file and train.py."""
    default = Config()
    group.add_argument(
        "--backbone", default=default.backbone, choices=[*BACKBONES, *BASELINES],
        help="root-: no stride in the first convolutions; the last ten: experiments/baselines.py",
    )  # fmt: skip
    group.add_argument(
        "--bn", default=default.bn, choices=["all", "backbone", "head", "none"],
        help="which part has BatchNorm",
    )  # fmt: skip
    group.add_argument("--width", type=float, default=default.width, help="factor on all channels")
    group.add_argument(
        "--stem", type=int, nargs=3, metavar=("KERNEL", "CONVS", "STRIDE"),
        help="the first convolutions, where they differ from the backbone's own",
    )  # fmt: skip
    group.add_argument(
        "--extras", default=default.extras, choices=["residual", "conv"],
        help="the layers of the small maps: blocks of two 3x3, or SSD's 1x1 and 3x3",
    )  # fmt: skip
    group.add_argument(
        "--priors", default=default.priors, choices=list(PRIORS), help="their sides and ratios"
    )
    group.add_argument("--size", type=int, default=default.size, help="side of the input in pixels")
    group.add_argument(
        "--std", type=float, nargs=3, default=default.std, metavar=("R", "G", "B"),
        help="of the input, which is divided by it; matters only to a network without BN",
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Print the network.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_config_flags(parser)
    args = parser.parse_args()
    try:
        print(summary(ScratchDet(Config.from_dict(vars(args)))))
    except ValueError as e:
        parser.error(str(e))
