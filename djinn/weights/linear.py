"""Which units are the weights of one linear layer, which a processor can compute with where they lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn.weights.tracing import first_readers_of_inputs
from djinn.weights.units import Unit


def linear_units(model: PreTrainedModel, units: Iterable[Unit]) -> dict[str, str]:
    """Return the names of the ``units`` that one ``nn.Linear`` alone reads: a bfloat16 matrix, with a bias or without.

    For each the name of the layer that is the first to read the same inputs, as gate does before up. A layer whose
    ``forward`` somebody has replaced is left out, and so is one of a class of its own.
    """
    found = {
        unit.name: unit.readers[0] for unit in units if not unit.experts and not unit.held and _is_linear(model, unit)
    }
    first = first_readers_of_inputs(model, found.values())
    return {name: first.get(layer, layer) for name, layer in found.items()}


def _is_linear(model: nn.Module, unit: Unit) -> bool:
    if len(unit.readers) != 1:
        return False
    module = model.get_submodule(unit.readers[0])
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    raw = {tensor.name.rpartition(".")[2]: tensor.entry.raw for tensor in unit.tensors}
    if not {"weight"} <= raw.keys() <= {"weight", "bias"}:
        return False
    return all(entry.dtype == torch.bfloat16 and entry.stride is None for entry in raw.values())
