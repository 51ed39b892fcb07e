"""COCO files as people and their tools write them: read, or refused by file and entry."""

import json
import re

import pytest
from trees import bounded, drop, flags, listed, make_coco, picture, run_check, write, write_coco

import data
from plumbing.coco import category_ids, list_sets, read_coco
from plumbing.files import BadData, decode_pixels, open_record
from plumbing.sources import open_data


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path)


def add_second_set(root, content):
    """val2017: the same picture as image 8; returns its JSON to spoil."""
    picture(root / "val2017/000007.jpg")
    second = json.loads(json.dumps(content).replace('"id": 7', '"id": 8'))
    second = json.loads(json.dumps(second).replace('"image_id": 7', '"image_id": 8'))
    write_coco(root, second, "val2017")
    return second


# ---- COCO


def test_a_good_coco_tree(coco, capsys):
    root, content = coco
    empty = {"id": 9, "image_id": 7, "category_id": 18, "bbox": [1, 1, 0, 5], "area": 0}
    content["annotations"].append(empty)
    write_coco(root, content)
    (record,), classes = read_coco(root, ["train2017"])
    assert classes == ["dog", "toothbrush"]  # by category id
    assert record.name == "7"
    assert record.boxes_xyxy.tolist() == [[5, 6, 15.5, 15], [0, 0, 60, 40]]
    assert record.labels.tolist() == [2, 1]
    assert record.difficult.tolist() == [False, True]
    assert record.area.tolist() == [50, 9]
    assert "boxes without area, left out: 1" in capsys.readouterr().err


def test_an_image_id_may_be_a_text(coco):
    root, content = coco
    for text in ("a7", "0007-b"):
        spoiled = json.loads(json.dumps(content))
        spoiled["images"][0]["id"] = text
        for annotation in spoiled["annotations"]:
            annotation["image_id"] = text
        write_coco(root, spoiled)
        (record,), _ = read_coco(root, ["train2017"])
        assert (record.name, len(record.labels)) == (text, 2)


def test_a_pointer_of_git_lfs_is_said(coco):
    root, content = coco
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    image = root / "train2017/000007.jpg"
    image.write_text(pointer)
    write_coco(root, content)
    with pytest.raises(BadData, match="000007.jpg: a pointer of Git LFS.*git lfs pull"):
        decode_pixels(open_record(read_coco(root, ["train2017"])[0][0]), None)
    write_coco(root, pointer)
    with pytest.raises(BadData, match="instances_train2017.json: a pointer of Git LFS"):
        read_coco(root, ["train2017"])


