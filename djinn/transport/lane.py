"""A link kept busy, so that its rate can be measured alone or beside something else: copies between two events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from djinn.devices import cpus_near
from djinn.errors import PlanError
from djinn.hardware import usable_ram
from djinn.transport.arena import PinnedMemory
from djinn.transport.reader import run_on

_CHUNK = 64 * 2**20
HOST_BYTES = 32 * _CHUNK
"""Page-locked memory for each GPU: more than a host's caches hold. With a quarter of that two links together were
measured a tenth faster than they then copied a model's weights. Less where a host has less than 16 times that free."""
_TIMED_BYTES = 10 * 2**30
"""A fifth of a second on a Gen5 link; a fifth of that is copied before."""


class Lane:
    """One GPU's copies: a stream, a target and page-locked chunks."""

    def __init__(self, device: torch.device, host: torch.Tensor) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(self.device)
        self._target = torch.empty(_CHUNK, dtype=torch.uint8, device=self.device)
        self._host = host
        self._timed_bytes = 0
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def copy_all(self) -> None:
        """Queue a copy of every chunk."""
        with torch.cuda.stream(self.stream):
            for chunk in self._host.split(_CHUNK):
                self._target.copy_(chunk, non_blocking=True)

    @property
    def rounds(self) -> int:
        """How often all of it is copied to be timed."""
        return _TIMED_BYTES // self._host.nbytes

    def begin_timing(self, rounds: int) -> None:
        """Mark the begin of what is timed: all of it, so many times."""
        self.marks[0].record(self.stream)
        self._timed_bytes = rounds * self._host.nbytes

    @property
    def busy(self) -> bool:
        """Whether what was started has not ended."""
        return not self.marks[1].query()

    def gbps(self) -> float:
        """Wait for what was started; return its rate, 10^9 bytes/s."""
        self.stream.synchronize()
        return self._timed_bytes / (self.marks[0].elapsed_time(self.marks[1]) / 1e3) / 1e9


@contextmanager
def lane(device: torch.device) -> Iterator[Lane]:
    """Yield the copies of a GPU.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    nbytes = min(HOST_BYTES, max(usable_ram() // 16 // _CHUNK, 1) * _CHUNK)
    with memory_near(device, nbytes, 1) as memory:
        try:
            yield Lane(device, torch.from_numpy(memory.buffer))
        finally:
            torch.cuda.synchronize(device)


@contextmanager
def memory_near(device: torch.device, nbytes: int, value: int) -> Iterator[PinnedMemory]:
    """Yield host memory full of a byte ``value``, for a GPU page-locked and on its NUMA node.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    memory = PinnedMemory(nbytes)
    cpus = cpus_near(device)
    with ThreadPoolExecutor(1, initializer=partial(run_on, cpus) if cpus else None) as local:
        local.submit(memory.buffer.fill, value).result()
    try:
        if device.type == "cuda" and not memory.pin():
            raise PlanError("host memory: a link's rate cannot be measured without page-locked memory")
        yield memory
    finally:
        memory.close()


def start(lanes: Sequence[Lane]) -> None:
    """Queue on all lanes what is timed, so much that it takes a fifth of a second on a Gen5 link."""
    rounds = min(each.rounds for each in lanes)
    warm = max(rounds // 5, 1)
    for number in range(warm + rounds):
        for each in lanes:
            if number == warm:
                each.begin_timing(rounds)
            each.copy_all()
    for each in lanes:
        each.marks[1].record(each.stream)
