"""VOC files in the folders, with the names and suffixes, that people's tools leave."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from trees import (
    an_object,
    drop,
    flags,
    listed,
    make_coco,
    make_voc,
    make_yolo,
    picture,
    run_check,
    write,
    write_coco,
    xml_of,
)

from plumbing.files import SUFFIXES, BadData, Findings, decode_pixels, open_record, read_classes
from plumbing.run_folder import FILES
from plumbing.sources import open_data, sets_there
from plumbing.voc import list_sets, read_voc


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


# ---- the layouts that tools write


def move(voc, pictures, annotations, root=None):
    """The files of the tree, without its lists, in other folders below `root`; {} is the name."""
    root = root or voc.parent / "mine"
    for name in "ab":
        for folder, suffix, to in (
            ("JPEGImages", "jpg", pictures), ("Annotations", "xml", annotations),
        ):  # fmt: skip
            path = root / to.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            (voc / folder / f"{name}.{suffix}").rename(path)
    return root


@pytest.mark.parametrize(
    ("pictures", "annotations"),
    [
        ("images/{}.jpg", "annotations/{}.xml"),
        ("{}.jpg", "{}.xml"),
        ("JPEGImages/{}.jpg", "Annotations/{}.xml"),
        ("Images/{}.jpg", "images/annotations/{}.xml"),
        ("data/{}.jpg", "labels/{}.xml"),
        ("img/{}.jpg", "img/{}.XML"),
        ("{}.jpg", "Annotations/{}.xml"),
    ],
)
def test_no_lists_at_all(voc, pictures, annotations):
    root = move(voc, pictures, annotations)
    write(root / "class_names.txt", "_background_\ndog\n")
    write(root / "._a.xml", b"\0\5\x16\7")  # a Mac's own
    write(root / "__MACOSX/images/._a.jpg", b"\0\5\x16\7")
    picture(root / "SegmentationClass/a.png", (7, 7))  # labelme's
    assert list_sets(root) == ["all"]
    records, classes = read_voc(root, ["all"])
    assert ([record.name for record in records], classes) == (["a", "b"], ["dog"])
    assert all(record.path.suffix == ".jpg" for record in records)
    with pytest.raises(BadData, match=r"no lists there.*2 annotations.*--train-sets all@train"):
        read_voc(root, ["2007:trainval"])
    args = flags(voc_root=root, classes=root / "class_names.txt")
    assert open_data(args, ["all"])[1] == ("dog",)


@pytest.mark.parametrize(
    ("pictures", "annotations"),
    [
        ("{set}/{}.jpg", "{set}/{}.xml"),
        ("{set}/images/{}.jpg", "{set}/annotations/{}.xml"),
        ("images/{set}/{}.jpg", "annotations/{set}/{}.xml"),
        ("JPEGImages/{set}/{}.jpg", "Annotations/{set}/{}.xml"),
    ],
)
def test_folders_are_sets(voc, tmp_path, pictures, annotations, capsys):
    for name in ("train", "valid"):
        tree = make_voc(tmp_path / name)
        move(tree, *(t.replace("{set}", name) for t in (pictures, annotations)), tmp_path / "mine")
    root = tmp_path / "mine"
    write(root / "README.dataset.txt", "x")
    assert list_sets(root) == ["train", "valid"]
    assert [r.name for r in read_voc(root, ["valid"])[0]] == ["valid/a", "valid/b"]
    assert len(read_voc(root, ["train", "valid"])[0]) == 4
    message = "Sets there: train valid. Choose: --train-sets train --eval-sets valid"
    with pytest.raises(BadData, match=message):
        read_voc(root, ["2007:trainval"])
    assert run_check(capsys, voc_root=root, classes="auto")[0] == 0


@pytest.mark.parametrize(
    "line", ["cam1/a", "cam1/a.jpg", "cam1\\a", "./cam1/a", "JPEGImages/cam1/a.jpg", '"cam1/a" 1']
)
def test_lists_with_folders(voc, line):
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (voc / folder / "cam1").mkdir()
        (voc / folder / f"a.{suffix}").rename(voc / folder / f"cam1/a.{suffix}")
    write(voc / "ImageSets/Main/mine.txt", f"{line}\n")
    (record,), _ = read_voc(voc, ["mine"])
    assert (record.name, record.path) == ("cam1/a", voc / "JPEGImages/cam1/a.jpg")


def test_folders_that_are_no_sets_to_train_on(voc, tmp_path):
    for name in ("apple", "pear"):
        tree = make_voc(tmp_path / name)
        move(tree, f"{name}/{{}}.jpg", f"{name}/{{}}.xml", tmp_path / "mine")
    message = "Sets there: apple pear. Choose: --train-sets SET --eval-sets SET, or .* all@train "
    with pytest.raises(BadData, match=message):
        read_voc(tmp_path / "mine", ["train"])
    assert len(read_voc(tmp_path / "mine", ["all@train", "all@val"])[0]) == 4


def test_lists_of_cvat_and_lists_beside_main(voc):
    for name, lines in (("default", "a\nb\n"), ("dog_default", "a  1\nb -1\n")):
        write(voc / f"ImageSets/Main/{name}.txt", lines)
    assert list_sets(voc) == ["default", "trainval"]
    write(voc / "ImageSets/flat.txt", "a\n")
    assert len(read_voc(voc, ["flat"])[0]) == 1


@pytest.mark.parametrize(
    "suffix", [".jfif", ".jpe", ".JPG", ".Png", ".webp", ".bmp", ".avif", ".jp2"]
)
def test_suffixes_that_pillow_reads(voc, suffix):
    if suffix not in SUFFIXES and suffix == suffix.lower():
        pytest.skip(f"this Pillow has no {suffix}")
    kind = Image.EXTENSION[suffix.lower()]
    (voc / "JPEGImages/a.jpg").unlink()
    Image.new("RGB", (60, 40)).save(voc / f"JPEGImages/a{suffix}", format=kind)
    for line in ("a", f"a{suffix}"):
        write(voc / "ImageSets/Main/mine.txt", line)
        (record,), _ = read_voc(voc, ["mine"])
        assert record.path.suffix == suffix
        assert decode_pixels(open_record(record), record).size == (60, 40)


def test_a_picture_of_a_format_that_is_not_read_is_named(voc):
    (voc / "JPEGImages/a.jpg").rename(voc / "JPEGImages/a.heic")
    with pytest.raises(BadData, match=r"trainval.txt:1: no image \S+/a.jpg, but a.heic"):
        read_voc(voc, ["trainval"])


@pytest.mark.parametrize("on_disk", ["NFD", "NFC"])
def test_names_from_a_mac(voc, on_disk):
    """It stores the e of ecrou and its accent as two characters; lists and XML have one."""
    name, listed_form = "\u00e9crou", {"NFD": "NFC", "NFC": "NFD"}[on_disk]
    stored = unicodedata.normalize(on_disk, name)
    (voc / "JPEGImages/a.jpg").rename(voc / f"JPEGImages/{stored}.jpg")
    write(voc / f"Annotations/{stored}.xml", xml_of(an_object(unicodedata.normalize("NFD", name))))
    write(voc / "Annotations/b.xml", xml_of(an_object(unicodedata.normalize("NFC", name))))
    write(voc / "ImageSets/Main/mine.txt", unicodedata.normalize(listed_form, f"{name}\nb\n"))
    records, classes = read_voc(voc, ["mine"])
    assert (len(records), classes) == (2, [name])
    write(voc / "names", unicodedata.normalize("NFD", name))
    assert read_voc(voc, ["mine"], read_classes(voc / "names"))[1] == [name]


@pytest.mark.parametrize("name", ["background", "Background", "__background__"])
def test_background_is_no_class(voc, name, capsys):
    write(voc / "Annotations/b.xml", xml_of(an_object(name), an_object(name)))
    for classes in (None, ["dog"]):
        message = rf"b.xml:4: class '{name}' \(2 objects\): background is what no box covers"
        with pytest.raises(BadData, match=message):
            read_voc(voc, ["trainval"], classes)
    records, counts = drop(read_voc, voc, ["trainval"])
    assert counts == {"class named background": 2}
    assert records[0].labels.tolist() == [1]


def test_one_class_in_two_spellings_is_noted(voc, capsys):
    write(voc / "Annotations/b.xml", xml_of(an_object("Dog"), an_object("guide-dog")))
    write(voc / "Annotations/a.xml", xml_of(an_object(), an_object("guide dog")))
    status, out = run_check(capsys, voc_root=voc, classes="auto")
    assert status == 0
    assert listed(out, "note", r"sets trainval  classes 'Dog' and 'dog': one class")
    assert listed(out, "note", r"sets trainval  classes 'guide dog' and 'guide-dog'")


# ---- parts of a set


def test_parts_of_a_set_are_apart_and_the_same_anywhere(voc):
    names = [f"part{n:03}" for n in range(300)]
    for name in names:
        (voc / f"JPEGImages/{name}.jpg").symlink_to(voc / "JPEGImages/a.jpg")
        (voc / f"Annotations/{name}.xml").symlink_to(voc / "Annotations/a.xml")
    write(voc / "ImageSets/Main/mine.txt", "\n".join(names))
    train, val = ([r.name for r in read_voc(voc, [f"mine@{part}"])[0]] for part in ("train", "val"))
    assert sorted(train + val) == names
    assert len(val) == 60
    write(voc / "ImageSets/Main/again.txt", "\n".join(reversed(names)))
    assert {r.name for r in read_voc(voc, ["again@val"])[0]} == set(val)
    write(voc / "ImageSets/Main/few.txt", "a\nb\n")
    assert [[r.name for r in read_voc(voc, [f"few@{part}"])[0]] for part in ("train", "val")] in (
        [["a"], ["b"]],
        [["b"], ["a"]],
    )
    assert [r.name for r in read_voc(voc, ["mine@train", "mine@val"])[0]] == train + val
    with pytest.raises(ValueError, match="mine@trian: expected mine@train or mine@val"):
        read_voc(voc, ["mine@trian"])


# ---- a run of ours among the data


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo", "flat voc", "flat coco", "flat yolo"])
def test_a_run_among_the_data_changes_nothing_of_it(tmp_path, kind):
    """--out in any folder of the data, or that folder itself: its drawings are no pictures, its
    JSON files no sets."""
    root = tmp_path / "data"
    if kind == "voc":
        make_voc(root)
    elif kind == "flat voc":
        for name in "ab":
            picture(root / f"{name}.jpg")
            write(root / f"{name}.xml", xml_of(an_object()))
    elif kind == "yolo":
        make_yolo(root)
    elif kind == "flat yolo":
        picture(root / "a.jpg")
        write(root / "a.txt", "0 0.5 0.5 0.5 0.5")
        write(root / "classes.txt", "bolt")
    else:
        root.mkdir()
        content = make_coco(root)[1]
        write_coco(root, content)
        if kind == "flat coco":
            (root / "annotations/instances_train2017.json").rename(root / "train2017/labels.json")
            (root / "annotations").rmdir()
    args = flags(**{f"{kind[-4:].strip()}_root": str(root)}, classes=None)
    args.classes = "auto" if args.voc_root else None

    def all_of_it():
        sets = list(dict.fromkeys([*sets_there(args), *["all"] * (args.yolo_root is not None)]))
        found = Findings(collect=True)  # YOLO's val shows nothing
        return sets, [str(open_data(args, [name], findings=found)) for name in sets]

    before = all_of_it()
    for folder in [root, *filter(Path.is_dir, sorted(root.rglob("*")))]:
        for out in (folder, folder / "run"):
            new = [out / name for name in FILES if not (out / name).exists()]
            for path in new:
                write(path, '{"images": ["a"], "annotations": []}')
            picture(out / "detections/0000500.png")
            assert all_of_it() == before, out
            shutil.rmtree(out / "run" if out == folder else out, ignore_errors=True)
            shutil.rmtree(out / "detections", ignore_errors=True)
            for path in new:
                path.unlink(missing_ok=True)
