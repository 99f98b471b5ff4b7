"""Turn a planned model into one that streams, and undo that."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn.devices import cpus_near
from djinn.engine.binding import Weights, buffer_homes, move_buffers
from djinn.engine.coding import Scratch, decoding
from djinn.engine.device_memory import hold_workspace
from djinn.engine.expert_layers import Layer
from djinn.engine.experts import Experts
from djinn.engine.guards import guard, unguard
from djinn.engine.heap import map_large_blocks
from djinn.engine.host_experts import HostExperts
from djinn.engine.host_units import HostUnits
from djinn.engine.presence import presences
from djinn.engine.ranks import Alone
from djinn.engine.saving import save_from_store
from djinn.engine.second_order import SecondOrder
from djinn.engine.streamer import Streamer
from djinn.host.ahead import computing_beside
from djinn.host.products import HostProducts
from djinn.planning.placement import Plan, Tier
from djinn.transport.arena import Arena
from djinn.transport.copier import Copier, Source
from djinn.transport.cpu import CpuCopier
from djinn.transport.cuda import CudaCopier
from djinn.transport.exchange import exchange_with
from djinn.transport.fetcher import CpuFetcher, Fetcher
from djinn.transport.fetcher_cuda import CudaFetcher
from djinn.transport.reader import Reader, allocate
from djinn.transport.residents import load_residents
from djinn.transport.stats import Stats
from djinn.weights.quantised import gather_states


@dataclass(frozen=True)
class Before:
    """What streaming changes of a model beside its parameters and hooks, as it was."""

    buffers: dict[tuple[str, str], torch.device]
    hf_device_map: object


@dataclass
class Engine:
    """What streams one model's weights. Holds no reference to the model, so that dropping the model frees it all."""

    plan: Plan
    weights: Weights
    copier: Copier
    streamer: Streamer
    experts: Experts | None
    """What fetches routed experts, where there are any."""
    host: HostUnits | None
    """What has the host's cores compute, where they do."""
    stats: Stats
    before: Before
    ranks: Alone
    """The processes that hold the model together."""
    resources: ExitStack
    """Undoes everything, last things first: hooks, copies, host memory, files, converted weights."""


def start(
    model: nn.Module,
    planned: Plan,
    weights: Weights,
    explain: Callable[..., None],
    *,
    trace: bool,
    progress: bool,
    undo: ExitStack,
    ranks: Alone,
    host_threads: int | None = None,
) -> Engine:
    """Allocate, fill, bind and hook; ``undo`` learns how to take each step back, but for what :func:`restore` does.

    The device is the one that the weights' coder works on. ``explain`` is a forward hook, called always: see
    :func:`djinn.engine.device_memory.shortage_hook`. ``host_threads`` compute with the plan's host units.
    """
    device, reader = weights.coder.device, weights.coder.reader
    products = None
    if planned.host is not None:  # before anything is filled: it may be refused
        products = _products(device, host_threads)
        undo.callback(products.close)
    stats = Stats(
        model_bytes=planned.model_bytes,
        resident_bytes=planned.resident_bytes,
        ring_bytes=planned.ring_bytes,
        host_bytes=planned.pinned_bytes,
        disk_bytes=planned.disk_bytes,
        traced=trace,
    )
    if device.type == "cpu":
        map_large_blocks()
    moved = [unit for unit in planned.at(Tier.RESIDENT) if not weights.stays(unit, device)]
    residents = load_residents(moved, weights.coder, device)
    for unit in moved:
        weights.take(unit, residents[unit.name])
    waiting = [*planned.at(Tier.PINNED), *planned.raw_copies]
    arena = Arena(waiting, weights, pin=device.type == "cuda", progress=progress)
    undo.callback(arena.close)
    for unit in planned.at(Tier.PINNED):
        weights.take(unit, torch.from_numpy(arena.images[unit.name]))
    weights.coder.check(planned.at(Tier.DISK))
    weights.coder.close()  # there is nothing left to code
    if device.type == "cuda" and device in weights.devices:
        torch.cuda.empty_cache()  # what a module's own weights took
    stats.page_locked = arena.pinned
    sources = [Source(unit, arena.images.get(unit.name)) for unit in planned.visits]
    copier: Copier
    if device.type == "cuda":
        ring = torch.empty(planned.ring_bytes, dtype=torch.uint8, device=device)
        copier = CudaCopier(sources, planned.slots, ring, reader, stats)
    else:
        copier = CpuCopier(sources, planned.slots, allocate(planned.ring_bytes), reader, stats)
    undo.callback(copier.close)
    in_ring = [copier.ring[slot.offset : slot.offset + slot.nbytes] for slot in planned.slots]
    slots = {unit.name: room for unit, room in zip(planned.streamed, in_ring, strict=False)}
    if planned.routed:
        fetcher = _fetcher(planned, copier, reader, stats, device)
        undo.callback(fetcher.close)
    scratch = Scratch(planned.scratch_bytes, device)
    decodings = {}
    for unit in planned.routed:
        weights.bind_experts(unit, fetcher.pool)
    for unit in planned.units:
        image = slots.get(unit.name, weights.images.get(unit.name))
        if image is None or unit.experts:
            continue  # it stays where it is, or comes when it is picked
        if unit.coded:
            decodings[unit.name] = decoding(unit, image, scratch)
            weights.bind(unit.decoded, scratch.buffer)
        elif unit.name in slots:
            weights.bind(unit.tensors, image)
    before = note_state(model)
    move_buffers(model, dict.fromkeys(before.buffers, device))
    gathered = gather_states(model)
    if device.type == "cuda":
        hold_workspace(planned.workspace_bytes - gathered - ranks.collectives_bytes, device)
    if isinstance(model, PreTrainedModel):
        # Where pipelines and adapters put their tensors. "disk" or "cpu" would make PEFT dispatch the model anew.
        vars(model)["hf_device_map"] = {"": device}
        vars(model)["_valid_auto_compile_criteria"] = _never_compile
    present = presences(model, planned, weights)
    for presence in present.values():
        undo.callback(presence.begin)
    second = _second_order(planned, in_ring, weights, scratch)
    streamer = Streamer(planned.streamed, planned.slots, copier, stats, decodings, scratch, present, second)
    undo.callback(streamer.detach)
    streamer.attach(model)
    streamer.turns.beginnings.append(weights.ask_for_nothing)
    streamer.turns.endings.append(weights.ask_again)
    streamer.attach_residents(model, [unit for unit in planned.at(Tier.RESIDENT) if unit.coded])
    host = host_experts = None
    if planned.host is not None and products is not None:
        own = [unit for unit in planned.streamed if unit.name in planned.host.units - planned.host.coded_too]
        computed = [(unit, torch.from_numpy(arena.images[unit.name])) for unit in (*own, *planned.raw_copies)]
        rates = planned.host.rates
        beside = computing_beside(device, products, stats)
        undo.callback(beside.close)
        host = HostUnits(computed, beside, rates.tokens, lambda: streamer.orders.few)
        if planned.computed_experts:
            host_experts = HostExperts(products, exchange_with(device), rates, stats)
        undo.callback(host.detach)
        host.attach(model)
        streamer.turns.endings.append(host.forget)
    experts = None
    if planned.routed:
        layers = [Layer.of(unit, arena.images.get(unit.name), fetcher.pool) for unit in planned.routed]
        experts = Experts(layers, fetcher, planned, stats, streamer.turns, host_experts)
        undo.callback(experts.detach)
        experts.attach(model)
    undo.callback(model.register_forward_hook(explain, always_call=True).remove)
    for handle in itertools.chain(guard(model), save_from_store(model, planned, weights)):
        undo.callback(handle.remove)
    return Engine(planned, weights, copier, streamer, experts, host, stats, before, ranks, undo.pop_all())


