"""Headers of safetensors files: which tensors a file declares, checked before anything is allocated.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from djinn.errors import CheckpointError
from djinn.weights.foreign import parse_object, refusing, require_file
from djinn.weights.tensors import DTYPE_NAMES, DTYPES, FileSpan, TensorEntry

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format (its Rust reader refuses larger headers)."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    path: Path
    text: bytes
    """The header as it stands in the file, without its length before it."""
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    """As they are stored, in the order of their bytes."""
    size: int
    """Bytes of the file."""

    @property
    def lead(self) -> bytes:
        """The file's first bytes: the header's length, and the header."""
        return len(self.text).to_bytes(8, "little") + self.text

    @property
    def start(self) -> int:
        """Byte of the file at which tensors begin."""
        return 8 + len(self.text)

    @property
    def end(self) -> int:
        """Byte of the file after the last tensor."""
        return self.start + sum(entry.nbytes for entry in self.tensors.values())

    def offset(self, name: str) -> int:
        """Return the byte of the file at which a tensor begins."""
        source = self.tensors[name].source
        assert isinstance(source, FileSpan)
        return source.offset


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, checked against the file's real size.

    Raises:
        CheckpointError: not a safetensors file, truncated, or tensors that overlap or lie outside the file.
    """
    require_file(path)
    with refusing(f"{path}: cannot be read"), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a safetensors file, or cut off inside its header ({size} bytes)")
        return parse_header(path, file.read(length), size)


def plain_header(path: Path, tensors: Mapping[str, TensorEntry]) -> Header:
    """Return the header of a plain file ``path`` that is to hold ``tensors``, raw, one behind the other."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        offsets = [end, end + entry.raw_bytes]
        described[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        end += entry.raw_bytes
    text = json.dumps(described).encode()
    return parse_header(path, text, 8 + len(text) + end)


def parse_header(path: Path, text: bytes, size: int) -> Header:
    """Return the header that ``text`` is, of a file ``path`` of ``size`` bytes; errors as for :func:`read_header`."""
    with refusing(f"{path}: the header is not safetensors'"):
        header = parse_object(text)
        metadata = _texts(header.pop("__metadata__", {}))
        return Header(path, text, metadata, _checked(path, header, 8 + len(text), size), size)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ has to be an object of texts")
    return metadata


def _sizes(item: dict[str, Any], field: str) -> list[int]:
    numbers = item[field]
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{field} {numbers!r} has to be a list of whole numbers from 0")
    return numbers


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    end = 0
    for name, item in sorted(header.items(), key=lambda pair: _sizes(pair[1], "data_offsets")):
        begin, stop = _sizes(item, "data_offsets")
        if item["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {item['dtype']}, which this torch does not have")
        entry = TensorEntry(DTYPES[item["dtype"]], tuple(_sizes(item, "shape")), FileSpan(path, start + begin))
        if stop - begin != entry.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name} spans {stop - begin} bytes, but {item['dtype']} {list(entry.shape)} needs "
                f"{entry.nbytes}"
            )
        if begin < end:
            raise CheckpointError(f"{path}: tensor {name} begins at {begin}, inside the tensor that ends at {end}")
        if start + stop > size:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {start + stop}, but the file has {size}: it is truncated; "
                "download or write it again"
            )
        tensors[name] = entry
        end = stop
    return tensors
