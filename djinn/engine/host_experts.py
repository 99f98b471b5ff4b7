"""Experts that the pool lacks, computed where they lie: in a pass of few tokens the host's cores take some of them.

The others come over the link meanwhile. The module then runs as ever, with an expert that is there in the place of each
one that the cores take, and with a weight of zero for it; what the cores have made is added to its output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from djinn.engine.expert_layers import Layer
from djinn.engine.handed import ARGUMENTS, Asked, Call
from djinn.engine.host_units import stays_bfloat16
from djinn.host.products import HostProducts, Linear
from djinn.planning.host import HostRates
from djinn.planning.host_experts import misses_to_compute
from djinn.transport.exchange import Exchange
from djinn.transport.stats import Stats

_WEIGHTS = {"gate_up_proj", "up_proj", "down_proj"}
_BIASES = {f"{name}_bias" for name in _WEIGHTS}


class HostExperts:
    """Decides which experts the cores take, and has them computed."""

    def __init__(self, products: HostProducts, exchange: Exchange, rates: HostRates, stats: Stats) -> None:
        self.products = products
        self.exchange = exchange
        self.stats = stats
        self._rates = rates

    def share(self, layer: Layer, asked: Asked, call: Call, lacking: list[int]) -> HostPart | None:
        """Return what the cores take of a call, of the experts that the pool is ``lacking``; None where it is nothing.

        At least one expert stays with the device, to stand in for those that do not.
        """
        nbytes = layer.sources[0].unit.raw_bytes
        count = min(misses_to_compute(len(lacking), nbytes, self._rates), len(call.wanted) - 1)
        if not count or not self._can_take(asked.named) or not _can_multiply(asked.module, layer):
            return None
        return HostPart.of(self, layer, asked, call, lacking[-count:])

    def _can_take(self, named: Mapping[str, Any]) -> bool:
        """Return whether a call is one for the host: of few tokens in bfloat16, with a weight for each pick."""
        hidden, index, weights = (named.get(name) for name in ARGUMENTS)
        return (
            len(named) == len(ARGUMENTS)
            and isinstance(hidden, torch.Tensor)
            and isinstance(index, torch.Tensor)
            and isinstance(weights, torch.Tensor)
            and hidden.dim() == 2
            and hidden.dtype == torch.bfloat16
            and 0 < len(hidden) <= self._rates.tokens
            and weights.shape == index.shape
            and not torch.is_grad_enabled()
            and stays_bfloat16(hidden.device.type)
        )


@dataclass
class HostPart:
    """What the cores take of one call of an experts module."""

    host: HostExperts
    layer: Layer
    module: nn.Module
    experts: list[int]
    hidden: torch.Tensor
    weights: torch.Tensor
    picks: np.ndarray
    """The experts that each token picked, [tokens, picked], on the host."""
    call: Call
    """The call as the device sees it, with stand-ins."""
    instead: tuple[tuple[Any, ...], dict[str, Any]]
    """The arguments of that call."""
    outputs: torch.Tensor | None = field(default=None, init=False)
    """What has to be added to the module's output: [tokens, columns], on the device."""

    @classmethod
    def of(cls, host: HostExperts, layer: Layer, asked: Asked, call: Call, experts: list[int]) -> HostPart:
        """Put stand-ins in the place of ``experts``."""
        hidden, index, weights = (asked.named[name] for name in ARGUMENTS)
        picks = np.array(call.picks, np.int64).reshape(index.shape)
        stand_in = next(expert for expert in call.wanted if expert not in experts)
        left = np.where(np.isin(picks, experts), stand_in, picks)
        seen = call.upload(left).to(index.dtype)
        kept = torch.where(seen == index, weights, torch.zeros_like(weights))
        instead = asked.instead(dict(zip(ARGUMENTS, (hidden, seen, kept), strict=True)))
        return cls(host, layer, asked.module, experts, hidden, weights, picks, call.with_index(seen, left), instead)

    def compute(self) -> None:
        """Compute with the experts, and let what they made go to the device; returns when the cores are done."""
        host, begin = self.host, time.perf_counter()
        inputs = host.exchange.to_host(self.hidden)
        tokens, picked = self.picks.shape
        (made,) = host.exchange.room(tokens * picked, [inputs.shape[1]])
        there = time.perf_counter()
        made.zero_()
        flat = self.picks.reshape(-1)
        for expert in self.experts:
            rows = torch.from_numpy(np.flatnonzero(flat == expert))
            made[rows] = self._outputs(expert, inputs[rows // picked])
        done = time.perf_counter()
        (outputs,) = host.exchange.to_device([made])
        by_pick = outputs.view(tokens, picked, -1) * self.weights.unsqueeze(-1)
        self.outputs = by_pick.sum(1).to(self.hidden.dtype)
        nbytes = sum(self.layer.sources[expert].unit.raw_bytes for expert in self.experts)
        stats = host.stats
        stats.expert_computed += len(self.experts)
        stats.host_computed_bytes += nbytes
        stats.product_wait_s += done - begin
        stats.count_product(self.layer.unit.name, nbytes, begin, there, done)

    def _outputs(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return what one expert makes of ``inputs``, [rows, columns]: as transformers' experts do it."""
        module: Any = self.module
        first = self._linear(expert, "gate_up_proj" if module.has_gate else "up_proj", inputs)
        between = module._apply_gate(first) if module.has_gate else module.act_fn(first)
        return self._linear(expert, "down_proj", between.contiguous())

    def _linear(self, expert: int, name: str, inputs: torch.Tensor) -> torch.Tensor:
        bias = self.layer.waiting(expert, f"{name}_bias") if self.module.has_bias else None
        (outputs,) = self.host.products.outputs_of([Linear(self.layer.waiting(expert, name), bias)], inputs)
        return outputs


def _can_multiply(module: nn.Module, layer: Layer) -> bool:
    """Return whether the cores can compute as this module does, with weights that wait raw in host memory."""
    names = {tensor.local for tensor in layer.tensors}
    plain = all(
        getattr(module, name, True) is False
        for name in ("is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    )
    return (
        plain
        and hasattr(module, "has_gate")
        and names <= _WEIGHTS | _BIASES
        and all(not tensor.coded and tensor.dtype == torch.bfloat16 for tensor in layer.tensors)
        and layer.sources[0].image is not None
    )