def _products(device: torch.device, threads: int | None) -> HostProducts:
    """Return the cores that compute with host units, beside the device."""
    products = HostProducts(threads, cpus_near(device))
    if products.reason:
        warnings.warn(
            f"host_compute: PyTorch multiplies with {products.threads} threads, more slowly than the plan expects: "
            f"{products.reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return products


def _second_order(
    planned: Plan, slots: Sequence[torch.Tensor], weights: Weights, scratch: Scratch
) -> SecondOrder | None:
    """Return the order of passes of few tokens, where the host computes with units; ``slots`` are the visits'."""
    if planned.host is None:
        return None
    visits = planned.visits
    behind = zip(planned.second, slots[len(planned.streamed) :], strict=True)
    decodings = {unit.name: decoding(unit, slot, scratch) for unit, slot in behind if unit.coded}

    def bind(visit: int) -> None:
        with torch.inference_mode(False):
            weights.bind(visits[visit].tensors, slots[visit])

    return SecondOrder(planned.second, planned.host.rates.tokens, decodings, bind)


def _fetcher(planned: Plan, copier: Copier, reader: Reader, stats: Stats, device: torch.device) -> Fetcher:
    """Return what brings experts into a pool, which it allocates."""
    shape = planned.pool.slots, planned.pool.slot_bytes
    if isinstance(copier, CudaCopier):
        pool = torch.empty(shape, dtype=torch.uint8, device=device)
        on_disk = any(unit.experts for unit in planned.at(Tier.DISK))
        return CudaFetcher(pool, reader, stats, on_disk=on_disk, zero=copier.zero)
    return CpuFetcher(allocate(planned.pool.nbytes).reshape(shape), reader, stats)


def note_state(model: nn.Module) -> Before:
    """Return what :func:`restore` will bring back."""
    return Before(buffer_homes(model), vars(model).get("hf_device_map"))


def restore(model: nn.Module, weights: Weights, before: Before) -> None:
    """Bring a model that no longer streams back to what it was ``before``."""
    unguard(model)
    for name in ("save_pretrained", "hf_device_map", "_valid_auto_compile_criteria"):
        vars(model).pop(name, None)
    weights.go_home()
    gather_states(model)
    move_buffers(model, before.buffers)
    if before.hf_device_map is not None:
        vars(model)["hf_device_map"] = before.hf_device_map


def _never_compile(*_: object) -> bool:
    """What ``generate()`` asks before it compiles a pass: one with hooks it cannot."""
    return False
