"""The networks that ScratchDet is compared with. Importing this file adds them to BODIES.

Not needed to understand scratchdet.py. Each network takes the Config's `bn` and `width`.

    python -m experiments.baselines --backbone dsod300
    python -m experiments.baselines --backbone scratchdet512 --size 512 --config priors=coco512
    python -m experiments.baselines --backbone ssd321 --size 321 --config priors=voc321

What is known about the originals, and where these networks differ: docs/deviations.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scratchdet
from scratchdet import (
    BasicBlock,
    Config,
    L2Norm,
    Layout,
    ResNet,
    channel_rounding,
    conv_bn,
    run_extras,
)

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def in_percent(size: int, *rows: tuple) -> tuple:
    """Rows of a table of priors, sides in pixels of an image of that size -> in percent."""
    return tuple((100 * small / size, 100 * large / size, *more) for small, large, *more in rows)


# Priors for other input sizes than 300, one row per map, as in scratchdet.PRIORS.
scratchdet.PRIORS |= {
    "coco512": in_percent(  # scratchdet512, from its released configuration
        512,
        (20, 51, 8, (2,)),
        (51, 133, 16, (2, 3)),
        (133, 215, 32, (2, 3)),
        (215, 296, 64, (2, 3)),
        (296, 378, None, (2, 3)),
        (378, 460, None, (2,)),
        (460, 542, None, (2,)),
    ),
    "voc321": in_percent(  # ssd321: sides and ratios of the DSSD code
        321,
        (32, 64, 8, (1.6, 2, 3)),
        (64, 121, 16, (1.6, 2, 3)),
        (121, 179, 32, (1.6, 2, 3)),
        (179, 237, 64, (1.6, 2, 3)),
        (237, 295, None, (1.6, 2, 3)),
        (295, 353, None, (1.6, 2, 3)),
    ),
}

# ------------------------------------------------------------------------------ ResNet-50 and -101


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut (He et al. 2016); the stride in the 3x3, as torchvision's."""

    expansion = 4

    def __init__(self, c_in: int, c_out: int, *, stride: int, bn: bool):
        super().__init__()
        mid = c_out // self.expansion
        self.conv1 = conv_bn(c_in, mid, 1, bn=bn)
        self.conv2 = conv_bn(mid, mid, 3, stride=stride, bn=bn)
        self.conv3 = conv_bn(mid, c_out, 1, bn=bn, relu=False)
        same = stride == 1 and c_in == c_out
        self.shortcut = (
            nn.Identity() if same else conv_bn(c_in, c_out, 1, stride=stride, bn=bn, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x)))
        return F.relu(y + self.shortcut(x), inplace=True)


class BottleneckResNet(ResNet):
    block = Bottleneck


# ------------------------------------------------------------------------------ SSD321


class ResBody(nn.Module):
    """A bottleneck of the DSSD code: `kernel` and `stride` belong to its first convolution.

    The maps of SSD321 shrink by windows of 2x2 or 3x3 there, without padding.
    """

    def __init__(
        self, c_in: int, mid: int, c_out: int, *, bn: bool, kernel: int = 1, stride: int = 1,
        dilation: int = 1, shortcut: bool = True,
    ):  # fmt: skip
        super().__init__()
        window = {"stride": stride, "padding": 0, "bn": bn}
        self.branch = nn.Sequential(
            conv_bn(c_in, mid, kernel, **window),
            conv_bn(mid, mid, 3, padding=dilation, dilation=dilation, bn=bn),
            conv_bn(mid, c_out, 1, bn=bn, relu=False),
        )
        convolution = conv_bn(c_in, c_out, kernel, relu=False, **window) if shortcut else None
        self.shortcut = convolution or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


