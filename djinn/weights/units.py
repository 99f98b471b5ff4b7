"""Units: tensors that travel together, in the order in which a forward pass reads them.

The order is recorded once, by running the model on the meta device, where nothing is computed. While it runs, every
operation that reads a parameter is seen, and the innermost module running at that moment is the parameter's reader:
so a weight that a parent reads in its child's stead is fetched for the parent. A model that the meta device cannot run
(its control flow depends on values) falls back to its repeated blocks in the order in which they are registered; what
lies outside them stays on the device, because nobody knows who reads it.

For a module that is in memory the order comes from a pass that :mod:`djinn.weights.recording` has recorded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from djinn.weights.index import Reads, WeightIndex, owners
from djinn.weights.tensors import FileSpan, TensorEntry

PAGE = 4096
"""Direct reads need file offset, address and length in multiples of this."""
ALIGNMENT = 256
"""Bytes to which tensors are aligned in memory, so that kernels choose the same path as for resident weights."""
UNREAD = "(not read)"
"""The unit of what no recorded pass has read: it stays on the device, because nobody knows who will read it."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and its byte offset in its unit's image."""

    name: str
    entry: TensorEntry
    offset: int


@dataclass(frozen=True)
class Unit:
    """Tensors that travel together. Their **image** is the same in the arena and in the ring, so one copy moves it.

    ``readers`` are the modules that read it, in order; ``held`` says that a reader runs other units while it needs
    this one, so that it cannot be streamed and stays on the device. Sizes are cached: hooks ask for them.
    """

    name: str
    readers: tuple[str, ...]
    tensors: tuple[PlacedTensor, ...]
    held: bool = False

    @cached_property
    def image_bytes(self) -> int:
        """Size of the image, whole pages."""
        last = self.tensors[-1]
        return _round_up(last.offset + last.entry.nbytes, PAGE)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the tensors as they travel, without padding."""
        return sum(tensor.entry.nbytes for tensor in self.tensors)

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes of the weights as a model computes with them."""
        return sum(tensor.entry.raw_bytes for tensor in self.tensors)

    @cached_property
    def on_disk(self) -> bool:
        """Whether the image is in files as it is, so that it can be read from them in every pass."""
        return all(isinstance(tensor.entry.source, FileSpan) for tensor in self.tensors)

    @cached_property
    def coded(self) -> bool:
        """Whether the image has to be decoded before it is read."""
        return any(tensor.entry.layout is not None for tensor in self.tensors)

    @cached_property
    def decoded(self) -> tuple[PlacedTensor, ...]:
        """The tensors at their places in the decoded image: aligned, each in whole tiles of the code."""
        placed = []
        end = 0
        for tensor in self.tensors:
            placed.append(replace(tensor, offset=end))
            layout = tensor.entry.layout
            nbytes = tensor.entry.raw_bytes if layout is None else layout.decoded_bytes
            end = _round_up(end + nbytes, ALIGNMENT)
        return tuple(placed)

    @cached_property
    def decoded_bytes(self) -> int:
        """Size of the decoded image; 0 where nothing is coded."""
        if not self.coded:
            return 0
        last = self.decoded[-1]
        layout = last.entry.layout
        return last.offset + (last.entry.raw_bytes if layout is None else layout.decoded_bytes)

    def raw(self) -> Unit:
        """Return the unit with its tensors raw."""
        return replace(self, tensors=_layout([(tensor.name, tensor.entry.raw) for tensor in self.tensors]))


def find_units(index: WeightIndex) -> list[Unit]:
    """Return the model's units in execution order; every tensor of the index is in exactly one."""
    if index.reads is not None:
        members = _group(_read_by_module(index.reads))
    else:
        members = _group(_foreseen_readers(index.model))
    all_readers = {reader for readers in members for reader in readers}
    units = [
        Unit(
            name="+".join(readers) or "(root)",
            readers=readers,
            tensors=_layout([(name, index.tensors[name]) for name in parameters]),
            held=any(other != reader and _inside(other, reader) for reader in readers for other in all_readers),
        )
        for readers, parameters in members.items()
    ]
    known = {name for parameters in members.values() for name in parameters}
    unread = [(name, entry) for name, entry in index.tensors.items() if name not in known]
    return units + ([Unit(UNREAD, (), _layout(unread), held=True)] if unread else [])


def _foreseen_readers(model: nn.Module) -> dict[str, list[str]]:
    """Return for each parameter the modules that read it: from a pass on the meta device, or by block without one."""
    try:
        reads = _trace(model)
    except Exception:
        # Whatever a model's own code raises on meta tensors: its order is then not known beforehand.
        reads = []
    return _read_by_module(reads) if reads else _read_by_block(model)


def _layout(tensors: list[tuple[str, TensorEntry]]) -> tuple[PlacedTensor, ...]:
    """Place tensors in an image so that a direct read can put a file's pages straight into it.

    A tensor whose file offset is aligned keeps its offset within the page, on pages of its own; others are packed.
    """
    placed = []
    end = 0
    for name, entry in tensors:
        if isinstance(entry.source, FileSpan) and entry.source.offset % ALIGNMENT == 0:
            offset = _round_up(end, PAGE) + entry.source.offset % PAGE
            end = _round_up(offset + entry.nbytes, PAGE)
        else:
            offset = _round_up(end, ALIGNMENT)
            end = offset + entry.nbytes
        placed.append(PlacedTensor(name, entry, offset))
    return tuple(placed)


class ReadRecorder(TorchFunctionMode):
    """Reports every tensor that an operation takes."""

    def __init__(self, report: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Looking at an attribute of a parameter (its dtype, its device) reads no weights, unless it is a view (its T).
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, torch.Tensor):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    self._report(value)
        return result


def _trace(model: nn.Module) -> Reads:
    """Run the model on the meta device; return what it reads."""
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    with _meta_buffers(model):
        reads = record_reads(model, dict(model.named_parameters()), lambda: model(input_ids=ids))
    missing = {name for name, _ in model.named_parameters()} - {parameter for parameter, _ in reads}
    if missing:
        raise LookupError(f"parameters that the traced pass never read: {sorted(missing)[:3]}")
    return reads


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


def _read_by_module(reads: Reads) -> dict[str, list[str]]:
    """Return for each parameter, in order of first read, the modules that read it."""
    readers: dict[str, list[str]] = {}
    for parameter, running in reads:
        known = readers.setdefault(parameter, [])
        if running[-1] not in known:
            known.append(running[-1])
    return readers


def _read_by_block(model: nn.Module) -> dict[str, list[str]]:
    """Return for each parameter the outermost callable element of a module list that holds it, else the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_inside(name, block) for block in blocks):
            # Lists and dicts of modules are not called themselves, so no hook of theirs would run.
            blocks += [f"{name}.{key}" for key, block in module.named_children() if _is_callable(block)]
    readers: dict[str, list[str]] = {}
    for full, _, _, parameter in owners(model):
        reader = next((block for block in blocks if _inside(full, block)), "")
        known = readers.setdefault(names[id(parameter)], [])
        if reader not in known:
            known.append(reader)
    return readers


def _group(readers: dict[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    """Join the parameters that the same modules read."""
    members: dict[tuple[str, ...], list[str]] = {}
    for parameter, modules in readers.items():
        members.setdefault(tuple(modules), []).append(parameter)
    return members


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return what tells a tensor's storage from others that are alive; None for tensors that have none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _inside(name: str, ancestor: str) -> bool:
    return ancestor == "" or name == ancestor or name.startswith(ancestor + ".")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
