"""What several systems need: the empty model, the model in ordinary memory, and room for it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from djinn import hardware
from djinn.bench.systems.base import Job
from djinn.errors import UnavailableError
from djinn.sizes import format_bytes
from djinn.weights.architectures import load_architecture
from djinn.weights.models import config_of as stored_config
from djinn.weights.models import empty_model
from djinn.weights.synthetic_values import fill

FILLERS = 8
"""Threads that make synthetic weights."""
_SPARE_BYTES = 256 * 10**6


def deterministic_attention() -> None:
    """Keep torch from choosing cuDNN's attention for this process: on an H100 its results differ from run to run."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def config_of(job: Job) -> PretrainedConfig:
    """Return the model's config."""
    if job.in_memory:
        return load_architecture(job.model.removeprefix("synthetic:"))
    return stored_config(Path(job.model))


def skeleton(job: Job) -> PreTrainedModel:
    """Return the model with every parameter on the meta device: shapes and names without memory."""
    return empty_model(config_of(job), job.dtype)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def host_model(job: Job) -> PreTrainedModel:
    """Return the model in anonymous host memory: one copy of the weights that owes nothing to the page cache."""
    if not job.in_memory:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=job.dtype, trust_remote_code=False
        )
        for parameter in model.parameters():  # from_pretrained maps the files
            parameter.data = parameter.data.clone()
        return model.eval()
    model = skeleton(job)
    names, parameters = zip(*model.named_parameters(), strict=True)
    with ThreadPoolExecutor(FILLERS) as pool:
        list(pool.map(partial(_materialise, seed=job.profile.seed), names, parameters))
    return model.eval()


def synthetic_weight(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return the synthetic weight ``name`` in host memory."""
    weight = torch.empty(tuple(shape), dtype=dtype)
    fill(weight.view(-1).view(torch.uint8).numpy(), name=name, shape=weight.shape, dtype=dtype, seed=seed)
    return weight


def require_ram(needed: int, what: str) -> None:
    """Refuse to take ``needed`` bytes of host memory unless a tenth more than that is free.

    Raises:
        UnavailableError: there is less; says how much.
    """
    wanted, free = needed * 11 // 10 + _SPARE_BYTES, hardware.usable_ram()
    if wanted > free:
        raise UnavailableError(f"memory: {what} needs {format_bytes(wanted)}, {format_bytes(free)} are free")


def require_disk(needed: int, what: str, job: Job) -> None:
    """Refuse to write ``needed`` bytes to the job's scratch folder where there is no room.

    Raises:
        UnavailableError: there is less; says how much.
    """
    wanted, free = needed + _SPARE_BYTES, hardware.free_disk(job.scratch)
    if wanted > free:
        raise UnavailableError(f"disk: {what} needs {format_bytes(wanted)}, {format_bytes(free)} are free")


def _materialise(name: str, parameter: nn.Parameter, seed: int) -> None:
    weights = synthetic_weight(name, parameter.shape, parameter.dtype, seed)
    torch.utils.swap_tensors(parameter, nn.Parameter(weights, requires_grad=False))  # keeps ties: same object
