"""Saving: ``state_dict()`` and ``save_pretrained()`` of a streaming model give all of its weights, as they really are.

Its parameters show whatever is in the ring. So a hook puts the weights from where they wait into every state dict that
is made of the model or of a part of it: those in host memory as they lie there, those on disk as maps of their files.
Neither is a copy, and a checkpoint of several shards is written with one shard's pages in memory at a time. Experts on
disk that their checkpoint keeps apart are put together when they are read, in a file (:mod:`djinn.engine.late`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from djinn.engine.binding import Weights
from djinn.engine.late import file_memory, late
from djinn.engine.waiting import mapped, waiting_weights
from djinn.errors import ConfigError
from djinn.planning.placement import Plan, Tier
from djinn.weights.tensors import FileSpan, Stacked, TensorEntry
from djinn.weights.units import PlacedTensor, Unit


def save_from_store(model: nn.Module, planned: Plan, weights: Weights) -> Iterator[RemovableHandle]:
    """Make state dicts of ``model`` complete; yield handles that undo it (but for its ``save_pretrained``)."""
    stored = {
        id(parameter): (unit, tensor, None if tier is Tier.DISK else weights.images[unit.name])
        for unit, tier in zip(planned.units, planned.tiers, strict=True)
        if tier is Tier.DISK or unit.name in weights.images
        for tensor in unit.tensors
        for parameter in weights.of(tensor)
    }
    given: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
    for module in model.modules():
        own_parameters = module._parameters.values()
        own = {name: (each, *stored[id(each)]) for name, each in module._parameters.items() if id(each) in stored}
        if any(hasattr(each, "quant_state") or is_traceable_wrapper_subclass(each) for each in own_parameters):
            yield module.register_state_dict_pre_hook(_refuse_state_dict)
        elif own:
            yield module.register_state_dict_post_hook(partial(_complete, own, given, weights))
    if isinstance(model, PreTrainedModel):
        sources = {
            tensor.entry.source.path.parent.resolve()
            for unit in planned.at(Tier.DISK)
            for tensor in unit.stored
            if isinstance(tensor.entry.source, FileSpan)
        }
        vars(model)["save_pretrained"] = partial(_save_pretrained, weakref.ref(model), sources)


def _refuse_state_dict(module: nn.Module, *_: object) -> NoReturn:
    """Refuse what quantisers make of parameters, which show what is in the ring; bitsandbytes changes them in place.

    And what is split over ranks: all of it would be copied to the device, to be gathered there.
    """
    is_split = any(isinstance(each, DTensor) for each in module._parameters.values())
    raise ConfigError(
        f"state_dict: this {type(module).__name__} is {'split over ranks' if is_split else 'quantised'} and streams, "
        "so that its weights cannot be saved; copy the checkpoint, or djinn.detach(model) first"
    )


def _complete(
    own: dict[str, tuple[nn.Parameter | None, Unit, PlacedTensor, torch.Tensor | None]],
    given: weakref.WeakValueDictionary[str, torch.Tensor],
    weights: Weights,
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: object,
) -> None:
    """Replace what a module has put into a state dict; tied weights are one tensor in it, as ever."""
    for name, (parameter, unit, tensor, image) in own.items():
        if parameter is None or module._parameters.get(name) is not parameter or weights.is_changed(parameter):
            continue  # it was replaced, and is no weight of ours any more
        if prefix + name in state:
            found = given.get(tensor.name)
            if found is None:
                found = given[tensor.name] = _given(unit, tensor, image)
            state[prefix + name] = found


def _given(unit: Unit, tensor: PlacedTensor, image: torch.Tensor | None) -> torch.Tensor:
    entry = tensor.entry
    if image is None and isinstance(entry.source, Stacked):
        return late(entry.shape, entry.dtype, partial(_joined, entry))
    return waiting_weights(unit, tensor, image)


def _joined(entry: TensorEntry) -> torch.Tensor:
    joined = file_memory(entry.nbytes)
    torch.cat([mapped(part) for part in entry.parts], out=joined)
    return entry.view(joined)


def _save_pretrained(
    model: weakref.ref[PreTrainedModel], sources: set[Path], save_directory: Any, *args: Any, **options: Any
) -> None:
    """``save_pretrained``, into any folder but the one that the model streams from.

    Raises:
        ConfigError: into the folder that the model streams from.
    """
    saved = model()
    assert saved is not None
    if Path(save_directory).resolve() in sources:
        raise ConfigError(
            f"save_pretrained: this model streams from {save_directory}, whose files would be overwritten while they "
            "are read; save it to another folder, or djinn.detach(model) first"
        )
    type(saved).save_pretrained(saved, save_directory, *args, **options)
