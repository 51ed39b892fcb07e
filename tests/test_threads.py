"""A step in several threads is the step in one piece."""

import copy
import faulthandler
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import ops
from plumbing import threads
from plumbing.threads import Threads, in_threads, spread
from plumbing.voc import read_voc
from scratchdet import Config, ScratchDet, multibox_loss

pytestmark = pytest.mark.skipif(not ops.COMPILED["cpu"], reason="nothing is compiled here")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ScratchDet(Config(backbone="resnet18", width=0.25, classes=("a", "b")))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # BatchNorm's: no 0 and 1
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def step(model, network, images, *, bf16=False):
    """-> loss, gradients, buffers of one step."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8], [0.0, 0.0, 0.2, 0.2]])
    offsets = torch.tensor([0, 2, 3] + [3] * (len(images) - 2))  # of two images alone
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loc, logits = network(images)
    loc, logits = loc.to(images.dtype), logits.to(images.dtype)
    labels = torch.tensor([1, 2, 1])
    loss = sum(multibox_loss(loc, logits, model.priors_cxcywh, boxes, labels, offsets)[:2])
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return loss.detach(), gradients, [b.clone() for b in model.buffers()]


def distance(ours, theirs):
    """Of two lists of tensors, as a share of their length."""
    ours, theirs = (torch.cat([x.double().flatten() for x in xs]) for xs in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def in_parts(model, images, parts, **flags):
    ours = copy.deepcopy(model)
    return step(ours, Threads(ours, parts), images, **flags)


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_parts_of_a_batch_learn_what_the_whole_does(model, memory):
    """In doubles, where nothing but a mistake is larger than 1e-9 (the ops' float32 apart)."""
    model = copy.deepcopy(model).double().to(memory_format=memory)
    model.priors_cxcywh = model.priors_cxcywh.float()
    images = torch.randn(5, 3, 300, 300, dtype=torch.double)
    whole = copy.deepcopy(model)
    loss, gradients, buffers = step(whole, whole, images)
    for parts in (1, 2, 3):
        ours = in_parts(model, images, parts)
        assert float(ours[0]) == pytest.approx(float(loss), rel=1e-6)
        assert distance(ours[1], gradients) < 1e-5
        # BatchNorm's running statistics, and how often they were updated
        assert distance(ours[2], buffers) < 1e-12


@pytest.mark.parametrize("bf16", [False, True])
def test_parts_are_as_near_to_the_truth_as_torch_is(model, bf16):
    images = torch.randn(4, 3, 300, 300)
    exact, whole = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.priors_cxcywh = exact.priors_cxcywh.float()
    truth = step(exact, exact, images.double())
    theirs, ours = step(whole, whole, images, bf16=bf16), in_parts(model, images, 2, bf16=bf16)
    for i in (1, 2):
        assert distance(ours[i], truth[i]) < 1.5 * distance(theirs[i], truth[i])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_bits_whatever_else_runs(model, bf16):
    images, over = torch.randn(3, 3, 300, 300), threading.Event()
    one = in_parts(model, images, 2, bf16=bf16)
    busy = threading.Thread(target=lambda: [time.sleep(0) for _ in iter(over.is_set, True)])
    busy.start()
    other = in_parts(model, images, 2, bf16=bf16)
    over.set()
    busy.join()
    for a, b in zip(one[1] + one[2], other[1] + other[2], strict=True):
        assert torch.equal(a, b)


def test_gradients_add_up_over_micro_batches(model):
    ours = copy.deepcopy(model)
    network = Threads(ours, 2)
    parts = torch.randn(4, 3, 300, 300).split(2)
    first = [g.clone() for g in step(ours, network, parts[0])[1]]
    second = [g.clone() for g in step(ours, network, parts[1])[1]]
    ours.zero_grad()
    alone = step(ours, network, parts[1])[1]
    assert distance(second, [a + b for a, b in zip(first, alone, strict=True)]) < 1e-6


class Fails(nn.Module):
    """At the image of sevens: in forward or backward."""

    def __init__(self, model, when):
        super().__init__()
        self.inner, self.when = model, when

    def forward(self, images):
        outputs = self.inner(images)
        if (images == 7).all():
            if self.when == "forward":
                raise KeyError("in one part")
            outputs[0].register_hook(self.fail)
        return outputs

    def fail(self, gradient):
        raise KeyError("in one part")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_of_one_part_ends_the_step_and_not_the_next(model, when):
    ours = Fails(copy.deepcopy(model), when)
    network, images = Threads(ours, 2), torch.randn(2, 3, 300, 300)
    # The other part would wait for ever, in C++, where no signal reaches it: end the tests then.
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        with pytest.raises(KeyError, match="in one part"):
            step(ours.inner, network, torch.stack([images[0], torch.full((3, 300, 300), 7.0)]))
        assert torch.isfinite(step(ours.inner, network, images)[0])
    finally:
        faulthandler.cancel_dump_traceback_later()


def test_parts_that_meet_at_different_layers_are_told_so(model):
    ours = copy.deepcopy(model)
    network = Threads(ours, 2)
    norm = network.twins[1].features.stem[0][1]
    norm.where = *norm.where[:2], norm.where[2] + 1
    with pytest.raises(RuntimeError, match="at another layer"):
        network(torch.randn(2, 3, 300, 300))


def test_each_thread_computes_alone(model, monkeypatch):
    ours, seen = copy.deepcopy(model), []
    monkeypatch.setattr(threads, "THREADS", 8)
    network = in_threads(ours, 4)
    for twin in network.twins:
        twin.register_forward_hook(
            lambda *_: seen.append((threading.get_ident(), torch.get_num_threads()))
        )
    network(torch.randn(4, 3, 300, 300))
    assert len(set(seen)) == len(seen) == 4
    assert {each for _, each in seen} == {2}


def test_dropout_is_not_spread_over_threads(model, monkeypatch):
    """The threads share torch's random numbers; who draws first would change from run to run."""
    ours = copy.deepcopy(model)
    monkeypatch.setattr(threads, "THREADS", 2)
    assert in_threads(ours, 4) is not ours
    ours.features.stem.append(torch.nn.Dropout2d(0.1))
    assert in_threads(ours, 4) is ours


def test_spread_keeps_the_order_and_looks_ahead_a_little():
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    def work(i):
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        time.sleep(0.01 if i % 3 else 0.03)
        return i * i

    results = spread(work, items(), 3)
    assert next(results) == 0
    assert len(drawn) <= 5
    assert list(results) == [i * i for i in range(1, 20)]
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda i: 1 / i, [1, 0, 1], 2))


