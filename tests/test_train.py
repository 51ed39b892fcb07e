"""The training program: its numbers by hand, and real runs of a few steps on drawn shapes.

The runs of the default tier use `resnet18` at a quarter of the width, whose stem has a stride: one
fifth of the work of the root block.
"""

import errno
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import train
from plumbing import plan
from plumbing.shapes import SHAPE_CLASSES
from plumbing.voc import read_voc
from runs import run_flags, small_tree, voc_flags
from scratchdet import Config, ScratchDet, make_priors

ROOT = Path(__file__).parents[1]
FINITE = dict.fromkeys(train.LOGGED, torch.tensor(1.0))


# ----------------------------------------------------------------------------- the schedule


def rates(argv: list[str], steps: list[int]) -> list[float]:
    args = train.parse_args(argv)
    return [train.learning_rate(step, args) for step in steps]


def test_the_papers_schedule():
    """Section 4.1: .05, a tenth after 45k, 75k and 95k of 100k iterations of 128 images."""
    args = train.parse_args(["--voc-root", "x"])
    assert (args.recipe, args.batch_size, args.iterations) == ("voc07", 128, 100_000)
    assert (train.MOMENTUM, train.WEIGHT_DECAY, args.augment) == (0.9, 5e-4, "ssd")
    steps = [0, 44_999, 45_000, 74_999, 75_000, 94_999, 95_000, 99_999]
    wanted = [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005, 0.00005, 0.00005]
    assert rates(["--voc-root", "x"], steps) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("argv", "iterations", "drops"),
    [
        (["--coco-root", "x"], 320_000, [150_000, 250_000, 310_000]),
        (["--voc-root", "x", "--recipe", "voc12"], 100_000, [45_000, 75_000, 95_000]),
        (["--voc-root", "x", "--recipe", "ssd120k"], 120_000, [80_000, 100_000]),
        (["--voc-root", "x", "--recipe", "released"], 100_000, [40_000, 75_000, 90_000]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) and isinstance(x[0], str) else "",
)
def test_the_other_schedules_of_the_paper(argv, iterations, drops):
    assert train.parse_args(argv).iterations == iterations
    for i, drop in enumerate(drops):
        before, after = rates(argv, [drop - 1, drop])
        assert before == pytest.approx(0.05 * 0.1**i)
        assert after == pytest.approx(0.05 * 0.1 ** (i + 1))


def test_voc12_is_trained_on_all_of_voc07():
    """Section 4.3: 07 trainval + test and 12 trainval; what is given on the command line wins."""
    args = train.parse_args(["--voc-root", "x", "--recipe", "voc12"])
    assert args.train_sets == ["2007:trainval", "2007:test", "2012:trainval"]
    given = ["--voc-root", "x", "--recipe", "voc12", "--train-sets", "2012:train"]
    assert train.parse_args(given).train_sets == ["2012:train"]
    assert train.parse_args(["--recipe", "voc12"]).train_sets == ["2007:train"]  # shapes


def test_images_that_are_trained_on_and_measured_are_said(shapes_root):
    train_set, test = (
        read_voc(shapes_root, [f"2007:{name}"], SHAPE_CLASSES)[0] for name in ("train", "test")
    )
    said = plan.about_data(train_set, test, ("a",))
    assert said == f"{len(train_set)} training images, {len(test)} to evaluate, 1 classes"
    said = plan.about_data(train_set + test[:3], test, ("a",))
    assert "to evaluate (3 of them trained on: no measure of new images)" in said


def test_images_grow_and_the_rate_follows_the_work():
    """450 of 1,000 steps' worth of work at 100 pixels are nine times as many steps as at 300."""
    argv = ["--recipe", "overfit", "--warmup", "0.1", "--lr", "1", "--iterations", "1000"]
    args = train.parse_args([*argv, "--sizes", "100:.5", "300:1"])
    assert [train.work_and_size(s, args) for s in (0, 450, 899)] == [
        (0, 100), (0.25, 100), (pytest.approx(0.5 * 899 / 900), 100)
    ]  # fmt: skip
    assert [train.work_and_size(s, args)[1] for s in (900, 999)] == [300, 300]
    assert train.work_and_size(900, args)[0] == 0.5
    assert train.work_and_size(950, args)[0] == pytest.approx(0.75)
    assert train.work_and_size(1000, args)[0] == 1
    rates = [train.learning_rate(s, args) for s in range(1000)]
    assert rates.index(max(rates)) == 179  # a tenth of the work
    assert rates[900] == pytest.approx(0.5 / 0.9)
    assert rates[999] == pytest.approx(0.005 / 0.9)


