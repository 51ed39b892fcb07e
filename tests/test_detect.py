"""detect.py: pictures as people have them, films, drawings, export."""

import copy
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_eval import CLASSES, Oracle, narrow, write_checkpoint

import detect
import eval as evaluation
import scratchdet
from ops.reference import nms, normalise
from plumbing import export, pictures
from plumbing.files import decode_pixels, open_record
from plumbing.frames import split_jpegs
from plumbing.shapes import draw_shapes
from plumbing.voc import read_voc
from scratchdet import Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_test=5)
    return read_voc(root, ["2007:test"], CLASSES)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.pt", narrow(classes=CLASSES))


def write_unsure(path) -> str:
    """A checkpoint that gives every class the score 1/7."""
    model = narrow(classes=CLASSES)
    with torch.no_grad():
        for conf in model.head.conf:
            conf[1].weight.zero_()  # BatchNorm's
    return write_checkpoint(path, model)


# ------------------------------------------------------------------------------ pictures with boxes


def test_draw_boxes():
    image = Image.new("RGB", (320, 240), (90, 90, 90))
    boxes, labels = np.array([[40.0, 60, 200, 180]]), np.array([1])
    truth = np.array(pictures.draw_boxes(image, boxes, labels, None, ("dog",)))
    both = np.array(pictures.draw_boxes(image, boxes, labels, np.array([0.87]), ("dog",)))
    assert (np.array(image) == 90).all()  # the picture itself stays as it was
    assert tuple(truth[120, 40]) == pictures.GREEN
    assert tuple(both[120, 40]) == pictures.ORANGE
    assert (both[100:170, 60:190] == 90).all()  # nothing inside the box
    plate = (both[40:60, 40:200] == pictures.ORANGE).all(axis=-1)
    ink = (both[40:60, 40:200] < 60).all(axis=-1)
    assert plate.any(axis=1).sum() >= 12  # a plate at least 12 px high, with letters on it
    assert ink.sum() > 50
    edge = np.array([[-20.0, -5, 30, 20], [300, 230, 330, 250]])  # beyond the picture: still drawn
    pictures.draw_boxes(image, edge, np.array([1, 1]), np.array([0.5, 0.6]), ("dog",))
    pictures.draw_boxes(image, np.empty((0, 4)), np.empty(0, int), np.empty(0), ("dog",))


@pytest.mark.parametrize("truth", [False, True])
def test_no_name_lies_on_another(truth):
    """Three boxes of almost the same corners: as many pixels of letters as the three apart, and
    none outside the boxes, but for the first name of a detection, above its box."""
    image = Image.new("RGB", (320, 240), (90, 90, 90))
    boxes = np.array([[40.0, 60, 200, 180], [52, 61, 203, 178], [60, 70, 196, 184]])
    labels, scores = np.array([1, 2, 1]), None if truth else np.array([0.55, 0.87, 0.31])

    def letters(some):
        drawn = pictures.draw_boxes(image, boxes[some], labels[some],
                                    None if truth else scores[some], ("dog", "sheep"))  # fmt: skip
        pixels = np.array(drawn).astype(int)
        assert (pixels[187:] == 90).all()
        assert (pixels[: 58 if truth else 40] == 90).all()
        return ((pixels > 190) if truth else (pixels < 60)).all(axis=-1).sum()

    apart = [letters([i]) for i in range(3)]
    assert min(apart) > 20
    assert letters([0, 1, 2]) == sum(apart)


