"""VOC files as people and their tools write them: read, or refused by file and line."""

import re
import time

import pytest
from trees import an_object, drop, flags, listed, make_voc, picture, run_check, write, xml_of

import data
from plumbing import check
from plumbing.files import BadData, Findings, decode_pixels, open_record, read_classes
from plumbing.sources import open_data
from plumbing.voc import VOC_CLASSES, list_sets, read_voc


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


# ---- VOC


def test_a_good_tree(voc):
    for root in (voc.parent, voc, voc.parent.parent / voc.parent.name):
        records, classes = read_voc(root, ["2007:trainval"], VOC_CLASSES)
        assert [r.name for r in records] == ["a", "b"]
        assert records[0].boxes_xyxy.tolist() == [[5, 6, 30, 31]]
        assert records[0].labels.tolist() == [12]
        assert records[0].area.tolist() == [625]
    assert read_voc(voc, ["trainval"])[1] == ["dog"]  # the tree itself, names from its annotations


def test_the_folder_above_voc_devkit(voc):
    devkit = voc.parent / "VOCdevkit"
    devkit.mkdir()
    voc.rename(devkit / "VOC2007")
    assert len(read_voc(voc.parent, ["2007:trainval"])[0]) == 2
    assert list_sets(voc.parent) == ["2007:trainval"]


def test_names_that_end_in_a_number(voc):
    """ "scan 1" is an image here, not "scan" with the 1 of the devkit's lists of one class."""
    (voc / "JPEGImages/a.jpg").rename(voc / "JPEGImages/scan 1.jpg")
    (voc / "JPEGImages/b.jpg").rename(voc / "JPEGImages/scan.jpg")
    (voc / "Annotations/a.xml").rename(voc / "Annotations/scan 1.xml")
    (voc / "Annotations/b.xml").rename(voc / "Annotations/scan.xml")
    for lines in ("scan 1\nscan\n", "scan 1.jpg\nscan.jpg\n", "scan 1 -1\nscan  1\n"):
        (voc / "ImageSets/Main/mine.txt").write_text(lines)
        records, _ = read_voc(voc.parent, ["2007:mine"])
        assert [record.path.name for record in records] == ["scan 1.jpg", "scan.jpg"]


@pytest.mark.parametrize("name", ["VOCmine", "VOC2007_small", "VOC2012", "mine"])
def test_the_sets_that_are_listed_are_found(voc, name, capsys):
    voc.rename(voc.parent / name)
    (found,) = list_sets(voc.parent)
    assert len(read_voc(voc.parent, [found])[0]) == 2
    status, out = run_check(capsys, voc_root=voc.parent, classes="auto")
    assert (status, "2 images, 2 objects" in out) == (0, True)


def test_only_the_devkits_lists_of_one_class_are_not_sets(voc):
    for name, lines in (("dog_train", "a -1\nb  1\n"), ("night_train", "a\n"), ("x_test", "")):
        (voc / f"ImageSets/Main/{name}.txt").write_text(lines)
    assert list_sets(voc) == ["night_train", "trainval", "x_test"]


def test_a_link_to_a_tree_of_another_name(voc):
    voc.rename(voc.parent / "copy")
    voc.symlink_to(voc.parent / "copy")
    for root in (voc, voc.parent):
        assert len(read_voc(root, ["2007:trainval"])[0]) == 2


@pytest.mark.parametrize("line", ["a -1", "a  1", "a 0", "a.jpg", "\ufeffa", "a\r"])
def test_lists_as_people_write_them(voc, line):
    (voc / "ImageSets/Main/mine.txt").write_text(f"{line}\n\nb\n", encoding="utf-8")
    records, _ = read_voc(voc.parent, ["2007:mine"])
    assert [record.name for record in records] == ["a", "b"]


