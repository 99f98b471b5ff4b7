"""The CUDA copy engine: one copy stream, an event per unit for its arrival and one for its release.

All waits are the device's: a copy waits for the release event of the unit that lay there, compute waits for the ready
event of the unit it reads, and the host only issues. Units on disk arrive by a second copy stream, fed by the threads
that read them into page-locked buffers; there the host waits, if a unit's bytes have not come from the disk yet.

Shared with ROCm builds of torch, whose streams and events have the same names.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from djinn.planning.ring import Slot
from djinn.transport.arena import PinnedMemory
from djinn.transport.copier import Source, reading_lane
from djinn.transport.feeder import Feeder, Fill
from djinn.transport.memcpy import Command, prepare
from djinn.transport.reader import THREADS, Buffer, Piece, Reader, pieces
from djinn.transport.stats import Interval, Stats
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit

STAGING_BUFFERS = THREADS
"""Page-locked buffers between disk and link: one for every reading thread; copying one takes a tenth of reading it."""


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
        self._device_index = ring.device.index if ring.device.index is not None else torch.cuda.current_device()
        self._compute: dict[int, torch.cuda.Stream] = {}
        self._computing: torch.cuda.Stream | None = None
        self._ready = [torch.cuda.Event() for _ in sources]
        self._free = [torch.cuda.Event() for _ in sources]
        self._targets = [ring[slot.offset : slot.offset + slot.nbytes] for slot in slots]
        self._issue = [
            prepare(_commands(target, source.image, reader.chunk_bytes), page_locked=stats.page_locked)
            if source.image is not None
            else None
            for source, target in zip(sources, self._targets, strict=True)
        ]
        self.disk: _DiskStream | None = None
        if any(source.image is None for source in sources):
            self.disk = _DiskStream(ring.device, reader)
        self._trace = _Trace(stats) if stats.traced else None

    def submit(self, unit: int, after: int | None) -> None:
        issue = self._issue[unit]
        if issue is None:
            assert self.disk is not None
            release = None if after is None else self._free[after]
            self.disk.submit(self._sources[unit].unit, self._targets[unit], self._ready[unit], release)
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
        if self.disk is not None:
            self.disk.wait(source.unit)
        self._stats.count_copy(source.unit.weight_bytes, from_disk=source.image is None)
        compute = self._compute_stream()
        if self._trace is not None:
            self._trace.mark(unit, "arrive", compute)
        compute.wait_event(self._ready[unit])
        if self._trace is not None:
            self._trace.mark(unit, "compute_start", compute)

    def release(self, unit: int) -> None:
        compute = self._compute_stream()
        if self._trace is not None:
            self._trace.mark(unit, "compute_end", compute)
            self._trace.close_visit(unit, self._sources[unit])
        self._free[unit].record(compute)

    def decode(self, unit: Unit, decode: Callable[[], None]) -> None:
        compute = self._compute_stream()
        if self._trace is None:
            decode()
        else:
            self._trace.around(unit, decode, compute)

    def _compute_stream(self) -> torch.cuda.Stream:
        """Return the stream that the caller computes on; never asked for in a copy stream's context.

        ``torch.cuda.current_stream`` makes a new object each time, which takes longer than all else in a hook.
        """
        handle = torch._C._cuda_getCurrentRawStream(self._device_index)
        if handle not in self._compute:
            self._compute[handle] = torch.cuda.current_stream(self.ring.device)
        stream = self._compute[handle]
        if stream is not self._computing:
            # A thread may compute on a stream of its own; one release stands for all before it only in one order.
            if self._computing is not None:
                stream.wait_stream(self._computing)
            self._computing = stream
        return stream

    def settle(self) -> None:
        if self.disk is not None:
            self.disk.settle()
        self.stream.wait_stream(self._compute_stream())
        if self.disk is not None:
            # The two copy streams too: what one still has under way must not land on what the other copies next.
            self.stream.wait_stream(self.disk.stream)
            self.disk.stream.wait_stream(self.stream)

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


@dataclass
class _Staging:
    """A page-locked buffer, and the event after which it may be written again."""

    buffer: Buffer
    copied: torch.cuda.Event


class _DiskStream:
    """Reads units from disk into page-locked buffers on threads, and copies each piece on as soon as it is there."""

    def __init__(self, device: torch.device, reader: Reader) -> None:
        self._reader = reader
        self.stream = torch.cuda.Stream(device)
        self._fills: dict[str, Fill] = {}
        self._feeder = Feeder(reader)
        self._lock = threading.Lock()
        size = reader.chunk_bytes + 2 * PAGE
        self._memory = PinnedMemory(STAGING_BUFFERS * size)
        self._memory.buffer[::PAGE] = 0
        self._memory.pin()
        self._free: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        for number in range(STAGING_BUFFERS):
            self._free.put(_Staging(self._memory.buffer[number * size : (number + 1) * size], torch.cuda.Event()))

    def submit(
        self, unit: Unit, target: torch.Tensor, ready: torch.cuda.Event, release: torch.cuda.Event | None
    ) -> None:
        """Start reading ``unit`` into its slot after ``release``; ``ready`` is recorded behind its last piece."""
        fill = self._fills[unit.name] = Fill()
        cut = pieces(unit, self._reader.chunk_bytes)
        self._feeder.begin(fill, [partial(self._move, piece, target, ready, release) for piece in cut])

    def _move(
        self, piece: Piece, target: torch.Tensor, ready: torch.cuda.Event, release: torch.cuda.Event | None
    ) -> float:
        with self._staging() as staging:
            staging.copied.synchronize()
            shift = piece.offset // PAGE * PAGE
            start = piece.offset - shift
            self._reader.read(replace(piece, offset=start), staging.buffer)
            source = torch.from_numpy(staging.buffer[start : start + piece.nbytes])
            with self._lock, torch.cuda.stream(self.stream):
                if release is not None:
                    self.stream.wait_event(release)
                target[piece.offset : piece.offset + piece.nbytes].copy_(source, non_blocking=True)
                staging.copied.record(self.stream)
                # All pieces go through one stream, so the event behind the last one issued is behind them all.
                ready.record(self.stream)
        return time.perf_counter()

    @contextmanager
    def _staging(self) -> Iterator[_Staging]:
        staging = self._free.get()
        try:
            yield staging
        finally:
            self._free.put(staging)

    def wait(self, unit: Unit) -> None:
        fill = self._fills.get(unit.name)
        if fill is not None:
            fill.wait()

    def settle(self) -> None:
        self._feeder.settle()

    def close(self) -> None:
        self._feeder.close()
        self._memory.close()


class _Trace:
    """Timing events of the visits, turned into intervals once the device is idle."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record()
        self._open: dict[int, dict[str, torch.cuda.Event]] = {}
        self._closed: list[tuple[Source, dict[str, torch.cuda.Event]]] = []
        self._decoded: list[tuple[Unit, torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self, unit: int, what: str, stream: torch.cuda.Stream) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        if what == "copy_start":
            self._open[unit] = {}
        self._open.setdefault(unit, {})[what] = event

    def close_visit(self, unit: int, source: Source) -> None:
        self._closed.append((source, self._open.pop(unit, {})))

    def around(self, unit: Unit, decode: Callable[[], None], stream: torch.cuda.Stream) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        decode()
        end.record(stream)
        self._decoded.append((unit, begin, end))

    def resolve(self) -> None:
        for unit, begin, end in self._decoded:
            start_s, end_s = (self._zero.elapsed_time(event) / 1e3 for event in (begin, end))
            self._stats.add(Interval("decode", unit.name, start_s, end_s, unit.weight_bytes))
        self._decoded.clear()
        for source, events in self._closed:
            at = {what: self._zero.elapsed_time(event) / 1e3 for what, event in events.items()}
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
