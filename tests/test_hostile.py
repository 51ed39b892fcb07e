"""Files that mean harm, pictures of every kind, and the data check that names what is wrong."""

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import (
    an_object,
    bounded,
    flags,
    make_coco,
    make_voc,
    write,
    write_coco,
    xml_of,
)
from trees import picture as picture_of

import data
from plumbing.files import (
    FORMATS,
    BadData,
    Findings,
    decode_pixels,
    open_record,
    stays_inside,
)
from plumbing.pictures import GREEN
from plumbing.program import check_file, kept_as_json, make_folder, run_program
from plumbing.sources import open_data, read_data
from plumbing.voc import read_voc

ROOT = Path(__file__).parents[1]


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path)


def load(record):
    return decode_pixels(open_record(record), record)


def run_data(capsys, *arguments):
    """python data.py ARGUMENTS, in this process: exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: data.main([str(argument) for argument in arguments]))
    return ended.value.code, *capsys.readouterr()


# ---- files that mean harm


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
        '<!DOCTYPE a PUBLIC "-//W3C//DTD" "evil.dtd"><a/>',
        '<!DOCTYPE a [<!ATTLIST a b CDATA "x">]><a/>',
        '<!DOCTYPE a [<!ENTITY % x "lol"> %x;]><a/>',
        "<!DOCTYPE a [%x;]><annotation><filename>&y;</filename></annotation>",
    ],
)
def test_entities_are_refused_before_they_grow(voc, content):
    content = content if isinstance(content, bytes) else content.encode()
    (voc / "Annotations/a.xml").write_bytes(content)
    with bounded(1, 50), pytest.raises(BadData, match=r"a.xml:1: .*document type.*refused"):
        read_voc(voc, ["trainval"])


@pytest.mark.parametrize("more", ["", " [<!ELEMENT annotation ANY>]"])
def test_a_document_type_without_entities_is_read(voc, more):
    text = f'<?xml version="1.0"?>\n<!DOCTYPE annotation{more}>\n{xml_of(an_object())}'
    (voc / "Annotations/a.xml").write_text(text)
    assert read_voc(voc, ["trainval"])[0][0].labels.tolist() == [1]
    (voc / "Annotations/a.xml").write_text(text.replace("dog", "&dog;"))
    with pytest.raises(BadData, match=r"a.xml:7: broken XML: undefined entity"):
        read_voc(voc, ["trainval"])


def test_deep_and_huge_xml(voc):
    xml = voc / "Annotations/a.xml"
    xml.write_text("<annotation>" + "<a>" * 500_000)
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
    """Bytes changed at random: the image loads, or BadData names it; 30 of each format."""
    rng, path = np.random.default_rng(1), voc / "JPEGImages/a.jpg"
    record = read_voc(voc, ["trainval"])[0][0]
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    refused = 0
    for kind in FORMATS:
        picture.save(path, format=kind)
        good = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(30):
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
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pixels_are_the_stored_ones_or_refused(voc, kind, turn):
    """Pillow turns a TIFF while it decodes, and nothing else."""
    if kind not in FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
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


def test_another_size_than_the_image_is_found_before_the_first_step(voc, coco, tmp_path):
    """A run must not end in its middle, when such an image is first loaded."""
    for name in "ab":
        (voc / f"Annotations/{name}.xml").write_text(xml_of(an_object(), size=(61, 40)))
    given = dict(train_sets=["trainval"], eval_sets=["trainval"], overfit=0, classes="auto")
    args = flags(voc_root=str(voc), **given)
    with pytest.raises(BadData, match=r"a.jpg: the image is 60x40, its .* 61x40 \(--drop-bad"):
        read_data(args)
    (voc / "Annotations/b.xml").write_text(xml_of(an_object()))
    args.drop_bad = True
    records, _, _, left_out = read_data(args)
    assert [record.name for record in records] == ["b"]
    assert "a.jpg: the image is 60x40, its annotation says 61x40" in left_out
    root, content = coco
    content["images"][0]["width"] = 61
    write_coco(root, content)
    given = dict(train_sets=["train2017"], eval_sets=["train2017"], overfit=1)
    with pytest.raises(BadData, match="000007.jpg: the image is 60x40, its annotation says 61x40"):
        read_data(flags(coco_root=str(root), **given))


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
    second = json.loads(json.dumps(content).replace('id": 7', 'id": 8'))
    write(root / "val2017/000007.jpg", (root / "train2017/000007.jpg").read_bytes())
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
    assert re.search(r"refused +\S+instances_aaa.json image 7  no image \S+/aaa/000007.jpg", out)
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
    assert stays_inside("2021-03-04T12:30:05.jpg")
    assert not stays_inside("C:a.jpg")


def test_errors_of_the_command_are_one_line(voc, capsys):
    status, _, err = run_data(capsys, "--voc-root", voc / "nowhere")
    assert status == 2
    assert re.fullmatch(r"error: --voc-root .*nowhere.*\n", err)


@pytest.mark.parametrize("flags", [("--workers", 0), ("--seed", -1)])
def test_numbers_out_of_range_name_their_flag(voc, capsys, flags):
    status, _, err = run_data(capsys, "--check", "--voc-root", voc, *flags)
    assert status == 2
    assert re.search(f"error: .*{flags[0]} {flags[1]}.*expected [01] or more", err)


def test_the_sheet_shows_24_augmented_images(voc, tmp_path, capsys):
    status, out, _ = run_data(capsys, "--voc-root", voc, "--out", tmp_path / "sheet.png")
    assert status == 0
    assert "24 of 2 images, 20 classes, ssd" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 304 - 4, 4 * 304 - 4)
        green = (np.asarray(sheet) == GREEN).all(axis=2)
        assert green.sum() > 2000


def test_findings_collect_or_raise():
    with pytest.raises(BadData, match="here: wrong"):
        Findings().refuse("here", "wrong")
    found = Findings(collect=True)
    found.refuse("here", "wrong")
    assert found.refused == {"wrong": ["here"]}


def test_every_format_is_known_to_pillow():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


READ = """
import sys
from trees import flags
from plumbing.sources import open_data
from plumbing.files import to_disk
for flag, root in zip(sys.argv[1::2], sys.argv[2::2]):
    classes = "auto" if flag == "voc_root" else None
    (record,), names = open_data(flags(**{flag: root}, classes=classes), ["mine"])
    print(ascii(names), record.size, record.labels.tolist())
    (record.path.parent / to_disk("\\u87ba\\u6813.dat")).touch()
