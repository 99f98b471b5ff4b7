"""Layers that the cores compute for a device: what comes back, and who waits for it."""

from __future__ import annotations

import ctypes
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor

from djinn.host import ahead
from djinn.host.ahead import SLOTS, Ahead, InOrder, computing_beside
from djinn.host.products import HostProducts, Linear
from djinn.transport.stats import Stats

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SECOND = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")]
DEVICES = ["cpu", pytest.param("cuda:0", marks=GPU), pytest.param("cuda:1", marks=SECOND)]
"""The second GPU while the first one is the current one."""


def layers(seed: int, columns: int = 96) -> list[Linear]:
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, columns, generator=random).bfloat16() for rows in (70 + seed, 33)]
    return [Linear(weights[0]), Linear(weights[1], torch.randn(33, generator=random).bfloat16())]


def vectors(seed: int, count: int = 2, columns: int = 96) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def products() -> Iterator[HostProducts]:
    made = HostProducts(threads=1)
    yield made
    made.close()


@pytest.fixture
def stats() -> Stats:
    return Stats(model_bytes=0, resident_bytes=0, ring_bytes=0, host_bytes=0, disk_bytes=0, traced=True)


@pytest.mark.parametrize("device", DEVICES)
def test_many_products_in_a_row_are_all_right(device: str, products: HostProducts, stats: Stats) -> None:
    """More than there are slots, of different sizes, each with the last one's outputs among its inputs."""
    computing = computing_beside(torch.device(device), products, stats)
    assert isinstance(computing, InOrder if device == "cpu" else Ahead)
    chain, expected = vectors(0).to(device), vectors(0)
    nbytes = 0
    for seed in range(5 * SLOTS):
        count = 1 + seed % 3
        ours, theirs = chain[:1].expand(count, -1).contiguous(), expected[:1].expand(count, -1).contiguous()
        made = computing.outputs_of(layers(seed), ours, f"product {seed}")
        known = products.outputs_of(layers(seed), theirs)
        assert [tuple(each.shape) for each in made] == [(count, 70 + seed), (count, 33)]
        chain, expected = (torch.cat([each[1][:, :32] / 8] * 3, 1) for each in (made, known))
        nbytes += sum(layer.nbytes for layer in layers(seed))
        if seed % 7 == 0:
            assert all(torch.equal(one.cpu(), other) for one, other in zip(made, known, strict=True))
    assert torch.equal(chain.cpu(), expected)
    computing.count()
    assert stats.host_computed_bytes == nbytes
    assert min(stats.host_s, stats.host_wait_s, stats.product_wait_s) > 0
    assert {each.unit for each in stats.timeline} == {f"product {seed}" for seed in range(5 * SLOTS)}
    computing.close()


class Stream:
    """Stands for a GPU's stream: what is queued runs in order, on a thread of its own, as late as that likes."""

    def __init__(self) -> None:
        self._queued: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (step := self._queued.get()) is not None:
            step()

    def put(self, step: Callable[[], None]) -> None:
        self._queued.put(step)

    def synchronize(self, *_: object) -> None:
        done = threading.Event()
        self.put(done.set)
        assert done.wait(20), "the stream waits for good"

    def end(self) -> None:
        self._queued.put(None)
        self._thread.join(20)
        assert not self._thread.is_alive()


class Crossing:
    """A slot's way to the stream's memory and back, as CudaExchange has it: memory that is used again each time."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = threading.Event()
        self._left.set()
        self._inputs = self._outputs = torch.empty(0, dtype=torch.bfloat16)

    def send(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > self._inputs.numel():
            self._inputs = torch.empty(inputs.numel(), dtype=torch.bfloat16)
        host = self._inputs[: inputs.numel()].view(inputs.shape)
        self._stream.put(lambda: host.copy_(inputs))  # type: ignore[arg-type]
        return host

    def room(self, tokens: int, rows: Sequence[int]) -> list[Tensor]:
        assert self._left.wait(20)
        sizes = [tokens * each for each in rows]
        if sum(sizes) > self._outputs.numel():
            self._outputs = torch.empty(sum(sizes), dtype=torch.bfloat16)
        return [part.view(tokens, -1) for part in self._outputs[: sum(sizes)].split(sizes)]

    def to_device(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        there = [torch.full_like(each, float("nan")) for each in outputs]
        left = self._left = threading.Event()

        def read() -> None:
            for target, source in zip(there, outputs, strict=True):
                target.copy_(source)
            left.set()

        self._stream.put(read)
        return there


class Marks:
    """Marks of that stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, gpu: int, address: int, number: int) -> None:
        self._stream.put(lambda: setattr(ctypes.c_uint32.from_address(address), "value", number))

    def wait(self, gpu: int, address: int, number: int) -> None:
        def until() -> None:
            while (ctypes.c_uint32.from_address(address).value - number) % 2**32 >= 2**31:
                time.sleep(0)

        self._stream.put(until)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """A stream that stands for a GPU's, in this module and in the one that is tested."""
    made = Stream()
    zeros = torch.zeros
    monkeypatch.setattr(ahead, "CudaExchange", lambda _: Crossing(made))
    monkeypatch.setattr(ahead, "marks", Marks(made))
    monkeypatch.setattr(ahead, "gpu_index", lambda _: 0)
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **given: zeros(*size, **given))
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    yield made
    made.end()


