"""Inputs that a model of whatever kind takes, for a pass on the meta device: only their shapes matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, PreTrainedModel

Inputs = dict[str, torch.Tensor]

_CACHES = ("past_key_values", "cache_params")
"""transformers' names of what a pass keeps for the next one."""


def example_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yield keyword arguments of a pass, on the meta device: first all kinds of input, then the main one alone.

    ids are int64, shape [1, 2]; images, spectrograms and sound have the model's dtype and the shape that its config
    asks for. A model that joins images and text in a way of its own may take the main input only.
    """
    takes = inspect.signature(model.forward).parameters
    known = _known(model)
    inputs = {name: value for name, value in known.items() if name in takes}
    yield inputs
    main = {name: value for name, value in inputs.items() if name in (model.main_input_name, "decoder_input_ids")}
    if main.keys() != inputs.keys():
        yield main


def following_inputs(model: PreTrainedModel, inputs: Inputs, outputs: object) -> dict[str, object]:
    """Return the keyword arguments of a pass for one more token, with the cache in ``outputs``; none if it has none."""
    takes = inspect.signature(model.forward).parameters
    caches = {name: cache for name in _CACHES if name in takes and (cache := getattr(outputs, name, None)) is not None}
    if not caches:
        return {}
    following: dict[str, object] = dict(caches)
    if model.config.is_encoder_decoder:
        following["encoder_outputs"] = (getattr(outputs, "encoder_last_hidden_state", None),)
    token = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    return following | {token: inputs[token][:, :1]}


def _known(model: PreTrainedModel) -> Inputs:
    """Return every kind of input for which the config says a shape."""
    config = model.config
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids

    def add(name: str, *shape: int) -> None:
        inputs[name] = torch.zeros((1, *shape), dtype=model.dtype, device="meta")

    vision = _sub_config(config, "image_size")
    if vision is not None:
        size = vision.image_size
        add("pixel_values", getattr(vision, "num_channels", 3), *(size if isinstance(size, list) else (size, size)))
    audio = _sub_config(config, "num_mel_bins")
    if audio is not None:
        add("input_features", audio.num_mel_bins, 2 * getattr(audio, "max_source_positions", 1500))
    if model.main_input_name == "input_values":
        add("input_values", 16000)
    return inputs


def _sub_config(config: PretrainedConfig, attribute: str) -> PretrainedConfig | None:
    """Return the config that has ``attribute``: itself, or the part of it for one kind of input."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    return next((part for part in parts if getattr(part, attribute, None) is not None), None)