def test_a_list_of_powershell_and_links_in_a_circle(voc):
    write(voc / "ImageSets/Main/mine.txt", "a\r\nb\r\n".encode("utf-16"))
    for folder in ("JPEGImages", "Annotations"):
        for name in ("round", "and round"):
            (voc / folder / name).symlink_to(voc / folder)
    records, _ = read_voc(voc.parent, ["2007:mine"])
    assert [record.path for record in records] == [voc / f"JPEGImages/{n}.jpg" for n in "ab"]
    assert len(read_voc(voc, ["all"])[0]) == 2


def test_other_suffixes_and_names_with_spaces(voc):
    picture(voc / "JPEGImages/my dog 1.PNG", mode="L")
    (voc / "Annotations/my dog 1.xml").write_text(xml_of(an_object()))
    (voc / "ImageSets/Main/mine.txt").write_text("my dog 1.PNG\n")
    (record,), _ = read_voc(voc, ["mine"])
    assert decode_pixels(open_record(record), record).mode == "RGB"


def test_an_image_listed_with_its_suffix_is_that_one(voc):
    picture(voc / "JPEGImages/a.png")
    for line, want in (("a", "a.jpg"), ("a.jpg", "a.jpg"), ("a.png", "a.png")):
        (voc / "ImageSets/Main/mine.txt").write_text(f"{line}\n")
        assert read_voc(voc, ["mine"])[0][0].path.name == want


def test_missing_parts_name_what_is_missing(voc):
    with pytest.raises(ValueError, match=r"--voc-root /nowhere: no such folder.*contains VOC2007/"):
        read_voc("/nowhere", ["2007:trainval"])
    message = r"no VOC2012/ImageSets/Main/trainval.txt below it.*--train-sets 2007:trainval"
    with pytest.raises(ValueError, match=message):
        read_voc(voc.parent, ["2007:trainval", "2012:trainval"])
    with pytest.raises(ValueError, match=r"no VOC2007/ImageSets/Main/test.txt.*2007:trainval"):
        read_voc(voc.parent, ["2007:test"])
    (voc / "JPEGImages/b.jpg").unlink()
    with pytest.raises(BadData, match=r"trainval.txt:2: no image .*b.jpg"):
        read_voc(voc, ["trainval"])
    (voc / "Annotations/a.xml").unlink()
    with pytest.raises(BadData, match=r"trainval.txt:1: no annotation .*a.xml"):
        read_voc(voc, ["trainval"])


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("", "lists no images"),
        ("a\nb\na\n", r"mine.txt:3: a is listed twice, first at .*mine.txt:1"),
        ("../../a\n", "leaves its folder"),
        ("/etc/passwd\n", "leaves its folder"),
        ("b/../../a\n", "leaves its folder"),
        ("..\\a\n", "leaves its folder"),
        ("a\0\n", "leaves its folder"),
        ("c\n", r"mine.txt:1: no image"),
    ],
)
def test_bad_lists(voc, listed, message):
    (voc / "ImageSets/Main/mine.txt").write_text(listed)
    with pytest.raises(BadData, match=message):
        read_voc(voc, ["mine"])


@pytest.mark.parametrize("name", ["../x:trainval", "2007:../trainval", "2007:", "", "/etc:passwd"])
def test_bad_sets(voc, name):
    with pytest.raises(ValueError, match="expected YEAR:SPLIT"):
        read_voc(voc, [name])


