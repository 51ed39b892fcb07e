"""Fixtures that several test files share, and what keeps the suite cheap.

    pytest              the default tier: three CPU minutes at most, after the first build
    pytest -m slow      kills and resumes, mutants, sanitizers, fuzz, overfitting: minutes
    pytest -m cuda      what only a GPU can show

SCRATCHDET_DATA names a folder with VOCdevkit/ and coco/; without it the tests of real data skip.
"""

import os
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # also where pytest is started from another folder

# One thread: tensors are small here, and threads that wait for each other cost CPU time. Tests of
# threads set their own number.
torch.set_num_threads(1)


def pytest_configure(config):
    """Only `-m cuda` sees a GPU: the other tests are the CPU's own (equal bits, ranks of gloo)."""
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """A device whose kernels are built."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    import ops

    if not ops.COMPILED[request.param]:
        pytest.skip(f"the {request.param} kernels are not built ({ops.describe()})")
    return request.param


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with VOCdevkit/ and coco/, or a skip."""
    root = os.environ.get("SCRATCHDET_DATA")
    if not root:
        pytest.skip("SCRATCHDET_DATA is not set: no real data (a folder with VOCdevkit/ and coco/)")
    if not Path(root).is_dir():
        pytest.fail(f"SCRATCHDET_DATA={root}: no such folder")
    return Path(root)


@pytest.fixture(scope="session")
def voc_root(data_root) -> Path:
    """The folder that holds VOC2007/."""
    root = data_root / "VOCdevkit"
    if not (root / "VOC2007").is_dir():
        pytest.skip(f"no VOC2007/ in {root}")
    return root


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A VOC tree of drawn shapes: 12 images to train on, 4 to test."""
    from plumbing.shapes import draw_shapes

    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=12, num_test=4)


@pytest.fixture
def rng() -> torch.Generator:
    """Of this test alone: tests give the same in any order."""
    return torch.Generator().manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """The tiers are budgets of CPU time: say what this run took."""
    own, children = (
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    terminalreporter.write_line(f"CPU time: {own:.0f} s, and {children:.0f} s of its children")
