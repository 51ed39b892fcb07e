"""ScratchDet300: a single-shot object detector that trains from random weights.

    image (N,3,300,300)
      -> root (N,64,300,300) -> pool (N,64,150,150)              no stride: small objects survive
      -> stages 64@150, 128@75, 256@38*, 512@19*                 * = the six maps that predict
      -> extras 128@10*, 128@5*, 128@3*, 128@1*
      -> head, on every map: box codes (N,A*4,H,W) and class scores (N,A*C,H,W)
      -> loc (N,P,4), logits (N,P,C)                             ScratchDet.forward

    training:  loc, logits, priors, boxes -> loss                multibox_loss
    testing:   loc, logits, priors -> boxes, scores, labels      detect

Letters, here and everywhere: N images - P priors (8732) - C classes with background (21 for VOC) -
A priors per cell - G boxes of one image - T boxes of a batch - D detections of an image at most.
Boxes are float32 in units of the image; priors and decoded boxes may lie partly outside [0, 1]. The
name of a tensor says its format: `_xyxy` is (left, top, right, bottom), `_cxcywh` is (centre x,
centre y, width, height). `loc` is the box code: four numbers that move a prior onto an object.

The head, the priors and the loss share one memory order: map, row, column, prior of the cell.

`python scratchdet.py [--backbone NAME] [--bn MODE] [--width W]` prints the network as a table.

Papers: ScratchDet, Zhu et al., CVPR 2019. SSD, Liu et al., ECCV 2016. "Caffe SSD" is the reference
code of SSD (weiliu89/caffe, branch ssd), which ScratchDet's own code builds on.
"""

import argparse
import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ops.reference import VARIANCES
from plumbing.checkpoint import of_this_code, read_checkpoint
from plumbing.network import (
    check_config,
    check_maps,
    check_priors,
    ignored_options,
    network_table,
)
from plumbing.program import Help, SetFields
from plumbing.voc import VOC_CLASSES

# Priors, one row per map: smallest and largest side in percent of the image, distance between two
# cells in pixels (None: the image's side / the map's), aspect ratios other than 1 (each also
# inverted). A checkpoint holds the table's name: for other priors add a table, never edit one.
# From Caffe SSD: ssd_pascal.py and ssd_coco.py.
PRIORS = {
    "voc": (
        (10, 20, 8, (2,)),
        (20, 37, 16, (2, 3)),
        (37, 54, 32, (2, 3)),
        (54, 71, 64, (2, 3)),
        (71, 88, None, (2,)),
        (88, 105, None, (2,)),
    ),
    "coco": (  # smaller, because COCO's objects are smaller
        (7, 15, 8, (2,)),
        (15, 33, 16, (2, 3)),
        (33, 51, 32, (2, 3)),
        (51, 69, 64, (2, 3)),
        (69, 87, None, (2,)),
        (87, 105, None, (2,)),
    ),
}
MAPS_300 = (38, 19, 10, 5, 3, 1)  # sides of the six maps of a 300x300 image


@dataclass(frozen=True)
class Config:
    """All that defines the network and its input, as plain data that every checkpoint holds."""

    backbone: str = "root-resnet34"  # a name in BODIES
    bn: str = "all"  # where BatchNorm is: all | backbone | head | none (Table 1)
    width: float = 1.0  # factor on all channels but the head's, rounded up to a multiple of 16
    stem: tuple[int, int, int] | None = None  # (kernel, how many, stride) of Table 2; None: as is
    extras: str = "residual"  # maps 3 to 6: residual blocks, or "conv", the layers of SSD
    l2_norm: bool = False  # normalise conv4_3 of VGG-16, as the original SSD does
    head_bn_eps: float = 1e-5  # of BatchNorm in the head; Caffe SSD and DSOD have 1e-3
    head_gamma: float = 1.0  # the factor of BatchNorm in the head before training
    classes: tuple[str, ...] = VOC_CLASSES  # without background, which is class 0
    priors: str = "voc"  # a name in PRIORS
    size: int = 300  # side of the square input in pixels
    channels: str = "rgb"  # order of the network's input: rgb | bgr
    mean: tuple[float, float, float] = (123.0, 117.0, 104.0)  # of red, green, blue in 0..255
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # input = (pixel - mean) / std

    def __post_init__(self):
        check_config(self, BODIES, PRIORS, TAKES)

    @property
    def num_classes(self) -> int:
        """C, with background."""
        return len(self.classes) + 1

    @property
    def body_bn(self) -> bool:
        """Whether the backbone has BatchNorm."""
        return self.bn in ("all", "backbone")

    @property
    def head_bn(self) -> bool:
        """Whether the head has BatchNorm."""
        return self.bn in ("all", "head")

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of dataclasses.asdict; lists (as JSON has them) become tuples."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown Config fields {sorted(unknown)}: from a newer version?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ------------------------------------------------------------------------- the backbones


