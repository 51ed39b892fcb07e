"""Real runs of train.py: of a few steps on drawn shapes, and, slowly, proofs that it learns.

The runs of the default tier use `resnet18` at a quarter of the width, whose stem has a stride: one
fifth of the work of the root block.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
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
from plumbing import run_folder
from plumbing.checkpoint import read_checkpoint
from plumbing.shapes import SHAPE_CLASSES, draw_shapes
from plumbing.voc import read_voc
from runs import (
    FAST,
    assert_same_run,
    data_flags,
    log_of,
    run_flags,
    small_tree,
    start_train,
    steps_of,
    voc_flags,
)
from scratchdet import Config, ScratchDet, load_detector

ROOT = Path(__file__).parents[1]
OVERFIT_STEPS = 250
CONTROL_STEPS = 200
FINITE = dict.fromkeys(train.LOGGED, torch.tensor(1.0))


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def whole_run(shapes_root, tmp_path_factory) -> Path:
    """Five steps, never interrupted: the folder of the run."""
    out = tmp_path_factory.mktemp("whole")
    train.main(run_flags(shapes_root, out))
    return out


def test_a_run_leaves_what_it_says(whole_run, shapes_root, capsys):
    log = steps_of(whole_run)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
    assert all(line["loss"] == pytest.approx(line["loc"] + line["conf"]) for line in log)
    assert all(line["positives"] > 1 for line in log)
    about = json.loads((whole_run / "run.json").read_text())
    assert about["args"]["batch_size"] == 4
    assert about["config"]["classes"] == list(SHAPE_CLASSES)
    assert torch.load(whole_run / "previous.pt")["step"] == 4
    model, checkpoint = load_detector(whole_run / "last.pt")
    assert checkpoint["step"] == 5
    assert model.config.backbone == "resnet18"
    assert any(whole_run.rglob("*.png")), "no picture of detections"
    records, _ = read_voc(shapes_root, ["2007:test"], SHAPE_CLASSES)
    found = evaluation.run_detector(model, records, what=None)
    assert len(found) == 4


def test_evaluation_uses_the_running_statistics_and_goes_back_to_training(shapes_root):
    """In the middle of a run: detections do not depend on the batch, and nothing is disturbed."""
    torch.manual_seed(0)
    records, classes = read_voc(shapes_root, ["2007:test"], SHAPE_CLASSES)
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

    def interrupted(optimizer, step, logged, args):
        update(optimizer, step, logged, args)
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
    records, classes = read_voc(shapes_root, ["2007:train"], SHAPE_CLASSES)
    model = ScratchDet(Config(backbone="resnet18", width=0.125, classes=tuple(classes)))
    model.features.stem.requires_grad_(False)
    frozen, free = model.features.stem[0][0].weight, model.head.loc[0][0].weight
    before = frozen.clone(), free.clone()
    optimizer = torch.optim.SGD(train.parameter_groups(model), lr=0.1, momentum=0.9, fused=True)
    batches = data.batches(records, 300, batch_size=2, seed=0, augment="flip")
    log, _ = train.forward_backward(model, model, batches, args)
    wanted = math.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad))
    assert log["grad_norm"].item() == pytest.approx(wanted, rel=1e-4)
    train.update(optimizer, 0, log, args)
    assert torch.equal(frozen, before[0])
    assert not torch.equal(free, before[1])


class Dropping(nn.Module):
    """A backbone that draws random numbers."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.channels = body, body.channels

    def forward(self, x):
        return [nn.functional.dropout(m, 0.3, self.training) for m in self.body(x)]


@pytest.mark.slow
def test_a_network_with_dropout_resumes_bit_for_bit(shapes_root, tmp_path, monkeypatch):
    body = scratchdet.BODIES["resnet18"]
    monkeypatch.setitem(scratchdet.BODIES, "resnet18", lambda config: Dropping(body(config)))
    more = ["--iterations", 3, "--width", 0.125, "--resume"]
    whole, resumed = (run_flags(shapes_root, tmp_path / name, *more) for name in ("a", "b"))
    train.main(whole)

    def crash(optimizer, step, logged, args):
        if step == 2:
            raise KeyboardInterrupt
        update(optimizer, step, logged, args)

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


