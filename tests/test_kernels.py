"""The CUDA kernels and every rung of the ladder, emulated on CPU threads, against the reference.

The .cu files are compiled unchanged by g++ (ops/emulate.h). The slow tier adds ThreadSanitizer,
AddressSanitizer and UBSan, and blocks as large as on a GPU. What only a GPU can show is marked
`cuda`; test_ops.py runs there as well, on both devices.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_colour
import test_ops
import torch
from harness import op_table
from harness.op_table import OPS, as_list, same_bits

import ops
from ops import ladder, reference

ROOT = Path(__file__).resolve().parents[1]
FUZZ = "tests/harness/fuzz_ops.py"
BARRIER = "__syncthreads();"


@pytest.fixture(scope="module")
def kernels():
    """{name: op}: the rungs and the final kernels, emulated."""
    return build_or_skip(lambda: ladder.load("emulate", ["-O1"], final=True))


def build_or_skip(build):
    try:
        return build()
    except ops.BuildError as error:
        if ops.MODE == "require":
            raise
        pytest.skip(f"the emulated kernels do not build here: {error}")


@pytest.fixture
def emulated(kernels, monkeypatch):
    """ops.match and the others are the emulated kernels during this test."""

    def with_defaults(kernel, like):
        def call(*args, **kwargs):
            bound = inspect.signature(like).bind(*args, **kwargs)
            bound.apply_defaults()
            return kernel(*bound.args)

        return call

    for name in ops.NAMES:
        monkeypatch.setattr(ops, name, with_defaults(kernels[name], getattr(ops, name)))


def run(script, *arguments, **env):
    """A Python script of this repository in a process of its own -> (exit status, all output)."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    return result.returncode, result.stdout + result.stderr


# ------------------------------------------------------------------------------- every op


@pytest.mark.parametrize("op", OPS)
def test_nasty_cases(emulated, rng, op):
    """What the fuzzer draws: any size, any strides, NaNs and infinities."""
    for _ in range(6):
        OPS[op].check(op, op_table.fuzz_case(op, rng))


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(kernels, rng, op):
    arguments = test_ops.case_of(op, "strided", rng)
    dense = [x.contiguous() if torch.is_tensor(x) else x for x in arguments]
    results = as_list(kernels[op](*arguments)), as_list(kernels[op](*dense))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
        assert a.stride() == b.stride()


# ------------------------------------------------------------------------------- colour


def test_colour_random_cases(emulated, rng):
    """More and fewer pixels than a block takes, and sizes whose images start at odd addresses."""
    for p in (1, 7, 255, 256, 257, 600):
        for _ in range(4):
            op_table.check_equal("colour", op_table.colour_case(rng, 2, p))
    test_colour.test_colour_by_hand("cpu")


# ------------------------------------------------------------------------------- nms

NMS = [*ladder.NMS, "nms"]


@pytest.mark.parametrize("name", NMS)
def test_nms_random_cases(kernels, rng, name):
    for _ in range(20):
        case = op_table.nms_case(rng, 70)
        assert torch.equal(kernels[name](*case), reference.nms(*case)), case


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 150])
@pytest.mark.parametrize("name", NMS)
def test_nms_sizes(kernels, rng, name, n):
    boxes = op_table.random_boxes(n, rng)
    case = boxes, torch.rand(n, generator=rng), torch.arange(n) % 3, 0.45
    assert torch.equal(kernels[name](*case), reference.nms(*case))


@pytest.mark.parametrize("name", ["nms_2_tiles", "nms_3_scan", "nms_4_block", "nms"])
def test_nms_1000(kernels, rng, name):
    boxes = op_table.random_boxes(1000, rng, grid=40, odd=0.02)
    scores = op_table.random_scores(1000, rng, levels=50, odd=0.02)
    case = boxes, scores, torch.arange(1000) % 2, 0.45
    assert torch.equal(kernels[name](*case), reference.nms(*case))


