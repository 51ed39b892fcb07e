"""The training program: its numbers by hand, and real runs of a few steps on drawn shapes.

The runs of the default tier use `resnet18` at a quarter of the width, whose stem has a stride: one
fifth of the work of the root block.
"""

import contextlib
import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import eval as evaluation
import scratchdet
import train
from scratchdet import Config, ScratchDet

ROOT = Path(__file__).parents[1]
FAST = ("--backbone", "resnet18", "--width", "0.25", "--workers", "0")
OVERFIT_STEPS = 250
CONTROL_STEPS = 450


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A VOC tree of drawn shapes: 12 images to train on, 4 to test."""
    return data.draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=12, num_test=4)


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    """main() takes over SIGINT and SIGTERM; pytest wants them back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def data_flags(root: Path) -> list[str]:
    """The flags of a tree of drawn shapes, whose six names the program reads from a file."""
    names = root / "names.txt"
    names.write_text("\n".join(data.SHAPE_CLASSES))
    sets = ["--train-sets", "2007:train", "--eval-sets", "2007:test"]
    return ["--voc-root", str(root), *sets, "--classes", str(names), "--augment", "flip"]


def voc_flags(root: Path, *more: object) -> list[str]:
    """The flags of a cheap run."""
    return [*data_flags(root), *FAST, *map(str, more)]


# ----------------------------------------------------------------------------- the schedule


def rates(argv: list[str], steps: list[int]) -> list[float]:
    args = train.parse_args(argv)
    return [train.learning_rate(step, args) for step in steps]


def test_the_papers_schedule():
    """Section 4.1: .05, a tenth after 45k, 75k and 95k of 100k iterations of 128 images."""
    args = train.parse_args(["--voc-root", "x"])
    assert (args.recipe, args.batch_size, args.iterations) == ("voc07", 128, 100_000)
    assert (args.momentum, args.weight_decay, args.augment) == (0.9, 5e-4, "ssd")
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
        data.read_voc(shapes_root, [f"2007:{name}"], data.SHAPE_CLASSES)[0]
        for name in ("train", "test")
    )
    said = train.about_data(train_set, test)
    assert said == f"{len(train_set)} training images, {len(test)} to evaluate"
    said = train.about_data(train_set + test[:3], test)
    assert said.endswith("to evaluate (3 of them trained on: no measure of new images)")


def test_images_grow_and_the_rate_follows_the_work():
    """450 of 1,000 steps' worth of work at 100 pixels are nine times as many steps as at 300."""
    argv = ["--schedule", "linear", "--warmup", "0.1", "--lr", "1", "--iterations", "1000"]
    args = train.parse_args([*argv, "--sizes", "100:.5", "300:1"])
    assert [train.progress(s, args) for s in (0, 450, 899)] == [
        (0, 100), (0.25, 100), (pytest.approx(0.5 * 899 / 900), 100)
    ]  # fmt: skip
    assert [train.progress(s, args)[1] for s in (900, 999)] == [300, 300]
    assert train.progress(900, args)[0] == 0.5
    assert train.progress(950, args)[0] == pytest.approx(0.75)
    assert train.progress(1000, args)[0] == 1
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