def test_one_name_is_not_a_list_of_names(voc):
    with pytest.raises(ValueError, match="lists of names"):
        read_voc(voc, ["trainval"], "dog")
    with pytest.raises(ValueError, match="lists of names"):
        read_voc(voc, "trainval")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (xml_of(an_object(name="dgo")), r"a.xml:4: class 'dgo' is none of aeroplane, .*--classes"),
        (xml_of(an_object(name="")), r"a.xml:4: an object without a name"),
        (xml_of(an_object(), an_object(box=(30, 6, 5, 31))), r"a.xml:8: dog: box .* is inverted"),
        (xml_of(an_object(box=(5, 6, 5, 31))), r"a.xml:4: dog: box .* is empty"),
        (xml_of(an_object(box=(60, 6, 70, 31))), r"a.xml:4: dog: box .* outside the 60x40 image"),
        (xml_of(an_object(box=(-9, 6, 0, 31))), r"a.xml:4: dog: box .* outside"),
        (xml_of(an_object(box=("x", 6, 9, 31))), r"a.xml:4: dog: the box must be four numbers"),
        (xml_of(an_object(box=("nan", 6, 9, 31))), "four numbers"),
        (xml_of(an_object(box=(1, 6, "1e999", 31))), "four numbers"),
        (xml_of(an_object(box=(1, 6, "", 31))), r"four numbers; got \['1', '6', None, '31'\]"),
        (xml_of(an_object(box=("1,5", 6, 9, 31))), r"four numbers; got \['1,5', '6', '9', '31'\]"),
        (xml_of(an_object(box=(1, 6, "1_0", 31))), "four numbers"),
        (xml_of("<object><name>dog</name></object>"), "no <bndbox>"),
        (
            xml_of(an_object().replace("</object>", "<bndbox><xmin>1</xmin></bndbox></object>")),
            "a.xml:4: dog: an object with two of <bndbox>",
        ),
        (xml_of(an_object().replace("<name>", "<name>cat</name><name>")), "two of <name>"),
        (
            xml_of("<objects>", an_object(), "</objects>"),
            r"a.xml:4: broken XML: <object> in <annotation/objects>; expected in the outermost",
        ),
        (xml_of(an_object(difficult="maybe")), "difficult must be 0 or 1; got 'maybe'"),
        (xml_of(an_object(), size=(-60, 40)), "whole numbers of pixels"),
        (xml_of(an_object(), size=("x", 40)), "size/height x x 40: expected whole numbers of pix"),
        (xml_of(an_object(), size=(60, 0)), "whole numbers of pixels"),
        (xml_of(an_object(box=("50%", 6, 9, 31))), r"four numbers; got \['50%', "),
        (xml_of(an_object(), size=("60,0", 40)), "size/height 60,0 x 40: expected whole numbers"),
        (xml_of(an_object())[:-30], r"a.xml:\d+: broken XML: (no element found|unclosed token)"),
        ("", r"a.xml:1: the file is empty"),
        ("{}", "broken XML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "broken XML"),
    ],
)
def test_bad_annotations(voc, xml, message):
    (voc / "Annotations/a.xml").write_text(xml)
    with pytest.raises(BadData, match=message) as caught:
        read_voc(voc, ["trainval"], VOC_CLASSES)
    assert "\n" not in str(caught.value)


def test_no_objects_at_all(voc):
    for name in "ab":
        (voc / f"Annotations/{name}.xml").write_text(xml_of())
    with pytest.raises(BadData, match="no objects at all in the 2 images of trainval"):
        read_voc(voc, ["trainval"])


def test_what_is_handled_is_said_once_and_counted(voc, capsys):
    outside = [an_object(box=(-3, 6, 30, 31)), an_object(box=(5, 6, 75.5, 31))]
    (voc / "Annotations/a.xml").write_text(xml_of(*outside))
    (voc / "Annotations/b.xml").write_text(xml_of(an_object(), size=(0, 0)))
    records, _ = read_voc(voc, ["trainval"])
    said = capsys.readouterr().err
    assert re.search(r"over the border.*clipped.*: 2, first .*a.xml:4\n", said)
    assert "sizes missing in the XML, taken from the image: 1" in said
    assert records[0].boxes_xyxy[1].tolist() == [5, 6, 75.5, 31]  # as annotated
    assert records[1].size == (60, 40)
    batch = next(data.ordered_batches(records, 30, batch_size=2))
    assert batch.boxes_xyxy.min() == 0  # clipped
    assert batch.boxes_xyxy.max() == 1


