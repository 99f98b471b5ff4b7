"""How fast a plan will be: its schedule of copies and compute, run on paper with a machine's measured rates. Pure.

Each visit of a unit takes three times. Its copy: the image's bytes over the disk's rate, over the link's, or one after
the other, each of which carries one unit at a time. Its compute: the weights' bytes over the rate at which this device
multiplies that many tokens by weights, and before that its decoding where it is coded. And the host's own time in its
module, more where it streams and where it is split over GPUs, which a GPU hides behind its compute and a processor
cannot; a pass begins with some more of it, and a call of ``generate`` with more again. A copy begins once
the visit that its slot waits for has been computed, as in the ring; compute begins once the copy has ended. On a CPU a
copy out of host memory is work for the cores that compute, so it adds.

A unit that the host's cores compute with (:mod:`djinn.planning.host`) is not copied in a decode step: everything else
that computes waits for its product, while copies go on, and while the host launches what comes behind it. While the
device waits for a copy the cores are idle, and the link carries what it carries alone. Of a layer's experts the cores
take a part, while others come.

What is not counted: the time between two passes, which prefetching hides. A rate that was not measured makes its part
free; :attr:`Prediction.blind` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from djinn.errors import UnavailableError
from djinn.planning.experts import LAYER_IDLE_S, mean_rate
from djinn.planning.host import RESUME_S
from djinn.planning.host_experts import mean_computed, whole_from
from djinn.planning.placement import Plan, Tier
from djinn.planning.rates import ComputeRate, Rates
from djinn.planning.work import Work

Limit = Literal["link", "disk", "compute", "host", "cores"]

DECODE_PASSES = 8
"""Passes over which the time per token is averaged: the first one starts with an empty ring."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted seconds. The five times are of one decode step, each as if it were alone."""

    ttft_s: float
    """From the call of ``generate`` with a cold ring to the first token."""
    token_s: float
    link_s: float
    disk_s: float
    compute_s: float
    host_s: float
    cores_s: float = 0.0
    """Of products that the host's cores compute."""
    batch: int
    hit_rate: float = 1.0
    """Of picked experts that decode finds in the pool, as it was taken to be; 1 where all are resident."""
    blind: tuple[str, ...]
    """What was taken to be free, because it was not measured."""

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, once the first token is there."""
        return self.batch / self.token_s if self.token_s else float("inf")

    @property
    def limit(self) -> Limit:
        """What takes longest in a decode step."""
        times: dict[Limit, float] = {
            "link": self.link_s,
            "disk": self.disk_s,
            "compute": self.compute_s,
            "host": self.host_s,
            "cores": self.cores_s,
        }
        return max(times, key=lambda name: times[name])


def predict(plan: Plan, rates: Rates, work: Work, hit_rate: float | None = None) -> Prediction:
    """Return how fast ``plan`` generates on a machine with these rates.

    ``hit_rate`` is the share of picked experts that decode finds in the pool, as far as the pool can hold as many; by
    default what routers give that pick evenly, with no locality: the share of all experts that the pool holds.
    Sequences pick independently of each other. A prefill finds none there.

    Raises:
        UnavailableError: the plan streams over a link or a disk whose rate is not known.
    """
    load = work.workload
    known = {"compute": rates.compute, "host": rates.module_s}
    if rates.device == "cpu" and work.head and load.prompt_tokens > 1:
        known["last token"] = rates.last_token
    if any(unit.coded for unit in plan.units):
        known["decoding"] = rates.decode
    if work.sums:
        known["sums over GPUs"] = rates.sum_s and rates.sum_rate
    peak = rates.compute[-1].rate * rates.compute[-1].tokens if rates.compute else float("inf")
    memory = rates.compute[0].rate if rates.compute else float("inf")
    tokens = load.prompt_tokens * load.batch
    prefill = _visits(plan, rates, work, tokens, work.attention_flops / peak + _sums_s(work, rates, tokens), 0.0)
    decode = _visits(
        plan, rates, work, load.batch, work.cache_bytes / memory + _sums_s(work, rates, load.batch), hit_rate
    )
    return Prediction(
        ttft_s=rates.call_s + _end(plan, [prefill]),
        token_s=_end(plan, [decode] * DECODE_PASSES) / DECODE_PASSES,
        link_s=sum(visit.link_s for visit in decode),
        disk_s=sum(visit.disk_s for visit in decode),
        compute_s=sum(visit.compute_s for visit in decode),
        host_s=sum(visit.host_s for visit in decode),
        cores_s=sum(visit.cores_s for visit in decode),
        batch=load.batch,
        hit_rate=_hits(plan, load.batch, hit_rate, whole=_is_whole(plan, rates, load.batch)),
        blind=tuple(name for name, rate in known.items() if not rate),
    )


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """One reading of a unit: seconds of each thing that it takes, as if it were alone."""

    disk_s: float
    link_s: float
    compute_s: float
    host_s: float
    cores_s: float = 0.0
    """Of a product that the host's cores compute in the place of a copy and the device's compute."""
    slot: int | None
    """Which slot of the ring the unit comes to; None where it comes to none."""
    asked: bool = False
    """Whether its copy begins only when compute has come to it: experts that a router has just picked."""
    in_order: bool
    """Whether link and host take the cores' time, as on a CPU."""
    ahead: bool = False
    """Whether the host runs ahead of the device, which waits for the cores of the host."""
    idle_share: float = 1.0
    """How long a copy takes while the cores are idle, as a share of what it takes beside busy ones."""

    @property
    def device_s(self) -> float:
        """How long the device is busy, and the host that asks it unless that runs ahead."""
        if self.in_order:
            return self.link_s + self.compute_s + self.host_s
        return self.compute_s if self.ahead else max(self.compute_s, self.host_s)


