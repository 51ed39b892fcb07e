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


def test_peers_learn_by_their_own_recipes():
    """references/detection: a warm-up from a thousandth, then tenths at 80 and 110 of 120 epochs,
    or a cosine to zero."""
    steps, cosine = peer_run.PEERS["ssd300_vgg16"], peer_run.PEERS["ssdlite320_mobilenet_v3_large"]
    for peer in (steps, cosine):
        assert peer_run.learning_rate(0, 12_000, 501, peer) == pytest.approx(0.001)
    shares = [
        peer_run.learning_rate(s, 12_000, 501, steps) for s in (500, 7999, 8000, 10999, 11000)
    ]
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    shares = [peer_run.learning_rate(s, 12_000, 501, cosine) for s in (4000, 6000, 12_000)]
    assert shares == pytest.approx([0.75, 0.5, 0])


def test_the_parts_of_a_step_are_timed(shapes_root, tmp_path, capsys):
    step_bench.main(run_flags(shapes_root, tmp_path))
    said = capsys.readouterr().out
    assert all(part in said for part in step_bench.PARTS)


@pytest.mark.parametrize(
    ("peer", "module"),
    [("ssd300_vgg16", "torchvision.models.detection"), ("yolo11n", "ultralytics")],
)
def test_a_peer_that_is_not_installed(peer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--peer {peer}: .* pip install {module.split('.')[0]}"):
        peer_run.main(["--voc-root", "anywhere", "--peer", peer])


def test_a_peer_that_cannot_be_used(monkeypatch):
    def broken(name: str):
        raise RuntimeError("operator torchvision::nms does not exist")

    with pytest.raises(ValueError, match="--peer ssd3: expected one of ssd300_vgg16, .*yolo11n"):
        peer_run.main(["--voc-root", "anywhere", "--peer", "ssd3"])
    with pytest.raises(ValueError, match="--minutes -1.0: expected 0.01 to 527040"):
        peer_run.main(["--voc-root", "anywhere", "--minutes", "-1"])
    monkeypatch.setattr(peer_run.importlib, "import_module", broken)
    with pytest.raises(
        ValueError, match=r"torchvision cannot be used \(operator .*belongs to torch"
    ):
        peer_run.main(["--voc-root", "anywhere"])
