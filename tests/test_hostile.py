"""Files as people have them, and files that mean harm: one clear error each, in bounded time."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import records as readers
import train
from data import BadData, Findings, read_coco, read_voc

ROOT = Path(__file__).parents[1]
OBJECT = """<object>
<name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
</object>
"""


def xml_of(*objects, size=(60, 40), filename="a.jpg"):
    width, height = size
    return (
        f"<annotation>\n<filename>{filename}</filename>\n<size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>\n{''.join(objects)}</annotation>\n"
    )


def an_object(name="dog", box=(5, 6, 30, 31), difficult=0):
    return OBJECT.format(name=name, box=box, difficult=difficult)


@pytest.fixture
def voc(tmp_path):
    """A good VOC tree of two images, a and b; tests spoil it."""
    tree = tmp_path / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tree / name).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (60, 40), (200, 30, 40)).save(tree / f"JPEGImages/{name}.jpg")
        (tree / f"Annotations/{name}.xml").write_text(xml_of(an_object()))
    (tree / "ImageSets/Main/trainval.txt").write_text("a\nb\n")
    return tree


@pytest.fixture
def coco(tmp_path):
    """A good COCO tree of one image, and its JSON to spoil."""
    for name in ("annotations", "train2017"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "train2017/000007.jpg")
    content = {
        "images": [{"id": 7, "file_name": "000007.jpg", "width": 60, "height": 40}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [5, 6, 10.5, 9], "area": 50.0,
             "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 60, 40], "area": 9,
             "iscrowd": 1},
        ],
    }  # fmt: skip
    return tmp_path, content


def write_coco(root, content, name="train2017"):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f"annotations/instances_{name}.json").write_text(text)


def add_second_set(root, content):
    """val2017: the same picture as image 8; returns its JSON to spoil."""
    (root / "val2017").mkdir()
    Image.new("RGB", (60, 40)).save(root / "val2017/000007.jpg")
    second = json.loads(json.dumps(content).replace('"id": 7', '"id": 8'))
    second = json.loads(json.dumps(second).replace('"image_id": 7', '"image_id": 8'))
    write_coco(root, second, "val2017")
    return second


def load(record):
    return data.decode(data.open_record(record), record)


def run_data(capsys, *arguments):
    """python data.py ARGUMENTS, in this process: exit status, stdout, stderr."""
    status = data.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


# ---- VOC


def test_a_good_tree(voc):
    for root in (voc.parent, voc, voc.parent.parent / voc.parent.name):
        records, classes = read_voc(root, ["2007:trainval"], data.VOC_CLASSES)
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
    assert data.list_sets(voc.parent) == ["2007:trainval"]


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
    (found,) = data.list_sets(voc.parent)
    assert len(read_voc(voc.parent, [found])[0]) == 2
    status, out, _ = run_data(
        capsys, "--check", "--voc-root", voc.parent, "--classes", "auto", "--workers", 1
    )
    assert (status, "2 images, 2 objects" in out) == (0, True)


def test_only_the_devkits_lists_of_one_class_are_not_sets(voc):
    for name, lines in (("dog_train", "a -1\nb  1\n"), ("night_train", "a\n"), ("x_test", "")):
        (voc / f"ImageSets/Main/{name}.txt").write_text(lines)
    assert data.list_sets(voc) == ["night_train", "trainval", "x_test"]


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


def test_other_suffixes_and_names_with_spaces(voc):
    Image.new("L", (60, 40)).save(voc / "JPEGImages/my dog 1.PNG")
    (voc / "Annotations/my dog 1.xml").write_text(xml_of(an_object()))
    (voc / "ImageSets/Main/mine.txt").write_text("my dog 1.PNG\n")
    (record,), _ = read_voc(voc, ["mine"])
    assert load(record).mode == "RGB"


def test_an_image_listed_with_its_suffix_is_that_one(voc):
    Image.new("RGB", (60, 40)).save(voc / "JPEGImages/a.png")
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
        (xml_of(an_object(box=(1, 6, "", 31))), r"four numbers; got \[1.0, 6.0, nan, 31.0\]"),
        (xml_of(an_object(box=(1, 6, "1_0", 31))), "four numbers"),
        (xml_of("<object><name>dog</name></object>"), "four numbers"),
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
        (xml_of(an_object(), filename="../../etc/passwd"), "leaves its folder"),
        (xml_of(an_object())[:-30], r"a.xml:\d+: broken XML: (no element found|unclosed token)"),
        ("", r"a.xml:1: the file is empty"),
        ("{}", "broken XML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "broken XML"),
    ],
)
def test_bad_annotations(voc, xml, message):
    (voc / "Annotations/a.xml").write_text(xml)
    with pytest.raises(BadData, match=message) as caught:
        read_voc(voc, ["trainval"], data.VOC_CLASSES)
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
    assert data.read_classes(path) == ["dog", "toaster"]
    for content in ("", "dog\ndog\n", "background\ndog\n"):
        path.write_text(content)
        with pytest.raises(BadData, match="one a line"):
            data.read_classes(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match="not UTF-8"):
        data.read_classes(path)
    with pytest.raises(ValueError, match="no such file"):
        data.read_classes(tmp_path / "nothing")


# ---- files that mean harm


def bounded(seconds, megabytes):
    """Fails the block that takes longer, or whose process grows more."""

    class Bound:
        def __enter__(self):
            self.start = time.process_time()
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def __exit__(self, *_):
            assert time.process_time() - self.start < seconds
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before
            assert grown < megabytes * 1024

    return Bound()


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a0 "lol">'
    + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    + "]><annotation><filename>&a11;</filename></annotation>"
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        BOMB.encode("utf-16"),
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a><filename>&x;</filename></a>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/evil.dtd"><a/>',
    ],
)
def test_entities_are_refused_before_they_grow(voc, content):
    content = content if isinstance(content, bytes) else content.encode()
    (voc / "Annotations/a.xml").write_bytes(content)
    with bounded(1, 50), pytest.raises(BadData, match=r"a.xml:1: .*document type.*refused"):
        read_voc(voc, ["trainval"])


def test_deep_and_huge_xml(voc):
    xml = voc / "Annotations/a.xml"
    xml.write_text("<a>" * 500_000)
    with bounded(1, 50), pytest.raises(BadData, match="nested more than 16 deep"):
        read_voc(voc, ["trainval"])
    with open(xml, "wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no space
    with bounded(1, 50), pytest.raises(BadData, match="a regular file of at most 16 MiB"):
        read_voc(voc, ["trainval"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_and_devices_do_not_hang_the_reader(voc):
    for name, message in (
        ("Annotations/a.xml", "no annotation"),
        ("JPEGImages/a.jpg", "no regular file"),
    ):
        (voc / name).unlink()
        os.mkfifo(voc / name)
        with pytest.raises(BadData, match=message):
            load(read_voc(voc, ["trainval"])[0][0])
        (voc / name).unlink()
        (voc / "Annotations/a.xml").write_text(xml_of(an_object()))


def png(width, height, chunks=b""):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 30_000, 2_000_000])
def test_decompression_bombs_are_refused_at_the_header(voc, side):
    (voc / "JPEGImages/a.jpg").write_bytes(png(side, side))
    (voc / "Annotations/a.xml").write_text(xml_of(an_object(), size=(side, side)))
    records, _ = read_voc(voc, ["trainval"])
    with bounded(1, 50), pytest.raises(BadData, match=r"a.jpg: too large .*not decoded"):
        load(records[0])


def test_postscript_is_no_image(voc):
    (voc / "JPEGImages/a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n")
    with pytest.raises(BadData, match="a.jpg: not an image that can be read"):
        load(read_voc(voc, ["trainval"])[0][0])


@pytest.mark.parametrize("keep", [0, 3, 100, 500, 0.5, 0.9])
def test_truncated_images(voc, keep):
    for suffix in ("jpg", "png"):
        path = voc / "JPEGImages/a.jpg"
        rng = np.random.default_rng(0)
        noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        noise.save(path, format={"jpg": "JPEG", "png": "PNG"}[suffix])
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(
            BadData, match=r"a.jpg: (cannot be decoded|not an image|the file is em)"
        ):
            load(read_voc(voc, ["trainval"])[0][0])


@pytest.mark.filterwarnings("ignore")  # Pillow on broken TIFF tags
def test_spoiled_images_never_escape_as_another_error(voc):
    """Bytes changed at random: the image loads, or BadData names it; 300 files."""
    rng, path = np.random.default_rng(1), voc / "JPEGImages/a.jpg"
    record = read_voc(voc, ["trainval"])[0][0]
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    refused = 0
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        picture.save(path, format=kind)
        good = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(50):
            bad = good.copy()
            where = rng.integers(0, min(len(bad), 600), rng.integers(1, 12))
            bad[where] = rng.integers(0, 256, len(where))
            path.write_bytes(bad.tobytes())
            try:
                load(record)
            except BadData as error:
                refused += str(path) in str(error)
    assert refused > 60


def test_spoiled_annotations_never_escape_as_another_error(voc):
    rng, path = np.random.default_rng(2), voc / "Annotations/a.xml"
    good, refused = np.frombuffer(xml_of(an_object(), an_object()).encode(), np.uint8), 0
    for _ in range(400):
        bad = good.copy()
        where = rng.integers(0, len(bad), rng.integers(1, 6))
        bad[where] = rng.integers(32, 127, len(where))
        path.write_bytes(
            bad.tobytes()[: rng.integers(1, len(bad) + 1) if rng.random() < 0.3 else None]
        )
        try:
            read_voc(voc, ["trainval"], ["dog"])
        except BadData as error:
            refused += "a.xml" in str(error)
    assert refused > 200


# ---- images as people have them


def test_every_mode_becomes_rgb(voc):
    grey = np.arange(2400, dtype=np.float64).reshape(40, 60) / 2399
    eight = Image.fromarray((grey * 255).round().astype(np.uint8))
    colours = Image.merge("RGB", [eight, eight.rotate(180), eight])
    clear = colours.copy()
    clear.putalpha(eight)
    palette = colours.quantize(64)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes([0, 128] + [255] * 62)
    cases = {
        "L": (eight, eight, 0),
        "LA": (Image.merge("LA", [eight, eight]), eight, 0),
        "1": (eight.convert("1"), eight.convert("1"), 0),
        "RGBA": (clear, colours, 0),
        "P": (palette, palette, 0),
        "transparent P": (see_through, palette, 0),
        "I;16": (Image.fromarray((grey * 65535).round().astype(np.uint16)), eight, 1),
        "CMYK": (colours.convert("CMYK"), colours, 2),
    }
    record = read_voc(voc, ["trainval"])[0][0]
    for name, (image, want, tolerance) in cases.items():
        kind = "TIFF" if name == "CMYK" else "PNG"
        clear = {k: v for k, v in image.info.items() if k == "transparency"}
        image.save(record.path, format=kind, **clear)
        got = load(record)
        assert got.mode == "RGB", name
        apart = np.abs(np.asarray(got).astype(int) - np.asarray(want.convert("RGB")).astype(int))
        assert apart.max() <= tolerance, name
        for size in (16, 50):
            batch = next(data.batches([record], size, batch_size=1, seed=0))
            assert batch.images.shape == (1, 3, size, size)
    for white in (1023, 65535):  # Pillow scales to 65535
        deep = (grey * white).round().astype(">u2").tobytes()
        record.path.write_bytes(b"P5 60 40 %d\n" % white + deep)
        assert np.abs(np.asarray(load(record))[..., 0] - np.asarray(eight).astype(int)).max() <= 1
    Image.fromarray(grey.astype(np.float32)).save(record.path, format="TIFF")
    with pytest.raises(BadData, match="32 bits a pixel"):
        load(record)


def test_grey_and_cmyk_jpegs(voc):
    record = read_voc(voc, ["trainval"])[0][0]
    for mode, shade in (("L", 90), ("CMYK", (10, 200, 30, 40))):
        image = Image.new(mode, (60, 40), shade)
        image.save(record.path, quality=95)
        want = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(np.asarray(load(record)).astype(int) - want).max() <= 4
        batch = next(data.ordered_batches([record], 15, batch_size=1))  # decoded at 1/2: draft
        assert np.abs(batch.images[0, :, 0, 0].numpy() - want[0, 0]).max() <= 4


def test_exif_orientation_is_not_applied_and_a_rotated_size_is_refused(voc):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(voc / "JPEGImages/a.jpg", exif=exif, quality=95)
    record = read_voc(voc, ["trainval"])[0][0]
    assert load(record).size == (60, 40)
    assert np.asarray(load(record))[:, :15].min() > 200  # white is still on the left
    (voc / "Annotations/a.xml").write_text(xml_of(an_object(), size=(40, 60)))
    with pytest.raises(BadData, match="60x40, its annotation says 40x60; it has an EXIF"):
        load(read_voc(voc, ["trainval"])[0][0])


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pixels_are_the_stored_ones_or_refused(voc, kind, turn):
    """Pillow turns a TIFF while it decodes, and nothing else."""
    image, exif = Image.new("RGB", (60, 40), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 10))
    exif[0x0112] = turn
    image.save(voc / "JPEGImages/a.jpg", format=kind, exif=exif)
    record = read_voc(voc, ["trainval"])[0][0]
    if kind == "TIFF" and 2 <= turn <= 8:
        with pytest.raises(BadData, match="a.jpg: a TIFF with an orientation.*Store it upright"):
            load(record)
    else:
        assert np.asarray(load(record))[:8, :16].min() > 200


def test_another_size_than_the_image(voc):
    (voc / "Annotations/a.xml").write_text(xml_of(an_object(), size=(61, 40)))
    record = read_voc(voc, ["trainval"])[0][0]
    with pytest.raises(BadData, match="a.jpg: the image is 60x40, its annotation says 61x40"):
        next(data.ordered_batches([record], 30, batch_size=1))


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
        (change(["annotations", 1, "id"], 1), "annotation id 1 is there 2 times"),
        (change(["annotations", 0, "bbox"], [1, 2, 3]), "annotation 1: expected a bbox of four"),
        (change(["annotations", 0, "bbox"], ["x", 2, 3, 4]), "annotation 1: .*four numbers"),
        (change(["annotations", 0, "bbox"], [9, 9, -4, 4]), "annotation 1: .*inverted"),
        (change(["annotations", 0, "bbox"], [90, 9, 4, 4]), "annotation 1: .*outside the 60x40"),
        (change(["annotations", 0, "bbox"], {}), "annotation 1: expected a bbox"),
        (change(["annotations", 0, "area"], None), "annotation 1: .*area"),
        (change(["annotations", 0, "iscrowd"], 7), "annotation 1: .*iscrowd"),
        (change(["images", 0, "file_name"], "../000007.jpg"), "image 7: .*leaves its folder"),
        (change(["images", 0, "file_name"], "/etc/passwd"), "image 7: .*leaves its folder"),
        (change(["images", 0, "file_name"], "8.jpg"), "image 7: no image .*8.jpg"),
        (change(["images", 0, "width"], "60"), "image 7: size '60' x 40"),
        (change(["images", 0, "width"], 10**400), "image 7: size 1000.*whole numbers of pixels"),
        (change(["images", 0, "file_name"], "x" * 300), "image 7: no image"),
        (change(["images", 0, "id"], "seven"), r"images\[0\]: not an entry.*'seven'"),
        (change(["images", 0, "id"], [7]), r"images\[0\]: not an entry"),
        (change(["images", 0], 7), r"images\[0\]: not an entry"),
        (change(["annotations", 0, "category_id"], [7]), r"annotations\[0\]: not an entry"),
        (
            change(["annotations", 1, "image_id"], 7.5),
            r"annotations\[1\]: .*7.5 is no whole number",
        ),
        (change(["annotations", 1], {"id": 2}), r"annotations\[1\]: .*KeyError: 'image_id'"),
        (change(["annotations", 0, "bbox"], "1234"), "bbox of four numbers.*; got '1234', 50.0, 0"),
        (change(["categories", 0, "name"], "dog"), "category dog is there 2 times"),
        (change(["categories", 0, "id"], 18), "category id 18 is there 2 times"),
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
    content["annotations"] *= 2
    content["annotations"] += [{"id": 3, "image_id": 7, "category_id": 18}]
    write_coco(root, json.dumps(content).replace('"id": 8', '"id": 8e999'))
    status, out, _ = run_data(capsys, "--check", "--coco-root", root)
    assert status == 1
    for pattern in (
        r"json images\[1\]  not an entry.*inf is no whole number",
        r"json images\[2\]  not an entry.*KeyError: 'id'",
        r"json annotations\[4\]  not an entry.*KeyError: 'bbox'",
        "annotation id 1 is there 2 times",
        "annotation id 2 is there 2 times",
    ):
        assert re.search(rf"refused +\S*{pattern}" if "json" in pattern else pattern, out), out
    write_coco(root, json.dumps(content))
    assert (
        "file name 000007.jpg is there 2 times"
        in run_data(capsys, "--check", "--coco-root", root)[1]
    )


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
    args = train.parse_args(["--coco-root", str(root)])
    _, (record,), classes = train.read_data(args)
    assert classes == ("bicycle", "dog", "toothbrush")
    assert record.labels.tolist() == [3, 2]
    second["categories"][0]["name"] = "comb"
    write_coco(root, second, "val2017")
    with pytest.raises(ValueError, match="It cannot be measured on comb"):
        train.read_data(args)


def test_missing_coco(tmp_path):
    with pytest.raises(ValueError, match=r"--coco-root .*annotations/instances_val2017.json"):
        read_coco(tmp_path, ["val2017"])


# ---- python data.py --check


def test_check_names_every_problem_and_fails(voc, capsys):
    names = "abcdefgh"
    for name in names[2:]:
        Image.new("RGB", (60, 40)).save(voc / f"JPEGImages/{name}.jpg")
        (voc / f"Annotations/{name}.xml").write_text(xml_of(an_object()))
    (voc / "JPEGImages/a.jpg").write_bytes((voc / "JPEGImages/a.jpg").read_bytes()[:300])
    Image.new("L", (60, 40)).save(voc / "JPEGImages/b.jpg")
    (voc / "Annotations/c.xml").write_text(xml_of(an_object(), an_object(box=(9, 9, 3, 12))))
    (voc / "Annotations/d.xml").write_text(xml_of(an_object(name="wyvern")))
    (voc / "Annotations/e.xml").write_text(xml_of(an_object(), size=(40, 60)))
    (voc / "Annotations/f.xml").write_text(BOMB)
    (voc / "Annotations/g.xml").write_text(xml_of(an_object(box=(0, 1, 99, 30.5))))
    (voc / "JPEGImages/h.jpg").unlink()
    (voc / "ImageSets/Main/trainval.txt").write_text("\n".join(names) + "\na\n")
    status, out, err = run_data(capsys, "--check", "--voc-root", voc.parent, "--workers", 2)
    assert status == 1
    for pattern in (
        r"refused +\S*JPEGImages/a.jpg  (cannot be decoded|not an image)",
        r"note +\S*b.jpg  mode L",
        r"refused +\S*c.xml:8  dog: box .* inverted",
        r"refused +\S*d.xml:4  class 'wyvern'",
        r"refused +\S*e.jpg  the image is 60x40",
        r"refused +\S*f.xml:1  .*document type",
        r"handled +\S*g.xml:4  .*over the border",
        r"note +\S*g.xml:4  .*from 0",
        r"note +\S*g.xml:4  .*fractions",
        r"refused +\S*trainval.txt:8  no image",
        r"refused +\S*trainval.txt:9  a is listed twice",
        r"6 images, 5 objects: 7 places that training refuses, 1 that it handles, 2 notes",
    ):
        assert re.search(pattern, out), (pattern, out)
    assert "6/6 images" in err


def test_check_of_good_data_succeeds(voc, coco, capsys):
    assert run_data(capsys, "--check", "--voc-root", voc.parent, "--classes", "auto")[0] == 0
    write_coco(*coco)
    assert run_data(capsys, "--check", "--coco-root", coco[0])[0] == 0


def test_check_goes_on_when_a_whole_set_cannot_be_read(voc, capsys):
    (voc / "ImageSets/Main/test.txt").write_text("")
    status, out, _ = run_data(capsys, "--check", "--voc-root", voc.parent)
    assert status == 1
    assert re.search(r"refused +\S*test.txt  lists no images", out)
    assert "2 images, 2 objects" in out


def test_check_notes_images_without_objects_and_classes_that_a_set_lacks(voc, coco, capsys):
    (voc / "Annotations/a.xml").write_text(xml_of())
    for name, line in (("mine", "b"), ("held_out", "c")):
        (voc / f"ImageSets/Main/{name}.txt").write_text(f"{line}\n")
    Image.new("RGB", (60, 40)).save(voc / "JPEGImages/c.jpg")
    (voc / "Annotations/c.xml").write_text(xml_of(an_object(), an_object("cat")))
    flags = "--check", "--voc-root", voc, "--classes", "auto"
    status, out, _ = run_data(capsys, *flags)
    assert (status, "3 images, 3 objects" in out) == (0, True)
    assert re.search(r"note +\S+a.xml  no objects\n", out)
    for lacking, there in (("mine", True), ("trainval", True), ("held_out", False)):
        what = f"note     set {lacking}  lacks cat: a network trained on it alone cannot"
        assert (what in out) == there
    root, content = coco
    write_coco(root, content | {"annotations": [content["annotations"][0]]})
    second = add_second_set(root, content)
    second["images"].append({"id": 9, "file_name": "9.jpg", "width": 60, "height": 40})
    Image.new("RGB", (60, 40)).save(root / "val2017/9.jpg")
    write_coco(root, second, "val2017")
    out = run_data(capsys, "--check", "--coco-root", root)[1]
    assert re.search(r"note +\S+instances_val2017.json image 9  no objects\n", out)


def test_check_goes_on_without_what_is_missing(voc, coco, capsys, monkeypatch):
    """A listed set without its images; a file that may not be read (root may read any)."""
    root, content = coco
    write_coco(root, content)
    write_coco(root, content, "aaa")
    status, out, _ = run_data(capsys, "--check", "--coco-root", root)
    assert (status, "1 images, 2 objects: 1 places" in out) == (1, True)
    assert re.search(r"refused +--coco-root \S+  no annotations/instances_aaa.json and aaa/", out)
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "a.xml":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (voc / "Annotations/b.xml").write_text(xml_of(an_object(box=(9, 9, 3, 12))))
    status, out, _ = run_data(capsys, "--check", "--voc-root", voc)
    assert status == 1
    assert re.search(r"refused +\S+a.xml  cannot be read \(Permission denied\)", out)
    assert re.search(r"refused +\S+b.xml:4  dog: box .* inverted", out)


def test_check_prints_names_that_are_no_text(coco):
    root, content = coco
    content["images"].append({"id": 8, "file_name": "\ud800.jpg", "width": 60, "height": 40})
    write_coco(root, content)
    command = [sys.executable, ROOT / "data.py", "--check", "--coco-root", root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no image" in done.stdout
    assert "1 places that training refuses" in done.stdout


def test_names_with_a_colon_stay_inside_drives_do_not():
    assert readers.stays_inside("2021-03-04T12:30:05.jpg")
    assert not readers.stays_inside("C:a.jpg")


def test_errors_of_the_command_are_one_line(voc):
    command = [sys.executable, ROOT / "data.py", "--voc-root", voc / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=voc)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --voc-root .*nowhere.*\n", done.stderr)


@pytest.mark.parametrize("flags", [("--workers", 0), ("--seed", -1)])
def test_numbers_out_of_range_name_their_flag(voc, capsys, flags):
    status, _, err = run_data(capsys, "--check", "--voc-root", voc, *flags)
    assert status == 2
    assert re.search(f"error: .*{flags[0]} {flags[1]}.*expected 1 or more, and 0 or more", err)


def test_the_sheet_shows_24_augmented_images(voc, tmp_path, capsys):
    status, out, _ = run_data(capsys, "--voc-root", voc, "--out", tmp_path / "sheet.png")
    assert status == 0
    assert "24 of 2 images, 20 classes, ssd" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1800, 1200)
        green = (np.asarray(sheet) == data.GREEN).all(axis=2)
        assert green.sum() > 2000


def test_findings_collect_or_raise():
    with pytest.raises(BadData, match="here: wrong"):
        Findings().refuse("here", "wrong")
    found = Findings(collect=True)
    found.refuse("here", "wrong")
    assert found.refused == {"wrong": ["here"]}


# ---- the real data


def test_the_real_voc_copy(voc_root):
    start = time.process_time()
    train, _ = read_voc(voc_root, ["2007:train"], data.VOC_CLASSES)
    assert len(train) == 2500
    assert sum(len(record.labels) for record in train) == 7843
    assert sum(int((~record.difficult).sum()) for record in train) == 6300
    val, _ = read_voc(voc_root, ["2007:val"], data.VOC_CLASSES)
    assert (len(val), sum(len(r.labels) for r in val)) == (2508, 7812)
    more, names = read_voc(voc_root, ["2012:trainval"])
    assert (len(more), sum(len(r.labels) for r in more)) == (3426, 7168)
    assert "aeroplane" not in names  # this part of VOC2012 has none
    assert time.process_time() - start < 20
    batch = next(data.batches(train, 300, batch_size=16, seed=0))
    assert batch.images.float().mean() > 20


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


def test_every_format_is_known_to_pillow():
    Image.init()
    assert set(readers.FORMATS) <= set(Image.OPEN)
