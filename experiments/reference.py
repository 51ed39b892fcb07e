"""Compare this code with the code of SSD, ScratchDet, DSOD, DSSD and RefineDet (docs/fidelity.md).

    git clone -b ssd https://github.com/weiliu89/caffe CLONES/ssd
    git clone https://github.com/KimSoybean/ScratchDet CLONES/scratchdet
    git clone https://github.com/szq0214/DSOD CLONES/dsod
    git clone -b dssd https://github.com/chengyangfu/caffe CLONES/dssd
    git clone https://github.com/sfzhang15/RefineDet CLONES/refinedet
    python -m experiments.reference CLONES             prints what was compared, on how many cases
    python -m experiments.reference CLONES --freeze    writes tests/fidelity.json as well

Functions of C++ are cut out of the clone and compiled with experiments/reference.cpp. Networks are
defined by the clone's own Python, with a stand-in for caffe.NetSpec, and computed here in float64.
"""

import argparse
import ctypes
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import detect as detecting
import metrics
import ops
import scratchdet
from experiments import baselines  # noqa: F401  adds its networks
from ops.reference import decode
from plumbing.program import run_program
from scratchdet import Config, L2Norm, ScratchDet, cxcywh_to_xyxy, encode, make_priors

FROZEN = Path(__file__).parents[1] / "tests" / "fidelity.json"

# ------------------------------------------------------------- weights that any code can make


def wave(n: int, phase: float) -> Tensor:
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.61 + phase)


def image(side: int) -> Tensor:
    return torch.sin(torch.arange(3 * side * side, dtype=torch.float64) * 0.013).reshape(
        1, 3, side, side
    )


