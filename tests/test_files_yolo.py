"""YOLO files as people and their tools write them: read, or refused by file and line."""

import unicodedata

import pytest
from PIL import Image
from trees import (
    bounded,
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
)

from plumbing.files import BadData
from plumbing.sources import kind_of, open_data
from plumbing.yolo import list_sets, read_yaml, read_yolo


@pytest.fixture
def yolo(tmp_path):
    return make_yolo(tmp_path)


def test_a_good_tree(yolo, capsys):
    for root in (yolo, yolo / "data.yaml"):
        records, classes = read_yolo(root, ["train"])
        assert [record.name for record in records] == ["train/a", "train/b"]
        assert records[0].boxes_xyxy.tolist() == [[15, 10, 45, 30]]
        assert [record.labels.tolist() for record in records] == [[1], [2]]
        assert (records[0].size, records[0].area.tolist()) == ((60, 40), [600])
        assert classes == ["bolt", "nut"]
    assert len(read_yolo(yolo, ["val", "train"])[0]) == 3
    assert run_check(capsys, sets=["train"], yolo_root=yolo)[0] == 0
    assert kind_of(flags(yolo_root=yolo)) == "yolo"
    assert open_data(flags(yolo_root=yolo), ["train"], ("nut", "bolt"))[0][0].labels.tolist() == [2]
    assert capsys.readouterr().err == ""


def test_roots_of_two_kinds_need_a_choice(yolo):
    with pytest.raises(ValueError, match="--voc-root and --yolo-root: give one of them"):
        kind_of(flags(yolo_root=yolo, voc_root=yolo))


