"""weights/photos.pt is what its card says; the demo; and ship, which writes such files."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from detect import Detector
from experiments import again, demo, ship
from metrics import summarise
from plumbing.checkpoint import read_checkpoint
from plumbing.voc import VOC_CLASSES, read_voc
from runs import run_flags
from scratchdet import load_detector

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "weights" / "photos.pt"


@pytest.fixture(scope="module")
def shipped() -> dict:
    return read_checkpoint(PHOTOS)


def test_the_file_is_what_its_card_says(shipped):
    card = shipped["card"]
    assert PHOTOS.stat().st_size <= 3e6
    assert set(shipped) == {"config", "model", "results", "args", "card", "step", "commit"}
    assert ship.fingerprint(shipped["model"]) == card["sha256"]
    assert {v.dtype for v in shipped["model"].values() if v.dim() == 4} == {torch.float16}
    assert tuple(shipped["config"]["classes"]) == VOC_CLASSES
    assert card["command"] == ship.command_of(shipped["args"])
    assert not set(shipped["args"]) & set(ship.PATHS)
    page = PHOTOS.with_name("README.md").read_text(encoding="utf-8")
    assert page == ship.page(card | {"bytes": PHOTOS.stat().st_size}, PHOTOS.name)


def test_its_map_on_the_first_images(shipped, voc_root):
    """100 photographs of VOC2007 val; other processors round in another way, so not to the bit."""
    card = shipped["card"]["first"]
    records, _ = read_voc(voc_root, ["2007:val"], VOC_CLASSES)
    model, _ = load_detector(PHOTOS)
    found = evaluation.run_detector(model, records[: card["images"]], what=None)
    results = summarise(records[: card["images"]], found, VOC_CLASSES, "voc07")
    assert results["mAP_11point"] == pytest.approx(card["mAP_11point"], abs=0.002)
    assert results["objects"] == card["objects"]


def test_it_finds_what_the_demo_draws(tmp_path):
    demo.main(["--out", str(tmp_path)])
    detector = Detector(PHOTOS)
    for name, expected in (("aeroplane", "aeroplane"), ("room", "tvmonitor")):
        path = tmp_path / f"{name}.jpg"
        with demo.Image.open(path) as picture:
            assert detector(picture).names[0] == expected, name


def test_the_demo_replaces_no_picture_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "room.jpg").write_bytes(b"mine")
    for out, message in ((".", r"--out \.: room.jpg there was not drawn by this program"),
                         ("", "--out '': expected the name of a folder"),
                         ("room.jpg", "--out room.jpg: no folder can be made there")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            demo.main(["--out", out])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("room.jpg", b"mine")]
    for _ in range(2):
        demo.main(["--out", "new"])


def test_detect_takes_it_by_default(tmp_path):
    demo.main(["--out", str(tmp_path)])
    done = subprocess.run(
        [sys.executable, ROOT / "detect.py", tmp_path / "aeroplane.jpg"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "photos.pt" in done.stdout
    assert "aeroplane.jpg: aeroplane" in done.stdout


@pytest.fixture(scope="module")
def whole_run(shapes_root, tmp_path_factory) -> Path:
    """Five steps: the folder of the run."""
    out = tmp_path_factory.mktemp("whole")
    train.main(run_flags(shapes_root, out))
    return out


def test_ship(whole_run, tmp_path):
    """A run's checkpoint becomes a file of half the size with the same detections."""
    out = tmp_path / "weights" / "small.pt"
    ship.main([str(whole_run / "last.pt"), "--out", str(out), "--workers", "0"])
    small, large = read_checkpoint(out), read_checkpoint(whole_run / "last.pt")
    assert out.stat().st_size < 0.4 * (whole_run / "last.pt").stat().st_size
    for name, tensor in small["model"].items():
        torch.testing.assert_close(
            tensor.float(), large["model"][name].float(), rtol=1e-3, atol=1e-6
        )
    assert ship.fingerprint(small["model"]) == small["card"]["sha256"]
    changed = small["model"] | {"head.loc.0.0.weight": small["model"]["head.loc.0.0.weight"] + 1}
    assert ship.fingerprint(changed) != small["card"]["sha256"]
    measured = small["card"]["measured"]
    assert measured["mAP_area"] == pytest.approx(large["results"]["mAP_area"], abs=0.01)
    command = small["card"]["command"].split()
    again = vars(train.parse_args([*command[2:], "--device", "cpu"]))
    assert {k: again[k] for k in ("lr", "iterations", "batch_size", "sizes", "augment")} == {
        k: large["args"][k] for k in ("lr", "iterations", "batch_size", "sizes", "augment")
    }
    text = out.with_name("README.md").read_text()
    assert small["card"]["sha256"] in text
    assert str(tmp_path) not in text


def test_the_runs_before_are_on_the_card(whole_run, tmp_path):
    """Two runs after a shipped file: the first began with it, the second with the first."""
    first, out = tmp_path / "first.pt", tmp_path / "out.pt"
    one = torch.load(whole_run / "last.pt")
    torch.save(one | {"args": one["args"] | {"init": str(PHOTOS)}}, first)
    two = one | {"args": one["args"] | {"init": str(first), "lr": 0.01}}
    torch.save(two, tmp_path / "second.pt")
    ship.main([str(tmp_path / "second.pt"), "--out", str(out), "--workers", "0"])
    card, photos = read_checkpoint(out)["card"], read_checkpoint(PHOTOS)["card"]
    assert card["before"][:-2] == photos["before"]
    assert card["before"][-2]["command"] == photos["command"]
    assert "--lr 0.02" in card["before"][-1]["command"]
    assert card["before"][-1]["cpu_hours"] > 0
    assert "--lr 0.01" in card["command"]


def test_the_mean_of_two_runs(whole_run, tmp_path):
    """--average: every weight and statistic is the mean, and the card says of which runs."""
    one, first, out = torch.load(whole_run / "last.pt"), tmp_path / "first.pt", tmp_path / "out.pt"
    other = {k: v + 0.5 if v.is_floating_point() else v for k, v in one["model"].items()}
    older = one["config"] | {"head_gamma": 0.5, "size": 320}  # neither changes what weights mean

    def run(hours: int, **args) -> dict:
        took = one["results"] | {"cpu_minutes": 60 * hours}
        return one | {"args": one["args"] | args, "results": took}

    torch.save(run(1, seed=5) | {"model": other, "config": older}, first)
    torch.save(run(2, init=str(first)), tmp_path / "second.pt")
    flags = [str(tmp_path / "second.pt"), "--out", str(out), "--workers", "0", "--average"]
    ship.main([*flags, str(first)])
    for name, tensor in read_checkpoint(out)["model"].items():
        mean = one["model"][name] + (0.25 if tensor.is_floating_point() else 0)
        torch.testing.assert_close(tensor.float(), mean.float(), rtol=1e-3, atol=1e-3)
    assert (
        "CPU hours; its weights averaged with those of run 1 |"
        in out.with_name("README.md").read_text()
    )
    third, last = tmp_path / "third.pt", tmp_path / "last.pt"  # began with the mean
    torch.save(run(4, init=str(out), seed=7), third)
    flags = [str(third), "--out", str(last), "--workers", "0", "--size", "288"]
    ship.main([*flags, "--average", str(first), str(out)])
    card, text = read_checkpoint(last)["card"], last.with_name("README.md").read_text()
    assert load_detector(last)[0].config.size == 288
    assert "288 px" in card["network"]
    assert "; its weights averaged with those of run 1 |\n| run 3 |" in text
    assert "; its weights averaged with those of run 1 and with the mean of run 2 |" in text
    assert "| cost | 7.00 CPU hours in all" in text  # each run once
    with pytest.raises(ValueError, match="photos.pt: another network, or other classes, than"):
        ship.main([*flags, "--average", str(PHOTOS)])
    torch.save(one | {"results": None}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="half.pt: step .*, not the end of a run"):
        ship.main([*flags, "--average", str(tmp_path / "half.pt")])


def test_ship_says_whose_pictures_they_were():
    about = {"data": "voc", "train_sets": ["2007:train", "2012:trainval"]}
    assert ship.origin(about, VOC_CLASSES) == "voc"
    assert ship.origin(about, ("cell",)) == "own"
    assert ship.origin(about | {"train_sets": ["train"]}, VOC_CLASSES) == "own"
    assert ship.origin({"data": "shapes"}, ("ring",)) == "shapes"
    assert "snapshots" in ship.limits("voc", 0.1)[2]
    assert not any("Small" in limit for limit in ship.limits("shapes", 0.7))
    assert "not known" in ship.TERMS["own"]


def test_ship_overwrites_nothing_of_others(whole_run, tmp_path):
    run, out = str(whole_run / "last.pt"), tmp_path / "small.pt"
    with pytest.raises(ValueError, match="would be overwritten"):
        ship.main(["x.pt", "--average", run, "--out", run])
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="README.md: would be overwritten; choose another folder"):
        ship.main([run, "--out", str(out)])
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not out.exists()