def change(path, value):
    *path, last = path

    def spoil(content):
        for key in path:
            content = content[key]
        content[last] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(["annotations", 0, "image_id"], 8), "annotation 1: no image 8 in the file"),
        (change(["annotations", 0, "category_id"], 2), "annotation 1: no category 2"),
        (change(["annotations", 0, "bbox"], [1, 2, 3]), "annotation 1: expected a bbox of four"),
        (change(["annotations", 0, "bbox"], ["x", 2, 3, 4]), "annotation 1: .*four numbers"),
        (change(["annotations", 0, "bbox"], [9, 9, -4, 4]), "annotation 1: .*inverted"),
        (change(["annotations", 0, "bbox"], [90, 9, 4, 4]), "annotation 1: .*outside the 60x40"),
        (change(["annotations", 0, "bbox"], {}), "annotation 1: expected a bbox"),
        (change(["annotations", 0, "area"], "x"), "annotation 1: .*area"),
        (change(["annotations", 0, "bbox"], ["1,5", 2, 3, 4]), r"four numbers.*got \['1,5', 2"),
        (change(["annotations", 0, "iscrowd"], 7), "annotation 1: .*iscrowd"),
        (change(["images", 0, "file_name"], "../000007.jpg"), "image 7: .*leaves its folder"),
        (change(["images", 0, "file_name"], "/etc/passwd"), "image 7: .*leaves its folder"),
        (change(["images", 0, "file_name"], "8.jpg"), "image 7: no image .*8.jpg"),
        (change(["images", 0, "width"], "wide"), "image 7: size 'wide' x 40"),
        (change(["images", 0, "width"], -60), "image 7: size -60 x 40"),
        (change(["images", 0, "width"], 0), "image 7: size 0 x 40"),
        (change(["images", 0, "width"], 10**400), "image 7: size 1000.*whole numbers of pixels"),
        (change(["images", 0, "file_name"], "x" * 300), "image 7: no image"),
        (change(["images", 0, "id"], "seven"), "annotation 1: no image 7 in the file"),
        (change(["images", 0, "id"], [7]), r"images\[0\]: not an entry"),
        (change(["images", 0], 7), r"images\[0\]: not an entry"),
        (change(["annotations", 0, "category_id"], [7]), r"annotations\[0\]: not an entry"),
        (
            change(["annotations", 1, "image_id"], 7.5),
            r"annotations\[1\]: .*7.5 is no whole number",
        ),
        (change(["annotations", 1], {"id": 2}), r"annotations\[1\]: .*no 'image_id'"),
        (change(["annotations", 0, "bbox"], "1234"), "bbox of four numbers.*; got '1234', 50.0, 0"),
        (change(["categories", 0, "name"], " "), r"categories\[0\]: .*name ' ': expected a text"),
        (change(["categories", 0, "name"], None), r"categories\[0\]: .*name None: expected"),
        (change(["categories", 0, "name"], "dog"), "category dog is there 2 times"),
        (change(["categories", 0, "id"], 18), "category id 18 is there 2 times"),
        (change(["annotations", 0], None), r"annotations\[0\]: .*None: expected an object"),
        (change(["annotations"], []), "no objects at all"),
        (change(["annotations"], None), "not an instances file"),
        (change(["images"], "none"), "not an instances file"),
    ],
)
def test_bad_coco(coco, spoil, message):
    root, content = coco
    spoil(content)
    write_coco(root, content)
    with pytest.raises(BadData, match=message):
        read_coco(root, ["train2017"])


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [], "categories": [], "annotations": [NaN]}',
        '{"images": [{"id": Infinity}], "categories": [], "annotations": []}',
        '{"images": {}, "categories": [], "annotations": []}',
        "[" * 200_000,
        '{"images": [',
        "",
        "[]",
        '[{"bbox": [1, 2, 3, 4]}]',
        "7",
    ],
)
def test_bad_json(coco, text):
    root, _ = coco
    write_coco(root, text)
    with (
        bounded(2, 100),
        pytest.raises(BadData, match=r"instances_train2017.json: not an instances"),
    ):
        read_coco(root, ["train2017"])


def test_coco_names_every_entry_that_is_wrong(coco, capsys):
    root, content = coco
    content["images"] += [{"id": 8, "file_name": "000007.jpg", "width": 60, "height": 40}, {}]
    content["annotations"] += [{"id": 3, "image_id": 7, "category_id": 18}]
    write_coco(root, json.dumps(content).replace('"id": 8', '"id": 8e999'))
    status, out = run_check(capsys, coco_root=root)
    assert status == 1
    for pattern in (
        r"\S+json images\[1\]  not an entry.*inf is no whole number",
        r"\S+json images\[2\]  not an entry.*no 'id'",
        r"\S+json annotations\[2\]  not an entry.*no 'bbox'",
    ):
        assert listed(out, "refused", pattern), out
    write_coco(root, content)
    assert "file name 000007.jpg is there 2 times" in run_check(capsys, coco_root=root)[1]
    records, counts = drop(read_coco, root, ["train2017"])
    assert (len(records), counts) == (1, {
        "broken entry of images": 1, "broken entry of annotations": 1, "image listed twice": 1,
    })  # fmt: skip


def test_several_coco_sets(coco):
    root, content = coco
    write_coco(root, content)
    second = add_second_set(root, content)
    records, classes = read_coco(root, ["train2017", "val2017"])
    assert [record.name for record in records] == ["7", "8"]
    assert classes == ["dog", "toothbrush"]
    write_coco(root, content, "val2017")
    with pytest.raises(BadData, match="val2017 image 7: the set train2017 has it"):
        read_coco(root, ["train2017", "val2017"])
    with pytest.raises(BadData, match="train2017 image 7: the set train2017 has it"):
        read_coco(root, ["train2017", "train2017"])
    second["categories"][0]["name"] = "comb"
    write_coco(root, second, "val2017")
    with pytest.raises(BadData, match="instances_val2017.json: its categories are not those"):
        read_coco(root, ["train2017", "val2017"])
    with pytest.raises(ValueError, match="list of one or more names; got 'train2017'"):
        read_coco(root, "train2017")


