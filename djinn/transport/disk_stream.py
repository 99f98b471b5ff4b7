"""From disk to a GPU: threads read into page-locked buffers, and each piece goes on as soon as it is there."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from djinn.transport.arena import PinnedMemory
from djinn.transport.feeder import Feeder, Fill
from djinn.transport.reader import THREADS, Buffer, Piece, Reader, piece_bytes, pieces
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit

STAGING_BUFFERS = THREADS
"""Page-locked buffers between disk and link: one for every reading thread; copying one takes a tenth of reading it."""


def staging_bytes(chunk_bytes: int) -> int:
    """Return the host memory that a stream takes: a buffer each for pieces and what else is on their outer pages."""
    return STAGING_BUFFERS * (piece_bytes(chunk_bytes) + 2 * PAGE)


@dataclass
class _Staging:
    """A page-locked buffer, and the event after which it may be written again."""

    buffer: Buffer
    copied: torch.cuda.Event


class DiskStream:
    """Reads units from disk into page-locked buffers on threads, and copies each piece on as soon as it is there."""

    def __init__(self, device: torch.device, reader: Reader) -> None:
        self._reader = reader
        self.stream = torch.cuda.Stream(device)
        self._feeder = Feeder(reader)
        self._lock = threading.Lock()
        self._memory = PinnedMemory(staging_bytes(reader.chunk_bytes))
        size = self._memory.buffer.nbytes // STAGING_BUFFERS
        self._memory.buffer[::PAGE] = 0
        self._memory.pin()
        self._free: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        for number in range(STAGING_BUFFERS):
            self._free.put(_Staging(self._memory.buffer[number * size : (number + 1) * size], torch.cuda.Event()))

    def submit(
        self, unit: Unit, target: torch.Tensor, ready: torch.cuda.Event, release: torch.cuda.Event | None
    ) -> Fill:
        """Start reading ``unit`` into a slot after ``release``; ``ready`` is recorded behind its last piece.

        What is returned ends when that piece has been issued.
        """
        fill = Fill()
        cut = pieces(unit, self._reader.chunk_bytes)
        self._feeder.begin(fill, [partial(self._move, piece, target, ready, release) for piece in cut])
        return fill

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

    def settle(self) -> None:
        self._feeder.settle()

    def close(self) -> None:
        self._feeder.close()
        self._memory.close()
