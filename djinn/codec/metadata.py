"""What is stored beside a blob, and by which a damaged or foreign one is refused.

Every section of a blob has a CRC-32, which covers the section with the gap after it: so every byte is in exactly one,
and the error names the section. CRC-32 runs at about 1 GB/s on a core and lets go of the interpreter lock.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from djinn.codec.layout import VERSION, Layout
from djinn.errors import CheckpointError

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Metadata:
    """A coded tensor's shape and layout, and the CRC-32 of each section by name."""

    shape: tuple[int, ...]
    layout: Layout
    crc32: Mapping[str, int]

    @classmethod
    def of(cls, blob: torch.Tensor, layout: Layout, shape: tuple[int, ...]) -> Metadata:
        """Describe ``blob`` (uint8 [layout.nbytes], in host memory), coded from a tensor of ``shape``."""
        return cls(tuple(shape), layout, _checksums(blob, layout))

    def verify(self, blob: torch.Tensor, name: str) -> None:
        """Check every byte of ``blob`` (uint8, in host memory), which the reader knows as ``name``.

        Raises:
            CheckpointError: another size, or a section that changed since it was coded.
        """
        if blob.numel() != self.layout.nbytes:
            raise CheckpointError(f"{name}: has {blob.numel()} coded bytes instead of {self.layout.nbytes}")
        for section, crc in _checksums(blob, self.layout).items():
            if crc != self.crc32[section]:
                raise CheckpointError(
                    f"{name}: section {section}, from byte {self.layout.offsets[section]}, changed since it was coded "
                    f"(CRC-32 {crc:08x}, was {self.crc32[section]:08x}); code the checkpoint again"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, for a file's header."""
        return {
            "version": VERSION,
            "dtype": DTYPE,
            "shape": list(self.shape),
            "elements": self.layout.elements,
            "escapes": self.layout.escapes,
            "crc32": {section: f"{crc:08x}" for section, crc in self.crc32.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], name: str) -> Metadata:
        """Undo `to_dict`; ``name`` is what the reader knows the tensor as.

        Raises:
            CheckpointError: a version or dtype that this djinn cannot decode, or values that contradict each other.
        """
        version, dtype = stored.get("version"), stored.get("dtype")
        if version != VERSION:
            raise CheckpointError(
                f"{name}: coded in version {version!r} and this djinn decodes version {VERSION}; "
                f"code the checkpoint again, or use the djinn that coded it"
            )
        if dtype != DTYPE:
            raise CheckpointError(f"{name}: coded from {dtype!r}; version {VERSION} codes {DTYPE} only")
        try:
            shape = tuple(int(size) for size in stored["shape"])
            layout = Layout(int(stored["elements"]), int(stored["escapes"]))
            crc32 = {section: int(stored["crc32"][section], 16) for section in layout.offsets}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{name}: its description is damaged ({reason}); code the checkpoint again"
            ) from error
        if math.prod(shape) != layout.elements:
            raise CheckpointError(f"{name}: its shape {list(shape)} does not have its {layout.elements} elements")
        return cls(shape, layout, crc32)


def _checksums(blob: torch.Tensor, layout: Layout) -> dict[str, int]:
    data = blob.numpy().data
    extents = pairwise([*layout.offsets.values(), layout.nbytes])
    return {name: zlib.crc32(data[start:end]) for name, (start, end) in zip(layout.offsets, extents, strict=True)}
