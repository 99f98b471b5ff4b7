"""transformers' models without weights: the class that a config names, made on the meta device, and its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging


def model_class(config: PretrainedConfig) -> Any:
    """Return the class that ``config`` names, as transformers' pipelines resolve it: the one that was saved.

    Where it names none that this transformers has, the automatic class of causal language models.
    """
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((found for found in named if found is not None), AutoModelForCausalLM)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of ``config`` (see :func:`model_class`) with meta parameters, real buffers and ties made."""
    found = model_class(config)
    make = found.from_config if found is AutoModelForCausalLM else found._from_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = make(config, dtype=dtype)
    model.tie_weights()
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, owning module, its name there, parameter) for every name, tied ones included."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), module, name, parameter


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars and warnings about loading for a while: nothing is loaded, and what is wrong is raised."""
    accelerate = logging.getLogger("accelerate")
    levels = hf_logging.get_verbosity(), accelerate.level
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(levels[0])
        accelerate.setLevel(levels[1])
        if bars:
            hf_logging.enable_progress_bar()
