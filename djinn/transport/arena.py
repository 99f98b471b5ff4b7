"""The arena: pinned units back to back in host memory of exactly their size, page-locked where a GPU copies from it.

``torch.Tensor.pin_memory`` rounds up to a power of two and copies; here anonymous memory is mapped in huge pages,
touched by the threads that fill it, and registered with the driver where it lies, part by part: while the driver locks
one part, the threads fill the next.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from djinn.sizes import format_bytes
from djinn.transport.reader import Buffer, Filler, allocate, settle
from djinn.weights.units import Unit

PART_BYTES = 2**30
"""Least memory that is registered in one call; every part begins and ends with a unit, since no copy may cross two."""


class PinnedMemory:
    """Host memory of an exact size that can be registered with the CUDA driver; unregistered by :meth:`close`."""

    def __init__(self, nbytes: int) -> None:
        self.buffer: Buffer = allocate(nbytes)
        self._registered: list[int] = []

    def pin(self, start: int = 0, end: int | None = None) -> bool:
        """Page-lock bytes [start, end), whole pages; return False, with a warning, where the driver refuses.

        The memory should have been touched: registering untouched pages faults them in on one core. After a refusal
        nothing of it is page-locked; copies from it are right, but slow and not asynchronous.
        """
        part = self.buffer[start:end]
        if part.nbytes == 0:
            return True
        error = int(torch.cuda.cudart().cudaHostRegister(part.ctypes.data, part.nbytes, 0))
        if error == 0:
            self._registered.append(part.ctypes.data)
            return True
        self._unpin()
        warnings.warn(
            f"the driver cannot page-lock {format_bytes(self.buffer.nbytes)} of host memory (CUDA error {error}): "
            "copies to the GPU will be SEVERAL TIMES SLOWER; raise the memlock limit (ulimit -l), or lower host_memory",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def close(self) -> None:
        """Give the memory back."""
        self._unpin()
        self.buffer = allocate(0)

    def _unpin(self) -> None:
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())


class Arena:
    """The images of ``units`` in host memory, filled in parallel when made.

    Raises:
        CheckpointError: a file that cannot be read.
    """

    def __init__(self, units: Sequence[Unit], filler: Filler, *, pin: bool, progress: bool = False) -> None:
        ends = list(itertools.accumulate((unit.image_bytes for unit in units), initial=0))
        self._memory = PinnedMemory(ends[-1])
        self.pinned = pin
        self.images: dict[str, Buffer] = {
            unit.name: self._memory.buffer[start : start + unit.image_bytes]
            for unit, start in zip(units, ends, strict=False)
        }
        futures = [filler.fill(unit, self.images[unit.name]) for unit in units]
        try:
            with tqdm(
                total=sum(unit.weight_bytes for unit in units),
                unit="B",
                unit_scale=True,
                desc="filling host memory",
                disable=not (progress and units),
            ) as bar:
                for first, last in _parts(ends):
                    settle([future for pieces in futures[first:last] for future in pieces], bar.update)
                    self.pinned = self.pinned and self._memory.pin(ends[first], ends[last])
        except BaseException:
            for pieces in futures:
                for future in pieces:
                    future.cancel()
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back."""
        self.images.clear()
        self._memory.close()


def _parts(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of consecutive units of at least ``PART_BYTES`` each but the last; ``ends`` begins with 0."""
    first = 0
    for last in range(1, len(ends)):
        if ends[last] - ends[first] >= PART_BYTES or last == len(ends) - 1:
            yield first, last
            first = last
