"""Parallel direct reads: a file's bytes go from the disk into their place in memory, past the page cache.

A direct read (O_DIRECT) wants file offset, memory address and length in whole pages. Where a tensor lies on its pages
in memory as it does in the file (see :func:`djinn.weights.units.find_units`), the disk writes it there itself; any
other tensor goes through an aligned buffer and one more copy. File systems without direct I/O are read buffered.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from djinn.errors import CheckpointError, UnavailableError
from djinn.weights import synthetic_values
from djinn.weights.tensors import PAGE, FileSpan, InMemory, Seeded, TensorEntry
from djinn.weights.units import Unit

Buffer = NDArray[np.uint8]

THREADS = 16
"""Reads in flight. A virtual disk's rate rose with the bytes in flight up to about 256 MiB: 16 of 16 MiB."""


def allocate(nbytes: int) -> Buffer:
    """Return exactly ``nbytes`` of zeroed anonymous memory, page-aligned, in huge pages where the kernel has them."""
    # Private, because memory that could be shared is kept in small pages: slow to touch, to lock and to copy from.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


@dataclass(frozen=True)
class Piece:
    """A part of one tensor: ``nbytes`` from its byte ``start``, which go to ``offset`` of the unit's image."""

    name: str
    entry: TensorEntry
    start: int
    nbytes: int
    offset: int
    shares_pages: bool = False
    """As of the tensor: see :class:`djinn.weights.units.PlacedTensor`."""


def piece_bytes(chunk_bytes: int) -> int:
    """Return the most bytes of a piece: whole pages."""
    return max(chunk_bytes // PAGE * PAGE, PAGE)


def pieces(unit: Unit, chunk_bytes: int) -> list[Piece]:
    """Cut a unit into pieces of at most ``chunk_bytes`` that no two reads share a page of."""
    cut = []
    for tensor in unit.stored:
        start = 0
        while start < tensor.entry.nbytes:
            # After the first piece, every cut is at the end of a page of the image.
            end = (tensor.offset + start + chunk_bytes) // PAGE * PAGE - tensor.offset
            end = min(max(end, start + 1), tensor.entry.nbytes)
            offset = tensor.offset + start
            cut.append(Piece(tensor.name, tensor.entry, start, end - start, offset, tensor.shares_pages))
            start = end
    return cut


class Filler(Protocol):
    """What makes images of units."""

    def fill(self, unit: Unit, image: Buffer) -> list[Future[int]]:
        """Start filling ``image`` (uint8, ``unit.image_bytes``, page-aligned); return futures of bytes."""
        ...


class Reader:
    """A pool of threads that fill images from files or seeds, and the files they keep open.

    The threads run on ``cpus`` alone, if given: memory lies on the NUMA node of the thread that touches it first.

    Raises:
        UnavailableError: the system starts no more threads.
    """

    def __init__(self, chunk_bytes: int, threads: int = THREADS, cpus: set[int] | None = None) -> None:
        self.chunk_bytes = piece_bytes(chunk_bytes)
        self.pool = ThreadPoolExecutor(threads, "djinn-reader", partial(run_on, cpus) if cpus else None)
        _start(self.pool, threads)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._bounce = threading.local()

    def fill(self, unit: Unit, image: Buffer) -> list[Future[int]]:
        """Start filling ``image`` (uint8, ``unit.image_bytes``, page-aligned); return a future per piece."""
        return [self.pool.submit(self.read, piece, image) for piece in pieces(unit, self.chunk_bytes)]

    def read(self, piece: Piece, image: Buffer) -> int:
        """Put one piece into its place in ``image``; return its bytes.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter than it was.
        """
        source = piece.entry.source
        if isinstance(source, FileSpan):
            self._read_file(piece, source, image)
        elif isinstance(source, Seeded):
            synthetic_values.fill(
                image[piece.offset : piece.offset + piece.nbytes],
                name=source.name,
                shape=source.whole or piece.entry.shape,
                dtype=piece.entry.dtype,
                seed=source.seed,
                start=source.start + piece.start,
            )
        elif isinstance(source, InMemory):
            target = torch.from_numpy(image[piece.offset : piece.offset + piece.nbytes])
            target.copy_(source.bytes[piece.start : piece.start + piece.nbytes])
        else:
            raise TypeError(f"tensor {piece.name} is coded while it is loaded, which a reader does not do")
        return piece.nbytes

    def _read_file(self, piece: Piece, source: FileSpan, image: Buffer) -> None:
        """Read a piece, directly where it lies on its pages in the image as in the file, and alone or on whole ones."""
        offset, nbytes, at = source.offset + piece.start, piece.nbytes, piece.offset
        low = offset // PAGE * PAGE
        span = -(-(offset + nbytes - low) // PAGE) * PAGE
        begin = at - (offset - low)
        alone = not piece.shares_pages or span == nbytes
        if alone and begin % PAGE == 0 and begin >= 0 and begin + span <= image.nbytes:
            self.read_pages(source.path, low, image[begin : begin + span], offset + nbytes - low)
        else:
            bounce = self._bounce_buffer(span)
            self.read_pages(source.path, low, bounce, offset + nbytes - low)
            np.copyto(image[at : at + nbytes], bounce[offset - low : offset - low + nbytes])

    def read_pages(self, path: Path, offset: int, target: Buffer, needed: int) -> None:
        """Read whole pages into ``target`` until the ``needed`` bytes are there (a file's last page may be short)."""
        done = 0
        try:
            file = self._open(path)
            while done < needed:
                count = os.preadv(file, [target[done:].data], offset + done)
                # A short direct read can only go on from a page; one that gains none has come to the end of the file.
                whole = (done + count) // PAGE * PAGE
                if done + count < needed and whole == done:
                    size = os.fstat(file).st_size
                    raise CheckpointError(f"{path}: ends at byte {size}; it was longer when indexed; write it again")
                done = needed if done + count >= needed else whole
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from error

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = _open_direct(path) or os.open(path, os.O_RDONLY)
            return self._files[path]

    def _bounce_buffer(self, nbytes: int) -> Buffer:
        buffer: Buffer | None = getattr(self._bounce, "buffer", None)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = allocate(nbytes)
            self._bounce.buffer = buffer
        return buffer[:nbytes]

    def close(self) -> None:
        """Let the threads end and close the files."""
        self.pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def run_on(cpus: set[int]) -> None:
    """Bind the calling thread to ``cpus``, or leave it where it may run if it may run on none of them."""
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)


def _open_direct(path: Path) -> int | None:
    """Open ``path`` for direct reads; None where the file system has none, or takes the flag and then reads nothing."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return None
    try:
        os.preadv(file, [allocate(PAGE).data], 0)
    except OSError:
        os.close(file)
        return None
    return file


def _start(pool: ThreadPoolExecutor, threads: int) -> None:
    """Start all threads of ``pool`` now: one that cannot be started in a pass would leave copies that nobody knows."""
    together = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(together.wait)  # each waits for all, so that the next one needs a thread of its own
    except RuntimeError as error:
        together.abort()
        pool.shutdown()
        raise UnavailableError(
            f"threads: djinn reads with {threads}, and the system starts no more ({error}); raise the limit of "
            "processes (ulimit -u, or the container's pids limit)"
        ) from error
    together.wait()


def settle(futures: Sequence[Future[int]], progress: Callable[[int], object] = lambda _: None) -> None:
    """Wait for every piece, reporting its bytes; on the first failure cancel what has not begun and raise it."""
    try:
        for future in futures:
            progress(future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise
