"""eval.py: from images to numbers, several scales, pictures, the command line."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect as detecting
import eval as evaluation
from experiments.eval_bench import found, random_case
from metrics import Detections, mean, voc_ap
from plumbing.files import decode_pixels, open_record
from plumbing.shapes import SHAPE_CLASSES, draw_shapes
from plumbing.submission import write_comp4
from plumbing.tables import results_text
from plumbing.voc import VOC_CLASSES, read_voc
from scratchdet import Config, ScratchDet, assign_targets, detect

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------- from images to numbers

CLASSES = SHAPE_CLASSES


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Root of a VOC tree with 12 test images of shapes."""
    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_test=12)


@pytest.fixture(scope="module")
def records(shapes):
    return read_voc(shapes, ["2007:test"], CLASSES)[0]


def narrow(**config):
    torch.manual_seed(0)
    return ScratchDet(Config(**{"backbone": "resnet18", "width": 0.1, **config})).eval()


def write_checkpoint(path, model, **more):
    checkpoint = {"config": asdict(model.config), "model": model.state_dict(), "ema": None}
    torch.save(checkpoint | {"step": 0, "args": {}, "commit": "none"} | more, path)
    return str(path)


FIELDS = ("boxes_xyxy", "labels", "difficult", "area")  # of a record, a row a box


class Oracle(torch.nn.Module):
    """A network that answers with the training targets of the records, in their order."""

    def __init__(self, records, config):
        super().__init__()
        self.config, self.records, self.at = config, records, 0
        model = ScratchDet(Config(backbone="resnet18", width=0.1, classes=config.classes))
        self.register_buffer("priors_cxcywh", model.priors_cxcywh)

    def forward(self, images):
        answers = targets(self.records[self.at : self.at + len(images)], self.priors_cxcywh)
        self.at += len(images)
        return answers[1], 20.0 * torch.nn.functional.one_hot(answers[0], self.config.num_classes)


def targets(records, priors_cxcywh):
    boxes = [torch.from_numpy(r.boxes_xyxy / np.array(r.size * 2)).float() for r in records]
    labels = [torch.from_numpy(r.labels) for r in records]
    offsets = torch.tensor([0, *np.cumsum([len(x) for x in labels])])
    return assign_targets(priors_cxcywh, torch.cat(boxes), torch.cat(labels), offsets)


def ceiling(records, num_classes, iou_threshold):
    """AP of the training targets fed back as if predicted: (11-point, area), and says it."""
    priors_cxcywh = narrow().priors_cxcywh
    detections = []
    for start in range(0, len(records), 16):
        some = records[start : start + 16]
        labels, loc = targets(some, priors_cxcywh)
        logits = 20.0 * torch.nn.functional.one_hot(labels, num_classes + 1)
        answers = detect(loc, logits, priors_cxcywh, iou_threshold=iou_threshold)
        detections += detecting.to_pixels(*answers, [r.size for r in some])
    result = voc_ap(records, detections, num_classes)
    eleven, area = mean(result["ap11"]), mean(result["area"])
    print(f"ceiling of {len(records)} images, NMS at {iou_threshold}: mAP {eleven:.4f} (11-point), "
          f"{area:.4f} (area)")  # fmt: skip
    return eleven, area


def test_ceiling_on_shapes(records):
    assert min(ceiling(records, len(CLASSES), 0.9)) >= 0.99


@pytest.mark.slow
def test_ceiling_on_voc07_val(voc_root):
    """Matching, coding, decoding and the evaluator lose nothing; SSD's NMS at .45 does.

    61 of the 6,301 objects overlap another of their class by more than .45, and one of the two
    goes. The 11-point AP forgives none: where a class has lost an object, recall 1 is not reached
    and 10/11 are left. That is so in ten of the 20 classes.
    """
    records, classes = read_voc(voc_root, ["2007:val"], VOC_CLASSES)
    assert len(records) == 2508
    assert min(ceiling(records, len(classes), 0.9)) >= 0.99  # NMS that joins only duplicates
    eleven, area = ceiling(records, len(classes), 0.45)
    assert area >= 0.99
    assert eleven >= 0.95


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_run_detector_keeps_order_mode_and_size(records, batch_size):
    model = Oracle(records, Config(classes=CLASSES)).train()
    result, _ = evaluation.evaluate(model, records, metric="voc07", batch_size=batch_size)
    assert model.training
    assert result["mAP"] >= 0.99
    assert result["images"] == 12
    assert result["objects"] == sum(len(r.labels) for r in records)
    json.dumps(result, allow_nan=False)
    text = results_text(result)
    assert all(name in text for name in (*CLASSES, "small", "mAP"))
    assert len({len(line) for line in text.splitlines()[: len(CLASSES) + 2]}) == 1  # aligned


