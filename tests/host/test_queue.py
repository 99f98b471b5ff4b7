"""Products that begin with a mark and end with one: in order, when their inputs are there, and never waited for."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from djinn.host import products
from djinn.host.products import HostProducts, Linear, matrices_of
from djinn.host.queue import Product, ProductQueue

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostProducts]:
    monkeypatch.setattr(products, "choose_cpus", lambda *_: (-1, -1))
    made = HostProducts()
    yield made
    made.close()


@pytest.fixture
def queue(cores: HostProducts) -> Iterator[ProductQueue]:
    made = cores.queue()
    assert made is not None
    yield made
    made.close()


class Queued:
    """A product of two layers, one with a bias, and all that it needs."""

    def __init__(self, seed: int, number: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.layers = [
            Linear(torch.randn(rows, 96, generator=random).bfloat16(), bias)
            for rows, bias in ((70, None), (33, torch.randn(33, generator=random).bfloat16()))
        ]
        self.vectors = torch.randn(2, 96, generator=random).bfloat16()
        self.out = [torch.full((2, len(layer.weight)), float("nan"), dtype=torch.bfloat16) for layer in self.layers]
        self.marks = torch.zeros(2, dtype=torch.int32)
        self._matrices = matrices_of(self.layers, self.vectors, self.out)
        self.product = Product(
            matrices=ctypes.addressof(self._matrices), many=2, vectors=self.vectors.data_ptr(), count=2, columns=96,
            arrived=self.marks[:1].data_ptr(), computed=self.marks[1:].data_ptr(), number=number,
        )  # fmt: skip

    @property
    def is_computed(self) -> bool:
        return int(self.marks[1]) % 2**32 == self.product.number

    def arrive(self) -> None:
        self.mark(self.product.number)

    def mark(self, number: int) -> None:
        """Mark the inputs with a number of 32 bits, as torch has none without a sign."""
        self.marks[0] = number - 2**32 if number >= 2**31 else number

    def check(self, cores: HostProducts) -> None:
        for layer, made, expected in zip(
            self.layers, self.out, cores.multiply([layer.weight for layer in self.layers], self.vectors), strict=True
        ):
            assert torch.equal(made, expected if layer.bias is None else expected + layer.bias)
        assert self.product.asked_s <= self.product.there_s < self.product.done_s


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        time.sleep(1e-3)


def test_each_is_computed_when_its_inputs_are_there_and_those_before_it_are_done(
    cores: HostProducts, queue: ProductQueue
) -> None:
    begun = time.perf_counter()
    queued = [Queued(seed) for seed in range(5)]
    for each in queued:
        queue.put(each.product)
    for each in reversed(queued[1:]):
        each.arrive()
    time.sleep(0.1)
    assert queue.unfinished == 5
    assert not any(each.is_computed for each in queued)
    queued[0].arrive()
    until(lambda: not queue.unfinished)
    for each in queued:
        assert each.is_computed
        each.check(cores)
    done = [each.product.done_s for each in queued]
    assert done == sorted(done)
    assert begun < done[0] < done[-1] < time.perf_counter()  # of the same clock


def test_a_thread_that_has_slept_goes_on(cores: HostProducts, queue: ProductQueue) -> None:
    for seed in range(2):
        time.sleep(0.2)
        each = Queued(seed)
        each.arrive()
        queue.put(each.product)
        until(lambda: not queue.unfinished)
        each.check(cores)


@pytest.mark.parametrize("number", [1, 2**31 - 1, 2**31, 2**32 - 1])
def test_numbers_of_marks_wrap_around(cores: HostProducts, queue: ProductQueue, number: int) -> None:
    each = Queued(0, number)
    each.mark(number - 1)
    queue.put(each.product)
    time.sleep(0.05)
    assert queue.unfinished == 1
    each.arrive()
    until(lambda: not queue.unfinished)
    each.check(cores)


def test_outputs_are_those_of_a_call_at_the_same_time(cores: HostProducts, queue: ProductQueue) -> None:
    queued = [Queued(seed) for seed in range(50)]
    for each in queued:
        each.arrive()
        queue.put(each.product)
        other = Queued(7)
        made = cores.outputs_of(other.layers, other.vectors)
        assert torch.equal(made[0], cores.multiply([other.layers[0].weight], other.vectors)[0])
    until(lambda: not queue.unfinished)
    for each in queued:
        each.check(cores)


def test_a_forked_child_ends_though_it_has_no_thread(queue: ProductQueue) -> None:
    """And leaves what is queued to the process that has the thread."""
    queued = [Queued(seed) for seed in range(2)]
    for each in queued:
        queue.put(each.product)
    child = os.fork()
    if not child:
        queue.close()
        del queue
        gc.collect()
        os._exit(any(each.is_computed for each in queued))
    until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))
    for each in queued:
        each.arrive()
    until(lambda: all(each.is_computed for each in queued))  # they have to live until then


@pytest.mark.parametrize("sleeps", [False, True])
def test_closing_does_not_wait_for_inputs_that_never_come(cores: HostProducts, sleeps: bool) -> None:
    queue = cores.queue()
    assert queue is not None
    if sleeps:
        time.sleep(0.2)
    each = Queued(0)
    queue.put(each.product)
    begun = time.perf_counter()
    queue.close()
    assert time.perf_counter() - begun < 5
    assert all(one.isnan().all() for one in each.out)
    assert each.is_computed, "a device that waits for it would wait for good"


def test_there_is_no_queue_where_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(products.build, "KERNEL_DIR", products.build.KERNEL_DIR / "none")
    products.build.load.cache_clear()
    made = HostProducts(threads=1)
    assert made.queue() is None
    made.close()
    products.build.load.cache_clear()
