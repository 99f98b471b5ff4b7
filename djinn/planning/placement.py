"""The plan: which units stay on the device, which wait in pinned host memory, which on disk, and how large the ring is.

Pure: sizes in, placement out (how fast that is, :mod:`djinn.planning.prediction` says); refused here is whatever could
not work, before a byte is allocated. Within the budget the ring comes first, as small as still overlaps, because a byte
of ring above that buys nothing while a resident byte never crosses the link again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch

from djinn.errors import PlanError
from djinn.planning.choice import names_of, singular, spread, total_bytes, with_companions
from djinn.planning.experts import NO_POOL, Pool, pool_for
from djinn.planning.host import HostShare, raw_copy
from djinn.planning.ring import Slot, default_ring_bytes, ring_floor, schedule
from djinn.planning.room import require_room
from djinn.planning.table import table_of
from djinn.sizes import format_bytes
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit

TINY_SHARE = 0.01
"""Units below this share of the largest one (norms, lone biases) stay: a copy of their own costs more than it moves."""


class Tier(StrEnum):
    """Where a unit lives."""

    RESIDENT = "resident"
    PINNED = "pinned"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placement of every unit, in execution order. Sizes are bytes."""

    units: tuple[Unit, ...]
    tiers: tuple[Tier, ...]
    slots: tuple[Slot, ...]
    """Ring slots of the visits."""
    budget: int
    ring_bytes: int
    workspace_bytes: int
    """Device memory kept for KV cache and activations."""
    scratch_bytes: int
    """Device memory that coded units are decoded into, one at a time."""
    pool: Pool = NO_POOL
    """Where the experts are that routers have picked."""
    host: HostShare | None = None
    """Which of the units in host memory its cores compute with, in passes of few tokens."""
    model_bytes: int

    @property
    def away(self) -> tuple[Unit, ...]:
        """The units that are not resident, in order."""
        return tuple(unit for unit, tier in zip(self.units, self.tiers, strict=True) if tier is not Tier.RESIDENT)

    @property
    def streamed(self) -> tuple[Unit, ...]:
        """The units that cross the link in every pass, in order."""
        return tuple(unit for unit in self.away if not unit.experts)

    @property
    def second(self) -> tuple[Unit, ...]:
        """The units that cross the link in a pass of few tokens, in order, where the host computes with others."""
        if self.host is None:
            return ()
        return tuple(unit for unit in self.streamed if unit.name not in self.host.units)

    @property
    def raw_copies(self) -> tuple[Unit, ...]:
        """What the cores compute with of host units that also wait coded; in host memory, beside these."""
        if self.host is None:
            return ()
        return tuple(raw_copy(unit) for unit in self.streamed if unit.name in self.host.coded_too)

    @property
    def visits(self) -> tuple[Unit, ...]:
        """The units of both orders, the first before the second."""
        return self.streamed + self.second

    @property
    def computed_experts(self) -> tuple[Unit, ...]:
        """The units with experts that the cores can compute with, in passes of few tokens: raw, in host memory."""
        if self.host is None:
            return ()
        return tuple(unit for unit in self.at(Tier.PINNED) if unit.experts and not unit.coded)

    @property
    def routed(self) -> tuple[Unit, ...]:
        """The units of which passes fetch the experts that routers pick, in order."""
        return tuple(unit for unit in self.away if unit.experts)

    def at(self, tier: Tier) -> tuple[Unit, ...]:
        """The units of one tier, in order."""
        return tuple(unit for unit, place in zip(self.units, self.tiers, strict=True) if place is tier)

    @property
    def resident_bytes(self) -> int:
        """Device memory of the residents."""
        return self._bytes(Tier.RESIDENT)

    @property
    def pinned_bytes(self) -> int:
        """Size of the arena."""
        return self._bytes(Tier.PINNED) + total_bytes(self.raw_copies)

    @property
    def disk_bytes(self) -> int:
        """Bytes of weights that are read from disk, in every pass or when a router picks them."""
        return self._bytes(Tier.DISK)

    @property
    def disk_streams(self) -> int:
        """How many streams from disk there are: one for the ring, one for the pool."""
        return len({bool(unit.experts) for unit in self.at(Tier.DISK)})

    @property
    def device_bytes(self) -> int:
        """Device memory in all."""
        return self.resident_bytes + self.ring_bytes + self.scratch_bytes + self.pool.nbytes + self.workspace_bytes

    @property
    def oversubscription(self) -> float:
        """Model bytes ÷ budget."""
        return self.model_bytes / self.budget

    @property
    def is_coded(self) -> bool:
        """Whether any unit is coded."""
        return any(unit.coded for unit in self.units)

    def table(self) -> str:
        """Return the plan for people: a line per place."""
        return table_of(self)

    def _bytes(self, tier: Tier) -> int:
        return sum(unit.image_bytes for unit in self.at(tier))


def place_on(
    device: torch.device,
    units: Sequence[Unit],
    *,
    budget: int,
    workspace_bytes: int,
    host_bytes: int,
    ring_bytes: int | None,
    picked: int = 1,
    host: HostShare | None = None,
) -> Plan:
    """Place ``units`` with the default ring that suits a kind of device; otherwise as :func:`make_plan`."""
    make = partial(
        make_plan, units, budget=budget, workspace_bytes=workspace_bytes, host_bytes=host_bytes, ring_bytes=ring_bytes,
        picked=picked, host=host,
    )  # fmt: skip
    if device.type == "cpu":
        made = make()
        if not made.disk_bytes:  # copies out of host memory cost the cores as much, however far ahead they are made
            return made
    return make(ring_floor=ring_floor(budget))