def test_labels_of_the_set_to_measure_on_follow_the_training_set(coco):
    """A category that only one of two files lists shifts the labels of the other."""
    root, content = coco
    second = add_second_set(root, content)
    content["categories"].append({"id": 2, "name": "bicycle"})
    write_coco(root, content)
    args = flags(coco_root=root)
    _, classes = open_data(args, ["train2017"])
    assert classes == ("bicycle", "dog", "toothbrush")
    (record,), _ = open_data(args, ["val2017"], classes)
    assert record.labels.tolist() == [3, 2]
    second["categories"][0]["name"] = "comb"
    write_coco(root, second, "val2017")
    with pytest.raises(ValueError, match="It cannot be measured on comb"):
        open_data(args, ["val2017"], classes)
    second["annotations"] = second["annotations"][1:]  # no box uses it: nothing is wrong
    write_coco(root, second, "val2017")
    assert open_data(args, ["val2017"], classes)[0][0].labels.tolist() == [2]


def test_missing_coco(coco):
    root, content = coco
    with pytest.raises(ValueError, match=r"--coco-root /nowhere: no such folder.*contains both"):
        read_coco("/nowhere", ["val2017"])
    with pytest.raises(ValueError, match=r"no annotations/instances_val2017.json and val2017/ be"):
        read_coco(root, ["val2017"])
    with pytest.raises(ValueError, match="expected a name such as train2017"):
        read_coco(root, ["../train2017"])
    write_coco(root, content)
    message = "Sets there: train2017. Choose: --train-sets train2017@train --eval-sets train2017@"
    with pytest.raises(ValueError, match=message):
        read_coco(root, ["train"])
    with pytest.raises(ValueError, match="--classes names: COCO's files list their own"):
        open_data(flags(coco_root=root, classes="names"), ["train2017"])


# ---- fields that nobody needs, or that follow from others


def without(*fields, kind="annotations"):
    def spoil(content):
        for entry in content[kind]:
            for field in fields:
                entry.pop(field, None)

    return spoil


def each(field, value, kind="annotations"):
    def spoil(content):
        for entry in content[kind]:
            entry[field] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("area"), "annotations without area, width x height taken: 2, first"),
        (each("area", None), "annotations without area, width x height taken: 2"),
        (without("iscrowd"), ""),
        (each("iscrowd", None), ""),
        (each("iscrowd", False), ""),
        (without("id"), ""),
        (each("id", 5), ""),
        (each("id", "a"), ""),
        (without("width", "height", kind="images"), "size missing or with fractions.*: 1, first"),
        (each("width", None, "images"), None),
        (each("height", 40.5, "images"), "size missing or with fractions, taken from the image"),
        (each("width", 60.0, "images"), ""),
        (each("width", "60", "images"), ""),
    ],
)
def test_fields_that_are_not_needed(coco, spoil, said, capsys):
    root, content = coco
    spoil(content)
    write_coco(root, content)
    if said is None:  # one side is missing: which?
        with pytest.raises(BadData, match="image 7: size None x 40"):
            read_coco(root, ["train2017"])
        return
    (record,), _ = read_coco(root, ["train2017"])
    assert record.size == (60, 40)
    assert record.boxes_xyxy.tolist() == [[5, 6, 15.5, 15], [0, 0, 60, 40]]
    assert record.area.tolist() in ([50, 9], [94.5, 2400])
    err = capsys.readouterr().err
    assert re.search(f"^data: {said}", err) if said else err == ""
    assert err.count("\n") == bool(said)


def test_a_box_is_that_of_its_polygons(coco, capsys):
    root, content = coco
    parts = [[5, 6, 15.5, 8, 9, 15], [7, 7, 8, 7, 8, 8]]
    content["annotations"][0] |= {"bbox": [], "segmentation": parts}
    write_coco(root, content)
    (record,), _ = read_coco(root, ["train2017"])
    assert record.boxes_xyxy[0].tolist() == [5, 6, 15.5, 15]
    assert "annotations without bbox, its polygons' taken: 1" in capsys.readouterr().err
    content["annotations"][0]["segmentation"] = parts[0]  # not in a list of its own
    write_coco(root, content)
    assert read_coco(root, ["train2017"])[0][0].boxes_xyxy[0].tolist() == [5, 6, 15.5, 15]
    for bad in ([], [[]], [[5]], [["x", 1]], {"counts": "3k1"}, [7], [None]):
        content["annotations"][0]["segmentation"] = bad
        write_coco(root, content)
        with pytest.raises(BadData, match="toBbox" if isinstance(bad, dict) else None):
            read_coco(root, ["train2017"])


def test_a_mask_without_a_box_says_how_to_get_one(coco):
    root, content = coco
    mask = {"counts": "3k1", "size": [40, 60]}
    content["annotations"][0] = {"id": 1, "image_id": 7, "category_id": 90, "segmentation": mask}
    write_coco(root, content)
    said = r"annotations\[0\]: .*a mask \(RLE\) without a bbox.*pycocotools.mask.toBbox\(rle\)"
    with pytest.raises(BadData, match=said):
        read_coco(root, ["train2017"])