def test_boxes_are_pixels_of_the_original_and_clipped():
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 1.2], [0, 0, 0, 0]]])
    scores, labels = torch.tensor([[0.9, 0]]), torch.tensor([[3, 0]])
    one = detecting.to_pixels(boxes, scores, labels, torch.tensor([1]), [(500, 375)])[0]
    np.testing.assert_allclose(one.boxes_xyxy, [[50, 75, 250, 375]])
    assert one.labels.tolist() == [3]


def test_an_untrained_network_finds_nothing(records):
    """The control: bounded output, next to no AP."""
    model = narrow(classes=CLASSES)
    detections = evaluation.run_detector(model, records, what=None)
    assert max(len(d.scores) for d in detections) <= 200
    result = evaluation.summarise(records, detections, CLASSES, "coco")
    print(f"untrained: mAP {result['mAP_11point']:.4f} (11-point), {result['mAP_area']:.4f} (area)")
    assert result["mAP_area"] < 0.01


def shard(rank, path, store, out):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2
    )
    model = narrow(classes=CLASSES)
    if rank:  # as after training: other running statistics on every rank
        for buffer in model.buffers():
            buffer.add_(1)
    records = read_voc(path, ["2007:test"], CLASSES)[0][:7]
    result, _ = evaluation.evaluate(model, records, rank=rank, world=2, batch_size=2)
    Path(f"{out}{rank}").write_text(json.dumps(result))


def test_shards_are_put_back_in_order(records, monkeypatch):
    """Ranks 0 to 2 in turn; the last gathers what the others found."""
    parts = []

    def all_gather_object(gathered, mine):
        parts.append(mine)
        gathered[:] = parts + [parts[0]] * (3 - len(parts))

    monkeypatch.setattr(evaluation.dist, "broadcast", lambda tensor, source: None)
    monkeypatch.setattr(evaluation.dist, "all_gather_object", all_gather_object)
    for rank in range(3):
        model = Oracle(records[rank:11:3], Config(classes=CLASSES))
        with contextlib.suppress(ValueError):  # only the last has all parts
            result, _ = evaluation.evaluate(model, records[:11], rank=rank, world=3)
    assert result["mAP"] >= 0.99


@pytest.mark.slow
def test_sharded_evaluation_equals_one_process(shapes, records, tmp_path):
    out = tmp_path / "rank"
    torch.multiprocessing.spawn(shard, (shapes, str(tmp_path / "store"), str(out)), nprocs=2)
    ranks = [json.loads(Path(f"{out}{r}").read_text()) for r in (0, 1)]
    alone, _ = evaluation.evaluate(narrow(classes=CLASSES), records[:7], batch_size=2)
    assert ranks[0] == ranks[1] == json.loads(json.dumps(alone))


# --------------------------------------------------------------------------------- multi-scale


def test_vote_boxes_by_hand():
    boxes = [[0, 0, 99, 99], [0, 0, 99, 89], [200, 200, 240, 240], [0, 0, 99, 99]]
    joined = detecting.vote_boxes(found(boxes, [0.6, 0.4, 0.5, 0.3], [1, 1, 1, 2]))
    assert joined.labels.tolist() == [1, 1, 2]  # another class does not vote
    np.testing.assert_allclose(joined.scores, [0.6, 0.5, 0.3])
    np.testing.assert_allclose(joined.boxes_xyxy[0], [0, 0, 99, 0.6 * 99 + 0.4 * 89])
    soft = detecting.vote_boxes(found(boxes, [0.6, 0.4, 0.5, 0.3], [1, 1, 1, 2]), soft=True)
    # the second stays with .4 * (1 - .9); the best one, with itself, falls to 0 and goes
    np.testing.assert_allclose(soft.scores, [0.6, 0.5, 0.3, 0.04])
    nothing = detecting.vote_boxes(found([], []))
    assert nothing.boxes_xyxy.shape == (0, 4)


