"""The copy engine of a CPU: threads copy, or read from disk, into a ring of host memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from djinn.planning.ring import Slot
from djinn.transport.copier import Source, reading_lane
from djinn.transport.feeder import Feeder, Fill
from djinn.transport.reader import Buffer, Piece, Reader, pieces
from djinn.transport.stats import Interval, Stats
from djinn.weights.units import Unit


class PieceMover:
    """Puts pieces where they belong, on whatever thread asks for it."""

    _reader: Reader

    def _move(self, piece: Piece, image: Buffer | None, target: Buffer) -> float:
        """Copy a piece from the image that it waits in, or without one read it; return when that ended."""
        if image is None:
            self._reader.read(piece, target)
        else:
            end = piece.offset + piece.nbytes
            np.copyto(target[piece.offset : end], image[piece.offset : end])
        return time.perf_counter()


class CpuCopier(PieceMover):
    """Copies on threads; the ring is host memory, and compute is done when its call returns.

    A unit on disk is read straight into its slot, several units at a time, so that the disk always has a full queue.
    """

    def __init__(
        self, sources: list[Source], slots: tuple[Slot, ...], ring: Buffer, reader: Reader, stats: Stats
    ) -> None:
        self._sources = sources
        self.slots = slots
        self._reader = reader
        self._stats = stats
        self.fills: dict[int, Fill] = {}
        self._feeder = Feeder(reader)
        self._read_from: dict[int, float] = {}
        self._decoded_at: dict[str, float] = {}
        self._ring = ring
        self.ring = torch.from_numpy(ring)

    def submit(self, unit: int, after: int | None) -> None:
        source, slot = self._sources[unit], self.slots[unit]
        target = self._ring[slot.offset : slot.offset + slot.nbytes]
        fill = self.fills[unit] = Fill()
        cut = pieces(source.unit, self._reader.chunk_bytes)
        self._feeder.begin(fill, [partial(self._move, piece, source.image, target) for piece in cut])

    def wait(self, unit: int) -> None:
        fill, source = self.fills[unit], self._sources[unit]
        begin = time.perf_counter()
        late = not fill.done
        end = fill.wait()
        now = time.perf_counter()
        nbytes = source.unit.weight_bytes
        self._stats.count_copy(nbytes, from_disk=source.image is None)
        self._stats.add(Interval("copy", source.unit.name, fill.start_s, end, nbytes))
        if late:
            cause = "disk" if source.image is None else "link"
            self._stats.stall_s += now - begin
            self._stats.add(Interval("stall", source.unit.name, begin, now, nbytes, cause))
        self._read_from[unit] = now

    def release(self, unit: int) -> None:
        begin = self._read_from.pop(unit, None)
        if begin is not None:
            source, now = self._sources[unit], time.perf_counter()
            lane = reading_lane(source.unit)
            self._stats.add(Interval(lane, source.unit.name, begin, now, source.unit.weight_bytes))
            if lane == "decode":
                self._decoded_at[source.unit.name] = now

    def decode(self, unit: Unit, decode: Callable[[], None]) -> None:
        begin = time.perf_counter()
        decode()
        now = self._decoded_at[unit.name] = time.perf_counter()
        self._stats.add(Interval("decode", unit.name, begin, now, unit.weight_bytes))

    def computed(self, unit: Unit) -> None:
        begin = self._decoded_at.pop(unit.name, None)
        if begin is not None:
            self._stats.add(Interval("compute", unit.name, begin, time.perf_counter(), unit.weight_bytes))

    def settle(self) -> None:
        self._feeder.settle()

    def bare_rate(self) -> None:
        """Return None: see :class:`~djinn.transport.copier.Copier`."""

    def resolve_timeline(self) -> None:
        """Nothing to do: intervals are added as they end."""

    def close(self) -> None:
        self._feeder.close()
        self.fills.clear()
        self.ring = torch.empty(0, dtype=torch.uint8)