@pytest.mark.parametrize(
    "extra",
    [
        {"id": 0, "name": "dog", "supercategory": "none"},  # Roboflow
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 0, "name": "_background_"},  # labelme2coco
        {"id": 0, "name": "background"},
    ],
)
def test_categories_that_only_group_are_no_classes(coco, extra, capsys):
    root, content = coco
    content["categories"].append(extra)
    for category in content["categories"][:2]:
        category["supercategory"] = "animals"
    write_coco(root, content)
    (record,), classes = read_coco(root, ["train2017"])
    assert classes == ["dog", "toothbrush"]
    assert record.labels.tolist() == [2, 1]
    assert capsys.readouterr().err.count("categories that no box uses") == 1
    ids = category_ids(root, "train2017")
    assert (ids["dog"], ids["toothbrush"]) == (18, 90)
    content["annotations"][0]["category_id"] = 0
    write_coco(root, content)
    if extra["name"] == "animals":  # a class like any other
        assert read_coco(root, ["train2017"])[1] == ["animals", "dog", "toothbrush"]
        return
    message = (
        "dog is there 2 times" if extra["name"] == "dog" else r"category 0: class .*background"
    )
    with pytest.raises(BadData, match=message):
        read_coco(root, ["train2017"])


def test_categories_without_boxes_stay_classes(coco):
    """val2017 of COCO, and its person, whose supercategory is person."""
    root, content = coco
    content["categories"].append({"id": 1, "name": "person", "supercategory": "person"})
    content["categories"].append({"id": 2, "name": "bus", "supercategory": "vehicle"})
    write_coco(root, content)
    assert read_coco(root, ["train2017"])[1] == ["person", "bus", "dog", "toothbrush"]


# ---- one cause, one error


def test_one_cause_is_one_error(coco, capsys):
    root, content = coco
    write_coco(root, content)
    content["annotations"] *= 20
    for spoil, what in (
        (each("image_id", 8), r"no image 8 in the file \(40 annotations\)"),
        (each("category_id", 3), r"no category 3 in the file \(40 annotations\)"),
        (without("bbox"), "none of its 40 annotations is COCO's; the first: no 'bbox'"),
        (each("file_name", "no.jpg", "images"), "image 7  no image"),
        (each("id", None, "images"), r"images\[0\]  not an entry"),
        (without("file_name", kind="images"), r"images\[0\]  not an entry"),
        (each("width", -1, "images"), "image 7  size -1 x 40"),
        (without("name", kind="categories"), "none of its 2 categories is COCO's"),
        (each("width", 20, "images"), "image 7  the image .* is 60x40, its annotation says 20x40"),
    ):
        spoiled = json.loads(json.dumps(content))
        spoil(spoiled)
        write_coco(root, spoiled)
        out = run_check(capsys, coco_root=root)[1]
        refused = [line for line in out.splitlines() if line.startswith("refused ")]
        others = [line for line in refused if "no objects at all" not in line]
        assert len(others) == 1, out
        assert re.search(what, others[0]), out


def test_boxes_in_fractions_of_the_image_are_refused(coco):
    root, content = coco
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.5, 0.5]
    write_coco(root, content)
    with pytest.raises(BadData, match="within the first pixel.*fractions of the image"):
        read_coco(root, ["train2017"])


@pytest.mark.parametrize(
    ("content", "who"),
    [
        ({"shapes": [], "imagePath": "a.jpg"}, "labelme"),
        ({"_via_img_metadata": {}}, "VIA"),
        ({"item": {}, "annotations": []}, "Darwin"),
        ({"size": {}, "objects": []}, "Supervisely"),
        ([{"id": 1, "data": {}, "annotations": []}], "Label Studio"),
        ([{"image": "a.jpg", "annotations": []}], "CreateML"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "a list of detections"),
        ({"x": 1}, "KeyError"),
    ],
)
def test_json_of_other_tools_is_named(coco, content, who, tmp_path_factory):
    root, _ = coco
    write_coco(root, content)
    with pytest.raises(BadData, match=f"not an instances file of COCO .*{who}"):
        read_coco(root, ["train2017"])
    folder = tmp_path_factory.mktemp("json")
    for name in "ab":
        write(folder / f"ann/{name}.json", json.dumps(content))
    if who != "KeyError":
        for flag in ("voc_root", "coco_root"):
            with pytest.raises(BadData, match=f"a.json is .*{who}"):
                open_data(flags(**{flag: folder}), ["train2017"])
    write(folder / "ann/c.json", "{")
    with pytest.raises(BadData, match="contains both|contains ImageSets"):
        open_data(flags(coco_root=folder), ["train2017"])


