"""Inputs for the traced pass of models of every kind."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import LlavaForConditionalGeneration, Wav2Vec2Config, Wav2Vec2Model

from djinn.weights.inputs import example_inputs, following_inputs
from djinn.weights.models import empty_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_takes_what_its_own_inputs_are(name: str) -> None:
    """The first candidate has the inputs that a real pass has, with their ranks and dtypes."""
    architecture = ARCHITECTURES[name]
    config = architecture.config
    config.architectures = [architecture.model_class]
    found = next(iter(example_inputs(empty_model(config, torch.bfloat16))))
    real = architecture.inputs() | architecture.decoder
    real.pop("attention_mask", None)
    assert found.keys() == real.keys()
    for key, value in found.items():
        assert value.is_meta
        assert (value.ndim, value.dtype) == (real[key].ndim, real[key].dtype)
        assert key.endswith("_ids") or value.shape == real[key].shape


def test_images_are_left_out_in_a_second_try() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(ARCHITECTURES["llava"].config)
    assert [list(inputs) for inputs in example_inputs(model)] == [["input_ids", "pixel_values"], ["input_ids"]]


def test_sound_is_an_input() -> None:
    config = Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with torch.device("meta"):
        model = Wav2Vec2Model(config)
    (inputs,) = example_inputs(model)
    assert list(inputs) == ["input_values"]
    model(**inputs)


def test_a_pass_without_a_cache_has_none_that_follows() -> None:
    with torch.device("meta"):
        model = ARCHITECTURES["bert"].cls(ARCHITECTURES["bert"].config)
    inputs = next(iter(example_inputs(model)))
    assert following_inputs(model, inputs, model(**inputs)) == {}
