"""Weights that the codec's tests share, by name; all bfloat16 in host memory, made from seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from djinn.codec import reference
from djinn.codec.layout import TILE, Layout, sections

Make = Callable[[torch.Generator, int, int], torch.Tensor]


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


DISTRIBUTIONS: dict[str, tuple[float, Make]] = {
    "normal": (11.25, lambda g, rows, columns: 0.02 * _normal(g, rows, columns)),
    "scaled rows and columns": (
        11.5,
        lambda g, rows, columns: (
            0.02 * _normal(g, rows, columns) * _normal(g, rows, 1).exp() * (0.5 * _normal(g, 1, columns)).exp()
        ),
    ),
    "laplace": (
        11.5,
        lambda g, rows, columns: 0.02 * _uniform(g, rows, columns).log() * _normal(g, rows, columns).sign(),
    ),
    "student t(4)": (
        11.5,
        lambda g, rows, columns: (
            0.02 * _normal(g, rows, columns) / (torch.randn(4, rows, columns, generator=g).square().mean(0)).sqrt()
        ),
    ),
    "5% zeros": (
        11.5,
        lambda g, rows, columns: 0.02 * _normal(g, rows, columns) * (_uniform(g, rows, columns) >= 0.05),
    ),
}
"""How weights may be spread, by name: the most bits that one may take when coded, and a function that makes them."""


def spread(name: str, rows: int = 256, columns: int = 4096) -> torch.Tensor:
    """Return bfloat16 [rows, columns] of the distribution ``name``. Each row of 4096 is a tile."""
    return DISTRIBUTIONS[name][1](torch.Generator().manual_seed(0), rows, columns).bfloat16()


def normal(elements: int, seed: int = 0) -> torch.Tensor:
    """Return bfloat16 [elements] of N(0, 0.02)."""
    return (0.02 * _normal(torch.Generator().manual_seed(seed), elements)).bfloat16()


def random_bits(elements: int, seed: int = 0) -> torch.Tensor:
    """Return bfloat16 [elements] of any bits: nearly every exponent is an escape."""
    bits = torch.randint(-(2**15), 2**15, (elements,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int16).view(torch.bfloat16)


def of_exponents(exponents: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 of these exponents, with signs and mantissas that differ from one to the next."""
    number = torch.arange(len(exponents))
    return (number % 3 % 2 << 15 | exponents << 7 | number * 37 % 128).to(torch.int16).view(torch.bfloat16)


def bits(weights: torch.Tensor) -> torch.Tensor:
    """Return the bits of ``weights``, int16 [elements]: NaN and -0 compare as what they are."""
    return weights.reshape(-1).view(torch.int16)


SIZES = (1, 2, 31, TILE - 1, TILE, TILE + 1, 2 * TILE + 777)

CASES: dict[str, torch.Tensor] = {
    "every bit pattern": torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16),
    "every bit pattern, mixed": torch.arange(2**16).mul(40503).to(torch.int16).view(torch.bfloat16),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 3000).bfloat16(),
    "all zero": torch.zeros(5000, dtype=torch.bfloat16),
    "subnormal": torch.arange(1, 128).repeat(50).to(torch.int16).view(torch.bfloat16),
    "infinite": torch.tensor([float("inf"), -float("inf")] * 2500).bfloat16(),
    "NaN payloads": torch.tensor([0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFFF] * 900).to(torch.int16).view(torch.bfloat16),
    "a tile nearly of escapes": of_exponents(torch.arange(TILE) % 256),
    "escapes at both ends of tiles": of_exponents(
        torch.where(torch.arange(3 * TILE) % TILE % (TILE - 1) == 0, 200, 120 + torch.arange(3 * TILE) % 7)
    ),
    "one weight of every exponent": of_exponents(torch.arange(256)),
    "random bits": random_bits(3 * TILE - 5),
    **{f"normal, {elements}": normal(elements) for elements in SIZES},
    "normal, three tiles": normal(3 * TILE),
}
"""Weights that a codec may get wrong; at most 65,536 of them."""


class Coded(NamedTuple):
    """Weights and their blob."""

    weights: torch.Tensor
    blob: torch.Tensor
    layout: Layout


def coded(weights: torch.Tensor) -> Coded:
    """Encode, whatever it costs."""
    return Coded(weights, *reference.encode(weights))


def all_escapes(weights: torch.Tensor) -> Coded:
    """Return a blob that no encoder makes, since the commonest exponents of a tile always have codes; whole tiles."""
    layout = Layout(len(weights), len(weights))
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
    parts = sections(blob, layout)
    in_order = (bits(weights).long() & 0xFFFF).view(-1, TILE)[:, reference.WEIGHT_AT]
    parts.sm[:] = in_order >> 8 & 0x80 | in_order & 0x7F
    parts.planes[:] = 0xFF
    parts.off[:] = TILE * torch.arange(layout.tiles + 1)
    parts.esc[:] = (in_order >> 7 & 0xFF).view(-1, 8, TILE // 8).transpose(1, 2).reshape(-1)
    return Coded(weights, blob, layout)


def with_strays(strays: int, tiles: int = 1) -> torch.Tensor:
    """Return whole tiles of seven exponents, but for as many strays: these are the escapes."""
    exponents = 120 + torch.arange(tiles * TILE) % 7
    at = torch.arange(strays) * 997 % (tiles * TILE)
    exponents[at] = 10 + at % 100
    return of_exponents(exponents)


def _repeated() -> list[Coded]:
    first, second = coded(normal(2 * TILE, 1)), coded(normal(2 * TILE, 2))
    return [first, second, first, first]


BATCHES: dict[str, Callable[[], list[Coded]]] = {
    "one blob": lambda: [coded(normal(3 * TILE))],
    "seventeen blobs": lambda: [coded(with_strays(strays)) for strays in range(0, 17 * 13, 13)],
    "the same blob again": _repeated,
    "every bit pattern": lambda: [coded(part) for part in CASES["every bit pattern, mixed"].split(2 * TILE)],
    "no escapes, some, all": lambda: [
        coded(with_strays(0, tiles=2)),
        all_escapes(random_bits(2 * TILE, 1)),
        coded(CASES["NaN payloads"][:4500].repeat(2)[: 2 * TILE]),
        coded(CASES["a tile nearly of escapes"].repeat(2)),
        coded(CASES["escapes at both ends of tiles"][: 2 * TILE]),
        coded(random_bits(2 * TILE, 2)),
        coded(torch.zeros(2 * TILE, dtype=torch.bfloat16)),
        coded(with_strays(1, tiles=2)),
    ],
}
"""Blobs that are decoded together, by name: all of a batch have equally many weights, and their escapes differ."""
