"""Binding: a model's parameters are views of wherever their bytes are, and can be taken back to memory of their own.

Only ``.data`` of a parameter changes, so whoever holds it (ties, optimisers, lists in a module) holds it still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import nn

from djinn.engine.coding import Coder
from djinn.engine.heap import trim_heap
from djinn.engine.waiting import own, waiting_weights
from djinn.transport.reader import Buffer, allocate, settle
from djinn.weights.index import WeightIndex
from djinn.weights.models import held_here, owners
from djinn.weights.tensors import InMemory
from djinn.weights.units import PlacedTensor, Unit

TRIM_BYTES = 64 * 2**20
"""Freed weights that the C library may keep before it is asked to give them back to the system."""


class Weights:
    """The parameters of one model, and what they go back to.

    Args:
        parameters: by the first name of each tensor, every parameter that stands for it.
        coder: makes images of units.
    """

    def __init__(self, parameters: Mapping[str, Sequence[torch.Tensor]], coder: Coder) -> None:
        self._parameters = parameters
        self.coder = coder
        self._homes = [(parameter, parameter.device) for alike in parameters.values() for parameter in alike]
        self.images: dict[str, torch.Tensor] = {}
        """Image of every unit that has been taken, on the device or in host memory, for as long as it streams."""
        self._freed_bytes = 0
        self._bound: dict[int, int] = {}
        """Where each parameter's bytes were when it was bound last, by its id."""
        self._asking: list[torch.Tensor] = []
        """The parameters that asked for gradients until a pass began that records them."""

    @property
    def devices(self) -> set[torch.device]:
        """Where the parameters were."""
        return {device for _, device in self._homes}

    def ask_for_nothing(self) -> None:
        """Let no parameter ask for gradients in a pass that records them: its bytes will be others' by then.

        In all other passes parameters stay as they are: by whether they ask, torch chooses kernels even where nothing
        is recorded (``should_fold`` in its ``LinearAlgebra.cpp``), and the resident model's are to be taken.
        """
        self.ask_again()  # an interrupt may have left that to be done
        if torch.is_grad_enabled():
            with torch._C.DisableTorchFunctionSubclass():
                self._asking = [parameter for parameter, _ in self._homes if parameter.requires_grad]
                for parameter in self._asking:
                    parameter.requires_grad = False

    def ask_again(self) -> None:
        """Let parameters ask for gradients again as they did."""
        with torch._C.DisableTorchFunctionSubclass():
            for parameter in self._asking:
                parameter.requires_grad = True
        self._asking = []

    def of(self, *tensors: PlacedTensor) -> list[torch.Tensor]:
        """Return every parameter that stands for ``tensors``."""
        return [parameter for tensor in tensors for parameter in self._parameters[tensor.name]]

    def stays(self, unit: Unit, device: torch.device) -> bool:
        """Return whether a resident is on ``device`` already, as it is: then nothing is to be moved."""
        return not unit.coded and all(
            isinstance(tensor.entry.source, InMemory)
            and parameter.device == device
            and parameter.untyped_storage().nbytes() == tensor.entry.raw_bytes
            for tensor in unit.tensors
            for parameter in self.of(tensor)
        )

    def fill(self, unit: Unit, image: Buffer) -> list[Future[int]]:
        """Fill ``image`` as :class:`Coder` does; what was in memory until now is taken there, and its own memory freed.

        So that there is never a second copy of the model, only of a unit.
        """
        futures = self.coder.fill(unit, image)
        if any(_was_in_memory(tensor) for tensor in unit.tensors):
            settle(futures)
            self.take(unit, torch.from_numpy(image))
            self._freed_bytes += unit.raw_bytes
            if self._freed_bytes >= TRIM_BYTES:
                self._freed_bytes = 0
                trim_heap()
        return futures

    def take(self, unit: Unit, image: torch.Tensor) -> None:
        """Note where the image of ``unit`` (uint8) is for good; nothing else holds its bytes from here on."""
        self.images[unit.name] = image
        for tensor in unit.tensors:
            if tensor.entry.layout is None and not unit.experts:
                self.bind([tensor], image)
            else:
                for parameter in self.of(tensor):
                    parameter.data = torch.empty(0, dtype=tensor.entry.dtype, device=image.device)

    def bind(self, tensors: Sequence[PlacedTensor], image: torch.Tensor) -> None:
        """Make parameters views of ``image`` (uint8, raw weights at the tensors' places)."""
        for tensor in tensors:
            self._bind(tensor, tensor.entry.view(image[tensor.offset : tensor.offset + tensor.entry.raw_bytes]))

    def bind_experts(self, unit: Unit, pool: torch.Tensor) -> None:
        """Give parameters of routed experts their shape on the pool's device; what they show is nobody's weights."""
        for tensor in unit.tensors:
            element = pool.view(-1).view(tensor.entry.dtype)[:1]
            self._bind(tensor, element.expand(tensor.entry.shape))

    def _bind(self, tensor: PlacedTensor, weights: torch.Tensor) -> None:
        for parameter in self.of(tensor):
            with torch._C.DisableTorchFunctionSubclass():  # it may be away: see djinn.engine.presence
                self._bound.pop(id(parameter), None)  # an interrupt in between makes it no changed one
                parameter.data = weights
                self._bound[id(parameter)] = parameter.data_ptr()

    def is_changed(self, parameter: torch.Tensor) -> bool:
        """Return whether a parameter was given other weights since (a resident's, by resizing the vocabulary)."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._bound.get(id(parameter)) not in (None, parameter.data_ptr())

    def copied_bytes(self, units: Sequence[Unit]) -> int:
        """Return the host memory that :meth:`give_back` will take for ``units``."""
        needed = 0
        for unit in units:
            image = self.images.get(unit.name)
            if unit.on_disk if image is None else unit.coded or image.device.type != "cpu":
                needed += unit.raw_bytes
        return needed

    def give_back(self, units: Sequence[Unit]) -> None:
        """Bind ``units`` to ordinary host memory again; what is there already, uncoded, is not copied.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        for unit in units:
            if unit.name in self.images:
                for tensor in unit.tensors:
                    if not any(map(self.is_changed, self.of(tensor))):
                        self._bind(tensor, waiting_weights(unit, tensor, self.images[unit.name]))
            elif unit.on_disk:
                raw = unit.whole().raw()
                image = allocate(raw.image_bytes)
                settle(self.coder.fill(raw, image))
                for tensor in raw.tensors:
                    stored = own(torch.from_numpy(image[tensor.offset :][: tensor.entry.nbytes]))
                    self._bind(tensor, tensor.entry.view(stored))

    def go_home(self) -> None:
        """Move parameters to the device where each was, all asking for gradients as they do outside of passes."""
        self.ask_again()  # an interrupt may have left that to be done
        for parameter, device in self._homes:
            parameter.data = parameter.data.to(device)


