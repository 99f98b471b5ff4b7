"""Guards: what would tear a streaming model's weights from the ring is refused, with what to do instead."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from djinn.errors import ConfigError

_REFUSED = {
    "__deepcopy__": "copied",
    "__reduce_ex__": "copied or pickled",
    "share_memory": "shared with other processes",
}
"""What every such call goes through, and the words for it."""
_OVERWRITE = ("pissa_init", "olora_init", "corda_init", "loftq_init", "lora_ga_init")
"""Methods of PEFT's layers that begin an adapter by taking a part of the weights beside it away."""
_CHOOSES = "resolve_lora_variant"
"""What PEFT's layers are asked for a variant of LoRA first of all; KaSA takes a part of the weights away."""


def guard(model: nn.Module) -> Iterator[RemovableHandle]:
    """Guard ``model`` and every part of it; yield handles that undo the hooks (the rest :func:`unguard` does)."""
    yield model.register_forward_hook(_watch_outputs)
    for module in model.modules():
        for method, what in _REFUSED.items():
            vars(module)[method] = partial(_refuse, type(module).__name__, what)
        vars(module)["_apply"] = partial(_refuse_moving, weakref.ref(module))
        if any(parameter is not None for parameter in module._parameters.values()):
            yield module.register_load_state_dict_pre_hook(_refuse_state)


def unguard(model: nn.Module) -> None:
    """Let ``model`` be moved, copied and pickled again."""
    for module in model.modules():
        for method in (*_REFUSED, *_OVERWRITE, _CHOOSES, "_apply", "merge"):
            vars(module).pop(method, None)


def is_guarded(module: nn.Module) -> bool:
    """Return whether ``module`` is a streaming model or a part of one."""
    return "_apply" in vars(module)


def _refuse(kind: str, what: str, *_: object, **__: object) -> NoReturn:
    raise ConfigError(
        f"this {kind} streams and cannot be {what}: its weights are on their way through the ring; "
        "djinn.detach(model) makes it an ordinary model"
    )


def _refuse_moving(
    guarded: weakref.ref[nn.Module], change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """Refuse to move or convert a module (to, cuda, half, ...), unless that is what it is already."""
    module = guarded()
    assert module is not None
    if not all(_is_kept(change, tensor) for tensor in (*module.parameters(recurse), *module.buffers(recurse))):
        _refuse(type(module).__name__, "moved or converted (to, cuda, cpu, half, float, ...)")
    return module


def _is_kept(change: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> bool:
    """Return whether ``change`` gives back what is like ``tensor`` in all but its size."""
    like = torch.empty([min(size, 2) for size in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    try:
        return change(like) is like
    except (RuntimeError, AssertionError):  # no such device
        return False


def _keep_apart(module: nn.Module, _: str, part: nn.Module | None) -> None:
    """Refuse an adapter's layer (PEFT's) to be merged with weights later, or to overwrite them when it begins.

    It begins before it is put into the model, but after it was given the layer of the model that it wraps.
    """
    if part is not None and is_guarded(part):
        for method in _OVERWRITE:
            if hasattr(type(module), method):
                vars(module)[method] = partial(_refuse_to_overwrite, type(part).__name__, method)
        if hasattr(type(module), _CHOOSES):
            vars(module)[_CHOOSES] = partial(_refuse_variant, weakref.ref(module), type(part).__name__)
    if is_guarded(module) and callable(getattr(part, "merge", None)):
        vars(part)["merge"] = partial(_refuse_merge, type(module).__name__)


def _refuse_merge(kind: str, *_: object, **__: object) -> NoReturn:
    raise ConfigError(
        f"this {kind} streams and no adapter can be merged into its weights, which are copied anew in every pass; run "
        "the adapter beside them, or djinn.detach(model) first"
    )


def _refuse_variant(layer: weakref.ref[nn.Module], kind: str, *, config: Any, **options: Any) -> Any:
    if getattr(config, "kasa_config", None) is not None:
        _refuse_to_overwrite(kind, "KaSA")
    found = layer()
    return getattr(type(found), _CHOOSES)(found, config=config, **options)


def _refuse_to_overwrite(kind: str, method: str, *_: object, **__: object) -> NoReturn:
    raise ConfigError(
        f"this {kind} streams and its weights cannot be overwritten, as PEFT's {method} does; take another kind of "
        "adapter or another beginning of it (init_lora_weights), or djinn.detach(model) first"
    )


def _refuse_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse weights for a module that streams; a dict that has none of them (an adapter's) may be loaded."""
    name = next((name for name in module._parameters if prefix + name in state), None)
    if name is not None:
        raise ConfigError(
            f"load_state_dict: {prefix}{name} streams and cannot be overwritten; djinn.detach(model) first, or load "
            "the new weights from a checkpoint"
        )


def _watch_outputs(module: nn.Module, _: object, output: object) -> None:
    """Refuse to begin a backward pass at what the model returned, with more words than autograd would."""
    if torch.is_grad_enabled():
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(_refuse_backward)


def _refuse_backward(_: torch.Tensor) -> NoReturn:
    raise ConfigError(
        "gradients cannot be computed through weights that stream: they are overwritten before the backward pass "
        "reads them; djinn.detach(model) first"
    )


# Once for the process and for good, not with each model: a model that dies while torch walks its hooks, wherever the
# garbage collector runs, would change their dict under it.
register_module_module_registration_hook(_keep_apart)
