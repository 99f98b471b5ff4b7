"""``offload``: any module that is in memory already streams its weights, which are taken to where they stream from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from djinn.devices import free_device_memory, require_here
from djinn.engine.assembly import Engine, note_state, restore, start
from djinn.engine.binding import Weights, parameters_by_name
from djinn.engine.coding import Coder
from djinn.engine.device_memory import shortage_hook
from djinn.engine.guards import is_guarded
from djinn.engine.load import register
from djinn.engine.opened import opened
from djinn.engine.ranks import ranks_holding
from djinn.errors import ConfigError, PlanError
from djinn.hardware import usable_ram
from djinn.names import Coding
from djinn.planning.memory import require_device_memory
from djinn.planning.request import Request
from djinn.sizes import format_bytes, parse_bytes
from djinn.weights.index import WeightIndex
from djinn.weights.models import held_here
from djinn.weights.quantised import quantised_bytes, states_bytes
from djinn.weights.recording import Example, recorded_reads, run, undisturbed
from djinn.weights.tensors import InMemory, TensorEntry
from djinn.weights.tracing import ReadRecorder, storage_of
from djinn.weights.units import UNREAD, Unit

Module = TypeVar("Module", bound=nn.Module)

WORKSPACE_SHARE = 0.25
"""Share of the budget that is kept for activations where the caller names no size."""


def offload(
    module: Module,
    *,
    budget: int | str,
    example: Example | list[Example],
    workspace: int | str | None = None,
    device: str | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    chunk: int | str = "64 MiB",
    coding: Coding | None = None,
    trace: bool = False,
) -> Module:
    """Make ``module`` run within ``budget`` bytes of device memory, streaming what does not fit; return it.

    Its weights are moved unit by unit, each one's own memory freed before the next is moved. The module stays the same
    object with the same parameters; :func:`djinn.detach` gives it back as it was, and until then

    - parameters ask for gradients as before, but not within a pass that records them; gradients through weights that
      stream are refused when they are computed;
    - moving, converting, copying, pickling the module and loading a state dict into it are refused;
    - buffers are on the device and change as ever; ``state_dict()`` is complete;
    - a weight that is read while its module does not run is copied from where it waits: right, and slow.

    The order of the weights is recorded on ``example``, on the meta device, where nothing is computed, or where the
    module's code cannot run there, in one real pass before anything is moved. Then ``example`` is run once more,
    streaming, and refused if a weight is read where the recorded pass did not read it. Neither leaves traces in
    attributes, buffers and random numbers (but what they append to lists stays there). Later passes may visit modules
    in another order, twice or not at all: that is right, slower, and counted in :func:`djinn.stats`. Weights that no
    example reads stay on the device. Give examples of all paths if the module has several: the same weight may be read
    by its own module on one and by its parent on the other.

    Args:
        module: any module; its parameters are plain tensors of any dtype, on a CPU or GPU. One that transformers has
            split over ranks (``distributed_config``) streams on each of them, all of which have to call this.
        budget: device memory for residents, ring and workspace; a size such as ``"24 GB"``.
        example: what the module is called with: a tuple of positional or a mapping of keyword arguments, on any
            device; or a list of such.
        workspace: device memory for activations; by default a quarter of the budget. On a GPU, what CUDA and its
            libraries take comes on top.
        device, ring, chunk, trace: as for :func:`djinn.load`.
        host_memory: most page-locked host memory for streamed weights, all of which have to fit in.
        coding: ``"lossless"`` codes bfloat16 weights while they are moved, as for :func:`djinn.load`.

    Raises:
        ConfigError: an argument that means nothing, an example that the module cannot run, or a module that cannot be
            streamed: says which part of it, and why. The module is then as it was.
        PlanError: a ring, budget, host or device memory that cannot work; says what would. The module is then as it
            was.
        UnavailableError: no such device.
    """
    if workspace is None:
        workspace = round(WORKSPACE_SHARE * parse_bytes(budget))
    request = Request.of(
        budget=budget, keep=workspace, device=device, ring=ring, host_memory=host_memory, chunk=chunk, coding=coding
    )
    where = _with_index(request.device)
    examples = _checked_examples(example)
    _check(module)
    ranks = ranks_holding(module, where)
    request = ranks.share(request)
    where = _with_index(request.device)
    parameters = parameters_by_name(module)
    names = {id(parameter): name for name, alike in parameters.items() for parameter in alike}
    tensors = {name: _entry(name, alike[0]) for name, alike in parameters.items()}
    with ranks.computing():
        reads = recorded_reads(module, names, examples)
    index = WeightIndex(module, tensors, synthetic=False, reads=reads, kept_bytes=quantised_bytes(module))
    there = (tensors[name].nbytes for name, alike in parameters.items() if alike[0].device == where)
    on_device = sum(there) + states_bytes(module, where)
    with ExitStack() as undo, torch.inference_mode(False):
        coder = Coder.on(where, request.chunk, undo)
        model = opened(index, request, coder.layout)
        free = ranks.share_of_host(usable_ram())
        try:
            with ranks.agreed():
                planned = model.plan(free)
                if where.type == "cuda":
                    there_now, total = free_device_memory(where)
                    require_device_memory(planned, there_now + on_device, total)
        except PlanError as error:
            raise PlanError(f"{error}{_unread_words(model.units)}") from None
        before = note_state(module)
        weights = Weights(parameters, coder)
        try:
            explain = shortage_hook(f"a workspace of {format_bytes(parse_bytes(workspace))}")
            with ranks.agreed():
                engine = start(module, planned, weights, explain, trace=trace, progress=False, undo=undo, ranks=ranks)
                undo.push(engine.resources)
            with ranks.computing():
                _check_reads(module, engine, names, examples, where)
            undo.pop_all()
            for handle in ranks.hold_together(module):
                engine.resources.callback(handle.remove)
        except BaseException:
            undo.close()
            weights.give_back(planned.units)
            restore(module, weights, before)
            raise
    register(module, engine)
    return module


def _check_reads(
    module: nn.Module, engine: Engine, names: Mapping[int, str], examples: Sequence[Example], device: torch.device
) -> None:
    """Run the examples, streaming, and refuse weights that are read while they need not be there.

    Raises:
        ConfigError: such a weight.
    """
    planned, streamer = engine.plan, engine.streamer
    units = {tensor.name: unit for unit in planned.units for tensor in unit.tensors}
    streamed = {unit.name for unit in planned.streamed}
    ring = engine.copier.ring
    slots = list(zip(planned.streamed, planned.slots, strict=True))

    def refuse(name: str, unit: Unit) -> None:
        raise ConfigError(
            f"parameter {name} is read while {unit.name} is not running, which the recorded pass did not do, so it "
            f"cannot stream in this {type(module).__name__}"
        )

    def check(tensor: torch.Tensor) -> None:
        name = names.get(id(tensor))
        if name is not None:
            unit = units[name]
            if (unit.name in streamed or unit.coded) and not unit.experts and not streamer.is_reading(unit.name):
                refuse(name, unit)
        elif storage_of(tensor) == storage_of(ring):  # a view of weights that a module has handed on
            at = tensor.data_ptr() - ring.data_ptr()
            here = [unit for unit, slot in slots if slot.offset <= at < slot.offset + slot.nbytes]
            if not any(streamer.is_reading(unit.name) for unit in here):
                refuse(f"in {here[0].name}", here[0])

    with undisturbed(module), torch.no_grad(), ReadRecorder(check):
        run(module, examples, device)


def _with_index(device: torch.device) -> torch.device:
    """Return a device that is here, as parameters on it name it."""
    require_here(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked_examples(example: Example | list[Example]) -> list[Example]:
    examples = example if isinstance(example, list) else [example]
    for each in examples:
        if not isinstance(each, tuple | Mapping):
            raise ConfigError(
                f"example: {type(each).__name__} is neither a tuple of positional nor a mapping of keyword arguments"
            )
    if not examples:
        raise ConfigError("example: an empty list; the order of the weights is recorded on what the module runs")
    return examples


def _check(module: nn.Module) -> None:
    """Refuse modules that cannot be streamed, by name."""
    kind = type(module).__name__
    if next(module.parameters(), None) is None:
        raise ConfigError(f"this {kind} has no parameters; there is nothing to stream")
    for name, part in module.named_modules():
        if is_guarded(part):
            raise ConfigError(f"{name or kind} streams already; djinn.detach it first")
        if hasattr(part, "_hf_hook"):
            raise ConfigError(
                f"{name or kind} has a hook of accelerate's, which moves weights too; "
                "accelerate.hooks.remove_hook_from_submodules(module) first"
            )
        compiled = hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        if compiled or isinstance(part, torch.jit.ScriptModule):
            raise ConfigError(f"{name or kind} is compiled: its hooks would not run; offload the module it was made of")
    for name, parameter in module.named_parameters():
        wrong = _unfit(parameter)
        if wrong:
            raise ConfigError(f"parameter {name} cannot be streamed: {wrong}")


def _unfit(parameter: torch.Tensor) -> str:
    """Return why a parameter cannot be streamed; nothing if it can."""
    if nn.parameter.is_lazy(parameter):
        return "it has no shape yet; run the module once"
    if type(parameter).__name__ == "Int8Params":
        return "bitsandbytes holds its 8-bit weights in other places, too"
    if type(parameter.data) is not torch.Tensor and not isinstance(parameter, DTensor):
        return f"it is a {type(parameter.data).__name__}, not a plain tensor"
    parameter = held_here(parameter)
    if parameter.device.type not in ("cpu", "cuda") or parameter.layout != torch.strided:
        return f"it is a {parameter.layout} tensor on {parameter.device}; it has to be strided, on a CPU or GPU"
    if parameter.is_inference():
        return "it was made in torch.inference_mode(); make the module outside of it"
    if not _is_dense(parameter):
        return "it is a view with gaps or overlaps; give it memory of its own: parameter.data = parameter.data.clone()"
    return ""


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


def _entry(name: str, parameter: torch.Tensor) -> TensorEntry:
    stride = None if parameter.is_contiguous() else parameter.stride()
    return TensorEntry(parameter.dtype, tuple(parameter.shape), InMemory(parameter), stride=stride)


def _unread_words(units: Sequence[Unit]) -> str:
    """Return words on the weights that no example reads, if there are any."""
    unread = next((unit for unit in units if unit.name == UNREAD), None)
    if unread is None:
        return ""
    return (
        f"; {format_bytes(unread.raw_bytes)} of weights that no example reads stay on the device "
        f"({unread.tensors[0].name}, ...): add an example that reads them"
    )
