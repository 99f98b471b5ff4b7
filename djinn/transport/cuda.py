"""The CUDA copy engine: one copy stream, an event per unit for its arrival and one for its release.

All waits are the device's: a copy waits for the release event of the unit that lay there, compute waits for the ready
event of the unit it reads, and the host only issues. Units on disk arrive by a second copy stream, fed by the threads
that read them into page-locked buffers; there the host waits, if a unit's bytes have not come from the disk yet.

Shared with ROCm builds of torch, whose streams and events have the same names.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from djinn.planning.ring import Slot
from djinn.transport.compute_stream import ComputeStream
from djinn.transport.copier import Source, reading_lane
from djinn.transport.disk_stream import DiskStream
from djinn.transport.feeder import Fill
from djinn.transport.memcpy import Command, prepare
from djinn.transport.reader import Buffer, Reader
from djinn.transport.stats import Interval, Lane, Stats
from djinn.weights.units import Unit

_BARE_BYTES = 8 * 10**9
"""The least that is copied bare to time it, and as much before it untimed: an idle link runs at half its rate for about
20 ms, and below its best for some time more. Of a larger arena all is timed, since its rate depends on the place."""
_MOST_ROUNDS = 100
"""Of a small arena, whose rate is that of issuing copies."""


class CudaCopier:
    """Copies units from the arena, and from disk, to a ring on a CUDA device.

    Args:
        sources: what each streamed unit is copied from, in order of visits.
        slots: where each goes.
        ring: uint8 tensor on the device.
        reader: reads units on disk; a copy command moves as much as one of its reads.
    """

    def __init__(
        self,
        sources: list[Source],
        slots: tuple[Slot, ...],
        ring: torch.Tensor,
        reader: Reader,
        stats: Stats,
    ) -> None:
        self.ring = ring
        self._sources = sources
        self._stats = stats
        self.stream = torch.cuda.Stream(ring.device)
        self._compute = ComputeStream(ring.device)
        self._ready = [torch.cuda.Event() for _ in sources]
        self._free = [torch.cuda.Event() for _ in sources]
        self._targets = [ring[slot.offset : slot.offset + slot.nbytes] for slot in slots]
        self._issue = [
            prepare(_commands(target, source.image, reader.chunk_bytes), page_locked=stats.page_locked)
            if source.image is not None
            else None
            for source, target in zip(sources, self._targets, strict=True)
        ]
        self.disk: DiskStream | None = None
        self._from_disk: dict[int, Fill] = {}
        """By unit, its last reading."""
        if any(source.image is None for source in sources):
            self.disk = DiskStream(ring.device, reader)
        self._trace = _Trace(stats, self._compute.stream()) if stats.traced else None

    @property
    def zero(self) -> torch.cuda.Event | None:
        """The zero of the timeline; None where none is kept."""
        return None if self._trace is None else self._trace.zero

    def submit(self, unit: int, after: int | None) -> None:
        issue = self._issue[unit]
        if issue is None:
            assert self.disk is not None
            release = None if after is None else self._free[after]
            source = self._sources[unit].unit
            self._from_disk[unit] = self.disk.submit(source, self._targets[unit], self._ready[unit], release)
            return
        stream = self.stream
        if after is not None:
            stream.wait_event(self._free[after])
        if self._trace is not None:
            self._trace.mark(unit, "copy_start", stream)
        issue(stream.cuda_stream)
        if self._trace is not None:
            self._trace.mark(unit, "copy_end", stream)
        self._ready[unit].record(stream)

    def wait(self, unit: int) -> None:
        source = self._sources[unit]
        if unit in self._from_disk:
            self._from_disk[unit].wait()
        self._stats.count_copy(source.unit.weight_bytes, from_disk=source.image is None)
        compute = self._compute.stream()
        if self._trace is not None:
            self._trace.mark(unit, "arrive", compute)
        compute.wait_event(self._ready[unit])
        if self._trace is not None:
            self._trace.mark(unit, "compute_start", compute)

    def release(self, unit: int) -> None:
        compute = self._compute.stream()
        if self._trace is not None:
            self._trace.mark(unit, "compute_end", compute)
            self._trace.close_visit(unit, self._sources[unit])
        self._free[unit].record(compute)

    def decode(self, unit: Unit, decode: Callable[[], None]) -> None:
        compute = self._compute.stream()
        if self._trace is None:
            decode()
        else:
            self._trace.around(unit, decode, compute)

    def computed(self, unit: Unit) -> None:
        if self._trace is not None:
            self._trace.computed(unit, self._compute.stream())

    def settle(self) -> None:
        if self.disk is not None:
            self.disk.settle()
        self.stream.wait_stream(self._compute.stream())
        if self.disk is not None:
            # The two copy streams too: what one still has under way must not land on what the other copies next.
            self.stream.wait_stream(self.disk.stream)
            self.disk.stream.wait_stream(self.stream)

    def bare_rate(self) -> float | None:
        copies = [
            (issue, source.image.nbytes)
            for issue, source in zip(self._issue, self._sources, strict=True)
            if issue is not None and source.image is not None
        ]
        if not copies:
            return None
        once = sum(nbytes for _, nbytes in copies)
        rounds = min(-(-_BARE_BYTES // once), _MOST_ROUNDS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        warmed = 0
        for issue, nbytes in copies * rounds:
            issue(self.stream.cuda_stream)
            warmed += nbytes
            if warmed >= _BARE_BYTES:
                break
        begin.record(self.stream)
        for issue, _ in copies * rounds:
            issue(self.stream.cuda_stream)
        end.record(self.stream)
        end.synchronize()
        return rounds * once / (begin.elapsed_time(end) / 1e3)

    def resolve_timeline(self) -> None:
        """Turn the events recorded so far into intervals; waits for the device.

        Event pairs cost host time, so they are kept only while ``stats.traced``.
        """
        if self._trace is not None:
            torch.cuda.synchronize(self.ring.device)
            self._trace.resolve()

    def close(self) -> None:
        if self.disk is not None:
            self.disk.settle()
        torch.cuda.synchronize(self.ring.device)
        if self.disk is not None:
            self.disk.close()
        self._issue.clear()
        self.ring = torch.empty(0, dtype=torch.uint8)


def _commands(target: torch.Tensor, image: Buffer, chunk_bytes: int) -> list[Command]:
    """Return a unit's copy commands, each of at most ``chunk_bytes``; made once, not in hooks."""
    starts = range(0, image.nbytes, chunk_bytes)
    return [
        (target.data_ptr() + start, image.ctypes.data + start, min(chunk_bytes, image.nbytes - start))
        for start in starts
    ]


