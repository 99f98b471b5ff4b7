"""The order in which a module that is in memory reads its weights, recorded on examples of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from djinn.errors import ConfigError
from djinn.weights.index import Reads
from djinn.weights.models import held_here
from djinn.weights.tracing import record_reads

Example = tuple[Any, ...] | Mapping[str, Any]
"""What a module is called with: positional or keyword arguments."""


def recorded_reads(module: nn.Module, names: Mapping[int, str], examples: Sequence[Example]) -> Reads:
    """Return what ``module`` reads when it is called with each of ``examples``, in that order.

    ``names`` are those of its parameters, by id; parameters that share one name are one in the result.

    It is called on the meta device, where nothing is computed; if it cannot run there (its control flow depends on
    values, or it mixes in tensors that are neither parameters nor buffers), for real, where it lies. So it is if its
    parameters are split over ranks, all of which have to call this.

    Raises:
        ConfigError: an example that the module cannot run; says why.
    """
    held = [held_here(parameter) for parameter in module.parameters()]
    if all(part is parameter for part, parameter in zip(held, module.parameters(), strict=True)):
        with suppress(Exception):  # whatever the module's own code raises on meta tensors
            return _on_meta(module, names, examples)
    try:
        with undisturbed(module):
            weights: dict[str, torch.Tensor] = {names[id(each)]: each for each in held}
            return record_reads(module, weights, lambda: run(module, examples, device_of(module)))
    except Exception as error:
        raise ConfigError(
            f"example: this {type(module).__name__} cannot run with it: {type(error).__name__}: {error}"
        ) from error


def run(module: nn.Module, examples: Sequence[Example], device: torch.device) -> None:
    """Call ``module`` with each of ``examples``, their tensors brought to ``device``."""
    for example in examples:
        args, kwargs = _arguments(example, device)
        module(*args, **kwargs)


def device_of(module: nn.Module) -> torch.device:
    """Return where the first of a module's parameters lies."""
    return next(module.parameters()).device


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Undo what a pass in this context changes: attributes, buffers, random numbers; but not what is in containers."""
    modules = list(module.modules())
    attributes = [dict(vars(each)) for each in modules]
    tensors = [(dict(each._parameters), dict(each._buffers)) for each in modules]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    device = device_of(module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for each, saved, (parameters, buffers) in zip(modules, attributes, tensors, strict=True):
                vars(each).clear()
                vars(each).update(saved)
                each._parameters.clear()
                each._parameters.update(parameters)
                each._buffers.clear()
                each._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _on_meta(module: nn.Module, names: Mapping[int, str], examples: Sequence[Example]) -> Reads:
    meta: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in meta:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            name = names.get(id(tensor))
            meta[id(tensor)] = made if name is None else weights.setdefault(name, nn.Parameter(made, False))
        return meta[id(tensor)]

    with undisturbed(module):
        for each in module.modules():
            held: Any
            for held in (each._parameters, each._buffers):
                held.update({name: empty(tensor) for name, tensor in held.items() if tensor is not None})
        return record_reads(module, weights, lambda: run(module, examples, torch.device("meta")))


def _arguments(example: Example, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), example)
    return ((), dict(moved)) if isinstance(moved, Mapping) else (tuple(moved), {})
