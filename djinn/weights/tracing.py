"""Who reads each weight, and in which order.

The order is recorded once, by running the model on the meta device, where nothing is computed. While it runs, every
operation that reads a parameter is seen, and the innermost module running at that moment is the parameter's reader:
so a weight that a parent reads in its child's stead is fetched for the parent. A second pass goes on from the first
one's cache, because some models read a weight in another place then. A model that the meta device cannot run (its
control flow depends on values) falls back to its repeated blocks in the order in which they are registered, as do
parameters that the traced passes did not read; what lies outside of blocks stays on the device, because nobody knows
who reads it.

For a module that is in memory the order comes from a pass that :mod:`djinn.weights.recording` has recorded instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from djinn.weights.index import Reads
from djinn.weights.inputs import Inputs, example_inputs, following_inputs
from djinn.weights.models import owners


def traced_readers(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return for each parameter, in order of first read, the modules that read it; nothing where no pass can be traced.

    A tied parameter has every module that holds it among its readers: one that these passes did not run may run later.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    readers: dict[str, list[str]] = {}
    for inputs in example_inputs(model):
        # Whatever a model's own code raises on meta tensors: its order is then not known beforehand.
        with suppress(Exception):
            readers = read_by_module(_trace(model, inputs))
            break
    held_by = Counter(id(parameter) for _, _, _, parameter in owners(model))
    for full, _, _, parameter in owners(model):
        known, owner = readers.get(names[id(parameter)]), full.rpartition(".")[0]
        if known is not None and held_by[id(parameter)] > 1 and owner not in known:
            known.append(owner)
    return readers


def first_readers_of_inputs(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Return for each of the ``layers`` that runs the first of them that reads the same tensor as its first input.

    Nothing where no pass can be traced on the meta device.
    """
    first: dict[str, str] = {}
    read: dict[int, tuple[torch.Tensor, str]] = {}  # the tensors too: else another one may get the address of one

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                first.setdefault(name, read.setdefault(id(args[0]), (args[0], name))[1])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
    try:
        for inputs in example_inputs(model):
            with suppress(Exception), _meta_buffers(model), torch.no_grad(), ReadRecorder(lambda _: None):
                model(**inputs)
                return first
            first.clear()
            read.clear()
        return {}
    finally:
        for handle in handles:
            handle.remove()


def read_by_module(reads: list[tuple[str, tuple[str, ...]]]) -> dict[str, list[str]]:
    """Return for each parameter, in order of first read, the modules that read it."""
    readers: dict[str, list[str]] = {}
    for parameter, running in reads:
        known = readers.setdefault(parameter, [])
        if running[-1] not in known:
            known.append(running[-1])
    return readers


def read_by_block(model: nn.Module) -> dict[str, list[str]]:
    """Return for each parameter the outermost callable element of a list or sequence that holds it, else the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(inside(name, block) for block in blocks):
            # Lists and dicts of modules are not called themselves, so no hook of theirs would run.
            blocks += [f"{name}.{key}" for key, block in module.named_children() if _is_callable(block)]
    readers: dict[str, list[str]] = {}
    for full, _, _, parameter in owners(model):
        reader = next((block for block in blocks if inside(full, block)), "")
        known = readers.setdefault(names[id(parameter)], [])
        if reader not in known:
            known.append(reader)
    return readers


class ReadRecorder(TorchFunctionMode):
    """Reports every tensor that an operation takes, and answers conditions, which have no value on the meta device.

    They hold: in transformers' models they ask whether a mask is all ones or whether sizes agree.
    """

    def __init__(self, report: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__bool__, torch.Tensor.item) and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        result = func(*args, **kwargs)
        # Looking at an attribute of a parameter (its dtype, its device) reads no weights, unless it is a view (its T).
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, torch.Tensor):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    self._report(value)
        return result


def _trace(model: PreTrainedModel, inputs: Inputs) -> Reads:
    """Run the model on the meta device, and once more with the cache that this leaves; return what it reads."""

    def run() -> None:
        outputs = model(**inputs)
        with suppress(Exception):  # one that cannot go on like this reads its weights as in the first pass
            if following := following_inputs(model, inputs, outputs):
                model(**following)

    with _meta_buffers(model):
        return record_reads(model, dict(model.named_parameters()), run)


def record_reads(model: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable[[], object]) -> Reads:
    """Return what reads ``weights``, or views of them, while ``run`` calls ``model``."""
    running: list[str] = []
    reads: Reads = []
    handles = []
    # A module may hand a view of its weights to its parent, which then reads them too.
    names = {id(tensor): name for name, tensor in weights.items()}
    storages: dict[int | None, list[str]] = {}
    for name, tensor in weights.items():
        storages.setdefault(storage_of(tensor), []).append(name)
    storages.pop(None, None)

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            running.append(name)

        return hook

    def leave(*_: object) -> None:
        running.pop()

    def report(tensor: torch.Tensor) -> None:
        known = names.get(id(tensor))
        found = storages.get(storage_of(tensor), []) if known is None else [known]
        reads.extend((name, tuple(running)) for name in found)

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with torch.no_grad(), ReadRecorder(report):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return reads


@contextmanager
def _meta_buffers(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers on the meta device for a while: operations cannot mix it with another."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        for module, saved in buffers:
            for name, buffer in saved.items():
                module._buffers[name] = None if buffer is None else buffer.to("meta")
        yield
    finally:
        for module, saved in buffers:
            module._buffers.clear()  # of those, too, that the pass has added
            module._buffers.update(saved)


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return what tells a tensor's storage from others that are alive; None for tensors that have none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def inside(name: str, ancestor: str) -> bool:
    """Return whether a module's ``name`` is ``ancestor`` or within it."""
    return ancestor == "" or name == ancestor or name.startswith(ancestor + ".")