class SSD321(nn.Module):
    """The SSD321 of the DSSD paper: ResNet-101 whose conv5 is dilated, not strided.

    Maps 40, 20, 10, 5, 3, 1; 17,080 priors. A block before each head (prediction module (c)), 5x5
    heads on the first two maps. Its released script has no BatchNorm in the head: `bn` "backbone".
    """

    head_kernels = (5, 5, 3, 3, 3, 3)

    def __init__(self, config: Config):
        super().__init__()
        bn, ch = config.body_bn, channel_rounding(config.width)
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.stem = nn.Sequential(conv_bn(3, ch(64), 7, stride=2, bn=bn), pool)
        self.stages, c_in = nn.ModuleList(), ch(64)
        for i, blocks in enumerate(BLOCKS[101]):
            mid, stage = ch(64 << i), nn.Sequential()
            for k in range(blocks):
                stride = 2 if k == 0 and i in (1, 2) else 1
                how = {"stride": stride, "dilation": 2 if i == 3 else 1, "shortcut": k == 0}
                stage.append(ResBody(c_in, mid, mid * 4, bn=bn, **how))
                c_in = mid * 4
            self.stages.append(stage)
        mid, wide = ch(256), ch(1024)
        self.extras = nn.ModuleList(
            ResBody(c, mid, wide, kernel=kernel, stride=stride, bn=bn)
            for c, kernel, stride in ((c_in, 2, 2), (wide, 2, 2), (wide, 3, 1), (wide, 3, 1))
        )
        self.before_heads = nn.ModuleList(
            ResBody(c, mid, wide, bn=bn) for c in (ch(128) * 4, c_in, *[wide] * 4)
        )
        self.channels = [wide] * 6

    def forward(self, x: Tensor) -> list[Tensor]:
        conv3 = self.stages[1](self.stages[0](self.stem(x)))  # (N, 512, 40, 40)
        conv5 = self.stages[3](self.stages[2](conv3))  # (N, 2048, 20, 20)
        maps = [conv3, conv5, *run_extras(self.extras, conv5)]
        return [block(m) for block, m in zip(self.before_heads, maps, strict=False)]


# ------------------------------------------------------------------------------ pre-activation


