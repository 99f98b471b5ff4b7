"""A tensor of all experts of a module, as the pool holds it: raw, seen through all slots at once; or coded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from djinn.codec.decode import BatchDecoder
from djinn.codec.layout import Layout
from djinn.weights.units import Unit


class ExpertTensor:
    """One named tensor of the experts of ``unit``; ``local`` is its name in its module.

    Args:
        pool: uint8 [slots, slot_bytes] on the device.
    """

    def __init__(self, unit: Unit, name: str, pool: torch.Tensor) -> None:
        whole = next(tensor.entry for tensor in unit.tensors if tensor.name == name)
        self.name = name
        self.local = name.rpartition(".")[2]
        self.shape = whole.shape[1:]
        self.dtype = whole.dtype
        self.device = pool.device
        self._pool = pool
        self._start = pool.data_ptr()
        self._parts = [[part for part in expert.tensors if part.name == name] for expert in unit.experts]
        first = self._parts[0][0]
        self.coded = first.entry.layout is not None
        self.table = self.name if self.coded else ""
        """The table that says where it is: its own if it is coded; all raw ones are found by their slot."""
        self.address = pool.data_ptr() + first.offset
        if first.entry.layout is not None:
            self._decode = BatchDecoder(first.entry.layout.elements, pool.device)
        else:
            elements = pool.view(self.dtype)
            strides = [elements.stride(0), *_row_major(self.shape)]
            size = [len(pool), *self.shape]
            self.slots = elements.as_strided(size, strides, first.offset // self.dtype.itemsize)
            """Raw: a view of every slot as if it held this tensor, [slots, ...]."""

    def empty(self, count: int) -> torch.Tensor:
        """Return memory for this tensor of ``count`` experts."""
        return torch.empty(count, *self.shape, dtype=self.dtype, device=self.device)

    def one(self, expert: int, slot: int) -> torch.Tensor:
        """Return the weights of ``expert``, which is in ``slot``."""
        if not self.coded:
            return self.slots[slot]
        out = self.empty(1)
        self.gather([(expert, slot)], out, [0])
        return out[0]

    def gather(self, places: Sequence[tuple[int, int]], out: torch.Tensor, rows: Sequence[int]) -> None:
        """Put the weights of experts, each with its slot, into these ``rows`` of ``out``."""
        if not self.coded:
            for (_, slot), row in zip(places, rows, strict=True):
                out[row].copy_(self.slots[slot])
            return
        if len(rows) == len(out) and list(rows) == list(range(len(rows))):
            self._decode([blob for place in places for blob in self._blobs(*place)], out)
            return
        for place, row in zip(places, rows, strict=True):
            self._decode(self._blobs(*place), out[row])

    @property
    def parts(self) -> int:
        """Stored tensors that it consists of in one expert."""
        return len(self._parts[0])

    def addresses(self, expert: int, slot: int) -> list[int]:
        """Return where the parts of a coded expert in ``slot`` are."""
        start = self._start + slot * self._pool.shape[1]
        return [start + part.offset for part in self._parts[expert]]

    def decode_at(self, addresses: torch.Tensor, count: int) -> torch.Tensor:
        """Return the weights of ``count`` coded experts whose parts are at ``addresses``, [count * parts]."""
        out = self.empty(count)
        self._decode.at(addresses, out)
        return out

    def _blobs(self, expert: int, slot: int) -> list[tuple[torch.Tensor, Layout]]:
        found = []
        for part in self._parts[expert]:
            layout = part.entry.layout
            assert layout is not None
            found.append((self._pool[slot, part.offset : part.offset + layout.nbytes], layout))
        return found


def _row_major(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides
