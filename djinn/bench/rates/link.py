"""How fast this machine copies into and out of device memory, by chunk size: the ceiling of every streamed pass.

On a GPU the copies run on one stream between two events, from and to page-locked or pageable host memory. Without
a GPU there is no such link (the disk is; see :mod:`djinn.bench.rates.disk`), and what is measured is the copy from host
memory into the ring, called ``memcpy``. Rates are medians in bytes per second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from djinn.errors import PlanError
from djinn.sizes import Count
from djinn.transport.arena import PinnedMemory

Kind = Literal["pinned to device", "pageable to device", "device to pinned", "memcpy"]

_NBYTES = 256 * 2**20
_REPEATS = 7
_WARM_S = 0.25
"""An idle link runs at half its rate for about 20 ms, and below its best for some time more; it is kept busy for
longer than that before it is timed."""


class LinkRate(BaseModel):
    """One measured rate, in 10^9 bytes/s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    chunk_bytes: Count
    gbps: float = Field(gt=0, le=10**9)


def rates(chunks: Sequence[int]) -> list[LinkRate]:
    """Measure every kind of copy that this machine has, at each chunk size in bytes."""
    kinds: dict[Kind, Callable[[int], float]]
    if torch.cuda.is_available():
        kinds = {
            "pinned to device": pinned_h2d_rate,
            "pageable to device": pageable_h2d_rate,
            "device to pinned": d2h_rate,
        }
    else:
        kinds = {"memcpy": memcpy_rate}
    return [
        LinkRate(kind=kind, chunk_bytes=chunk, gbps=measure(chunk) / 1e9)
        for kind, measure in kinds.items()
        for chunk in chunks
    ]


def pinned_h2d_rate(chunk_bytes: int, nbytes: int = _NBYTES) -> float:
    """Return the rate of copies from page-locked host memory to the current CUDA device, in bytes/s.

    ``nbytes`` of host memory are copied chunk by chunk into one chunk of device memory, so that it can be measured
    beside a model that has taken its budget.

    Raises:
        PlanError: the driver refuses to page-lock the memory.
    """
    with _page_locked(_whole(chunk_bytes, nbytes)) as host:
        device = torch.empty(chunk_bytes, dtype=torch.uint8, device="cuda")
        return _cuda_rate([(device, chunk) for chunk in host.split(chunk_bytes)])


def pageable_h2d_rate(chunk_bytes: int, nbytes: int = _NBYTES) -> float:
    """Return the rate of copies from ordinary host memory to the current CUDA device, in bytes/s."""
    host = torch.ones(_whole(chunk_bytes, nbytes), dtype=torch.uint8)
    device = torch.empty(chunk_bytes, dtype=torch.uint8, device="cuda")
    return _cuda_rate([(device, chunk) for chunk in host.split(chunk_bytes)])


def d2h_rate(chunk_bytes: int, nbytes: int = _NBYTES) -> float:
    """Return the rate of copies from the current CUDA device to page-locked host memory, in bytes/s.

    Raises:
        PlanError: the driver refuses to page-lock the memory.
    """
    with _page_locked(_whole(chunk_bytes, nbytes)) as host:
        device = torch.ones(chunk_bytes, dtype=torch.uint8, device="cuda")
        return _cuda_rate([(chunk, device) for chunk in host.split(chunk_bytes)])


def memcpy_rate(chunk_bytes: int, nbytes: int = _NBYTES) -> float:
    """Return the rate of one thread's copies from host memory into a ring of one chunk in host memory, in bytes/s."""
    ring = np.ones(chunk_bytes, dtype=np.uint8)
    chunks = np.ones(_whole(chunk_bytes, nbytes), dtype=np.uint8).reshape(-1, chunk_bytes)
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for chunk in chunks:
            np.copyto(ring, chunk)
        seconds.append(time.perf_counter() - begun)
    return chunks.nbytes / statistics.median(seconds)


def _whole(chunk_bytes: int, nbytes: int) -> int:
    return max(1, nbytes // chunk_bytes) * chunk_bytes


@contextmanager
def _page_locked(nbytes: int) -> Iterator[Tensor]:
    """Yield exactly ``nbytes`` of page-locked host memory, uint8, written to; given back when the block ends."""
    memory = PinnedMemory(nbytes)
    memory.buffer[:] = 1
    try:
        if not memory.pin():
            raise PlanError("host memory: the link's rate cannot be measured without page-locked memory")
        yield torch.from_numpy(memory.buffer)
    finally:
        torch.cuda.synchronize()
        memory.close()


def _cuda_rate(copies: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Time all ``(target, source)`` copies, repeatedly, on a stream of their own; return the median in bytes/s."""

    def copy_all() -> None:
        for target, source in copies:
            target.copy_(source, non_blocking=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the buffers were written on the current stream
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    with torch.cuda.stream(stream):
        begun = time.perf_counter()
        while time.perf_counter() - begun < _WARM_S:
            copy_all()
            stream.synchronize()
        # One more untimed round covers the time in which the timed ones are queued: no gap, no host wait between.
        copy_all()
        marks[0].record()
        for mark in marks[1:]:
            copy_all()
            mark.record()
    stream.synchronize()
    seconds = statistics.median(earlier.elapsed_time(later) for earlier, later in pairwise(marks)) / 1e3
    return sum(source.nbytes for _, source in copies) / seconds
