"""The networks that ScratchDet is compared with, as backbones of `ScratchDet` (`--backbone NAME`).

Off the reading path: nothing here is needed to understand scratchdet.py, which asks BODIES for the
names of its BASELINES. Each takes the Config's `bn` and `width`.

    python scratchdet.py --backbone dsod300
    python scratchdet.py --backbone scratchdet512 --size 512 --priors coco512
    python scratchdet.py --backbone ssd321 --size 321 --priors voc321
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scratchdet import BLOCKS, BasicBlock, Config, ResNet, channel_rounding, conv_bn, run_extras

# ------------------------------------------------------------------------------ ResNet-50 and -101


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut (He et al. 2016); the stride in the 3x3, as torchvision's."""

    expansion = 4

    def __init__(self, c_in: int, c_out: int, *, stride: int, bn: bool, dilation: int = 1):
        super().__init__()
        mid = c_out // self.expansion
        self.conv1 = conv_bn(c_in, mid, 1, bn=bn)
        self.conv2 = conv_bn(mid, mid, 3, stride=stride, padding=dilation, dilation=dilation, bn=bn)
        self.conv3 = conv_bn(mid, c_out, 1, bn=bn, relu=False)
        same = stride == 1 and c_in == c_out
        self.shortcut = (
            nn.Identity() if same else conv_bn(c_in, c_out, 1, stride=stride, bn=bn, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x)))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResBody(nn.Module):
    """A bottleneck of DSSD's code whose window may be 2x2 or unpadded: how SSD321's maps shrink."""

    def __init__(self, c_in: int, mid: int, c_out: int, *, kernel: int, stride: int, bn: bool):
        super().__init__()
        window = {"stride": stride, "padding": 0, "bn": bn}
        self.branch = nn.Sequential(
            conv_bn(c_in, mid, kernel, **window),
            conv_bn(mid, mid, 1 if kernel == 1 else 3, bn=bn),
            conv_bn(mid, c_out, 1, bn=bn, relu=False),
        )
        self.shortcut = conv_bn(c_in, c_out, kernel, relu=False, **window)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


class SSD321(nn.Module):
    """ResNet-101 of the DSSD paper's SSD321: conv5 dilated instead of strided, maps 40, 20, ... 1.

    A block before each head (prediction module (c) of that paper). 17,080 priors. Built from its
    description: only the sizes of its maps are known to agree.
    """

    def __init__(self, config: Config):
        super().__init__()
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)
        self.stem = nn.Sequential(conv_bn(3, ch(64), 7, stride=2, bn=bn), nn.MaxPool2d(3, 2))
        self.stages, c_in = nn.ModuleList(), ch(64)
        for i, blocks in enumerate(BLOCKS[101]):
            c_out, stride, dilation = ch(64 << i) * 4, 2 if i in (1, 2) else 1, 2 if i == 3 else 1
            stage = [Bottleneck(c_in, c_out, stride=stride, dilation=dilation, bn=bn)]
            stage += [
                Bottleneck(c_out, c_out, stride=1, dilation=dilation, bn=bn)
                for _ in range(blocks - 1)
            ]
            self.stages.append(nn.Sequential(*stage))
            c_in = c_out
        mid, wide = ch(256), ch(1024)
        self.extras = nn.ModuleList(
            ResBody(c, mid, wide, kernel=kernel, stride=stride, bn=bn)
            for c, kernel, stride in ((c_in, 2, 2), (wide, 2, 2), (wide, 3, 1), (wide, 3, 1))
        )
        self.before_heads = nn.ModuleList(
            ResBody(c, mid, wide, kernel=1, stride=1, bn=bn)
            for c in (ch(128) * 4, c_in, *[wide] * 4)
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

    The heads see BN-ReLU of a stage's sum. `caffe_compat`: they see what the released prototxt
    names, the branch of the stage's last block before it is added, without BN or ReLU; and the last
    two extra blocks have stride 1 as there: maps 38, 19, 10, 5, 5, 5 and 8,892 priors.
    """

    def __init__(self, config: Config, depth: int, *, caffe_compat: bool = False):
        super().__init__()
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)
        _, convs, _ = config.stem or (3, 3, 1)
        self.stem = nn.Sequential(
            *[conv_bn(3 if i == 0 else ch(64), ch(64), 3, bn=bn) for i in range(convs)],
            nn.MaxPool2d(2, 2),
        )
        self.caffe_compat, self.stages, c_in = caffe_compat, nn.ModuleList(), ch(64)
        for i, blocks in enumerate(BLOCKS[depth]):
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
        if caffe_compat:
            self.maps_300 = (38, 19, 10, 5, 5, 5)

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


# ------------------------------------------------------------------------------ ScratchDet512


class Root512(ResNet):
    """Root-ResNet-34 for 512x512: seven maps 64, 32, 16, 8, 4, 2, 1 (released for mmdetection)."""

    def __init__(self, config: Config):
        super().__init__(config, (34, (3, 3, 1), (2, 0)))
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)
        c_in, c = self.channels[1], ch(128)
        blocks = [BasicBlock(c if i else c_in, c, stride=2, bn=bn) for i in range(4)]
        last = nn.Sequential(conv_bn(c, c, 3, bn=bn), conv_bn(c, c, 4, padding=1, bn=bn))
        self.extras = nn.ModuleList([*blocks, last])
        self.channels = [*self.channels[:2], *[c] * 5]


# ------------------------------------------------------------------------------ DSOD300


class L2Norm(nn.Module):
    """Each pixel's channels scaled to length 20 at first; a learned factor a channel (SSD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.normalize(x, dim=1, eps=1e-10)


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
        bn, ch = config.bn in ("all", "backbone"), channel_rounding(config.width)
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


BODIES = {  # Config -> backbone, for every name in scratchdet.BASELINES
    "resnet50": lambda config: ResNet(config, (50, (7, 1, 2), (3, 1)), Bottleneck),
    "resnet101": lambda config: ResNet(config, (101, (7, 1, 2), (3, 1)), Bottleneck),
    "root-resnet50": lambda config: ResNet(config, (50, (3, 3, 1), (2, 0)), Bottleneck),
    "root-resnet101": lambda config: ResNet(config, (101, (3, 3, 1), (2, 0)), Bottleneck),
    "root-resnet18-preact": lambda config: PreActResNet(config, 18),
    "root-resnet34-preact": lambda config: PreActResNet(config, 34),
    "root-resnet34-caffe-compat": lambda config: PreActResNet(config, 34, caffe_compat=True),
    "dsod300": DSOD,
    "scratchdet512": Root512,
    "ssd321": SSD321,
}
