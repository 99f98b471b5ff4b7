"""The tensors of a checkpoint's files: plain ones, and packed ones as what they were before."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from djinn.errors import CheckpointError
from djinn.weights.foreign import parse_object, refusing, require_file
from djinn.weights.header import read_header
from djinn.weights.packed_format import described, is_packed
from djinn.weights.tensors import FileSpan, Stacked, TensorEntry

_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_BLOCK_BYTES = 2**24


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

    As in transformers, all tensors of the files that the index names count, and of one that several files hold, the
    last file's.

    Raises:
        CheckpointError: as for :func:`shard_files`; a tensor that its shard does not have, or a damaged file.
    """
    files, placed = _listed(folder)
    held = {path: read_shard(path) for path in files}
    for name, path in placed.items():
        if name not in held[path]:
            raise CheckpointError(f"{folder}: the index places {name} in {path.name}, which does not have it")
    found = {name: entry for path in files for name, entry in held[path].items()}
    return {name: found[name] for name in placed} | found  # in the order of the index


def shard_files(folder: Path) -> list[Path]:
    """Return the files that hold the checkpoint's tensors, sorted by name: those that transformers would read.

    Raises:
        CheckpointError: no checkpoint there, a shard that is missing or outside the folder, or an index that is none.
    """
    return _listed(folder)[0]


def _listed(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files as for :func:`shard_files`, and where the index, if there is one, places each tensor."""
    if any(_RANKS.fullmatch(path.name) for path in folder.glob("shard-*")):
        raise CheckpointError(
            f"{folder}: holds one file for each rank of a distributed run; save the model whole, by save_pretrained"
        )
    named = named_file(folder)
    if named is not None and not named.name.endswith(".json"):
        return [named], {}
    index_path = named or folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if named is None and single.is_file():  # first, as transformers does
        return [single], {}
    if not index_path.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no {index_path.name}")
    with refusing(f"{index_path}: not a safetensors index"):
        weight_map: dict[str, str] = parse_object(index_path.read_bytes())["weight_map"]
        shards = {shard: _inside(folder, shard, index_path) for shard in sorted(set(weight_map.values()))}
        for path in shards.values():
            require_file(path, index_path)
        return list(shards.values()), {name: shards[shard] for name, shard in weight_map.items()}


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two tensors are stored as the same bytes of the same dtype, shape and code.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    if one == other:
        return True
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    if isinstance(one.source, Stacked) or isinstance(other.source, Stacked):
        parts, others = one.stored_parts, other.stored_parts
        return len(parts) == len(others) and all(map(same_bytes, parts, others))
    assert isinstance(one.source, FileSpan)
    assert isinstance(other.source, FileSpan)
    with refusing(f"{one.source.path}: cannot be read"):
        for start in range(0, one.nbytes, _BLOCK_BYTES):
            nbytes = min(_BLOCK_BYTES, one.nbytes - start)
            first = np.fromfile(one.source.path, np.uint8, nbytes, offset=one.source.offset + start)
            second = np.fromfile(other.source.path, np.uint8, nbytes, offset=other.source.offset + start)
            if not np.array_equal(first, second):
                return False
    return True


def named_file(folder: Path) -> Path | None:
    """Return the file that ``transformers_weights`` of config.json names, None where it names none.

    Raises:
        CheckpointError: one that is not there, outside the folder, or no safetensors file and no index of such.
    """
    config = folder / "config.json"
    if not config.is_file():
        return None
    with refusing(f"{folder}: transformers cannot load its config"):
        document, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        name = document.get("transformers_weights")
        if name is None:
            return None
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{config}: transformers_weights {name!r} is no safetensors file and no index of such"
            )
        path = _inside(folder, name, config)
    require_file(path, config)
    return path


def _inside(folder: Path, name: str, named_by: Path) -> Path:
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{named_by}: names {name!r}, which is outside the checkpoint folder")
    return path