def test_linear_schedule_rises_and_falls_to_zero():
    argv = ["--schedule", "linear", "--warmup", "0.1", "--lr", "0.4", "--iterations", "100"]
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
    ("argv", "images", "width"), [([], 4, 0.125), (["--voc-root", "x"], 128, 1.0)]
)
def test_help_shows_the_defaults_of_the_recipe(argv, images, width, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([*argv, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"images of a step, over all processes (default: {images})" in said
    assert f"factor on all channels (default: {width})" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batch-size 0", "--batch-size 0: expected 1 or more"),
        ("--lr -0.1", "--lr -0.1: expected 0 or more"),
        ("--lr nan", "--lr nan: expected 0 or more"),
        ("--seed -1", "--seed -1: expected 0 or more"),
        ("--workers -2", "--workers -2: expected 0 or more"),
        ("--overfit -3", "--overfit -3: expected 0 or more"),
        ("--ema 2", "--ema 2.0: expected 0 to 1"),
        ("--drops 0.5 80000", "--drops 80000.0: expected 0 to 1"),
        ("--minutes 0", "--minutes 0.0: expected 0.01 or more"),
        ("--minutes 9 --iterations 5", "--minutes and --iterations"),
        ("--recipe budget --drops 0.5", "--drops: the schedule is a line"),
        ("--sizes 160:.5 224:1", "--sizes 160:0.5 224:1: expected 300:1 at the end"),
        ("--sizes 160:.5 224:.4 300:1", "--sizes: expected shares that grow"),
        ("--voc-root a --coco-root b", "--voc-root and --coco-root"),
        ("--data coco", "--data coco: where is it"),
        ("--backbone vgg16 --stem 3 1 1", "--stem: vgg16 has its own"),
        ("--coco-root x --classes names.txt", "--classes names.txt: COCO's files"),
    ],
)
def test_arguments_that_make_no_sense(argv, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train.parse_args(argv.split())


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
                               "width": 1.0, "priors": "voc", "difficult": True}),
        (["--coco-root", "x"], {"recipe": "coco", "data": "coco", "priors": "coco",
                                "difficult": False}),
        (["--voc-root", "x", "--overfit", "16"], {"recipe": "overfit", "augment": "none"}),
        (["--voc-root", "x", "--recipe", "released", "--backbone", "vgg16"],
         {"recipe": "released", "backbone": "vgg16"}),
        (["--voc-root", "x", "--minutes", "9", "--device", "cpu"],
         {"recipe": "budget", "backbone": "resnet18", "width": 0.25, "augment": "flip",
          "batch_size": 8, "lr": 0.1}),
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
    groups = train.parameter_groups(model, 5e-4)
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
    optimizer = torch.optim.SGD(groups, lr=123.0, momentum=0.9)
    for step in (0, 5):  # the rate falls to a tenth at .45 of the run
        layer.weight.grad = torch.ones(1, 1)
        layer.bias.grad = torch.ones(1)
        train.update(optimizer, layer, None, step, args)
        assert layer.weight.grad is None
    # weight: v = 1 + 1 = 2, w = 1.8; v = 1.8 + 1 + .9 = 3.7, w = 1.8 - .037
    assert layer.weight.item() == pytest.approx(1.8 - 0.037)
    # bias: v = 1, b = 1.8; v = 1.9, b = 1.8 - .02 * 1.9
    assert layer.bias.item() == pytest.approx(1.8 - 0.038)


def test_averaged_weights():
    model = nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(10.0)
        model.running_mean.fill_(4.0)
        model.num_batches_tracked.fill_(7)
    ema = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    train.average_weights(ema, model, 0.9)
    assert ema["weight"].item() == pytest.approx(1.0)
    assert ema["running_mean"].item() == pytest.approx(0.4)
    assert ema["num_batches_tracked"].item() == 7
    train.average_weights(ema, model, 0.9)
    assert ema["weight"].item() == pytest.approx(1.9)


# ----------------------------------------------------------------------------- checkpoints


