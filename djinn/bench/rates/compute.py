"""How fast a device computes what a decoder computes: a layer of one, for a few tokens or many, and the host's part.

One token measures how fast memory gives the weights, and many tokens how fast the device multiplies and does all that
stands between two products. The host's part is what modules cost where there is nothing to compute (Python, kernel
launches), what a pass of ``generate`` costs however few they are, and what a call of it costs before its first pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.functional import linear

from djinn.planning import rates as planned
from djinn.planning.rates import Rates
from djinn.weights.architectures import load_architecture
from djinn.weights.models import owners

TOKENS = (1, 8, 64, 512, 4096)
_SEQUENCE = 64
"""Tokens that look at each other, so few that what they compute between them does not count."""
_LAYER_OF = {"cpu": "llama-2-7b", "cuda": "llama-2-70b"}
"""On a GPU a large one, as models have that do not fit it: what lies between two products counts less there."""
_HEAD = (8192, 4096)
_REPEATS = 3
_LONGEST_S = 0.1
"""A device that took longer for a layer has reached its rate, and is not asked for more tokens."""
_SMALL = "llama-tiny"
_LAYERS = (2, 16)
_STEPS = 8
_PLUG = (4096, 64)
"""Size and number of products that keep a GPU busy while the host asks for what is timed."""


class ComputeRate(BaseModel):
    """Bytes of bfloat16 weights that are multiplied by ``tokens`` rows in a second, in 10^9: FLOP/s over tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(gt=0, le=10**9)
    gbps: float = Field(gt=0, le=10**9)


class Compute(BaseModel):
    """What a device computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    rates: tuple[ComputeRate, ...]
    module_s: float = Field(ge=0, le=10**9)
    """Host seconds of a module that has weights."""
    pass_s: float | None = Field(default=None, ge=0, le=10**9)
    """Host seconds of a pass of ``generate`` beside its modules'. None in records from before the two were told apart:
    there ``module_s`` is a pass over the modules of a model that has few."""
    call_s: float = Field(default=0.0, ge=0, le=10**9)
    """Host seconds of a call of ``generate`` before its first pass."""
    last_token_gbps: float | None = Field(default=None, gt=0, le=10**9)
    """Bytes of weights by the last of several tokens in a second, in 10^9: the output projection of a prompt."""

    def rates_with(self, *, link: float | None, disk: float | None) -> Rates:
        """Return what plans are predicted from; ``link`` and ``disk`` in bytes/s."""
        told_apart = self.pass_s is not None
        return Rates(
            device="cuda" if self.device == "cuda" else "cpu",
            link=link,
            disk=disk,
            compute=tuple(planned.ComputeRate(tokens=rate.tokens, rate=1e9 * rate.gbps) for rate in self.rates),
            module_s=self.module_s if told_apart else 0.0,
            pass_s=self.pass_s or 0.0,
            call_s=self.call_s,
            last_token=1e9 * self.last_token_gbps if self.last_token_gbps else None,
        )


def measure(device: torch.device) -> Compute:
    """Measure ``device``; takes seconds, and 1 GB of its memory, on a GPU 3 GB."""
    module_s, pass_s, call_s = _host_s(device)
    return Compute(
        device=device.type,
        rates=tuple(_rates(device)),
        module_s=module_s,
        pass_s=pass_s,
        call_s=call_s,
        last_token_gbps=_last_token_gbps(device),
    )


@torch.no_grad()
def _rates(device: torch.device) -> list[ComputeRate]:
    from transformers import AutoModel

    config = load_architecture(_LAYER_OF[device.type])
    config.num_hidden_layers, config.vocab_size = 1, 1
    with device:
        model: Any = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    layer = model.layers[0]
    nbytes = sum(parameter.nbytes for parameter in layer.parameters())
    found = []
    for tokens in TOKENS:
        inputs = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
        inputs = inputs.view(-1, min(tokens, _SEQUENCE), config.hidden_size)
        places = model.rotary_emb(inputs, torch.arange(inputs.shape[1], device=device).view(1, -1))
        seconds = median_s(partial(layer, inputs, position_embeddings=places), device)
        found.append(ComputeRate(tokens=tokens, gbps=nbytes / seconds / 1e9))
        if seconds > _LONGEST_S:
            break
    return found


@torch.no_grad()
def _last_token_gbps(device: torch.device) -> float:
    """Time what a model's head does with a prompt: on a CPU, torch (2.13) copies the weights before it multiplies."""
    weight = torch.ones(_HEAD, dtype=torch.bfloat16, device=device)
    prompt = torch.ones(1, 2, _HEAD[1], dtype=torch.bfloat16, device=device)
    return weight.nbytes / median_s(lambda: linear(prompt[:, -1:], weight), device) / 1e9


def _host_s(device: torch.device) -> tuple[float, float, float]:
    """Return the host's seconds for a module, for the rest of a pass, and for a call before its first pass.

    From generations that are overhead alone: by a small model with few layers and one with many.
    """
    models = [small_model(layers, device) for layers in _LAYERS]
    counts = [modules_of(model) for model in models]
    (few_s, few_call_s), (many_s, many_call_s) = (times_of_host(model, device) for model in models)
    module_s = max((many_s - few_s) / (counts[1] - counts[0]), 0.0)
    return module_s, max(few_s - module_s * counts[0], 0.0), statistics.mean([few_call_s, many_call_s])


def small_model(layers: int, device: torch.device) -> Any:
    """Return a causal language model so small that it computes nothing."""
    from transformers import AutoModelForCausalLM

    config = load_architecture(_SMALL)
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()


def modules_of(model: nn.Module) -> int:
    """Return how many modules have weights of their own."""
    return len({id(module) for _, module, _, _ in owners(model)})


def times_of_host(model: Any, device: torch.device) -> tuple[float, float]:
    """Return the host's seconds for a pass of ``generate`` by a small model, and for a call before its first pass."""
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    generate = partial(model.generate, ids, attention_mask=ids, do_sample=False, eos_token_id=None, pad_token_id=0)
    first, all_of_them = (_median_host_s(partial(generate, max_new_tokens=tokens)) for tokens in (1, 1 + _STEPS))
    pass_s = (all_of_them - first) / _STEPS
    return pass_s, max(first - pass_s, 0.0)


def median_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``device`` takes for ``run``.

    A GPU is asked for it while it has other things to do, so that the time of launches does not count.
    """
    if device.type == "cpu":
        return _median_host_s(run)
    size, products = _PLUG
    plug = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS + 1):
        for _ in range(products):
            torch.mm(plug, plug)
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        seconds.append(begun.elapsed_time(ended) / 1000)
    return statistics.median(seconds[1:])


def _median_host_s(run: Callable[[], object]) -> float:
    """Return the seconds that ``run`` takes, whose results the host has when it returns."""
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one is for warming up
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
