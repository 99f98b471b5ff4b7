"""How fast a folder's disk writes and reads: buffered through the page cache, and direct (O_DIRECT) past it.

Everything is measured on one temporary file that is deleted whatever happens. A filesystem without direct I/O, or
without the room, yields a rate of None with the reason. Buffered reads start with the file dropped from the page
cache; a cache outside this machine (a virtual disk's host) can still make them look fast.
"""

from __future__ import annotations

import os
import queue
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from djinn.errors import CheckpointError
from djinn.transport.reader import THREADS, Buffer, Reader, allocate
from djinn.weights.tensors import PAGE

Kind = Literal["write", "read"]
Mode = Literal["buffered", "direct"]

BLOCK = 16 * 2**20
"""Bytes per system call: larger ones gained little on the disks measured so far."""


class DiskRate(BaseModel):
    """One measured rate in 10^9 bytes/s, or the reason why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    mode: Mode
    threads: int
    gbps: float | None = Field(gt=0, le=10**9)
    reason: str = ""


def rates(folder: Path, nbytes: int = 2**30, threads: Sequence[int] = (1, 2, 4, 8)) -> list[DiskRate]:
    """Measure the disk under ``folder`` with a file of ``nbytes``, rounded to whole blocks of 16 MiB.

    Writes count until the data is on the disk (fsync). Direct reads go through the engine's own reader.
    """
    nbytes = max(1, nbytes // BLOCK) * BLOCK
    # The buffered write is the last one, so that there is a whole file to read also where direct I/O is refused.
    plan: list[tuple[Kind, Mode, int]] = [("write", "direct", count) for count in threads]
    plan.append(("write", "buffered", 1))
    plan += [("read", mode, count) for count in threads for mode in ("buffered", "direct")]
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-rate-") as file:
        return [_measure(Path(file.name), nbytes, kind, mode, count) for kind, mode, count in plan]


def _measure(path: Path, nbytes: int, kind: Kind, mode: Mode, threads: int) -> DiskRate:
    measures: dict[tuple[Kind, Mode], Callable[[], float]] = {
        ("write", "direct"): lambda: _write(path, nbytes, threads, _direct()),
        ("write", "buffered"): lambda: _write(path, nbytes, threads, 0),
        ("read", "buffered"): lambda: _buffered_read(path, nbytes, threads),
        ("read", "direct"): lambda: _direct_read(path, nbytes, threads),
    }
    try:
        return DiskRate(kind=kind, mode=mode, threads=threads, gbps=measures[kind, mode]() / 1e9)
    except (OSError, CheckpointError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or str(error)
        return DiskRate(kind=kind, mode=mode, threads=threads, gbps=None, reason=reason)


def _direct() -> int:
    if not hasattr(os, "O_DIRECT"):
        raise OSError("this operating system has no O_DIRECT")
    return os.O_DIRECT


def _write(path: Path, nbytes: int, threads: int, flags: int) -> float:
    file = os.open(path, os.O_WRONLY | os.O_TRUNC | flags)
    try:
        return _rate(nbytes, threads, lambda buffer, at: os.pwrite(file, buffer, at), lambda: os.fsync(file))
    finally:
        os.close(file)


def _buffered_read(path: Path, nbytes: int, threads: int) -> float:
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return _rate(nbytes, threads, lambda buffer, at: os.preadv(file, [buffer], at))
    finally:
        os.close(file)


def _direct_read(path: Path, nbytes: int, threads: int) -> float:
    os.close(os.open(path, os.O_RDONLY | _direct()))  # the engine's reader falls back to buffered reads; this does not
    if path.stat().st_size < nbytes:
        raise OSError("there is nothing to read: the writes failed")
    return read_rate([path], nbytes, BLOCK, threads)


def _rate(
    nbytes: int,
    threads: int,
    move: Callable[[memoryview, int], int],
    finish: Callable[[], None] = lambda: None,
) -> float:
    """Return bytes/s of ``move(buffer, offset)`` for every block, ``threads`` at a time, and then ``finish()``.

    Raises:
        OSError: a block could not be moved, or not as a whole.
    """
    noise = bytes(os.urandom(2**20)) * (BLOCK // 2**20)  # a disk that compresses must not gain by zeros
    buffers = [allocate(BLOCK).data for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = noise  # touched before timing: the first touch of a page is slow

    def stripe(worker: int) -> bool:
        offsets = range(worker * BLOCK, nbytes, threads * BLOCK)
        return all(move(buffers[worker], offset) == BLOCK for offset in offsets)

    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        if not all(pool.map(stripe, range(threads))):
            raise OSError("the disk is full, or the file has become shorter")
        finish()
        return nbytes / (time.perf_counter() - begun)


def read_rate(paths: Sequence[Path], nbytes: int, chunk_bytes: int, threads: int = THREADS) -> float:
    """Return the raw direct-read rate of these files in bytes/s: the ceiling of streaming from them.

    Reads up to ``nbytes`` in blocks of ``chunk_bytes``, ``threads`` at a time, into buffers that are used again: one
    contiguous stretch as in a pass, from a random place, so that no cache below the page cache has just seen it.
    """
    reader = Reader(chunk_bytes, threads)
    chunk = reader.chunk_bytes
    buffers: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
    for _ in range(threads):
        buffer = allocate(chunk)
        buffer[::PAGE] = 1  # touched before timing: the first touch of a page is slow
        buffers.put(buffer)

    def read(path: Path, offset: int, needed: int) -> int:
        buffer = buffers.get()
        try:
            reader.read_pages(path, offset, buffer, needed)
        finally:
            buffers.put(buffer)
        return needed

    try:
        blocks = _stretch(paths, nbytes, chunk)
        start = time.perf_counter()
        total = sum(reader.pool.map(lambda block: read(*block), blocks))
        return total / (time.perf_counter() - start)
    finally:
        reader.close()


def _stretch(paths: Sequence[Path], nbytes: int, chunk: int) -> list[tuple[Path, int, int]]:
    """Return (path, offset, bytes) of consecutive blocks that cover ``nbytes``, from a random one on."""
    blocks = [
        (path, offset, min(chunk, path.stat().st_size - offset))
        for path in paths
        for offset in range(0, path.stat().st_size, chunk)
    ]
    wanted = max(1, min(len(blocks), nbytes // chunk))
    first = random.randrange(len(blocks))
    return [blocks[(first + number) % len(blocks)] for number in range(wanted)]