def make_plan(
    units: Sequence[Unit],
    *,
    budget: int,
    workspace_bytes: int,
    host_bytes: int,
    ring_bytes: int | None = None,
    ring_floor: int = 0,
    picked: int = 1,
    host: HostShare | None = None,
) -> Plan:
    """Place ``units``; see the module's text.

    Args:
        units: in execution order.
        budget: device memory in all, bytes.
        workspace_bytes: what KV cache, activations and scratch need of it.
        host_bytes: the largest arena.
        ring_bytes: ring size; by default three of the largest streamed unit.
        ring_floor: what the default ring is made at least, if the streamed units are more than that.
        picked: experts that a router picks for a token, where units have experts.
        host: names units that wait in host memory in any case, for its cores to compute with; some of them twice.

    Raises:
        PlanError: a unit larger than the ring, or a budget or host memory too small; says what would do.
    """
    whole = [unit.whole() for unit in units]
    if total_bytes(whole) + _scratch(whole) + workspace_bytes <= budget:  # then there is no need of a ring and a pool
        units = whole
    routed = [unit for unit in units if unit.experts]
    dense = [unit for unit in units if not unit.experts]
    floor = pool_for(routed, picked, 0)
    scratch = _scratch(dense)
    fixed = workspace_bytes + scratch + floor.nbytes
    all_fit = total_bytes(dense) + fixed <= budget
    tiny = TINY_SHARE * max((unit.weight_bytes for unit in dense), default=0)
    must_stay = [unit for unit in dense if all_fit or unit.held or unit.weight_bytes < tiny]
    must_stay = with_companions(dense, names_of(must_stay))
    chosen = names_of(must_stay)
    streamable = [unit for unit in dense if unit.name not in chosen]
    fixed += total_bytes(must_stay)

    def ring_without(unit: Unit) -> int:
        others = (other for other in streamable if other.name not in chosen and other is not unit)
        return ring_bytes or _default_ring(others, ring_floor)

    computed, coded_too = (host.units, host.coded_too) if host is not None else (frozenset(), frozenset())
    host_bytes -= total_bytes(raw_copy(unit) for unit in units if unit.name in coded_too)
    waiting = [unit for unit in singular(streamable) if unit.name not in computed]
    while waiting:
        fits = [unit for unit in waiting if fixed + unit.image_bytes + ring_without(unit) <= budget]
        if not fits:
            break
        chosen.add(fits[0].name)
        fixed += fits[0].image_bytes
        waiting.remove(fits[0])
    rest = [unit for unit in dense if unit.name not in chosen]
    ring = ring_bytes or min(_default_ring(rest, ring_floor), max(budget - fixed, 0))
    require_room(rest, ring, ring_bytes, fixed, budget, workspace_bytes + scratch, floor)
    chosen |= spread(rest, budget - fixed - ring, computed)
    streamed = [unit for unit in dense if unit.name not in chosen]
    ring = ring // PAGE * PAGE if streamed else 0
    used = total_bytes(unit for unit in dense if unit.name in chosen) + workspace_bytes + scratch + ring
    pool = pool_for(routed, picked, budget - used)
    away = [unit for unit in units if unit.name not in chosen]
    made = [unit for unit in away if not unit.on_disk or unit.name in computed]
    if total_bytes(made) > host_bytes:
        raise PlanError(
            "host memory: streamed weights that are made, converted or coded in memory have no disk tier and need "
            f"{format_bytes(total_bytes(made))}, but {format_bytes(host_bytes)} are allowed; raise host_memory or "
            "budget"
        )
    # What is read in every pass waits in host memory before what a router may pick.
    filed = [unit for unit in streamed if unit.on_disk and unit.name not in computed]
    pinned = names_of(made) | spread(filed, host_bytes - total_bytes(made))
    room = host_bytes - total_bytes(unit for unit in away if unit.name in pinned)
    pinned |= spread([unit for unit in routed if unit.on_disk], room)

    def tier(unit: Unit) -> Tier:
        if unit.name in chosen:
            return Tier.RESIDENT
        return Tier.PINNED if unit.name in pinned else Tier.DISK

    second = [unit for unit in streamed if unit.name not in computed] if host is not None else []
    return Plan(
        units=tuple(units),
        tiers=tuple(map(tier, units)),
        slots=tuple(schedule(_sizes(streamed), ring, _sizes(second))),
        budget=budget,
        ring_bytes=ring,
        workspace_bytes=workspace_bytes,
        scratch_bytes=scratch,
        pool=pool,
        host=None if host is None else replace(host, units=computed & names_of(streamed)),
        model_bytes=sum(unit.raw_bytes for unit in units),
    )


def _default_ring(units: Iterable[Unit], floor: int) -> int:
    return default_ring_bytes(_sizes(units), floor)


def _sizes(units: Iterable[Unit]) -> list[int]:
    return [unit.image_bytes for unit in units]


def _scratch(units: Iterable[Unit]) -> int:
    return max((unit.decoded_bytes for unit in units), default=0)
