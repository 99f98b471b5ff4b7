"""How fast the links of several GPUs are, alone and at once, and how long they take to add up what each has.

One process measures: copies run on a stream of each GPU between two events, from host memory that threads on the GPU's
own NUMA node have touched. What links carry at once shows whether they share something: a root port, or host memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from pydantic import BaseModel, ConfigDict, Field

from djinn.devices import cpus_near
from djinn.errors import PlanError
from djinn.sizes import Count
from djinn.transport.arena import PinnedMemory
from djinn.transport.reader import run_on

_CHUNK = 64 * 2**20
_CHUNKS = 8
"""Chunks of page-locked memory for each GPU."""
_ROUNDS, _WARM_ROUNDS = 20, 5
"""Of all chunks: about 10 GB, a fifth of a second on a Gen5 link."""
SUM_BYTES = (16 * 2**10, 8 * 2**20)
"""What GPUs add up: a token's hidden state of a 70B model in bfloat16, and that of 512 tokens."""
_SUMS = 50


class LinksTogether(BaseModel):
    """What the links of these GPUs carried at once, 10^9 bytes/s each; one alone is what it carries alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: tuple[Count, ...] = Field(min_length=1)
    gbps: tuple[float, ...]


class SumRate(BaseModel):
    """Seconds in which all GPUs add up ``nbytes`` of each, one sum behind the other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nbytes: Count
    seconds: float = Field(gt=0)
    beside_copies: bool
    """Whether every link was busy meanwhile."""


def links(count: int) -> list[LinksTogether]:
    """Measure each of ``count`` links alone, then all at once, then each pair where there are more than two.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    together = [range(count)] if count > 1 else []
    pairs = itertools.combinations(range(count), 2) if count > 2 else []
    with ExitStack() as undo:
        lanes = [undo.enter_context(lane(torch.device("cuda", index))) for index in range(count)]
        return [
            LinksTogether(gpus=tuple(chosen), gbps=tuple(_rates([lanes[index] for index in chosen])))
            for chosen in [*((index,) for index in range(count)), *together, *pairs]
        ]


def sums(count: int) -> list[SumRate]:
    """Measure sums over ``count`` GPUs, by NCCL, idle and beside copies over every link.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    found = []
    with ExitStack() as undo:
        lanes = [undo.enter_context(lane(torch.device("cuda", index))) for index in range(count)]
        for nbytes, beside in itertools.product(SUM_BYTES, (False, True)):
            seconds = _sum_s(count, nbytes, lanes if beside else [])
            found.append(SumRate(nbytes=nbytes, seconds=seconds, beside_copies=beside))
    return found


class Lane:
    """One GPU's copies: a stream, a target and page-locked chunks."""

    def __init__(self, device: torch.device, host: torch.Tensor) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(self.device)
        self._target = torch.empty(_CHUNK, dtype=torch.uint8, device=self.device)
        self._chunks = host.split(_CHUNK)
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def copy_all(self) -> None:
        """Queue a copy of every chunk."""
        with torch.cuda.stream(self.stream):
            for chunk in self._chunks:
                self._target.copy_(chunk, non_blocking=True)

    @property
    def busy(self) -> bool:
        """Whether what was started has not ended."""
        return not self.marks[1].query()

    def gbps(self) -> float:
        """Wait for what was started; return its rate, 10^9 bytes/s."""
        self.stream.synchronize()
        return _ROUNDS * _CHUNKS * _CHUNK / (self.marks[0].elapsed_time(self.marks[1]) / 1e3) / 1e9


@contextmanager
def lane(device: torch.device) -> Iterator[Lane]:
    """Yield the copies of a GPU.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    with memory_near(device, _CHUNK * _CHUNKS, 1) as memory:
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
    for number in range(_WARM_ROUNDS + _ROUNDS):
        for each in lanes:
            if number == _WARM_ROUNDS:
                each.marks[0].record(each.stream)
            each.copy_all()
    for each in lanes:
        each.marks[1].record(each.stream)


def _rates(lanes: Sequence[Lane]) -> list[float]:
    """Return what each lane carries while all of these do."""
    start(lanes)
    return [each.gbps() for each in lanes]


def _sum_s(count: int, nbytes: int, lanes: Sequence[Lane]) -> float:
    """Return the seconds of one sum of many, while these lanes copy."""
    parts = [torch.ones(nbytes // 2, dtype=torch.bfloat16, device=f"cuda:{index}") for index in range(count)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.nccl.all_reduce(parts)  # which makes NCCL's rings
    for index in range(count):
        torch.cuda.synchronize(index)
    for _ in range(_ROUNDS if lanes else 0):
        for each in lanes:
            each.copy_all()
    with torch.cuda.device(0):
        begin.record()
        for _ in range(_SUMS):
            torch.cuda.nccl.all_reduce(parts)
        end.record()
    end.synchronize()
    for each in lanes:
        each.stream.synchronize()
    return begin.elapsed_time(end) / 1e3 / _SUMS
