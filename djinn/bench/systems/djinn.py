"""djinn itself."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import djinn
from djinn.bench.machines import host_rates_here
from djinn.bench.rates.link import pinned_h2d_rate
from djinn.bench.systems.base import Job, System
from djinn.engine.load import engine_of, load_requested, placement
from djinn.errors import UnavailableError
from djinn.planning.host import HostCompute
from djinn.planning.placement import Plan
from djinn.profiles import HOST_COMPUTE
from djinn.transport.stats import Interval
from djinn.weights.tensors import kind_of

EXPERTS = ("expert_hits", "expert_misses", "routed_layers", "whole_layers", "index_wait_s")
"""The statistics of experts that a record has."""


def bits_by_kind(plan: Plan) -> dict[str, float]:
    """Return the bits that coded tensors take for every 16 of theirs, by kind of tensor (``q_proj``)."""
    sizes: dict[str, tuple[int, int]] = {}
    for unit in plan.units:
        for tensor in unit.tensors:
            if tensor.entry.layout is not None:
                raw, stored = sizes.get(kind_of(tensor.name), (0, 0))
                sizes[kind_of(tensor.name)] = raw + tensor.entry.raw_bytes, stored + tensor.entry.nbytes
    return {kind: 16 * stored / raw for kind, (raw, stored) in sizes.items()}


class Djinn(System):
    """A streaming model; what it moved and when is what :func:`djinn.stats` says."""

    def __init__(self, job: Job) -> None:
        profile = job.profile
        link = pinned_h2d_rate(profile.chunk) if job.on_gpu else 0.0  # before it carries anything else
        request = profile.request()
        if job.variant == "whole":
            request = replace(request, experts="whole")
        if _host_computes(job):
            request = replace(request, host=HostCompute(rates=host_rates_here()))
        self.model = load_requested(
            job.model, request, distributed_config=job.distributed_config, seed=profile.seed, trace=job.trace
        )
        stats = djinn.stats(self.model)
        self.resident_bytes = stats.resident_bytes
        self.ring_bytes = stats.ring_bytes
        self.host_bytes = stats.host_bytes
        self.settings = {
            "host_bytes": stats.host_bytes,
            "disk_bytes": stats.disk_bytes,
            "host_memory": profile.host_memory,
            "chunk": profile.chunk,
            "page_locked": stats.page_locked,
        }
        self.settings |= {f"bits {kind}": bits for kind, bits in bits_by_kind(placement(self.model)).items()}
        if job.on_gpu:
            self.settings["planned_pass_s"] = (stats.host_bytes + stats.disk_bytes) / link
        self.settings |= _host_settings(self.model)
        self._pool = pool = placement(self.model).pool
        if pool.slots:
            self.settings |= {"pool_slots": pool.slots, "pool_experts": pool.experts, "slot_bytes": pool.slot_bytes}
        self._began_at = 0
        self._on_gpu = job.on_gpu

    def link_bytes(self) -> int:
        """Return the bytes that crossed the link since loading: into the ring on a GPU, from disk on a CPU."""
        stats = djinn.stats(self.model)
        return stats.link_bytes if self._on_gpu else stats.disk_read_bytes

    def cool(self) -> None:
        """Empty the ring."""
        djinn.cool(self.model)

    def begin(self) -> None:
        """Begin a run, cold, and a timeline of its own."""
        super().begin()
        self._began_at = len(djinn.stats(self.model).timeline)

    def stall_s(self) -> float | None:
        """Return the seconds of stalls since loading; on a GPU only a traced model knows them."""
        stats = djinn.stats(self.model)
        return None if self._on_gpu and not stats.traced else stats.stall_s

    def bare_gbps(self) -> float | None:
        """Return the rate of bare copies of what streams; on a CPU there is no such link."""
        rate = engine_of(self.model).copier.bare_rate()
        return None if rate is None else rate / 1e9

    def experts(self) -> dict[str, float]:
        """Return the counts of experts since loading; nothing where the plan has no pool for them."""
        stats = djinn.stats(self.model)
        return {name: getattr(stats, name) for name in EXPERTS} if self._pool.slots else {}

    def timeline(self) -> list[Interval]:
        """Return the copy engine's intervals since the run began."""
        return djinn.stats(self.model).timeline[self._began_at :]


def _host_computes(job: Job) -> bool:
    return f"djinn:{job.variant}" in HOST_COMPUTE


def _host_settings(model: nn.Module) -> dict[str, int | float | str | bool]:
    """Return what a record says of the host's cores; nothing where they do not compute."""
    host, share = engine_of(model).host, placement(model).host
    if host is None or share is None:
        return {}
    return {
        "host_kernel": host.products.name,
        "host_threads": host.products.threads,
        "host_units": len(share.units),
        "host_link_gbps": share.rates.link / 1e9,
        "host_cores_gbps": share.rates.cores / 1e9,
        "host_rates_assumed": share.rates.assumed,
    }


def check(job: Job) -> None:
    """Nothing to build; the plan itself refuses what cannot work.

    Raises:
        UnavailableError: the host's cores are to compute for a device that they are, or for several.
    """
    profile = job.profile
    if _host_computes(job) and (not job.on_gpu or profile.gpus > 1 or profile.dtype != "bfloat16"):
        raise UnavailableError(
            f"the host's cores compute beside one GPU, with weights in bfloat16; the profile has device "
            f"{profile.device}, gpus {profile.gpus} and dtype {profile.dtype}"
        )


def load(job: Job) -> Djinn:
    """Load the model, streaming."""
    return Djinn(job)