def test_nms_second_panel(kernels, rng):
    """Above 4,096 boxes the survivors of one panel suppress boxes of the next."""
    centres = op_table.random_boxes(40, rng)
    boxes = centres[torch.arange(4200) % 40] + torch.randn(4200, 4, generator=rng) * 0.01
    case = boxes, torch.rand(4200, generator=rng), torch.arange(4200) // 40 % 2, 0.45
    keep = kernels["nms"](*case)
    assert torch.equal(keep, reference.nms(*case))
    late = case[1].argsort(descending=True)[4096:]
    assert not keep[late].all(), "no box of the second panel was suppressed: the test shows nothing"


def test_nms_order_and_threshold(emulated):
    test_ops.test_nms_order("cpu")
    test_ops.test_nms_at_the_threshold("cpu")


def test_nms_block_refuses_too_many(kernels):
    with pytest.raises(RuntimeError, match="at most 1024 boxes; got 1025"):
        kernels["nms_4_block"](torch.zeros(1025, 4), torch.zeros(1025), torch.arange(1025), 0.5)


# ------------------------------------------------------------------------------- match

MATCH = [*ladder.MATCH, "match"]


@pytest.mark.parametrize("name", MATCH)
def test_match_random_cases(kernels, rng, name):
    for most in (6, 6, 20):
        for _ in range(8):
            case = op_table.match_case(rng, 150, most)
            assert torch.equal(kernels[name](*case), reference.match(*case)), case


@pytest.mark.parametrize("name", MATCH)
def test_match_sizes(kernels, rng, name):
    """More boxes than a tile of shared memory holds, more than there are priors, and none."""
    for counts, p in [([], 5), ([0], 5), ([2], 0), ([0, 3, 0], 1), ([70, 1], 63), ([130], 200)]:
        priors, boxes = op_table.random_boxes(p, rng), op_table.random_boxes(sum(counts), rng)
        case = priors, boxes, op_table.offsets_of(counts), 0.5
        assert torch.equal(kernels[name](*case), reference.match(*case)), (counts, p)


def test_match_special_cases(emulated, rng):
    test_ops.test_match_shared_best_prior("cpu")
    test_ops.test_match_at_the_threshold("cpu")
    # Equal boxes, and fewer or as many priors: all want the same prior, round after round.
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(12, 4)
    priors = op_table.random_boxes(12, rng) * 0.2 + 0.4
    for case in [(priors, boxes), (priors[:5], boxes), (boxes, boxes)]:
        test_ops.check_match(*case, op_table.offsets_of([12]), 0.9)


def test_match_ssd300(kernels, rng):
    """8,732 priors: several passes of the registers."""
    priors = op_table.random_boxes(8732, rng)
    case = priors, op_table.random_boxes(8, rng), op_table.offsets_of([5, 0, 3]), 0.5
    assert torch.equal(kernels["match"](*case), reference.match(*case))


def test_match_wrong_offsets_stay_in_memory(kernels, rng):
    """On a GPU nobody can check them before the launch: they must not reach other rows."""
    boxes = op_table.random_boxes(4, rng)
    for offsets in ([-5, 99], [3, 1], [2**40, 2**41], [-(2**40), 2]):
        matched = kernels["match"](boxes, boxes, torch.tensor(offsets), 0.5)
        assert ((matched >= -1) & (matched < 4)).all()


# ------------------------------------------------------------------------------- cross-entropy


def test_mined_random_cases(emulated, rng):
    for c in (1, 2, 21, 40):
        for style in (dict(), dict(levels=1), dict(odd=0.01)):
            check = op_table.mined_case(rng, 2, op_table.random_int(0, 90, rng), c, **style)
            op_table.check_mined(*check)
    test_ops.test_mined_by_hand("cpu")
    op_table.check_mined(*op_table.mined_case(rng, 1, 0, 3))
    op_table.check_mined(*op_table.mined_case(rng, 0, 9, 3))


