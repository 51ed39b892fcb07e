"""From records to batches: the SSD augmentation against slow, plain versions of itself."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    batches,
    crop,
    expand,
    flip,
    ordered_batches,
    place_boxes,
    prepare,
    render,
    snap,
)
from ops.reference import jitter_colour
from plumbing import cache as image_cache
from plumbing import machine, shapes
from plumbing.files import BadData, Record, decode_pixels, open_record
from plumbing.shapes import SHAPE_CLASSES, draw_image, draw_shapes, outline
from plumbing.voc import read_voc

CONFIG = SimpleNamespace(mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0), channels="rgb")
WHOLE = [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("shapes"), num_train=14, num_test=3)


@pytest.fixture(scope="session")
def records(shapes_root):
    return read_voc(shapes_root, ["2007:train"], SHAPE_CLASSES)[0]


def record_of(path, boxes, size=None, labels=None, difficult=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    labels = np.ones(len(boxes), np.int64) if labels is None else np.array(labels)
    difficult = np.zeros(len(boxes), bool) if difficult is None else np.array(difficult)
    size = size or Image.open(path).size
    return Record(Path(path).stem, Path(path), size, boxes, labels, difficult, np.zeros(0))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- geometry


def plain_crop(boxes, rng):
    """SSD's samplers one by one, one trial after the other, as the paper's code is described."""

    def trial():
        scale, aspect = rng.uniform(0.3, 1), rng.uniform(0.5, 2)
        aspect = max(aspect, scale**2)
        aspect = min(aspect, 1 / scale**2)
        w, h = min(scale * aspect**0.5, 1), min(scale / aspect**0.5, 1)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        return [x, y, x + w, y + h]

    def iou(a, b):
        wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        both = max(wide, 0) * max(tall, 0)
        return both / sum([(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)], -both)

    yielded = [WHOLE]  # by sampler 0
    for min_iou in (0.1, 0.3, 0.5, 0.7, 0.9, 0.0):  # the last one asks for nothing but an object
        for _ in range(50):
            rectangle = trial()
            if any(iou(rectangle, box) >= min_iou for box in boxes):
                yielded.append(rectangle)
                break
    return yielded[rng.integers(len(yielded))]


def largest_gap(a, b):
    """Kolmogorov-Smirnov: between the shares of two samples that lie below any value."""
    values = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(
    "boxes",
    [
        [[0.1, 0.2, 0.9, 0.8]],
        pytest.param(
            [[0.4, 0.4, 0.6, 0.7], [0.05, 0.1, 0.3, 0.2], [0.55, 0.5, 0.95, 1.0]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_crop_is_distributed_like_the_plain_samplers(boxes):
    """20,000 crops of ours, 2,500 plain ones; a number fails by chance 7 times in a million."""
    boxes, rng = np.array(boxes), np.random.default_rng(1)
    both = [np.array([crop(boxes, rng) for _ in range(20_000)])]
    both += [np.array([plain_crop(boxes.tolist(), rng) for _ in range(2_500)])]
    measured = []
    for crops in both:
        whole = (crops == WHOLE).all(axis=1)
        sides = crops[~whole, 2:] - crops[~whole, :2]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (centres >= crops[:, None, :2]) & (centres <= crops[:, None, 2:])  # (K, G, 2)
        measured.append(
            {
                "whole": whole.astype(float),
                "kept boxes": inside.all(axis=2).sum(axis=1),
                "width": sides[:, 0].round(9),  # so that a full side is 1 in both
                "aspect": np.log(sides[:, 0] / sides[:, 1]),
                "left": crops[~whole, 0].round(9),
                "bottom": crops[~whole, 3].round(9),
                "a full side": (sides.max(axis=1) > 1 - 1e-9).astype(float),
            }
        )
    for name in measured[0]:
        ours, plain = measured[0][name], measured[1][name]
        chance = 2.5 * (1 / len(ours) + 1 / len(plain)) ** 0.5
        assert largest_gap(ours, plain) < chance, name
    assert measured[0]["a full side"].mean() > 0.1  # .001 where the aspect is not clamped


def test_crop_keeps_the_whole_as_often_as_the_samplers_that_succeed_say():
    rng = np.random.default_rng(2)

    def kept(boxes, draws=2000):
        return np.mean([(crop(np.array(boxes), rng) == WHOLE).all() for _ in range(draws)])

    assert kept(np.zeros((0, 4)), 50) == 1.0  # without a box no sampler succeeds
    assert kept([[0.5, 0.5, 0.502, 0.502]]) == pytest.approx(1 / 2, abs=0.04)  # only "any crop"
    assert kept([WHOLE]) == pytest.approx(1 / 7, abs=0.03)  # all of them


def test_crops_have_their_sizes_and_overlap_as_the_chosen_sampler_asks():
    rng, box = np.random.default_rng(3), np.array([[0.3, 0.3, 0.7, 0.6]])
    crops = np.array([crop(box, rng) for _ in range(1000)])
    assert crops.min() >= 0
    assert crops.max() <= 1
    sides = crops[:, 2:] - crops[:, :2]
    assert (sides.prod(axis=1) >= 0.3**2 - 1e-9).all()  # scale**2
    ratio = sides[:, 0] / sides[:, 1]
    assert ratio.min() > 0.5 - 1e-9
    assert ratio.max() < 2 + 1e-9
    corner = np.maximum(crops[:, :2], box[:, :2])
    inter = (np.minimum(crops[:, 2:], box[:, 2:]) - corner).clip(0).prod(1)
    iou = inter / (sides.prod(1) + 0.12 - inter)
    # The whole (IoU .12), any crop, and the samplers for .1, .3, .5 succeed: a fifth each, nearly.
    assert np.mean(iou < 0.1) < 0.08  # only "any crop"; the other samplers see to it
    assert np.mean(iou >= 0.3) > 0.36
    assert np.mean(iou >= 0.5) > 0.14


def test_expand_half_the_time_up_to_four_times():
    rng = np.random.default_rng(4)
    rectangles = np.array([expand(rng) for _ in range(4000)])
    same_size = (rectangles == WHOLE).all(axis=1)
    assert same_size.mean() == pytest.approx(0.5, abs=0.03)
    grown = rectangles[~same_size]
    ratio = grown[:, 2] - grown[:, 0]
    assert np.allclose(ratio, grown[:, 3] - grown[:, 1])
    assert ratio.min() >= 1
    assert ratio.max() <= 4
    assert ratio.mean() == pytest.approx(2.5, abs=0.1)
    assert (grown[:, :2] <= 0).all()  # the image lies in the canvas
    assert (grown[:, 2:] >= 1).all()


def test_place_boxes_keeps_boxes_by_their_centre_and_clips_them():
    boxes = np.array([
        [0.4, 0.4, 0.6, 0.6],  # inside
        [0.0, 0.4, 0.5, 0.6],  # centre on the left border of the crop: inclusive
        [0.0, 0.4, 0.4, 0.6],  # centre outside, though it reaches in
        [0.5, 0.5, 0.5, 0.6],  # no area
    ])  # fmt: skip
    placed, keep = place_boxes(boxes, np.array([0.25, 0.25, 0.75, 0.75]))
    assert keep.tolist() == [True, True, False, False]
    assert np.allclose(placed[keep], [[0.3, 0.3, 0.7, 0.7], [0.0, 0.3, 0.5, 0.7]])
    assert not place_boxes(boxes, np.array([0.8, 0.8, 1.0, 1.0]))[1].any()
    assert np.allclose(flip(placed[keep]), [[0.3, 0.3, 0.7, 0.7], [0.5, 0.3, 1.0, 0.7]])


@pytest.mark.parametrize("kind", ["png", "jpg", "cache"])
def test_boxes_stay_on_their_pixels(tmp_path, kind):
    """A red rectangle on blue is found again where its box says, to a pixel, after any geometry."""
    image = Image.new("RGB", (701, 523), (0, 0, 255))
    image.paste((255, 0, 0), (220, 130, 500, 411))
    path = tmp_path / f"a.{'jpg' if kind == 'jpg' else 'png'}"
    image.save(path, **({"quality": 98, "subsampling": 0} if kind == "jpg" else {}))
    record = record_of(path, [[220, 130, 500, 411]])
    cache = tmp_path / "cache" if kind == "cache" else None
    stream = batches([record], 300, batch_size=60, seed=5, cache=cache)
    batch, found = next(stream), 0
    for n in range(60):
        image = batch.images[n].permute(1, 2, 0).numpy().astype(int)
        x0, y0, x1, y1 = batch.inside[n].tolist()
        blue_or_red = (image.sum(axis=2) > 100).nonzero()
        if len(blue_or_red[0]):  # `inside` is what the image covers
            assert (blue_or_red[1].min(), blue_or_red[1].max() + 1) == (x0, x1)
            assert (blue_or_red[0].min(), blue_or_red[0].max() + 1) == (y0, y1)
        for box in batch.boxes_xyxy[batch.offsets[n] : batch.offsets[n + 1]].numpy() * 300:
            ys, xs = (image[:, :, 0] > 127).nonzero()
            edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(edges - box).max() < 1.01, (n, edges, box)
            found += 1
    assert found > 40
    inside = batch.inside
    assert ((inside[:, 2] - inside[:, 0]) < 150).any()  # some were expanded a lot: draft was used


def test_a_source_beside_the_image_shows_nothing_and_decodes_nothing(tmp_path):
    record = record_of(tmp_path / "missing.png", [], size=(10, 10))
    source, part, inside, factor = snap(np.array([1.5, 0.0, 2.0, 0.5]), record.size, 30)
    assert inside == [0, 0, 0, 0]
    assert source.tolist() == [1.5, 0.0, 2.0, 0.5]
    assert not render(record, part, inside, factor, 30).any()


def test_snap_rounds_to_the_nearest_pixels():
    rng = np.random.default_rng(10)
    for _ in range(500):
        size = tuple(rng.integers(40, 900, 2).tolist())
        corner = rng.uniform(-1, 0.7, 2)
        source = np.concatenate([corner, corner + rng.uniform(0.3, 2, 2)])
        if (source[2:] < 0.1).any():
            continue  # hardly any of the image
        moved, part, inside, factor = snap(source, size, 300)
        assert (np.array(part) % factor == 0).all()
        for a in (0, 1):
            unit = (source[a + 2] - source[a]) * size[a] / 300
            low, high = source[a] * size[a], source[a + 2] * size[a]  # in pixels of the image
            assert 0 <= part[a] == pytest.approx(max(0, low), abs=factor / 2)
            assert size[a] >= part[a + 2] == pytest.approx(min(high, size[a]), abs=factor)
            assert 0 <= inside[a] == pytest.approx(max(0, -low / unit), abs=0.5)
            end = (min(high, size[a]) - low) / unit
            assert 300 >= inside[a + 2] == pytest.approx(end, abs=0.5 + (factor - 1) / unit)
            scale = (moved[a + 2] - moved[a]) * size[a] / 300  # the same map for both ends
            for k in (a, a + 2):
                assert part[k] == pytest.approx(moved[a] * size[a] + inside[k] * scale, abs=1e-6)
    whole = snap(np.array(WHOLE), (1280, 962), 300)
    assert whole[0].tolist() == WHOLE  # a whole image stays whole
    assert whole[1:] == ([0, 0, 1280, 962], [0, 0, 300, 300], 2)


# ---- colour


def test_colour_parameters_are_drawn_as_often_and_as_far_as_specified():
    rng = np.random.default_rng(9)
    c = np.array([data.sample_colour(rng) for _ in range(4000)])
    nothing = np.array([0, 0, 1, 1, 0])
    assert np.allclose((c != nothing).mean(axis=0), 0.5, atol=0.035)
    assert np.allclose(c.max(axis=0), [1, 32, 1.5, 1.5, 18], rtol=0.01)
    assert np.allclose(c[:, 1:].min(axis=0), [-32, 0.5, 0.5, -18], rtol=0.02)


def test_prepare_fills_with_the_mean_and_orders_the_channels(records):
    batch = next(batches(records, 64, batch_size=14, seed=1))
    x = prepare(batch, CONFIG)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    for n, (x0, y0, x1, y1) in enumerate(batch.inside.tolist()):
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert (x[n, :, outside] == 0).all()  # the mean, less the mean
        pixels = jitter_colour(batch.images[n : n + 1].float(), batch.colour[n : n + 1])[0]
        want = pixels - torch.tensor(CONFIG.mean)[:, None, None]
        assert torch.equal(x[n, :, ~outside], want[:, ~outside])
    scaled = SimpleNamespace(mean=CONFIG.mean, std=(58.0, 57.0, 50.0), channels="bgr")
    bgr = prepare(batch, scaled)
    assert torch.allclose(bgr[:, 0] * 50, x[:, 2], atol=1e-4)
    assert torch.allclose(bgr[:, 2] * 58, x[:, 0], atol=1e-4)


@pytest.mark.cuda
def test_prepare_on_the_gpu_equals_the_cpu(records):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    batch = next(batches(records, 96, batch_size=14, seed=1))
    there = prepare(data.to_device(batch, "cuda"), CONFIG)
    here = prepare(batch, CONFIG)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert (there.cpu() - here).abs().max() <= 1  # a half may round the other way
    assert ((there.cpu() - here) != 0).float().mean() < 1e-3


# ---- the stream


def test_the_stream_is_the_same_for_any_workers_and_from_any_step(records):
    settings = {"batch_size": 4, "seed": 3}
    alone = list(islice(batches(records, 64, **settings), 8))
    for workers in (1, 2):
        again = islice(batches(records, 64, **settings, workers=workers), 8)
        assert all(same(a, b) for a, b in zip(alone, again, strict=True))
    resumed = islice(batches(records, 64, **settings, start_step=5, workers=1), 3)
    assert all(same(a, b) for a, b in zip(alone[5:], resumed, strict=True))
    other = next(batches(records, 64, batch_size=4, seed=4))
    assert not torch.equal(other.indices, alone[0].indices)


def test_epochs_are_permutations_and_batches_straddle_them(records):
    stream = batches(records, 32, batch_size=4, seed=0, augment="none")
    indices = torch.cat([next(stream).indices for _ in range(7)]).tolist()  # 28 = 2 epochs of 14
    assert sorted(indices[:14]) == sorted(indices[14:]) == list(range(14))
    assert indices[:14] != indices[14:]


def test_augmentation_differs_from_epoch_to_epoch(records):
    two = next(batches(records[:1], 64, batch_size=8, seed=0))
    assert len({tuple(row.tolist()) for row in two.colour}) > 4


@pytest.mark.parametrize(
    ("augment", "shrinks", "crops", "colours"),
    [("ssd", True, True, True), ("crop", False, True, True), ("flip", False, False, False)],
)
def test_strengths_of_augmentation(records, augment, shrinks, crops, colours):
    """What 40 samples show: the space beside the image, boxes cut off by a crop, colours."""
    dataset = data.Dataset(records[:2], augment=augment)
    plain = data.Dataset(records[:2], augment="none")
    samples = [dataset[epoch, i, 64] for i in (0, 1) for epoch in range(40)]
    assert any(inside != [0, 0, 64, 64] for _, inside, *_ in samples) == shrinks
    widest = [max(np.diff(plain[0, i, 64][3][:, ::2])) for i in (0, 1)]
    wider = [(np.diff(boxes[:, ::2]) > widest[i] + 0.05).any() for *_, boxes, _, i in samples]
    assert any(wider) == crops
    assert any(colour != data.NEUTRAL for _, _, colour, *_ in samples) == colours
    assert len({boxes.tobytes() for *_, boxes, _, i in samples if i == 0}) > 1


def test_half_of_the_images_stay_whole_without_expand():
    """Ours, not SSD's: one of two, and of the others those whose sampler keeps the whole."""
    boxes, rng = np.array([[0.3, 0.3, 0.7, 0.7]]), np.random.default_rng(0)
    sources = np.array([data.sample_source(boxes, rng, zoom_out=False) for _ in range(2000)])
    whole = (sources == data.WHOLE).all(axis=1)
    assert whole.mean() == pytest.approx(1 / 2 + 1 / 2 / 7, abs=0.04)
    assert sources.min() >= 0
    assert sources.max() <= 1


