"""Config, and reading checkpoints: ours, older ones, and files that are none."""

import argparse
import json
import math
import pickle
from dataclasses import asdict, replace

import pytest
import torch

from plumbing.checkpoint import read_checkpoint
from scratchdet import Config, ScratchDet, add_config_flags, load_detector

NARROW = Config(backbone="root-resnet18", width=0.25, classes=("a", "b", "c"))


def test_config_survives_json():
    config = Config(
        backbone="resnet18", bn="none", width=0.5, stem=(3, 2, 1), classes=("dog", "cat"),
        priors="coco", channels="bgr", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0),
    )  # fmt: skip
    assert Config.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert Config.from_dict(asdict(Config())) == Config()
    assert Config.from_dict({"backbone": "vgg16", "l2_norm": True}).l2_norm


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"std": (58.0, 0.0, 58.0)}, "3 numbers above 0"),
        ({"backbone": "resnet99"}, "backbone = 'resnet99': expected one of .*root-resnet34"),
        ({"bn": "some"}, "bn = 'some'"),
        ({"extras": "none"}, "extras = 'none'"),
        ({"priors": "kitti"}, "priors = 'kitti'"),
        ({"channels": "hsv"}, "channels = 'hsv'"),
        ({"width": 0}, "width = 0"),
        ({"width": float("nan")}, "width = nan"),
        ({"classes": ()}, "classes"),
        ({"classes": ("dog", "dog")}, "different names"),
        ({"classes": "dog"}, "classes = 'dog': expected a tuple"),  # not the classes d, o and g
        ({"stem": (2, 1, 1)}, "odd kernel"),
        ({"stem": (3, 0, 1)}, "odd kernel"),
        ({"stem": (3, 3, 0)}, "odd kernel"),
        ({"size": 0}, "size = 0"),
        ({"size": 100_000}, "size = 100000: expected 1 to 8192 pixels"),
        ({"head_bn_eps": 0.0}, "head_bn_eps = 0.0"),
        ({"head_gamma": 0.0}, "head_gamma = 0.0"),
        ({"std": (58.0, float("nan"), 58.0)}, "3 numbers above 0"),
    ],
)
def test_config_refuses_what_it_does_not_know(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"std": 58}, "std = 58: expected a tuple"),
        ({"width": "half"}, "width = 'half': expected a float"),
        ({"stem": "wide"}, "stem = 'wide': expected"),
        ({"mean": None}, "mean = None: expected a tuple"),
    ],
)
def test_a_value_of_another_type_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


def test_the_command_line_sets_any_field(capsys):
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    words = ["--bn", "none", "--config", "stem=3,1,1", "extras=conv", "std=58,58,58.5"]
    values = vars(parser.parse_args([*words, "--config", "extras=residual", "l2_norm=False"]))
    assert Config(**values) == Config(bn="none", stem=(3, 1, 1), std=(58, 58, 58.5))
    assert Config(**vars(parser.parse_args([]))) == Config()
    for word in ("depth=3", "classes=dog", "stem", "stem="):
        with pytest.raises(SystemExit):
            parser.parse_args(["--config", word])
        assert f"{word}: expected FIELD=VALUE, where FIELD is one of" in capsys.readouterr().err


def test_config_of_a_newer_version_is_named():
    with pytest.raises(ValueError, match="unknown Config fields .'depth'"):
        Config.from_dict({"depth": 3})


def checkpoint_of(model: ScratchDet) -> dict:
    return {"config": asdict(model.config), "model": model.state_dict(), "step": 7}


def test_a_detector_comes_back_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    model = ScratchDet(NARROW)
    torch.save(checkpoint_of(model), tmp_path / "last.pt")
    loaded, checkpoint = load_detector(tmp_path / "last.pt")
    assert loaded.config == NARROW
    assert not loaded.training
    assert checkpoint["step"] == 7
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_checkpoints_of_before_are_still_read(tmp_path):
    """Of commit 050fbda: without the newer fields of Config; with averaged weights, which win; and
    with options that had no effect."""
    model = ScratchDet(replace(NARROW, backbone="vgg16", width=0.05))
    old = checkpoint_of(model)
    for field in ("l2_norm", "head_bn_eps"):
        del old["config"][field]
    ema = {k: torch.full_like(v, 3) for k, v in model.state_dict().items()}
    for averaged, value in ((None, None), (ema, 3)):
        old["config"] |= {"extras": "conv", "stem": (3, 1, 1)}
        torch.save(old | {"ema": averaged}, tmp_path / "last.pt")
        loaded, _ = load_detector(tmp_path / "last.pt")
        assert loaded.config == model.config
        weights = loaded.state_dict()
        assert all((weights[k] == (v if value is None else value)).all()
                   for k, v in model.state_dict().items())  # fmt: skip


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


def damaged_files(folder) -> dict:
    model = ScratchDet(NARROW)
    good = checkpoint_of(model)
    torch.save(good, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "truncated": whole[: len(whole) // 2],
        "cut by a byte": whole[:-1],
        "code": pickle.dumps({"config": Bomb()}),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    objects = {
        "code in a zip": {"config": Bomb()},
        "weights alone": model.state_dict(),
        "a list": [1, 2],
        "a tensor": torch.zeros(3),
        "another backbone": good | {"config": good["config"] | {"backbone": "resnet99"}},
        "config of numbers": good | {"config": 3},
        "width of another type": good | {"config": good["config"] | {"width": "wide"}},
        "weights of other classes": good | {"config": good["config"] | {"classes": ("a",)}},
        "weights of another width": good | {"config": good["config"] | {"width": 0.5}},
        "a weight missing": good | {"model": dict(list(good["model"].items())[1:])},
        "results are a list": good | {"results": [1]},
        "results are a number": good | {"results": 0.5},
        "threshold is text": good | {"results": {"threshold": "high"}},
        "threshold is NaN": good | {"results": {"threshold": math.nan}},
        "args are text": good | {"args": "--lr 1"},
        "weights are NaN": good | {"model": {k: v * math.nan for k, v in good["model"].items()}},
        "weights that fill the memory": good
        | {"model": dict.fromkeys(good["model"], torch.zeros(1).expand(1 << 50))},
        "weights are text": good | {"model": "weights"},
    }
    for name, value in objects.items():
        torch.save(value, folder / name)
    (folder / "a folder").mkdir()
    return [*contents, *objects, "a folder", "absent"]


@pytest.mark.filterwarnings("ignore")
def test_reading_anything_else_is_one_clear_error(tmp_path):
    of_another = ("another backbone", "weights of other classes", "weights of another width")
    of_another += ("a weight missing", "width of another type", "weights are text")
    of_another += ("weights that fill the memory",)
    for name in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=r"\w") as caught:
            load_detector(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message, name
        assert "\n" not in message, name
        assert len(message) < 600, name
        assert ("of another network" in message) == (name in of_another), name
        if name not in of_another:  # it is the file that is at fault
            with pytest.raises(ValueError, match="not a checkpoint|no such"):
                read_checkpoint(tmp_path / name)
