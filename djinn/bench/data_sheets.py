"""GPUs whose rates are those of a data sheet: to plan for a card that nobody has measured here.

Real copies reach less than the sheet's link: on an H100 we measured 55 of 63 GB/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from djinn.planning.rates import Rates

_GEN4_X16 = 31.5e9
"""Bytes/s in one direction: 16 GT/s on each of 16 lanes, of which 128 of 130 bits are data (PCI Express 4.0)."""
_ROWS = 4096
"""Tokens at once at which a product reaches the peak."""


@dataclass(frozen=True)
class DataSheet:
    """What a sheet says of a GPU."""

    memory: float
    """Bytes/s of device memory."""
    memory_bytes: int
    """Of device memory; what sheets call a GB of it is 2^30 bytes."""
    flops: float
    """Dense bfloat16 with sums in float32, FLOP/s."""
    link: float = _GEN4_X16

    def rates(self) -> Rates:
        """Return the rates to predict from. What no sheet says is not measured: the disk, and the host's own time."""
        from djinn.planning.rates import ComputeRate, Rates

        # A product takes one operation for each of a weight's bytes and a token.
        peak = ComputeRate(tokens=_ROWS, rate=min(self.memory, self.flops / _ROWS))
        return Rates(device="cuda", link=self.link, compute=(ComputeRate(tokens=1, rate=self.memory), peak))


DATA_SHEETS: Mapping[str, DataSheet] = {
    # NVIDIA L4 Tensor Core GPU, datasheet: 24 GB, 300 GB/s, 242 TFLOPS with sparsity, which are 121 without.
    "L4": DataSheet(memory=300e9, memory_bytes=24 * 2**30, flops=121e12),
    # NVIDIA Ada GPU Architecture, whitepaper, appendix A, GeForce RTX 4090: 24 GB, 1008 GB/s, 165.2 TFLOPS.
    "4090": DataSheet(memory=1008e9, memory_bytes=24 * 2**30, flops=165.2e12),
    # NVIDIA A100 Tensor Core GPU, datasheet 1758950 r4: the cards of 80 GB, 312 TFLOPS.
    "A100-PCIe": DataSheet(memory=1935e9, memory_bytes=80 * 2**30, flops=312e12),
    "A100-SXM": DataSheet(memory=2039e9, memory_bytes=80 * 2**30, flops=312e12),
}


def sheet_of(name: str) -> DataSheet | None:
    """Return the data sheet of a card, however its letters are written; None where there is none here."""
    return next((sheet for card, sheet in DATA_SHEETS.items() if card.lower() == name.lower()), None)