def test_a_polygon_is_its_box_and_empty_files_are_images_without_objects(yolo, capsys):
    write(yolo / "labels/train/a.txt", "1 0.25 0.5 0.5 0.25 0.75 0.75\n\n0 .5 .5 .1 .1\n")
    (yolo / "labels/val/c.txt").unlink()
    records, _ = read_yolo(yolo, ["train", "val"])
    assert records[0].boxes_xyxy.tolist() == [[15, 10, 45, 30], [27, 18, 33, 22]]
    assert records[2].labels.tolist() == []
    said = "data: pictures without a label file, taken as without objects: 1, first"
    assert said in capsys.readouterr().err
    with open(yolo / "data.yaml", "a") as file:
        file.write("kpt_shape: [2, 2]\n")  # a box and two points
    write(yolo / "labels/train/a.txt", "1 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9\n")
    assert read_yolo(yolo, ["train"])[0][0].boxes_xyxy.tolist() == [[15, 10, 45, 30]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "4 values; expected class x y width height, or a polygon"),
        ("0 0.5 0.5 0.5 0.5 0.9", "6 values: is the last one a score"),
        ("0 0,5 0.5 0.5 0.5", "expected numbers; got '0 0,5 0.5 0.5 0.5'"),
        ("0 nan 0.5 0.5 0.5", "expected numbers"),
        ("0 0.5 0.5 1e999 0.5", "expected numbers"),
        ("bolt 0.5 0.5 0.5 0.5", "expected numbers; got 'bolt"),
        ("-1 0.5 0.5 0.5 0.5", "the class must be 0, 1"),
        ("0.5 0.5 0.5 0.5 0.5", "the class must be 0, 1"),
        ("0 30 20 30 20", "expected fractions of the image, from 0 to 1; are these pixels"),
        ("0 0.5 0.5 0 0.5", "bolt: box .* is empty"),
        ("0 0.5 0.5 -0.5 0.5", "bolt: box .* is inverted"),
        ("0 1.5 0.5 0.5 0.5", "bolt: box .* lies outside the 60x40 image"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5", "bolt: box .* is empty"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is none of the 2 of .*data.yaml, 0 to 1"),
        ("0\0 0.5 0.5 0.5 0.5", "expected numbers"),
    ],
)
def test_bad_lines(yolo, line, message):
    write(yolo / "labels/train/a.txt", f"1 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(BadData, match=rf"labels/train/a.txt:2: {message}"):
        read_yolo(yolo, ["train"])
    records, counts = drop(read_yolo, yolo, ["train"])
    assert ([len(r.labels) for r in records], sum(counts.values())) == ([1, 1], 1)


def test_one_cause_is_one_error(yolo, capsys):
    write(yolo / "labels/train/a.txt", "7 0.5 0.5 0.2 0.2\n" * 30 + "0 .5 .5 .5 .5\n")
    status, out = run_check(capsys, sets=["train"], yolo_root=yolo)
    assert out.count("refused ") == 1
    assert listed(out, "refused", r"\S+a.txt:1  class 7 \(30 objects\) is none of the 2")
    write(yolo / "labels/train/a.txt", "0 0.5 0.5 0.5 0.5\n" + "0 30 20 9 9\n" * 30)
    status, out = run_check(capsys, sets=["train"], yolo_root=yolo)
    assert out.count("refused ") == 1
    assert listed(out, "refused", r"\S+a.txt:2  .*are these pixels.*and in 29 other lines")
    assert drop(read_yolo, yolo, ["train"])[1] == {"line that is not YOLO's": 30}


def test_bad_files(yolo):
    write(yolo / "labels/train/a.txt", b"\xff0")
    with pytest.raises(BadData, match="a.txt: not UTF-8 text"):
        read_yolo(yolo, ["train"])
    write(yolo / "labels/train/a.txt", "")
    write(yolo / "images/train/b.jpg", b"cut")
    with pytest.raises(BadData, match="b.jpg: not an image"):
        read_yolo(yolo, ["train"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(yolo / "images/train/b.jpg", exif=exif)
    with pytest.raises(BadData, match="b.jpg: its EXIF turns it.*Store it upright"):
        read_yolo(yolo, ["train"])
    records, counts = drop(read_yolo, yolo, ["train", "val"], annotated=False)
    assert (len(records), counts) == (2, {"picture with an EXIF orientation": 1})


def test_labels_that_no_picture_has_are_said(yolo, capsys):
    write(yolo / "labels/train/x.txt", "0 0.5 0.5 0.5 0.5\n")
    out = run_check(capsys, sets=["train"], yolo_root=yolo)[1]
    assert listed(out, "handled", r"\S+x.txt  label files without a picture, left out")
    for name in "ab":
        (yolo / f"labels/train/{name}.txt").rename(yolo / f"labels/train/{name}.label")
    with pytest.raises(
        BadData, match="no objects at all.*expected labels/NAME.txt for images/NAME"
    ):
        read_yolo(yolo, ["train"])


# ---- class names


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data.yaml", "names: [bolt, nut]"),
        ("data.yaml", "names: ['bolt', \"nut\"]  # two\nnc: 2"),
        ("data.yaml", "nc: 2\nnames: ['bolt',\n  'nut']\n"),
        ("data.yaml", "names:\n- bolt\n- nut\n"),
        ("data.yaml", "# x\n---\nnames:\n  0: bolt\n  1: nut # the second\ntrain: images/train"),
        ("data.yaml", "names:\n  1: nut\n  0: bolt\nroboflow:\n  workspace: x\n"),
        ("data.yaml", "names: {0: bolt, 1: 'nut'}"),
        ("dataset.yml", '"names": [bolt, nut]\ndownload: |\n  import x\n  y: [\n'),
        ("mine.yaml", "names: [bolt, nut]\r\ntrain: x\r\n"),
        ("classes.txt", "bolt\nnut\n"),
        ("obj.names", "bolt\nnut\n"),
        ("mine.names", "bolt\nnut"),
        ("labels/classes.txt", "bolt\nnut"),
        ("images/train/_darknet.labels", ""),
    ],
)
def test_where_the_names_are(yolo, file, text):
    (yolo / "data.yaml").unlink()
    if not text:
        with pytest.raises(BadData, match=r"no data.yaml with names, classes.txt.*--classes FILE"):
            read_yolo(yolo, ["train"])
        write(yolo / "mine", "bolt\nnut\n")
        args = flags(yolo_root=yolo, classes=yolo / "mine")
        assert open_data(args, ["train"])[1] == ("bolt", "nut")
        return
    write(yolo / file, text)
    assert read_yolo(yolo, ["train"])[1] == ["bolt", "nut"]


def test_classes_that_are_not_those_of_the_data(yolo):
    assert read_yolo(yolo, ["train"], ["bolt", "nut"])[1] == ["bolt", "nut"]
    with pytest.raises(BadData, match="--classes nut, bolt: .*data.yaml lists bolt, nut: leave --"):
        read_yolo(yolo, ["train"], ["nut", "bolt"])


def test_nc_must_be_the_number_of_names(yolo):
    write(yolo / "data.yaml", "nc: 3\nnames: [bolt, nut]\ntrain: images/train\n")
    with pytest.raises(BadData, match=r"data.yaml: nc is '3', but .*data.yaml has 2 names: bolt, "):
        read_yolo(yolo, ["train"])
    write(yolo / "data.yaml", "nc: 3\ntrain: images/train\n")
    with pytest.raises(BadData, match=r"nc is '3', but --classes has 2 names.*or delete nc"):
        read_yolo(yolo, ["train"], ["bolt", "nut"])


def test_pictures_that_share_a_label_file_are_said(yolo, capsys):
    picture(yolo / "images/train/a.png")
    records, _ = read_yolo(yolo, ["train"])
    assert [record.path.name for record in records] == ["a.jpg", "a.png", "b.jpg"]
    assert [len(record.labels) for record in records] == [1, 1, 1]
    said = "data: pairs of pictures that share one label file, used for both: 1, first a.jpg and "
    err = capsys.readouterr().err
    assert said in err
    assert f"a.png of {yolo}/labels/train/a.txt\n" in err
    assert err.count("\n") == 1


def test_names_with_marks(yolo):
    name = unicodedata.normalize("NFD", "\u00e9crou")
    text = f"names:\n  - driver's\n  - 'it''s # 1, b'\n  - \"a: b\"\n  - {name}\n  - a#b # c\n"
    write(yolo / "data.yaml", text)
    names = ["driver's", "it's # 1, b", "a: b", "\u00e9crou", "a#b"]
    assert read_yolo(yolo, ["train"])[1] == names
    for text in (
        '%YAML 1.1\n---\nnames:\n- "\\xE9crou"\n- "\\u87ba\\u6813"\n...\n',
        'names:\n  ["\\u00e9crou",\n  \u87ba\u6813]\n',
        "names:\n  {0: \u00e9crou, 1: '\u87ba\u6813'}\n",
    ):
        (yolo / "data.yaml").write_text(text, encoding="utf-8")
        assert read_yolo(yolo, ["train"])[1] == ["\u00e9crou", "\u87ba\u6813"]
    write(yolo / "data.yaml", "names: [bolt, '']\n")
    with pytest.raises(BadData, match="names: the name of class 1 is empty"):
        read_yolo(yolo, ["train"])
    write(yolo / "data.yaml", f"names: [driver's, 'it''s # 1, b', \"a: b\", {name}, a#b] # c\n")
    assert read_yolo(yolo, ["train"])[1] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [bolt, bolt]", "class 'bolt' is there twice"),
        ("names: {0: bolt, 2: nut}", "names: expected the numbers 0 to 1, each once"),
        ("names:\n  0: bolt\n  x: nut", "expected the numbers 0 to 1"),
        ("names: [bolt, nut", "data.yaml:1: names: no closing ]"),
        ("train: x\nbolt\n", "data.yaml:2: expected `key: value`; got 'bolt'"),
        ("names: {bolt}", "data.yaml:1: expected `number: name`; got 'bolt'"),
        ("- bolt\n", "expected `key: value`"),
        ("\tnames: 1", "expected `key: value`"),
        ("names: []", "no data.yaml with names"),
        ("names: bolt", "no data.yaml with names"),
        ("names: [bolt, background]", r"class 'background' \(1 objects\): background is what no"),
        ("<html>", "expected `key: value`"),
    ],
)
def test_bad_names(yolo, text, message):
    write(yolo / "data.yaml", text)
    with pytest.raises(BadData, match=message):
        read_yolo(yolo, ["train"])


