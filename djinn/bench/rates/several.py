"""How fast the links of several GPUs are, alone and at once, and how long they take to add up what each has.

One process measures: copies run on a stream of each GPU between two events, from host memory that threads on the GPU's
own NUMA node have touched. What links carry at once shows whether they share something: a root port, or host memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from pydantic import BaseModel, ConfigDict, Field

from djinn.sizes import Count
from djinn.transport.lane import Lane, lane, start

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
    for _ in range(min((each.rounds for each in lanes), default=0)):
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
