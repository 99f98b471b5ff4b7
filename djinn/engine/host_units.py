"""Host units: in a pass of few tokens the host's cores compute with them where they lie, and they are not copied.

In the place of its forward each layer gets one that sends its inputs to the host, has them multiplied there, and
returns what comes back. In every other pass it is the layer's own, and the unit streams like the others.

Layers that read the same inputs (gate and up; query, key and value) are computed as one product: the first that runs
computes for all of them, and the others pick up what is theirs. Which those are is seen in the first such pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.compiler import disable as opaque

from djinn.host.ahead import Beside
from djinn.host.products import HostProducts, Linear
from djinn.weights.units import Unit


class HostUnits:
    """Computes with the host units of one model.

    Args:
        units: each the weights of one ``nn.Linear``, raw, and their image in host memory.
        tokens: the most tokens of a product.
        is_few: says whether the pass under way is one in which the host computes.
    """

    def __init__(
        self,
        units: Sequence[tuple[Unit, torch.Tensor]],
        beside: Beside,
        tokens: int,
        is_few: Callable[[], bool],
    ) -> None:
        self._layers = [_Layer.of(unit, image) for unit, image in units]
        self._beside = beside
        self._tokens = tokens
        self._is_few = is_few
        self._followers: dict[int, list[int]] = {}
        """By layer, those that read its inputs after it did."""
        self._last: tuple[int, _Inputs] | None = None
        """The last layer that was computed, and not picked up, in this turn."""
        self._ready: dict[int, tuple[_Inputs, torch.Tensor]] = {}
        """Outputs that were computed and wait to be picked up."""
        self._modules: list[weakref.ref[nn.Module]] = []

    def attach(self, model: nn.Module) -> None:
        """Give every layer a forward of its own."""
        for number, layer in enumerate(self._layers):
            module = model.get_submodule(layer.unit.readers[0])
            reference = weakref.ref(module)
            vars(module)["forward"] = opaque(partial(self._forward, number, reference))
            self._modules.append(reference)

    def detach(self) -> None:
        """Give the layers their own back."""
        for reference in self._modules:
            module = reference()
            if module is not None:
                vars(module).pop("forward", None)
        self._modules.clear()
        self.forget()

    @property
    def products(self) -> HostProducts:
        """What multiplies."""
        return self._beside.products

    def count(self) -> None:
        """Bring times and timeline up to date."""
        self._beside.count()

    def forget(self) -> None:
        """Let go what a turn has left."""
        self._last = None
        self._ready.clear()

    def _forward(self, number: int, reference: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> torch.Tensor:
        module = reference()
        assert module is not None
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, torch.Tensor) or not self._is_few() or not self._can(number, x):
            return type(module).forward(module, *args, **kwargs)
        inputs = _Inputs.of(x)
        found, outputs = self._ready.pop(number, (None, None))
        if outputs is not None and not inputs.are(found):
            self._unlearn(number)
            outputs = None
        if outputs is None:
            outputs = self._compute(number, inputs)
        return outputs.view(*x.shape[:-1], -1)

    def _can(self, number: int, x: torch.Tensor) -> bool:
        """Return whether a product is one for the host; of others the layer reads its weights, wherever they wait."""
        columns = self._layers[number].linear.weight.shape[1]
        return (
            x.dtype == torch.bfloat16
            and x.dim() > 0
            and x.shape[-1] == columns
            and 0 < x.numel() <= self._tokens * columns
            and stays_bfloat16(x.device.type)
        )

    def _compute(self, number: int, inputs: _Inputs) -> torch.Tensor:
        """Return a layer's outputs; those of the layers that will read the same inputs are computed with it."""
        self._learn(number, inputs)
        # Nobody will know inputs again of which no version is kept: those of inference mode.
        together = [number, *(self._followers.get(number, []) if inputs.version is not None else [])]
        layers = [self._layers[each] for each in together]
        vectors = inputs.tensor.reshape(-1, layers[0].linear.weight.shape[1])
        name = "+".join(layer.unit.readers[0] for layer in layers)
        outputs = self._beside.outputs_of([layer.linear for layer in layers], vectors, name)
        self._ready = {each: (inputs, made) for each, made in zip(together[1:], outputs[1:], strict=True)}
        return outputs[0]

    def _learn(self, number: int, inputs: _Inputs) -> None:
        """Note which layers read the same inputs, from one that has to be computed now."""
        for unread in self._ready:
            self._unlearn(unread)
        if self._last is not None and inputs.are(self._last[1]):
            followers = self._followers.setdefault(self._last[0], [])
            if number not in followers:
                followers.append(number)
        else:
            self._last = number, inputs

    def _unlearn(self, number: int) -> None:
        """Forget that a layer reads what another one has read."""
        for followers in self._followers.values():
            if number in followers:
                followers.remove(number)


@dataclass(frozen=True)
class _Layer:
    """One ``nn.Linear``, its weights where they wait in host memory."""

    unit: Unit
    linear: Linear

    @classmethod
    def of(cls, unit: Unit, image: torch.Tensor) -> _Layer:
        found = {tensor.name.rpartition(".")[2]: tensor.entry.view(image[tensor.offset :]) for tensor in unit.tensors}
        return cls(unit, Linear(found["weight"], found.get("bias")))


def stays_bfloat16(device: str) -> bool:
    """Return whether a layer's outputs are of its inputs' dtype: autocast may have another one in mind."""
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == torch.bfloat16


@dataclass(frozen=True)
class _Inputs:
    """A tensor as it is now: what is written into it later counts up its version."""

    tensor: torch.Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Inputs:
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def are(self, other: _Inputs | None) -> bool:
        """Return whether these are certainly the ``other`` ones, unchanged; of inference tensors nobody knows."""
        return (
            other is not None
            and self.tensor is other.tensor
            and self.version is not None
            and self.version == other.version
        )
