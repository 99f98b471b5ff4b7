"""Which tensors of a model are coded: those that gain by it and can be decoded just before they are read. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from djinn.codec.layout import Layout
from djinn.weights.tensors import Decoded, Encoded, TensorEntry
from djinn.weights.units import Unit


def coded(units: Sequence[Unit], layout: Callable[[TensorEntry], Layout | None]) -> list[Unit]:
    """Return ``units`` with every tensor coded that gains by it and can be decoded just before it is read.

    ``layout`` says of a raw tensor what its code would be, None where raw is better. What is packed is never coded
    anew: it stays as it is stored, or becomes raw where it cannot be decoded just before it is read.
    """

    def encoded(entry: TensorEntry) -> TensorEntry:
        if not entry.codable:
            return entry
        assert not isinstance(entry.source, Encoded | Decoded), "nothing has been coded yet"
        found = layout(entry)
        return entry if found is None else replace(entry, source=Encoded(entry.source), layout=found)

    uses = Counter(reader for unit in units for reader in unit.readers)
    # Scratch holds one unit: what is read around or beside others has to lie elsewhere.
    return [
        unit.raw() if unit.held or any(uses[reader] > 1 for reader in unit.readers) else unit.with_entries(encoded)
        for unit in units
    ]
