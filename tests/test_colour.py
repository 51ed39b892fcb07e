"""ops.colour against the reference, and the reference against plain.py."""

import numpy as np
import plain
import pytest
import torch
from harness.op_table import (
    check_equal,
    colour_case,
    random_int,
)

import ops
from ops import reference

INF, NAN = float("inf"), float("nan")


# ------------------------------------------------------------------------------- colour

NEUTRAL = [0.0, 0.0, 1.0, 1.0, 0.0]
NOTHING = [0.0] * 3, [1.0] * 3  # a mean and a std that leave the pixels as they are


def colours(n, rng):
    """Jitters (N,5) as training samples them: each step on half the time."""
    drawn = torch.rand(n, 5, generator=rng) * 2 - 1
    drawn = torch.tensor(NEUTRAL) + drawn * torch.tensor([0, 32, 0.5, 0.5, 18])
    drawn[:, 0] = 1
    return torch.where(torch.rand(n, 5, generator=rng) < 0.5, drawn, torch.tensor(NEUTRAL))


def whole(images):
    n, _, height, width = images.shape
    return torch.tensor([[0, 0, width, height]] * n)


def test_colour_reference_is_plain(rng):
    """Pixel by pixel with the standard library's HSV, which works in float64: where a half rounds
    the other way, one grey level apart."""
    pixels = torch.randint(0, 256, (60, 3), generator=rng)
    pixels[:4] = torch.tensor([[0, 0, 0], [255, 255, 255], [7, 7, 7], [200, 10, 10]])
    images = pixels.T.reshape(1, 3, 6, 10).float()
    for jitter in colours(40, rng):
        got = reference.jitter_colour(images, jitter[None])[0].flatten(1).T
        want = [plain.jitter_colour(p, *jitter.tolist()) for p in pixels.tolist()]
        apart = (got - torch.tensor(want)).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01


def test_colour_against_opencv(rng):
    cv2 = pytest.importorskip("cv2", reason="opencv-python is not installed")
    image = torch.randint(0, 256, (40, 40, 3), generator=rng, dtype=torch.uint8)
    for saturation, hue in ((0.6, 0.0), (1.4, 0.0), (1.0, 12.0), (1.0, -15.0)):
        hsv = cv2.cvtColor(image.numpy(), cv2.COLOR_RGB2HSV).astype(np.float64)
        hsv[..., 1] *= saturation
        hsv[..., 0] += hue
        want = cv2.cvtColor(hsv.round().clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
        x = image.permute(2, 0, 1)[None].float()
        jitter = torch.tensor([[0.0, 0.0, 1.0, saturation, hue]])
        got = reference.jitter_colour(x, jitter)[0].permute(1, 2, 0)
        apart = np.abs(got.numpy() - want)
        assert np.median(apart) <= 1
        assert np.percentile(apart, 99) <= 6  # OpenCV rounds hue to 2 degrees, S to 1/255


@pytest.mark.parametrize("cases", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_colour_random_cases(device, rng, cases):
    for i in range(cases):
        check_equal("colour", colour_case(rng, i % 4, random_int(0, 700, rng)), device)


@pytest.mark.parametrize("size", [300, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_colour_full_size(device, rng, size, dtype):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=rng)
    inside = torch.tensor([[0, 0, size, size], [10, 0, 11, size], [0, 200, 250, 203]])
    case = images, inside, colours(3, rng), [123.0, 117.0, 104.0], [58.0, 57.0, 50.0], "bgr", dtype
    check_equal("colour", case, device)


def test_colour_alone_and_in_a_batch(device, rng):
    images = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=rng)
    jitter = torch.cat([colours(5, rng), torch.tensor([NEUTRAL])]).to(device)
    arguments = images.to(device), whole(images).to(device), jitter
    together = ops.colour(*arguments, *NOTHING)
    for n in range(6):
        alone = ops.colour(*[x[n : n + 1] for x in arguments], *NOTHING)
        assert torch.equal(together[n : n + 1], alone)
    assert torch.equal(together[5].cpu(), images[5].float())  # nothing changes nothing
    assert torch.equal(together, together.round().clamp(0, 255))


def test_colour_by_hand(device):
    """Two pixels of which one is inside: + 10, x 1.5 and to the nearest even; mean, std, order."""
    images = torch.tensor([[10, 99], [200, 99], [33, 99]], dtype=torch.uint8)[None, :, None]
    jitter = torch.tensor([[0.0, 10.0, 1.5, 1.0, 0.0]])  # 30, 255 (of 315), 64 (of 64.5)
    arguments = images.to(device), torch.tensor([[0, 0, 1, 1]]).to(device), jitter.to(device)
    x = ops.colour(*arguments, (10, 5, 4), (2, 5, 10))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, :, 0].tolist() == [[10, 0], [50, 0], [6, 0]]
    assert ops.colour(*arguments, (10, 5, 4), (2, 5, 10), "bgr")[0, :, 0, 0].tolist() == [6, 50, 10]
    last = jitter.clone()
    last[0, 0] = 1  # contrast last: the same here, for nothing lies between
    assert torch.equal(ops.colour(*arguments[:2], last.to(device), (10, 5, 4), (2, 5, 10)), x)
    # Between them: full saturation of (20, 210, 43), then contrast; and the other way round.
    jitter[0, 3], last[0, 3] = 9.0, 9.0
    first = ops.colour(*arguments[:2], jitter.to(device), *NOTHING)[0, :, 0, 0]
    assert first.tolist() == [0, 255, 39]  # (30, 255, 64): all less 30 / 255 of what lacks to 255
    after = ops.colour(*arguments[:2], last.to(device), *NOTHING)[0, :, 0, 0]
    assert after.tolist() == [0, 255, 38]  # (20, 210, 43) -> (0, 210, 25) -> 37.5


def test_normalise_of_float_images(rng):
    """What detect_image and the exported network use: no rounding to whole numbers."""
    x = torch.rand(2, 3, 5, 7, generator=rng) * 255
    mean, std = [123.0, 117.0, 104.0], [58.0, 57.0, 50.0]
    got = reference.normalise(x, mean, std, "bgr")
    for c in range(3):
        assert torch.equal(got[:, 2 - c], (x[:, c] - mean[c]) / std[c])