def test_a_pixel_over_the_border_and_fractions_are_fine(voc, capsys):
    box = (0, 0.5, 60.9, 40)
    (voc / "Annotations/a.xml").write_text(xml_of(an_object(box=box)))
    records, _ = read_voc(voc, ["trainval"])
    assert tuple(records[0].boxes_xyxy[0]) == box
    assert capsys.readouterr().err == ""


def test_class_files(tmp_path):
    path = tmp_path / "names"
    path.write_text("# of the kitchen\n\ndog\n\n toaster \n")
    assert read_classes(path) == ["dog", "toaster"]
    for content in ("", "dog\ndog\n", "background\ndog\n"):
        path.write_text(content)
        with pytest.raises(BadData, match="one a line"):
            read_classes(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match="not UTF-8"):
        read_classes(path)
    with pytest.raises(ValueError, match="no such file"):
        read_classes(tmp_path / "nothing")


# ---- labels are not lost in silence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotations><image><box label='dog'/></image></annotations>", "CVAT.*Pascal VOC"),
        ("<Annotation><Object><Name>dog</Name></Object></Annotation>", "element is <Annotation>"),
        ("<html><body><p>404</p></body></html>", "<html>.*a web page"),
        ("<!-- x --><dataset><images/></dataset>", "<dataset>.*imglab"),
        ("<object><name>dog</name></object>", "element is <object>"),
        ("<annotation><Object><name>dog</name></Object></annotation>", "<Object> in <annotation>"),
        ("<annotation><item><bndbox/></item></annotation>", "<bndbox> in <annotation/item>"),
        ("<annotation><xmin>3</xmin></annotation>", "annotation/object/bndbox"),
        ("<annotation><OBJECT/></annotation>", "<OBJECT> in"),
        (xml_of("<object><name>dog</name><polygon><x1>3</x1></polygon></object>"), "no <bndbox>"),
        (xml_of("<object><Name>dog</Name></object>"), "an object without a name"),
    ],
)
def test_another_dialect_is_refused_by_name(voc, text, message):
    write(voc / "Annotations/b.xml", text)
    with pytest.raises(BadData, match=rf"b.xml:\d+: .*{message}"):
        read_voc(voc, ["trainval"])
    records, counts = drop(read_voc, voc, ["trainval"])
    assert sum(len(record.labels) for record in records) == 1
    assert sum(counts.values()) == 1


@pytest.mark.parametrize("start", ['<annotation xmlns="http://x/y">', '<v:annotation xmlns:v="u">'])
def test_a_namespace_is_voc_all_the_same(voc, start):
    text = xml_of(an_object())
    if "v:" in start:
        text = re.sub("<(/?)", r"<\1v:", text)
        start_now = "<v:annotation>"
    else:
        start_now = "<annotation>"
    write(voc / "Annotations/a.xml", text.replace(start_now, start))
    assert read_voc(voc, ["trainval"])[0][0].labels.tolist() == [1]


def test_boxes_in_fractions_of_the_image_are_refused(voc):
    for name in "ab":
        write(voc / f"Annotations/{name}.xml", xml_of(an_object(box=(0.1, 0.2, 0.5, 1))))
    with pytest.raises(BadData, match="within the first pixel.*fractions of the image"):
        read_voc(voc, ["trainval"])


# ---- fields that nobody needs


@pytest.mark.parametrize(
    "field",
    ["<filename>/home/ann/a.jpg</filename>", "<filename>../a.jpg</filename><folder>..</folder>",
     "<path>C:\\Users\\ann\\a.jpg</path>", "<filename>file:///x/a.jpg</filename>", ""],
)  # fmt: skip
def test_names_of_the_annotators_disk_are_not_used(voc, field):
    text = xml_of(an_object()).replace("<filename>a.jpg</filename>", field)
    write(voc / "Annotations/a.xml", text)
    assert len(read_voc(voc, ["trainval"])[0]) == 2