def test_a_crowd_gets_colours_and_a_legend_instead_of_names():
    """Twenty cells: no name hides a cell; the strip below counts them."""
    image = Image.new("RGB", (300, 200), (90, 90, 90))
    corner = np.array([[30 + 50 * (i % 5), 10 + 45 * (i // 5)] for i in range(20)], float)
    boxes, labels = np.concatenate([corner, corner + 25], axis=1), np.arange(20) % 2 + 1
    drawn = np.array(pictures.draw_boxes(image, boxes, labels, np.full(20, 0.9), ("RBC", "WBC")))
    assert drawn.shape[1] == 300
    assert 212 <= drawn.shape[0] <= 232
    colours = [pictures.class_colour(label) for label in (1, 2)]
    for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True):
        assert tuple(drawn[y0 + 10, x0]) == colours[label - 1]
        assert (drawn[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4] == 90).all()  # the cell can be seen
    strip = drawn[200:]
    assert all((strip == colour).all(axis=-1).any() for colour in colours)
    truth = np.array(pictures.draw_boxes(image, boxes, labels, None, ("RBC", "WBC")))
    assert truth.shape == (200, 300, 3)
    named = pictures.draw_boxes(image, boxes, labels, np.full(20, 0.9), ("RBC", "WBC"),
                                crowded=False)  # fmt: skip
    assert named.size == image.size  # names and scores where a caller wants them, and no strip


def test_class_colours_differ():
    colours = np.array([pictures.class_colour(label) for label in range(1, 21)])
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert apart[~np.eye(20, dtype=bool)].min() > 20
    assert np.abs(colours[0] - np.array(pictures.ORANGE)).max() <= 12


def test_a_sheet_wastes_no_space(tmp_path):
    """Wide and high pictures, in columns one under another."""
    sizes = [(300, 100), (150, 100), (300, 300), (600, 200), (100, 100), (300, 150)]
    some = [Image.new("RGB", size, (10, 20, 30)) for size in sizes]
    pictures.save_sheet(tmp_path / "sheet.png", some, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 908
    assert (sheet == (10, 20, 30)).all(axis=-1).mean() > 0.75
    pictures.save_sheet(tmp_path / "none.png", [], columns=3)


def test_a_sheet_is_a_picture(tmp_path):
    with pytest.raises(ValueError, match="sheet: expected the name of a picture"):
        pictures.save_sheet(tmp_path / "sheet", [Image.new("RGB", (9, 9))], columns=1)


def test_draw_sheet(records, tmp_path):
    path = tmp_path / "sheet.png"
    evaluation.draw_sheet(Oracle(records[:5], Config(classes=CLASSES)), records[:5], path)
    with Image.open(path) as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert pictures.GREEN in colours
    assert pictures.ORANGE in colours


# ------------------------------------------------------------------------------ what people bring


def test_own_pictures(checkpoint, records, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "note.txt").write_text("not a picture")
    (folder / ".hidden.jpg").write_text("not a picture either")
    Image.open(records[0].path).convert("L").save(folder / "grey.png")
    sideways = Image.open(records[1].path)
    exif = sideways.getexif()
    exif[0x0112] = 6  # taken with the camera turned
    sideways.crop((0, 0, 200, 100)).save(folder / "phone.jpg", exif=exif)
    flags = ["--checkpoint", checkpoint, "--json", str(tmp_path / "found.json")]
    flags += ["--draw", str(tmp_path / "drawn")]
    unsure = write_unsure(tmp_path / "unsure.pt")
    assert detect.main([str(folder), *flags, "--checkpoint", unsure]) == 0
    text = capsys.readouterr().out
    assert "nothing above 0.3 (best guess" in text
    assert "This checkpoint knows circle" in text
    assert detect.main([str(folder), *flags, "--min-score", "0"]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [Path(row["image"]).name for row in rows] == ["grey.png", "phone.jpg"]
    assert rows[1]["size"] == [100, 200]
    assert set(rows[0]["detections"][0]) == {"label", "score", "box_xyxy"}
    with Image.open(tmp_path / "drawn" / "phone.jpg") as drawn:
        assert drawn.width == 100
        assert drawn.height >= 200  # and a legend


def test_a_batch_goes_on_behind_a_picture_that_cannot_be_read(
    checkpoint, records, tmp_path, capsys
):
    """One is cut, one is text, one of a Mac is hidden: the others are done, the status says it."""
    whole = records[0].path.read_bytes()
    for name, content in {"a.jpg": whole, "b.jpg": whole[: len(whole) // 2], "c.png": b"text",
                          "d.jpg": whole, "._d.jpg": b"mac"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    found = tmp_path / "found.json"
    assert detect.main([str(tmp_path), "--checkpoint", checkpoint, "--json", str(found)]) == 1
    err = capsys.readouterr().err
    assert "b.jpg: cannot be decoded" in err
    assert "c.png" in err
    assert "2 of 4 pictures cannot be read" in err
    assert [Path(r["image"]).name for r in json.loads(found.read_text())] == ["a.jpg", "d.jpg"]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_pillow_turns_them(orientation, suffix, tmp_path):
    image = Image.fromarray((np.arange(18).reshape(2, 3, 3) * 10).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"turned.{suffix}"))
    got = pictures.upright(Image.open(tmp_path / f"turned.{suffix}"))
    assert np.array_equal(np.asarray(got), np.asarray(expected))
    assert np.array_equal(np.asarray(pictures.upright(got)), np.asarray(expected))  # once only


def test_the_detector_turns_a_picture_as_the_command_does(checkpoint, records):
    image = Image.open(records[0].path).convert("RGB")
    image.getexif()[0x0112] = 6
    detector = detect.Detector(checkpoint, min_score=0.0)
    assert np.array_equal(detector(image).boxes_xyxy, detector(pictures.upright(image)).boxes_xyxy)
    assert len(detector(image).boxes_xyxy)


def test_a_picture_of_16_bits_stays_one(tmp_path):
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 65535\n\x00\x00\xff\xff")
    got = pictures.upright(Image.open(tmp_path / "grey.pgm"))
    assert np.asarray(got).tolist() == [[[0] * 3, [255] * 3]]


def test_a_broken_exif_tag_does_not_hide_a_picture(tmp_path):
    """Orientation 6, and a resolution of -5 where numbers are not negative."""
    tags = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIhH", 0x0100, 8, 1, -5, 0)
    tags += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
    Image.new("RGB", (30, 20)).save(tmp_path / "broken.jpg", exif=b"Exif\0\0" + tags)
    assert pictures.upright(Image.open(tmp_path / "broken.jpg")).size == (20, 30)


def test_the_detector_takes_arrays_and_pictures_of_any_mode(checkpoint, records, tmp_path):
    """The three lines of the README: the same boxes as detect_image gives, in pixels."""
    detector = detect.Detector(checkpoint, min_score=0.0)
    image = decode_pixels(open_record(records[0]), records[0])
    boxes_xyxy, scores, names = detector(image)
    expected = detect.detect_image(narrow(classes=CLASSES), image)
    np.testing.assert_allclose(boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-6)
    assert names == [CLASSES[label - 1] for label in expected.labels]
    array = np.asarray(image)
    same = [array, image.convert("RGBA"), np.dstack([array, np.full(array.shape[:2], 7, np.uint8)])]
    for one in detector(same):
        np.testing.assert_array_equal(one.boxes_xyxy, boxes_xyxy)
    grey = detector(np.asarray(image.convert("L")))
    np.testing.assert_array_equal(grey.scores, detector(image.convert("L")).scores)
    assert len(detector(image.convert("P")).scores) > 0
    nothing = detect.Detector(write_unsure(tmp_path / "unsure.pt"))(image)
    assert len(nothing.scores) == len(nothing.names) == 0
    for wrong in (array.astype(np.float32), np.zeros((3, 4, 5, 3), np.uint8), "photo.jpg",
                  np.zeros((4, 5, 2), np.uint8)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            detector(wrong)


def test_the_threshold_is_the_checkpoints_own(tmp_path):
    model = narrow(classes=CLASSES)
    path = write_checkpoint(tmp_path / "a.pt", model, results={"threshold": 0.42, "mAP": 0.5})
    assert detect.Detector(path).min_score == 0.42
    assert detect.Detector(path, min_score=0.0).min_score == 0
    assert detect.Detector(write_checkpoint(tmp_path / "b.pt", model)).min_score == 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}/none"], "{run}/none: no such picture or folder"),
        (["{run}"], "{run}: no picture there"),
        ([], "which picture"),
        (["{run}", "--min-score", "30"], "--min-score 30.0: expected 0 to 1"),
        (["{run}", "--min-score", "nan"], "--min-score nan: expected 0 to 1"),
        (["{jpg}", "--json", "{run}"], "{run}: a folder; expected"),
        (["{jpgs}", "--json", "{jpg}"], "{jpg}: would be overwritten"),
        (["{jpgs}", "--export", "{jpg}"], "{jpg}: would be overwritten"),
        (["--export", "{run}"], "{run}: a folder; expected"),
        (["--export", "{run}/net.foo"], "net.foo: expected a name that ends in .onnx or .pt2"),
        (["{jpg}", "--draw", ""], "--draw '': expected the name of a folder"),
        (["-", "--draw", ""], "--draw '': no name; expected the name of a file"),
        (["{jpg}", "--json", ""], "--json '': no name; expected the name of a file"),
        (["{jpg}", "--json", "{run}"], "--json {run}: a folder"),
        (["{jpg}", "--checkpoint", ""], "checkpoint '': no name; expected a file"),
        ([""], "PICTURE|FOLDER '': no name; expected a picture or a folder"),
        (["{jpg}", "--draw", "/proc"], "--draw /proc: nothing can be written there"),
        (["{jpg}", "--draw", "{jpgs}"], "--draw {jpgs}: the pictures are there"),
        (["{jpg}", "--checkpoint", "{run}/none.pt"], "none.pt: no such checkpoint"),
    ],
)
def test_bad_input(flags, message, checkpoint, records, tmp_path):
    jpg = records[0].path
    values = {"run": tmp_path, "jpg": jpg, "jpgs": jpg.parent}
    flags = [flag.format(**values) for flag in flags]
    if "--checkpoint" not in flags:
        flags += ["--checkpoint", checkpoint]
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
        detect.main(flags)
    assert message.format(**values) in str(error.value)


def test_originals_behind_links_are_not_drawn_upon(checkpoint, records, tmp_path, capsys):
    jpg = records[0].path
    whole = jpg.read_bytes()
    for folder in ("links", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jpg").symlink_to(jpg)
    loop = tmp_path / "links" / "loop.jpg"
    loop.symlink_to("loop.jpg")
    flags = [str(tmp_path / "links"), "--checkpoint", str(checkpoint), "--draw"]
    with pytest.raises(ValueError, match="links: the pictures are there and would be overwritten"):
        detect.main([*flags, str(tmp_path / "links")])
    with pytest.raises(ValueError, match=r"p.jpg there is a link; choose another"):
        detect.main([*flags, str(tmp_path / "out")])
    assert detect.main([*flags, str(tmp_path / "new")]) == 1
    assert "1 of 2 pictures cannot be read" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.jpg"]
    assert jpg.read_bytes() == whole


def test_every_drawn_picture_has_a_name_of_its_own():
    paths = ["a/x/1.jpg", "b/x/1.jpg", "c/x_1.jpg", "2.jpg", "2.heic", "d/2.heic.jpg"]
    paths += ["y/a.jpg", "z/a"]
    pictures = [Path("/") / path for path in paths]
    names = detect.names_to_draw(pictures)
    assert len(set(names.values())) == len(pictures)
    assert names[pictures[0]] == "x_1.jpg"
    assert names[pictures[3]] == "2.jpg"
    many = [Path(f"/{n}/1.jpg") for n in range(5000)]
    assert len(set(detect.names_to_draw(many + many).values())) == 5000


def test_files_that_are_no_pictures_by_their_suffix_are_said(tmp_path, capsys):
    for name in ("a.jpg", "b.heic", "c.tga", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in detect.find_pictures([str(tmp_path)])] == ["a.jpg"]
    assert "2 files left out, which are no pictures by their suffix: .heic .tga" in (
        capsys.readouterr().err
    )


def test_folders_inside_a_folder_are_said(tmp_path, capsys):
    for name in ("b", "c.jpg", ".git"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"no picture there .*; 2 folders inside left out: name"):
        detect.find_pictures([str(tmp_path)])
    (tmp_path / "a.jpg").touch()
    assert [p.name for p in detect.find_pictures([str(tmp_path)])] == ["a.jpg"]
    assert f"{tmp_path}: 2 folders inside left out: b c.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_the_first_of_several_frames_is_said(suffix, tmp_path, capsys):
    path = tmp_path / f"a.{suffix}"
    first, *rest = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    first.save(path, save_all=True, append_images=rest)
    assert np.asarray(pictures.open_picture(path))[10, 15].argmax() == 0
    assert f"{path}: only the first of 3 frames" in capsys.readouterr().err
    first.save(path)
    pictures.open_picture(path)
    assert capsys.readouterr().err == ""


def test_a_damaged_later_frame_does_not_hide_the_first(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.gif")

    def broken(_):
        raise SyntaxError("broken")

    monkeypatch.setattr(pictures.open_image(tmp_path / "a.gif").__class__, "n_frames",
                        property(broken))  # fmt: skip
    assert pictures.open_picture(tmp_path / "a.gif").size == (30, 20)


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_only_our_own_drawings_are_replaced(suffix, tmp_path):
    """In every format that is read: drawn twice without fuss; a file of the user's stays."""
    name = pictures.names_to_draw([Path(f"/x/a{suffix}")])[Path(f"/x/a{suffix}")]
    mine, image = tmp_path / "mine" / name, Image.new("RGB", (64, 48), "red")
    mine.parent.mkdir()
    image.save(mine)
    whole = mine.read_bytes()
    with pytest.raises(ValueError, match=f"--draw .*mine: {name} there was not drawn by this"):
        pictures.drawing_folder(mine.parent, [], [name])
    with pytest.raises(ValueError, match="not drawn by this program"):
        pictures.save_drawn(image, mine)
    assert mine.read_bytes() == whole
    for colour in ("red", "blue"):
        folder = pictures.drawing_folder(tmp_path / "drawn", [], [name])
        pictures.save_drawn(Image.new("RGB", (64, 48), colour), folder / name)
    assert np.asarray(Image.open(folder / name).convert("RGB"))[24, 32].argmax() == 2
    if suffix in (".jpg", ".png", ".tif", ".webp"):  # edited since then, it is the user's
        Image.open(folder / name).transpose(Image.Transpose.ROTATE_90).save(folder / name)
        with pytest.raises(ValueError, match="not drawn by this program"):
            pictures.drawing_folder(folder, [], [name])


def test_a_picture_of_the_users_is_refused_before_any_detection(
    checkpoint, records, tmp_path, monkeypatch
):
    mine = tmp_path / records[0].path.name
    mine.write_bytes(b"mine")
    flags = [str(records[0].path), "--checkpoint", checkpoint, "--draw", str(tmp_path)]
    monkeypatch.setattr(detect, "detect_image", None)
    with pytest.raises(ValueError, match=f"{mine.name} there was not drawn by this program"):
        detect.main(flags)
    assert mine.read_bytes() == b"mine"


def test_a_name_too_long_for_a_drawing_is_cut(tmp_path):
    image, names = Image.new("RGB", (9, 9)), [c + "\u00e9" * 140 + ".jpg" for c in "ab"]
    folder = pictures.drawing_folder(tmp_path, [], names)
    for name in (*names, *names):
        pictures.save_drawn(image, folder / name)
    assert len(list(tmp_path.glob("*.jpg"))) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_done_is_kept_when_the_work_ends_early(
    error, checkpoint, records, tmp_path, monkeypatch, capsys
):
    real, calls = detect.detect_image, []

    def some(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(detect, "detect_image", some)
    found, names = tmp_path / "found.json", [str(r.path) for r in records[:4]]
    with pytest.raises(error):
        detect.main([*names, "--checkpoint", checkpoint, "--json", str(found)])
    assert [row["image"] for row in json.loads(found.read_text())] == names[:2]
    assert f"the results of 2 pictures go to {found}" in capsys.readouterr().err
    whole, calls[:] = found.read_bytes(), [1, 1]
    with pytest.raises(error):  # at the first picture: an older file stays
        detect.main([*names, "--checkpoint", checkpoint, "--json", str(found)])
    assert found.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "mars"}, "device mars: expected cpu, cuda"),
        ({"device": "cuda:99"}, "device cuda:99: torch .* sees"),
        ({"min_score": 5}, "min-score 5: expected 0 to 1"),
    ],
)
def test_the_detector_blames_the_option_and_not_the_file(options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        detect.Detector(checkpoint, **options)


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5), (4, 0, 4)])
def test_an_empty_picture_is_refused(shape, checkpoint):
    detector = detect.Detector(checkpoint)
    with pytest.raises(ValueError, match=r"an array \(.*\): an empty picture; expected"):
        detector(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="an empty picture, 0x7; expected"):
        detector(Image.new("RGB", (0, 7)))


# ------------------------------------------------------------------------------ films


def jpeg(colour, size=(40, 30), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", **options)
    return file.getvalue()


def test_a_stream_of_jpegs_is_split_by_its_markers():
    """Whatever the reads bring; a preview in a header is no picture; what is between is skipped."""
    exif = Image.Exif()
    exif[0x010E] = "a preview: " + jpeg("red").decode("latin1")
    rng = np.random.default_rng(0)
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(noise, "JPEG")
    frames = [jpeg("red"), jpeg("green", exif=exif), jpeg("blue", progressive=True),
              noise.getvalue(), jpeg("white")]  # fmt: skip
    for between in (b"", b"\r\n--boundary\r\nContent-Type: image/jpeg\r\n\r\n", b"\xff"):
        whole = between.join([*frames, b""])
        for chunk in (1 << 20, 1000, 7):

            class Slow(io.BytesIO):
                def read1(self, size, chunk=chunk):
                    return self.read(min(size, chunk))

            assert list(split_jpegs(Slow(whole))) == frames
    assert list(split_jpegs(io.BytesIO(frames[0] + frames[3][:-20]))) == [
        frames[0],
        frames[3][:-20],
    ]
    assert list(split_jpegs(io.BytesIO(b"no picture at all"))) == []


def test_detects_in_a_film(checkpoint, records, tmp_path, monkeypatch, capsys):
    film = b"".join(r.path.read_bytes() for r in records[:2]) + records[2].path.read_bytes()[:-900]
    stdin = type("Stdin", (), {"buffer": io.BytesIO(film)})
    monkeypatch.setattr(detect.sys, "stdin", stdin)
    drawn = tmp_path / "out.mjpeg"
    assert detect.main(["-", "--checkpoint", checkpoint, "--draw", str(drawn)]) == 1
    said = capsys.readouterr()
    assert "2 frames, " in said.out
    assert "frame 2 cannot be decoded" in said.err
    assert len(list(split_jpegs(io.BytesIO(drawn.read_bytes())))) == 2
    monkeypatch.setattr(detect.sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(b"")}))
    whole = drawn.read_bytes()
    with pytest.raises(ValueError, match="no JPEG frame"):
        detect.main(["-", "--checkpoint", checkpoint, "--draw", str(drawn)])
    assert drawn.read_bytes() == whole  # no frame, no new film