def test_priors_are_as_large_a_part_of_a_small_image():
    model = ScratchDet(Config(backbone="resnet18", width=0.125))
    whole, small = model.priors_at(300), model.priors_at(150)
    assert torch.equal(whole, model.priors_cxcywh)
    cells = [19, 10, 5, 3, 2]  # of 150 pixels; the sixth map has vanished
    assert len(small) == sum(s * s * a for s, a in zip(cells, (4, 6, 6, 6, 4), strict=True))
    assert torch.allclose(small[:4, 2:], whole[:4, 2:])  # sides of the first cell
    assert torch.allclose(small[:4, :2], torch.tensor(4 / 150))  # 8 pixels from cell to cell
    assert torch.allclose(small[-4:, 2:], whole[-8:-4, 2:])  # the fifth map's


def test_the_recipes_sizes_grow_with_the_size_of_the_input():
    argv = ["--recipe", "shapes", "--size", "600"]
    assert train.parse_args(argv).sizes == ((320, 0.55), (448, 0.75), (600, 1.0))
    assert train.parse_args(argv[:2]).sizes == ((160, 0.55), (224, 0.75), (300, 1.0))
    grown = train.parse_args(argv).sizes
    assert train.parse_args(argv, sizes=grown).sizes == grown  # a resumed run's do not grow again


def test_priors_grow_with_the_size_of_the_input():
    small, large = (Config(size=size) for size in (300, 600))
    maps = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    assert torch.equal(make_priors(small, maps)[:, 2:], make_priors(large, maps)[:, 2:])
    tested = make_priors(small, maps, (600, 600))  # multi-scale: the same sides in pixels
    assert torch.allclose(tested[:, 2:], make_priors(small, maps)[:, 2:] / 2)


def test_linear_schedule_rises_and_falls_to_zero():
    argv = ["--recipe", "overfit", "--warmup", "0.1", "--lr", "0.4", "--iterations", "100"]
    got = rates(argv, list(range(100)))
    assert got[0] == pytest.approx(0.04)
    assert got[4] == pytest.approx(0.2)
    assert got[9:11] == pytest.approx([0.4, 0.4])
    assert got[55] == pytest.approx(0.2)  # half of what follows the warm-up
    assert got[99] == pytest.approx(0.4 / 90)
    assert (np.diff(got[:9]) > 0).all()
    assert (np.diff(got[10:]) < 0).all()


def test_the_linear_rule():
    """A batch of a quarter: a quarter of the learning rate, four times the steps, same epochs."""
    args = train.parse_args(["--voc-root", "x", "--batch-size", "32"])
    assert args.lr == pytest.approx(0.0125)
    assert args.iterations == 400_000
    argv = ["--voc-root", "x", "--batch-size", "32"]
    got = rates(argv, [179_999, 180_000])
    assert got == pytest.approx([0.0125, 0.00125])
    args = train.parse_args(["--voc-root", "x", "--batch-size", "32", "--lr", "0.3"])
    assert (args.lr, args.iterations) == (0.3, 400_000)  # what is given stays