@pytest.mark.parametrize(
    ("text", "want"), [("True", True), ("false", False), ("Unspecified", False)]
)
def test_difficult_in_words(voc, text, want):
    write(voc / "Annotations/a.xml", xml_of(an_object(difficult=text)))
    assert read_voc(voc, ["trainval"])[0][0].difficult.tolist() == [want]


# ---- one cause, one error


def test_an_unknown_class_is_one_error(voc, capsys):
    for name in "ab":
        write(voc / f"Annotations/{name}.xml", xml_of(*[an_object("bolt")] * 5, an_object()))
    status, out = run_check(capsys, voc_root=voc)
    assert out.count("'bolt'") == 1
    assert listed(out, "refused", r"\S+a.xml:4  class 'bolt' is none of .* \(10 objects\)$")
    records, counts = drop(read_voc, voc, ["trainval"], VOC_CLASSES)
    assert (counts, sum(len(r.labels) for r in records)) == ({"unknown class": 10}, 2)


def test_a_wrong_size_is_one_error_and_not_one_of_each_box(voc, capsys):
    boxes = [an_object(box=(30, 0, 55, 9)), an_object(box=(45, 1, 58, 9))]
    write(voc / "Annotations/a.xml", xml_of(*boxes, size=(40, 60)))
    status, out = run_check(capsys, voc_root=voc)
    assert listed(
        out, "refused", r"\S+a.xml  the image \S+a.jpg is 60x40, its annotation says 40x60"
    )
    assert out.count("refused ") == 1


def test_encodings_that_the_parser_does_not_know(voc):
    head = '<?xml version="1.0" encoding="{}"?>'
    for encoding in ("GBK", "big5", "shift_jis", "euc-kr", "utf-16", "iso-8859-15"):
        name = "dog" if encoding == "iso-8859-15" else "犬" if encoding != "euc-kr" else "견"
        xml = head.format(encoding) + xml_of(an_object(name))
        (voc / "Annotations/a.xml").write_bytes(xml.encode(encoding))
        assert name in read_voc(voc, ["trainval"])[1], encoding
    for xml, said in (
        (xml_of(an_object("écrou")).encode("latin-1"), "not UTF-8, and the file declares no other"),
        ((head.format("klingon") + xml_of(an_object())).encode(), "unknown encoding"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "pointer of Git LFS"),
    ):
        (voc / "Annotations/a.xml").write_bytes(xml)
        with pytest.raises(BadData, match=said):
            read_voc(voc, ["trainval"])


def test_objects_that_are_marked_as_deleted(voc, capsys):
    deleted = an_object("cat").replace("</object>", "<deleted>1</deleted></object>")
    kept = an_object("dog").replace("</object>", "<deleted>0</deleted></object>")
    write(voc / "Annotations/a.xml", xml_of(deleted, kept))
    records, classes = read_voc(voc, ["trainval"])
    assert (classes, records[0].labels.tolist()) == (["dog"], [1])
    assert "objects marked as deleted, left out: 1" in capsys.readouterr().err


# ---- --drop-bad


