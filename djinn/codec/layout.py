"""Where the bytes of a coded tensor are: version 1.

A bfloat16 weight is sign (1 bit), exponent (8), mantissa (7). Sign and mantissa are noise and stay as they are;
of the exponents, a few make up nearly everything, and those get three bits.

The weights, flattened, are cut into **tiles** of 4096. The last tile is filled up with weights of sign and mantissa 0
and the commonest exponent among its real ones (of several, the smallest). The coded tensor is one contiguous **blob**
of five sections; each starts at a multiple of 256 bytes, gaps are zero, numbers are little-endian:

    sm      u8  [tiles][4096]    sign << 7 | mantissa
    planes  u8  [tiles][3][512]  bits 0, 1 and 2 of every weight's code
    lut     u8  [tiles][8]       the tile's 7 commonest exponents, the commonest first, then 0
    off     u32 [tiles + 1]      number of escapes before each tile; the last entry is the number of all
    esc     u8  [escapes]        exponents that are not in their tile's table

- A weight's **code** is the place of its exponent in ``lut``, or 7 for an **escape**. Equally common exponents stand in
  ``lut`` smaller first; unused entries hold the smallest exponents that the tile does not have. So equal weights
  always give equal bytes.
- ``sm``: weight ``j`` of a tile is at byte ``2j`` if ``j < 2048``, otherwise at byte ``2(j - 2048) + 1``: the tile's
  first half has the even bytes, its second half the odd ones.
- ``planes``: bit ``k`` (1 << k) of byte ``q`` of a plane belongs to the weight at byte ``512k + q`` of ``sm``.
- ``esc``: in the order of those plane bits: by ``q``, then by ``k``.

Why this order of bits and not the order of the weights: a decoder then works on whole words. A 32-bit word of ``sm``
holds two neighbouring weights of each half; shifting a plane's word by ``k`` and masking with 0x01010101 gives these
four weights' bits at once, each in its own byte; and four exponent bytes and four ``sm`` bytes become two output
words, neighbours in memory, by shifts and masks alone. That is about a third of the instructions of taking weights
one by one, and every load and store is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

VERSION = 1
TILE = 4096
"""Weights in a tile."""
TILE_BYTES = TILE * torch.bfloat16.itemsize
"""Bytes of a decoded tile."""
TABLE = 7
"""Exponents in a tile's table; also the code of an escape."""
ALIGNMENT = 256
"""Bytes to which sections are aligned in a blob, and to which blobs should be aligned in memory."""
MIN_GAIN = 0.03
"""A tensor that coding would shrink by less than this share stays raw."""
LEAST_BYTES = 2**20
"""Smaller tensors are left raw: decoding one costs a kernel of its own and saves next to nothing."""


@dataclass(frozen=True)
class Layout:
    """The layout of ``elements`` weights, of which ``escapes`` have an exponent outside their tile's table.

    Raises:
        ValueError: numbers that no coded tensor has.
    """

    elements: int
    escapes: int

    def __post_init__(self) -> None:
        if self.elements < 1 or not 0 <= self.escapes <= min(self.elements, 2**32 - 1):
            raise ValueError(f"no coded tensor has {self.elements} weights and {self.escapes} escapes")

    @property
    def tiles(self) -> int:
        """Number of tiles, the last one filled up."""
        return -(-self.elements // TILE)

    @property
    def section_bytes(self) -> dict[str, int]:
        """Bytes of every section, in the order in which they stand."""
        return {
            "sm": self.tiles * TILE,
            "planes": self.tiles * 3 * (TILE // 8),
            "lut": self.tiles * 8,
            "off": (self.tiles + 1) * 4,
            "esc": self.escapes,
        }

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte of the blob at which every section starts: by the number of weights alone, since ``esc`` is last."""
        offsets = {}
        end = 0
        for name, nbytes in self.section_bytes.items():
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + nbytes
        return offsets

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return self.offsets["esc"] + self.escapes

    @property
    def raw_bytes(self) -> int:
        """Bytes of the weights themselves."""
        return self.elements * torch.bfloat16.itemsize

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the buffer into which a decoder writes: whole tiles."""
        return self.tiles * TILE_BYTES


class Sections(NamedTuple):
    """A blob's sections, as views of it."""

    sm: torch.Tensor
    """uint8 [tiles, 4096]"""
    planes: torch.Tensor
    """uint8 [tiles, 3, 512]"""
    lut: torch.Tensor
    """uint8 [tiles, 8]"""
    off: torch.Tensor
    """int32 [tiles + 1]: the bits of unsigned numbers"""
    esc: torch.Tensor
    """uint8 [escapes]"""


def check_blob(blob: torch.Tensor, layout: Layout) -> None:
    """Check what a tensor tells of itself without a look at its bytes.

    Raises:
        ValueError: a tensor that cannot be a blob of this layout.
    """
    # Shapes, compared, would take twice as long; this is asked of each of many blobs for every token.
    right = blob.dtype == torch.uint8 and blob.dim() == 1 and blob.numel() == layout.nbytes and blob.is_contiguous()
    if not right:
        raise ValueError(f"a blob is contiguous uint8 [{layout.nbytes}], not {blob.dtype} {list(blob.shape)}")


def sections(blob: torch.Tensor, layout: Layout) -> Sections:
    """Return views of the sections of ``blob`` (uint8 [layout.nbytes], contiguous).

    Raises:
        ValueError: a tensor that cannot be a blob of this layout.
    """
    check_blob(blob, layout)
    sizes, offsets = layout.section_bytes, layout.offsets
    parts = {name: blob[offsets[name] : offsets[name] + nbytes] for name, nbytes in sizes.items()}
    return Sections(
        sm=parts["sm"].view(-1, TILE),
        planes=parts["planes"].view(-1, 3, TILE // 8),
        lut=parts["lut"].view(-1, 8),
        off=parts["off"].view(torch.int32),
        esc=parts["esc"],
    )