def test_background_that_no_box_uses_is_left_out(yolo, capsys):
    write(yolo / "data.yaml", "names: [bolt, nut, background]")
    assert read_yolo(yolo, ["train"])[1] == ["bolt", "nut"]
    assert "'background', which no box uses, left out" in capsys.readouterr().err
    write(yolo / "data.yaml", "names: [background, bolt, nut]")
    for name, number in (("a", 1), ("b", 2)):
        write(yolo / f"labels/train/{name}.txt", f"{number} 0.5 0.5 0.5 0.5")
    records, classes = read_yolo(yolo, ["train"])
    assert (classes, [r.labels.tolist() for r in records]) == (["bolt", "nut"], [[1], [2]])


@pytest.mark.parametrize(
    "text",
    ["names: [" + "'" * 200_000, "names: [" + "a, " * 200_000, "names:\n" + "- '\n" * 100_000,
     "a: {" * 100_000, "names: [" + "\n" * 300_000 + "]", "x:" * 500_000, "'" * 500_000 + ": 1"],
)  # fmt: skip
def test_a_yaml_that_means_harm_takes_no_time(yolo, text):
    write(yolo / "data.yaml", text)
    with bounded(2, 200), pytest.raises(BadData):
        read_yolo(yolo, ["train"])


# ---- the layouts that tools write


