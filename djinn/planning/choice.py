"""Which units stay on the device where not all fit: those that must, then the odd ones, then an even spread. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from djinn.weights.units import Unit


def with_companions(units: Sequence[Unit], staying: set[str]) -> list[Unit]:
    """Return the units that stay, and of any that one module reads together all but the largest.

    For their slots could overlap, and one of them may be due at another time of the pass: a tied head with a bias.
    """
    read: set[str] = set()
    for unit in sorted(units, key=lambda unit: unit.image_bytes, reverse=True):
        if unit.name not in staying:
            if not read.isdisjoint(unit.readers):
                staying = staying | {unit.name}
            else:
                read.update(unit.readers)
    return [unit for unit in units if unit.name in staying]


def singular(units: Sequence[Unit]) -> list[Unit]:
    """Return the units to keep first, largest first: read twice in a pass, or of a size outside the repeated blocks.

    These are embeddings and output projections; streaming one would cost a ring three times its size.
    """
    occurrences = Counter(unit.image_bytes for unit in units)
    odd = [unit for unit in units if len(unit.readers) > 1 or occurrences[unit.image_bytes] <= 2]
    return sorted(odd, key=lambda unit: (len(unit.readers) > 1, unit.image_bytes), reverse=True)


def spread(units: Sequence[Unit], capacity: int, without: Collection[str] = ()) -> set[str]:
    """Choose units of at most ``capacity`` bytes, spaced evenly, so that the link is never idle for long.

    Those named in ``without`` are not chosen, but are there when the others are spaced.
    """
    total = total_bytes(units)
    if total <= capacity and not without:
        return names_of(units)
    chosen: set[str] = set()
    used = 0
    due = 0.0
    for unit in units:
        due += unit.image_bytes * max(capacity, 0) / total
        if unit.name not in without and used + unit.image_bytes <= min(due + unit.image_bytes / 2, capacity):
            chosen.add(unit.name)
            used += unit.image_bytes
    for unit in units:
        if unit.name not in chosen and unit.name not in without and used + unit.image_bytes <= capacity:
            chosen.add(unit.name)
            used += unit.image_bytes
    return chosen


def total_bytes(units: Iterable[Unit]) -> int:
    """Return the size of the units' images together."""
    return sum(unit.image_bytes for unit in units)


def names_of(units: Iterable[Unit]) -> set[str]:
    """Return the units' names."""
    return {unit.name for unit in units}