def conv_bn(
    c_in: int, c_out: int, kernel: int, *, bn: bool, relu: bool = True,
    stride: int = 1, padding: int | None = None, dilation: int = 1, eps: float = 1e-5,
) -> nn.Sequential:  # fmt: skip
    """Convolution -> BatchNorm -> ReLU. With BN the convolution has no bias: BN would remove it."""
    padding = kernel // 2 if padding is None else padding
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=not bn)]
    if bn:
        layers.append(nn.BatchNorm2d(c_out, eps))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """3x3, 3x3, and a shortcut; ReLU after the sum (He et al. 2016, post-activation).

    `shrink` is for the last extra block, which turns a 3x3 map into 1x1. Its first convolution has
    stride 2 and no padding: with padding, stride 2 would lead from 3 to 2. The shortcut starts at
    the second pixel, which is the centre of the first 3x3 window.
    """

    expansion = 1  # output channels / channels of the 3x3 convolutions

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
    """c -> c * width, rounded up to a multiple of 16: fast in vector units; oneDNN fails on 8."""
    return lambda c: 16 * math.ceil(c * width / 16)


def convs_of(module: nn.Module):
    """All convolutions inside a module, in order."""
    return (m for m in module.modules() if isinstance(m, nn.Conv2d))


def conv_extras(c_in: int, how_many: int, ch, *, bn: bool) -> list[nn.Module]:
    """The extra layers of SSD: 1x1 to half of the output channels, then 3x3 to shrink the map.

    The last two have no padding: 5 -> 3 -> 1. `ch` applies the width.
    """
    blocks = []
    for c_out, stride, padding in [(512, 2, 1), (256, 2, 1), (256, 1, 0), (256, 1, 0)][-how_many:]:
        half = ch(c_out // 2)
        conv3 = conv_bn(half, ch(c_out), 3, stride=stride, padding=padding, bn=bn)
        blocks.append(nn.Sequential(conv_bn(c_in, half, 1, bn=bn), conv3))
        c_in = ch(c_out)
    return blocks


def run_extras(extras: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """One map per block. Stops where the map of a small image is smaller than the next kernel."""
    maps = []
    for block in extras:
        side = min(x.shape[-2:])
        if any(side + 2 * m.padding[0] < m.kernel_size[0] for m in convs_of(block)):
            break
        x = block(x)
        maps.append(x)
    return maps


class Layout(NamedTuple):
    """What distinguishes the ResNets of section 3.2."""

    blocks: tuple[int, int, int, int]  # residual blocks in each of the four stages
    stem: tuple[int, int, int]  # first convolutions: kernel, how many, stride of the first
    pool: tuple[int, int] | None  # max-pooling with stride 2: kernel, padding


RESNETS = {
    "root-resnet18": Layout((2, 2, 2, 2), stem=(3, 3, 1), pool=(2, 0)),  # three 3x3, no stride
    "root-resnet34": Layout((3, 4, 6, 3), stem=(3, 3, 1), pool=(2, 0)),
    "resnet18": Layout((2, 2, 2, 2), stem=(7, 1, 2), pool=(3, 1)),  # Fig. 3 (a), as on ImageNet
    "resnet34": Layout((3, 4, 6, 3), stem=(7, 1, 2), pool=(3, 1)),
    "resnet18-a": Layout((2, 2, 2, 2), stem=(7, 1, 2), pool=None),  # Fig. 3 (b), no pooling
    "resnet18-b": Layout((2, 2, 2, 2), stem=(7, 1, 1), pool=(3, 1)),  # Fig. 3 (c), no stride
}


class ResNet(nn.Module):
    """Stem, pooling, four stages, extra blocks: images (N,3,H,W) -> six maps.

    Every stage of total stride 8 or more gives a map, and extra blocks bring the number to six: if
    stem and pooling halve the image once, stages 3 and 4 (section 3.2) and four extra blocks; if
    they halve it twice, stages 2, 3 and 4 and three.
    """

    block = BasicBlock

    def __init__(self, config: Config):
        super().__init__()
        blocks, stem, pool = RESNETS[config.backbone]
        kernel, convs, stride = config.stem or stem
        bn, ch = config.body_bn, channel_rounding(config.width)

        c_in = 3
        self.stem = nn.Sequential()
        for i in range(convs):
            self.stem.append(conv_bn(c_in, ch(64), kernel, stride=1 if i else stride, bn=bn))
            c_in = ch(64)
        self.pool = nn.MaxPool2d(pool[0], stride=2, padding=pool[1]) if pool else nn.Identity()
        stride *= 2 if pool else 1  # from here on: the total stride, image to this layer

        self.stages, self.channels = nn.ModuleList(), []
        for i, how_many in enumerate(blocks):
            c_out, step = ch(64 << i) * self.block.expansion, 1 if i == 0 else 2
            stage = [self.block(c_in, c_out, stride=step, bn=bn)]
            stage += [self.block(c_out, c_out, stride=1, bn=bn) for _ in range(how_many - 1)]
            self.stages.append(nn.Sequential(*stage))
            c_in, stride = c_out, stride * step
            if stride >= 8:
                self.channels.append(c_out)
        self.first_map = len(self.stages) - len(self.channels)

        missing = len(MAPS_300) - len(self.channels)
        if config.extras == "conv":
            self.extras = nn.ModuleList(conv_extras(c_in, missing, ch, bn=bn))
            self.channels += [ch(c) for c in (512, 256, 256, 256)[-missing:]]
        else:  # section 3.2: residual blocks of 128 channels and stride 2
            self.extras = nn.ModuleList()
            for i in range(missing):
                last = i == missing - 1
                self.extras.append(BasicBlock(c_in, ch(128), stride=2, bn=bn, shrink=last))
                c_in = ch(128)
            self.channels += [ch(128)] * missing

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.pool(self.stem(x))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i >= self.first_map:
                maps.append(x)
        return maps + run_extras(self.extras, x)


class L2Norm(nn.Module):
    """Scales the channels of each pixel to length 20; per channel the 20 is then learned (SSD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.normalize(x, dim=1, eps=1e-10)


class VGG16(nn.Module):
    """The VGG-16 of SSD300: fc6 and fc7 are convolutions. No L2 norm by default (section 4.1)."""

    def __init__(self, config: Config):
        super().__init__()
        bn, ch = config.body_bn, channel_rounding(config.width)
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
        self.norm = L2Norm(ch(512)) if config.l2_norm else nn.Identity()
        self.extras = nn.ModuleList(conv_extras(ch(1024), 4, ch, bn=bn))
        self.channels = [ch(c) for c in (512, 1024, 512, 256, 256, 256)]

    def forward(self, x: Tensor) -> list[Tensor]:
        conv4_3 = self.to_conv4_3(x)  # (N, 512, 38, 38)
        fc7 = self.to_fc7(conv4_3)  # (N, 1024, 19, 19)
        return [self.norm(conv4_3), fc7, *run_extras(self.extras, fc7)]


# The backbones: BODIES[name](config) is a module that turns images into maps of `.channels`
# channels. It has `.maps_300` if its maps of a 300x300 image are not MAPS_300, and `.head_kernels`
# if its head is not 3x3. The networks that the paper compares with add themselves to this table:
# experiments/baselines.py. For a backbone of your own, add an entry.
BODIES = {name: ResNet for name in RESNETS} | {"vgg16": VGG16}
# Options that only some backbones have. Config refuses an option that would have no effect.
TAKES = {name: ("stem", "extras") for name in RESNETS} | {"vgg16": ("l2_norm",)}


# ------------------------------------------------------------------------------ the head


class Head(nn.Module):
    """Two convolutions on every map: box codes and class scores of the A priors of each cell.

    BatchNorm here is part of what allows the larger learning rate (section 3.1). There is no ReLU:
    scores and codes have both signs.
    """

    def __init__(self, body: nn.Module, config: Config):
        super().__init__()
        how = {"bn": config.head_bn, "eps": config.head_bn_eps, "relu": False}
        self.num_classes = config.num_classes
        self.loc, self.conf = nn.ModuleList(), nn.ModuleList()
        kernels = getattr(body, "head_kernels", [3] * len(body.channels))
        for c, a, k in zip(body.channels, priors_per_cell(config), kernels, strict=True):
            self.loc.append(conv_bn(c, a * 4, k, **how))
            self.conf.append(conv_bn(c, a * self.num_classes, k, **how))
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.constant_(norm.weight, config.head_gamma)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        def flatten(x: Tensor, k: int) -> Tensor:  # (N, A*k, H, W) -> (N, H*W*A, k)
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, k)

        loc, conf = [], []
        # a small image has fewer maps than the head has layers: zip stops there
        for m, to_loc, to_conf in zip(maps, self.loc, self.conf, strict=False):
            loc.append(flatten(to_loc(m), 4))
            conf.append(flatten(to_conf(m), self.num_classes))
        return torch.cat(loc, dim=1), torch.cat(conf, dim=1)  # (N, P, 4), (N, P, C)


# ------------------------------------------------------------------- priors and box coding


def priors_per_cell(config: Config) -> list[int]:
    """A, the number of priors in each cell, for each of the maps."""
    return [2 + 2 * len(ratios) for *_, ratios in PRIORS[config.priors]]


def make_priors(
    config: Config, map_sizes: list[tuple[int, int]] | None = None,
    image_hw: tuple[int, int] | None = None, *, same_fraction: bool = False,
) -> Tensor:  # fmt: skip
    """The default boxes: (P,4) cxcywh in units of the image, not clipped (Caffe PriorBox).

    `map_sizes` [(H, W)] default to those of a 300x300 image, `image_hw` to the input of the config.
    In an image of another size the priors keep their sides in pixels: enlarged, a small object fits
    them (multi-scale testing). With `same_fraction` they keep their fraction of the image instead
    (training with --sizes). Cells are `step` pixels apart, or without it divide the image evenly.

    Order in a cell: the small square, the square of side sqrt(smallest * largest), then for each
    ratio the wide and the tall one.
    """
    map_sizes = map_sizes or [(s, s) for s in MAPS_300]
    image_h, image_w = image_hw or (config.size, config.size)
    unit = torch.tensor([image_w, image_h], dtype=torch.float64)
    side_unit = torch.full_like(unit, 100) if same_fraction else 100 * unit / config.size
    priors = []
    for (h, w), (small, large, step, ratios) in zip(map_sizes, PRIORS[config.priors], strict=False):
        sides = [(small, small), (math.sqrt(small * large),) * 2]  # (w, h) in percent
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
    return (torch.cat(priors) / torch.cat([unit, side_unit])).float()


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return torch.cat([boxes_xyxy[..., :2] + size / 2, size], dim=-1)


def with_log_size(boxes_cxcywh: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (cx, cy, ln w, ln h): then coding is a difference. (..., 4) -> (..., 4)."""
    return torch.cat([boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:].log()], dim=-1)


def subtract_priors(boxes_log: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """The box code, in place: (..., P, 4) from `with_log_size`, priors (P,4) -> (..., P, 4).

    [(gx - px) / pw / .1, ..., ln(gw / pw) / .2, ...]: SSD eq. 2 with the variances of Caffe SSD.
    """
    size = priors_cxcywh[..., 2:]
    unit = torch.cat([size * VARIANCES[0], torch.full_like(size, VARIANCES[1])], dim=-1)
    return boxes_log.sub_(with_log_size(priors_cxcywh)).div_(unit)


def encode(boxes_xyxy: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """The box codes of boxes, relative to their priors: (..., P, 4), priors (P,4) -> (..., P, 4).

    The inverse of `decode` (ops/reference.py).
    """
    return subtract_priors(with_log_size(xyxy_to_cxcywh(boxes_xyxy)), priors_cxcywh)


# ------------------------------------------------------------------------------- the loss


def assign_targets(
    priors_cxcywh: Tensor, boxes_xyxy: Tensor, labels: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """What each prior has to learn: labels (N,P) int64, 0 = background, and box codes (N,P,4).

    priors (P,4); boxes (T,4) and labels (T,) of the whole batch, of which image n owns the rows
    offsets[n]:offsets[n+1]. The code of a background prior is 0, and the loss ignores it.
    """
    # The row of the matched box, or -1: ops/reference.py, where boxes compete for priors.
    matched = ops.match(cxcywh_to_xyxy(priors_cxcywh), boxes_xyxy, offsets)  # (N, P)
    # One table of all boxes and all priors. A background prior picks itself, so its code is 0. The
    # table has T + P rows: the logarithms take a tenth of the time that those of N * P would.
    t, p = len(boxes_xyxy), len(priors_cxcywh)
    boxes_cxcywh = torch.cat([xyxy_to_cxcywh(boxes_xyxy), priors_cxcywh])
    itself = torch.arange(t, t + p, device=matched.device)
    rows = torch.where(matched >= 0, matched, itself)  # (N, P)
    codes = subtract_priors(F.embedding(rows, with_log_size(boxes_cxcywh)), priors_cxcywh)
    target_labels = F.pad(labels, (0, p)).index_select(0, rows.flatten()).view_as(rows)
    return target_labels, codes  # (N, P), (N, P, 4)


def multibox_loss(
    loc: Tensor, logits: Tensor, priors_cxcywh: Tensor,
    boxes_xyxy: Tensor, labels: Tensor, offsets: Tensor, *, negatives_per_positive: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of SSD (eq. 1; Caffe MultiBoxLoss): (loss_loc, loss_conf, number of positives).

    loss_loc is the smooth L1 of the positive priors' box codes. loss_conf is the cross-entropy of
    the positive priors and of the hardest negative ones, three for each positive *of the same
    image*. Both are sums, divided by max(1, positives of the batch). An image without boxes adds 0.

    The masks are used as factors, not as indices: all shapes are known, so the CPU need not wait
    for the GPU.
    """
    target_labels, target_loc = assign_targets(priors_cxcywh, boxes_xyxy, labels, offsets)
    positive = target_labels > 0  # (N, P)
    total = positive.sum()
    norm = total.clamp(min=1)
    # in float32 even under autocast; 0 for background, where the target is 0 as well
    loc = loc.float() * positive[..., None]
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
        self.features = BODIES[config.backbone](config)
        check_priors(config, len(self.features.channels), PRIORS)
        self.head = Head(self.features, config)
        for conv in convs_of(self):  # Caffe's xavier: uniform with variance 1 / fan_in
            bound = math.sqrt(3 / conv.weight[0].numel())
            nn.init.uniform_(conv.weight, -bound, bound)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

        sizes = self.map_sizes(config.size, config.size)
        check_maps(config, sizes, self.features, MAPS_300)
        # a buffer moves to the GPU with the network; it is not saved, since it follows from config
        self.register_buffer("priors_cxcywh", make_priors(config, sizes), persistent=False)
        self.priors_of_size: dict[int, Tensor] = {}  # of other sizes, see priors_at

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H, W) of each map for an image of this size. On the meta device nothing is computed."""
        body = copy.deepcopy(self.features).to("meta").eval()
        maps = body(torch.empty(1, 3, height, width, device="meta"))
        return [tuple(m.shape[-2:]) for m in maps]

    def priors_at(self, size: int) -> Tensor:
        """The priors for training on size x size images: always the same fractions of the image."""
        if size == self.config.size:
            return self.priors_cxcywh
        if size not in self.priors_of_size:
            maps = self.map_sizes(size, size)
            priors = make_priors(self.config, maps, (size, size), same_fraction=True)
            self.priors_of_size[size] = priors.to(self.priors_cxcywh.device)
        return self.priors_of_size[size]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.features(images))  # (N, P, 4), (N, P, C)


# loc (N,P,4), logits (N,P,C), priors -> boxes (N,D,4) xyxy, scores (N,D), labels (N,D), count (N,):
# softmax; per class the best 400 above 0.01, then NMS; the best 200 of all (Caffe DetectionOutput).
detect = ops.postprocess


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> tuple[ScratchDet, dict]:
    """A checkpoint -> (the network in evaluation mode, the whole checkpoint).

    Where a checkpoint of an older version has averaged weights ("ema"), those are used.
    """
    checkpoint = read_checkpoint(path, device)
    with of_this_code(path, checkpoint):
        values = dict(checkpoint["config"])
        for name in ignored_options(values, Config, TAKES):
            del values[name]  # older versions accepted it, without effect
        model = ScratchDet(Config.from_dict(values))
        model.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    return model.to(device).eval(), checkpoint


# ------------------------------------------------- to look at the network, and its flags


def summary(model: ScratchDet) -> str:
    """The network as a table: size, channels and priors of each map; parameters and MACs."""
    return network_table(model, priors_per_cell(model.config), PRIORS[model.config.priors])


def add_config_flags(group: argparse._ActionsContainer) -> None:
    """The flags that define the network, here and in train.py. Each is a field of Config.

    A new field of Config is a flag at once: `--config FIELD=VALUE`.
    """
    defaults = {field.name: field.default for field in fields(Config) if field.name != "classes"}
    group.set_defaults(**defaults)
    add = group.add_argument
    # fmt: off
    add("--backbone", choices=list(BODIES), help="root-...: no stride in the first convolutions")
    add("--bn", choices=["all", "backbone", "head", "none"], help="which part has BatchNorm")
    add("--width", type=float, help="factor on all channels")
    add("--size", type=int, help="side of the input in pixels")
    add("--config", nargs="+", action=SetFields, const=list(defaults), metavar="FIELD=VALUE",
        help="any field of Config, such as stem=3,1,1 extras=conv priors=coco std=58,58,58")
    # fmt: on


def main(argv: list[str] | None = None) -> None:
    """Print the network that the flags describe."""
    parser = argparse.ArgumentParser(description="Print the network.", formatter_class=Help)
    add_config_flags(parser)
    try:
        print(summary(ScratchDet(Config.from_dict(vars(parser.parse_args(argv))))))
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