def test_save_keeps_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        train.save(path, {"step": step})
    assert torch.load(path)["step"] == 3
    assert torch.load(tmp_path / "previous.pt")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("failing", ["write", "disk full", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        train.save(path, {"step": step})

    def half_written(checkpoint, file):
        file.write(b"half a check")
        if failing == "disk full":  # as torch says it
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        raise OSError(28, "No space left on device")

    def refuse(*_):
        raise OSError(5, "Input/output error")

    if failing in ("write", "disk full"):
        monkeypatch.setattr(train.torch, "save", half_written)
    else:
        monkeypatch.setattr(train.os, failing, refuse)
    with pytest.raises(ValueError, match=r"last\.pt: cannot write the checkpoint"):
        train.save(path, {"step": 3})
    monkeypatch.undo()
    assert torch.load(path)["step"] == 2
    assert torch.load(tmp_path / "previous.pt")["step"] in (1, 2)
    train.save(path, {"step": 4})  # and what was left behind is in nobody's way
    assert torch.load(path)["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_cut_log_drops_later_and_half_written_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    train.cut_log(log, 3)  # nothing there yet
    assert not log.exists()
    lines = [json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(5)]
    log.write_text("".join(lines) + '{"step": 5, "lo')
    train.cut_log(log, 3)
    assert log.read_text() == "".join(lines[:3])


# ------------------------------------------------------------------------------ whole runs


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict]:
    return [line for line in log_of(out) if "loss" in line]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, running statistics, momentum, averaged weights, and every loss."""
    one, two = torch.load(a / "last.pt"), torch.load(b / "last.pt")
    assert one["step"] == two["step"]
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    for key, value in (one["ema"] or {}).items():
        assert torch.equal(value, two["ema"][key]), key
    for key, value in one["optimizer"]["state"].items():
        assert torch.equal(
            value["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"]
        )
    keys = ("step", "loss", "loc", "conf", "positives", "grad_norm", "lr")
    rows = [[{k: line[k] for k in keys} for line in steps_of(out)] for out in (a, b)]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def whole_run(shapes_root, tmp_path_factory) -> Path:
    """Five steps, never interrupted: the folder of the run."""
    out = tmp_path_factory.mktemp("whole")
    train.main(run_flags(shapes_root, out))
    return out


def run_flags(root: Path, out: Path, *more) -> list[str]:
    flags = ["--batch-size", 4, "--iterations", 5, "--save-every", 2, "--ema", 0.5, "--lr", 0.02]
    flags += ["--sizes", "160:.5", "300:1"]  # grows at the last step
    return voc_flags(root, *flags, "--out", out, *more)


def test_a_run_leaves_what_it_says(whole_run, shapes_root, capsys):
    log = steps_of(whole_run)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
    assert all(line["loss"] == pytest.approx(line["loc"] + line["conf"]) for line in log)
    assert all(line["positives"] > 1 for line in log)
    about = json.loads((whole_run / "run.json").read_text())
    assert about["args"]["batch_size"] == 4
    assert about["config"]["classes"] == list(data.SHAPE_CLASSES)
    assert torch.load(whole_run / "previous.pt")["step"] == 4
    model, checkpoint = scratchdet.load(whole_run / "last.pt")
    assert checkpoint["step"] == 5
    assert model.config.backbone == "resnet18"
    assert any(whole_run.rglob("*.png")), "no picture of detections"
    records, _ = data.read_voc(shapes_root, ["2007:test"], data.SHAPE_CLASSES)
    found = evaluation.run_detector(model, records, what=None)
    assert len(found) == 4


def test_evaluation_uses_the_running_statistics_and_goes_back_to_training(shapes_root):
    """In the middle of a run: detections do not depend on the batch, and nothing is disturbed."""
    torch.manual_seed(0)
    records, classes = data.read_voc(shapes_root, ["2007:test"], data.SHAPE_CLASSES)
    model = ScratchDet(Config(backbone="resnet18", width=0.25, classes=tuple(classes))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pairs, fours = (
        evaluation.run_detector(model, records, batch_size=n, what=None) for n in (2, 4)
    )
    for one, other in zip(pairs, fours, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("workers", "how"), [(0, "SIGTERM"), (1, "crash")])
def test_a_resumed_run_equals_one_that_never_stopped(
    whole_run, shapes_root, tmp_path, monkeypatch, workers, how
):
    """Stopped by a signal, it saves; crashed, it goes back to the last checkpoint."""
    flags = run_flags(shapes_root, tmp_path, "--workers", workers, "--resume")
    update, last_step = train.update, []

    def interrupted(optimizer, model, ema, step, args):
        update(optimizer, model, ema, step, args)
        last_step.append(step)
        if step == 2 and how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 2 and how == "crash":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            train.main(flags)
    if how == "SIGTERM":
        assert stopped.value.code == 128 + signal.SIGTERM
    saved = torch.load(tmp_path / "last.pt")["step"]
    assert saved in ((3, 4) if how == "SIGTERM" else (2,))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # a line that the machine died in
    train.main(flags)
    assert_same_run(whole_run, tmp_path)


def test_frozen_weights_stay_and_the_others_learn(shapes_root):
    """A network of one's own, with a part that has no gradients."""
    args = train.parse_args(["--batch-size", "2"])
    args.bf16 = False
    records, classes = data.read_voc(shapes_root, ["2007:train"], data.SHAPE_CLASSES)
    model = ScratchDet(Config(backbone="resnet18", width=0.125, classes=tuple(classes)))
    model.features.stem.requires_grad_(False)
    frozen, free = model.features.stem[0][0].weight, model.head.loc[0][0].weight
    before = frozen.clone(), free.clone()
    optimizer = torch.optim.SGD(train.parameter_groups(model, 5e-4), lr=0.1, momentum=0.9)
    batches = data.batches(records, 300, batch_size=2, seed=0, augment="flip")
    log, _ = train.forward_backward(model, model, batches, args)
    wanted = math.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad))
    assert log[3].item() == pytest.approx(wanted, rel=1e-4)
    train.update(optimizer, model, None, 0, args)
    assert torch.equal(frozen, before[0])
    assert not torch.equal(free, before[1])


