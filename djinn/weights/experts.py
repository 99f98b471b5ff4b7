"""Which modules compute only with the experts that their router picks, by the mark that transformers leaves on them.

A class with ``use_experts_implementation`` is called with hidden states [tokens, hidden], the numbers of the experts
that each token goes to, and their weights, both [tokens, picked]; one of a few functions does the rest, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from djinn.errors import DjinnError
from djinn.weights.index import empty_for
from djinn.weights.models import config_of
from djinn.weights.naming import naming
from djinn.weights.shards import read_checkpoint
from djinn.weights.units import Unit, lay_out, lay_out_expert

_MARKS = ("is_transposed", "has_bias", "has_gate", "num_experts")
PICKED_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
"""What configs call the number of experts that a router picks for a token."""
_COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What they call the number of those that it picks from."""


def routed_experts(module: nn.Module) -> int:
    """Return how many experts a module has of which a router picks; 0 where it does not carry the mark.

    With experts on several devices it counts its own alone, and is taken as a whole.
    """
    if not all(hasattr(module, name) for name in _MARKS) or getattr(module, "_is_expert_parallel", False):
        return 0
    return int(module.num_experts)  # type: ignore[arg-type]


def widest_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the largest expert that a model's routers pick from; nothing without any."""
    found = [
        {name: tuple(parameter.shape[1:]) for name, parameter in module.named_parameters(recurse=False)}
        for module in model.modules()
        if routed_experts(module) > 1
    ]
    return max(found, key=lambda shapes: sum(map(math.prod, shapes.values())), default={})


def fused_experts(folder: Path) -> dict[str, int]:
    """Return the stored tensors of a checkpoint that hold all routed experts of a layer, and how many each has.

    None are known where transformers cannot make the checkpoint's model, or puts the weights together anew.
    """
    try:
        files = read_checkpoint(folder)
        model = empty_for(folder, config_of(folder), files, None)
        stored = naming(model, files, str(folder)).renamed
    except DjinnError:
        return {}
    counts = {
        stored[f"{path}.{local}"]: routed_experts(module)
        for path, module in model.named_modules()
        for local in module._parameters
        if routed_experts(module) > 1 and f"{path}.{local}" in stored
    }
    return {name: count for name, count in counts.items() if files[name].is_stack_of(count) and files[name].raw_bytes}


def picked_experts(config: object) -> int:
    """Return how many experts a config's routers pick for each token; 1 where it does not say."""
    return _first(config, PICKED_NAMES) or 1


def picked_share(config: object) -> float:
    """Return how many that is of all experts of a layer; 1 where a config does not say."""
    picked, count = _first(config, PICKED_NAMES), _first(config, _COUNT_NAMES)
    return min(picked / count, 1.0) if picked and count else 1.0


def _first(config: object, names: Iterable[str]) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in names)
    return next((count for count in found if isinstance(count, int) and count > 0), 0)


def by_expert(units: Iterable[Unit], model: nn.Module) -> list[Unit]:
    """Return ``units``, those of routed experts by their experts, each behind what its module has of other tensors."""
    return [part for unit in units for part in _by_expert(unit, model)]


def _by_expert(unit: Unit, model: nn.Module) -> list[Unit]:
    count = routed_experts(model.get_submodule(unit.readers[0])) if len(unit.readers) == 1 and not unit.held else 0
    theirs = [tensor for tensor in unit.tensors if tensor.entry.is_stack_of(count)]
    if count < 2 or not theirs:
        return [unit]
    others = [(tensor.name, tensor.entry) for tensor in unit.tensors if tensor not in theirs]
    experts = tuple(
        Unit(
            name=f"{unit.name}[{number}]",
            readers=unit.readers,
            tensors=lay_out_expert([(tensor.name, part) for tensor in theirs for part in tensor.entry.expert(number)]),
            is_expert=True,
        )
        for number in range(count)
    )
    tensors = lay_out([(tensor.name, tensor.entry) for tensor in theirs])
    beside = [Unit(f"{unit.name} (beside its experts)", unit.readers, lay_out(others))] if others else []
    return [*beside, Unit(unit.name, unit.readers, tensors, experts=experts)]
