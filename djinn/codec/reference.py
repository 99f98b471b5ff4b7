"""The codec as plainly as it can be said: what :mod:`djinn.codec.layout` describes, in torch operations.

It is slow and needs some 100 bytes per weight. Every other encoder gives its bytes, every other decoder its bits.
"""

from __future__ import annotations

import torch

from djinn.codec.layout import TABLE, TILE, Layout, sections

WEIGHT_AT = torch.arange(TILE).view(2, -1).T.reshape(-1)
"""int64 [4096]: the weight whose sign and mantissa stand at each byte of a tile's ``sm``: 0, 2048, 1, 2049, ..."""


def encode(weights: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Return the blob and the layout of ``weights`` (bfloat16, any shape, not empty), whether or not that gains."""
    bits = _whole_tiles(weights.reshape(-1).view(torch.int16).long() & 0xFFFF)[:, WEIGHT_AT]
    exponent = _exponent(bits)
    lut = _by_frequency(exponent)[:, :TABLE]
    matches = exponent[:, :, None] == lut[:, None, :]
    code = torch.where(matches.any(2), matches.int().argmax(2), TABLE)

    # [tiles, 512, 8]: byte and bit of a plane, the order in which escapes stand.
    by_plane_bit = code.view(-1, 8, TILE // 8).transpose(1, 2)
    escaped = by_plane_bit == TABLE
    layout = Layout(weights.numel(), int(escaped.sum()))
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
    parts = sections(blob, layout)
    parts.sm[:] = bits >> 8 & 0x80 | bits & 0x7F
    for plane in range(3):
        parts.planes[:, plane] = ((by_plane_bit >> plane & 1) << torch.arange(8)).sum(2)
    parts.lut[:, :TABLE] = lut
    parts.off[1:] = escaped.sum((1, 2)).cumsum(0)
    parts.esc[:] = exponent.view(-1, 8, TILE // 8).transpose(1, 2)[escaped]
    return blob, layout


def decode(blob: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the decoded weights of ``blob`` (uint8 [layout.nbytes]): bfloat16 [layout.elements]."""
    parts = sections(blob, layout)
    plane_bits = parts.planes[..., None] >> torch.arange(8) & 1  # [tiles, 3, 512, 8]
    by_plane_bit = (plane_bits << torch.arange(3)[:, None, None]).sum(1)
    table = parts.lut.long()
    exponent = table[torch.arange(layout.tiles)[:, None, None], by_plane_bit]
    exponent[by_plane_bit == TABLE] = parts.esc.long()
    exponent = exponent.transpose(1, 2).reshape(-1, TILE)
    sm = parts.sm.long()
    bits = torch.empty(layout.tiles, TILE, dtype=torch.int64)
    bits[:, WEIGHT_AT] = (sm & 0x80) << 8 | exponent << 7 | sm & 0x7F
    return bits.to(torch.int16).view(torch.bfloat16).view(-1)[: layout.elements]


def _exponent(bits: torch.Tensor) -> torch.Tensor:
    return bits >> 7 & 0xFF


def _by_frequency(exponent: torch.Tensor) -> torch.Tensor:
    """Return all 256 exponents by tile, [tiles, 256]: commonest first, of equally common ones the smaller."""
    counts = torch.zeros(len(exponent), 256, dtype=torch.int64)
    counts.scatter_add_(1, exponent, torch.ones_like(exponent))
    return counts.argsort(dim=1, descending=True, stable=True)


def _whole_tiles(bits: torch.Tensor) -> torch.Tensor:
    """Fill up the last tile of ``bits`` [elements]; return [tiles, 4096]."""
    last = bits[(len(bits) - 1) // TILE * TILE :]
    commonest = _by_frequency(_exponent(last)[None])[0, 0]
    return torch.cat([bits, (commonest << 7).expand(-len(bits) % TILE)]).view(-1, TILE)
