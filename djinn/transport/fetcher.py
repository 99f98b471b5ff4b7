"""Fetching experts into the pool: what is asked for now arrives as soon as it can. On a CPU; and what a GPU's does too.

Unlike the ring's copies these are not known beforehand: which expert goes to which slot is decided in each pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from djinn.transport.copier import Source
from djinn.transport.cpu import PieceMover
from djinn.transport.feeder import Feeder, Fill
from djinn.transport.reader import Buffer, Reader, pieces
from djinn.transport.stats import Interval, Stats


class Arrival(NamedTuple):
    """An expert, or some of its tensors, and the slot that they go to."""

    source: Source
    slot: int


@dataclass
class Fetch:
    """What was asked for in one call and is on its way."""

    arrivals: Sequence[Arrival]
    within: Sequence[tuple[int, int]]
    done: Any = None
    """What the fetcher knows its end by."""
    begin: Any = None
    """What it knows its begin by, where a timeline is kept."""
    start_s: float = field(default_factory=time.perf_counter)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that arrive."""
        return sum(arrival.source.unit.weight_bytes for arrival in self.arrivals)

    def count(self, stats: Stats) -> None:
        """Count what has arrived."""
        for arrival in self.arrivals:
            stats.count_copy(arrival.source.unit.weight_bytes, from_disk=arrival.source.image is None)

    @property
    def name(self) -> str:
        """Of its module, for the timeline."""
        return self.arrivals[0].source.unit.readers[0] if self.arrivals else ""

    @property
    def cause(self) -> str:
        """What a stall for it waits for."""
        return "disk" if any(arrival.source.image is None for arrival in self.arrivals) else "link"


class Fetcher(Protocol):
    """What brings experts into the pool."""

    pool: torch.Tensor
    """uint8 [slots, slot_bytes], on the device."""

    def fetch(self, arrivals: Sequence[Arrival], within: Sequence[tuple[int, int]], after: Any = None) -> Fetch:
        """Start copying ``arrivals``, then from slot to slot ``within`` the pool.

        Nothing reads the slots that they go to once ``after`` is over; without it, nothing reads them now.
        """
        ...

    def wait(self, fetch: Fetch) -> None:
        """Make the compute that follows wait until all of it is there.

        Raises:
            CheckpointError: bytes that cannot be read.
        """
        ...

    def follow(self) -> None:
        """Note on which stream compute goes on; it then goes on behind all that was issued on another before."""
        ...

    def mark(self) -> Any:
        """Return what stands for the end of all compute that has been issued, for ``after``."""
        ...

    def clock(self) -> float:
        """Return the time, in seconds, when all that was asked for has arrived."""
        ...

    def settle(self) -> None:
        """Let copies under way end, well or badly, and no later one begin before compute issued so far has ended."""
        ...

    def resolve_timeline(self) -> None:
        """Bring ``stats.timeline`` up to date."""
        ...

    def close(self) -> None:
        """Wait for copies under way and free the pool."""
        ...


class CpuFetcher(PieceMover):
    """Copies on threads, or reads from disk; the pool is host memory, and compute is done when its call returns."""

    def __init__(self, pool: Buffer, reader: Reader, stats: Stats) -> None:
        self._slots = pool
        self.pool = torch.from_numpy(pool)
        self._reader = reader
        self._stats = stats
        self._feeder = Feeder(reader)

    def fetch(self, arrivals: Sequence[Arrival], within: Sequence[tuple[int, int]], after: Any = None) -> Fetch:
        moves = [
            partial(self._move, piece, source.image, self._slots[slot])
            for source, slot in arrivals
            for piece in pieces(source.unit, self._reader.chunk_bytes)
        ]
        fetch = Fetch(arrivals, within, Fill())
        if moves:
            self._feeder.begin(fetch.done, moves)
        else:
            fetch.done.end()
        return fetch

    def wait(self, fetch: Fetch) -> None:
        begin, late = time.perf_counter(), not fetch.done.done
        end = fetch.done.wait()
        for source, target in fetch.within:
            np.copyto(self._slots[target], self._slots[source])
        fetch.count(self._stats)
        if not fetch.arrivals:
            return
        now = time.perf_counter()
        self._stats.add(Interval("copy", fetch.name, fetch.start_s, end, fetch.nbytes))
        if late:
            self._stats.stall_s += now - begin
            self._stats.add(Interval("stall", fetch.name, begin, now, fetch.nbytes, fetch.cause))

    def follow(self) -> None:
        """Nothing to do: compute is done when its call returns."""

    def mark(self) -> None:
        """Nothing: compute is done when its call returns."""

    def clock(self) -> float:
        self._feeder.settle()
        return time.perf_counter()

    def settle(self) -> None:
        self._feeder.settle()

    def resolve_timeline(self) -> None:
        """Nothing to do: intervals are added as they end."""

    def close(self) -> None:
        self._feeder.close()
        self._slots = np.empty((0, 0), np.uint8)
        self.pool = torch.empty(0, dtype=torch.uint8)
