"""What a tensor of a checkpoint is, where its bytes come from, and how they are coded, if they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from djinn.codec.layout import LEAST_BYTES, Layout

PAGE = 4096
"""Direct reads need file offset, address and length in multiples of this."""
ALIGNMENT = 256
"""Bytes to which tensors are aligned in memory, so that kernels choose the same path as for resident weights."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that torch has."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def kind_of(name: str) -> str:
    """Return the name of the module that holds a tensor, without where in the model it is: ``q_proj``."""
    parts = name.removesuffix(".weight").split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), name)


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file, from ``offset``."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Seeded:
    """Bytes made on demand by :func:`djinn.weights.synthetic_values.fill` under this tensor name and seed."""

    name: str
    seed: int
    start: int = 0
    """The first of the tensor's bytes that is meant."""
    whole: tuple[int, ...] | None = None
    """Shape of the tensor, where a part of it is meant."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Bytes of a parameter as they lie in memory, without gaps; for as long as it has not been bound elsewhere."""

    parameter: torch.Tensor
    start: int = 0
    """The first of its bytes that is meant."""

    @property
    def bytes(self) -> torch.Tensor:
        """All of them from there on: uint8, one dimension, on the parameter's device."""
        weights = self.parameter.detach()
        return weights.as_strided((weights.numel(),), (1,)).view(torch.uint8)[self.start :]


@dataclass(frozen=True)
class Stacked:
    """Bytes of several stored tensors, one behind the other: experts that a checkpoint keeps apart, or packs so.

    Each expert has as many ``parts`` as every other, in their order: its gate, its up, then those of the next one. Of
    a packed checkpoint they are decoded ones, whose bytes stand one behind the other, too.
    """

    parts: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Sliced:
    """Bytes of a part of a tensor that lies in many places of it: some of its columns, for example."""

    whole: TensorEntry
    dim: int
    kept: tuple[tuple[int, int], ...]
    """Where along ``dim`` each stretch that is kept begins and ends."""


@dataclass(frozen=True)
class Encoded:
    """Bytes made by coding those of another source."""

    raw: FileSpan | Seeded | InMemory | Converted | Stacked | Sliced


@dataclass(frozen=True)
class Decoded:
    """Bytes made by decoding a tensor that is stored coded."""

    coded: TensorEntry