def test_cpu_minutes_are_those_of_all_starts(whole_run, shapes_root, tmp_path):
    """And of the run alone: what measures it once more after its end does not count."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    torch.save(torch.load(out / "previous.pt") | {"cpu_seconds": 6e5}, out / "last.pt")
    flags, file = run_flags(shapes_root, out, "--resume"), out / "results.json"
    results = train.main(flags)
    spent = sum(os.times()[:4]) / 60
    assert 1e4 < results["cpu_minutes"] <= 1e4 + spent + 0.01
    assert 6e5 < torch.load(out / "last.pt")["cpu_seconds"] < 6e5 + 60 * spent + 1
    assert train.main(flags)["cpu_minutes"] == results["cpu_minutes"]
    assert json.loads(file.read_text())["cpu_minutes"] == results["cpu_minutes"]


def test_a_resumed_run_does_not_need_the_file_that_it_began_with(whole_run, shapes_root, tmp_path):
    """Its size, to which --sizes grows, came from there; now it comes from the checkpoint."""
    run = torch.load(whole_run / "last.pt")
    began = {"init": str(tmp_path / "gone.pt"), "size": 320, "sizes": ((160, 0.5), (320, 1.0))}
    torch.save(run | {"args": run["args"] | began}, tmp_path / "last.pt")
    flags = ["--init", tmp_path / "gone.pt", "--sizes", "160:.5", "320:1", "--resume"]
    args, _ = run_folder.resume(train.parse_args, run_flags(shapes_root, tmp_path, *flags))
    assert (args.size, args.sizes[-1]) == (320, (320, 1.0))
    flags[1] = tmp_path / "other.pt"
    with pytest.raises(ValueError, match="--init .*other.pt: .* was started with .*gone.pt"):
        run_folder.resume(train.parse_args, run_flags(shapes_root, tmp_path, *flags))


def test_an_overfit_run_is_measured_again_on_its_own_images(shapes_root, tmp_path):
    train.main(voc_flags(shapes_root, "--overfit", 2, "--iterations", 1, "--out", tmp_path))
    again = tmp_path / "again.json"
    evaluation.main([f"{tmp_path}/last.pt", "--workers", "0", "--json", str(again)])
    expected = json.loads((tmp_path / "results.json").read_text())
    assert expected["images"] == 2
    assert expected.pop("cpu_minutes") > 0
    assert json.loads(again.read_text()) == expected


def test_resuming_with_another_flag_or_other_classes_is_refused(whole_run, shapes_root, tmp_path):
    for flag, said in (
        ("--config head_gamma=.5", "--config head_gamma=0.5: .* was started with 1.0. A resumed"),
        (
            "--sizes 200:.4 300:1",
            "--sizes 200:0.4 300:1: .* was started with 160:0.5 300:1. A resumed",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            train.main(run_flags(shapes_root, whole_run, "--resume", *flag.split()))
    with pytest.raises(ValueError, match="--batch-size 8.*started with 4"):
        train.main(run_flags(shapes_root, whole_run, "--resume", "--batch-size", 8))
    sets = {"train": ["train00000", "train00001"], "test": ["test00000"]}
    fewer = small_tree(tmp_path / "fewer", shapes_root, sets)
    with pytest.raises(ValueError, match="started with 12 training images, the data has 2"):
        train.main(run_flags(shapes_root, whole_run, "--resume", "--voc-root", fewer))
    (shapes_root / "names.txt").write_text("x\n")
    names = tmp_path / "other.txt"
    names.write_text("\n".join([*SHAPE_CLASSES[1:], SHAPE_CLASSES[0]]))
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
    names.write_text("\n".join(SHAPE_CLASSES))
    out.mkdir()
    shutil.copy(whole_run / "last.pt", out)
    more = ["--voc-root", moved, "--classes", names, "--skip-nonfinite"]
    more += ["--drops", 0.45, 0.75, 0.95]
    flags = run_flags(shapes_root, out, "--resume", *more)
    args, checkpoint = run_folder.resume(train.parse_args, flags)
    assert (args.voc_root, args.classes, args.skip_nonfinite) == (str(moved), str(names), True)
    assert checkpoint["step"] == 5
    args, _ = run_folder.resume(train.parse_args, ["--out", str(out), "--resume"])
    assert args.voc_root == str(shapes_root)
    with pytest.raises(ValueError, match="--coco-root .*x: .*started with None"):
        run_folder.resume(train.parse_args, ["--out", str(out), "--resume", "--coco-root", "x"])


@pytest.mark.cuda
def test_the_programs_on_a_gpu(shapes_root, tmp_path, capsys):
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
    evaluation.main([f"{run}/last.pt", "--device", "cuda"])
    assert re.search(r"mAP 0\.", capsys.readouterr().out)


@pytest.mark.slow
def test_a_full_width_root_resnet34_trains_a_step_at_batch_2(shapes_root, capsys):
    """The one full-width step of this tier. Prints the CPU time it took."""
    torch.manual_seed(0)
    args = train.parse_args(["--batch-size", "2", "--backbone", "root-resnet34", "--width", "1"])
    args.bf16 = False
    records, classes = read_voc(shapes_root, ["2007:train"], SHAPE_CLASSES)
    model = ScratchDet(Config(classes=tuple(classes))).to(memory_format=torch.channels_last)
    groups = train.parameter_groups(model)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=train.MOMENTUM, fused=True)
    batches = data.batches(records, 300, batch_size=2, seed=0, augment="flip")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.process_time()
    log, images = train.forward_backward(model, model, batches, args)
    assert len(images) == 2
    assert all(value.isfinite() for value in log.values())
    assert log["positives"] > 1  # per image
    train.update(optimizer, 1000, log, args)
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
    records, classes = read_voc(shapes_root, ["2007:train"], SHAPE_CLASSES)
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
    for name in ("loc", "conf", "positives"):
        torch.testing.assert_close(logs[2][name], (logs[0][name] + logs[1][name]) / 2)
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- minutes


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
    flags += ["--width", 0.125, "--config", "stem=3,1,1"]  # the network of the quick start
    flags += ["--out", tmp_path, "--iterations", OVERFIT_STEPS]
    begin = time.monotonic()
    finish(start_train(tmp_path, *flags), tmp_path, 600)
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
        name: draw_shapes(tmp_path / name, num_train=400, num_test=80)
        for name in ("true", "shuffled")
    }
    shuffle_labels(roots["shuffled"])
    runs = {}
    for name, root in roots.items():  # a core each
        flags = [*data_flags(root), "--recipe", "shapes", "--batch-size", 8]
        flags += ["--iterations", CONTROL_STEPS]
        runs[name] = start_train(tmp_path / name, *flags, "--workers", 0, "--out", tmp_path / name)
    for name, process in runs.items():
        finish(process, tmp_path / name, 600)
    found = {
        name: json.loads((tmp_path / name / "results.json").read_text())["mAP"] for name in runs
    }
    torch.manual_seed(0)
    records, _ = read_voc(roots["true"], ["2007:test"], SHAPE_CLASSES)
    config = torch.load(tmp_path / "true" / "last.pt")["config"]
    found["untrained"] = evaluation.evaluate(
        ScratchDet(Config.from_dict(config)), records, metric="voc07"
    )[0]["mAP"]
    with capsys.disabled():
        print(" [mAP:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()), end="]")
    assert found["untrained"] < 0.01
    assert found["shuffled"] < 0.30
    assert found["true"] > found["shuffled"] + 0.10  # it did learn, from as many images


@pytest.mark.parametrize(("iterations", "wanted"), [(1, "flip"), (2, "crop")])
def test_a_long_run_on_a_cpu_takes_crops(iterations, wanted, shapes_root, tmp_path, monkeypatch):
    """8 images of 12 are two thirds of an epoch. What was chosen stays, in a resumed run too."""
    monkeypatch.setattr(train, "CROPS_FROM", 1)
    flags = [*data_flags(shapes_root)[:-2], *FAST, "--recipe", "budget"]  # without --augment
    flags += ["--batch-size", "8", "--sizes", "160:.9", "300:1", "--out", str(tmp_path / "run")]
    flags += ["--iterations", str(iterations)]
    train.main(flags)
    assert json.loads((tmp_path / "run/run.json").read_text())["args"]["augment"] == wanted
    assert read_checkpoint(tmp_path / "run/last.pt")["args"]["augment"] == wanted
    monkeypatch.setattr(train, "CROPS_FROM", 0 if wanted == "flip" else 100)
    train.main([*flags, "--resume"])
    assert read_checkpoint(tmp_path / "run/last.pt")["args"]["augment"] == wanted
