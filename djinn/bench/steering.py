"""Steered routing: what routers pick is replaced by a seeded process with a stated locality.

Random weights route without locality, as the routers of trained models do not. So the experts that a token goes to are
drawn here: each of the last token's stays with a probability ``reuse``, the others are drawn with the weights 1 / rank
** ``zipf``, where every layer ranks its experts in an order of its own. It is called steered wherever it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from djinn.weights.experts import picked_experts, routed_experts

STEPS = 256
"""Tokens after which the process begins anew."""


def steered_picks(
    layers: int, experts: int, picked: int, *, reuse: float, zipf: float, seed: int, steps: int = STEPS
) -> np.ndarray:
    """Return the picks of ``steps`` tokens: int64 [steps, layers, picked], all different in a layer of a token."""
    random = np.random.default_rng(seed)
    weights = np.arange(1.0, experts + 1) ** -zipf
    ranked = [random.permutation(experts) for _ in range(layers)]
    found = np.empty((steps, layers, picked), np.int64)
    for step in range(steps):
        for layer in range(layers):
            drawn = ranked[layer][random.choice(experts, experts, replace=False, p=weights / weights.sum())]
            kept = found[step - 1, layer][random.random(picked) < reuse] if step else drawn[:0]
            found[step, layer] = np.concatenate([kept, drawn[~np.isin(drawn, kept)]])[:picked]
    return found


class SteeredRouting:
    """Steers a model's routers, for single tokens; passes of several go where the routers send them. A context.

    Args:
        model: on one device, streaming or not.
        reuse, zipf, seed: see the module's text.
    """

    def __init__(self, model: nn.Module, *, reuse: float, zipf: float, seed: int = 0) -> None:
        self._modules = [module for module in model.modules() if routed_experts(module) > 1]
        self._picked = picked_experts(getattr(model, "config", None))
        self._process = {"reuse": reuse, "zipf": zipf, "seed": seed}
        self._handles: list[Any] = []

    def __enter__(self) -> SteeredRouting:
        steps = dict.fromkeys(range(len(self._modules)), 0)
        experts = max((int(module.num_experts) for module in self._modules), default=1)  # type: ignore[arg-type]
        picks = torch.from_numpy(steered_picks(len(steps), experts, self._picked, **self._process))  # type: ignore[arg-type]

        def hook(layer: int) -> Any:
            def steer(
                module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
            ) -> tuple[Any, Mapping[str, Any]] | None:
                nonlocal picks
                index = args[1]
                if len(index) != 1:
                    return None
                picks = picks.to(index.device)
                steps[layer] = (steps[layer] + 1) % STEPS
                return (args[0], picks[steps[layer], layer][None].to(index.dtype), *args[2:]), kwargs

            return steer

        for layer, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(hook(layer), prepend=True, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