def conv_weights(shape: tuple, bias: bool, k: int) -> tuple[Tensor, Tensor | None]:
    weight = wave(math.prod(shape), k).reshape(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return weight, 0.1 * wave(shape[0], k + 0.5) if bias else None


def fill(modules: list[nn.Module]) -> None:
    """Gives the k-th layer the weights of number k. A BatchNorm is two layers, as in Caffe."""
    k = 0
    for m in (leaf for module in modules for leaf in module.modules()):
        if isinstance(m, nn.Conv2d):
            weight, bias = conv_weights(m.weight.shape, m.bias is not None, k)
            m.weight.data = weight
            if bias is not None:
                m.bias.data = bias
            k += 1
        elif isinstance(m, nn.BatchNorm2d):
            c = m.num_features
            m.running_mean, m.running_var = 0.1 * wave(c, k), 1 + 0.5 * wave(c, k + 0.5)
            m.weight.data, m.bias.data = 1 + 0.1 * wave(c, k + 1), 0.1 * wave(c, k + 1.5)
            k += 2
        elif isinstance(m, L2Norm):
            m.weight.data = 20 + wave(len(m.weight), k).reshape(-1, 1, 1)
            k += 1


def numbers(x: Tensor) -> list[float]:
    """Mean, mean of the absolute value, deviation, and seven elements."""
    x = x.flatten()
    return [x.mean().item(), x.abs().mean().item(), x.std().item(),
            *x[:: max(1, len(x) // 7)][:7].tolist()]  # fmt: skip


# ------------------------------------------------- our layers in the order of the reference


def heads(model: ScratchDet) -> list[list[nn.Module]]:
    return [list(pair) for pair in zip(model.head.loc, model.head.conf, strict=True)]


def vgg16(model: ScratchDet) -> list[nn.Module]:
    body, (first, *others) = model.features, heads(model)
    return [body.to_conv4_3, body.to_fc7, body.extras, body.norm, *first, *sum(others, [])]


def caffe_compat(model: ScratchDet) -> list[nn.Module]:
    blocks = [block for stage in model.features.stages for block in stage]
    parts = [[b.activate, b.shortcut or nn.Identity(), b.conv1, b.conv2] for b in blocks]
    return [model.features.stem, *sum(parts, []), *sum(heads(model), [])]


def dsod300(model: ScratchDet) -> list[nn.Module]:
    body = model.features
    parts = [body.stem, body.dense1, body.transition1, body.dense2, body.transition2, body.dense3]
    parts += [body.transition3, body.dense4, body.transition4, body.first_handed_on]
    parts += sum(([half.learned, half.handed_on] for half in body.extras), [])
    return parts + sum(([n, *h] for n, h in zip(body.norms, heads(model), strict=True)), [])


def ssd321(model: ScratchDet) -> list[nn.Module]:
    body = model.features
    blocks = [b for stage in body.stages for b in stage] + [*body.extras, *body.before_heads]
    return [body.stem, *sum(([b.shortcut, b.branch] for b in blocks), []), *sum(heads(model), [])]


def root_resnet34(model: ScratchDet) -> list[nn.Module]:
    """Up to map 5."""
    body = model.features
    blocks = [b for stage in body.stages for b in stage] + [*body.extras[:3]]
    return [body.stem, *sum(([b.conv1, b.conv2, b.shortcut] for b in blocks), [])]


def ours(name: str, width: float) -> ScratchDet:
    """The network that corresponds to the reference `name`, with its weights."""
    config = {
        "vgg16": Config("vgg16", "none", width, l2_norm=True),
        "caffe_compat": Config("root-resnet34-caffe-compat", width=width, head_bn_eps=1e-3),
        "dsod300": Config("dsod300", width=width, head_bn_eps=1e-3),
        "ssd321": Config("ssd321", "backbone", width, size=321, priors="voc321"),
        "root_resnet34": Config("root-resnet34", width=width),
    }[name]
    model = ScratchDet(config).double().eval()
    for module in model.modules():
        if name == "ssd321" and isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # in the whole network there (docs/deviations.md)
    fill(globals()[name](model))
    return model


# What is frozen: the width of each network and the side of its image, for seconds in the tests.
SMALL = {
    "vgg16": (0.125, 300), "caffe_compat": (0.125, 300), "dsod300": (1, 96), "ssd321": (0.25, 321),
    "root_resnet34": (0.25, 300),
}  # fmt: skip


@torch.no_grad()
def our_numbers(name: str) -> dict[str, list[float]]:
    width, side = SMALL[name]
    model = ours(name, width)
    if name == "root_resnet34":
        return {f"map {i + 1}": numbers(m) for i, m in enumerate(model.features(image(side))[:5])}
    loc, logits = model(image(side))
    return {"loc": numbers(loc), "conf": numbers(logits)}


# ------------------------------------------------------------------ the reference's networks


def read(clones: Path, path: str) -> str:
    """A file of a clone, at its HEAD."""
    name, inside = path.split("/", 1)
    words = ["git", "-C", str(clones / name), "show", f"HEAD:{inside}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


class Layer:
    def __init__(self, kind: str, inputs: tuple, options: dict):
        self.kind, self.inputs, self.options, self.wide = kind, inputs, options, False


class Net(dict):
    """Stands in for caffe.NetSpec: net.conv1 and net["conv1"] are the same. `layers`: all made."""

    def __init__(self):
        self.__dict__["layers"] = []

    def __getattr__(self, name):
        return self[name]

    def __setattr__(self, name, layer):
        self[name] = layer

    def keys(self):
        return list(super().keys())  # as in Python 2

    def update(self, name, options):
        self[name].options.update(options)


class Anything:
    """Stands in for caffe.params: any attribute of any attribute is there."""

    def __getattr__(self, name):
        return Anything()


def load(text: str, net: Net, **more) -> dict:
    """Runs a file of Python 2 that defines networks -> its names."""
    text = re.sub(r"^(from|import) .*$", "", text.expandtabs(4), flags=re.M)
    text = re.sub(r"^( *)print .*$", r"\1pass", text, flags=re.M).replace("assert len > 0", "pass")

    class Layers:
        def __getattr__(self, kind):
            def make(*inputs, **options):
                net.layers.append(Layer(kind, inputs, options))
                return net.layers[-1]

            return make

    names = {"L": Layers(), "P": Anything(), "math": math, "np": np, "xrange": range} | more
    exec(compile(text, "reference", "exec"), names)  # the clone's own code
    return names


def define(clones: Path, name: str) -> Net:
    """The network of a clone, with its head; "loc" and "conf" are its outputs."""
    net = Net()
    net.layers.append(Layer("Data", (), {}))
    net["data"] = net.layers[0]
    sources = ["conv4_12", "conv5_6", "conv6_2", "conv7_2", "conv8_2", "conv9_2"]
    head = {"use_batchnorm": True, "normalizations": [-1] * 6, "data_layer": "data"}
    head |= {"kernel_size": 3, "pad": 1}
    if name == "vgg16":
        lib = load(read(clones, "ssd/python/caffe/model_libs.py"), net)
        script = read(clones, "ssd/examples/ssd/ssd_pascal.py")
        body = {"fully_conv": True, "reduced": True, "dilated": True, "dropout": False}
        lib["VGGNetBody"](net, from_layer="data", **body)
        sources[:2] = ["conv4_3", "fc7"]
        head |= {"use_batchnorm": False, "normalizations": [20] + [-1] * 5}
    elif name == "caffe_compat":
        lib = load(read(clones, "scratchdet/caffe/model_libs.py"), net)
        lib["Resnet34rootV2_res"](net, from_layer="data")
    elif name == "dsod300":
        lib = load(read(clones, "dsod/model_libs.py"), net)
        lib["DSOD300_V3_Body"](net, from_layer="data")
        sources = ["First", "Second", "Third", "Fourth", "Fifth", "Sixth"]
        head |= {"normalizations": [20] * 6}
    elif name == "ssd321":
        lib = load(read(clones, "dssd/python/caffe/model_libs.py"), net)
        script = read(clones, "dssd/examples/ssd/ssd_pascal_resnet_321.py")
        lib["ResNet101Body"](net, from_layer="data", use_pool5=False, use_dilation_conv5=True)
        sources = [f"res{i}_relu" for i in ("3b3", "5c", "6", "7", "8", "9")]
        head |= {"use_batchnorm": False, "kernel_sizes": [5, 5, 3, 3, 3, 3]}
        head |= {"pads": [2, 2, 1, 1, 1, 1], "starts": [0.5] * 6}
        for option in ("normalizations", "kernel_size", "pad"):
            del head[option]
    if name in ("vgg16", "ssd321"):
        extras = script[script.index("def AddExtraLayers") : script.index("### Modify")]
        load(extras, net, **lib)["AddExtraLayers"](net, use_batchnorm=name == "ssd321")
    if name == "ssd321":
        blocks = {"use_batchnorm": False, "inter_layer_depth": [[256]] * 6}
        sources = lib["CreateMultiBoxHead"](net, from_layers=sources, **blocks)
    before = len(net.layers)
    ratios = [[1.6, 2.0, 3.0]] * 6 if name == "ssd321" else [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    make = lib["CreateMultiBoxOutput" if name == "ssd321" else "CreateMultiBoxHead"]
    make(net, from_layers=sources, min_sizes=[1] * 6, max_sizes=[2] * 6, aspect_ratios=ratios,
         steps=[8] * 6, num_classes=21, clip=False, prior_variance=[0.1] * 4, **head)  # fmt: skip
    for layer in net.layers[before:]:
        layer.wide = True  # the head keeps its channels in a narrow network
    return net


@torch.no_grad()
def compute(net: Net, x: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """The network's (loc, conf), flat, in float64."""
    at, k = {}, 0  # blobs; number of the next layer with weights
    for layer in net.layers:
        if any(bottom not in at for bottom in layer.inputs):
            continue  # priors and what depends on them
        inputs, options = [at[bottom] for bottom in layer.inputs], layer.options
        v = inputs[0] if inputs else x
        c, kind = v.shape[1], layer.kind
        pad, stride = int(options.get("pad", 0)), options.get("stride", 1)  # Python 2 divides ints
        if kind == "Convolution":
            side, out = options["kernel_size"], options["num_output"]
            out = out if layer.wide else 16 * math.ceil(out * width / 16)
            weights = conv_weights((out, c, side, side), options.get("bias_term", True), k)
            y = F.conv2d(v, *weights, stride, pad, int(options.get("dilation", 1)))
        elif kind == "BatchNorm":
            mean, var = 0.1 * wave(c, k), 1 + 0.5 * wave(c, k + 0.5) + options.get("eps", 1e-5)
            y = (v - mean[:, None, None]) / var.sqrt()[:, None, None]
        elif kind == "Scale":
            y = v * (1 + 0.1 * wave(c, k))[:, None, None] + 0.1 * wave(c, k + 0.5)[:, None, None]
        elif kind == "Normalize":
            length = (v.square().sum(1, keepdim=True) + 1e-10).sqrt()
            y = v / length * (20 + wave(c, k))[:, None, None]
        elif kind == "Pooling":
            y = F.max_pool2d(v, options["kernel_size"], stride, pad, ceil_mode=True)
        elif kind == "ReLU":
            y = v.clamp(min=0)
        elif kind == "Eltwise":
            y = sum(inputs)
        elif kind == "Concat":
            y = torch.cat(inputs, 1)
        elif kind == "Permute":
            y = v.permute(options["order"])
        else:
            y = {"Flatten": v.flatten(1), "Data": v, "PriorBox": None}[kind]
        k += kind in ("Convolution", "BatchNorm", "Scale", "Normalize")
        if y is not None:
            at[layer] = v.copy_(y) if options.get("in_place") else y
    return at[net["mbox_loc"]], at[net["mbox_conf"]]


def mmdetection(clones: Path, width: float) -> nn.Module:
    """The released Root-ResNet-34 of mmdetection, with the weights of `ours`."""
    text = read(clones, "scratchdet/mmdetection/backbones/ssd_root34_300.py").expandtabs(4)
    text = re.sub(r"^from mm[^(\n]*(\([^)]*\))?.*$", "", text, flags=re.M)
    text = re.sub(r"\b(64|128)\b", lambda m: str(int(int(m[0]) * width)), text)
    names = {}
    exec(compile(text, "reference", "exec"), names)  # the clone's own code
    net = names["SSDRES300"](300, 34).double().eval()
    parts = [net.conv1, net.bn1, net.conv2, net.bn2, net.conv3, net.bn3]
    for stage in (getattr(net, f"layer{i + 1}") for i in range(8)):
        for b in stage:
            parts += [b.conv1, b.bn1, b.conv2, b.bn2, b.downsample or nn.Identity()]
    fill(parts)
    return net


def compare_networks(clones: Path) -> dict:
    """Prints each network at full size; -> the numbers of the small ones."""
    frozen = {}
    for name in ("vgg16", "caffe_compat", "dsod300", "ssd321"):
        side = 321 if name == "ssd321" else 300
        theirs = compute(define(clones, name), image(side), 1.0)
        with torch.no_grad():
            mine = ours(name, 1.0)(image(side))
        worst = max(
            ((a.flatten() - b.flatten()).abs().max() / a.abs().max()).item()
            for a, b in zip(theirs, mine, strict=True)
        )
        print(f"network {name}: {theirs[0].numel() + theirs[1].numel():,} outputs, {worst:.1e}")
        width, side = SMALL[name]
        small = compute(define(clones, name), image(side), width)
        frozen[name] = {"loc": numbers(small[0]), "conf": numbers(small[1])}
    with torch.no_grad():
        theirs = mmdetection(clones, 1.0)(image(300))[:5]
        mine = ours("root_resnet34", 1.0).features(image(300))[:5]
        small = mmdetection(clones, SMALL["root_resnet34"][0])(image(300))[:5]
    worst = max((a - b).abs().max().item() for a, b in zip(theirs, mine, strict=True))
    print(f"network root_resnet34 (mmdetection), maps 1 to 5: {worst:.1e}")
    frozen["root_resnet34"] = {f"map {i + 1}": numbers(m) for i, m in enumerate(small)}
    return frozen


# ------------------------------------------------------------------ the reference's functions

FUNCTIONS = (
    "SortBBoxDescend SortScorePairDescend UnitBBox IsCrossBoundaryBBox IntersectBBox BBoxSize "
    "ClipBBox LocateBBox ProjectBBox JaccardOverlap BBoxCoverage MeetEmitConstraint EncodeBBox "
    "DecodeBBox MatchBBox IsEligibleMining ComputeConfLoss GetMaxScoreIndex ApplyNMSFast CumSum "
    "ComputeAP SatisfySampleConstraint SampleBBox GenerateSamples"
).split()


def cut(text: str, name: str) -> str:
    """All definitions of a function, from their first line to the brace at its margin."""
    start = rf"^(?:template <typename \w+>\n)?[\w ]+ {name}\([^;{{]*\{{"
    return "\n".join(re.findall(rf"{start}.*?^\}}$", text, flags=re.M | re.S))


def build(clones: Path, folder: Path) -> ctypes.CDLL:
    """Caffe's functions as a library."""
    text = read(clones, "ssd/src/caffe/util/bbox_util.cpp")
    text += read(clones, "ssd/src/caffe/util/sampler.cpp")
    layer = read(clones, "ssd/src/caffe/layers/prior_box_layer.cpp")
    loop = layer[layer.index("  int idx = 0;") : layer.index("  // clip the prior's")]
    code = Path(__file__).with_suffix(".cpp").read_text()
    code = code.replace("// FUNCTIONS", "\n".join(cut(text, name) for name in FUNCTIONS))
    (folder / "caffe.cpp").write_text(code.replace("// PRIORS", loop))
    words = ["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", "caffe.cpp"]
    subprocess.run([*words, "-o", "caffe.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "caffe.so"))
    library.average_precision.restype = ctypes.c_float
    return library


def call(function, *arguments):
    """With arrays as pointers and Python's floats as floats."""
    return function(*(
        a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray)
        else ctypes.c_float(a) if isinstance(a, float) else a for a in arguments
    ))  # fmt: skip


def floats(x) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.float32)


def compare_priors(caffe: ctypes.CDLL) -> None:
    for table in ("voc", "coco"):
        theirs = []
        rows = zip(scratchdet.PRIORS[table], (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300),
                   strict=True)  # fmt: skip
        for (small, large, _, ratios), side, step in rows:
            out = np.zeros((side * side * (2 + 2 * len(ratios)), 4), np.float32)
            call(caffe.priors, side, 300, 3.0 * small, 3.0 * large, floats(ratios), len(ratios),
                 float(step), out)  # fmt: skip
            theirs.append(out)
        mine = cxcywh_to_xyxy(make_priors(Config(priors=table))).numpy()
        print(f"priors {table}: 8,732, {np.abs(mine - np.concatenate(theirs)).max():.1e}")


def scene(rng: np.random.Generator, priors: np.ndarray) -> np.ndarray:
    """Up to 40 boxes: anywhere, all in one place, all of one size, or exactly on priors."""
    g, kind = int(rng.choice([1, 1, 2, 3, 5, 8, 20, 40])), rng.integers(4)
    if kind == 3:
        return floats(priors[rng.integers(0, len(priors), g)])
    centre = 0.5 + 0.05 * rng.standard_normal((g, 2)) if kind == 1 else rng.random((g, 2))
    side = np.exp(rng.uniform(np.log(0.01), np.log(0.9), (g, 2)))
    side = 0.1 * np.exp(0.2 * rng.standard_normal((g, 2))) if kind == 2 else side
    boxes = floats(np.concatenate([centre - side / 2, centre + side / 2], axis=1).clip(0, 1))
    return floats(boxes[(boxes[:, 2:] - boxes[:, :2] > 0.004).all(axis=1)])


def match_and_mine(caffe, priors, boxes, conf) -> tuple[np.ndarray, np.ndarray]:
    """Caffe's box of each prior (-1: none), and its mined negatives."""
    p = len(priors)
    index, overlap = np.zeros(p, np.int32), np.zeros(p, np.float32)
    call(caffe.match, priors, p, boxes, len(boxes), index, overlap)
    negative = np.zeros(p, np.uint8)
    call(caffe.mine, conf, p, conf.shape[1], index, overlap, negative)
    return index, negative.astype(bool)


def compare_training(caffe: ctypes.CDLL, images: int) -> list[dict]:
    """Coding, matching and mining on the priors of VOC; -> three cases to freeze."""
    rng, priors_cxcywh = np.random.default_rng(1), make_priors(Config())
    priors = floats(cxcywh_to_xyxy(priors_cxcywh))
    n = 200_000
    rows, corner = rng.integers(0, 8732, n), 0.8 * rng.random((n, 2))
    boxes = floats(np.concatenate([corner, corner + 0.01 + 0.5 * rng.random((n, 2))], axis=1))
    code, out = floats(2 * rng.standard_normal((n, 4))), np.zeros((n, 4), np.float32)
    for name, given, mine in (
        ("encode", boxes, encode(torch.tensor(boxes), priors_cxcywh[rows])),
        ("decode", code, decode(torch.tensor(code), priors_cxcywh[rows])),
    ):
        call(getattr(caffe, name), floats(priors[rows]), given, n, out)
        worst = (np.abs(mine.numpy() - out) / np.maximum(1, np.abs(out))).max()
        print(f"{name}: {n:,} boxes, {worst:.1e}")

    wrong = positives = mined = 0
    for _ in range(images):
        boxes, conf = scene(rng, priors), floats(3 * rng.standard_normal((8732, 21)))
        index, negative = match_and_mine(caffe, priors, boxes, conf)
        rows = torch.tensor([0, len(boxes)])
        mine = ops.match(torch.tensor(priors), torch.tensor(boxes), rows)[0]
        labels = torch.tensor(index >= 0).long()[None]
        loss = ops.mined_cross_entropy(torch.tensor(conf)[None], labels, 3)[0]
        wrong += (mine.numpy() != index).sum()
        wrong += (((loss != 0) & (labels[0] == 0)).numpy() != negative).sum()
        positives, mined = positives + (index >= 0).sum(), mined + negative.sum()
    print(f"matching and mining: {images:,} images, {positives:,} positives and {mined:,} mined "
          f"negatives, {wrong} differ")  # fmt: skip

    frozen, rng = [], np.random.default_rng(5)
    conf = floats(3 * np.sin(np.arange(8732 * 21) * 0.73).reshape(8732, 21))
    for g in (1, 4, 12):
        centre, side = rng.random((g, 2)), np.exp(rng.uniform(np.log(0.03), np.log(0.7), (g, 2)))
        boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1).clip(0, 1).round(3)
        if g == 12:
            boxes[1], boxes[2] = boxes[0], (0.5, 0.5, 0.505, 0.505)  # the same twice; a tiny one
        index, negative = match_and_mine(caffe, priors, floats(boxes), conf)
        rows = np.flatnonzero(index >= 0)
        code = np.zeros((len(rows), 4), np.float32)
        call(caffe.encode, floats(priors[rows]), floats(boxes[index[rows]]), len(rows), code)
        case = {"boxes": boxes.tolist(), "priors": rows.tolist(), "box": index[rows].tolist()}
        sums = np.abs(code.astype(np.float64)).sum(axis=0).tolist()
        frozen.append(case | {"mined": np.flatnonzero(negative).tolist(), "code_sums": sums})
    return frozen


SCENES = {
    "one large box": [[0.1, 0.2, 0.9, 0.95]],
    "one small box": [[0.42, 0.3, 0.52, 0.44]],
    "three boxes": [[0.05, 0.1, 0.4, 0.6], [0.3, 0.35, 0.8, 0.9], [0.7, 0.05, 0.95, 0.3]],
    "a crowd": [[x, y, round(x + 0.09, 3), round(y + 0.13, 3)]
                for x in (0.03, 0.2, 0.37, 0.54, 0.71, 0.88) for y in (0.1, 0.4, 0.7)],
}  # fmt: skip


def crop_statistics(crops: np.ndarray) -> dict:
    """Of (n,4) xyxy: how many are the whole image, how many of the others have its full width or
    height, and quantiles (5 %, 10 %, ...) of the others."""
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    part = (width < 1 - 1e-6) | (height < 1 - 1e-6)
    values = {"width": width, "height": height, "aspect": width / height, "left": crops[:, 0]}
    quantiles = {name: np.quantile(v[part], np.arange(5, 100, 5) / 100).round(4).tolist()
                 for name, v in values.items()}  # fmt: skip
    full = (np.maximum(width, height) > 1 - 1e-6)[part].mean()
    return {"whole": 1 - part.mean(), "full side": full, "quantiles": quantiles}


def largest_distance(crops: np.ndarray, frozen: dict) -> float:
    """Between the distributions, as a share of the crops; 0: the same."""
    found = crop_statistics(crops)
    worst = max(abs(found[key] - frozen[key]) for key in ("whole", "full side"))
    part = crops[(crops[:, 2:] - crops[:, :2]).min(axis=1) < 1 - 1e-6]
    width, height = part[:, 2] - part[:, 0], part[:, 3] - part[:, 1]
    values = {"width": width, "height": height, "aspect": width / height, "left": part[:, 0]}
    wanted = np.arange(5, 100, 5) / 100
    for name, quantiles in frozen["quantiles"].items():
        v, q = np.sort(values[name]), np.array(quantiles)
        below = np.searchsorted(v, q - 1e-4) / len(v)  # a full side is a step of the distribution
        up_to = np.searchsorted(v, q + 1e-4) / len(v)
        worst = max(worst, (wanted - up_to).max(), (below - wanted).max())
    return worst


def compare_data(caffe: ctypes.CDLL, draws: int) -> dict:
    """Crops of both in the four scenes, and their boxes; -> the statistics of Caffe's."""
    frozen, rng = {}, np.random.default_rng(0)
    caffe.seed(1)
    for name, boxes in SCENES.items():
        boxes, crops = floats(boxes), np.zeros((draws, 4), np.float32)
        for row in crops:
            call(caffe.crop, boxes, len(boxes), row)
        frozen[name] = {"boxes": boxes.round(3).tolist()} | crop_statistics(crops.astype(float))
        mine = np.stack([data.crop(boxes, rng) for _ in range(20_000)])
        distance = largest_distance(mine, frozen[name])
        print(f"crops, {name}: {draws:,} and 20,000, distance {distance:.4f}")
    wrong = total = 0
    for _ in range(20_000):
        g = int(rng.integers(1, 12))
        centre, side = rng.random((g, 2)), 0.02 + 0.5 * rng.random((g, 2))
        boxes = floats(np.concatenate([centre - side / 2, centre + side / 2], axis=1).clip(0, 1))
        corner = 0.5 * rng.random(2)
        crop = floats([*corner, *np.minimum(1, corner + 0.3 + 0.5 * rng.random(2))])
        keep, out = np.zeros(g, np.uint8), np.zeros((g, 4), np.float32)
        call(caffe.project, crop, boxes, g, keep, out)
        mine, kept = data.place_boxes(boxes, crop)
        same = kept.tolist() == (keep > 0).tolist()
        wrong += not same or np.abs(mine[kept] - out[kept]).max(initial=0) > 1e-6
        total += g
    print(f"boxes of crops: 20,000 crops, {total:,} boxes, {wrong} crops differ")
    return frozen


def compare_testing(caffe: ctypes.CDLL) -> list[dict]:
    """NMS and average precision; -> cases of the latter to freeze."""
    rng, wrong, kept = np.random.default_rng(2), 0, 0
    for _ in range(2000):
        n = int(rng.integers(1, 400))
        corner = rng.random((n, 2))
        boxes = floats(np.concatenate([corner, corner + 0.02 + 0.4 * rng.random((n, 2))], axis=1))
        scores, out = floats(rng.permutation(np.linspace(0.02, 0.999, n))), np.zeros(n, np.int32)
        m = call(caffe.suppress, boxes, scores, n, out)
        groups = torch.zeros(n, dtype=torch.int64)
        mine = ops.nms(torch.tensor(boxes), torch.tensor(scores), groups, 0.45)
        wrong += set(torch.nonzero(mine)[:, 0].tolist()) != set(out[:m].tolist())
        kept += m
    print(f"NMS: 2,000 sets, {kept:,} kept, {wrong} sets differ")

    frozen, worst, tenths = [], 0.0, 0
    for k in range(3000):
        rng = np.random.default_rng(k)
        n, objects = int(rng.integers(1, 300)), int(rng.integers(1, 200))
        scores, found = floats(np.linspace(1, 0.1, n)), rng.random(n) < rng.random()
        found &= found.cumsum() <= objects
        found = found.astype(np.int32)
        theirs = [call(caffe.average_precision, scores, found, n, objects, p) for p in (1, 0)]
        ap11, area, *_ = metrics.average_precision(found, 1 - found, objects)
        hits = found.cumsum()
        exact = ((10 * hits % objects == 0) & (hits > 0)).any()  # a recall of exactly a tenth
        off = max(abs(ap11 - theirs[0]), abs(area - theirs[1]))
        tenths += exact and off > 1e-4
        worst = worst if exact else max(worst, off)
        if not exact and n < 60 and found.any() and len(frozen) < 6:
            frozen.append({"found": found.tolist(), "objects": objects,
                           "11point": theirs[0], "area": theirs[1]})  # fmt: skip
    print(f"average precision: 3,000 curves, {worst:.1e}; {tenths} others differ, whose recall is "
          "exactly a tenth somewhere")  # fmt: skip
    return frozen


def compare_votes(clones: Path) -> dict:
    """RefineDet's voting; -> a case to freeze."""
    text = read(clones, "refinedet/test/lib/fast_rcnn/test.py")
    text = text[text.index("def bbox_vote") : text.index("def single_scale_test_net")]

    class cfg:
        confidence_threshold = 0.01

    text = text.replace("np.row_stack", "np.vstack")  # which NumPy 2 has no more
    names = {"np": np, "cfg": cfg}
    exec(compile(text, "reference", "exec"), names)  # the clone's own code

    def order(rows):
        return rows[np.lexsort((rows[:, 0], -rows[:, 4]))]

    def both(rows, soft):
        theirs = order(names["soft_bbox_vote" if soft else "bbox_vote"](rows.copy()))
        found = metrics.Detections(rows[:, :4], rows[:, 4], np.ones(len(rows), np.int64))
        voted = detecting.vote_boxes(found, soft=soft)
        return theirs, order(np.c_[voted.boxes_xyxy, voted.scores])

    worst = total = 0
    for k in range(600):
        rng = np.random.default_rng(k)
        n = int(rng.integers(1, 150))
        corner, side = 400 * rng.random((n, 2)), 10 + 150 * rng.random((n, 2))
        scores = rng.permutation(np.linspace(0.011, 0.99, n))
        rows = np.concatenate([corner, corner + side, scores[:, None]], axis=1)
        for soft in (False, True):
            theirs, mine = both(rows, soft)
            different = np.inf if theirs.shape != mine.shape else np.abs(theirs - mine).max()
            worst, total = max(worst, different), total + len(theirs)
    print(f"voting: 1,200 sets, {total:,} boxes, {worst:.1e}")
    rows = rows[:14].round(2)
    rows[3, :4], rows[5, :4] = rows[2, :4], rows[4, :4] + 3
    hard, soft = (both(rows, soft)[0].round(6).tolist() for soft in (False, True))
    return {"boxes": rows.tolist(), "hard": hard, "soft": soft}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("clones", type=Path, metavar="CLONES", help="folder of the five clones")
    parser.add_argument("--freeze", action="store_true", help=f"write tests/{FROZEN.name}")
    parser.add_argument("--images", type=int, default=1000, help="for matching and mining")
    parser.add_argument("--draws", type=int, default=200_000, help="crops of Caffe per scene")
    args = parser.parse_args(argv)
    frozen = {"about": "Numbers of the reference code, by experiments/reference.py."}
    with tempfile.TemporaryDirectory() as folder:
        caffe = build(args.clones, Path(folder))
        compare_priors(caffe)
        frozen["matching"] = compare_training(caffe, args.images)
        frozen["crops"] = compare_data(caffe, args.draws)
        frozen["average precision"] = compare_testing(caffe)
        frozen["votes"] = compare_votes(args.clones)
    frozen["networks"] = compare_networks(args.clones)
    if args.freeze:
        text = json.dumps(frozen, indent=1)
        text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text)  # a list, a line
        FROZEN.write_text(text + "\n")


if __name__ == "__main__":
    run_program(main)