def test_one_pass_equals_run_detector(records):
    model = narrow(classes=CLASSES)
    with torch.no_grad():
        expected = evaluation.run_detector(model, records[:2], batch_size=1, what=None)
    for r, one in zip(records[:2], expected, strict=True):
        got = detecting.detect_image(model, decode_pixels(open_record(r), r))
        np.testing.assert_allclose(got.scores, one.scores, atol=1e-5)
        np.testing.assert_allclose(got.boxes_xyxy, one.boxes_xyxy, atol=1e-2)


class Bright(torch.nn.Module):
    """A hand-set network: every prior says how bright its cell is. Pools as a real one shrinks."""

    def __init__(self):
        super().__init__()
        self.config = Config(backbone="resnet18", width=0.1, classes=("light",))
        self.register_buffer("priors_cxcywh", narrow().priors_cxcywh)

    def features(self, images):
        maps = [torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8, ceil_mode=True)]
        while min(maps[-1].shape[-2:]) > 1 and len(maps) < 6:
            maps.append(torch.nn.functional.avg_pool2d(maps[-1], 2, ceil_mode=True))
        return maps

    def head(self, maps):
        sizes = (4, 6, 6, 6, 4, 4)
        cells = [m.flatten(1)[..., None].repeat(1, 1, a) for m, a in zip(maps, sizes, strict=False)]
        bright = torch.cat([c.flatten(1) for c in cells], dim=1)  # (N, P)
        logits = torch.stack([-bright, bright], dim=2) / 60
        return torch.zeros(*bright.shape, 4), logits


@pytest.mark.parametrize("size", [(400, 200), (200, 400)])
def test_multi_scale_finds_it_where_it_is(size):
    image = Image.new("RGB", size)
    corner = np.array([size[0] * 0.7, size[1] * 0.2]).astype(int)
    image.paste((255, 255, 255), (*corner, *(corner + 60)))
    joined = detecting.detect_image(Bright(), image, detecting.MULTI_SCALE)
    sure = joined.boxes_xyxy[joined.scores > 0.5]
    assert len(sure) > 3  # of every scale; none where only a mirrored image would have it
    assert np.abs((sure[:, :2] + sure[:, 2:]) / 2 - corner - 30).max() < 45


def test_multi_scale_runs_the_real_network_at_every_size(records):
    model = narrow(classes=CLASSES)
    image = decode_pixels(open_record(records[0]), records[0])
    seen = []
    hook = model.features.register_forward_hook(lambda _m, _x, maps: seen.append(len(maps)))
    joined = detecting.detect_image(model, image, detecting.MULTI_SCALE)
    hook.remove()
    assert seen[0] == 6
    assert 3 <= min(seen) <= 5  # a level too small is dropped
    assert len(seen) == len(detecting.MULTI_SCALE)
    assert (np.diff(joined.scores) <= 0).all()


# -------------------------------------------------------------------------------------- pictures


# ---------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.pt", narrow(classes=CLASSES))


def test_command_measures_and_draws(checkpoint, shapes, tmp_path, capsys):
    evaluation.main([
        checkpoint, "--voc-root", str(shapes), "--workers", "0", "--min-score", "0.01",
        "--draw", str(tmp_path / "drawn"), "--json", str(tmp_path / "numbers.json"),
        "--results", str(tmp_path / "results.json"), "--comp4", str(tmp_path / "comp4.tar.gz"),
    ])  # fmt: skip
    text = capsys.readouterr().out
    assert "mAP 0.00" in text
    assert "11-point, VOC2007" in text
    assert len(list((tmp_path / "drawn").glob("*.jpg"))) == 12
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == numbers["detections"] > 0
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    with tarfile.open(tmp_path / "comp4.tar.gz") as archive:
        names = archive.getnames()
        lines = archive.extractfile(names[0]).read().decode().splitlines()
    assert names == [f"results/VOC2007/Main/comp4_det_test_{c}.txt" for c in CLASSES]
    name, score, *corners = lines[0].split()
    assert name.startswith("test0")
    assert 0 < float(score) <= 1
    assert len(corners) == 4


