"""Shards: transformers' tensor parallelism splits a model, and each rank's index has what that rank holds of it.

Which part of a weight that is torch says (its DTensor), so any of transformers' plans will do; what is no shard is
whole on every rank. All that is transformers' or torch's of this stands here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.weights.index import Reads, WeightIndex
from djinn.weights.models import held_here, owners
from djinn.weights.tensors import TensorEntry
from djinn.weights.ties import untie
from djinn.weights.units import readers_of

LEAST = Version("5.23")
"""Of transformers: earlier ones split models in other ways, or not at all, without a word."""
_LITTLE = 1.5
"""Times its even share that a rank may hold without being told of it."""
_ATTENTION = ("k_proj", "qkv_proj", "query_key_value")
"""What transformers calls the modules that make the keys, by themselves or with queries and values."""


def sharded(index: WeightIndex[PreTrainedModel], config: DistributedConfig) -> WeightIndex[PreTrainedModel]:
    """Return the index of this rank's shards of a model, which transformers distributes as ``config`` says.

    Raises:
        ConfigError: a configuration that is no tensor parallelism over all ranks, or a model that cannot be split so.
    """
    model, ranks = index.model, dist.get_world_size()
    _require_tensor_parallel(config, ranks)
    if index.is_cut and config.tp_plan != "auto":
        raise ConfigError(
            "distributed_config: this checkpoint was cut for ranks by the model's own plan; load it with "
            "tp_plan='auto', or give the checkpoint that it was made of"
        )
    if index.reads is not None:
        raise ConfigError(f"distributed_config: this {type(model).__name__} is quantised, and stays on one GPU")
    readers, tensors = readers_of(index)
    _distribute(model, config)
    heads_are_split = _has_split_heads(model, ranks)
    cut = _held if index.is_cut else _shard
    shards = {name: cut(tensors[name], parameter) for name, parameter in model.named_parameters()}
    reads: Reads = [(name, (reader,)) for name, by in readers.items() if name in shards for reader in by]
    sums = sum(map(_is_summed, model.modules()))
    found = replace(index, tensors=shards, reads=reads, ranks=ranks if heads_are_split else 1, sums=sums)
    if not sums:
        raise ConfigError(f"distributed_config: transformers splits nothing of this {type(model).__name__}")
    if not index.is_cut and found.nbytes * ranks > _LITTLE * index.nbytes:
        warnings.warn(
            f"each of {ranks} ranks holds {found.nbytes / index.nbytes:.0%} of this {type(model).__name__}: the plan "
            "that transformers has for it splits little; ep_size divides the experts of a mixture",
            stacklevel=2,
        )
    return found


def filled(
    model: PreTrainedModel,
    config: DistributedConfig,
    device: torch.device,
    weight_of: Callable[[str, nn.Parameter], torch.Tensor],
) -> PreTrainedModel:
    """Distribute a model without memory, and put this rank's shards of the weights that are made for it on ``device``.

    Args:
        weight_of: returns a whole weight in host memory, of its name and the parameter without memory.

    Raises:
        ConfigError: as :func:`sharded`.
    """
    _distribute(model, config)
    made: dict[int, nn.Parameter] = {}
    for name, module, local, parameter in list(owners(model)):
        if id(parameter) not in made:
            held = weight_of(name, parameter).to(device)
            if isinstance(parameter, DTensor):
                split = distribute_tensor(held, parameter.device_mesh, parameter.placements, src_data_rank=None)
                held = like(parameter, split.to_local().clone())  # a copy: a shard would keep all of the weight
            made[id(parameter)] = nn.Parameter(held, requires_grad=False)
        module._parameters[local] = made[id(parameter)]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def like(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """Return a distributed tensor of the shape and placement of ``parameter``, with ``local`` on this rank."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _distribute(model: PreTrainedModel, config: DistributedConfig) -> None:
    """Make transformers distribute a model without memory; tied weights are one parameter before and after."""
    tied = dict(model.all_tied_weights_keys)
    untie(model)
    try:
        type(model).maybe_distribute_model(model, config, _mesh(type(model), config))
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"distributed_config: {error}") from error
    held = {name: (module, local) for name, module, local, _ in owners(model)}
    for target, source in tied.items():
        module, local = held[target]
        source_module, source_local = held[source]
        module._parameters[local] = source_module._parameters[source_local]


def _mesh(kind: type[PreTrainedModel], config: DistributedConfig) -> Any:
    """Return transformers' mesh for a configuration, one for each default group.

    Its groups are never given back, and on a GPU each of them that is used holds device memory. Those that split
    weights are used at once: the first sum of a group takes far longer than a token.
    """
    made = _meshes_of(dist.group.WORLD)
    sizes = tuple(value for name, value in sorted(vars(config).items()) if name.endswith("_size"))
    if sizes not in made:
        _, _, mesh = kind.prepare_distribute_model(config)
        assert mesh is not None, "a configuration of one process is refused before"
        made[sizes] = mesh
        for axis in ("tp", "ep"):
            split = mesh.get_mesh(axis)
            if split.size() > 1:
                dist.all_reduce(torch.zeros(1, device=split.device_type), group=split.get_group())
    return made[sizes]


@lru_cache(maxsize=1)
def _meshes_of(_: Any) -> dict[tuple[int, ...], Any]:
    """Return the meshes that were made beside a default group, by the sizes of their configurations."""
    return {}


