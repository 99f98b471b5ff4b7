"""Linear layers of a device that the host's cores compute: inputs come to the host, and outputs go back.

On a GPU nobody waits for them but the GPU itself. Its stream marks that inputs are there, and goes on when the cores
have marked that outputs are. The caller goes on at once and launches what comes after a product while the cores are
still busy with it: so its time, which is longer after weights have driven all else out of its caches, costs nothing.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from djinn.devices import gpu_index
from djinn.host.products import HostProducts, Linear, matrices_of
from djinn.host.queue import Product, ProductQueue
from djinn.transport import marks
from djinn.transport.exchange import CudaExchange, Exchange, exchange_with
from djinn.transport.stats import Stats

SLOTS = 8
"""Products that may be queued at once; each has page-locked memory of its own for inputs and outputs."""
_LINE = 16
"""int32 of a cache line, of which each mark has one."""


class Beside(Protocol):
    """What computes layers beside a device."""

    products: HostProducts

    def outputs_of(self, layers: Sequence[Linear], inputs: Tensor, name: str) -> list[Tensor]:
        """Return what each of the layers makes of ``inputs``, bfloat16 [tokens, columns], for compute that follows.

        ``name`` is for the timeline.
        """
        ...

    def count(self) -> None:
        """Bring times and timeline up to date with what has been computed; bytes are when it was asked for."""
        ...

    def close(self) -> None:
        """Let what is queued end."""
        ...


def computing_beside(device: torch.device, products: HostProducts, stats: Stats) -> Beside:
    """Return what computes layers beside ``device``: the caller waits where the device cannot.

    Raises:
        UnavailableError: a GPU without Triton, or the system starts no more threads.
    """
    if device.type == "cuda" and marks.work_on(device):
        queue = products.queue()
        if queue is not None:
            return Ahead(device, products, queue, stats)
    return InOrder(exchange_with(device), products, stats)


class InOrder:
    """The caller waits for every product."""

    def __init__(self, exchange: Exchange, products: HostProducts, stats: Stats) -> None:
        self._exchange, self.products, self._stats = exchange, products, stats

    def outputs_of(self, layers: Sequence[Linear], inputs: Tensor, name: str) -> list[Tensor]:
        asked = time.perf_counter()
        vectors = self._exchange.to_host(inputs)
        out = self._exchange.room(len(vectors), [len(layer.weight) for layer in layers])
        there = time.perf_counter()
        self.products.outputs_of(layers, vectors, out)
        done = time.perf_counter()
        nbytes = sum(layer.nbytes for layer in layers)
        self._stats.host_computed_bytes += nbytes
        self._stats.product_wait_s += done - asked
        self._stats.count_product(name, nbytes, asked, there, done)
        return self._exchange.to_device(out)

    def count(self) -> None:
        """Nothing to do: all is counted as it ends."""

    def close(self) -> None:
        """Nothing to do: all has ended."""


class _Slot:
    """A product that is queued, or was."""

    def __init__(self, device: torch.device, line: Tensor) -> None:
        self.exchange = CudaExchange(device)
        arrived, computed = line.split(_LINE)
        self.product = Product(arrived=arrived.data_ptr(), computed=computed.data_ptr())
        self.named: tuple[str, int] | None = None
        """Name and bytes of one whose times have not been counted."""
        self.held: object = None
        """What has to live until it is computed."""
        self._computed = computed

    @property
    def done(self) -> bool:
        """Whether it is computed."""
        return int(self._computed[0]) % 2**32 == self.product.number  # as it is unsigned


class Ahead:
    """The caller waits for nothing, but for a free slot."""

    def __init__(self, device: torch.device, products: HostProducts, queue: ProductQueue, stats: Stats) -> None:
        self._device, self._index = device, gpu_index(device)
        self.products, self._queue, self._stats = products, queue, stats
        self._marks = torch.zeros(SLOTS, 2 * _LINE, dtype=torch.int32, pin_memory=True)
        self._slots = [_Slot(device, line) for line in self._marks]
        self._next = 0
        self._counting = threading.Lock()
        self._torn = False

    def outputs_of(self, layers: Sequence[Linear], inputs: Tensor, name: str) -> list[Tensor]:
        if self._torn:  # an interrupt has left a slot of which nobody knows how far it came
            self._settle()
        self._torn = True
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        asked = time.perf_counter()
        out = slot.exchange.room(len(inputs), [len(layer.weight) for layer in layers])  # once its outputs have gone
        self._stats.product_wait_s += time.perf_counter() - asked
        self._count(slot)
        product = slot.product
        product.number += 1  # of 32 bits
        vectors = slot.exchange.send(inputs)
        marks.write(self._index, product.arrived, product.number)
        matrices = matrices_of(layers, vectors, out)
        slot.held = matrices, layers
        product.matrices, product.many = ctypes.addressof(matrices), len(layers)
        product.vectors = vectors.data_ptr()
        product.count, product.columns = vectors.shape
        nbytes = sum(layer.nbytes for layer in layers)
        self._queue.put(product)
        slot.named = name, nbytes
        marks.wait(self._index, product.computed, product.number)
        outputs = slot.exchange.to_device(out)
        self._stats.host_computed_bytes += nbytes
        self._torn = False
        return outputs

    def count(self) -> None:
        for number in range(SLOTS):  # the longest queued first
            self._count(self._slots[(self._next + number) % SLOTS])

    def close(self) -> None:
        try:
            self._settle()
        finally:
            self._queue.close()

    def _settle(self) -> None:
        """Wait until nothing is queued."""
        torch.cuda.synchronize(self._device)  # then all inputs are there
        while self._queue.unfinished:
            time.sleep(1e-4)
        self._torn = False

    def _count(self, slot: _Slot) -> None:
        with self._counting:  # another thread may ask for statistics
            if slot.named is not None and slot.done:
                product = slot.product
                self._stats.count_product(*slot.named, product.asked_s, product.there_s, product.done_s)
                slot.named = None
