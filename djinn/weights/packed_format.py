"""The packed form of a safetensors file: versions 1 and 2. Pure: descriptions in, header bytes out, and back.

A packed file is a safetensors file with the same name and the same tensor names. A tensor that gains by it is stored as
its blob (see :mod:`djinn.codec.layout`), ``U8``, filled up with zeros to whole 256 bytes; any other as it was. Coded
tensors come first and the header is filled up with spaces to whole pages, so that blobs lie where direct reads and
decoders want them. Beside the file's own metadata there are two entries more:

    djinn        JSON: {"version": 1,
                        "header": the original file's header, byte for byte,
                        "tensors": {name: {"elements": n, "escapes": n, "crc32": {section: 8 hexadecimal digits}}}}
                 a raw tensor has only "crc32", with the one section "weights"
                 {name: {"experts": [one such object for each expert]}} of a tensor of several experts (version 2)
    djinn_crc32  the CRC-32 of that text

A tensor of several experts is as many blobs, one behind the other, each filled up to whole 256 bytes; where it is raw,
its bytes are as they were. So each expert can be read and verified alone. A file without such tensors is of version 1.

So the original file can be written again, and damage anywhere is found: in a tensor by its sections' checksums, in the
description by its own, in the rest of the header by not agreeing with the description.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
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
from djinn.weights.tensors import DTYPE_NAMES, FileSpan, Stacked, TensorEntry

VERSIONS = (1, 2)
"""Those that are read. A file is written in the first that can describe it."""
_KEY, _KEY_CRC32 = "djinn", "djinn_crc32"


@dataclass(frozen=True)
class Stored:
    """How a tensor, or one expert's part of it, is stored: its layout, None if raw, and the CRC-32 of each section."""

    layout: Layout | None
    crc32: Mapping[str, int]


def is_packed(header: Header) -> bool:
    """Return whether a file is packed, in whatever version."""
    return _KEY in header.metadata


def stored_bytes(entry: TensorEntry, layouts: Sequence[Layout | None]) -> int:
    """Return the bytes that a tensor takes in a packed file, whose equal parts have these ``layouts``."""
    raw_bytes = entry.raw_bytes // len(layouts)
    return sum(raw_bytes if layout is None else -(-layout.nbytes // ALIGNMENT) * ALIGNMENT for layout in layouts)


def compose(original: Header, tensors: Mapping[str, Sequence[Stored]], reserved: int) -> bytes:
    """Return length and header of the packed file, ``reserved`` bytes; ``tensors`` are in the order of their bytes.

    Each is stored as one part, or as one for each of its experts.
    """
    body = _body(original, tensors)
    return (reserved - 8).to_bytes(8, "little") + body + b" " * (reserved - 8 - len(body))


def reserve(original: Header, experts: Mapping[str, int]) -> int:
    """Return bytes, whole pages, that hold the header however the tensors will be coded.

    ``experts`` says of those that are stored by expert how many each has.
    """
    worst = {}
    for name, entry in original.tensors.items():
        parts = experts.get(name, 1)
        count = max(entry.raw_bytes // 2 // parts, 1)
        layout = Layout(count, min(count, 2**32 - 1))
        worst[name] = [Stored(layout, dict.fromkeys(section_names(layout), 0))] * parts
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
    """Return the tensors of a packed file as what they were, with their codes; those of experts are stacked.

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
            parts = _parse(stored[name])
        if len(parts) > 1 and (len(was.shape) < 3 or was.shape[0] != len(parts)):
            raise _damaged(header, f"tensor {name} of shape {list(was.shape)} is not one of {len(parts)} experts")
        layouts = [part.layout for part in parts]
        elements = math.prod(was.shape) // len(parts)
        as_coded = (
            was.dtype == torch.bfloat16
            and all(layout is not None and layout.elements == elements for layout in layouts)
            and there.nbytes == stored_bytes(was, layouts)
        )
        as_raw = not any(layouts) and (there.dtype, there.shape) == (was.dtype, was.shape)
        if not (as_coded or as_raw):
            raise _damaged(header, f"tensor {name} is not what it says")
        tensors[name] = _entry(was, there, parts)
    return tensors


def _entry(was: TensorEntry, there: TensorEntry, parts: Sequence[Stored]) -> TensorEntry:
    """Return what ``was`` a tensor, and is ``there`` as one part, or as one for each expert."""
    if len(parts) == 1:
        return TensorEntry(was.dtype, was.shape, there.source, parts[0].layout, parts[0].crc32)
    assert isinstance(there.source, FileSpan)
    experts = []
    offset = there.source.offset
    for part in parts:
        source = FileSpan(there.source.path, offset)
        experts.append(TensorEntry(was.dtype, was.shape[1:], source, part.layout, part.crc32))
        offset += stored_bytes(experts[-1], [part.layout])
    return TensorEntry(was.dtype, was.shape, Stacked(tuple(expert.raw for expert in experts)))


def _body(original: Header, tensors: Mapping[str, Sequence[Stored]]) -> bytes:
    plain, by_expert = VERSIONS
    description = {
        "version": by_expert if any(len(parts) > 1 for parts in tensors.values()) else plain,
        "header": original.text.decode(),
        "tensors": {name: _describe(parts) for name, parts in tensors.items()},
    }
    text = json.dumps(description, separators=(",", ":"))
    metadata = {**original.metadata, _KEY: text, _KEY_CRC32: f"{zlib.crc32(text.encode()):08x}"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, parts in tensors.items():
        entry = original.tensors[name]
        nbytes = stored_bytes(entry, [part.layout for part in parts])
        dtype, shape = (DTYPE_NAMES[entry.dtype], list(entry.shape)) if parts[0].layout is None else ("U8", [nbytes])
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
    if description.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{header.path}: packed in version {description.get('version')!r}, and this djinn reads versions "
            f"{' and '.join(map(str, VERSIONS))}; pack the original again, or use the djinn that packed it"
        )
    return description


def _describe(parts: Sequence[Stored]) -> dict[str, Any]:
    if len(parts) > 1:
        return {"experts": [_describe([part]) for part in parts]}
    stored = parts[0]
    crc32 = {"crc32": {section: f"{crc:08x}" for section, crc in stored.crc32.items()}}
    if stored.layout is None:
        return crc32
    return {"elements": stored.layout.elements, "escapes": stored.layout.escapes} | crc32


def _parse(stored: Mapping[str, Any]) -> list[Stored]:
    if "experts" in stored:
        experts = stored["experts"]
        if not isinstance(experts, list) or len(experts) < 2:
            raise ValueError("experts have to be a list of at least two")
        return [_parse_one(expert) for expert in experts]
    return [_parse_one(stored)]


def _parse_one(stored: Mapping[str, Any]) -> Stored:
    layout = None
    if "elements" in stored:
        elements, escapes = stored["elements"], stored["escapes"]
        if type(elements) is not int or type(escapes) is not int:
            raise ValueError(f"elements {elements!r} and escapes {escapes!r} have to be whole numbers")
        layout = Layout(elements, escapes)
    return Stored(layout, {section: int(stored["crc32"][section], 16) for section in section_names(layout)})


def _damage(header: Header, where: str) -> AbstractContextManager[None]:
    return refusing(f"{header.path}: the description of its packed tensors is damaged: {where}", "pack it again")


def _damaged(header: Header, what: str) -> CheckpointError:
    return CheckpointError(f"{header.path}: the description of its packed tensors is damaged: {what}; pack it again")
