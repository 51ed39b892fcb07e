"""The converter between VOC, COCO and YOLO: what comes back is what went in."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from trees import an_object, flags, make_coco, make_voc, picture, write, write_coco, xml_of

import data
from experiments.convert import main as convert_main
from experiments.convert_data import main, training_first, without_crowds
from plumbing.coco import read_coco
from plumbing.sources import open_data
from plumbing.voc import read_voc
from plumbing.yolo import read_yolo


def convert(to, out, *words):
    assert main(["--to", to, "--out", str(out), *map(str, words)]) == 0
    return out


def by_name(records):
    return {record.path.stem: record for record in records}


def equal(old, new, *, difficult=True, area=True):
    """Whether records have the same boxes to half a pixel, and the same bytes of pictures."""
    assert len(old) == len(new)
    new = by_name(new)
    for record in old:
        other = new[record.path.stem]
        assert record.size == other.size
        assert record.path.read_bytes() == other.path.read_bytes()
        np.testing.assert_array_equal(record.labels, other.labels)
        np.testing.assert_allclose(record.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=0.5)
        np.testing.assert_allclose(record.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=2e-6)
        if difficult:
            np.testing.assert_array_equal(record.difficult, other.difficult)
        if area:
            np.testing.assert_allclose(record.area, other.area, rtol=1e-4)


@pytest.fixture
def voc(tmp_path):
    """A tree with fractions, a difficult object, marks in names, and no object in b."""
    tree = make_voc(tmp_path / "source")
    objects = [
        an_object("R&amp;D &lt;x>", (0, 0.5, 60, 39.25)),
        an_object("l'\u00e9crou", difficult=1),
    ]
    write(tree / "Annotations/a.xml", xml_of(*objects, an_object("a: b, c")))
    write(tree / "Annotations/b.xml", xml_of())
    write(tree / "ImageSets/Main/held out.txt", "b\na\n")
    return tree


def test_a_round_trip_over_all_formats(voc, tmp_path, capsys):
    sets = ["--sets", "trainval", "held out"]
    coco = convert("coco", tmp_path / "c", "--voc-root", voc, "--classes", "auto", *sets)
    old, classes = read_voc(voc, ["trainval"])
    assert classes == ["R&D <x>", "a: b, c", "l'\u00e9crou"]
    new, names = read_coco(coco, ["trainval"])
    assert names == classes
    equal(old, new, difficult=False)
    back = convert("voc", tmp_path / "v", "--coco-root", coco)
    equal(old, read_voc(back, ["trainval"])[0], difficult=False)
    assert [r.name for r in read_voc(back, ["held out"], classes)[0]] == ["b", "a"]
    assert (back / "classes.txt").read_text(encoding="utf-8") == "\n".join([*classes, ""])
    capsys.readouterr()
    yolo = convert("yolo", tmp_path / "y", "--voc-root", voc, "--classes", "auto", *sets)
    out = capsys.readouterr().out
    assert "2 objects are difficult, which YOLO has no mark for: they become objects like" in out
    assert "2 images, 6 objects, 3 classes, sets trainval held out" in out
    assert f"python train.py --yolo-root {yolo} --train-sets trainval --eval-sets held out" in out
    new, names = read_yolo(yolo, ["trainval"])
    assert names == classes
    equal(old, new, difficult=False)
    assert sorted(path.name for path in (yolo / "images").iterdir()) == ["a.jpg", "b.jpg"]
    # Ultralytics takes a relative `path` from the current folder, and none from that of data.yaml.
    assert "path:" not in (yolo / "data.yaml").read_text()
    again = convert("coco", tmp_path / "c2", "--yolo-root", yolo, "--sets", "trainval", "--link")
    equal(old, read_coco(again, ["trainval"])[0], difficult=False)


def test_training_gets_the_same_batches_from_all_formats(voc, tmp_path):
    """Bit for bit: boxes, labels, pixels, and the random numbers that the boxes lead to."""
    size = {"size": 30, "batch_size": 4, "seed": 3, "augment": "ssd"}
    words = ("--voc-root", voc, "--classes", "auto", "--sets", "trainval")
    yolo = convert("yolo", tmp_path / "y", *words)
    coco = convert("coco", tmp_path / "c", *words)
    back = convert("voc", tmp_path / "v", "--yolo-root", yolo)
    old = next(data.batches(read_voc(voc, ["trainval"])[0], **size))
    for reader, root in ((read_yolo, yolo), (read_coco, coco), (read_voc, back)):
        new = next(data.batches(reader(root, ["trainval"])[0], **size))
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("there", "first", "last"),
    [
        ("2007_test 2007_train 2007_trainval 2007_val", "2007_train", "2007_val"),
        ("test trainval", "trainval", "test"),
        ("test train", "train", "test"),
        ("train2017 val2017", "train2017", "val2017"),
        ("test train valid", "train", "valid"),
        ("b a", "b", "a"),
    ],
)
def test_what_is_to_train_on_comes_first(there, first, last):
    """Ultralytics trains on the set that data.yaml calls train."""
    ordered = training_first(there.split())
    assert (ordered[0], ordered[-1], sorted(ordered)) == (first, last, sorted(there.split()))


def test_the_command(voc, tmp_path):
    words = ["--to=yolo", "--out", str(tmp_path / "y"), "--voc-root", str(voc), "--classes=auto"]
    convert_main(words)
    assert len(read_yolo(tmp_path / "y", ["trainval"])[0]) == 2


def test_crowds_and_ids_of_coco(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    root, content = make_coco(tmp_path / "source")
    write_coco(root, content)
    yolo = convert("yolo", tmp_path / "y", "--coco-root", root)
    assert "1 crowds are left out" in capsys.readouterr().out
    (record,), classes = read_yolo(yolo, ["train2017"])
    assert (classes, record.labels.tolist()) == (["dog", "toothbrush"], [2])
    voc = convert("voc", tmp_path / "v", "--coco-root", root)
    back = convert("coco", tmp_path / "c", "--voc-root", voc, "--classes", voc / "classes.txt")
    old = [without_crowds(record) for record in read_coco(root, ["train2017"])[0]]
    equal(old, read_coco(back, ["train2017"])[0], area=False)
    assert json.loads((back / "annotations/instances_train2017.json").read_text())["images"] == [
        {"id": 7, "file_name": "000007.jpg", "width": 60, "height": 40}
    ]


def test_pictures_of_one_name_and_sets_that_are_no_file_names(voc, tmp_path):
    for folder, name in (("JPEGImages", "a.jpg"), ("Annotations", "a.xml")):
        (voc / folder / "cam").mkdir()
        (voc / folder / "cam" / name).write_bytes((voc / folder / name).read_bytes())
    picture(voc / "JPEGImages/A.png")
    write(voc / "Annotations/b.xml", xml_of(an_object()))
    write(voc / "Annotations/A.xml", xml_of(an_object()))
    write(voc / "ImageSets/Main/trainval.txt", "a\nA\ncam/a\nb\n")
    sets = ["2007:trainval", "2007:trainval@val"]
    out = convert("yolo", tmp_path / "y", "--voc-root", voc, "--classes", "auto", "--sets", *sets)
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["A-2.png", "a-3.jpg", "a.jpg", "b.jpg"]
    assert len(read_yolo(out, ["2007_trainval"])[0]) == 4
    old = read_voc(voc, sets[1:])[0]
    assert len(read_yolo(out, ["2007_trainval_val"], annotated=False)[0]) == len(old)


def test_it_writes_into_a_new_folder_only(voc, tmp_path):
    write(tmp_path / "out/mine.txt", "mine")
    with pytest.raises(ValueError, match="--out .*: it is not empty"):
        convert("yolo", tmp_path / "out", "--voc-root", voc, "--classes", "auto")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_pictures_that_exif_turns_are_said(voc, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(voc / "JPEGImages/b.jpg", exif=exif)
    convert("yolo", tmp_path / "y", "--voc-root", voc, "--classes", "auto", "--sets", "trainval")
    assert "1 pictures are turned by their EXIF" in capsys.readouterr().out


def test_bad_entries_are_left_out_on_request(voc, tmp_path):
    write(voc / "Annotations/a.xml", xml_of(an_object(), an_object(box=(3, 3, 3, 3))))
    words = ("--voc-root", voc, "--classes", "auto", "--sets", "trainval")
    with pytest.raises(ValueError, match="is empty"):
        convert("coco", tmp_path / "c", *words)
    out = convert("coco", tmp_path / "c", *words, "--drop-bad")
    assert [len(r.labels) for r in read_coco(out, ["trainval"])[0]] == [1, 0]


# ---- the real data: every class


def test_real_voc_through_all_formats(voc_root, tmp_path):
    args = flags(voc_root=voc_root)
    name = ["2007:val@val"]
    old, classes = open_data(args, name)
    assert set(np.concatenate([r.labels for r in old])) == set(range(1, 21))
    words = "--link", "--sets"
    yolo = convert("yolo", tmp_path / "y", "--voc-root", voc_root, *words, *name)
    new, names = read_yolo(yolo, ["2007_val_val"])
    assert tuple(names) == classes
    equal(old, new, difficult=False)
    coco = convert("coco", tmp_path / "c", "--voc-root", voc_root, *words, *name)
    equal(old, read_coco(coco, ["2007_val_val"])[0], difficult=False)
    back = convert("voc", tmp_path / "v", "--yolo-root", yolo, *words, "2007_val_val")
    equal(old, read_voc(back, ["2007_val_val"], classes)[0], difficult=False)


def test_real_coco_through_voc(data_root, tmp_path):
    old, classes = read_coco(data_root / "coco", ["val2017"])
    words = ("--coco-root", data_root / "coco", "--link", "--sets", "val2017")
    new, _ = read_voc(convert("voc", tmp_path / "v", *words), ["val2017"], classes)
    assert sum(int(record.difficult.sum()) for record in old) == 21
    equal(list(map(without_crowds, old)), new, area=False)