def test_command_does_not_draw_through_a_link(checkpoint, shapes, tmp_path):
    (tmp_path / "original.jpg").write_bytes(b"somebody's")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "test00003.jpg").symlink_to(tmp_path / "original.jpg")
    flags = ["--voc-root", str(shapes), "--workers", "0", "--draw", str(tmp_path / "drawn")]
    with pytest.raises(ValueError, match=r"--draw .*drawn: test00003.jpg there is a link"):
        evaluation.main([checkpoint, *flags])
    assert (tmp_path / "original.jpg").read_bytes() == b"somebody's"


def test_a_drawing_replaces_no_picture_of_the_users(checkpoint, shapes, tmp_path, monkeypatch):
    (tmp_path / "test00003.jpg").write_bytes(b"mine")
    monkeypatch.setattr(evaluation, "run_detector", None)  # refused before any detection
    flags = ["--voc-root", str(shapes), "--workers", "0", "--draw", str(tmp_path)]
    with pytest.raises(ValueError, match="test00003.jpg there was not drawn by this program"):
        evaluation.main([checkpoint, *flags])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("test00003.jpg", b"mine")]
    flags[-1] = ""
    with pytest.raises(ValueError, match="--json '': no name"):
        evaluation.main([checkpoint, *flags, "--json", ""])


