"""Which units are the weights of one linear layer, which a processor can compute with where they lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from djinn.weights.units import Unit


def linear_units(model: nn.Module, units: Iterable[Unit]) -> set[str]:
    """Return the names of the ``units`` that one ``nn.Linear`` alone reads: a bfloat16 matrix, with a bias or without.

    A layer whose ``forward`` somebody has replaced is left out, and so is one of a class of its own.
    """
    return {unit.name for unit in units if not unit.experts and not unit.held and _is_linear(model, unit)}


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
