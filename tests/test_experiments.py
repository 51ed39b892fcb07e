"""The benches that need no rival installed: peer_run's inputs, and step_bench, run once."""

import sys

import pytest
import torch

import data
from experiments import peer_run, step_bench
from runs import run_flags


def test_peer_sees_the_same_pixels_and_boxes():
    """0..1 inside the photograph, its mean outside, boxes in pixels, each image its own."""
    batch = data.Batch(
        images=torch.full((2, 3, 300, 300), 255, dtype=torch.uint8),
        inside=torch.tensor([[0, 0, 300, 300], [0, 0, 150, 300]]),
        colour=torch.tensor([data.NEUTRAL] * 2),
        boxes_xyxy=torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4]]),
        labels=torch.tensor([3, 7]), offsets=torch.tensor([0, 0, 2]), indices=torch.tensor([5, 6]),
    )  # fmt: skip
    full, half = peer_run.inputs(batch)
    torch.testing.assert_close(full, torch.ones(3, 300, 300))
    torch.testing.assert_close(half[:, :, :150], torch.ones(3, 300, 150))
    assert (half[:, 0, 200] * 255).tolist() == pytest.approx([123, 117, 104])
    empty, two = peer_run.targets(batch)
    assert empty["boxes"].shape == (0, 4)
    assert two["labels"].tolist() == [3, 7]
    assert two["boxes"][0].tolist() == [0, 0, 150, 300]


def test_the_parts_of_a_step_are_timed(shapes_root, tmp_path, capsys):
    step_bench.main(run_flags(shapes_root, tmp_path))
    said = capsys.readouterr().out
    assert all(part in said for part in step_bench.PARTS)


def test_without_torchvision_there_is_no_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(ValueError, match="pip install torchvision"):
        peer_run.main(["--voc-root", "anywhere"])