def write_coco(root, records):
    """The records as a COCO tree whose category ids are 10, 20, ..."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    annotations = []
    for i, r in enumerate(records, start=1):
        (root / "val2017" / f"{i:012}.jpg").write_bytes(r.path.read_bytes())
        for (x0, y0, x1, y1), label in zip(r.boxes_xyxy.tolist(), r.labels.tolist(), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": label * 10, "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
            })  # fmt: skip
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": r.size[0], "height": r.size[1]}
              for i, r in enumerate(records, start=1)]  # fmt: skip
    categories = [{"id": 10 * c, "name": name} for c, name in enumerate(CLASSES, start=1)]
    (root / "annotations" / "instances_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def test_coco_results_are_what_pycocotools_reads(records, tmp_path, monkeypatch, capsys):
    write_coco(tmp_path, records)
    model = Oracle(records, Config(classes=CLASSES))
    monkeypatch.setattr(detecting, "load_detector", lambda *_: (model, {"args": {}}))
    results, numbers = tmp_path / "results.json", tmp_path / "numbers.json"
    evaluation.main(["any.pt", "--coco-root", str(tmp_path), "--workers", "0",
                     "--results", str(results), "--json", str(numbers)])  # fmt: skip
    assert "COCO AP" in capsys.readouterr().out
    coco = json.loads(numbers.read_text())["coco"]
    assert coco["AP"] > 0.95
    assert {row["category_id"] for row in json.loads(results.read_text())} <= set(range(10, 70, 10))
    tools = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        from pycocotools.cocoeval import COCOeval

        truth = tools.COCO(str(tmp_path / "annotations" / "instances_val2017.json"))
        peer = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        peer.evaluate(), peer.accumulate(), peer.summarize()
    # the file holds two decimals of a pixel
    np.testing.assert_allclose(peer.stats, list(coco.values()), atol=0.01)


def test_coco_results_have_no_category_that_the_set_does_not_list(
    records, tmp_path, monkeypatch, capsys
):
    """A file of one category: what is found of the others has no official id, and is left out."""
    kept = CLASSES[1]
    ours = [r for r in records if 2 in r.labels]
    mine = [r._replace(**{k: getattr(r, k)[r.labels == 2] for k in FIELDS}) for r in ours]
    write_coco(tmp_path, mine)
    listing = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(listing.read_text())
    content["categories"] = [c for c in content["categories"] if c["name"] == kept]
    listing.write_text(json.dumps(content))
    model = Oracle(ours, Config(classes=CLASSES))
    monkeypatch.setattr(detecting, "load_detector", lambda *_: (model, {"args": {}}))
    evaluation.main(["any.pt", "--coco-root", str(tmp_path), "--workers", "0",
                     "--results", str(tmp_path / "results.json")])  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["category_id"] for row in rows} == {20}
    assert f"without {CLASSES[0]}, {CLASSES[2]}" in capsys.readouterr().out


def test_a_coco_test_set_has_results_without_numbers(records, tmp_path, monkeypatch, capsys):
    """image_info_test-dev2017.json has no annotations, and its images lie in test2017/."""
    write_coco(tmp_path, records)
    (tmp_path / "val2017").rename(tmp_path / "test2017")
    listing = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(listing.read_text())
    del content["annotations"]
    listing.unlink()
    listing.with_name("image_info_test-dev2017.json").write_text(json.dumps(content))
    model = Oracle(records, Config(classes=CLASSES))
    monkeypatch.setattr(detecting, "load_detector", lambda *_: (model, {"args": {}}))
    argv = ["any.pt", "--coco-root", str(tmp_path), "--eval-sets", "test-dev2017", "--workers", "0"]
    with pytest.raises(ValueError, match="instances_test-dev2017.json"):
        evaluation.main(argv)
    results = tmp_path / "results.json"
    evaluation.main([*argv, "--results", str(results)])
    assert {row["image_id"] for row in json.loads(results.read_text())} <= {
        image["id"] for image in content["images"]
    }
    assert "AP" not in capsys.readouterr().out
    assert len(json.loads(results.read_text())) >= sum(len(r.labels) for r in records)


def test_comp4_files_measure_the_same(tmp_path):
    records, detections = random_case(1)
    whole = [d._replace(boxes_xyxy=d.boxes_xyxy + 1) for d in detections]  # pixels count from 1
    write_comp4(tmp_path / "all.tgz", records, whole, ("a", "b", "c"), 2007, "test")
    rows = {r.name: [] for r in records}
    with tarfile.open(tmp_path / "all.tgz") as archive:
        for label, name in enumerate("abc", start=1):
            member = archive.extractfile(f"results/VOC2007/Main/comp4_det_test_{name}.txt")
            for line in member.read().decode().splitlines():
                image, *numbers = line.split()
                rows[image].append([*map(float, numbers), label])
    tables = [np.array(rows[r.name], float).reshape(-1, 6) for r in records]
    read = [Detections(t[:, 1:5], t[:, 0], t[:, 5].astype(int)) for t in tables]
    expected = voc_ap(records, whole, 3)
    assert expected["ap11"].min() > 0
    np.testing.assert_allclose(voc_ap(records, read, 3)["ap11"], expected["ap11"])


def test_comp4_files_are_named_after_the_tree_and_stay_in_their_folder(shapes, tmp_path):
    """However the set is written; and a class may have any name."""
    names = {name: f"../{name}" for name in CLASSES}
    tree = tmp_path / "VOC2007"
    shutil.copytree(shapes / "VOC2007" / "JPEGImages", tree / "JPEGImages")
    (tree / "ImageSets" / "Main").mkdir(parents=True)
    (tree / "ImageSets" / "Main" / "test.txt").write_text("test00000\n")
    checkpoint = write_checkpoint(tmp_path / "last.pt", narrow(classes=tuple(names.values())))
    for i, (root, name) in enumerate(
        [(tmp_path, "2007:test"), (tmp_path, "VOC2007:test"), (tree, "2007:test"), (tree, "test")]
    ):
        out = tmp_path / f"out{i}"
        evaluation.main([checkpoint, "--voc-root", str(root), "--eval-sets", name,
                         "--workers", "0", "--comp4", str(out)])  # fmt: skip
        written = {str(path.relative_to(out)) for path in out.rglob("*.txt")}
        files = {f"comp4_det_test_.._{name}.txt" for name in CLASSES}
        assert written == {f"results/VOC2007/Main/{file}" for file in files}


def test_the_metric_of_a_set():
    """11-point is VOC2007's, however its folder is written."""
    for sets in (["2007:test"], ["VOC2007:test"], ["2007:train", "2007:val"]):
        assert evaluation.metric_of("voc", sets) == "voc07"
    for sets in (["2012:val"], ["2007:test", "2012:val"], ["test"], ["2007_small:test"]):
        assert evaluation.metric_of("voc", sets) == "voc"
    assert evaluation.metric_of("coco", ["val2017"]) == "coco"


