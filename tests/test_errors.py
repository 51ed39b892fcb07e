"""experiments/compare.py and experiments/errors.py: why a detector errs, and what changed."""

import numpy as np
import pytest

from experiments import compare
from experiments.eval_bench import found
from metrics import mean, voc_ap, voc_match
from plumbing.shapes import SHAPE_CLASSES, draw_shapes
from plumbing.voc import read_voc

CLASSES = tuple(SHAPE_CLASSES)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Root of a VOC tree with 12 test images of shapes."""
    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_test=12)


@pytest.fixture(scope="module")
def records(shapes):
    return read_voc(shapes, ["2007:test"], CLASSES)[0]


def test_bootstrap_of_a_perfect_and_a_worse_detector(records):
    """The perfect one is at its ceiling in every draw; the other misses the objects of a few."""
    whole = [found(r.boxes_xyxy, np.ones(len(r.labels)), r.labels) for r in records]
    misses = [found([], []) if i % 4 == 0 else one for i, one in enumerate(whole)]
    matched = [voc_match(records, one, len(CLASSES)) for one in (whole, misses)]
    values = compare.bootstrap(matched, len(records), 200, "voc")  # (201, 2, 4)
    assert values.shape == (201, 2, 4)
    np.testing.assert_allclose(values[:, 0, 0], 1)
    expected = voc_ap(records, misses, len(CLASSES))
    assert values[0, 1, 0] == pytest.approx(mean(expected["area"]))
    assert values[0, 1, 3] == pytest.approx(expected["by_size"]["large"][1], nan_ok=True)
    assert 0.6 < values[1:, 1, 0].mean() < 0.9  # three quarters are found
    assert 0.02 < values[1:, 1, 0].std() < 0.3
    assert (values[1:, 1, 0] < 1).mean() > 0.9  # (3/4)**12 of the draws have none of the four