class Dropping(nn.Module):
    """A backbone that draws random numbers."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.channels = body, body.channels

    def forward(self, x):
        return [nn.functional.dropout(m, 0.3, self.training) for m in self.body(x)]


def test_a_network_with_dropout_resumes_bit_for_bit(shapes_root, tmp_path, monkeypatch):
    make_body = scratchdet.make_body
    monkeypatch.setattr(scratchdet, "make_body", lambda config: Dropping(make_body(config)))
    more = ["--iterations", 3, "--width", 0.125, "--resume"]
    whole, resumed = (run_flags(shapes_root, tmp_path / name, *more) for name in ("a", "b"))
    train.main(whole)

    def crash(optimizer, model, ema, step, args):
        if step == 2:
            raise KeyboardInterrupt
        update(optimizer, model, ema, step, args)

    update = train.update
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", crash)
        with pytest.raises(KeyboardInterrupt):
            train.main(resumed)
    train.main(resumed)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_measuring_on_the_way_changes_nothing(whole_run, shapes_root, tmp_path):
    train.main(run_flags(shapes_root, tmp_path, "--eval-every", 2))
    assert_same_run(whole_run, tmp_path)
    measured = [line for line in log_of(tmp_path) if "mAP" in line]
    assert [line["step"] for line in measured] == [1, 3]
    assert all(0 <= line["mAP_area"] <= 1 for line in measured)
    minutes = [line["cpu_minutes"] for line in measured]
    end = json.loads((tmp_path / "results.json").read_text())["cpu_minutes"]
    assert 0 < minutes[0] <= minutes[1] <= end


def test_an_overfit_run_is_measured_again_on_its_own_images(shapes_root, tmp_path):
    train.main(voc_flags(shapes_root, "--overfit", 2, "--iterations", 1, "--out", tmp_path))
    again = tmp_path / "again.json"
    train.evaluation.main([f"{tmp_path}/last.pt", "--workers", "0", "--json", str(again)])
    expected = json.loads((tmp_path / "results.json").read_text())
    assert expected["images"] == 2
    assert expected.pop("cpu_minutes") > 0
    assert json.loads(again.read_text()) == expected


def test_resuming_with_another_flag_or_other_classes_is_refused(whole_run, shapes_root, tmp_path):
    with pytest.raises(ValueError, match="--batch-size 8.*started with 4"):
        train.main(run_flags(shapes_root, whole_run, "--resume", "--batch-size", 8))
    sets = {"train": ["train00000", "train00001"], "test": ["test00000"]}
    fewer = small_tree(tmp_path / "fewer", shapes_root, sets)
    with pytest.raises(ValueError, match="started with 12 training images, the data has 2"):
        train.main(run_flags(shapes_root, whole_run, "--resume", "--voc-root", fewer))
    (shapes_root / "names.txt").write_text("x\n")
    names = tmp_path / "other.txt"
    names.write_text("\n".join([*data.SHAPE_CLASSES[1:], data.SHAPE_CLASSES[0]]))
    with pytest.raises(ValueError, match="classes|detects"):
        train.main(run_flags(shapes_root, whole_run, "--resume", "--classes", names))


def test_a_run_that_is_there_moves_aside(whole_run, shapes_root, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    for place in ("run-1", "run-2"):
        train.main(run_flags(shapes_root, tmp_path / "run", "--iterations", 1))
        assert f"held another run, now in {place}" in capsys.readouterr().out
        assert len(steps_of(tmp_path / "run")) == 1
    for file in ("last.pt", "previous.pt", "log.jsonl", "results.json"):
        assert (tmp_path / "run-1" / file).read_bytes() == (whole_run / file).read_bytes()
    assert len(steps_of(tmp_path / "run-2")) == 1


def test_a_resumed_run_takes_its_data_from_another_place(whole_run, shapes_root, tmp_path):
    """The same flags otherwise, a recipe's own numbers written out; and it may skip steps now."""
    moved, names, out = tmp_path / "moved", tmp_path / "names.txt", tmp_path / "out"
    moved.symlink_to(shapes_root, target_is_directory=True)
    names.write_text("\n".join(data.SHAPE_CLASSES))
    out.mkdir()
    shutil.copy(whole_run / "last.pt", out)
    more = ["--voc-root", moved, "--classes", names, "--skip-nonfinite", "--std", 1, 1, 1]
    more += ["--drops", 0.45, 0.75, 0.95]
    args, checkpoint = train.resolve(run_flags(shapes_root, out, "--resume", *more))
    assert (args.voc_root, args.classes, args.skip_nonfinite) == (str(moved), str(names), True)
    assert checkpoint["step"] == 5
    args, _ = train.resolve(["--out", str(out), "--resume"])
    assert args.voc_root == str(shapes_root)
    with pytest.raises(ValueError, match="--coco-root x.*started with None"):
        train.resolve(["--out", str(out), "--resume", "--coco-root", "x"])


