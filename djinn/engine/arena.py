"""The arena: pinned units back to back in host memory of exactly their size, page-locked where a GPU copies from it.

``torch.Tensor.pin_memory`` rounds up to a power of two and copies; here anonymous memory is mapped in huge pages,
touched by the threads that fill it, and then registered with the driver where it lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tqdm import tqdm

from djinn.engine.reader import Buffer, Reader, allocate, settle
from djinn.errors import PlanError
from djinn.sizes import format_bytes
from djinn.weights.units import Unit


class PinnedMemory:
    """Host memory of an exact size, registered with the CUDA driver if ``pin``; unregistered by :meth:`close`."""

    def __init__(self, nbytes: int) -> None:
        self.buffer: Buffer = allocate(nbytes)
        self.pinned = False

    def pin(self) -> None:
        """Page-lock the memory, after it was touched: registering untouched pages faults them in on one core.

        Raises:
            PlanError: the driver refuses, for want of memory or of permission.
        """
        if self.buffer.nbytes == 0:
            return
        error = torch.cuda.cudart().cudaHostRegister(self.buffer.ctypes.data, self.buffer.nbytes, 0)
        if int(error) != 0:
            size = format_bytes(self.buffer.nbytes)
            raise PlanError(
                f"host memory: the driver cannot page-lock {size} (CUDA error {int(error)}); "
                "lower host_memory, or raise the memlock limit (ulimit -l)"
            )
        self.pinned = True

    def close(self) -> None:
        """Give the memory back."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.ctypes.data)
            self.pinned = False
        self.buffer = allocate(0)


class Arena:
    """The images of ``units`` in host memory, filled in parallel when made.

    Raises:
        CheckpointError: a file that cannot be read.
        PlanError: memory that cannot be page-locked.
    """

    def __init__(self, units: Sequence[Unit], reader: Reader, *, pin: bool, progress: bool = False) -> None:
        ends = list(itertools.accumulate((unit.image_bytes for unit in units), initial=0))
        self._memory = PinnedMemory(ends[-1])
        self.images: dict[str, Buffer] = {
            unit.name: self._memory.buffer[start : start + unit.image_bytes]
            for unit, start in zip(units, ends, strict=False)
        }
        try:
            futures = [future for unit in units for future in reader.fill(unit, self.images[unit.name])]
            with tqdm(
                total=sum(unit.weight_bytes for unit in units),
                unit="B",
                unit_scale=True,
                desc="filling host memory",
                disable=not (progress and units),
            ) as bar:
                settle(futures, bar.update)
            if pin:
                self._memory.pin()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back."""
        self.images.clear()
        self._memory.close()