@pytest.mark.parametrize(
    ("pictures", "labels", "files", "sets"),
    [
        ("images/train/{}.jpg", "labels/train/{}.txt", {"classes.txt": "bolt\nnut"}, ["train"]),
        ("train/images/{}.jpg", "train/labels/{}.txt",  # Roboflow
         {"data.yaml": "train: ../train/images\nval: ../valid/images\nnames: ['bolt', 'nut']",
          "README.dataset.txt": "x", "README.roboflow.txt": "x"}, ["train"]),
        ("obj_train_data/{}.jpg", "obj_train_data/{}.txt",  # darknet, CVAT
         {"obj.names": "bolt\nnut", "obj.data": "classes = 2\nnames = data/obj.names\n",
          "train.txt": "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n"}, ["train"]),
        ("images/train/{}.jpg", "labels/train/{}.txt",  # CVAT's other one
         {"data.yaml": "path: .\ntrain: train.txt\nnames:\n  0: bolt\n  1: nut\n",
          "train.txt": "data/images/train/a.jpg\ndata/images/train/b.jpg\n"}, ["train"]),
        ("images/{}.jpg", "labels/{}.txt", {"classes.txt": "bolt\nnut", "notes.json": "{}"},
         ["all"]),  # Label Studio
        ("{}.jpg", "{}.txt", {"classes.txt": "bolt\nnut"}, ["all"]),  # LabelImg
        ("images/val/{}.jpg", "labels/val/{}.txt",  # fiftyone
         {"dataset.yaml": "names:\n- bolt\n- nut\nnc: 2\npath: .\nval: ./images/val/\n"}, ["val"]),
        ("data/{}.jpg", "data/{}.txt",
         {"obj.names": "bolt\nnut", "images.txt": "data/a.jpg\nb.jpg"},
         ["images"]),
        ("images/{}.JPG", "labels/{}.txt",
         {"x.yaml": "names: [bolt, nut]", "train.txt": "/home/ann/images/a.jpg\nC:\\x\\b.JPG\n"},
         ["train"]),
    ],
)  # fmt: skip
def test_layouts(tmp_path, pictures, labels, files, sets):
    for name, line in (("a", "0 0.5 0.5 0.5 0.5"), ("b", "1 0.5 0.5 1 1")):
        picture(tmp_path / pictures.format(name))
        write(tmp_path / labels.format(name), line)
        write(tmp_path / pictures.format(f"._{name}"), b"\0\5\x16\7")
        write(tmp_path / labels.format(f"._{name}"), b"\0\5\x16\7")
    for name, text in files.items():
        write(tmp_path / name, text)
    if "x.yaml" in files:
        (tmp_path / "images/a.JPG").rename(tmp_path / "images/a.jpg")
    assert list_sets(tmp_path) == sets
    records, classes = read_yolo(tmp_path, sets)
    assert classes == ["bolt", "nut"]
    assert [record.labels.tolist() for record in records] == [[1], [2]]
    parts = read_yolo(tmp_path, [f"{sets[0]}@train", f"{sets[0]}@val"])[0]
    assert sorted(record.name for record in parts) == sorted(record.name for record in records)


