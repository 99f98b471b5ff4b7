"""Split linear layers computed directly: transformers' way of calling one takes the host longer than its product.

Its forward looks for distributed parameters, puts their local parts in their place and takes them out again, in three
context managers. Where no gradients are recorded that comes to one product and, for columns, a sum over the ranks: the
same operations on the same tensors, so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from djinn.weights.models import held_here


class Shortened:
    """A module whose forward is computed directly, until :meth:`remove`."""

    def __init__(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        self._module = module
        self._long = vars(module)["forward"]
        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Give the module transformers' forward back."""
        vars(self._module)["forward"] = self._long


def shorten(model: nn.Module) -> Iterator[Shortened]:
    """Compute split linear layers directly, those of transformers' two plain styles; yield handles that undo it."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if not isinstance(forward, FunctionType) or getattr(type(module), "forward", None) is not nn.Linear.forward:
            continue
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        installed = {name: cell.cell_contents for name, cell in cells}
        style = installed.get("self")
        if _is_plain(style, "ColwiseParallel", Replicate(), Shard(-1)):
            yield Shortened(module, _direct(module, forward, None))
        elif _is_plain(style, "RowwiseParallel", Shard(-1), Replicate()):
            mesh = installed["mesh"]
            group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
            yield Shortened(module, _direct(module, forward, group))


def _is_plain(style: Any, name: str, inputs: Any, outputs: Any) -> bool:
    """Return whether a style of transformers is the one called so, from and to tensors that are plain on each rank."""
    return (
        type(style).__name__ == name
        and style.use_local_output
        and (style.input_layouts, style.output_layouts) == (inputs, outputs)
    )


def _direct(module: nn.Module, long: Callable[..., torch.Tensor], summed_by: Any) -> Callable[..., torch.Tensor]:
    """Return a forward of a layer of whose weight each rank has rows, or columns: their products a group adds up."""
    held = module._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = held["weight"], held["bias"]
        if torch.is_grad_enabled() or type(x) is not torch.Tensor or not isinstance(weight, DTensor):
            return long(x)
        own = None if bias is None else held_here(bias)
        if summed_by is None:
            return nn.functional.linear(x, weight._local_tensor, own)
        y = nn.functional.linear(x, weight._local_tensor)
        dist.all_reduce(y, group=summed_by)
        return y if own is None else y + own

    return forward
