"""Tied weights: one parameter under several names, where the files do not contradict it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn.weights.models import owners
from djinn.weights.shards import same_bytes
from djinn.weights.tensors import TensorEntry


def tie(model: PreTrainedModel, stored: Mapping[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    """Make what the config ties one parameter, and return ``stored`` with an entry for each name of it.

    As in transformers, any of the names may be the one that is stored; and weights that are stored apart, with bytes
    that differ, stay apart, with a warning. ``stored`` is what the files of ``folder`` hold, by the model's names.
    """
    entries = dict(stored)
    held = {name: (module, local) for name, module, local, _ in owners(model)}
    tied = dict(model.all_tied_weights_keys)
    for target, source in tied.items():
        group = [source, *(name for name, other in tied.items() if other == source)]
        first = next((name for name in group if name in stored), None)
        if first is None:
            continue
        entries.setdefault(source, stored[first])
        entries.setdefault(target, entries[source])
        module, local = held[target]
        if same_bytes(entries[source], entries[target]):
            source_module, source_local = held[source]
            module._parameters[local] = source_module._parameters[source_local]
            continue
        warnings.warn(
            f"{folder}: the config ties {target} to {source}, but the files hold two that differ, which stay apart, as "
            "in transformers; tie_word_embeddings is false for such a model",
            stacklevel=2,
        )
        model.all_tied_weights_keys.pop(target)
    return entries


def untie(model: PreTrainedModel) -> None:
    """Give each name that the config ties a meta parameter of its own, as it is in a model whose files are read."""
    held = {name: (module, local) for name, module, local, _ in owners(model)}
    for target in model.all_tied_weights_keys:
        module, local = held[target]
        parameter = module._parameters[local]
        assert parameter is not None
        module._parameters[local] = nn.Parameter(torch.empty_like(parameter))
