"""The copy engine: moves units into their slots and says when they are there. One interface, two implementations.

A **visit** is one reading of a streamed unit, numbered through all passes. ``submit`` is called once the release that
the slot waits for is known, ``wait`` before the unit is read, ``release`` after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from djinn.transport.reader import Buffer
from djinn.transport.stats import Lane
from djinn.weights.units import Unit


class Copier(Protocol):
    """What the streamer needs of a copy engine. Units are known by their index in the order of visits."""

    ring: torch.Tensor
    """The ring: uint8, one dimension, on the device."""

    def submit(self, unit: int, after: int | None) -> None:
        """Start the copy of ``unit`` into its slot, after the last release of unit ``after``."""
        ...

    def wait(self, unit: int) -> None:
        """Make the compute that follows wait until ``unit`` is in its slot.

        Raises:
            CheckpointError: its bytes cannot be read.
        """
        ...

    def release(self, unit: int) -> None:
        """Note that all compute which reads ``unit`` has been issued."""
        ...

    def decode(self, unit: Unit, decode: Callable[[], None]) -> None:
        """Decode a resident, and put that on the timeline."""
        ...

    def computed(self, unit: Unit) -> None:
        """Note that all compute which reads what ``unit`` was decoded to has been issued, for the timeline."""
        ...

    def settle(self) -> None:
        """Let copies under way end, well or badly, and no later one begin before compute issued so far has ended."""
        ...

    def bare_rate(self) -> float | None:
        """Return the rate of copies of the units' own images while nothing computes, bytes/s; it overwrites the ring.

        So nothing may be prefetched: it is called after :func:`djinn.cool`. None where no unit waits in host memory,
        and on a CPU, where copies are the work of those cores that compute.
        """
        ...

    def resolve_timeline(self) -> None:
        """Bring ``stats.timeline`` up to date."""
        ...

    def close(self) -> None:
        """Wait for copies under way and free the ring."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a streamed unit's image comes from: host memory, or its files where there is no ``image``."""

    unit: Unit
    image: Buffer | None

    @cached_property
    def stretch(self) -> tuple[int, int, int]:
        """Host address of the first tensor, its place in the image, and the bytes from there to the last one's end."""
        assert self.image is not None
        first, last = self.unit.tensors[0], self.unit.tensors[-1]
        nbytes = last.offset + last.entry.nbytes - first.offset
        return self.image.ctypes.data + first.offset, first.offset, nbytes


def reading_lane(unit: Unit) -> Lane:
    """Return what reads a unit's slot: the layer itself, or the decoder."""
    return "decode" if unit.coded else "compute"
