"""The skip-end ring schedule: where each unit lands on the device, and which release its copy waits for. Pure.

A pass visits the streamed units in a fixed order, over and over. Units are placed one behind the other; one that does
not fit before the end starts again at 0. Every pass starts at 0, so a unit has one slot for good, its parameters are
bound to it once, and the copy of the next pass's first units needs nothing but the release of what lay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A unit's fixed place in the ring.

    ``lag`` counts visits: the copy for visit ``s`` may start once visit ``s - lag`` has been released. Releases come
    in order of visits, so by then every earlier reader of these bytes has been released too.
    """

    offset: int
    nbytes: int
    lag: int


def schedule(sizes: Sequence[int], ring_bytes: int) -> list[Slot]:
    """Place units of ``sizes`` bytes, in order of visit, in a ring of ``ring_bytes``.

    Raises:
        ValueError: a unit larger than the ring (the plan refuses that earlier, by name).
    """
    offsets: list[int] = []
    cursor = 0
    for size in sizes:
        if not 0 < size <= ring_bytes:
            raise ValueError(f"a unit of {size} bytes does not fit a ring of {ring_bytes}")
        offset = cursor if cursor + size <= ring_bytes else 0
        offsets.append(offset)
        cursor = offset + size
    return [Slot(offsets[i], sizes[i], _lag(i, offsets, sizes)) for i in range(len(sizes))]


def _lag(unit: int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """Return how many visits back the latest reader of the unit's bytes lies (its own last visit at the most)."""
    count = len(sizes)
    for back in range(1, count):
        other = (unit - back) % count
        if offsets[other] < offsets[unit] + sizes[unit] and offsets[unit] < offsets[other] + sizes[other]:
            return back
    return count
