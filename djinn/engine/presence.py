"""Presence: parameters are views of a slot that holds their weights only while their module runs.

Whoever reads one at another time (an adapter in a forward of its own, a user's statistics, a block whose ``forward`` is
called without its hooks) gets a copy of the true weight, made from where it waits: right, and as slow as that is. A
parameter's class says which of both it is, so that passes pay one assignment for it, and no operation in them pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter, tree_map_only

from djinn.engine.binding import Weights
from djinn.engine.waiting import waiting_weights
from djinn.errors import ConfigError
from djinn.planning.placement import Plan, Tier
from djinn.weights.tracing import storage_of
from djinn.weights.units import PlacedTensor, Unit

_SETS_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_READS_NOTHING = {
    "__hash__", "__len__", "__set__", "_is_view", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "ndimension", "nelement", "numel", "requires_grad_", "size", "storage_offset",
    "stride",
}  # fmt: skip
"""Names of functions that look at a tensor but not at its elements; they are the same of a slot."""


class Presence:
    """Whether the weights of one unit are in its slot (or decoded), as its parameters' class says.

    ``parts`` are what holds their bytes: the parameters themselves, or what they are made of.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
        self._classes = [(parameter, type(parameter), _away(type(parameter))) for parameter in parameters]
        self._parts = parts

    def begin(self) -> None:
        """Note that the weights are there."""
        for parameter, here, _ in self._classes:
            parameter.__class__ = here

    def end(self) -> None:
        """Note that they are not from now on, and tell autograd, so that no gradient is made with others."""
        for parameter, _, away in self._classes:
            parameter.__class__ = away
        if torch.is_grad_enabled():
            increment_version(self._parts)


def presences(model: nn.Module, planned: Plan, weights: Weights) -> dict[str, Presence]:
    """Return the presence of each unit that streams or is decoded, by name; none of them is there from now on."""
    made_of = {
        id(part): parameter
        for parameter in model.parameters()
        if is_traceable_wrapper_subclass(parameter)
        for part in _leaves(parameter)
    }
    found = {}
    for unit, tier in zip(planned.units, planned.tiers, strict=True):
        if tier is Tier.RESIDENT and not unit.coded:
            continue
        parameters = {}
        for tensor in unit.tensors:
            image = None if tier is Tier.DISK else weights.images[unit.name]
            for part in weights.of(tensor):
                parameter = made_of.get(id(part), part)
                is_shard = isinstance(parameter, DTensor)
                quantised = (parameter is not part and not is_shard) or hasattr(parameter, "quant_state")
                vars(parameter)["_elsewhere"] = _Elsewhere(unit, tensor, image, quantised)
                parameters[id(parameter)] = parameter
        found[unit.name] = Presence(parameters.values(), weights.of(*unit.tensors))
        found[unit.name].end()
    return found


@dataclass(frozen=True)
class _Elsewhere:
    """Where a weight waits: in an image or, without one, in its file."""

    unit: Unit
    tensor: PlacedTensor
    image: torch.Tensor | None
    quantised: bool

    def copied(self, device: torch.device) -> torch.Tensor:
        """Return a copy on ``device``.

        Raises:
            CheckpointError: its file cannot be read.
            ConfigError: a quantised weight, which is more than its bytes.
        """
        if self.quantised:
            raise ConfigError(
                f"{self.tensor.name} is quantised and streams: its weights are there only while its module runs; "
                "djinn.detach(model) first"
            )
        with torch.inference_mode(False), torch.no_grad():
            waiting = waiting_weights(self.unit, self.tensor, self.image)
            return _noted(waiting.to(device, copy=True), self.tensor.name)


class _Away(torch.Tensor):
    """Mixed into a parameter's class while its weights are not in its slot."""

    _elsewhere: _Elsewhere

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        with DisableTorchFunctionSubclass():
            if func == _SETS_DATA and isinstance(args[0], _Away):
                _refuse_writing(args[0]._elsewhere.tensor.name)
            if name in _READS_NOTHING:
                return func(*args, **kwargs or {})
            if name == "data_ptr":
                raise ConfigError(
                    f"{args[0]._elsewhere.tensor.name} streams: its weights have no address of their own while its "
                    "module does not run; djinn.detach(model) first"
                )
            if name == "detach" or name == "__get__":
                found = func(*args)
                if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                    whole = found.as_subclass(_away(torch.Tensor))
                    whole._elsewhere = args[0]._elsewhere
                    return whole
                if not isinstance(found, torch.Tensor):
                    return found

        def copied(tensor: _Away) -> torch.Tensor:
            return tensor._elsewhere.copied(tensor.device)

        return func(*tree_map_only(_Away, copied, args), **tree_map_only(_Away, copied, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return nn.Parameter(self.clone(), self.requires_grad) if isinstance(self, nn.Parameter) else self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({}).__reduce_ex__(protocol)


class _AwayShard:
    """Mixed into the class of a distributed parameter meanwhile: what it is made of here is a copy, made when asked."""

    __slots__ = ()

    @property
    def _local_tensor(self) -> torch.Tensor:
        elsewhere: _Elsewhere = vars(self)["_elsewhere"]
        return elsewhere.copied(self.device).as_subclass(torch.Tensor)  # type: ignore[attr-defined]


class _Copy(torch.Tensor):
    """A copy of a weight that streams. It can be read; what is written into it would be lost, and is refused."""

    _name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            copies = [each for each in tree_iter((args, kwargs)) if isinstance(each, _Copy)]
            versions = [copy._version for copy in copies]
            result = func(*args, **kwargs or {})
            for copy, version in zip(copies, versions, strict=True):
                if copy._version != version:
                    _refuse_writing(copy._name)
            names = {storage_of(copy): copy._name for copy in copies}

            def noted(tensor: torch.Tensor) -> torch.Tensor:
                name = names.get(storage_of(tensor))
                return tensor if name is None else _noted(tensor, name)

            return tree_map_only(torch.Tensor, noted, result)


def _noted(tensor: torch.Tensor, name: str) -> torch.Tensor:
    copy = tensor.as_subclass(_Copy)
    copy._name = name
    return copy


def _refuse_writing(name: str) -> NoReturn:
    raise ConfigError(
        f"{name} streams and cannot be overwritten: it is copied anew in every pass; djinn.detach(model) first, or "
        "write to a clone()"
    )


@cache
def _away(cls: type[torch.Tensor]) -> type[torch.Tensor]:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_AwayShard if issubclass(cls, DTensor) else _Away, cls), names)


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor subclass is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [leaf for part in tensor.__tensor_flatten__()[0] for leaf in _leaves(getattr(tensor, part))]