def bn_relu_conv(c_in: int, c_out: int, kernel: int, *, bn: bool, stride: int = 1) -> nn.Sequential:
    """BatchNorm -> ReLU -> convolution, which has a bias only where there is no BN at all."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=not bn)
    # not in place without BN: the input is still needed beside this branch
    return nn.Sequential(*[nn.BatchNorm2d(c_in)] * bn, nn.ReLU(inplace=bn), conv)


class PreActBlock(nn.Module):
    """BN-ReLU-3x3, BN-ReLU-3x3, added to the shortcut; nothing behind the sum.

    Where the size changes the shortcut is a 1x1 convolution, without BN, of the activated input.
    `first`: the input is activated already. `shrink` as in BasicBlock. Returns (sum, branch).
    """

    def __init__(
        self, c_in: int, c_out: int, *, stride: int, bn: bool, first: bool = False,
        shrink: bool = False,
    ):  # fmt: skip
        super().__init__()
        norm = [nn.BatchNorm2d(c_in)] * bn + [nn.ReLU()]
        self.activate = nn.Identity() if first else nn.Sequential(*norm)
        padding, self.shrink = 0 if shrink else 1, shrink
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding, bias=not bn)
        self.conv2 = bn_relu_conv(c_out, c_out, 3, bn=bn)
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = self.activate(x)
        branch = self.conv2(self.conv1(active))
        if self.shortcut is not None:
            x = self.shortcut(active[:, :, 1:-1, 1:-1] if self.shrink else active)
        return x + branch, branch


class PreActResNet(nn.Module):
    """Root-ResNet of the released code: pre-activation (He et al. 2016, "Identity mappings").

    The heads see BN-ReLU of the sum of a stage. In CaffeCompat they see what the released network
    definition names: the branch of the stage's last block before the sum, without BN or ReLU.
    """

    caffe_compat = False

    def __init__(self, config: Config):
        super().__init__()
        bn, ch, caffe_compat = config.body_bn, channel_rounding(config.width), self.caffe_compat
        self.stem = nn.Sequential(
            *[conv_bn(ch(64) if i else 3, ch(64), 3, bn=bn) for i in range(3)], nn.MaxPool2d(2, 2)
        )
        self.stages, c_in = nn.ModuleList(), ch(64)
        for i, blocks in enumerate(BLOCKS[18 if "18" in config.backbone else 34]):
            c_out = ch(64 << i)
            stage = [PreActBlock(c_in, c_out, stride=2 if i else 1, bn=bn, first=i == 0)]
            stage += [PreActBlock(c_out, c_out, stride=1, bn=bn) for _ in range(blocks - 1)]
            self.stages.append(nn.ModuleList(stage))
            c_in = c_out
        for stride in (2, 2, 1, 1) if caffe_compat else (2, 2, 2, 2):
            shrink = not caffe_compat and len(self.stages) == 7
            block = PreActBlock(c_in, ch(128), stride=stride, bn=bn, shrink=shrink)
            self.stages.append(nn.ModuleList([block]))
            c_in = ch(128)
        self.channels = [ch(256), ch(512)] + [ch(128)] * 4
        self.norms = nn.ModuleList(
            nn.Identity() if caffe_compat
            else nn.Sequential(*[nn.BatchNorm2d(c)] * bn, nn.ReLU())
            for c in self.channels
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            if i == 7 and not self.caffe_compat and min(x.shape[-2:]) < 3:
                break  # a small test image leaves no 3x3 for the last block
            for block in stage:
                x, branch = block(x)
            if i >= 2:
                maps.append(self.norms[i - 2](branch if self.caffe_compat else x))
        return maps


class CaffeCompat(PreActResNet):
    """Also as released: the last two extra blocks have stride 1. 8,892 priors."""

    caffe_compat = True
    maps_300 = (38, 19, 10, 5, 5, 5)


# ------------------------------------------------------------------------------ ScratchDet512


class Root512(ResNet):
    """Root-ResNet-34 for 512x512: seven maps 64, 32, 16, 8, 4, 2, 1 (released for mmdetection)."""

    def __init__(self, config: Config):
        super().__init__(config)
        bn, ch = config.body_bn, channel_rounding(config.width)
        c_in, c = self.channels[1], ch(128)
        blocks = [BasicBlock(c if i else c_in, c, stride=2, bn=bn) for i in range(4)]
        last = nn.Sequential(conv_bn(c, c, 3, bn=bn), conv_bn(c, c, 4, padding=1, bn=bn))
        self.extras = nn.ModuleList([*blocks, last])
        self.channels = [*self.channels[:2], *[c] * 5]


# ------------------------------------------------------------------------------ DSOD300


class DenseBlock(nn.Module):
    """Layers of (1x1 to 192, 3x3 to 48 channels), each fed with all before it (DenseNet)."""

    def __init__(self, c_in: int, layers: int, *, bottleneck: int, growth: int, bn: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                bn_relu_conv(c_in + i * growth, bottleneck, 1, bn=bn),
                bn_relu_conv(bottleneck, growth, 3, bn=bn),
            )
            for i in range(layers)
        )
        self.c_out = c_in + layers * growth

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Halve(nn.Module):
    """DSOD's dense prediction: half of the new channels learned, half handed on by pooling."""

    def __init__(self, c_in: int, c: int, *, bn: bool):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.handed_on = bn_relu_conv(c_in, c, 1, bn=bn)
        self.learned = nn.Sequential(
            bn_relu_conv(c_in, c, 1, bn=bn), bn_relu_conv(c, c, 3, stride=2, bn=bn)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.handed_on(self.pool(x)), self.learned(x)], dim=1)


