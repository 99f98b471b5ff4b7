"""The codec on a CPU: NumPy over blocks of tiles that stay in the cache, eight weights to a word.

Every call works in the calling thread alone. NumPy releases the interpreter lock within a block, so several threads can
code several tensors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import NDArray

from djinn.codec.layout import TABLE, TILE, TILE_BYTES, Layout, Sections, sections

BLOCK = 128
"""Tiles worked on at once: few enough for the cache, and enough that threads seldom meet at the interpreter lock."""

_ONES = np.uint64(0x0101010101010101)
_BIT = np.arange(8, dtype=np.uint64)[:, None]
"""The bit of a plane's byte that belongs to each eighth of ``sm``."""

Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]
Words = NDArray[np.uint64]


def survey(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every tile's table (uint8 [tiles, 8]) and number of escapes (int64 [tiles]).

    ``weights`` are bfloat16 [elements], contiguous, not empty.
    """
    tiles = -(-len(weights) // TILE)
    lut = np.zeros((tiles, 8), np.uint8)
    escapes = np.empty(tiles, np.int64)
    for first, block in _blocks(weights):
        size = len(block)
        bins = _interleaved(block >> 7 & 0xFF) + 256 * np.arange(size, dtype=np.int32)[:, None]
        counts = _histogram(bins, 256 * size).reshape(size, 256)
        escapes[first : first + size] = TILE
        for code in range(TABLE):
            commonest = counts.argmax(1)  # of several, the first: the smallest exponent
            lut[first : first + size, code] = commonest
            escapes[first : first + size] -= counts[np.arange(size), commonest]
            counts[np.arange(size), commonest] = -1
    return torch.from_numpy(lut), torch.from_numpy(escapes)


def write(weights: torch.Tensor, parts: Sections) -> None:
    """Write sections ``sm``, ``planes`` and ``esc`` of ``weights`` (as in :func:`survey`) by ``lut`` and ``off``."""
    sm, planes, lut, off, esc = _arrays(parts)
    for first, block in _blocks(weights):
        tiles = slice(first, first + len(block))
        sm[tiles] = _interleaved(block & 0x7F | block >> 8 & 0x80)
        exponents = _interleaved(block >> 7 & 0xFF)
        has_code = [(exponents == lut[tiles, code, None]).view(np.uint64) for code in range(TABLE)]
        for plane in range(3):
            bit_clear = reduce(np.bitwise_or, (has_code[code] for code in range(TABLE) if not code >> plane & 1))
            bits = (bit_clear ^ _ONES).reshape(-1, 8, TILE // 64)
            planes[tiles, plane] = np.bitwise_or.reduce(bits << _BIT, axis=1).view(np.uint8)
        tile, byte, bit = _escaped(planes[tiles])
        esc[off[first] : off[first + len(block)]] = exponents.reshape(-1, 8, TILE // 8)[tile, bit, byte]


def decoder(parts: Sections, out: torch.Tensor) -> Callable[[], None]:
    """Return a function that decodes ``parts`` into ``out`` (uint8 [decoded_bytes], contiguous)."""
    return partial(_decode, parts, out)


def batch_decoder(
    elements: int, device: torch.device
) -> Callable[[Sequence[tuple[torch.Tensor, Layout]], torch.Tensor], None]:
    """Return a function that decodes blobs of ``elements`` weights into the rows of a tensor, one after the other."""
    row_bytes = elements // TILE * TILE_BYTES

    def run(blobs: Sequence[tuple[torch.Tensor, Layout]], out: torch.Tensor) -> None:
        rows = out.view(-1).view(torch.uint8).split(row_bytes)
        for (blob, layout), row in zip(blobs, rows, strict=True):
            _decode(sections(blob, layout), row)

    return run


def address_decoder(elements: int, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """As on a GPU; but a processor knows its tensors, and is given these."""

    def at(addresses: torch.Tensor, out: torch.Tensor) -> None:
        raise NotImplementedError("on a processor blobs are decoded as the tensors that they are")

    return at


def _decode(parts: Sections, out: torch.Tensor) -> None:
    sm, planes, lut, off, esc = _arrays(parts)
    halves = out.numpy().view(np.uint16).reshape(-1, 2, TILE // 2)
    for first in range(0, len(sm), BLOCK):
        tiles = slice(first, first + BLOCK)
        bits = planes[tiles].view(np.uint64)[:, :, None] >> _BIT & _ONES
        table = (lut[tiles] * _ONES)[:, :, None, None]  # the entry of escapes is 0
        chosen = [table[:, code] for code in range(8)]
        for plane in range(3):
            chosen = _choose(bits[:, plane] * np.uint64(0xFF), chosen)
        exponents = chosen[0].view(np.uint8)
        tile, byte, bit = _escaped(planes[tiles])
        exponents[tile, bit, byte] = esc[off[first] : off[min(first + BLOCK, len(sm))]]

        exponent = exponents.view(np.uint16).reshape(-1, TILE // 2)
        rest = sm[tiles].view(np.uint16)
        halves[tiles, 0] = (exponent & 0xFF) << 7 | (rest & 0x80) << 8 | rest & 0x7F
        halves[tiles, 1] = exponent >> 1 & 0x7F80 | rest & 0x8000 | rest >> 8 & 0x7F


def _arrays(parts: Sections) -> tuple[Bytes, Bytes, Bytes, NDArray[np.uint32], Bytes]:
    sm, planes, lut, off, esc = (part.numpy() for part in parts)
    return sm, planes, lut, off.view(np.uint32), esc


def _blocks(weights: torch.Tensor) -> Iterator[tuple[int, Halves]]:
    """Yield (first tile, bits [up to BLOCK tiles, 2 halves, 2048 weights]); the last tile comes filled up."""
    bits = weights.view(torch.int16).numpy().view(np.uint16)
    whole = len(bits) // TILE
    tiles = bits[: whole * TILE].reshape(whole, 2, TILE // 2)
    for first in range(0, whole, BLOCK):
        yield first, tiles[first : first + BLOCK]
    if len(bits) > whole * TILE:
        rest = bits[whole * TILE :]
        commonest = np.bincount(rest >> 7 & 0xFF).argmax()
        last = np.full(TILE, commonest << 7, np.uint16)
        last[: len(rest)] = rest
        yield whole, last.reshape(1, 2, TILE // 2)


def _histogram(bins: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """Return how often each of ``size`` numbers stands in ``bins``. PyTorch needs half of NumPy's time for it."""
    counts: NDArray[np.int64] = torch.bincount(torch.from_numpy(bins.reshape(-1)), minlength=size).numpy()
    return counts


def _interleaved(halves: NDArray[np.integer]) -> Bytes:
    """Return the low bytes of ``halves`` [tiles, 2, 2048], whose high bytes are 0, in the order of ``sm``."""
    return (halves[:, 0] | halves[:, 1] << 8).view(np.uint8)


def _escaped(planes: Bytes) -> tuple[NDArray[np.intp], ...]:
    """Return tile, byte and bit of every escape in ``planes`` [tiles, 3, 512], in the order of ``esc``."""
    escaped = np.bitwise_and.reduce(planes, axis=1)
    bits = np.unpackbits(escaped, bitorder="little").view(np.bool_)  # NumPy finds True eight times as fast as 1
    return np.unravel_index(np.flatnonzero(bits), (*escaped.shape, 8))


def _choose(mask: Words, options: list[Words]) -> list[Words]:
    """Halve ``options``: of each pair, the second where ``mask`` has ones, the first elsewhere."""
    return [clear ^ (clear ^ full) & mask for clear, full in zip(options[::2], options[1::2], strict=True)]