def test_mined_gradient(kernels, rng):
    logits, labels = op_table.mined_case(rng, 3, 70, 40, odd=0.001)
    result = kernels["mined_cross_entropy"](logits, labels, 3)
    arguments = torch.rand(3, 70, generator=rng), logits, labels, result
    torch.testing.assert_close(
        kernels["mined_cross_entropy_backward"](*arguments),
        reference.mined_cross_entropy_backward(*arguments),
        equal_nan=True, rtol=1e-6, atol=2e-7,
    )  # fmt: skip


# ------------------------------------------------------------------------------- postprocess


def test_postprocess_random_cases(emulated, rng):
    images = excused = 0
    for background in (-3.0, 0.0, 5.0):
        for limits in [(0.0, 3, 0.45, 7), (0.01, 20, 0.45, 200), (0.3, 400, 0.3, 30)]:
            p, c = op_table.random_int(1, 200, rng), op_table.random_int(2, 7, rng)
            case = op_table.post_case(rng, 2, p, c, background=background)
            excused += op_table.check_postprocess(*case, *limits)
            images += 2
    assert excused <= 0.06 * images


@pytest.mark.parametrize("sizes", [(0, 9, 3), (2, 0, 3), (2, 9, 1), (1, 1, 2), (1, 64, 93)])
def test_postprocess_sizes(emulated, rng, sizes):
    op_table.check_postprocess(*op_table.post_case(rng, *sizes), 0.001, 400, 0.45, 50)


def test_postprocess_ties_and_by_hand(emulated, rng):
    """Equal scores beyond any cut; a whole image of equal logits selects by index alone."""
    test_ops.test_postprocess_by_hand("cpu")
    test_ops.test_postprocess_ties("cpu", rng)
    loc, logits, priors = op_table.post_case(rng, 1, 700, 3)
    logits[:] = torch.tensor([0.0, 1.0, 0.5])
    op_table.check_postprocess(loc, logits, priors, 0.01, 70, 0.45, 200)


def test_postprocess_odd_numbers(emulated, rng):
    test_ops.test_postprocess_at_the_threshold("cpu")
    test_ops.test_postprocess_odd_numbers("cpu", rng)