def test_comp4_without_annotations(checkpoint, shapes, tmp_path, capsys, monkeypatch):
    """VOC2012 test: pictures and a list, nothing to measure."""
    tree = tmp_path / "VOC2012"
    (tree / "ImageSets" / "Main").mkdir(parents=True)
    (tree / "JPEGImages").mkdir()
    for path in sorted((shapes / "VOC2007" / "JPEGImages").glob("test*"))[:2]:
        (tree / "JPEGImages" / path.name).write_bytes(path.read_bytes())
    (tree / "ImageSets" / "Main" / "test.txt").write_text("test00000\ntest00001\n")
    command = [checkpoint, "--voc-root", str(tmp_path), "--workers", "0", "--comp4",
               str(tmp_path / "out"), "--eval-sets", "2012:test"]  # fmt: skip
    evaluation.main(command)
    files = sorted((tmp_path / "out/results/VOC2012/Main").glob("comp4_det_test_*.txt"))
    assert len(files) == len(CLASSES)
    assert "mAP" not in capsys.readouterr().out

    with pytest.raises(ValueError, match="of one set of VOC.* asked of voc, 2012:test 2012:test"):
        evaluation.main([*command, "2012:test"])
    (tmp_path / "file").write_text("mine")  # said before the evaluation
    monkeypatch.setattr(evaluation, "run_detector", None)
    with pytest.raises(ValueError, match="--comp4 .*file: no folder can be made there"):
        evaluation.main([*command, "--comp4", str(tmp_path / "file")])
    with pytest.raises(ValueError, match="a.tgz: cannot be written"):
        evaluation.main([*command, "--comp4", str(tmp_path / "file" / "a.tgz")])
    with pytest.raises(ValueError, match="--json .* 2012:test has no annotations"):
        evaluation.main([*command, "--json", str(tmp_path / "numbers.json")])
    (tree / "Annotations").mkdir()  # of one of the two images: a mistake, and not measured
    xml = (shapes / "VOC2007/Annotations/test00000.xml").read_text()
    (tree / "Annotations" / "test00000.xml").write_text(xml)
    with pytest.raises(ValueError, match="1 of its 2 images lack an annotation"):
        evaluation.main(command)
    (tree / "ImageSets" / "Main" / "test.txt").write_text("../test00000\n")
    with pytest.raises(ValueError, match="leaves its folder"):
        evaluation.main(command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}/none.pt"], "none.pt: no such checkpoint"),
        (["{run}/cut.pt"], "cut.pt: not a checkpoint of train.py, or damaged"),
        (["{run}/text.pt"], "text.pt: not a checkpoint of train.py, or damaged"),
        (
            ["{run}/dogs.pt", "--voc-root", "{shapes}"],
            "The network detects dog, cat",
        ),
        (["{pt}", "--voc-root", "{run}"], "--voc-root {run}"),
        (["{pt}", "--voc-root", "{shapes}", "--eval-sets", "2007:nope"], "nope"),
        (["{pt}", "--voc-root", "x", "--coco-root", "y"], "--voc-root and --coco-root"),
        (["{pt}", "--batch-size", "0"], "--batch-size 0"),
        pytest.param(
            ["{pt}", "--device", "cuda"],
            "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["{pt}", "--voc-root", "{shapes}", "--json", "{run}"], "{run}: a folder; expected"),
        (["{pt}", "--voc-root", "{shapes}", "--draw", "{shapes}/VOC2007/JPEGImages"], "--draw"),
    ],
)
def test_bad_input(flags, message, checkpoint, shapes, tmp_path):
    whole = Path(checkpoint).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.jpg").write_text("not a picture")
    write_checkpoint(tmp_path / "dogs.pt", narrow(classes=("dog", "cat")))
    names = {"run": tmp_path, "shapes": shapes, "pt": checkpoint}
    with pytest.raises(ValueError, match=".") as error:
        evaluation.main([flag.format(**names) for flag in flags])
    assert message.format(**names) in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_are_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", tmp_path / "none.pt"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