class DSOD(nn.Module):
    """DSOD300 with DS/64-192-48-1 (Shen et al., ICCV 2017, and its released code).

    Its last map is 2x2, not 1x1 as its paper says: 3x3 with stride 2 and padding makes 2 of 3. So
    there are 8,744 priors. All maps are L2-normalised.
    """

    maps_300 = (38, 19, 10, 5, 3, 2)

    def __init__(self, config: Config):
        super().__init__()
        bn, ch = config.body_bn, channel_rounding(config.width)
        dense = {"bottleneck": ch(192), "growth": ch(48), "bn": bn}
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.stem = nn.Sequential(
            conv_bn(3, ch(64), 3, stride=2, bn=bn),
            conv_bn(ch(64), ch(64), 3, bn=bn),
            conv_bn(ch(64), ch(128), 3, bn=bn),
        )
        self.dense1 = DenseBlock(ch(128), 6, **dense)
        self.transition1 = bn_relu_conv(self.dense1.c_out, self.dense1.c_out, 1, bn=bn)
        self.dense2 = DenseBlock(self.dense1.c_out, 8, **dense)
        first = self.dense2.c_out
        self.transition2 = bn_relu_conv(first, first, 1, bn=bn)
        self.dense3 = DenseBlock(first, 8, **dense)
        self.transition3 = bn_relu_conv(self.dense3.c_out, self.dense3.c_out, 1, bn=bn)
        self.dense4 = DenseBlock(self.dense3.c_out, 8, **dense)
        self.transition4 = bn_relu_conv(self.dense4.c_out, ch(256), 1, bn=bn)
        self.first_handed_on = bn_relu_conv(first, ch(256), 1, bn=bn)
        self.extras, c_in, self.channels = nn.ModuleList(), 2 * ch(256), [first, 2 * ch(256)]
        for c in (256, 128, 128, 128):
            self.extras.append(Halve(c_in, ch(c), bn=bn))
            c_in = 2 * ch(c)
            self.channels.append(c_in)
        self.norms = nn.ModuleList(L2Norm(c) for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.dense1(self.pool(self.stem(x)))  # (N, 416, 75, 75)
        first = self.transition2(self.dense2(self.pool(self.transition1(x))))  # (N, 800, 38, 38)
        pooled = self.pool(first)
        x = self.transition4(self.dense4(self.transition3(self.dense3(pooled))))
        maps = [first, torch.cat([x, self.first_handed_on(pooled)], dim=1)]  # (N, 512, 19, 19)
        for block in self.extras:
            maps.append(block(maps[-1]))
        return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]


# ------------------------------------------------------------------------------ their names

scratchdet.RESNETS |= {
    "resnet50": Layout(BLOCKS[50], stem=(7, 1, 2), pool=(3, 1)),
    "resnet101": Layout(BLOCKS[101], stem=(7, 1, 2), pool=(3, 1)),
    "root-resnet50": Layout(BLOCKS[50], stem=(3, 3, 1), pool=(2, 0)),
    "root-resnet101": Layout(BLOCKS[101], stem=(3, 3, 1), pool=(2, 0)),
    "scratchdet512": Layout(BLOCKS[34], stem=(3, 3, 1), pool=(2, 0)),
}
BODIES = {
    "resnet50": BottleneckResNet,
    "resnet101": BottleneckResNet,
    "root-resnet50": BottleneckResNet,
    "root-resnet101": BottleneckResNet,
    "root-resnet18-preact": PreActResNet,
    "root-resnet34-preact": PreActResNet,
    "root-resnet34-caffe-compat": CaffeCompat,
    "scratchdet512": Root512,
    "dsod300": DSOD,
    "ssd321": SSD321,
}
scratchdet.BODIES |= BODIES
scratchdet.TAKES |= {name: () for name in BODIES} | {"scratchdet512": ("stem",)}
scratchdet.TAKES |= {
    name: ("stem", "extras") for name in BODIES if BODIES[name] is BottleneckResNet
}

if __name__ == "__main__":
    scratchdet.main()