@dataclass(frozen=True)
class Converted:
    """Bytes made by converting a tensor that is stored in another dtype."""

    stored: TensorEntry


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: what it is, where its bytes come from, and how they are coded, if they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: FileSpan | Seeded | InMemory | Encoded | Decoded | Converted | Stacked | Sliced
    layout: Layout | None = None
    crc32: Mapping[str, int] | None = None
    """Of each section, where the checkpoint is packed: what is read is verified when it is loaded."""
    stride: tuple[int, ...] | None = None
    """Elements from one to the next along each dimension, where they do not lie in the order of the shape."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept and travel: those of the blob where the tensor is coded."""
        return self.raw_bytes if self.layout is None else self.layout.nbytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of the weights as a model computes with them."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def codable(self) -> bool:
        """Whether coding may shrink it: raw, not packed already, bfloat16, and worth a kernel of its own."""
        return self.codable_with_others and self.raw_bytes >= LEAST_BYTES

    @property
    def codable_with_others(self) -> bool:
        """Whether coding may shrink it where one kernel decodes several like it."""
        return self.layout is None and self.crc32 is None and self.dtype == torch.bfloat16

    @property
    def is_packed(self) -> bool:
        """Whether its bytes come out of a packed checkpoint."""
        whole = self.source.whole if isinstance(self.source, Sliced) else self
        return any(part.crc32 is not None for part in whole.stored_parts)

    @property
    def raw(self) -> TensorEntry:
        """The tensor as a model computes with it, without its code; itself where it is not coded."""
        if isinstance(self.source, Encoded):
            return TensorEntry(self.dtype, self.shape, self.source.raw, stride=self.stride)
        return self if self.layout is None else TensorEntry(self.dtype, self.shape, Decoded(self))

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of, one behind the other: itself, unless it is stacked."""
        return self.source.parts if isinstance(self.source, Stacked) else (self,)

    def parts_of(self, name: str) -> list[tuple[str, TensorEntry]]:
        """Return its parts, each under what errors call it: ``name``, with the expert's number where it is stacked."""
        if not isinstance(self.source, Stacked):
            return [(name, self)]
        parts = self.source.parts
        return [(f"{name}, expert {number * self.shape[0] // len(parts)}", part) for number, part in enumerate(parts)]

    @property
    def stored_parts(self) -> tuple[TensorEntry, ...]:
        """Its parts as files hold them: coded, where they are packed."""
        return tuple(part.source.coded if isinstance(part.source, Decoded) else part for part in self.parts)

    def is_stack_of(self, count: int) -> bool:
        """Return whether its first dimension is ``count`` matrices whose bytes can be had one by one."""
        stored = self.source.stored if isinstance(self.source, Converted) else self
        alike = len(self.shape) >= 3 and self.shape[0] == count and self.stride is None
        return alike and not stored.crc32 and isinstance(stored.source, FileSpan | Seeded | InMemory | Stacked)

    def expert(self, number: int) -> tuple[TensorEntry, ...]:
        """Return the stored tensors that, one behind the other, are the tensor at ``number`` of the first dimension.

        Packed ones are coded, as they are stored.

        Raises:
            ValueError: a tensor that is coded as a whole.
        """
        shape, source = self.shape[1:], self.source
        if isinstance(source, Stacked):
            each = len(source.parts) // self.shape[0]
            return self.stored_parts[number * each : (number + 1) * each]
        if isinstance(source, Converted):
            return tuple(part.to(self.dtype) for part in source.stored.expert(number))
        return (self.part(number * math.prod(shape), shape),)

    def part(self, first: int, shape: tuple[int, ...]) -> TensorEntry:
        """Return the tensor of ``shape`` whose elements lie one behind the other from the ``first`` of this one's.

        Raises:
            ValueError: a tensor that is coded or stored in parts.
        """
        start, source = first * self.dtype.itemsize, self.source
        match source:
            case FileSpan():
                return TensorEntry(self.dtype, shape, FileSpan(source.path, source.offset + start))
            case Seeded():
                whole = source.whole or self.shape
                return TensorEntry(self.dtype, shape, Seeded(source.name, source.seed, source.start + start, whole))
            case InMemory():
                return TensorEntry(self.dtype, shape, InMemory(source.parameter, source.start + start))
            case Converted():
                return source.stored.part(first, shape).to(self.dtype)
            case _:
                raise ValueError("a tensor that is coded or stored in parts has no part in one stretch")

    def kept(self, dim: int, stretches: Sequence[tuple[int, int]]) -> TensorEntry:
        """Return what is left of the tensor when along ``dim`` only some ``stretches``, (begin, end), are kept.

        What lies in one stretch of the file is read from there; of anything else the whole tensor is read. So is what
        is packed, because its checksums are those of the whole.
        """
        shape = (*self.shape[:dim], sum(end - begin for begin, end in stretches), *self.shape[dim + 1 :])
        stored = self.source.stored if isinstance(self.source, Converted) else self
        simple = isinstance(stored.source, FileSpan | Seeded | InMemory) and not (stored.layout or stored.crc32)
        if simple and self.stride is None and len(stretches) == 1 and math.prod(self.shape[:dim]) == 1:
            return self.part(stretches[0][0] * math.prod(self.shape[dim + 1 :]), shape)
        return TensorEntry(self.dtype, shape, Sliced(self.raw, dim, tuple(stretches)))

    def to(self, dtype: torch.dtype) -> TensorEntry:
        """The tensor in ``dtype``, raw; itself where it is stored so."""
        return self if dtype == self.dtype else TensorEntry(dtype, self.shape, Converted(self))

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the weights that ``raw`` holds (uint8, at least ``raw_bytes`` in one dimension), without copying."""
        weights = raw[: self.raw_bytes].view(self.dtype)
        return weights.view(self.shape) if self.stride is None else weights.as_strided(self.shape, self.stride)