@pytest.fixture
def queued(products: HostProducts, stream: Stream, stats: Stats) -> Iterator[Ahead]:
    queue = products.queue()
    assert queue is not None
    made = Ahead(torch.device("cpu"), products, queue, stats)
    yield made
    made.close()


def test_a_stream_gets_what_was_computed_for_it(
    queued: Ahead, products: HostProducts, stream: Stream, stats: Stats
) -> None:
    """More products than slots, of all sizes, whose inputs come late; nobody waits for them but the stream."""
    late = threading.Event()
    stream.put(lambda: late.wait(20))  # type: ignore[arg-type]
    made = [queued.outputs_of(layers(seed), vectors(seed, 1 + seed % 3), f"{seed}") for seed in range(SLOTS)]
    assert queued._queue.unfinished == SLOTS
    assert stats.host_s == 0
    late.set()
    made += [queued.outputs_of(layers(seed), vectors(seed, 1 + seed % 3), f"{seed}") for seed in range(SLOTS, 40)]
    stream.synchronize()
    for seed, outputs in enumerate(made):
        known = products.outputs_of(layers(seed), vectors(seed, 1 + seed % 3))
        assert all(torch.equal(one, other) for one, other in zip(outputs, known, strict=True)), seed
    queued.count()
    queued.count()
    assert [each.unit for each in stats.timeline] == [f"{seed}" for seed in range(40)]
    assert [each.start_s for each in stats.timeline] == sorted(each.start_s for each in stats.timeline)
    assert stats.host_s == pytest.approx(sum(each.end_s - each.start_s for each in stats.timeline))
    assert stats.host_computed_bytes == sum(each.nbytes for each in stats.timeline)


def interrupt(computing: Ahead, at: str, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a product and interrupt it after one of its steps."""
    exchange = computing._slots[computing._next].exchange
    owner = computing._queue if at == "put" else ahead.marks if at in ("write", "wait") else exchange
    real = getattr(owner, at)

    def interrupted(*given: object) -> None:
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            computing.outputs_of(layers(9), inputs, "")


@pytest.mark.parametrize("at", ["room", "send", "write", "put", "wait", "to_device"])
def test_after_an_interrupt_products_are_right(
    queued: Ahead, products: HostProducts, stream: Stream, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Of a product that is begun while inputs of others are not there: at any step of it, after that step."""
    late = threading.Event()
    for seed in range(3):
        queued.outputs_of(layers(seed), vectors(seed), "")
    stream.put(lambda: late.wait(20))  # type: ignore[arg-type]
    threading.Timer(0.2, late.set).start()
    interrupt(queued, at, vectors(9), monkeypatch)
    made = [queued.outputs_of(layers(seed), vectors(seed), "") for seed in range(3 * SLOTS)]
    stream.synchronize()
    for seed, outputs in enumerate(made):
        known = products.outputs_of(layers(seed), vectors(seed))
        assert all(torch.equal(one, other) for one, other in zip(outputs, known, strict=True)), seed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_caller_goes_on_while_inputs_are_not_there(products: HostProducts, stats: Stats) -> None:
    computing = computing_beside(torch.device("cuda"), products, stats)
    assert isinstance(computing, Ahead)
    inputs = vectors(1).cuda()
    computing.outputs_of(layers(1), inputs, "")  # allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second
    (made, _) = computing.outputs_of(layers(1), inputs, "")
    assert computing._queue.unfinished == 1
    assert torch.equal(made.cpu(), products.outputs_of(layers(1), vectors(1))[0])
    assert computing._queue.unfinished == 0
    computing.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("at", ["send", "write", "put", "wait", "to_device"])
def test_an_interrupt_leaves_nothing_that_later_products_meet(
    products: HostProducts, stats: Stats, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    computing = computing_beside(torch.device("cuda"), products, stats)
    assert isinstance(computing, Ahead)
    interrupt(computing, at, vectors(0).cuda(), monkeypatch)
    for seed in range(3 * SLOTS):
        made = computing.outputs_of(layers(seed), vectors(seed).cuda(), "")
        known = products.outputs_of(layers(seed), vectors(seed))
        assert all(torch.equal(one.cpu(), other) for one, other in zip(made, known, strict=True))
    computing.close()
