"""Fetching experts into a pool on a CUDA device: a copy stream of its own, and an event behind each call's copies.

All copies of a call that come from host memory are issued at once. The ring's copies have another stream, so that an
expert that is needed now does not queue behind what will be needed later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from djinn.transport.compute_stream import ComputeStream
from djinn.transport.copier import Source
from djinn.transport.disk_stream import DiskStream
from djinn.transport.feeder import Fill
from djinn.transport.fetcher import Arrival, Fetch
from djinn.transport.memcpy import Command, prepare
from djinn.transport.reader import Reader
from djinn.transport.stats import Interval, Stats


@dataclass
class _Ready:
    """Behind which event each of a call's copies ends."""

    link: torch.cuda.Event
    disk: list[tuple[Fill, torch.cuda.Event]]
    """Of each arrival from disk; its event stands for all of it once the copies have been issued, which is the fill."""


class CudaFetcher:
    """Copies experts from the arena, and from disk, into a pool on a CUDA device.

    Args:
        pool: uint8 [slots, slot_bytes] on the device.
        reader: reads experts on disk.
        on_disk: whether any expert is.
        zero: of the timeline; None where none is kept.
    """

    def __init__(
        self, pool: torch.Tensor, reader: Reader, stats: Stats, *, on_disk: bool, zero: torch.cuda.Event | None
    ) -> None:
        self.pool = pool
        self._start, self._slot_bytes = pool.data_ptr(), pool.shape[1]
        self.stream = torch.cuda.Stream(pool.device)
        self._compute = ComputeStream(pool.device)
        self._stats = stats
        self._zero = zero
        self._disk = DiskStream(pool.device, reader) if on_disk else None
        self._spare: list[torch.cuda.Event] = []
        self._arrived: list[tuple[Fetch, tuple[torch.cuda.Event, ...]]] = []

    def fetch(
        self, arrivals: Sequence[Arrival], within: Sequence[tuple[int, int]], after: torch.cuda.Event | None = None
    ) -> Fetch:
        if after is not None:
            self.stream.wait_event(after)
        ready = _Ready(self._spare.pop() if self._spare else torch.cuda.Event(), [])
        fetch = Fetch(arrivals, within, ready)
        if self._zero is not None:
            fetch.begin = torch.cuda.Event(enable_timing=True)
            fetch.begin.record(self.stream)
            ready.link = torch.cuda.Event(enable_timing=True)
        commands = [self._command(source, slot) for source, slot in arrivals if source.image is not None]
        if commands:
            prepare(commands, page_locked=self._stats.page_locked)(self.stream.cuda_stream)
        for arrival in arrivals:
            if arrival.source.image is None:
                assert self._disk is not None
                event = torch.cuda.Event()
                fill = self._disk.submit(arrival.source.unit, self.pool[arrival.slot], event, after)
                ready.disk.append((fill, event))
        if within:
            with torch.cuda.stream(self.stream):
                for source, target in within:
                    self.pool[target].copy_(self.pool[source], non_blocking=True)
        ready.link.record(self.stream)
        return fetch

    def _command(self, source: Source, slot: int) -> Command:
        host, offset, nbytes = source.stretch
        return self._start + slot * self._slot_bytes + offset, host, nbytes

    def wait(self, fetch: Fetch) -> None:
        compute, ready = self._compute.stream(), fetch.done
        for fill, _ in ready.disk:
            fill.wait()
        marks = None
        if fetch.begin is not None:
            marks = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            marks[0].record(compute)
        for event in (ready.link, *(event for _, event in ready.disk)):
            compute.wait_event(event)
        if self._zero is None:
            self._spare.append(ready.link)  # what waits for it waits for what it stood for
        if marks is not None:
            marks[1].record(compute)
            if fetch.arrivals:
                self._arrived.append((fetch, marks))
        fetch.count(self._stats)

    def follow(self) -> None:
        self._compute.stream()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._compute.stream())
        return event

    def clock(self) -> float:
        if self._disk is not None:
            self._disk.settle()
        torch.cuda.synchronize(self.pool.device)
        return time.perf_counter()

    def settle(self) -> None:
        if self._disk is not None:
            self._disk.settle()
        self.stream.wait_stream(self._compute.stream())
        if self._disk is not None:
            # What one of the two still has under way must not land on what the other copies next.
            self.stream.wait_stream(self._disk.stream)
            self._disk.stream.wait_stream(self.stream)

    def resolve_timeline(self) -> None:
        """Turn the events recorded so far into intervals; waits for the device."""
        if self._zero is None:
            return
        torch.cuda.synchronize(self.pool.device)
        zero = self._zero
        for fetch, marks in self._arrived:
            events = (fetch.begin, fetch.done.link, *marks)
            begin, end, asked, there = (zero.elapsed_time(event) / 1e3 for event in events)
            self._stats.add(Interval("copy", fetch.name, begin, end, fetch.nbytes))
            self._stats.stall_s += there - asked
            self._stats.add(Interval("stall", fetch.name, asked, there, fetch.nbytes, fetch.cause))
        self._arrived.clear()

    def close(self) -> None:
        if self._disk is not None:
            self._disk.settle()
        torch.cuda.synchronize(self.pool.device)
        if self._disk is not None:
            self._disk.close()
        self.pool = torch.empty(0, dtype=torch.uint8)
