"""Units: tensors that travel together, in the order in which a forward pass reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from djinn.errors import CheckpointError
from djinn.weights.index import WeightIndex
from djinn.weights.tensors import ALIGNMENT, PAGE, FileSpan, TensorEntry
from djinn.weights.tracing import inside, read_by_block, read_by_module, traced_readers

UNREAD = "(not read)"
"""The unit of what no recorded pass has read: it stays on the device, because nobody knows who will read it."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and its byte offset in its unit's image."""

    name: str
    entry: TensorEntry
    offset: int
    shares_pages: bool = False
    """Whether other bytes of the image lie on its first page or its last, so that no whole page may be read there."""


@dataclass(frozen=True)
class Unit:
    """Tensors that travel together. Their **image** is the same in the arena and in the ring, so one copy moves it.

    ``readers`` are the modules that read it, in order; ``held`` says that a reader runs other units while it needs
    this one, so that it cannot be streamed and stays on the device. Sizes are cached: hooks ask for them.

    A module that computes only with the experts which its router picks has a unit with ``experts``, each a unit in
    itself; their images, back to back, are its own, and ``tensors`` says what it would be made of as a :meth:`whole`.
    """

    name: str
    readers: tuple[str, ...]
    tensors: tuple[PlacedTensor, ...]
    held: bool = False
    experts: tuple[Unit, ...] = ()
    is_expert: bool = False

    @cached_property
    def stored(self) -> tuple[PlacedTensor, ...]:
        """The tensors as they are stored: those that are stacked, part by part, where each part goes."""
        placed = []
        for tensor in self.tensors:
            end = tensor.offset
            for name, part in tensor.entry.parts_of(tensor.name):
                placed.append(replace(tensor, name=name, entry=part, offset=end))
                end += part.nbytes
        return _sharing_marked(placed)

    @cached_property
    def image_bytes(self) -> int:
        """Size of the image, whole pages."""
        if self.experts:
            return sum(expert.image_bytes for expert in self.experts)
        last = self.tensors[-1]
        return _round_up(last.offset + last.entry.nbytes, PAGE)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the tensors as they travel, without padding."""
        if self.experts:
            return sum(expert.weight_bytes for expert in self.experts)
        return sum(tensor.entry.nbytes for tensor in self.tensors)

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes of the weights as a model computes with them."""
        return sum(tensor.entry.raw_bytes for tensor in self.tensors)

    @cached_property
    def on_disk(self) -> bool:
        """Whether the image is in files as it is, so that it can be read from them in every pass."""
        tensors = (tensor for unit in self.experts or (self,) for tensor in unit.stored)
        return all(isinstance(tensor.entry.source, FileSpan) for tensor in tensors)

    @cached_property
    def coded(self) -> bool:
        """Whether the image has to be decoded before it is read."""
        tensors = (tensor for unit in self.experts or (self,) for tensor in unit.tensors)
        return any(tensor.entry.layout is not None for tensor in tensors)

    @cached_property
    def expert_offsets(self) -> tuple[int, ...]:
        """Where in the image each expert's begins."""
        ends = accumulate((expert.image_bytes for expert in self.experts), initial=0)
        return tuple(ends)[: len(self.experts)]

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
        """Size of the decoded image; 0 where nothing is coded, and of experts, which share no scratch."""
        if self.experts or not self.coded:
            return 0
        last = self.decoded[-1]
        layout = last.entry.layout
        return last.offset + (last.entry.raw_bytes if layout is None else layout.decoded_bytes)

    def with_entries(self, change: Callable[[TensorEntry], TensorEntry]) -> Unit:
        """Return the unit with ``change`` applied to each of its tensors, laid out anew."""
        place = lay_out_expert if self.is_expert else lay_out
        tensors = place([(tensor.name, change(tensor.entry)) for tensor in self.tensors])
        return replace(self, tensors=tensors, experts=tuple(expert.with_entries(change) for expert in self.experts))

    def whole(self) -> Unit:
        """Return the unit as one that always travels whole."""
        return replace(self, experts=())

    def raw(self) -> Unit:
        """Return the unit with its tensors raw."""
        return self.with_entries(lambda entry: entry.raw)


