"""An opened model: its index and its units, found once and coded as asked; whatever is planned is planned from it.

``plan`` says what :func:`djinn.load` would do, without loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from djinn.devices import cpus_near
from djinn.engine.coding import Coder
from djinn.engine.sharding import pretended, sharded
from djinn.errors import ConfigError, PlanError
from djinn.gpus import gpus as gpus_here
from djinn.hardware import usable_ram
from djinn.host.cores import choose_cpus
from djinn.names import Coding
from djinn.planning.host import HostCompute, HostRates, assumed_rates, host_units
from djinn.planning.memory import require_host_memory
from djinn.planning.placement import Plan, Tier, place_on
from djinn.planning.request import Experts, Request
from djinn.planning.workspace import (
    COLLECTIVES_BYTES,
    CUDA_OVERHEAD_BYTES,
    Workload,
    routed_bytes,
    what_fits,
    workspace_bytes,
)
from djinn.spill import spill_folder
from djinn.transport.disk_stream import staging_bytes
from djinn.transport.reader import Reader
from djinn.weights.coding import LayoutOf, coded
from djinn.weights.experts import by_expert, picked_experts, widest_experts
from djinn.weights.index import WeightIndex
from djinn.weights.linear import linear_units
from djinn.weights.opening import outline_of
from djinn.weights.tensors import PAGE, FileSpan, Seeded, TensorEntry
from djinn.weights.units import Unit, find_units

SLOT_SHARE = 0.8
"""Of a PCIe slot's raw rate that copies are taken to reach: 87% on an H100, 73% on an L4."""


@dataclass(frozen=True)
class Opened:
    """A model, what was asked of it, and its units in execution order, with the bytes that they will have."""

    index: WeightIndex
    request: Request
    units: tuple[Unit, ...]
    linear: Mapping[str, str]
    """Units that the host's cores could compute with, and for each what names its inputs; none where none are to."""

    def plan(self, free: int | None = None) -> Plan:
        """Return the plan in the host memory that is ``free``, bytes; by default what is free here now.

        Raises:
            PlanError: a budget, ring or host memory that cannot work; says what would, the generation included.
        """
        free = usable_ram() if free is None else free
        planned = self.place(self.arena_bytes(free))
        self._require_host_memory(planned, free)
        return planned

    def arena_bytes(self, free: int) -> int:
        """Return the most host memory, bytes, that streamed weights may take of what is ``free``."""
        streams = 1 + any(unit.experts for unit in self.units) if self.request.device.type == "cuda" else 0
        staging = streams * staging_bytes(self.request.chunk)
        return self.request.arena_bytes(free, self.index.in_host_memory_bytes, staging)

    def place(self, arena_bytes: int) -> Plan:
        """Return the plan with an arena of at most ``arena_bytes``, whether they are free or not.

        Raises:
            PlanError: as :meth:`plan`, but for host memory.
        """
        try:
            return self._place(self.request, arena_bytes)
        except PlanError as error:
            keep = self.request.keep
            if not isinstance(keep, Workload):
                raise
            would_fit = what_fits(lambda work: self._place(self.request.asking(work=work), arena_bytes), keep)
            raise PlanError(f"{error}{would_fit}") from None

    def alternative(self, budget: int, work: Workload, free: int) -> Plan:
        """Return what :meth:`plan` would for another budget (bytes) and generation.

        Raises:
            PlanError: one that cannot work.
        """
        asked = replace(self, request=self.request.asking(budget=budget, work=work))
        planned = asked._place(asked.request, asked.arena_bytes(free))
        self._require_host_memory(planned, free)
        return planned

    def on_disk(self) -> Opened:
        """Return a synthetic model as it will be once its checkpoint is written; any other as it is.

        Where in its file a tensor will be does not matter to a plan.
        """

        def written(entry: TensorEntry) -> TensorEntry:
            return replace(entry, source=FileSpan(Path(), 0)) if isinstance(entry.source, Seeded) else entry

        return replace(self, units=tuple(unit.with_entries(written) for unit in self.units))

    def _place(self, request: Request, arena_bytes: int) -> Plan:
        place = partial(
            place_on,
            request.device,
            budget=request.budget,
            workspace_bytes=workspace_of(self.index, request),
            host_bytes=arena_bytes,
            ring_bytes=request.ring,
            picked=picked_experts(getattr(self.index.model, "config", None)),
        )
        planned = place(self.units)
        if request.host is None:
            return planned
        rates = _host_rates(request.host, request.device)
        able = {unit.name: self.linear[unit.name] for unit in planned.at(Tier.PINNED) if unit.name in self.linear}
        # Raw units make the ring larger, at the most by as much as it has: that may push residents into the arena.
        room = arena_bytes - planned.pinned_bytes - planned.ring_bytes
        streamed = {unit.name for unit in planned.streamed}
        share = host_units(planned.units, streamed, able, rates, room, planned.ring_bytes)
        raw = share.units - share.coded_too
        units = [unit.raw() if unit.name in raw else unit for unit in self.units]
        made = place(units, host=share)
        return made if share.units or made.computed_experts else planned

    def _require_host_memory(self, planned: Plan, free: int) -> None:
        there = free + self.index.in_host_memory_bytes
        require_host_memory(planned, self.request.device, there, staging_bytes(self.request.chunk))