def test_ranks_take_the_mean_of_their_gradients_and_statistics(model, monkeypatch):
    """Two ranks, one after the other: what the first sends is added to what the second has."""
    images, sent = torch.randn(4, 3, 300, 300).split(2), []
    alone = [in_parts(model, some, 1) for some in images]
    monkeypatch.setattr(threads.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(threads.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(threads.dist, "broadcast", lambda tensor, rank: None)

    def all_reduce(flat):
        sent.append(flat.clone())
        flat += sent[0] if len(sent) == 2 else 0

    monkeypatch.setattr(threads.dist, "all_reduce", all_reduce)
    ranks = [copy.deepcopy(model) for _ in images]
    networks = [Threads(rank, 1) for rank in ranks]
    for rank, network, some in zip(ranks, networks, images, strict=True):
        found = step(rank, network, some)
    names = [name for name, _ in model.named_buffers()]
    for i, (ours, first, second) in enumerate(zip(found[1], alone[0][1], alone[1][1], strict=True)):
        assert (ours is None) == (first is None), i
        if ours is not None:
            assert torch.allclose(ours, (first + second) / 2, rtol=1e-5, atol=1e-7), i
    for name, ours, first, second in zip(names, found[2], alone[0][2], alone[1][2], strict=True):
        wanted = (first + second) / 2 if "running" in name else first
        assert torch.allclose(ours, wanted.to(ours.dtype), rtol=1e-5), name
    with networks[1].no_sync():  # a micro-batch before the last
        step(ranks[1], networks[1], images[1])
    assert len(sent) == 2
    step(ranks[1], networks[1], images[1])
    assert len(sent) == 3


def test_evaluation_in_threads_finds_the_same(model, shapes_root, monkeypatch):
    """Whole batches in threads of their own: bit for bit what one thread finds."""
    model = ScratchDet(model.config)
    records = read_voc(shapes_root, ["2007:train"])[0][:7]
    found = []
    for each in (1, 3):
        monkeypatch.setattr(evaluation, "THREADS", each)
        found.append(evaluation.run_detector(model, records, batch_size=2, what=None))
    assert len(found[0]) == 7
    assert any(len(one.scores) for one in found[0])
    for one, other in zip(*found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