def test_drop_bad_counts_by_kind_and_lists(voc, capsys):
    for name in "cdefgh":
        picture(voc / f"JPEGImages/{name}.jpg")
        write(voc / f"Annotations/{name}.xml", xml_of(an_object()))
    bad = [
        an_object(box=box) for box in ((5, 6, 5, 31), (9, 9, 9, 9), (30, 6, 5, 31), ("x", 1, 2, 3))
    ]
    write(voc / "Annotations/a.xml", xml_of(*bad, an_object()))
    whole = (voc / "JPEGImages/b.jpg").read_bytes()
    write(voc / "JPEGImages/b.jpg", whole[: len(whole) // 2])
    (voc / "JPEGImages/c.jpg").unlink()
    (voc / "Annotations/d.xml").unlink()
    write(voc / "Annotations/e.xml", "<annotation>")
    picture(voc / "JPEGImages/f.jpg", (61, 40))
    write(voc / "ImageSets/Main/mine.txt", "\n".join("abcdefgha"))
    with pytest.raises(BadData, match=r"a.xml:4: dog: .* is empty.*\(--drop-bad leaves out what"):
        open_data(flags(voc_root=voc), ["mine"])
    found = Findings(drop=True)
    records, _ = open_data(flags(voc_root=voc, drop_bad=True), ["mine"], findings=found)
    assert [record.name for record in records] == ["a", "g", "h"]
    assert [len(record.labels) for record in records] == [1, 1, 1]
    kinds = {kind: len(rows) for kind, rows in found.dropped.items()}
    assert kinds == {
        "empty box": 2,
        "inverted box": 1,
        "box that is not four numbers": 1,
        "missing image": 1,
        "missing annotation": 1,
        "annotation that cannot be read": 1,
        "image listed twice": 1,
        "image that cannot be read": 1,
        "another size than the image's": 1,
    }
    assert re.search(r"data: left out, empty box: 2, first \S+a.xml:4\n", capsys.readouterr().err)
    text = found.dropped_text()
    assert text.count("\n") == len(kinds) + 10
    assert re.search(r"^# empty box: 2\n\S+a.xml:4: dog: .*is empty", text, re.MULTILINE)


def test_of_two_ranks_each_decodes_half_and_both_leave_out_the_same(voc, monkeypatch):
    whole = (voc / "JPEGImages/b.jpg").read_bytes()
    for name in "cde":
        write(voc / f"JPEGImages/{name}.jpg", whole[: len(whole) // (3 if name == "d" else 1)])
        write(voc / f"Annotations/{name}.xml", xml_of(an_object()))
    write(voc / "JPEGImages/a.jpg", whole[: len(whole) // 3])
    write(voc / "ImageSets/Main/mine.txt", "\n".join("abcde"))
    records, _ = read_voc(voc, ["mine"], VOC_CLASSES)
    halves = [check.decode_all(records[r::2], Findings(drop=True)) for r in (0, 1)]
    decoded, opens = [], check.open_record

    def gather(parts, mine):
        assert [error is None for error in mine] == [error is None for error in halves[rank]]
        parts[:] = halves

    monkeypatch.setattr(check.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(check.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(check.dist, "all_gather_object", gather)
    monkeypatch.setattr(check, "open_record", lambda r: decoded.append(r) or opens(r))
    for rank, share in enumerate((3, 2)):
        monkeypatch.setattr(check.dist, "get_rank", lambda rank=rank: rank)
        found = Findings(drop=True)
        kept = check.leave_out_unreadable(records, found)
        assert ([r.name for r in kept], len(decoded)) == (["b", "c", "e"], share)
        assert [len(rows) for rows in found.dropped.values()] == [2]
        decoded.clear()


def test_drop_bad_does_not_hide_that_nothing_is_left(voc):
    for name in "ab":
        write(voc / f"Annotations/{name}.xml", xml_of(an_object(box=(1, 1, 1, 1))))
    args = flags(voc_root=voc, drop_bad=True)
    with pytest.raises(BadData, match="no objects at all in the 2 images"):
        open_data(args, ["trainval"])
    with pytest.raises(BadData, match="no VOC2007/ImageSets/Main/test.txt"):
        open_data(args, ["2007:test"])
    for name in "ab":
        write(voc / f"Annotations/{name}.xml", xml_of(an_object()))
        write(voc / f"JPEGImages/{name}.jpg", b"cut")
    with pytest.raises(BadData, match="--drop-bad leaves no object at all of trainval"):
        open_data(args, ["trainval"])


# ---- what open_data adds


def test_records_in_the_order_of_a_network(voc):
    write(voc / "Annotations/b.xml", xml_of(an_object("cat"), an_object("dog")))
    args = flags(voc_root=voc, classes="auto")
    records, classes = open_data(args, ["trainval"], ("dog", "horse", "cat"))
    assert classes == ("dog", "horse", "cat")
    assert [record.labels.tolist() for record in records] == [[1], [3, 1]]
    with pytest.raises(ValueError, match=r"trainval: objects of cat. .*cannot be measured on cat"):
        open_data(args, ["trainval"], ("dog",))
    args.drop_bad = True
    records, _ = open_data(args, ["trainval"], ("dog",))
    assert [record.labels.tolist() for record in records] == [[1], [1]]
    assert [len(record.boxes_xyxy) for record in records] == [1, 1]


# ---- the real data


def test_the_real_voc_copy(voc_root):
    start = time.process_time()
    train, _ = read_voc(voc_root, ["2007:train"], VOC_CLASSES)
    assert len(train) == 2500
    assert sum(len(record.labels) for record in train) == 7843
    assert sum(int((~record.difficult).sum()) for record in train) == 6300
    val, _ = read_voc(voc_root, ["2007:val"], VOC_CLASSES)
    assert (len(val), sum(len(r.labels) for r in val)) == (2508, 7812)
    more, names = read_voc(voc_root, ["2012:trainval"])
    assert (len(more), sum(len(r.labels) for r in more)) == (3426, 7168)
    assert "aeroplane" not in names  # this part of VOC2012 has none
    assert time.process_time() - start < 20
    batch = next(data.batches(train, 300, batch_size=16, seed=0))
    assert batch.images.float().mean() > 20


POLYGONS = {
    "numbered": "<polygon><x1>4</x1><y1>6</y1><x2>20</x2><y2>8</y2><x3>9</x3><y3>30</y3></polygon>",
    "points": "<polygon><pt><x>4</x><y>30</y></pt><pt><x>20</x><y>6</y></pt></polygon>",
    "rotated": "<robndbox><cx>12</cx><cy>18</cy><w>24</w><h>16</h><angle>1.570796327</angle>"
    "</robndbox>",
}


@pytest.mark.parametrize("shape", POLYGONS)
def test_a_polygon_or_a_rotated_box_has_a_box_around_it(voc, shape, capsys):
    text = f"<object><name>dog</name>{POLYGONS[shape]}</object>"
    write(voc / "Annotations/a.xml", xml_of(text))
    records, _ = read_voc(voc.parent, ["2007:trainval"], VOC_CLASSES)
    assert records[0].boxes_xyxy[0].tolist() == pytest.approx([4, 6, 20, 30], abs=1e-5)
    status, out = run_check(capsys, voc_root=voc.parent)
    assert status == 1
    assert listed(out, "handled", ".*a.xml +polygons or rotated boxes")


@pytest.mark.parametrize(
    ("inside", "has"),
    [
        ("<bndbox><x>4</x><y>6</y><w>16</w><h>24</h></bndbox>", "<bndbox/x>, <bndbox/y>"),
        ("<polygon><x1>4</x1><x2>9</x2></polygon>", "<polygon/x1>"),
        ("", "nothing of the kind"),
    ],
)
def test_an_object_without_a_box_is_named(voc, inside, has):
    write(voc / "Annotations/a.xml", xml_of(f"<object><name>dog</name>{inside}</object>"))
    with pytest.raises(BadData, match=f"dog: no <bndbox> with <xmin>.*the object has {has}"):
        read_voc(voc.parent, ["2007:trainval"], VOC_CLASSES)


def test_labels_in_a_table_are_named(tmp_path):
    write(tmp_path / "images/labels.csv", "filename,xmin,ymin,xmax,ymax,class\n")
    for kind in ("voc", "coco", "yolo"):
        with pytest.raises(BadData, match=r"labels.csv\) are not read: export or convert them"):
            open_data(flags(**{f"{kind}_root": str(tmp_path)}), ["2007:train"])
