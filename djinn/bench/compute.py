"""How fast a device computes what a decoder computes: weights times a few tokens or many, and the host's own part.

Weights are bfloat16 and larger together than any cache, so that one token measures how fast memory gives them and many
tokens how fast the device multiplies. The host's part is what modules cost where there is nothing to compute (Python,
kernel launches, and all that stands between two products), and what a pass costs however few they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import linear

from djinn.engine import predict
from djinn.engine.predict import Rates
from djinn.weights.architectures import load_architecture
from djinn.weights.index import owners

TOKENS = (1, 8, 64, 512, 4096)
_SHAPE = (8192, 4096)
_MATRICES = 2
_REPEATS = 3
_LONGEST_S = 0.1
"""A device that took longer for all matrices has reached its rate, and is not asked for more tokens."""
_MODEL = "llama-tiny"
_LAYERS = (2, 16)
_STEPS = 8


class ComputeRate(BaseModel):
    """Bytes of bfloat16 weights that are multiplied by ``tokens`` rows in a second, in 10^9: FLOP/s over tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    gbps: float


class Compute(BaseModel):
    """What a device computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    rates: tuple[ComputeRate, ...]
    module_s: float
    """Host seconds of a module that has weights."""
    pass_s: float | None = None
    """Host seconds of a pass beside its modules'. None in records from before the two were told apart: there
    ``module_s`` is a pass over the modules of a model that has few."""
    last_token_gbps: float | None = None
    """Bytes of weights by the last of several tokens in a second, in 10^9: the output projection of a prompt."""

    def rates_with(self, *, link: float | None, disk: float | None) -> Rates:
        """Return what plans are predicted from; ``link`` and ``disk`` in bytes/s."""
        told_apart = self.pass_s is not None
        return Rates(
            device="cuda" if self.device == "cuda" else "cpu",
            link=link,
            disk=disk,
            compute=tuple(predict.ComputeRate(tokens=rate.tokens, rate=1e9 * rate.gbps) for rate in self.rates),
            module_s=self.module_s if told_apart else 0.0,
            pass_s=self.pass_s or 0.0,
            last_token=1e9 * self.last_token_gbps if self.last_token_gbps else None,
        )


def measure(device: torch.device) -> Compute:
    """Measure ``device``; takes seconds and 128 MiB of its memory."""
    module_s, pass_s = _host_s(device)
    return Compute(
        device=device.type,
        rates=tuple(_rates(device)),
        module_s=module_s,
        pass_s=pass_s,
        last_token_gbps=_last_token_gbps(device),
    )


@torch.no_grad()
def _rates(device: torch.device) -> list[ComputeRate]:
    weights = [torch.ones(_SHAPE, dtype=torch.bfloat16, device=device) for _ in range(_MATRICES)]
    nbytes = sum(weight.nbytes for weight in weights)
    found = []
    for tokens in TOKENS:
        inputs = torch.ones(tokens, _SHAPE[1], dtype=torch.bfloat16, device=device)

        def multiply(inputs: torch.Tensor = inputs) -> None:
            for weight in weights:
                linear(inputs, weight)

        seconds = _median_s(multiply, device)
        found.append(ComputeRate(tokens=tokens, gbps=nbytes / seconds / 1e9))
        if seconds > _LONGEST_S:
            break
    return found


@torch.no_grad()
def _last_token_gbps(device: torch.device) -> float:
    """Time what a model's head does with a prompt: on a CPU, torch (2.13) copies the weights before it multiplies."""
    weight = torch.ones(_SHAPE, dtype=torch.bfloat16, device=device)
    prompt = torch.ones(1, 2, _SHAPE[1], dtype=torch.bfloat16, device=device)
    return weight.nbytes / _median_s(lambda: linear(prompt[:, -1:], weight), device) / 1e9


@torch.no_grad()
def _host_s(device: torch.device) -> tuple[float, float]:
    """Return the host's seconds for a module and for the rest of a pass, from decode steps that are overhead alone.

    Of models so small that they compute nothing, one with few layers and one with many.
    """
    from transformers import AutoModelForCausalLM

    counts, seconds = [], []
    for layers in _LAYERS:
        config = load_architecture(_MODEL)
        config.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
        counts.append(len({id(module) for _, module, _, _ in owners(model)}))
        token = torch.ones(1, 1, dtype=torch.int64, device=device)

        def steps(model: Any = model, token: torch.Tensor = token) -> None:
            cache = None
            for _ in range(_STEPS):
                cache = model(token, past_key_values=cache).past_key_values

        seconds.append(_median_s(steps, device) / _STEPS)
    module_s = max((seconds[1] - seconds[0]) / (counts[1] - counts[0]), 0.0)
    return module_s, max(seconds[0] - module_s * counts[0], 0.0)


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one is for warming up
        _synchronize(device)
        begun = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