# ---- the layouts that tools write


@pytest.mark.parametrize(
    ("listing", "folder", "name", "split"),
    [
        ("annotations/instances_default.json", "images", "a.jpg", "default"),  # CVAT
        ("annotations/instances_train.json", "images/train", "a.jpg", "train"),
        ("train/_annotations.coco.json", "train", "a.jpg", "train"),  # Roboflow
        ("result.json", "images", "images/a.jpg", "result"),  # Label Studio
        ("result.json", "images", "images\\a.jpg", "result"),
        ("labels.json", "data", "a.jpg", "labels"),  # fiftyone
        ("train/labels.json", "train/data", "a.jpg", "train"),
        ("annotations.json", "JPEGImages", "JPEGImages/a.jpg", "annotations"),  # labelme2coco
        ("annotations/train.json", "train", "a.jpg", "train"),
        ("via_export_coco.json", ".", "a.jpg", "via_export_coco"),
        ("annotations/instances.json", "images", "cam 1/a.jpg", "instances"),
        ("annotations/instances_x.json", "x", "cam1\\a.jpg", "x"),
        ("annotations/instances_x.json", "x", "./a.jpg", "x"),
        ("annotations/instances_x.json", "x", "e\u0301crou.jpg", "x"),
        ("annotations/instances_x.json", "x", "a.JFIF", "x"),
        ("annotations/instances_x.json", "x", "a", "x"),
    ],
)
def test_where_tools_put_listings_and_pictures(tmp_path, listing, folder, name, split, capsys):
    (tmp_path / "source").mkdir()
    _, content = make_coco(tmp_path / "source")
    content["images"][0]["file_name"] = name
    root, inside = tmp_path / "root", name.replace("\\", "/").removeprefix("images/")
    inside = inside.removeprefix("JPEGImages/").replace("e\u0301", "\u00e9")
    path = root / folder / (inside if "." in inside else f"{inside}.jpg")
    path.parent.mkdir(parents=True)
    (tmp_path / "source/train2017/000007.jpg").rename(path)
    write(path.parent / "._a.json", b"\0\5\x16\7")
    write(root / listing, json.dumps(content))
    assert list_sets(root) == [split]
    (record,), _ = read_coco(root, [split])
    assert record.path.samefile(path)
    assert run_check(capsys, coco_root=root)[0] == 0
    (record,), _ = read_coco(root, [f"{split}@train", f"{split}@val"])
    assert record.name == "7"


def test_pictures_that_are_not_there_are_one_error(coco):
    root, content = coco
    content["images"] += [
        {"id": n, "file_name": f"{n}.jpg", "width": 9, "height": 9} for n in (8, 9)
    ]
    content["images"][0]["file_name"] = "x.jpg"
    write_coco(root, content)
    with pytest.raises(BadData, match="none of its 3 images is in .*train2017/.*first is 'x.jpg'"):
        read_coco(root, ["train2017"])


def test_drop_bad(coco):
    root, content = coco
    content["annotations"] += [
        {"id": 3, "image_id": 7, "category_id": 18, "bbox": box, "area": 1}
        for box in ([9, 9, -4, 4], [90, 9, 4, 4], [1, 2, 3], ["x", 1, 2, 3])
    ] + [{"id": 9, "image_id": 70, "category_id": 18, "bbox": [1, 1, 2, 2]}] * 3
    content["images"].append({"id": 8, "file_name": "8.jpg", "width": 9, "height": 9})
    write_coco(root, content)
    records, counts = drop(read_coco, root, ["train2017"])
    assert [len(record.labels) for record in records] == [2]
    assert counts == {
        "missing image": 1,
        "inverted box": 1,
        "box outside its image": 1,
        "annotation that is not COCO's": 1,
        "box that is not four numbers": 1,
        "annotation of nothing in the file": 3,
    }


# ---- the real data


def test_the_real_coco_part(data_root):
    for split, images, objects, crowds in (
        ("train2017", 215, 2035, 19),
        ("val2017", 206, 1786, 21),
    ):
        found, names = read_coco(data_root / "coco", [split])
        assert len(names) == 80
        assert names[0] == "person"
        assert names[-1] == "toothbrush"
        assert len(found) == images
        assert sum(len(record.labels) for record in found) == objects
        assert sum(int(record.difficult.sum()) for record in found) == crowds
    next(data.ordered_batches(found, 300, batch_size=8))