def _visits(plan: Plan, rates: Rates, work: Work, tokens: int, extra_s: float, hit_rate: float | None) -> list[_Visit]:
    """Return a pass's visits; ``tokens`` of all sequences go through it, ``extra_s`` is its compute beside weights."""
    pool = plan.pool
    is_whole = _is_whole(plan, rates, tokens)
    hits = _hits(plan, tokens, hit_rate, whole=is_whole)
    visits: list[_Visit] = []
    on_cpu = rates.device == "cpu"
    host = plan.host if plan.host is not None and tokens <= plan.host.rates.tokens else None
    computable = plan.computed_experts
    slots = iter(range(len(plan.slots)) if host is None else range(len(plan.streamed), len(plan.slots)))
    for unit, tier in zip(plan.units, plan.tiers, strict=True):
        rows = work.workload.batch if unit.name in work.head else tokens
        on_disk = tier is Tier.DISK
        compute_s = _multiply_s(unit.raw_bytes, rows, work.shares.get(unit.name, 1.0), rates.compute)
        if on_cpu and unit.name in work.head and rows < tokens and rates.last_token:
            compute_s = rows * unit.raw_bytes / rates.last_token
        product_s = host.product_s(unit) if host is not None else 0.0
        if unit.coded and rates.decode and not product_s:
            read = 1.0 if is_whole or not unit.experts else _touched(work.shares.get(unit.name, 1.0), tokens)
            compute_s += read * unit.raw_bytes / rates.decode
        nbytes = unit.image_bytes
        experts_s = 0.0
        if unit.experts and tier is not Tier.RESIDENT:
            picked = pool.widest if is_whole else pool.distinct(tokens)
            lacking, each = picked * (1 - hits), nbytes // pool.widest
            if host is not None and not is_whole and unit in computable:
                computed = min(mean_computed(lacking, each, host.rates), picked - 1)
                lacking -= computed
                experts_s = RESUME_S + host.rates.product_s(round(computed * each)) if computed > 0 else 0.0
            nbytes = round(lacking * each)
        host_s = rates.module_s + (0.0 if visits else rates.pass_s) + (rates.split_s if work.sums else 0.0)
        if tier is not Tier.RESIDENT or unit.coded:
            host_s += rates.unit_s
        link = host.rates.link if host is not None and (host.units or experts_s) else rates.link
        over_link = not product_s and (tier is Tier.PINNED or (on_disk and not on_cpu))
        visits.append(
            _Visit(
                disk_s=nbytes / _known("disk", rates.disk) if on_disk else 0.0,
                link_s=nbytes / _known("link", link) if over_link else 0.0,
                compute_s=0.0 if product_s else compute_s + extra_s * unit.raw_bytes / plan.model_bytes,
                host_s=host_s,
                cores_s=product_s + experts_s,
                slot=None if tier is Tier.RESIDENT or unit.experts or product_s else next(slots),
                asked=bool(unit.experts) and tier is not Tier.RESIDENT and not is_whole,
                in_order=on_cpu,
                ahead=host is not None and bool(host.units),
                idle_share=min(host.rates.link / host.rates.idle_link, 1.0) if host and host.units else 1.0,
            )
        )
    return visits


def _is_whole(plan: Plan, rates: Rates, tokens: int) -> bool:
    """Return whether a pass of ``tokens`` takes whole layers of experts."""
    first = whole_from(plan, _expert_rate(plan, rates)) if plan.routed else None
    return first is not None and tokens >= first