"""


@pytest.mark.slow
def test_any_locale_reads_the_same(tmp_path):
    """In the locale C Python reads file names as bytes; what files say is UTF-8 all the same."""
    voc, coco, yolo = (tmp_path / name for name in ("voc", "coco", "yolo"))
    for path in (voc / "JPEGImages", coco / "mine", yolo / "images/mine"):
        picture_of(path / "\u00e9crou.jpg")
    write(voc / "Annotations/\u00e9crou.xml", xml_of(an_object("\u00e9crou")))
    write(voc / "ImageSets/Main/mine.txt", "\u00e9crou\n")
    content = make_coco(tmp_path)[1]
    content["images"][0]["file_name"] = "\u00e9crou.jpg"
    write_coco(coco, content, "mine")
    write(yolo / "labels/mine/\u00e9crou.txt", "0 0.5 0.5 0.5 0.5")
    write(yolo / "data.yaml", "names: [\u00e9crou]")
    words = [w for root in (voc, coco, yolo) for w in (f"{root.name}_root", str(root))]
    said, bytes_only = [], {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for more in (bytes_only, {"PYTHONUTF8": "1"}):
        environment = os.environ | more | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run([sys.executable, "-c", READ, *words], capture_output=True, text=True,
                              env=environment, timeout=120)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert said[0] == said[1]
    assert said[0].count("crou") == 2  # and COCO's dog
    assert (voc / "JPEGImages/\u87ba\u6813.dat").exists()


@pytest.mark.parametrize("place", ["/proc/nowhere/x", "{tmp}/file/x"])
def test_a_place_that_cannot_be_written_is_said_with_its_flag(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    path = place.format(tmp=tmp_path)
    for flag in ("--out", "--cache", "--draw"):
        with pytest.raises(ValueError, match=f"{flag} .*x: no folder can be made there.*choose"):
            make_folder(Path(path), flag)
    with pytest.raises(ValueError, match=r"x.json: cannot be written \(.*choose another"):
        check_file(f"{path}.json")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_to_write_is_tried_and_stays_as_it_is(tmp_path):
    check_file(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "b.json").write_text("old")
    check_file(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == "old"


def test_a_second_ctrl_c_does_not_cut_the_json(tmp_path, monkeypatch):
    write_text, path = Path.write_text, tmp_path / "found.json"

    def hit(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        return write_text(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", hit)
    with pytest.raises(KeyboardInterrupt), kept_as_json(str(path)) as rows:  # noqa: PT012
        rows.append("done")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == ["done"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train.py", ": --out or --cache. Free some space, then go on with --resume"),
        ("detect.py a.jpg --draw d --json=j", ": --draw or --json. Free some space, or write to"),
        ("detect.py a.jpg", ". Free some space, or write to another place"),
    ],
)
def test_a_full_disk_names_flags_that_the_program_has(words, said, monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit):
        run_program(full)
    assert f"No space left on device{said}" in capsys.readouterr().err


def test_an_empty_root_is_no_wish_for_shapes():
    """`--voc-root "$UNSET"` must not train on drawn shapes."""
    for kind in ("voc", "coco", "yolo"):
        with pytest.raises(ValueError, match=f"{kind}: where is it. Expected --{kind}-root DIR"):
            open_data(flags(**{f"{kind}_root": ""}), ["train"])


def test_results_never_replace_a_picture_of_the_data(tmp_path):
    root = make_voc(tmp_path)
    image = root / "JPEGImages/a.jpg"
    whole = image.read_bytes()
    with pytest.raises(ValueError, match="a.jpg: would be overwritten"):
        data.main(["--voc-root", str(root), "--classes", "auto", "--out", str(image)])
    assert image.read_bytes() == whole


@pytest.mark.slow
def test_a_drawn_film_never_replaces_the_film_or_the_weights(tmp_path):
    for name in ("film.mjpeg", "my.pt"):
        (tmp_path / name).write_bytes(b"mine")
        command = [sys.executable, str(ROOT / "detect.py"), "-", "--draw", str(tmp_path / name)]
        command += ["--checkpoint", str(tmp_path / "my.pt")]
        with open(tmp_path / "film.mjpeg", "rb") as film:
            done = subprocess.run(command, stdin=film, capture_output=True, text=True)
        assert (done.returncode, (tmp_path / name).read_bytes()) == (2, b"mine")
        assert f"{name}: would be overwritten" in done.stderr