def plan(
    model: str | Path,
    *,
    budget: int | str,
    device: str | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    coding: Coding | None = None,
    experts: Experts = "routed",
    host_compute: bool = False,
    host_threads: int | None = None,
    gpus: int = 1,
) -> Plan:
    """Return the plan that :func:`djinn.load` would follow with the same arguments; loads no weights.

    What weights would come to if they were coded while they are loaded is estimated from the first MiB of each. With
    several ``gpus``, which need not be here, it is that of the first rank, which holds the most.

    Raises:
        ConfigError, CheckpointError, PlanError: as :func:`djinn.load`.
    """
    request = Request.of(
        budget=budget, device=device, ring=ring, host_memory=host_memory, dtype=dtype, coding=coding,
        experts=experts, keep=Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch),
        host_compute=host_compute, host_threads=host_threads,
    )  # fmt: skip
    return outlined(model, request, gpus).plan(usable_ram() // gpus)


def outlined(model: str | Path, request: Request, gpus: int = 1) -> Opened:
    """Open a model for planning alone: headers are read, and where weights would be coded, one MiB of each tensor.

    With several ``gpus`` it is what the first of as many ranks of this host would open.

    Raises:
        ConfigError, CheckpointError, UnavailableError: a model that cannot be had, is damaged, or cannot be split so.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ConfigError(f"gpus {gpus!r}: it is a whole number of at least 1")
    if gpus > 1:
        request.require_one_gpu()
    with ExitStack() as undo:
        reader = Reader(PAGE, threads=1)
        undo.callback(reader.close)
        config = undo.enter_context(pretended(gpus)) if gpus > 1 else None
        index = outline_of(model, undo.enter_context(spill_folder()), request.device, request.dtype)
        if config is not None:
            index = sharded(index, config)
        estimate = Coder(reader, torch.device("cpu")).estimate
        return opened(index, request.shared_by(gpus), estimate, experts_alike=True)


def opened(index: WeightIndex, request: Request, layout: LayoutOf, *, experts_alike: bool = False) -> Opened:
    """Return an index as an opened model: its tensors coded or raw as asked, raw in any case if it fits the budget.

    ``layout`` and ``experts_alike`` are as for :func:`djinn.weights.coding.coded`.
    """
    if request.host is not None and index.model.dtype != torch.bfloat16:
        raise ConfigError(
            f"host_compute: the cores multiply weights in torch.bfloat16, and this model's are {index.model.dtype}"
        )
    units = find_units(index)
    if request.experts == "routed":
        units = by_expert(units, index.model)
    fits = index.nbytes + workspace_of(index, request) <= request.budget
    is_packed = any(entry.is_packed for entry in index.tensors.values())
    if fits or request.coding == "none":
        units = [unit.raw() for unit in units]
    elif request.coding == "lossless" or is_packed:
        units = coded(units, layout, experts_alike=experts_alike)
    linear = linear_units(index.model, units) if request.host is not None else {}
    return Opened(index, request, tuple(units), linear)


def _host_rates(host: HostCompute, device: torch.device) -> HostRates:
    """Return the rates of link and cores that are known, or what is taken for them."""
    if host.rates is not None:
        return host.rates if host.threads is None else host.rates.with_threads(host.threads)
    here = gpus_here() if device.type == "cuda" else ()
    slot = here[device.index or 0].pcie_gbps if here else None
    threads = len(choose_cpus(host.threads, cpus_near(device)))
    return assumed_rates(threads, None if slot is None else 1e9 * SLOT_SHARE * slot)


def workspace_of(index: WeightIndex, request: Request) -> int:
    """Return the device memory to keep free of weights, bytes."""
    if isinstance(request.keep, Workload):
        config, dtype = index.model.config, index.model.dtype
        expert, picked = widest_experts(index.model), picked_experts(config)
        routed = routed_bytes(expert, picked, dtype, request.device, request.keep)
        needed = workspace_bytes(config, dtype, request.device, request.keep, routed, index.ranks)
    else:
        needed = request.keep + (CUDA_OVERHEAD_BYTES if request.device.type == "cuda" else 0)
    if index.sums and request.device.type == "cuda":
        needed += COLLECTIVES_BYTES
    return needed + index.kept_bytes