def parameters_by_name(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return what holds parameters of ``model``, by their first names; what is one view of a storage, together."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, list[torch.Tensor]] = {}
    for name, whole in model.named_parameters():
        parameter = held_here(whole)
        view = (
            parameter.untyped_storage()._cdata,
            parameter.storage_offset(),
            parameter.shape,
            parameter.stride(),
            parameter.dtype,
        )
        found.setdefault(first.setdefault(view, name), []).append(parameter)
    return found


def parameters_of(index: WeightIndex) -> Mapping[str, Sequence[torch.Tensor]]:
    """Return an index's parameters by first name: those in memory, or empty ones in place of meta ones."""
    sources = {name: entry.raw.source for name, entry in index.tensors.items()}
    held = {name: [source.parameter] for name, source in sources.items() if isinstance(source, InMemory)}
    return held or materialise(index.model)


def materialise(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Put empty parameters in host memory in the place of those on the meta device; return them by first name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = {
        name: nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.dtype.is_floating_point)
        for name, parameter in model.named_parameters()
    }
    for _, module, local, parameter in list(owners(model)):
        module._parameters[local] = made[names[id(parameter)]]
    return {name: [parameter] for name, parameter in made.items()}


def buffer_homes(model: nn.Module) -> dict[tuple[str, str], torch.device]:
    """Return where each buffer is, by its module's name and its name there."""
    return {
        (prefix, name): buffer.device
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def move_buffers(model: nn.Module, homes: Mapping[tuple[str, str], torch.device]) -> None:
    """Move buffers to where ``homes`` says; those that a pass has put in the place of others too."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and (prefix, name) in homes:
                buffer.data = buffer.data.to(homes[prefix, name])  # the same object: it may be shared


def _was_in_memory(tensor: PlacedTensor) -> bool:
    return isinstance(tensor.entry.raw.source, InMemory)
