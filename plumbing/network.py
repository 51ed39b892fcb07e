"""Checks of a Config and of its maps; what a network costs; the network as a table."""

import copy
import math
from dataclasses import fields

import torch
from torch import Tensor, nn


def ignored_options(values: dict, default, takes: dict[str, tuple[str, ...]]) -> list[str]:
    """Names of the options in `values` that are set although they have no effect on the backbone.

    {"backbone": "vgg16", "stem": (3, 1, 1)} -> ["stem"]. `takes`: {backbone: names of its options};
    `default`: the class Config, for the default values.
    """
    options = {name for names in takes.values() for name in names}
    options -= set(takes.get(values.get("backbone", default.backbone), ()))
    return [n for n in sorted(options) if n in values and values[n] != getattr(default, n)]


def check_config(config, bodies: dict, priors: dict, takes: dict[str, tuple[str, ...]]) -> None:
    """ValueError where a field of a Config makes no sense, with its value and what was expected."""

    def expect(fine: bool, name: str, expected: str) -> None:
        if not fine:
            raise ValueError(f"{name} = {getattr(config, name)!r}: expected {expected}")

    for field in fields(config):
        if field.default is None:  # such a field may hold anything: the network checks it
            continue
        kind = type(field.default)
        right = isinstance(getattr(config, field.name), (int, float) if kind is float else kind)
        expect(right, field.name, f"a {kind.__name__}, as {field.default!r} is")
    for name, allowed in (
        ("backbone", bodies),
        ("bn", ("all", "backbone", "head", "none")),
        ("extras", ("residual", "conv")),
        ("priors", priors),
        ("channels", ("rgb", "bgr")),
    ):
        expect(getattr(config, name) in allowed, name, f"one of {', '.join(allowed)}")
    for name in ignored_options(vars(config), type(config), takes):
        has = " and ".join(takes[config.backbone]) or "no options of its own"
        raise ValueError(
            f"{name} = {getattr(config, name)!r}: {config.backbone} has no such option, it has "
            f"{has}. Leave it out"
        )
    expect(0 < config.width <= 4, "width", "a number in (0, 4]; 1 is the paper's")
    expect(1 <= config.size <= 8192, "size", "1 to 8192 pixels; 300 is the paper's")
    expect(0 < config.head_bn_eps < 1, "head_bn_eps", "a number between 0 and 1")
    expect(0 < config.head_gamma < math.inf, "head_gamma", "a number above 0; 1 is PyTorch's")
    if not config.head_bn and config.head_bn_eps != type(config).head_bn_eps:
        raise ValueError(f"head_bn_eps = {config.head_bn_eps}: bn = {config.bn!r} has none there")
    names = () if isinstance(config.classes, str) else config.classes  # ("dog") is no tuple
    different = 0 < len(set(names)) == len(names)
    expect(different, "classes", "a tuple of different names; of a single one: ('dog',)")
    std = len(config.std) == 3 and all(0 < s < math.inf for s in config.std)
    expect(std, "std", "3 numbers above 0, of red, green, blue")
    stem = config.stem or (3, 3, 1)
    whole = isinstance(stem, tuple) and len(stem) == 3 and all(isinstance(n, int) for n in stem)
    odd = whole and stem[0] % 2 == 1 and min(stem) >= 1
    expect(odd, "stem", "(odd kernel, number of convolutions, stride), all above 0")


def check_priors(config, needed: int, priors: dict) -> None:
    """ValueError where the config's priors are for another number of maps than the network has."""
    if len(priors[config.priors]) != needed:
        fitting = [name for name, rows in priors.items() if len(rows) == needed]
        raise ValueError(
            f"priors {config.priors!r} are for {len(priors[config.priors])} maps, "
            f"{config.backbone} has {needed}: expected {' or '.join(fitting)}"
        )


def check_maps(config, sizes: list[tuple[int, int]], body: nn.Module, sides_300: tuple) -> None:
    """ValueError where the maps do not suit the head. `sizes`: (H, W) of the maps of an image of
    config.size; `sides_300`: their sides for a 300x300 image, where the backbone has no others."""
    needed, sides_300 = len(body.channels), getattr(body, "maps_300", sides_300)
    if len(sizes) < needed:
        raise ValueError(
            f"size = {config.size}: {config.backbone} makes {len(sizes)} maps of such an image, "
            f"not {needed}. Choose a larger one: 300 is the paper's"
        )
    if config.size == 300 and sizes != [(s, s) for s in sides_300]:
        raise ValueError(
            f"{config.backbone} with stem {config.stem}: maps {sizes}, not {sides_300}"
        )


def count_macs(model: nn.Module, size: int) -> int:
    """Multiplications in the convolutions, for one image (3, size, size)."""
    macs = 0

    def count(conv: nn.Conv2d, _, out: Tensor):
        nonlocal macs
        macs += out.numel() * conv.weight[0].numel()

    meta = copy.deepcopy(model).to("meta").eval()
    for module in meta.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    meta(torch.empty(1, 3, size, size, device="meta"))
    return macs


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