@pytest.mark.parametrize(
    ("argv", "images", "width"), [([], 16, 0.125), (["--voc-root", "x"], 128, 1.0)]
)
def test_help_shows_the_defaults_of_the_recipe(argv, images, width, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([*argv, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"images per step, over all processes (default: {images})" in said
    assert f"factor on all channels (default: {width})" in said
    assert "measure mAP during training (default: 0)" in said
    sizes = "(default: 160:0.55 224:0.75 300:1)"
    assert (sizes in said) == (not argv)  # as one writes them
    assert not any(f"default: {x}" in said for x in ("False", "None", ")", "==SUPPRESS=="))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batch-size 0", "--batch-size 0: expected 1 or more"),
        ("--lr -0.1", "--lr -0.1: expected 0 or more"),
        ("--lr nan", "--lr nan: expected 0 or more, finite"),
        ("--seed -1", "--seed -1: expected 0 to 9.2"),
        ("--workers -2", "--workers -2: expected 0 or more"),
        ("--overfit -3", "--overfit -3: expected 0 or more"),
        ("--warmup 2", "--warmup 2.0: expected 0 to 1"),
        ("--drops 0.5 80000", "--drops 80000.0: expected 0 to 1"),
        ("--minutes 0", "--minutes 0.0: expected 0.01 to 527040"),
        ("--minutes inf", "--minutes inf: expected 0.01 to 527040"),
        ("--init=", "--init '': expected a checkpoint, such as weights/photos.pt"),
        ("--minutes 9 --iterations 5", "--minutes and --iterations"),
        ("--recipe budget --drops 0.5", "--drops: recipe budget falls on a line"),
        ("--sizes 0:.5 300:1", "--sizes 0:0.5 300:1: expected sizes of 96 to 300 with shares"),
        ("--sizes 64:.5 300:1", "--sizes 64:0.5 300:1: expected sizes of 96 to 300 with shares"),
        ("--sizes 400:.5 300:1", "--sizes 400:0.5 300:1: expected sizes of 96 to 300 with"),
        ("--sizes 160:.5 224:1", "--sizes 160:0.5 224:1: expected sizes .*, 300:1 at the end"),
        (
            "--sizes 160:.5 224:.4 300:1",
            "--sizes 160:0.5 224:0.4 300:1: expected .* shares that grow",
        ),
        ("--voc-root a --coco-root b", "--voc-root and --coco-root"),
    ],
)
def test_arguments_that_make_no_sense(argv, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train.parse_args(argv.split())


def test_a_size_without_a_share_is_said(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--sizes", "160"])
    assert "'160': expected SIZE:SHARE, such as 160:.5" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:64"])
def test_a_device_that_is_not_here(device, tmp_path):
    with pytest.raises(ValueError, match=f"--device {device}: (expected|torch .* sees)"):
        train.main(["--device", device, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], {"recipe": "shapes", "data": "shapes", "backbone": "root-resnet18",
              "schedule": "linear"}),
        (["--voc-root", "x"], {"recipe": "voc07", "data": "voc", "backbone": "root-resnet34",
                               "width": 1.0, "priors": "voc"}),
        (["--coco-root", "x"], {"recipe": "coco", "data": "coco", "priors": "coco"}),
        (["--voc-root", "x", "--overfit", "16"], {"recipe": "overfit", "augment": "none"}),
        (["--voc-root", "x", "--recipe", "released", "--backbone", "vgg16"],
         {"recipe": "released", "backbone": "vgg16"}),
        (["--voc-root", "x", "--minutes", "9", "--device", "cpu"],
         {"recipe": "budget", "backbone": "resnet18", "width": 0.25, "augment": None,
          "batch_size": 32 * min(2, torch.get_num_threads()), "lr": 0.2}),
        (["--voc-root", "x", "--minutes", "9", "--device", "cuda"],
         {"recipe": "budget", "backbone": "root-resnet18", "width": 1.0, "augment": "ssd",
          "batch_size": 64, "lr": 0.1}),
        (["--voc-root", "x", "--minutes", "9", "--device", "cpu", "--backbone", "vgg16"],
         {"recipe": "budget", "backbone": "vgg16", "width": 0.25}),
    ],
)  # fmt: skip
def test_recipes_follow_from_the_data(argv, wanted):
    args = vars(train.parse_args(argv))
    assert {key: args[key] for key in wanted} == wanted


# ---------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize("backbone", ["root-resnet18", "vgg16"])
@pytest.mark.parametrize("bn", ["all", "backbone", "head", "none"])
def test_decay_and_rate_of_every_parameter(backbone, bn):
    """Caffe's multipliers: weights decay, and the backbone's BN; the head's BN does not; a bias of
    a convolution does not, and learns twice as fast."""
    with torch.device("meta"):
        model = ScratchDet(Config(backbone=backbone, bn=bn, width=0.25))
    groups = train.parameter_groups(model)
    seen = {id(p): (g["weight_decay"], g["lr_factor"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(seen) == len(list(model.parameters()))
    for part_name, part in (("head", model.head), ("features", model.features)):
        for module in part.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                wanted = (5e-4, 1.0)
                if isinstance(module, nn.BatchNorm2d) and part_name == "head":
                    wanted = (0.0, 1.0)
                if isinstance(module, nn.Conv2d) and kind == "bias":
                    wanted = (0.0, 2.0)
                assert seen[id(parameter)] == wanted, (part_name, module, kind)


def test_update_uses_the_groups_the_schedule_and_momentum():
    """Two steps of SGD by hand: v <- .9 v + (g + decay w), w <- w - rate v."""
    args = train.parse_args(["--voc-root", "x", "--lr", "0.1", "--iterations", "10"])
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    groups = [
        {"params": [layer.weight], "weight_decay": 0.5, "lr_factor": 1.0},
        {"params": [layer.bias], "weight_decay": 0.0, "lr_factor": 2.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=123.0, momentum=0.9, fused=True)
    for step in (0, 5):  # the rate falls to a tenth at .45 of the run
        layer.weight.grad = torch.ones(1, 1)
        layer.bias.grad = torch.ones(1)
        train.update(optimizer, step, FINITE, args)
        assert layer.weight.grad is None
    # weight: v = 1 + 1 = 2, w = 1.8; v = 1.8 + 1 + .9 = 3.7, w = 1.8 - .037
    assert layer.weight.item() == pytest.approx(1.8 - 0.037)
    # bias: v = 1, b = 1.8; v = 1.9, b = 1.8 - .02 * 1.9
    assert layer.bias.item() == pytest.approx(1.8 - 0.038)


# ------------------------------------------------------------------------------- bad input


def complaint(capsys, monkeypatch, *flags: object) -> str:
    """What `python train.py FLAGS` says when it fails: one line, no traceback."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_bad_flags_and_data_are_one_line(shapes_root, tmp_path, monkeypatch, capsys):
    base = voc_flags(shapes_root, "--out", tmp_path / "run", "--batch-size", 2)

    def says(*flags, of=base):
        return complaint(capsys, monkeypatch, *of, *flags)

    assert "--save-every 0" in says("--save-every", 0)
    assert "batch of 1" in says("--batch-size", 1)
    assert "batch of 1" in says("--batch-size", 4, "--accumulate", 4)
    assert "--batch-size 10" in says("--batch-size", 10, "--accumulate", 4)
    assert "no VOC1999" in says("--train-sets", "1999:train")
    assert "ImageSets/Main/nothing.txt" in says("--train-sets", "2007:nothing")
    assert str(tmp_path / "absent") in says("--voc-root", tmp_path / "absent")
    only07 = small_tree(tmp_path / "only07", shapes_root, {"trainval": ["train00000"]})
    assert "--train-sets 2007:trainval" in says(of=["--voc-root", only07])
    names = tmp_path / "names.txt"
    names.write_text("circle\ncross\n")
    assert "--classes" in says("--classes", names)  # square is none of them
    assert "width" in says("--width", 9)
    assert "--backbone" in says("--backbone", "alexnet")
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert "a file" in says("--out", blocked)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "last.pt").write_bytes(b"PK\3\4 but no more")
    assert "damaged" in says("--resume", "--out", damaged)
    assert not (tmp_path / "run").exists()  # nothing was started


def test_a_missing_image_and_no_objects_are_named(shapes_root, tmp_path, monkeypatch, capsys):
    two = ["train00000", "train00001"]
    root = small_tree(tmp_path / "copy", shapes_root, {"train": two, "test": two})
    tree, flags = root / "VOC2007", voc_flags(root, "--out", tmp_path / "run")

    image = tree / "JPEGImages" / "train00001.jpg"
    content = image.read_bytes()
    image.unlink()
    assert "train00001" in complaint(capsys, monkeypatch, *flags)
    image.write_bytes(content[: len(content) // 2])  # found when it is decoded
    assert "train00001" in complaint(capsys, monkeypatch, *flags, "--batch-size", 2)
    image.write_bytes(content)
    for xml in (tree / "Annotations").glob("*.xml"):
        text = xml.read_text()
        xml.write_text(text[: text.index("<object>")] + "</annotation>")
    assert "object" in complaint(capsys, monkeypatch, *flags)


def test_a_disk_that_fills_up_is_said_with_the_remedy(shapes_root, tmp_path, monkeypatch, capsys):
    """At a line of the log or a picture; a checkpoint has a message of its own."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "draw_sheet", full)
    flags = run_flags(shapes_root, tmp_path, "--iterations", 1)
    said = complaint(capsys, monkeypatch, *flags)
    assert "No space left on device: --out" in said
    assert "--resume" in said


def test_a_plan_that_does_not_fit_the_memory_names_what_would(shapes_root, tmp_path, monkeypatch):
    needed = []
    real = plan.memory_needed

    def counted(model, images, bf16):
        needed.append((images, real(model, images, bf16)))
        return needed[-1][1]

    monkeypatch.setattr(plan, "memory_needed", counted)
    monkeypatch.setattr(plan, "free_memory", lambda device: 1.5 * 2**30)
    flags = voc_flags(shapes_root, "--out", tmp_path / "run", "--backbone", "root-resnet34")
    with pytest.raises(ValueError, match="GiB") as caught:
        train.main([*flags, "--width", "1", "--batch-size", "128", "--no-bf16"])
    message = str(caught.value)
    assert "1.5 GiB are free" in message
    images, bytes_needed = needed[0]
    assert images == 128
    # 320 MB of activations an image (computed elsewhere), and what surrounds them
    assert 128 * 0.28e9 < bytes_needed < 128 * 0.60e9
    assert f"{bytes_needed / 2**30:.1f} GiB" in message
    assert "--accumulate 32 " in message or "--accumulate 64 " in message
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    shapes_root, tmp_path, monkeypatch
):
    flags = run_flags(shapes_root, tmp_path)
    real, calls = train.multibox_loss, []

    def poisoned(*args):
        loss_loc, loss_conf, positives = real(*args)
        calls.append(1)
        return loss_loc * (float("nan") if len(calls) == 10 else 1), loss_conf, positives

    monkeypatch.setattr(train, "multibox_loss", poisoned)
    with pytest.raises(ValueError, match="not finite at step 3"):
        train.main(flags)
    assert torch.load(tmp_path / "last.pt")["step"] == 2
    assert all(v.isfinite().all() for v in torch.load(tmp_path / "last.pt")["model"].values())
    assert len(json.loads((tmp_path / "nonfinite.json").read_text())["images"]) == 4