class _Trace:
    """Timing events of the visits, turned into intervals once the device is idle."""

    def __init__(self, stats: Stats, stream: torch.cuda.Stream) -> None:
        self._stats = stats
        self.zero = torch.cuda.Event(enable_timing=True)
        self.zero.record(stream)  # of the ring's GPU, which need not be the current one
        self.zero.synchronize()
        stats.zero_s = time.perf_counter()
        self._open: dict[int, dict[str, torch.cuda.Event]] = {}
        self._closed: list[tuple[Source, dict[str, torch.cuda.Event]]] = []
        self._done: list[tuple[Lane, Unit, torch.cuda.Event, torch.cuda.Event]] = []
        """Decodings of residents, and the compute that reads what any unit was decoded to."""
        self._decoded_at: dict[str, torch.cuda.Event] = {}

    def mark(self, unit: int, what: str, stream: torch.cuda.Stream) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        if what == "copy_start":
            self._open[unit] = {}
        self._open.setdefault(unit, {})[what] = event

    def close_visit(self, unit: int, source: Source) -> None:
        events = self._open.pop(unit, {})
        self._closed.append((source, events))
        if source.unit.coded and "compute_end" in events:  # its slot has been read once it is decoded
            self._decoded_at[source.unit.name] = events["compute_end"]

    def around(self, unit: Unit, decode: Callable[[], None], stream: torch.cuda.Stream) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        decode()
        end.record(stream)
        self._done.append(("decode", unit, begin, end))
        self._decoded_at[unit.name] = end

    def computed(self, unit: Unit, stream: torch.cuda.Stream) -> None:
        begin = self._decoded_at.pop(unit.name, None)
        if begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(stream)
            self._done.append(("compute", unit, begin, end))

    def resolve(self) -> None:
        for lane, unit, begin, end in self._done:
            start_s, end_s = (self.zero.elapsed_time(event) / 1e3 for event in (begin, end))
            self._stats.add(Interval(lane, unit.name, start_s, end_s, unit.weight_bytes))
        self._done.clear()
        for source, events in self._closed:
            at = {what: self.zero.elapsed_time(event) / 1e3 for what, event in events.items()}
            name, nbytes = source.unit.name, source.unit.weight_bytes
            if "copy_start" in at:
                self._stats.add(Interval("copy", name, at["copy_start"], at["copy_end"], nbytes))
            if "compute_end" in at and "compute_start" in at:
                lane = reading_lane(source.unit)
                self._stats.add(Interval(lane, name, at["compute_start"], at["compute_end"], nbytes))
                stall = at["compute_start"] - at["arrive"]
                self._stats.stall_s += stall
                cause = "disk" if source.image is None else "link"
                self._stats.add(Interval("stall", name, at["arrive"], at["compute_start"], nbytes, cause))
        self._closed.clear()
