"""The ring: how large it is by default, where each unit lands in it, and which release its copy waits for. Pure.

A pass visits the streamed units in a fixed order, over and over. Units are placed one behind the other; one that does
not fit before the end starts again at 0. Every pass starts at 0, so a unit has one slot for good, its parameters are
bound to it once, and the copy of the next pass's first units needs nothing but the release of what lay there.

Where the host's cores compute with some units, passes of few tokens visit only the others, in a **second order** over
the same ring. It has slots of its own, and a copy of either order waits for the releases of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

OVERLAP_UNITS = 3
"""Largest units that a ring of default size holds: one computing, one arriving, one queued behind it."""
RING_FLOOR_BYTES = 1_250_000_000
"""A ring of 25 ms of the fastest link outlasts whatever the host does between two tokens; one of a few units more than
overlap needs keeps more disk reads under way."""
RING_FLOOR_SHARE = 0.125
"""The most of the budget that such a ring may take: a resident byte is worth more than a byte of ring."""


def ring_floor(budget: int) -> int:
    """Return what a ring is made at least where time counts, not units alone; bytes."""
    return min(RING_FLOOR_BYTES, round(RING_FLOOR_SHARE * budget))


def default_ring_bytes(sizes: Sequence[int], floor: int) -> int:
    """Return the default size of a ring for streamed units of ``sizes`` bytes; more than all of them helps nothing."""
    return max(OVERLAP_UNITS * max(sizes, default=0), min(floor, sum(sizes)))


@dataclass(frozen=True)
class Slot:
    """A unit's fixed place in the ring; a copy may start once no unit that shares bytes with it is still to be read."""

    offset: int
    nbytes: int
    clashes: int
    """The units whose slots share bytes with this one, itself among them: a set, bit ``u`` for unit ``u``."""

    @property
    def sharing(self) -> Iterator[int]:
        """The same units, one by one."""
        rest = self.clashes
        while rest:
            lowest = rest & -rest
            yield lowest.bit_length() - 1
            rest ^= lowest


def schedule(sizes: Sequence[int], ring_bytes: int, second: Sequence[int] = ()) -> list[Slot]:
    """Place units of ``sizes`` bytes, in order of visit, in a ring of ``ring_bytes``.

    Slots of the units of a ``second`` order, given by their sizes too, stand behind those of the first.

    Raises:
        ValueError: a unit larger than the ring (the plan refuses that earlier, by name).
    """
    offsets = [*_offsets(sizes, ring_bytes), *_offsets(second, ring_bytes)]
    all_sizes = [*sizes, *second]
    begins, ends = np.array(offsets), np.array(offsets) + np.array(all_sizes)
    return [
        Slot(begin, size, _set((begins < begin + size) & (ends > begin)))
        for begin, size in zip(offsets, all_sizes, strict=True)
    ]


def _offsets(sizes: Sequence[int], ring_bytes: int) -> Iterator[int]:
    cursor = 0
    for size in sizes:
        if not 0 < size <= ring_bytes:
            raise ValueError(f"a unit of {size} bytes does not fit a ring of {ring_bytes}")
        offset = cursor if cursor + size <= ring_bytes else 0
        yield offset
        cursor = offset + size


def _set(members: np.ndarray) -> int:
    """Return the set whose members are true, as an integer with a bit for each."""
    return int.from_bytes(np.packbits(members, bitorder="little").tobytes(), "little")