def test_names_in_data_yaml_lead_to_folders_and_lists(yolo):
    write(yolo / "lists/mine.txt", "./images/train/b.jpg\n")
    folders = "val:\n  - images/train\n  - images/val\nelse: images/nowhere\n"
    write(yolo / "data.yaml", f"names: [bolt, nut]\ntest: ../lists/mine.txt\n{folders}")
    assert [r.name for r in read_yolo(yolo, ["test"])[0]] == ["train/b"]
    assert [r.name for r in read_yolo(yolo, ["val"])[0]] == ["train/a", "train/b", "val/c"]
    (yolo / "images/val").rename(yolo / "images/other")
    for text in ("images/p9", "lists/no.txt", "images/*.jpg", "{a: images/train}"):
        (yolo / "data.yaml").write_text(f"names: [bolt, nut]\nmine: {text}\n")
        with pytest.raises(BadData, match="no pictures in .*, which its .yaml names as 'mine'"):
            read_yolo(yolo, ["mine"])
    for text in ("~", "null", ""):
        (yolo / "data.yaml").write_text(f"names: [bolt, nut]\nmine: {text}\n")
        with pytest.raises(BadData, match="no set 'mine'"):
            read_yolo(yolo, ["mine"])
    write(yolo / "folds/train0.txt", "images/train/b.jpg\n")
    (yolo / "data.yaml").write_text("names: [bolt, nut]\ntrain: folds/train0.txt\n")
    assert [r.name for r in read_yolo(yolo, ["train"])[0]] == ["train/b"]  # not the folder
    write(yolo / "data.yaml", f"names: [bolt, nut]\n{folders}")
    with pytest.raises(
        BadData, match="no pictures in 'images/val', which its .yaml names as 'val'"
    ):
        read_yolo(yolo, ["val"])


def test_missing_parts_name_what_is_missing(yolo, tmp_path_factory):
    with pytest.raises(ValueError, match="yolo: where is it"):
        open_data(flags(data="yolo"), ["train"])
    with pytest.raises(BadData, match="--yolo-root /nowhere: no such folder"):
        read_yolo("/nowhere", ["train"])
    with pytest.raises(BadData, match="no pictures below it"):
        read_yolo(tmp_path_factory.mktemp("empty"), ["train"])
    with pytest.raises(BadData, match="no set 'test'.*Sets there: train val. Choose: --train-sets"):
        read_yolo(yolo, ["test"])
    for name in ("../train", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="expected a name such as train"):
            read_yolo(yolo, [name])
    with pytest.raises(ValueError, match="lists of names"):
        read_yolo(yolo, "train")
    write(yolo / "train.txt", "images/train/a.jpg\nimages/train/z.jpg\nimages/train/a.jpg\n")
    with pytest.raises(BadData, match=r"train.txt:2: no image train/z.jpg"):
        read_yolo(yolo, ["train"])
    records, counts = drop(read_yolo, yolo, ["train"])
    assert (len(records), counts) == (1, {"missing image": 1, "image listed twice": 1})
    write(yolo / "train.txt", "\n")
    with pytest.raises(BadData, match="train.txt: lists no images"):
        read_yolo(yolo, ["train"])


def test_a_root_of_another_format_is_said(yolo, tmp_path_factory):
    coco, content = make_coco(tmp_path_factory.mktemp("coco"))
    write_coco(coco, content)
    voc = make_voc(tmp_path_factory.mktemp("voc"))
    roots = {"voc": voc, "coco": coco, "yolo": yolo}
    for kind in roots:
        for other in roots.keys() - {kind}:
            message = f"It looks like {other.upper()}: --{other}-root {roots[other]}"
            with pytest.raises(BadData, match=message):
                open_data(flags(**{f"{kind}_root": roots[other]}), ["some"])


def test_names_from_a_mac(yolo):
    for folder, suffix in (("images", "jpg"), ("labels", "txt")):
        path = yolo / folder / "train"
        name = {"images": "NFD", "labels": "NFC"}[folder]
        (path / f"a.{suffix}").rename(path / unicodedata.normalize(name, f"\u00e9.{suffix}"))
    write(yolo / "train.txt", unicodedata.normalize("NFC", "images/train/\u00e9.jpg"))
    assert read_yolo(yolo, ["train"])[0][0].labels.tolist() == [1]


def test_read_yaml_of_the_coco_file(tmp_path):
    write(
        tmp_path / "coco.yaml",
        "# Ultralytics\npath: ../datasets/coco # root\ntrain: train2017.txt # 118287 images\n"
        "val: val2017.txt\n\n# Classes\nnames:\n  0: person\n  1: bicycle\n\n"
        "download: |\n  from x import y\n\n  urls = ['http://a/b.zip',  # 1M\n    'c']\n",
    )
    values = read_yaml(tmp_path / "coco.yaml")
    assert values["path"] == "../datasets/coco"
    assert values["names"] == {"0": "person", "1": "bicycle"}