def test_postprocess_long_lists(emulated, rng):
    """More candidates, and more detections, than a block's shared memory holds."""
    loc, logits, priors = op_table.post_case(rng, 1, 1500, 3, background=-4.0)
    priors[:, 2:] *= 0.02
    assert int(reference.postprocess(loc, logits, priors, 0.01, 1400, 0.45, 2000)[3]) > 1024
    op_table.check_postprocess(loc, logits, priors, 0.01, 1400, 0.45, 2000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_postprocess_types(emulated, rng, dtype):
    """Read as they are, and converted one number at a time."""
    loc, logits, priors = op_table.post_case(rng, 1, 100, 5)
    limits = 0.01, 400, 0.45, 200
    mine = ops.postprocess(loc.to(dtype), logits.to(dtype), priors, *limits)
    theirs = ops.postprocess(loc.to(dtype).float(), logits.to(dtype).float(), priors, *limits)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def test_postprocess_full_size(emulated, rng):
    """Untrained: all 174,640 pairs pass the threshold."""
    case = op_table.post_case(rng, 1, 8732, 21, spread_logits=0.3, background=0.0)
    op_table.check_postprocess(*case, 0.01, 400, 0.45, 200)


# ------------------------------------------------------------------------------- the emulator

PRIMITIVES = """
#include "device.h"
namespace {
// grid (2, 3, 2), 64 threads: lane sums by shuffles, votes, atomics, shared memory of both kinds
__global__ void kernel(int64_t* out) {
  DYNAMIC_SHARED(int, dynamic);
  __shared__ int total, largest, bits;
  const int t = threadIdx.x, lane = t % 32;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (t == 0) total = largest = bits = 0;
  __syncthreads();
  int sum = t;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_down_sync(kFullWarp, sum, step);
    if (lane + step < 32) sum += other;
  }
  const unsigned odd = __ballot_sync(kFullWarp, t % 2);
  const bool any = __any_sync(kFullWarp, t == 40);
  const int neighbour = __shfl_xor_sync(kFullWarp, t, 1);
  dynamic[t] = neighbour;
  if (lane == 0) atomicAdd(&total, sum);
  atomicMax(&largest, t * block);
  atomicOr(&bits, 1 << lane / 4);
  __syncthreads();
  if (t >= 8) return;  // threads may leave early
  const int64_t answers[] = {total, largest, bits, odd, any, dynamic[1], dynamic[63], blockDim.x};
  out[block * 8 + t] = answers[t];
}
Tensor primitives(const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {12, 8});
  LAUNCH(kernel, dim3(2, 3, 2), 64, 64 * sizeof(int), Stream())(out.mutable_data_ptr<int64_t>());
  return out;
}
}  // namespace
STABLE_TORCH_LIBRARY_IMPL(emulator_test, DEVICE_KEY, m) {
  m.impl("primitives", TORCH_BOX(&primitives));
}
"""


def test_emulator_primitives(tmp_path):
    source = tmp_path / "primitives.cu"
    source.write_text(PRIMITIVES)
    torch.library.define("emulator_test::primitives", "(Tensor like) -> Tensor")
    build_or_skip(lambda: ops.build("primitives", [source], ["-O1"], emulate=True))
    out = torch.ops.emulator_test.primitives(torch.zeros(1, dtype=torch.int64))
    for block, row in enumerate(out.tolist()):
        assert row == [2016, 63 * block, 255, 0xAAAAAAAA, int(row[4]), 0, 62, 64]
        assert row[4] == 0  # answered by thread 4, whose warp does not hold thread 40


# ------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize(("sanitize", "cases"), [("thread", 10), ("address", 14)])
def test_kernels_under_sanitizers(sanitize, cases):
    arguments = "--kernels", "cuda", "--sanitize", sanitize, "--cases", cases
    status, output = run(FUZZ, *arguments)
    assert status == 0, output[-4000:]
    assert f"sanitizer {sanitize} silent" in output


@pytest.mark.slow
def test_fuzz_cpu_kernels():
    status, output = run(FUZZ, "--cases", 500)
    assert status == 0, output[-4000:]
    assert "sanitizer address silent" in output


# One barrier of each op, all taken out of one copy: (file, how many barriers stand before it, op,
# case of the fuzz script). The headers serve several ops: a copy of its own for each.
RACES = [
    [
        ("colour.cu", 0, "colour", 0),  # the tile of results
        ("match.cu", 1, "match", 0),  # the tile of boxes is read before it is full
        ("nms.cu", 1, "nms", 1),  # survivors of the chunk
        ("postprocess.cu", 0, "postprocess", 13),  # the candidates
        ("mined_cross_entropy.cu", 1, "mined_cross_entropy", 13),  # the count of the positives
    ],
    [("select.h", 1, "postprocess", 13)],  # the histogram
    [("rows.h", 0, "mined_cross_entropy", 13)],  # the tile of logits
]


def without_barrier(source, skipped):
    """The text with the barrier after the first `skipped` ones removed."""
    places = [match.start() for match in re.finditer(re.escape(BARRIER), source)]
    start = places[skipped]
    return source[:start] + source[start + len(BARRIER) :]


@pytest.mark.slow
@pytest.mark.parametrize("races", RACES)
def test_thread_sanitizer_finds_a_missing_barrier(tmp_path, races):
    """Take one __syncthreads() out of a kernel: ThreadSanitizer reports the race."""
    for folder in ("ops", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file, skipped, *_ in races:
        broken = tmp_path / "ops" / file
        broken.write_text(without_barrier(broken.read_text(), skipped))
    for file, _, op, case in races:
        arguments = "--kernels", "cuda", "--sanitize", "thread", "--first", case, "--cases", 1
        status, output = run(tmp_path / FUZZ, *arguments, "--only-final", "--op", op)
        assert status != 0, output[-4000:]
        assert "WARNING: ThreadSanitizer: data race" in output
        assert f"ops/{file}:" in output, output


@pytest.mark.slow
def test_blocks_of_the_gpu_size():
    """All above runs blocks of 64 threads, because CPU threads are slow; here, 256 and 1,024."""
    arguments = "--kernels", "cuda", "--sanitize", "none", "--only-final", "--full-blocks"
    status, output = run(FUZZ, *arguments, "--cases", 12)
    assert status == 0, output[-4000:]
    assert f"12 cases of the cuda kernels of {len(ops.NAMES)} ops equal the reference" in output


@pytest.mark.slow
def test_one_image_with_5000_boxes(kernels, rng):
    """79 tiles of boxes, and more boxes than priors: all but 20 look again in vain."""
    priors, boxes = op_table.random_boxes(20, rng), op_table.random_boxes(5000, rng)
    case = priors, boxes, op_table.offsets_of([5000]), 0.5
    assert torch.equal(kernels["match"](*case), reference.match(*case))


# ------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def cuda_rungs():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return ladder.load("cuda")


@pytest.mark.cuda
def test_cuda_rungs(cuda_rungs, rng):
    for name, rung in cuda_rungs.items():
        op = op_table.op_of_rung(name)
        for _ in range(200):
            big = 1000 if op == "nms" else 30
            case = (
                op_table.nms_case(rng, big) if op == "nms" else op_table.match_case(rng, 900, big)
            )
            on_gpu = [x.cuda() if torch.is_tensor(x) else x for x in case]
            assert torch.equal(rung(*on_gpu).cpu(), getattr(reference, op)(*case)), name


@pytest.fixture
def batch(rng, op):
    """Arguments of the op as a training or test batch has them, on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not ops.COMPILED["cuda"]:
        pytest.skip(f"the CUDA kernels are not built ({ops.describe()})")
    return [x.cuda() if torch.is_tensor(x) else x for x in OPS[op].full_case(rng)]


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_full_size(batch, op):
    OPS[op].check(op, [x.cpu() if torch.is_tensor(x) else x for x in batch], device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(batch, op):
    """Recorded once, replayed on other numbers: so the op neither waits nor looks at its data."""
    arguments = batch
    for _ in range(3):  # torch asks for a warm-up on a side stream
        with torch.cuda.stream(torch.cuda.Stream()):
            getattr(ops, op)(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = as_list(getattr(ops, op)(*arguments))
    for x in arguments:
        if torch.is_tensor(x) and x.is_floating_point():
            x.copy_(x.flip(0))
    graph.replay()
    for a, b in zip(result, as_list(getattr(ops, op)(*arguments)), strict=True):
        assert same_bits(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_other_stream(batch, op):
    """The op runs on the current stream: after what was queued there, before what comes next."""
    arguments = batch
    expected = as_list(getattr(ops, op)(*arguments))
    late = [torch.zeros_like(x) if torch.is_tensor(x) else x for x in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would see the zeros
        for to, x in zip(late, arguments, strict=True):
            if torch.is_tensor(x):
                to.copy_(x)
        result = as_list(getattr(ops, op)(*late))
    stream.synchronize()
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_cuda_does_not_wait(batch, op):
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(ops, op)(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_copy_beside_the_network(rng):
    """On a stream of its own, while the compute stream is busy; what comes after waits for it."""
    from plumbing.prefetch import copy_beside

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    batch = [torch.rand(1 << 22, generator=rng).pin_memory() for _ in range(3)]
    copy_beside(batch, "cuda")  # the first call makes the stream
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second of other work
    there = copy_beside(batch, "cuda")
    total = sum(x.sum() for x in there)  # queued behind both
    assert torch.isclose(total.cpu(), sum(x.sum() for x in batch))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(there, batch, strict=True))


def test_copy_beside_on_a_cpu(rng):
    from plumbing.prefetch import copy_beside

    batch = [torch.rand(5, generator=rng), torch.arange(3)]
    assert all(x is y for x, y in zip(copy_beside(batch, "cpu"), batch, strict=True))