# ------------------------------------------------------------------------------ elsewhere


def exportable(backbone="resnet18", **config) -> torch.nn.Module:
    """Random, but with boxes near their priors and scores of all sizes: NMS has much to do."""
    model = narrow(backbone=backbone, classes=CLASSES, **config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics become those of the next batch
        model.train()(torch.randn(4, 3, model.config.size, model.config.size, generator=rng) * 50)
        for loc in model.head.loc:
            loc[-1].weight.mul_(0.1)
    return model.eval()


def ours(model, pixels, dtype=torch.float32) -> list[np.ndarray]:
    config, network = model.config, copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        inputs = normalise(pixels, config.mean, config.std, config.channels).to(dtype)
        loc, logits = (x.float() for x in network(inputs))
    return [x.numpy() for x in scratchdet.detect(loc, logits, model.priors_cxcywh)]


def differences(got, wanted) -> int:
    """How many of `ours` are not among the (boxes, scores, labels), in whatever order: scores that
    are equal but for rounding may change places."""
    assert [x.shape for x in got] == [x.shape for x in wanted[:3]]
    missing = 0
    for boxes, scores, labels, boxes0, scores0, labels0, count in zip(*got, *wanted, strict=True):
        assert (scores[:-1] >= scores[1:]).all()
        assert (scores > 0).sum() == (labels > 0).sum()
        same = labels0[:count, None] == labels[None]
        same &= np.abs(scores0[:count, None] - scores[None]) < 1e-4
        same &= (np.abs(boxes0[:count, None] - boxes[None]) < 1e-3).all(axis=-1)
        missing += int((~same.any(axis=1)).sum() + abs((scores > 0).sum() - count))
    return missing


def test_the_exported_nms_is_ours(rng):
    """Chains of boxes of which each beats the next, equal scores, boxes that are not finite."""
    centre = torch.rand(6, 60, 1, generator=rng) * 3
    boxes = torch.cat([centre, centre * 0.1, centre + 1, centre * 0.1 + 1], dim=-1)
    scores = (torch.rand(6, 60, generator=rng) * 20).round().div(20).sort(descending=True).values
    keep = export.surviving(boxes, scores)
    for i in range(6):
        wanted = nms(boxes[i], scores[i], torch.zeros(60, dtype=torch.int64), export.IOU)
        assert keep[i].tolist() == (wanted & (scores[i] > export.SCORE)).tolist()
        assert 1 < wanted.sum() < 40


@pytest.mark.slow
def test_export_runs_without_this_code(tmp_path, capsys):
    """torch.export: boxes, scores and labels of any batch, and no file of ours imported."""
    model, exported = exportable(), tmp_path / "detector.pt2"
    checkpoint = write_checkpoint(tmp_path / "last.pt", model)
    detect.main(["--checkpoint", checkpoint, "--export", str(exported), "--device", "cpu"])
    assert "exported" in capsys.readouterr().out
    pixels = torch.rand(3, 3, 300, 300) * 255
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import sys, json, torch\n"
        "extra = {'classes.json': ''}\n"
        "net = torch.export.load('detector.pt2', extra_files=extra).module()\n"
        "pixels = torch.load('pixels.pt')\n"
        "with torch.no_grad(): answer = [net(pixels), net(pixels[:1])]\n"
        "torch.save((answer, json.loads(extra['classes.json'])), 'answer.pt')\n"
        "assert not {'scratchdet', 'ops', 'eval', 'data', 'plumbing'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    answers, names = torch.load(tmp_path / "answer.pt")
    assert names == ["background", *CLASSES]
    for got in answers:
        wanted = ours(model, pixels[: len(got[0])])
        assert wanted[3].min() == 200
        assert differences([x.numpy() for x in got], wanted) == 0


def test_onnx_names_the_packages_that_it_needs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="net.ONNX: ONNX needs more: pip install onnx onnxscript"):
        detect.main(["--checkpoint", checkpoint, "--export", str(tmp_path / "net.ONNX")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_equals_ours_on_50_pictures(tmp_path, capsys):
    """In onnxruntime, on drawn shapes: one node of NMS, batches of 1 and of 7."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    root = draw_shapes(tmp_path / "shapes", num_train=1, num_test=50)
    pixels = [np.asarray(Image.open(r.path).resize((300, 300)), np.float32).transpose(2, 0, 1)
              for r in read_voc(root, ["2007:test"], CLASSES)[0]]  # fmt: skip
    model, path = exportable(), tmp_path / "net.onnx"
    export.export(model, path)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("NonMaxSuppression") == 1
    session = onnxruntime.InferenceSession(path)
    names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert names == ["background", *CLASSES]
    different = total = 0
    for start in range(0, 50, 7):
        batch = np.stack(pixels[start : start + 7])
        wanted = ours(model, torch.from_numpy(batch))
        total += int(wanted[3].sum())
        different += differences(session.run(None, {"pixels": batch}), wanted)
    with capsys.disabled():
        print(f" [{different} of {total} detections differ]", end="")
    assert total > 5000
    assert different <= total // 200  # rounding may decide an IoU the other way


ONE_OF_EACH_KIND = ["root-resnet18", "vgg16", "root-resnet50", "root-resnet18-preact"]
ONE_OF_EACH_KIND += ["root-resnet34-caffe-compat", "dsod300"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ONE_OF_EACH_KIND)
def test_every_kind_of_network_becomes_onnx(backbone, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    own = {"scratchdet512": (512, "coco512"), "ssd321": (321, "voc")}
    size, priors = own.get(backbone, (300, "voc"))
    model = exportable(backbone, width=0.01, size=size, priors=priors)
    path = tmp_path / "net.onnx"
    export.export(model, path)
    pixels = torch.rand(2, 3, size, size) * 255
    wanted = ours(model, pixels)
    got = onnxruntime.InferenceSession(path).run(None, {"pixels": pixels.numpy()})
    assert wanted[3].min() == 200
    # Random deep networks enlarge what is rounded. How much, float64 shows.
    rounding = differences(ours(model, pixels, torch.float64)[:3], wanted)
    assert differences(got, wanted) <= max(8, 2 * rounding)


@pytest.mark.parametrize("own", [None, "ACTIVE"])
@pytest.mark.parametrize("program", ["detect", "train"])
def test_idle_threads_sleep(program, own):
    """libgomp reads the policy when torch is loaded: it has to stand by then. The user's stays."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
import {program}
"""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": own} if own else {}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert run.stdout.split()[0] == (own or "PASSIVE")