@pytest.mark.cuda
def test_the_programs_on_a_gpu(shapes_root, tmp_path, monkeypatch, capsys):
    """Train, resume, time and measure there; the first loss is the CPU's, to what TF32 rounds."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    flags, run = voc_flags(shapes_root, "--batch-size", 4, "--workers", 2), str(tmp_path / "run")
    for device in ("cpu", "cuda"):
        one_step = ["--device", device, "--no-bf16", "--iterations", "1"]
        train.main([*flags, *one_step, "--out", str(tmp_path / device)])
    here, there = (steps_of(tmp_path / device)[0] for device in ("cpu", "cuda"))
    assert there["positives"] == pytest.approx(here["positives"])
    assert there["loss"] == pytest.approx(here["loss"], rel=0.01)
    assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=0.05)

    flags += ["--device", "cuda", "--out", run]
    long = [*flags, "--iterations", "45", "--save-every", "25", "--eval-every", "30"]
    train.main(long)
    os.replace(f"{run}/previous.pt", f"{run}/last.pt")  # of step 25
    train.main([*long, "--resume"])
    log = steps_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(45))
    assert log[-1]["loss"] < log[0]["loss"]
    train.main([*flags, "--bench"])
    assert re.search(r"peak memory \d", capsys.readouterr().out)
    monkeypatch.setattr(evaluation, "SECONDS", 0.1)
    for more in ([], ["--fps"]):
        evaluation.main([f"{run}/last.pt", "--device", "cuda", *more])
    assert re.search(r"mAP 0\.[\s\S]*batch 8: network \d", capsys.readouterr().out)


def test_a_full_width_root_resnet34_trains_a_step_at_batch_2(shapes_root, capsys):
    """The one full-width step of this tier. Prints the CPU time it took."""
    torch.manual_seed(0)
    args = train.parse_args(["--batch-size", "2", "--backbone", "root-resnet34", "--width", "1"])
    args.bf16 = False
    records, classes = data.read_voc(shapes_root, ["2007:train"], data.SHAPE_CLASSES)
    model = ScratchDet(Config(classes=tuple(classes))).to(memory_format=torch.channels_last)
    groups = train.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
    batches = data.batches(records, 300, batch_size=2, seed=0, augment="flip")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.process_time()
    log, images = train.forward_backward(model, model, batches, args)
    assert len(images) == 2
    assert log.isfinite().all()
    assert log[2] > 1  # positives an image
    train.update(optimizer, model, None, 1000, args)
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f" [Root-ResNet-34, one step of 2 images: {seconds:.1f} CPU s]", end="")
    after = model.state_dict()
    still = [key for key, value in before.items() if torch.equal(value, after[key])]
    # On the 1x1 map BatchNorm makes +1 and -1 of any two numbers, so that nothing flows back.
    assert not [
        k for k in still if not k.startswith(("features.extras.3", "head.loc", "head.conf.5"))
    ]
    assert "head.loc.1.0.weight" not in still


def test_accumulation_averages_the_losses_of_its_micro_batches(shapes_root):
    """Each divided by its own positives, as Caffe's iter_size does; not by those of all."""
    torch.manual_seed(0)
    records, classes = data.read_voc(shapes_root, ["2007:train"], data.SHAPE_CLASSES)
    model = ScratchDet(Config(backbone="resnet18", width=0.25, classes=tuple(classes)))
    gradients, logs = [], []
    for batch_size, accumulate, start in ((2, 1, 0), (2, 1, 1), (4, 2, 0)):
        args = train.parse_args(["--batch-size", str(batch_size), "--accumulate", str(accumulate)])
        args.bf16 = False
        batches = data.batches(records, 300, batch_size=2, seed=0, augment="none", start_step=start)
        log, _ = train.forward_backward(model, model, batches, args)
        logs.append(log)
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(logs[2][:3], (logs[0] + logs[1])[:3] / 2)
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-6)