def test_ranks_share_the_stream_of_one_process(records):
    whole = list(islice(batches(records, 64, batch_size=4, seed=3), 4))
    for rank in (0, 1):
        part = islice(batches(records, 64, batch_size=4, seed=3, rank=rank, world=2), 2)
        assert all(same(a, b) for a, b in zip(whole[rank::2], part, strict=True))


def test_ordered_batches_end_short_and_are_plain(records, tmp_path):
    found = list(ordered_batches(records, 64, batch_size=4))
    assert [len(batch.images) for batch in found] == [4, 4, 4, 2]
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(14))
    batch = found[0]
    assert (batch.inside == torch.tensor([0, 0, 64, 64])).all()
    with Image.open(records[0].path) as image:
        factor = snap(np.array(WHOLE), image.size, 64)[3]
        image.draft(None, (image.width // factor, image.height // factor))
        want = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(batch.images[0].permute(1, 2, 0).numpy() - want.astype(int)).max() <= 1
    size = np.array(records[0].size * 2)
    rows = batch.boxes_xyxy[: batch.offsets[1]].numpy()
    assert np.allclose(rows * size, records[0].boxes_xyxy, atol=1e-3)
    again = list(ordered_batches(records, 64, batch_size=4, workers=1))
    assert all(same(a, b) for a, b in zip(found, again, strict=True))


def test_difficult_boxes_are_left_out_when_asked(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    record = record_of(
        tmp_path / "a.png", [[1, 1, 9, 9], [9, 9, 30, 30]], labels=[1, 2], difficult=[True, False]
    )
    keep = {"batch_size": 1, "seed": 0, "augment": "none"}
    assert next(batches([record], 32, **keep)).labels.tolist() == [1, 2]
    assert next(batches([record], 32, **keep, keep_difficult=False)).labels.tolist() == [2]


def test_images_without_boxes_and_with_5000(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 30, (5000, 2))
    many = np.concatenate([corner, corner + rng.uniform(1, 9, (5000, 2))], axis=1)
    for boxes, most in (([], 0), (many, 5000)):
        record = record_of(tmp_path / "a.png", boxes)
        batch = next(batches([record], 32, batch_size=6, seed=0))
        assert batch.boxes_xyxy.shape == (len(batch.labels), 4)
        assert batch.offsets[-1] == len(batch.labels) <= 6 * most
        assert batch.boxes_xyxy.isfinite().all()
        assert (batch.boxes_xyxy[:, 2:] > batch.boxes_xyxy[:, :2]).all()


def test_loading_leaves_the_global_generator_alone(records):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(batches(records, 32, batch_size=2, seed=0, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_to_the_group_does_not_reach_the_workers(records):
    """`timeout` sends SIGTERM to all of it; the main process then has a step to finish."""
    stream = batches(records, 32, batch_size=2, seed=0, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    assert os.getpgid(worker.pid) != os.getpgrp()
    stream.close()
    assert not multiprocessing.active_children()


def test_a_bad_image_reaches_the_main_process_in_one_line(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    record = record_of(tmp_path / "a.jpg", [[1, 1, 5, 5]], size=(10, 10))
    for workers in (0, 1):
        with pytest.raises(BadData, match="a.jpg: not an image that can be read") as caught:
            next(batches([record], 32, batch_size=2, seed=0, workers=workers))
        assert "\n" not in str(caught.value)


def test_a_killed_worker_is_a_clear_error(records):
    stream = batches(records, 32, batch_size=2, seed=0, workers=1)
    before = set(multiprocessing.active_children())
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="data worker died.*fewer --workers"):
        for _ in stream:
            pass


def test_arguments_are_checked(records):
    with pytest.raises(ValueError, match="expected one of ssd, crop, flip, none"):
        batches(records, 32, batch_size=2, seed=0, augment="all")
    with pytest.raises(ValueError, match="no images"):
        batches([], 32, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        batches(records, 32, batch_size=2, seed=0, rank=2, world=2)


# ---- the cache


def test_the_cache_gives_the_same_pixels_and_is_rebuilt_when_images_change(tmp_path, capsys):
    rng = np.random.default_rng(1)
    records = []
    for i in range(3):
        path = tmp_path / f"{i}.bmp"
        noise = rng.integers(0, 256, (90 + i, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        records.append(record_of(path, [[10, 10, 60, 60]]))
    settings = {"batch_size": 30, "seed": 0}
    plain = next(batches(records, 48, **settings))
    cached = next(batches(records, 48, **settings, cache=tmp_path / "cache"))
    assert same(plain, cached)  # these are BMP; a JPEG may be decoded at a fraction without it
    assert "decoding 3 images" in capsys.readouterr().err
    two = next(batches(records, 48, **settings, cache=tmp_path / "cache", workers=1))
    assert same(plain, two)
    assert "decoding" not in capsys.readouterr().err  # found, not built again

    Image.new("RGB", (120, 90), (255, 0, 0)).save(tmp_path / "0.bmp")  # as many bytes
    changed = next(batches(records, 48, **settings, cache=tmp_path / "cache"))
    assert "decoding" in capsys.readouterr().err
    assert same(changed, next(batches(records, 48, **settings)))
    assert not torch.equal(changed.images, plain.images)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1


def test_a_name_that_is_no_utf8_has_a_cache(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bmp")
    Image.new("RGB", (20, 10), (255, 0, 0)).save(path)
    record = record_of(Path(path), [[1, 1, 5, 5]], size=(20, 10))
    assert image_cache.build_cache([record], tmp_path / "cache").exists()


def test_a_truncated_cache_is_rebuilt(tmp_path, records):
    path = image_cache.build_cache(records, tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:1000])
    assert image_cache.build_cache(records, tmp_path).read_bytes() == good


def test_a_cache_that_does_not_fit_says_so_before_it_starts(tmp_path, records, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: (1 << 40, 0, 10))
    with pytest.raises(
        ValueError, match=r"--cache .* GB needed for 14 decoded images, 0.0 GB free"
    ):
        image_cache.build_cache(records, tmp_path)


def test_what_a_killed_build_left_is_space_for_the_next(tmp_path, records, monkeypatch):
    path = image_cache.build_cache(records, tmp_path)
    size = path.stat().st_size
    path.rename(path.with_suffix(".part"))

    def almost_full(folder):
        left = sum(p.stat().st_size for p in Path(folder).glob("*.part"))
        return (1 << 40, 0, size + (65 << 20) - left)

    monkeypatch.setattr(machine.shutil, "disk_usage", almost_full)
    assert image_cache.build_cache(records, tmp_path) == path


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, records, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "fsync", full)
    with pytest.raises(ValueError, match=r"--cache .*No space left.*name another folder"):
        image_cache.build_cache(records, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_a_cache_in_a_folder_that_cannot_be_written_is_read(tmp_path, records, monkeypatch):
    path = image_cache.build_cache(records, tmp_path)

    def refuse(lock):
        raise PermissionError(13, "Permission denied", str(lock))

    monkeypatch.setattr(image_cache, "file_lock", refuse)  # root may write anywhere
    assert image_cache.build_cache(records, tmp_path) == path


def build(records, folder, queue):
    queue.put(image_cache.build_cache(records, folder))


def test_processes_that_build_at_once_end_with_one_good_cache(tmp_path, records):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [context.Process(target=build, args=(records, tmp_path, queue)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert len({queue.get(timeout=60) for _ in jobs}) == 1
    for job in jobs:
        job.join()
    pixels = image_cache.memory_map(image_cache.build_cache(records, tmp_path))
    w, h = records[0].size
    image = decode_pixels(open_record(records[0]), records[0])
    assert (pixels[: w * h * 3].reshape(h, w, 3) == np.asarray(image)).all()
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".bin", ".lock"]


# ---- shapes


def test_shapes_are_as_specified():
    drawn = [draw_image(np.random.default_rng((1, i))) for i in range(150)]
    counts = np.array([len(boxes) for _, boxes, _ in drawn])
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    boxes = np.concatenate([boxes for _, boxes, _ in drawn])
    side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert side.min() >= 20
    assert side.max() <= 220
    position = np.sort(np.log(side / 20) / np.log(11))  # uniform in 0..1 if log-uniform
    gap = np.abs(position - (np.arange(len(side)) + 0.5) / len(side)).max()
    assert gap < 1.63 / len(side) ** 0.5  # Kolmogorov-Smirnov at 1 %
    overlapping = 0
    for image, boxes, labels in drawn:
        assert boxes.min() >= 0
        assert (boxes[:, 2:] <= image.size).all()
        assert set(labels) <= set(range(1, 7))
        corner = np.maximum(boxes[:, None, :2], boxes[:, :2])
        inter = (np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - corner).clip(0).prod(2)
        overlapping += (np.tril(inter, -1) > 0).any(axis=1).sum()
        area = np.diag(inter)
        assert (np.triu(inter, 1).sum(axis=1) <= 0.5 * area + 1e-9).all()  # half stays uncovered
    assert overlapping / len(position) == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("shape", SHAPE_CLASSES)
def test_outlines_fill_their_box(shape):
    points = outline(shape)
    assert np.allclose(points.min(axis=0), 0)
    assert np.allclose(points.max(axis=0), 1)


def test_one_rank_draws_and_the_others_wait(tmp_path, monkeypatch):
    drawn, draw_set = [], shapes.draw_set

    def slowly(*args):
        drawn.append(args[1])
        time.sleep(0.2)
        draw_set(*args)

    monkeypatch.setattr(shapes, "draw_set", slowly)
    with ThreadPoolExecutor(3) as ranks:
        made = [ranks.submit(draw_shapes, tmp_path, num_train=2, num_test=1) for _ in range(3)]
    assert len({future.result() for future in made}) == 1
    assert drawn == ["train", "test"]


def test_the_rank_that_is_seen_lets_the_others_wait(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with image_cache.file_lock(tmp_path / "lock"):
            pass
    assert waited[0] == 0 < waited[1]


def test_shapes_are_drawn_once_and_the_same_for_a_seed(tmp_path, shapes_root, capsys):
    again = draw_shapes(tmp_path, num_train=14, num_test=3)
    assert "drawing" in capsys.readouterr().err
    for path in shapes_root.rglob("*.*"):
        assert (again / path.relative_to(shapes_root)).read_bytes() == path.read_bytes()
    assert draw_shapes(tmp_path, num_train=14, num_test=3) == again
    assert "drawing" not in capsys.readouterr().err
    train, classes = read_voc(again, ["2007:train"])
    test, _ = read_voc(again, ["2007:test"], classes)
    assert classes == list(SHAPE_CLASSES)
    assert (len(train), len(test)) == (14, 3)
    assert train[0].path.read_bytes() != test[0].path.read_bytes()
