"""Which units a processor can compute with, and which of them read the same inputs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY
from torch import nn

from djinn.weights.index import synthetic_index
from djinn.weights.linear import linear_units
from djinn.weights.models import empty_model
from djinn.weights.units import find_units


def by_inputs(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, first in linear_units(model, find_units(synthetic_index(model, 0))).items():
        found.setdefault(first, []).append(name)
    return found


def test_layers_that_read_the_same_tensor_are_found() -> None:
    found = by_inputs(empty_model(TINY["llama"], torch.bfloat16))
    layer = "model.layers.0."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    assert found[attention + "q_proj"] == [attention + part for part in ("q_proj", "k_proj", "v_proj")]
    assert found[attention + "o_proj"] == [attention + "o_proj"]
    assert found[mlp + "gate_proj"] == [mlp + "gate_proj", mlp + "up_proj"]
    assert found[mlp + "down_proj"] == [mlp + "down_proj"]
    assert found["lm_head"] == ["lm_head"]


def test_layers_of_a_model_that_cannot_be_traced_have_inputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty_model(TINY["llama"], torch.bfloat16)
    units = find_units(synthetic_index(model, 0))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(type(model), "forward", fail)
    assert all(first == name for name, first in linear_units(model, units).items())
