"""``load``: an ordinary Hugging Face model whose weights stream; ``detach`` undoes it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn.engine.arena import Arena
from djinn.engine.coding import Coder, Scratch, decoding
from djinn.engine.copier import Copier, CpuCopier, Source
from djinn.engine.cuda import CudaCopier
from djinn.engine.hooks import Streamer
from djinn.engine.plan import Plan, Tier
from djinn.engine.planning import Coding, as_coded, device_of, index_of, place_here
from djinn.engine.reader import Reader, allocate, settle
from djinn.engine.residents import load_residents
from djinn.engine.stats import Stats
from djinn.engine.workspace import Workload, shortage_hook
from djinn.errors import ConfigError, PlanError, UnavailableError
from djinn.hardware import local_cpus, usable_ram
from djinn.sizes import format_bytes, parse_bytes
from djinn.weights.index import WeightIndex, owners
from djinn.weights.units import PlacedTensor


@dataclass
class Engine:
    """What streams one model's weights. Holds no reference to the model, so that dropping the model frees it all."""

    plan: Plan
    coder: Coder
    copier: Copier
    streamer: Streamer
    stats: Stats
    resources: ExitStack
    """Undoes everything, last things first: hooks, copies, host memory, files, converted weights."""


_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


def load(
    model: str | Path,
    *,
    budget: int | str,
    device: str | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    chunk: int | str = "64 MiB",
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    coding: Coding | None = None,
    trace: bool = False,
    progress: bool = False,
) -> PreTrainedModel:
    """Return a Hugging Face model that runs within ``budget`` bytes of device memory, streaming what does not fit.

    Args:
        model: a checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``, whose seeded
            random weights are made straight in host memory.
        budget: device memory for residents, ring, KV cache and activations; a size such as ``"24 GB"``.
        device: ``"cuda"`` or ``"cpu"``; by default a GPU where there is one. On a CPU the device is a budget of host
            memory, and weights are streamed from disk.
        ring: size of the device ring; by default the smallest that still overlaps copies and compute.
        host_memory: most page-locked host memory for streamed weights; what does not fit is read from disk each pass.
        chunk: size of one copy command, and of one disk read.
        prompt_tokens, new_tokens, batch: the longest generation to keep device memory for.
        dtype: of synthetic weights; a checkpoint keeps its own.
        seed: of synthetic weights.
        coding: ``"lossless"`` codes bfloat16 weights while they are loaded, to about 0.7 of their size, and rebuilds
            their exact bits on the device. Weights coded here have to fit the device and host memory; those of a
            packed checkpoint are coded already, and stay on disk as they are. ``"none"`` decodes a packed checkpoint
            while it is loaded. By default weights stay as they are stored. A model that fits the budget is raw.
        trace: keep a timeline of copies, compute and stalls in :func:`stats`.
        progress: show a bar while host memory is filled.

    Raises:
        ConfigError: an argument that means nothing.
        CheckpointError: a checkpoint that is missing or damaged.
        PlanError: a ring, budget or host memory that cannot work; says what would.
        UnavailableError: no such device.
    """
    where = device_of(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device cuda: this machine has no CUDA device that torch can use; device='cpu' works")
    chunk_bytes = parse_bytes(chunk)
    work = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    with ExitStack() as undo:
        spill = Path(tempfile.mkdtemp(prefix="djinn-"))
        undo.callback(shutil.rmtree, spill, ignore_errors=True)
        index = index_of(model, spill, dtype, seed)
        reader = Reader(chunk_bytes, cpus=local_cpus(where.index or 0) if where.type == "cuda" else None)
        undo.callback(reader.close)
        coder = Coder(reader, where)
        undo.callback(coder.close)
        index = as_coded(index, where, work, budget, coding, coder.layout)
        planned = place_here(index, where, work, budget, ring, host_memory)
        engine = _start(
            index, planned, work, where, reader, coder, chunk_bytes, trace=trace, progress=progress, undo=undo
        )
    _engines[index.model] = engine
    weakref.finalize(index.model, _release, engine.resources, os.getpid())
    return index.model


def placement(model: nn.Module) -> Plan:
    """Return the plan that a streaming model follows, with the sizes that its weights really have.

    Raises:
        ConfigError: not a model from :func:`load`.
    """
    return _engine(model).plan


def stats(model: nn.Module) -> Stats:
    """Return the running totals of a streaming model.

    Raises:
        ConfigError: not a model from :func:`load`.
    """
    engine = _engine(model)
    engine.copier.resolve_timeline()
    return engine.stats


def cool(model: nn.Module) -> None:
    """Drop everything prefetched, so that the next pass begins with a cold ring.

    Raises:
        ConfigError: not a model from :func:`load`, or called in the middle of a pass.
    """
    streamer = _engine(model).streamer
    with streamer.turns.lock:
        streamer.turns.refuse_while_running("cool")
        streamer.cool()


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`load`: return the same model with all weights in ordinary host memory, hooks and ring gone.

    Raises:
        ConfigError: not a model from :func:`load`, or called in the middle of a pass.
        PlanError: the weights do not fit the host memory that is free; the model goes on streaming.
    """
    engine = _engine(model)
    with engine.streamer.turns.lock:
        engine.streamer.turns.refuse_while_running("detach")
        _detach(model, engine)
    return model


def _detach(model: PreTrainedModel, engine: Engine) -> None:
    if engine.plan.model_bytes > usable_ram():
        raise PlanError(
            f"host memory: the whole model needs {format_bytes(engine.plan.model_bytes)}, "
            f"{format_bytes(usable_ram())} are free; it goes on streaming"
        )
    named = _owners_by_name(model)
    for unit in engine.plan.units:
        raw = unit.raw()
        image = allocate(raw.image_bytes)
        settle(engine.coder.fill(raw, image))
        _bind(named, raw.tensors, torch.from_numpy(image))
    nn.Module.to(model, "cpu")
    del vars(model)["hf_device_map"]
    del _engines[model]
    engine.resources.close()


def _release(resources: ExitStack, owner: int) -> None:
    """Give everything back; but a forked child has neither the threads nor the right to its parent's files."""
    if os.getpid() == owner:
        resources.close()


def _engine(model: nn.Module) -> Engine:
    try:
        return _engines[model]
    except KeyError:
        raise ConfigError(f"this {type(model).__name__} does not stream; djinn.load returns models that do") from None


def _start(
    index: WeightIndex,
    planned: Plan,
    work: Workload,
    device: torch.device,
    reader: Reader,
    coder: Coder,
    chunk_bytes: int,
    *,
    trace: bool,
    progress: bool,
    undo: ExitStack,
) -> Engine:
    """Allocate, fill, bind and hook; ``undo`` learns how to take each step back."""
    model = index.model
    stats = Stats(
        model_bytes=planned.model_bytes,
        resident_bytes=planned.resident_bytes,
        ring_bytes=planned.ring_bytes,
        host_bytes=planned.pinned_bytes,
        disk_bytes=planned.disk_bytes,
        traced=trace,
    )
    named = _owners_by_name(model)
    residents = load_residents(planned.at(Tier.RESIDENT), coder, device)
    arena = Arena(planned.at(Tier.PINNED), coder, pin=device.type == "cuda", progress=progress)
    undo.callback(arena.close)
    coder.check(planned.at(Tier.DISK))
    coder.close()  # there is nothing left to code
    stats.page_locked = arena.pinned
    sources = [Source(unit, arena.images.get(unit.name)) for unit in planned.streamed]
    copier: Copier
    if device.type == "cuda":
        ring = torch.empty(planned.ring_bytes, dtype=torch.uint8, device=device)
        copier = CudaCopier(sources, planned.slots, ring, reader, stats, chunk_bytes)
    else:
        copier = CpuCopier(sources, planned.slots, allocate(planned.ring_bytes), reader, stats)
    undo.callback(copier.close)
    slots = {
        unit.name: copier.ring[slot.offset : slot.offset + slot.nbytes]
        for unit, slot in zip(planned.streamed, planned.slots, strict=True)
    }
    scratch = Scratch(planned.scratch_bytes, device)
    decodings = {}
    for unit in planned.units:
        image = residents[unit.name] if unit.name in residents else slots[unit.name]
        if unit.coded:
            decodings[unit.name] = decoding(unit, image, scratch)
            _bind(named, unit.decoded, scratch.buffer)
        else:
            _bind(named, unit.tensors, image)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    # Its first entry is where a pipeline puts inputs; one on disk keeps generate() from compiling a pass with hooks.
    vars(model)["hf_device_map"] = {"": str(device), "streamed": "disk"}
    streamer = Streamer(planned.streamed, planned.slots, copier, stats, decodings, scratch)
    undo.callback(streamer.detach)
    streamer.attach(model)
    streamer.attach_residents(model, [unit for unit in planned.at(Tier.RESIDENT) if unit.coded])
    undo.callback(model.register_forward_hook(shortage_hook(work), always_call=True).remove)
    return Engine(planned, coder, copier, streamer, stats, undo.pop_all())


def _owners_by_name(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return for each parameter, under its first name, every (module, name there) that holds it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for _, module, local, parameter in owners(model):
        places.setdefault(first[id(parameter)], []).append((module, local))
    return places


def _bind(named: dict[str, list[tuple[nn.Module, str]]], tensors: Sequence[PlacedTensor], image: torch.Tensor) -> None:
    """Make parameters views of ``image`` (uint8, raw weights at the tensors' places), tied ones still one object."""
    for tensor in tensors:
        raw = image[tensor.offset : tensor.offset + tensor.entry.raw_bytes]
        parameter = nn.Parameter(raw.view(tensor.entry.dtype).view(tensor.entry.shape), requires_grad=False)
        for module, local in named[tensor.name]:
            module._parameters[local] = parameter