def find_units(index: WeightIndex) -> list[Unit]:
    """Return the model's units in execution order; every tensor of the index is in exactly one.

    Raises:
        CheckpointError: a model that converts weights while it runs, and cannot be traced.
    """
    readers, tensors = readers_of(index)
    members = _group(readers)
    all_readers = {reader for each in members for reader in each}
    units = [
        Unit(
            name="+".join(each) or "(root)",
            readers=each,
            tensors=lay_out([(name, tensors[name]) for name in parameters]),
            held=any(other != reader and inside(other, reader) for reader in each for other in all_readers),
        )
        for each, parameters in members.items()
    ]
    unread = [(name, entry) for name, entry in tensors.items() if name not in readers]
    return units + ([Unit(UNREAD, (), lay_out(unread), held=True)] if unread else [])


def readers_of(index: WeightIndex) -> tuple[dict[str, list[str]], dict[str, TensorEntry]]:
    """Return for each parameter, in order of first read, the modules that read it; and every tensor as they read it.

    Raises:
        CheckpointError: a model that converts weights while it runs, and cannot be traced.
    """
    if index.reads is not None:
        return read_by_module(index.reads), index.tensors
    readers = traced_readers(index.model)
    # A pass may convert weights for good (a router in float32): then they are converted when they are loaded.
    dtypes = {name: parameter.dtype for name, parameter in index.model.named_parameters()}
    tensors = {name: entry.to(dtypes[name]) for name, entry in index.tensors.items()}
    converted = [name for name, entry in tensors.items() if entry is not index.tensors[name]]
    if converted and not readers:
        raise CheckpointError(
            f"{type(index.model).__name__} converts {converted[0]} to {dtypes[converted[0]]} while it runs, and "
            f"which others cannot be traced; load it with dtype {dtypes[converted[0]]}"
        )
    readers |= {name: by for name, by in read_by_block(index.model).items() if name not in readers}
    return readers, tensors


def lay_out(tensors: list[tuple[str, TensorEntry]]) -> tuple[PlacedTensor, ...]:
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


def lay_out_expert(tensors: list[tuple[str, TensorEntry]]) -> tuple[PlacedTensor, ...]:
    """Place an expert's tensors, raw ones first, so that all experts of a module have those at the same places.

    Each raw one begins on a page, but for those of one name, which are parts of one tensor and stand back to back.
    """
    placed: list[PlacedTensor] = []
    end = 0
    for name, entry in sorted(tensors, key=lambda tensor: tensor[1].layout is not None):
        joined = entry.layout is None and placed and placed[-1].name == name
        offset = end if joined else _round_up(end, PAGE if entry.layout is None else ALIGNMENT)
        placed.append(PlacedTensor(name, entry, offset))
        end = offset + entry.nbytes
    return tuple(placed)


def _sharing_marked(tensors: list[PlacedTensor]) -> tuple[PlacedTensor, ...]:
    """Return ``tensors``, those marked that lie on pages of others too."""
    marked = []
    for number, tensor in enumerate(tensors):
        begin, end = tensor.offset, tensor.offset + tensor.entry.nbytes
        before = number > 0 and tensors[number - 1].offset + tensors[number - 1].entry.nbytes > begin // PAGE * PAGE
        behind = number + 1 < len(tensors) and tensors[number + 1].offset < _round_up(end, PAGE)
        marked.append(replace(tensor, shares_pages=tensor.shares_pages or before or behind))
    return tuple(marked)


def _group(readers: dict[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    """Join the parameters that the same modules read."""
    members: dict[tuple[str, ...], list[str]] = {}
    for parameter, modules in readers.items():
        members.setdefault(tuple(modules), []).append(parameter)
    return members


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
