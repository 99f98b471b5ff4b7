"""Which tensors of a model are coded: those that gain by it and can be decoded just before they are read. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from djinn.codec.layout import TILE_BYTES, Layout
from djinn.weights.tensors import Decoded, Encoded, TensorEntry
from djinn.weights.units import Unit, lay_out_expert

LayoutOf = Callable[[TensorEntry], Layout | None]
"""Says of a raw tensor what its code would be, None where raw is better."""


def coded(units: Sequence[Unit], layout: LayoutOf, *, experts_alike: bool = False) -> list[Unit]:
    """Return ``units`` with every tensor coded that gains by it and can be decoded just before it is read.

    What is packed is never coded anew: it stays as it is stored, or becomes raw where it cannot be decoded just before
    it is read. With ``experts_alike`` one expert's code stands for those of all of its module.
    """
    uses = Counter(reader for unit in units if not unit.experts for reader in unit.readers)

    def of(unit: Unit) -> Unit:
        if unit.experts:
            return _coded_by_expert(unit, layout, unit.experts[:1] if experts_alike else unit.experts)
        # Scratch holds one unit: what is read around or beside others has to lie elsewhere.
        if unit.held or any(uses[reader] > 1 for reader in unit.readers):
            return unit.raw()
        return unit.with_entries(lambda entry: _with_code(entry, layout(entry) if entry.codable else None))

    return [of(unit) for unit in units]


def _coded_by_expert(unit: Unit, layout: LayoutOf, asked: Sequence[Unit]) -> Unit:
    """Return a unit of experts with each of its tensors raw in all of them, or coded in all, by whole tiles."""

    def code_of(entry: TensorEntry) -> Layout | None:
        if entry.raw_bytes % TILE_BYTES:
            return None
        return layout(entry) if entry.codable_with_others else entry.layout

    if any(part.entry.crc32 is not None for part in unit.experts[0].tensors):
        asked = unit.experts  # what is packed says itself how it is coded
    codes = [[code_of(part.entry) for part in expert.tensors] for expert in asked]
    names = [part.name for part in unit.experts[0].tensors]
    raw = {name for found in codes for name, code in zip(names, found, strict=True) if code is None}
    experts = tuple(
        replace(
            expert,
            tensors=lay_out_expert(
                [
                    (part.name, part.entry.raw if part.name in raw else _with_code(part.entry, code))
                    for part, code in zip(expert.tensors, codes[number % len(asked)], strict=True)
                ]
            ),
        )
        for number, expert in enumerate(unit.experts)
    )
    return replace(unit, experts=experts)


def _with_code(entry: TensorEntry, code: Layout | None) -> TensorEntry:
    if code is None or code == entry.layout:
        return entry
    assert not isinstance(entry.source, Encoded | Decoded), "nothing has been coded yet"
    return replace(entry, source=Encoded(entry.source), layout=code)