@contextmanager
def pretended(ranks: int, rank: int = 0) -> Iterator[DistributedConfig]:
    """Let this process be one of ``ranks`` that nobody has started, to see what it would hold.

    The first holds the most, where a weight cannot be divided evenly. torch's ``fake`` group sends nothing.

    Raises:
        ConfigError: this process is one of several already.
    """
    if dist.is_initialized():
        raise ConfigError(f"{ranks} GPUs are planned for in a process that is no rank itself")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    local, os.environ["LOCAL_RANK"] = os.environ.get("LOCAL_RANK"), "0"  # transformers asks for it
    try:
        yield DistributedConfig(tp_size=ranks, tp_plan="auto")
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it would give the next one's tensors this one's place among the ranks
        del os.environ["LOCAL_RANK"]
        if local is not None:
            os.environ["LOCAL_RANK"] = local


def _is_summed(module: nn.Module) -> bool:
    """Return whether ranks add up what they compute in a module: each has columns, experts, or rows of a vocabulary."""
    for parameter in module._parameters.values():
        if isinstance(parameter, DTensor) and parameter.ndim > 1:
            split = [getattr(placement, "dim", None) for placement in parameter.placements]
            if parameter.ndim - 1 in split or (split != [None] and isinstance(module, nn.Embedding)):
                return True
            if parameter.ndim > 2 and 0 in split:
                return True
    return False


def _require_tensor_parallel(config: DistributedConfig, ranks: int) -> None:
    if Version(transformers.__version__) < LEAST:
        raise UnavailableError(
            f"distributed_config: transformers {LEAST} or later splits models as djinn streams them, and "
            f"{transformers.__version__} is installed"
        )
    for name, what in (("pp_size", "pipeline"), ("fsdp_size", "data"), ("dp_replicate_size", "data")):
        if (getattr(config, name, None) or 1) > 1:
            raise ConfigError(
                f"distributed_config: {name}={getattr(config, name)} is {what} parallelism, which djinn does not "
                'stream; tp_plan="auto" alone splits every weight over all GPUs'
            )
    if config.tp_size != ranks:
        raise ConfigError(
            f'distributed_config: tp_size={config.tp_size}, and there are {ranks} ranks; tp_plan="auto" splits every '
            "weight over all of them"
        )


def _has_split_heads(model: PreTrainedModel, ranks: int) -> bool:
    """Return whether each rank has some of the heads.

    Raises:
        ConfigError: heads that do not divide. transformers splits keys wherever ranks end, and fails in the first pass
            where that is within a head.
    """
    text = model.config.get_text_config()
    parameters = model.named_parameters()
    are_split = any(isinstance(each, DTensor) and path.split(".")[-2] in _ATTENTION for path, each in parameters)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, name, None)
        if are_split and count and count % ranks:
            raise ConfigError(
                f"distributed_config: {name} {count} of this {type(model).__name__} does not divide by {ranks} ranks"
            )
    return are_split


def _shard(entry: TensorEntry, parameter: nn.Parameter) -> TensorEntry:
    """Return what this rank holds of a tensor."""
    if not isinstance(parameter, DTensor):
        return entry
    for mesh_dim, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]  # of every placement that is a shard
            entry = entry.kept(dim, _stretches(entry.shape[dim], placement, parameter.device_mesh, mesh_dim))
    return entry


def _held(entry: TensorEntry, parameter: nn.Parameter) -> TensorEntry:
    """Return a tensor that was cut for this rank as it is.

    Raises:
        CheckpointError: it was cut in another way than this configuration cuts.
    """
    shape = tuple(held_here(parameter).shape)
    if entry.shape != shape:
        raise CheckpointError(
            f"distributed_config: a rank holds {list(shape)} of a tensor of which {list(entry.shape)} was cut for it; "
            "load with the configuration that djinn.pack cuts for, DistributedConfig(tp_plan='auto')"
        )
    return entry


def _stretches(size: int, placement: Any, mesh: DeviceMesh, mesh_dim: int) -> tuple[tuple[int, int], ...]:
    """Return which of ``size`` indices along a dimension this rank holds, as stretches (begin, end)."""
    numbers = torch.arange(size, device=mesh.device_type).view(*[1] * placement.dim, size)
    placements = [placement if dim == mesh_dim else Replicate() for dim in range(mesh.ndim)]
    held = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local().flatten().cpu()
    jumps = (held.diff() != 1).nonzero().flatten() + 1
    found = tuple((int(part[0]), int(part[-1]) + 1) for part in held.tensor_split(jumps.tolist()) if len(part))
    return found or ((0, 0),)


def local_parameters(model: nn.Module, device: torch.device) -> dict[str, list[torch.Tensor]]:
    """Put parameters without memory in the place of those on the meta device; return what holds each one's bytes here.

    That is the parameter itself, or of a distributed one the tensor that it is made of on this rank.
    """
    found: dict[str, list[torch.Tensor]] = {}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            nothing = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.to_local().shape)
            made[id(parameter)] = nn.Parameter(like(parameter, nothing), requires_grad=False)
            found[name] = [made[id(parameter)]._local_tensor]  # type: ignore[attr-defined]
        else:
            nothing = torch.empty(0, dtype=parameter.dtype, device=device)
            made[id(parameter)] = nn.Parameter(nothing, requires_grad=False)
            found[name] = [made[id(parameter)]]
    for _, module, local, parameter in list(owners(model)):
        module._parameters[local] = made[id(parameter)]
    return found
