"""What a model's passes compute with its units: beside a plan, all that a prediction needs to know of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from djinn.planning.dimensions import dimensions
from djinn.planning.workspace import Workload, attention_flops, kv_cache_bytes
from djinn.weights.experts import picked_share
from djinn.weights.index import WeightIndex
from djinn.weights.units import Unit


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model's passes compute with its units, beside which the plan need not know the model."""

    shares: Mapping[str, float]
    """Of a unit's weights, the share that one token is multiplied by, where it is not all: experts, looked-up rows."""
    head: frozenset[str]
    """Units that see only the last token of each sequence."""
    attention_flops: float
    """Of a prefill, beside the weights'."""
    cache_bytes: int
    """KV cache that a decode step reads at the longest."""
    workload: Workload
    sums: int = 0
    """Times in a pass that several GPUs add up what they have computed."""
    sum_bytes: int = 0
    """What they add up of each token."""


def work_of(index: WeightIndex, units: Sequence[Unit], workload: Workload) -> Work:
    """Return what passes of ``workload`` compute with the units of a model."""
    model = index.model
    head, picked = model.get_output_embeddings(), picked_share(model.config)
    shares: dict[str, float] = {}
    last = set()
    for unit in units:
        modules = [model.get_submodule(reader) for reader in unit.readers]
        if all(isinstance(module, nn.Embedding) for module in modules):
            shares[unit.name] = 0.0
        elif picked < 1 and any("experts" in tensor.name.split(".") for tensor in unit.tensors):
            shares[unit.name] = picked
        if head is not None and head in modules:
            last.add(unit.name)
    return Work(
        shares=shares,
        head=frozenset(last),
        attention_flops=attention_flops(model.config, workload, index.ranks),
        cache_bytes=kv_cache_bytes(model.config, model.dtype, workload, index.ranks),
        sums=index.sums,
        sum_bytes=next(dimensions(model.config)).hidden * model.dtype.itemsize,
        workload=workload,
    )