def _hits(plan: Plan, tokens: int, hit_rate: float | None, *, whole: bool) -> float:
    """Return the hit rate of a pass of ``tokens``: what is given, if the pool can hold as many; 1 without a pool."""
    if not plan.routed:
        return 1.0
    return min(plan.pool.share if hit_rate is None else hit_rate, plan.pool.most_hits(tokens, whole=whole))


def _sums_s(work: Work, rates: Rates, tokens: int) -> float:
    """Return the seconds in which GPUs add up what they have computed of ``tokens``; compute waits for that."""
    each = tokens * work.sum_bytes / rates.sum_rate if rates.sum_rate else 0.0
    return work.sums * (rates.sum_s + each)


def _multiply_s(nbytes: int, tokens: int, share: float, rates: Sequence[ComputeRate]) -> float:
    """Return the seconds in which ``tokens`` are each multiplied by a ``share`` of ``nbytes`` of weights.

    Between two measured points the time is linear in the tokens, as it is beyond the last one.
    """
    if not rates or not share:
        return 0.0
    touched = _touched(share, tokens)
    rows = tokens * share / touched
    points = [rate.tokens for rate in rates]
    per_byte = np.maximum.accumulate([1 / rate.rate for rate in rates])  # more tokens are never faster
    seconds = float(np.interp(rows, points, per_byte)) * max(rows / points[-1], 1.0)
    return nbytes * touched * seconds


def _touched(share: float, tokens: int) -> float:
    """Return the share of weights that ``tokens`` are multiplied by which each choose a ``share`` at random."""
    return 1 - (1 - share) ** tokens


def _end(plan: Plan, passes: Sequence[Sequence[_Visit]]) -> float:
    """Return when the last of ``passes`` ends, begun with an empty ring: copies and compute in their order."""
    disk_s = link_s = now_s = 0.0
    ended = [0.0] * len(plan.slots)  # when each streamed unit was last read
    before = [tuple(slot.sharing) for slot in plan.slots]
    for visits in passes:
        asked_s = now_s  # when the host has launched what it comes to; it waits for the last token
        for visit, tier, unit_of in zip(visits, plan.tiers, plan.units, strict=True):
            asked_s += visit.host_s
            if tier is not Tier.RESIDENT and unit_of.experts:
                # What a router picks is fetched when it is known; whole layers come while the one before is computed.
                begin = now_s if visit.asked else 0.0
                if visit.disk_s:
                    begin = disk_s = max(disk_s, begin) + visit.disk_s
                if visit.link_s and not visit.in_order:
                    begin = link_s = max(link_s, begin) + visit.link_s
                # The cores compute with their part of the experts while the others come.
                now_s = max(now_s + visit.cores_s, begin) + visit.device_s
                asked_s = max(asked_s, now_s) if visit.asked else asked_s  # the host waits for a router's answer
                now_s += LAYER_IDLE_S if visit.asked and not visit.in_order else 0.0
                continue
            if visit.slot is not None:
                free_s = max(ended[other] for other in before[visit.slot])
                if visit.disk_s:
                    # For a GPU the host asks ahead of time, into buffers of its own: a read waits for no slot.
                    disk_s = (max(disk_s, free_s) if visit.in_order else disk_s) + visit.disk_s
                    free_s = max(disk_s, free_s)
                if visit.link_s and not visit.in_order:
                    begin = max(link_s, free_s)
                    idle_s = max(now_s, begin)  # from when the device, and with it the cores, wait for this copy
                    end_s = begin + visit.link_s
                    free_s = link_s = end_s if end_s <= idle_s else idle_s + visit.idle_share * (end_s - idle_s)
                now_s = max(now_s, free_s)
            if visit.ahead:
                now_s = max(now_s, asked_s)
            now_s += visit.cores_s + visit.device_s
            if visit.slot is not None:
                ended[visit.slot] = now_s
    return now_s


def _expert_rate(plan: Plan, rates: Rates) -> float:
    """Return how fast experts come into the pool, those of all layers together: from disk, or over the link."""
    by_tier = {
        tier: sum(unit.weight_bytes for unit in plan.at(tier) if unit.experts) for tier in (Tier.DISK, Tier.PINNED)
    }
    known = {Tier.DISK: ("disk", rates.disk), Tier.PINNED: ("link", rates.link)}
    return mean_rate([(nbytes, _known(*known[tier])) for tier, nbytes in by_tier.items() if nbytes])


def _known(what: str, rate: float | None) -> float:
    if rate is None:
        raise UnavailableError(f"the plan streams over the {what}, whose rate has not been measured")
    return rate
