"""Checkpoints that transformers is shown in place of others: the same names and shapes, with few of the bytes.

It maps names, ties and computes buffers by them, and reads only what it converts; everything else is a hole in a file,
which takes no disk.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from djinn.weights.foreign import parse_object
from djinn.weights.header import plain_header
from djinn.weights.packed_shard import original_bytes
from djinn.weights.shards import named_file
from djinn.weights.tensors import TensorEntry


def with_stacks(folder: Path, made: Path, entries: Mapping[str, TensorEntry], wanted: Collection[str]) -> Path:
    """Return folder ``made``, with one file of ``entries``: the checkpoint unpacked and as if its experts were stacked.

    Only tensors that are ``wanted`` have bytes.
    """
    named = named_file(folder) or folder / "model.safetensors"
    if not named.is_file():
        named = folder / "model.safetensors.index.json"
    path = made / named.relative_to(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        index, path = path, path.with_name("stacked.safetensors")  # not a name that transformers looks for first
        stored = parse_object(named.read_bytes())  # as it is in all else: transformers refuses one without metadata
        index.write_text(json.dumps(stored | {"weight_map": dict.fromkeys(entries, path.name)}))
    header = plain_header(path, entries)
    with path.open("wb") as file:
        file.write(header.lead)
        file.truncate(header.size)
        for name in entries.keys() & set(wanted):
            file.seek(header.offset(name))
            file.write(original_bytes(name, entries[name], torch.device("cpu")).numpy().data)
    _link_documents(folder, made)
    return made


def _link_documents(folder: Path, made: Path) -> None:
    """Link the config and whatever else is JSON, but for what has been made."""
    for path in folder.iterdir():
        if path.suffix == ".json" and not (made / path.name).exists():
            (made / path.name).symlink_to(path.absolute())
