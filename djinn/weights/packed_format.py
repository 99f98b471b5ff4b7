"""The packed form of a safetensors file: version 1. Pure: descriptions in, header bytes out, and back.

A packed file is a safetensors file with the same name and the same tensor names. A tensor that gains by it is stored as
its blob (see :mod:`djinn.codec.layout`), ``U8``, filled up with zeros to whole 256 bytes; any other as it was. Coded
tensors come first and the header is filled up with spaces to whole pages, so that blobs lie where direct reads and
decoders want them. Beside the file's own metadata there are two entries more:

    djinn        JSON: {"version": 1,
                        "header": the original file's header, byte for byte,
                        "tensors": {name: {"elements": n, "escapes": n, "crc32": {section: 8 hexadecimal digits}}}}
                 a raw tensor has only "crc32", with the one section "weights"
    djinn_crc32  the CRC-32 of that text

so the original file can be written again, and damage anywhere is found: in a tensor by its sections' checksums, in the
description by its own, in the rest of the header by not agreeing with the description.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from djinn.codec.checksums import section_names
from djinn.codec.layout import ALIGNMENT, Layout
from djinn.errors import CheckpointError
from djinn.weights.foreign import parse_object, refusing
from djinn.weights.header import Header, parse_header
from djinn.weights.synthetic_shard import PAGE_BYTES
from djinn.weights.tensors import DTYPES, FileSpan, TensorEntry

VERSION = 1
_KEY, _KEY_CRC32 = "djinn", "djinn_crc32"


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored: its layout, None for a raw one, and the CRC-32 of each section."""

    layout: Layout | None
    crc32: Mapping[str, int]


def is_packed(header: Header) -> bool:
    """Return whether a file is packed, in whatever version."""
    return _KEY in header.metadata


def stored_bytes(entry: TensorEntry, layout: Layout | None) -> int:
    """Return the bytes that a tensor takes in a packed file."""
    return entry.raw_bytes if layout is None else -(-layout.nbytes // ALIGNMENT) * ALIGNMENT


def compose(original: Header, tensors: Mapping[str, Stored], reserved: int) -> bytes:
    """Return length and header of the packed file, ``reserved`` bytes; ``tensors`` are in the order of their bytes."""
    body = _body(original, tensors)
    return (reserved - 8).to_bytes(8, "little") + body + b" " * (reserved - 8 - len(body))


def reserve(original: Header) -> int:
    """Return bytes, whole pages, that hold the header however the tensors will be coded."""
    worst = {}
    for name, entry in original.tensors.items():
        count = max(entry.raw_bytes // 2, 1)
        layout = Layout(count, min(count, 2**32 - 1))
        worst[name] = Stored(layout, dict.fromkeys(section_names(layout), 0))
    # A raw tensor is described by its own dtype and shape instead, which may be longer.
    shapes = sum(len(json.dumps(list(entry.shape))) + 16 for entry in original.tensors.values())
    return -(-(8 + len(_body(original, worst)) + shapes) // PAGE_BYTES) * PAGE_BYTES


def original_of(header: Header) -> Header:
    """Return the header of the file that was packed into this one.

    Raises:
        CheckpointError: a description that is damaged or of another version.
    """
    return _original(header, _description(header))


def described(header: Header) -> dict[str, TensorEntry]:
    """Return the tensors of a packed file as what they were, with their codes.

    Raises:
        CheckpointError: a version that this djinn does not know, a damaged description, or a file that is not what
            its description says.
    """
    description = _description(header)
    original, stored = _original(header, description), description.get("tensors")
    if header.end != header.size:
        raise _damaged(header, f"the file has {header.size} bytes, and {header.end} are described")
    if not isinstance(stored, dict) or set(stored) != set(header.tensors) or set(stored) != set(original.tensors):
        raise _damaged(header, "its tensors are not the file's")
    tensors = {}
    for name, there in header.tensors.items():
        was = original.tensors[name]
        with _damage(header, f"tensor {name}"):
            layout, crc32 = _parse(stored[name])
        as_coded = (
            layout is not None
            and was.dtype == torch.bfloat16
            and (layout.elements, there.nbytes)
            == (
                was.raw_bytes // 2,
                stored_bytes(was, layout),
            )
        )
        as_raw = layout is None and (there.dtype, there.shape) == (was.dtype, was.shape)
        if not (as_coded or as_raw):
            raise _damaged(header, f"tensor {name} is not what it says")
        tensors[name] = TensorEntry(was.dtype, was.shape, there.source, layout, crc32)
    return tensors


def _body(original: Header, tensors: Mapping[str, Stored]) -> bytes:
    description = {
        "version": VERSION,
        "header": original.text.decode(),
        "tensors": {name: _describe(stored) for name, stored in tensors.items()},
    }
    text = json.dumps(description, separators=(",", ":"))
    metadata = {**original.metadata, _KEY: text, _KEY_CRC32: f"{zlib.crc32(text.encode()):08x}"}
    header: dict[str, Any] = {"__metadata__": metadata}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, stored in tensors.items():
        entry = original.tensors[name]
        nbytes = stored_bytes(entry, stored.layout)
        dtype, shape = (names[entry.dtype], list(entry.shape)) if stored.layout is None else ("U8", [nbytes])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return json.dumps(header, separators=(",", ":")).encode()


def _original(header: Header, description: Mapping[str, Any]) -> Header:
    with _damage(header, "the original header"):
        text = description["header"].encode()
    original = parse_header(header.path, text, 2**63)  # it is as large as its last tensor says
    end = original.start
    for entry in original.tensors.values():
        if entry.source != FileSpan(header.path, end):
            raise _damaged(header, "the original header leaves gaps")
        end += entry.nbytes
    return original


def _description(header: Header) -> dict[str, Any]:
    text = header.metadata.get(_KEY)
    if text is None:
        raise CheckpointError(f"{header.path}: is not packed")
    with _damage(header, "as JSON"):
        if f"{zlib.crc32(text.encode()):08x}" != header.metadata.get(_KEY_CRC32):
            raise _damaged(header, "its checksum is another")
        description = parse_object(text)
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{header.path}: packed in version {description.get('version')!r}, and this djinn reads version {VERSION}; "
            "pack the original again, or use the djinn that packed it"
        )
    return description


def _describe(stored: Stored) -> dict[str, Any]:
    crc32 = {"crc32": {section: f"{crc:08x}" for section, crc in stored.crc32.items()}}
    if stored.layout is None:
        return crc32
    return {"elements": stored.layout.elements, "escapes": stored.layout.escapes} | crc32


def _parse(stored: Mapping[str, Any]) -> tuple[Layout | None, dict[str, int]]:
    layout = None
    if "elements" in stored:
        elements, escapes = stored["elements"], stored["escapes"]
        if type(elements) is not int or type(escapes) is not int:
            raise ValueError(f"elements {elements!r} and escapes {escapes!r} have to be whole numbers")
        layout = Layout(elements, escapes)
    return layout, {section: int(stored["crc32"][section], 16) for section in section_names(layout)}


def _damage(header: Header, where: str) -> AbstractContextManager[None]:
    return refusing(f"{header.path}: the description of its packed tensors is damaged: {where}", "pack it again")


def _damaged(header: Header, what: str) -> CheckpointError:
    return CheckpointError(f"{header.path}: the description of its packed tensors is damaged: {what}; pack it again")
