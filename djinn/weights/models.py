"""transformers' models without weights: the class that a config names, made on the meta device, and its parameters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from djinn.errors import CheckpointError
from djinn.weights.foreign import refusing

ADAPTER = "adapter_config.json"
"""The file by which transformers and PEFT know an adapter."""


def config_of(folder: Path) -> PretrainedConfig:
    """Return the config of the checkpoint in ``folder``; nothing that the checkpoint brings as code is run.

    Raises:
        CheckpointError: a config that transformers cannot load, a model that is code of the checkpoint's own, or an
            adapter beside it.
    """
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER}: a PEFT adapter beside the model; move it and its weights into a folder of their own, "
            "load the model, and attach the adapter by peft.PeftModel.from_pretrained"
        )
    with refusing(f"{folder}: transformers cannot load its config"):
        document, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        kind = document.get("model_type")
        if "auto_map" in document and kind not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{folder}: model_type {kind!r} is code of the checkpoint's own (auto_map in config.json), which djinn "
                "does not run; use a checkpoint of a model that transformers has"
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def model_class(config: PretrainedConfig) -> Any:
    """Return the class that ``config`` names, as transformers' pipelines resolve it: the one that was saved.

    Where it names no model that this transformers has, the automatic class of causal language models.
    """
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    models = (found for found in named if isinstance(found, type) and issubclass(found, PreTrainedModel))
    return next(models, AutoModelForCausalLM)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of ``config`` (see :func:`model_class`) with meta parameters, real buffers and ties made."""
    found = model_class(config)
    automatic = found is AutoModelForCausalLM
    make = partial(found.from_config, trust_remote_code=False) if automatic else found._from_config
    # Not accelerate's init_empty_weights, which replaces a method of all modules, those of other threads too.
    with building, torch.device("meta"):
        model: PreTrainedModel = make(config, dtype=dtype)
        model.tie_weights()
    compute_buffers(model)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def compute_buffers(model: PreTrainedModel) -> None:
    """Put buffers in host memory in the place of meta ones, and let the model compute them."""
    for parameter in model.parameters():
        vars(parameter)["_is_hf_initialized"] = True
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    with building:
        model.initialize_weights()


def computed(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """Return the parameter called ``name``, in host memory, as the model computes it; None where it is left to chance.

    The model's own parameter becomes another one on the meta device.
    """
    path, _, local = name.rpartition(".")
    owner = model.get_submodule(path)
    meta = owner._parameters[local]
    assert meta is not None
    results = []
    for start in (0, 1):
        made = owner._parameters[local] = nn.Parameter(torch.full_like(meta, start, device="cpu"), False)
        with building, torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(start)
            model._init_weights(owner)
        results.append(made.data)
    owner._parameters[local] = nn.Parameter(meta.data, False)
    return results[0] if torch.equal(*results) else None


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, owning module, its name there, parameter) for every name, tied ones included."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), module, name, parameter


def held_here(parameter: torch.Tensor) -> torch.Tensor:
    """Return what holds a parameter's bytes in this process: itself, or its own part of one that ranks share."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


building = threading.RLock()
"""Held while transformers makes a model: it changes what all threads see (functions of its and torch's, log levels)."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars and warnings about loading for a while: nothing is loaded, and what is wrong is raised.

    One thread at a time, so that each puts back what was there before.
    """
    accelerate = logging.getLogger("accelerate")
    with building:
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
