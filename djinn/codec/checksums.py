"""Checks of what is stored: checksums find damage and name the section that has it; a blob's counts have to agree.

Every section of a blob has a CRC-32. It covers the section and the gap after it, so that every byte is covered once.
A raw tensor is one section. CRC-32 runs at about 1 GB/s on a core and releases the interpreter lock.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import pairwise

import torch

from djinn.codec.layout import Layout, sections
from djinn.errors import CheckpointError

RAW_SECTION = "weights"
_BLOCK = 512
"""Tiles whose escapes are counted at once: few enough for the cache."""


def section_names(layout: Layout | None) -> list[str]:
    """Return the names of the sections that a tensor of this layout has, in order; None stands for a raw tensor."""
    return [RAW_SECTION] if layout is None else list(layout.offsets)


def checksums(stored: torch.Tensor, layout: Layout | None) -> dict[str, int]:
    """Return the CRC-32 of each section of ``stored`` (uint8, one-dimensional, in host memory)."""
    data = stored.numpy().data
    starts = [0] if layout is None else list(layout.offsets.values())
    extents = pairwise([*starts, len(data)])
    return {
        name: zlib.crc32(data[start:end]) for name, (start, end) in zip(section_names(layout), extents, strict=True)
    }


def verify(stored: torch.Tensor, layout: Layout | None, expected: Mapping[str, int], name: str) -> None:
    """Check every byte of ``stored`` (as in :func:`checksums`), which the reader knows as ``name``.

    What passes can be decoded on any device: escapes are read from inside the blob alone.

    Raises:
        CheckpointError: a section that changed since it was stored, or a blob that no encoder has made.
    """
    for section, crc in checksums(stored, layout).items():
        if crc != expected[section]:
            start = 0 if layout is None else layout.offsets[section]
            raise CheckpointError(
                f"{name}: section {section}, from byte {start} of the tensor, changed since it was packed "
                f"(CRC-32 {crc:08x}, was {expected[section]:08x}); pack the checkpoint again"
            )
    if layout is not None and not _counts_agree(stored, layout):
        raise CheckpointError(
            f"{name}: section off does not count the escapes that section planes has, so that it cannot be decoded; "
            "pack the checkpoint again"
        )


def _counts_agree(blob: torch.Tensor, layout: Layout) -> bool:
    """Return whether ``off`` rises from 0 to the number of escapes, in every tile by as many as its planes have."""
    parts = sections(blob, layout)
    before = parts.off.long() & 0xFFFFFFFF
    planes = parts.planes.view(torch.int64)
    escaped = planes[:, 0] & planes[:, 1] & planes[:, 2]
    counts = torch.cat([_ones(words).sum(1) for words in escaped.split(_BLOCK)])
    return bool(before[0] == 0 and before[-1] == layout.escapes and torch.equal(before.diff(), counts))


def _ones(words: torch.Tensor) -> torch.Tensor:
    """Return the number of bits set in each of ``words`` (int64): in pairs, nibbles, bytes, then all eight bytes."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56
