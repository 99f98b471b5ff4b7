"""Checkpoints that are cut for ranks: a packed file for each of several processes, with what that process holds.

A folder holds ``rank-0-of-4.safetensors`` and so on, beside the config and the other files of the checkpoint that it
was made of. Names in the files are the model's own, and tensors lie in the order in which a pass reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from djinn.errors import CheckpointError, ConfigError
from djinn.weights.index import WeightIndex, empty_for, require_all
from djinn.weights.models import config_of
from djinn.weights.packed_shard import original_bytes
from djinn.weights.shards import read_shard
from djinn.weights.tensors import TensorEntry

_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.safetensors")


def file_name(rank: int, ranks: int) -> str:
    """Return the name of the file that one of ``ranks`` reads."""
    return f"rank-{rank}-of-{ranks}.safetensors"


def ranked(rank: int, name: str) -> str:
    """Return how a rank's part of a tensor is called, where all ranks' are listed."""
    return f"rank {rank}: {name}"


def rank_of(name: str) -> int:
    """Return the rank that reads the file of this name."""
    found = _NAME.fullmatch(name)
    assert found is not None, "a name that file_name has made"
    return int(found[1])


def ranks_of(folder: Path) -> int | None:
    """Return for how many ranks the checkpoint in ``folder`` was cut; None for one that is whole."""
    found = next((_NAME.fullmatch(path.name) for path in sorted(folder.glob("rank-*-of-*.safetensors"))), None)
    return None if found is None else int(found[2])


def refuse_cut(folder: Path) -> None:
    """Refuse a checkpoint that was cut for ranks, where a whole one is needed.

    Raises:
        CheckpointError: it was cut.
    """
    ranks = ranks_of(folder)
    if ranks is not None:
        raise CheckpointError(f"{folder}: was cut for {ranks} ranks; give the checkpoint that it was made of instead")


def rank_tensors(folder: Path) -> Iterator[tuple[str, TensorEntry]]:
    """Yield every tensor of every rank of a checkpoint that was cut, under its name and the rank's number."""
    ranks = ranks_of(folder) or 0
    for rank in range(ranks):
        for name, entry in read_shard(folder / file_name(rank, ranks)).items():
            yield ranked(rank, name), entry


def rank_index(folder: Path, ranks: int, dtype: torch.dtype | None) -> WeightIndex:
    """Return the index of what this process holds of a checkpoint that was cut for ``ranks``.

    Its model is whole, and on the meta device: it is still to be distributed.

    Raises:
        ConfigError: this process is not one of as many, or ``dtype`` is not what was cut.
        CheckpointError: a damaged file.
    """
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count != ranks:
        raise ConfigError(
            f"{folder}: was cut for {ranks} ranks, and here {'are ' if count > 1 else 'is '}{count}: start {ranks} by "
            f"`torchrun --nproc-per-node {ranks}` and load with distributed_config, or give the checkpoint that it was "
            "made of"
        )
    path = folder / file_name(dist.get_rank(), ranks)
    entries = read_shard(path)
    model = empty_for(folder, config_of(folder), entries, dtype)
    parameters = dict(model.named_parameters())
    require_all(folder, model, parameters.keys() - entries.keys(), [])
    for name, parameter in parameters.items():
        if entries[name].dtype != parameter.dtype:
            raise ConfigError(
                f"{path}: {name} was cut in {entries[name].dtype}, and {parameter.dtype} is asked for; leave "
                "dtype away, or cut a checkpoint of that dtype"
            )
    for name in entries.keys() - parameters.keys():  # buffers that a checkpoint keeps
        entry, (owner, _, local) = entries[name], name.rpartition(".")
        value = original_bytes(name, entry, torch.device("cpu")).view(entry.dtype).view(entry.shape)
        model.get_submodule(owner)._buffers[local] = value
    model.eval()
    model.requires_grad_(False)
    return WeightIndex(model, {name: entries[name] for name in parameters}, synthetic=False, is_cut=True)
