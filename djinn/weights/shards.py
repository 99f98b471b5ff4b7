"""The tensors of a checkpoint's files: plain ones, and packed ones as what they were before."""

from __future__ import annotations

import json
import os
from pathlib import Path

from djinn.errors import CheckpointError
from djinn.weights.header import read_header
from djinn.weights.packed_format import described, is_packed
from djinn.weights.tensors import TensorEntry


def read_shard(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, packed or not.

    Raises:
        CheckpointError: a file that :func:`djinn.weights.header.read_header` or
            :func:`djinn.weights.packed_format.described` refuses.
    """
    header = read_header(path)
    return described(header) if is_packed(header) else dict(header.tensors)


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors checkpoint in ``folder`` under its name in the files.

    Raises:
        CheckpointError: no checkpoint there, a shard that is missing or outside the folder, a tensor that its shard
            does not have, or a damaged file.
    """
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():  # first, as transformers does
        return read_shard(single)
    if not index_path.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
        shards = sorted({os.fspath(shard) for shard in weight_map.values()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index_path}: not a safetensors index: {error!r}") from None
    headers: dict[str, dict[str, TensorEntry]] = {}
    for shard in shards:
        path = folder / shard
        if not path.parent.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{index_path}: names {shard!r}, which is outside the checkpoint folder")
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names {shard}, which is not there")
        headers[shard] = read_shard(path)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index_path}: places {name} in {shard}, which does not have it")
    return {name: headers[shard][name] for name, shard in weight_map.items()}