def test_the_card_has_a_command_that_train_takes():
    """--minutes became iterations; a file of class names has another name elsewhere."""
    for words in (
        ["--minutes", "6"],
        ["--minutes", "6", "--voc-root", "DIR", "--classes", "auto"],
        ["--iterations", "70", "--yolo-root", "DIR", "--classes", "names.txt"],
    ):
        args = vars(train.parse_args([*words, "--device", "cpu"])) | {"iterations": 70}
        command = ship.command_of(args)
        assert "/" not in command
        again = vars(train.parse_args([*command.split()[2:], "--device", "cpu"]))
        for name in ("iterations", "lr", "batch_size", "sizes", "recipe", "data"):
            assert again[name] == args[name], (command, name)
        assert (again["classes"] is None) == (args["classes"] is None)


def test_ship_refuses_a_run_that_is_not_at_its_end(whole_run, tmp_path):
    halfway = torch.load(whole_run / "last.pt") | {"results": None}
    torch.save(halfway, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="not the end of a run"):
        ship.main([str(tmp_path / "half.pt"), "--out", str(tmp_path / "out.pt")])
    with pytest.raises(
        ValueError, match="photos.pt: a shipped file; expected the last.pt of a run"
    ):
        ship.main([str(PHOTOS), "--out", str(tmp_path / "out.pt")])
    del halfway["args"]
    torch.save(halfway, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt: no run of train.py; expected the last.pt"):
        ship.main([str(tmp_path / "bare.pt"), "--out", str(tmp_path / "out.pt")])


def test_what_made_the_photo_detector(shipped):
    """Its 14 runs in order: each begins with the mean before it, as do those averaged with it."""
    jobs = again.jobs_of(shipped["card"])
    assert [job.name for job in jobs if not job.of] == [
        *(f"run{n}" for n in range(1, 7)),
        *(f"run{n}{part}" for n in range(7, 11) for part in ("-1", "")),
    ]
    assert [job.init for job in jobs[:6]] == [None, *(f"run{n}" for n in range(1, 6))]
    of = {job.name: job.of for job in jobs if job.of}
    assert of["mean6"] == ("run6", "run5")
    assert of["mean8"] == ("run8", "run8-1", "run7", "mean7")
    assert jobs[-1].of == ("run10", "run10-1", "mean9")
    assert {job.init for job in jobs if job.name.startswith("run10")} == {"mean9"}


@pytest.mark.slow
def test_a_shipped_file_made_again_has_the_same_bits(shapes_root, tmp_path, capsys):
    """Three runs, a mean of all, a run after it: from the card alone; and only once."""

    def run(name: str, *more: str) -> str:
        train.main(run_flags(shapes_root, tmp_path / name, *more))
        return str(tmp_path / name / "last.pt")

    first, mean, new = run("first"), str(tmp_path / "mean/m.pt"), tmp_path / "new/small.pt"
    other, second = (run(f"s{n}", "--init", first, "--seed", f"{n}") for n in (1, 2))
    flags = "--workers", "0", "--out"
    ship.main([second, "--average", other, first, *flags, mean])
    ship.main([run("last", "--init", mean), *flags, str(new)])
    root, out = str(shapes_root), tmp_path / "again"
    command = [str(new), "--voc-root", root, "--out", str(out), "--today"]
    with pytest.raises(ValueError, match="its classes were read from a file: expected --classes"):
        again.main(command)
    command += ["--classes", str(shapes_root / "names.txt"), "--", "--workers", "0"]
    again.main(command)
    assert "small.pt: the same weights, mAP" in capsys.readouterr().out
    assert read_checkpoint(out / "mean3/small.pt")["card"]["sha256"] in new.with_name(
        "README.md"
    ).read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    again.main(command)  # all is there
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of Unix")
def test_a_stop_reaches_the_run_first(tmp_path, capsys):
    """It may take its time to save: nobody kills it."""
    saves = "import signal, sys, time; from pathlib import Path\n"
    saves += "signal.signal(15, lambda *_: (time.sleep(1), Path('saved').touch(), sys.exit(143)))\n"
    saves += "Path('ready').touch(); time.sleep(60)"

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit, match="130"):
        again.run([sys.executable, "-c", saves], tmp_path, dict(os.environ))
    assert (tmp_path / "saved").exists()
    assert "stopped; the same command goes on" in capsys.readouterr().err


def test_again_says_what_it_needs(whole_run, shipped, tmp_path):
    stranger = shipped["card"]["averaged"][1] | {"commit": "0123abc"}
    with pytest.raises(ValueError, match="run1 was averaged with a file whose runs the card does"):
        again.jobs_of(shipped["card"] | {"before": [], "averaged": [stranger]})
    with pytest.raises(ValueError, match="last.pt: no card; expected a file of `python -m exper"):
        again.main([str(whole_run / "last.pt")])
    with pytest.raises(ValueError, match="voc: where is it. Expected --voc-root DIR"):
        again.main([str(PHOTOS), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="commit 0123abc cannot be had: .*0123abc.*--today runs"):
        again.code_of("0123abc", tmp_path)
