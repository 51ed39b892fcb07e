"""Faults of machines, disks and processes, and inputs of extreme size: nothing lost, all bounded.

Bad data and hostile files are in test_hostile.py, resuming and failing saves in test_train.py.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import metrics
import scratchdet
import train
from plumbing import plan
from plumbing.files import Record
from runs import log_of, ranks_of, run_flags, voc_flags, wait_for_step
from scratchdet import Config, multibox_loss

ROOT = Path(__file__).parents[1]
SMALL = Config(backbone="resnet18", width=0.01, classes=("a",))  # 16 channels everywhere


# --------------------------------------------------------------------------------- training


def test_steps_that_are_not_finite_are_skipped_and_counted(
    shapes_root, tmp_path, monkeypatch, capsys
):
    """The weights and BatchNorm's running statistics never see them."""
    prepare, forward_backward, steps = train.data.prepare, train.forward_backward, []

    def nan(batch, config):
        return prepare(batch, config) * float("nan")

    def poisoned(*args):
        steps.append(len(args) == 5)  # not the steps that only measure the time
        bad = sum(steps) in (2, 3) and steps[-1]
        with monkeypatch.context() as patch:
            patch.setattr(train.data, "prepare", nan if bad else prepare)
            return forward_backward(*args)

    monkeypatch.setattr(train, "forward_backward", poisoned)
    train.main(run_flags(shapes_root, tmp_path, "--skip-nonfinite", "--iterations", 5))
    assert "skipped, not finite: step" in capsys.readouterr().err
    saved = torch.load(tmp_path / "last.pt")
    assert (saved["step"], saved["skipped"]) == (5, 2)
    assert all(v.isfinite().all() for v in saved["model"].values())
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert all(momentum.isfinite().all() for momentum in momenta)
    finite = [np.isfinite(line["loss"]) for line in log_of(tmp_path)]
    assert finite == [True, False, False, True, True]
    listed = json.loads((tmp_path / "nonfinite.json").read_text())
    assert len(listed["images"]) == 4
    assert all(name.startswith("train") for name in listed["images"])


def test_gradients_that_are_not_finite_are_skipped(shapes_root, tmp_path, monkeypatch):
    """The loss is finite, and only its gradient is not."""
    real, calls = train.multibox_loss, []

    def steep(loc, *rest):
        calls.append(1)
        loss_loc, loss_conf, positives = real(loc, *rest)
        cliff = (0 * loc).sum().sqrt() if len(calls) == 8 else 0.0  # 0, whose gradient is NaN
        return loss_loc + cliff, loss_conf, positives

    monkeypatch.setattr(train, "multibox_loss", steep)
    train.main(run_flags(shapes_root, tmp_path, "--skip-nonfinite", "--iterations", 4))
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path))
    assert torch.load(tmp_path / "last.pt")["skipped"] == 1


def test_a_data_worker_that_the_system_kills_is_one_line(shapes_root, tmp_path, monkeypatch):
    update = train.update

    def kill_workers(*args):
        finite = update(*args)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        return finite

    monkeypatch.setattr(train, "update", kill_workers)
    flags = run_flags(shapes_root, tmp_path, "--workers", 1, "--iterations", 99)
    with pytest.raises(
        OSError, match="data worker died.*fewer --workers"
    ):  # `error: ...` in __main__
        train.main(flags)


def test_sync_bn_without_a_gpu_is_refused(shapes_root, tmp_path):
    flags = voc_flags(shapes_root, "--out", tmp_path / "run", "--device", "cpu")
    with pytest.raises(ValueError, match="--sync-bn --device cpu.*GPUs only"):
        train.main([*flags, "--sync-bn"])


def test_too_little_disk_is_said_before_the_first_step(shapes_root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1e6))
    with pytest.raises(ValueError, match="checkpoints need .* GB more, 0.00 GB are free"):
        train.main(voc_flags(shapes_root, "--out", tmp_path / "run", "--batch-size", 2))
    assert not (tmp_path / "run").exists()


def test_too_little_shared_memory_is_said_before_the_first_step(shapes_root, tmp_path, monkeypatch):
    """Two workers, 4 batches of 2 images each: 4.3 MB. Docker gives 64, for all there is."""
    usage = shutil.disk_usage(tmp_path)

    def small(path):
        return usage._replace(free=3e6) if str(path) == "/dev/shm" else usage

    monkeypatch.setattr(shutil, "disk_usage", small)
    flags = voc_flags(shapes_root, "--out", tmp_path / "run", "--batch-size", 2)
    with pytest.raises(ValueError, match="need up to 0.004 GB of /dev/shm.*--workers 1, or"):
        train.main([*flags, "--workers", "2"])
    assert not (tmp_path / "run").exists()
    usage = usage._replace(total=0, free=0)  # what a tmpfs of size=0 says: it has no limit
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    plan.check_shared_memory(128, train.parse_args(["--workers", "2"]))