def torchrun(folder: Path, *flags: object, processes: int = 2) -> None:
    """train.py in several processes on this machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "train.py"), *map(str, flags)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_equal_two_micro_batches(shapes_root, tmp_path):
    """2 ranks x 8 images, and one process with 16 in two micro-batches: the same weights to 1e-5.

    The running statistics may differ: rank 0 saw half of the images, as on Caffe's GPUs.
    """
    flags = voc_flags(shapes_root, "--batch-size", 16, "--iterations", 2, "--lr", 0.02)
    torchrun(tmp_path, *flags, "--out", tmp_path / "two")
    train.main([*flags, "--accumulate", "2", "--out", str(tmp_path / "one")])
    one, two = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    keys = [key for key in one if "running" not in key and "num_batches" not in key]
    worst = max((one[key] - two[key]).abs().max().item() for key in keys)
    assert worst < 1e-5, worst
    losses = [[line["loss"] for line in steps_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


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


def small_tree(root: Path, source: Path, sets: dict[str, list[str]]) -> Path:
    """VOC2007 in `root`, with some images of another tree."""
    tree = root / "VOC2007"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tree / name).mkdir(parents=True)
    for split, names in sets.items():
        (tree / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for file in (f"{part}/{n}" for n in names for part in ("JPEGImages", "Annotations")):
            for found in (source / "VOC2007").glob(f"{file}.*"):
                (tree / file).with_suffix(found.suffix).write_bytes(found.read_bytes())
    return root


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
    real = train.machine.memory_needed

    def counted(model, images, bf16):
        needed.append((images, real(model, images, bf16)))
        return needed[-1][1]

    monkeypatch.setattr(train.machine, "memory_needed", counted)
    monkeypatch.setattr(train.machine, "free_memory", lambda device: 1.5 * 2**30)
    flags = voc_flags(shapes_root, "--out", tmp_path / "run", "--backbone", "root-resnet34")
    with pytest.raises(ValueError, match="GiB") as caught:
        train.main([*flags, "--width", "1", "--batch-size", "128"])
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
    flags = run_flags(shapes_root, tmp_path, "--log-gradients")
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


# ------------------------------------------------------------------------------- minutes


def start(folder: Path, *flags: object, threads: int = 1) -> subprocess.Popen:
    """`python train.py FLAGS` in a process of its own; what it prints goes to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "printed.txt", "a") as printed:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, flags)],
            cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, seconds: float) -> str:
    """Waits for a good end; what it printed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    process.kill()  # if it still runs
    printed = (folder / "printed.txt").read_text()
    assert process.wait() == 0, f"after at most {seconds} s:\n{printed[-3000:]}"
    return printed


@pytest.mark.slow
def test_overfits_sixteen_photographs(voc_root, tmp_path, capsys):
    """The first 16 ids of VOC07 train, no augmentation: mAP >= .95 on themselves in 300 steps."""
    flags = ["--voc-root", voc_root, "--train-sets", "2007:train", "--overfit", 16]
    flags += ["--width", 0.125, "--stem", 3, 1, 1]  # the network of the quick start
    flags += ["--out", tmp_path, "--iterations", OVERFIT_STEPS]
    begin = time.monotonic()
    finish(start(tmp_path, *flags, threads=2), tmp_path, 600)
    result = json.loads((tmp_path / "results.json").read_text())
    losses = [line["loss"] for line in steps_of(tmp_path)]
    with capsys.disabled():
        print(
            f" [mAP {result['mAP']:.3f} after {len(losses)} steps, loss {losses[0]:.1f} -> "
            f"{losses[-1]:.2f}, {time.monotonic() - begin:.0f} s]",
            end="",
        )
    assert len(losses) <= 300
    assert result["images"] == 16
    assert result["mAP"] >= 0.95


def shuffle_labels(root: Path, seed: int = 0) -> None:
    """Deals the class names of the whole train split anew among its boxes: as many of each."""
    files = sorted((root / "VOC2007" / "Annotations").glob("train*.xml"))
    name = re.compile("<name>(.*?)</name>")
    texts = [file.read_text() for file in files]
    names = [found for text in texts for found in name.findall(text)]
    dealt = iter(np.random.default_rng(seed).permutation(names).tolist())
    for file, text in zip(files, texts, strict=True):
        file.write_text(name.sub(lambda _: f"<name>{next(dealt)}</name>", text))


@pytest.mark.slow
def test_controls_on_shapes(tmp_path, capsys):
    """What the metric gives to a network that cannot know: untrained below .01; trained in the
    same way, but with the labels shuffled among all boxes, below .30 and below the true labels."""
    roots = {
        name: data.draw_shapes(tmp_path / name, num_train=400, num_test=80)
        for name in ("true", "shuffled")
    }
    shuffle_labels(roots["shuffled"])
    runs = {}
    for name, root in roots.items():  # a core each
        flags = [*data_flags(root), "--recipe", "shapes", "--iterations", CONTROL_STEPS]
        runs[name] = start(tmp_path / name, *flags, "--workers", 0, "--out", tmp_path / name)
    for name, process in runs.items():
        finish(process, tmp_path / name, 600)
    found = {
        name: json.loads((tmp_path / name / "results.json").read_text())["mAP"] for name in runs
    }
    torch.manual_seed(0)
    records, _ = data.read_voc(roots["true"], ["2007:test"], data.SHAPE_CLASSES)
    config = torch.load(tmp_path / "true" / "last.pt")["config"]
    found["untrained"] = evaluation.evaluate(
        ScratchDet(Config.from_dict(config)), records, metric="voc07"
    )["mAP"]
    with capsys.disabled():
        print(" [mAP:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()), end="]")
    assert found["untrained"] < 0.01
    assert found["shuffled"] < 0.30
    assert found["true"] > found["shuffled"] + 0.10  # it did learn, from as many images