# ------------------------------------------------------------------------- extreme sizes


def test_all_174640_pairs_of_an_untrained_network_pass(capsys):
    """Equal logits: every probability is 1/21 > .01. Bounded output, memory and time."""
    priors = scratchdet.make_priors(Config())
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loc, logits = torch.zeros(4, len(priors), 4), torch.zeros(4, len(priors), 21)
    boxes, scores, labels, count = scratchdet.detect(loc, logits, priors)
    seconds = time.process_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        print(f" [4 images: {seconds:.2f} CPU s, {grown:.0f} MiB]", end="")
    assert count.tolist() == [200] * 4
    assert boxes.isfinite().all()
    assert scores.max() == pytest.approx(1 / 21)
    assert seconds < 10
    assert grown < 600


def test_an_image_with_5000_boxes_has_a_loss(rng):
    priors = scratchdet.make_priors(Config())
    corner = torch.rand(5000, 2, generator=rng) * 0.9
    boxes = torch.cat([corner, corner + 0.02 + 0.08 * torch.rand(5000, 2, generator=rng)], dim=1)
    loc = torch.zeros(2, len(priors), 4, requires_grad=True)
    logits = torch.zeros(2, len(priors), 21, requires_grad=True)
    labels, offsets = torch.ones(5000, dtype=torch.int64), torch.tensor([0, 5000, 5000])
    begin = time.process_time()
    loss_loc, loss_conf, positives = multibox_loss(loc, logits, priors, boxes, labels, offsets)
    (loss_loc + loss_conf).backward()
    assert time.process_time() - begin < 20
    # Each box of that image has a prior, and their negatives are the rest of it, or three each.
    positives = positives.item()
    assert 5000 <= positives <= len(priors)
    used = positives + min(3 * positives, len(priors) - positives)
    assert loss_conf.item() == pytest.approx(np.log(21) * used / positives, rel=1e-5)
    assert loc.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()  # the image without boxes


def test_10000_images_without_a_box(tmp_path):
    """They add false positives and nothing else, and are trained on as background."""
    picture = Image.new("RGB", (32, 32))
    picture.save(tmp_path / "a.jpg")
    none = np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0)
    empty = [Record(str(i), tmp_path / "a.jpg", (32, 32), *none) for i in range(10_000)]
    box, one = np.array([[2.0, 2.0, 30.0, 30.0]]), np.ones(1, np.int64)
    full = Record("full", tmp_path / "a.jpg", (32, 32), box, one, one == 0, np.array([784.0]))
    hit = metrics.Detections(box, np.array([0.5]), one)
    miss = metrics.Detections(box, np.array([0.9]), one)
    nothing = metrics.Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    records = [full, *empty]
    quiet = evaluation.summarise(records, [hit] + [nothing] * 10_000, ("a",), "coco")
    loud = evaluation.summarise(records, [hit] + [miss] * 10_000, ("a",), "coco")
    assert quiet["mAP_area"] == pytest.approx(1)
    assert loud["mAP_area"] == pytest.approx(1 / 10_001)
    batch = next(data.batches(empty, 32, batch_size=8, seed=0))
    assert batch.offsets.tolist() == [0] * 9


# ------------------------------------------------------------------------------ slow: processes


@pytest.mark.slow
def test_12_kills_at_any_moment_lose_nothing(capsys):
    """kill -9 at random moments and inside the writing of checkpoints; any number of workers."""
    script = [sys.executable, str(ROOT / "tests/harness/kill_runs.py"), "--kills", "12"]
    script += ["--seed", str(int(time.time()))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1800)
    with capsys.disabled():
        print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the last bit" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_ranks_that_are_stopped_and_killed_start_again_and_go_on(shapes_root, tmp_path):
    """Under torchrun: one rank gets SIGTERM, and both stop at the same step with a checkpoint;
    later the other gets SIGKILL. The run ends as one process with two micro-batches does."""
    flags = voc_flags(shapes_root, "--batch-size", 4, "--iterations", 12, "--save-every", 2)
    flags += ["--lr", "0.01", "--width", "0.01", "--no-bf16"]
    one, two = tmp_path / "one", tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        "--max-restarts",
        "2",
        str(ROOT / "train.py"),
        *flags,
        "--out",
        str(two),
        "--resume",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "printed.txt", "w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        try:
            wait_for_step(two / "log.jsonl", 2, process)
            os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
            wait_for_step(two / "log.jsonl", 7, process)
            os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
            code = process.wait(timeout=600)
        finally:
            process.kill()
    said = (tmp_path / "printed.txt").read_text()
    assert code == 0, said[-3000:]
    assert "--resume goes on" in said
    train.main([*flags, "--accumulate", "2", "--out", str(one)])
    logs = [log_of(folder) for folder in (one, two)]
    assert [line["step"] for line in logs[1]] == list(range(12))
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0].keys() == results[1].keys()
