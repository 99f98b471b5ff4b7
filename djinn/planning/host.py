"""Which units the host's cores compute with where they lie, so that link and cores are done at once. Pure.

At few tokens a pass reads every weight once and computes little. The link is one way to read what is not on the device;
the host's cores, which sit beside the weights, are another. A **host unit** is not copied in such a pass: its module's
inputs go to the host, and what the cores have computed comes back. Sums are then made in another order than on the
device, so outputs are close to the resident model's and not equal to them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from djinn.weights.tensors import InMemory
from djinn.weights.units import Unit

ASSUMED_LINK = 48e9
"""Bytes/s that are taken for those of a link of which nothing is known: of a PCIe Gen5 x16 slot beside busy cores."""
BUSY_SHARE = 0.94
"""What is left of a link's own rate beside busy cores: 49 of 52 GB/s, on hosts of 16 cores with an H100."""
ASSUMED_CORE = 3.5e9
CORE_MOST = 11.2e9
ASSUMED_CORES = 50e9
"""Bytes/s of weights that one core multiplies while all do, the most that one does while few do, and of all together.
On one host with an H100 8 cores had 90, and 14 had 107 beside a busy link; on others 16 had 48 to 66."""


ASSUMED_MODULE_S = 150e-6
"""Seconds in which those hosts launched what a module computes."""
ASSUMED_TRIP_S = 270e-6
"""Seconds of a queued product with hardly any weights, while the link was busy: its inputs' way to the host, its
outputs' way back. 254 and 282 us on one of those hosts (data/benchmarks/host_ahead_h100_2026-11-28)."""
RESUME_S = 0.75e-3
"""Seconds that the host takes longer for what it does after a product, if it waits for that: the weights have taken the
place of all else in its caches. About 0.5 to 1 ms a product were lost so in six loads on two of those hosts."""
ASSUMED_TOKENS = 4
"""Up to how many tokens a product took those hosts at most 1.3x as long as with one: 8 on one of three, else 4."""


@dataclass(frozen=True, kw_only=True)
class HostRates:
    """How fast weights are read while link and cores are both busy, each of which slows the other."""

    link: float
    """Bytes/s over the link."""
    cores: float
    """Bytes/s of weights that the cores multiply."""
    alone: float | None = None
    """Bytes/s over the link while the cores are idle; None where nobody knows: then as beside busy ones."""
    wait_s: float = ASSUMED_TRIP_S
    """Seconds that a product takes beside the multiplication: a round trip of inputs and outputs."""
    device: float | None = None
    """Bytes/s of weights that the device multiplies by one token; None where nobody knows: then it takes no time."""
    module_s: float = 0.0
    """Seconds in which the host launches what a module computes, while the cores and the device go on."""
    tokens: int = 16
    """The most tokens of a pass in which the cores compute: with more, a product takes much longer than with one."""
    threads: int | None = None
    """How many multiplied when this was measured; None where that is not known."""
    assumed: bool = False
    """Whether nobody has measured them on this machine."""

    @property
    def idle_link(self) -> float:
        """Bytes/s over the link while the cores are idle."""
        return self.alone or self.link

    def product_s(self, nbytes: int, *, joined: bool = False) -> float:
        """Return the seconds of a product with ``nbytes`` of weights, or those that ``joined`` ones make it longer."""
        return (0.0 if joined else self.wait_s) + nbytes / self.cores

    def with_threads(self, threads: int) -> HostRates:
        """Return the rates where only so many threads multiply; nothing is lost by as many as were measured."""
        if self.threads is not None and threads >= self.threads:
            return self
        return replace(self, cores=min(self.cores, threads * CORE_MOST))


def assumed_rates(threads: int, link: float | None = None, device: float | None = None) -> HostRates:
    """Return what is taken for the rates of a machine on which they have not been measured.

    ``link`` is what its link carries while the cores are idle, bytes/s, and ``device`` as in :class:`HostRates`, where
    these are known.
    """
    alone = ASSUMED_LINK / BUSY_SHARE if link is None else link
    return HostRates(
        link=BUSY_SHARE * alone,
        alone=alone,
        cores=min(threads * ASSUMED_CORE, ASSUMED_CORES),
        device=device,
        module_s=ASSUMED_MODULE_S,
        tokens=ASSUMED_TOKENS,
        assumed=True,
    )


@dataclass(frozen=True, kw_only=True)
class HostCompute:
    """What a user asks of the host's cores."""

    threads: int | None = None
    """How many compute; None for as many as can be spared."""
    rates: HostRates | None = None
    """What is known of the machine."""


@dataclass(frozen=True, kw_only=True)
class HostShare:
    """The host units of a plan, by name, and the rates that they were chosen for."""

    units: frozenset[str]
    rates: HostRates
    joined: frozenset[str] = frozenset()
    """Those that read the same inputs as one before them, and are computed in the same product."""
    coded_too: frozenset[str] = frozenset()
    """Those that also wait coded, as passes of many tokens stream them; the others wait raw alone."""

    def product_s(self, unit: Unit) -> float:
        """Return the seconds that a product takes longer for ``unit``; none where it is not one of these."""
        if unit.name not in self.units:
            return 0.0
        return self.rates.product_s(unit.raw_bytes, joined=unit.name in self.joined)


def raw_copy(unit: Unit) -> Unit:
    """Return what the cores compute with of a host unit that also waits coded, as a unit with a name of its own."""
    return replace(unit.raw(), name=f"{unit.name} (raw)")


def host_units(
    units: Sequence[Unit],
    streamed: Collection[str],
    able: Mapping[str, str],
    rates: HostRates,
    room_bytes: int,
    ring_bytes: int,
) -> HostShare:
    """Return which units become host units, of those that the host is ``able`` to compute with.

    Few large products lose less time than many small ones. So of all least sizes that a host unit may have, the one is
    taken with which a pass ends first (:func:`taken_in_turn`). None is a host unit if the link alone is as fast. The
    cores need weights raw. Where there is room beside that, passes of many tokens stream coded ones all the same.

    Args:
        units: all of them, in order.
        streamed: names of those that cross the link.
        able: names of those that the host can compute with, and for each what names its inputs.
        room_bytes: how much the arena may grow by: the cores need weights raw, and the link may carry them coded.
        ring_bytes: size of the ring.
    """
    alone_s = sum(unit.weight_bytes for unit in units if unit.name in streamed) / rates.idle_link
    sizes = {unit.name: unit.raw_bytes for unit in units if unit.name in able and unit.name in streamed}
    best, best_s = HostShare(units=frozenset(), rates=rates), alone_s
    for least in sorted(set(sizes.values())):
        large = {name: able[name] for name, nbytes in sizes.items() if nbytes >= least}
        share, seconds = taken_in_turn(units, streamed, large, rates, room_bytes, ring_bytes)
        if seconds < best_s:
            best, best_s = share, seconds
    coded = [unit for unit in units if unit.name in best.units and unit.coded]
    room_bytes -= sum(unit.raw().image_bytes - unit.image_bytes for unit in coded)
    ends = accumulate(unit.image_bytes for unit in coded)
    fit = (unit.name for unit, end in zip(coded, ends, strict=True) if end <= room_bytes and not _in_memory(unit))
    return replace(best, coded_too=frozenset(fit))


def taken_in_turn(
    units: Sequence[Unit],
    streamed: Collection[str],
    able: Mapping[str, str],
    rates: HostRates,
    room_bytes: int,
    ring_bytes: int,
) -> tuple[HostShare, float]:
    """Return what the cores take of a pass in which they take all that they can, and the seconds of that pass.

    Each unit that streams goes, in order, to whichever of link and cores will be done with it first, after all that it
    has been given before. So both are done at about the same time, at the end as at any point before it. One that reads
    the same inputs as one that the cores have goes to them as well: it costs them no product of its own. While the
    device computes the cores wait and the link does not. While the cores compute, the link fills the ring: a product
    that takes longer than that would leave it idle, and is not made. The host launches all of it meanwhile.
    """
    chosen, joined, read = set[str](), set[str](), set[str]()
    link_s = cores_s = 0.0
    ahead_s = 0.0  # what the ring holds that the device has still to compute with, in seconds of copies
    ring_s = ring_bytes / rates.link
    for unit in units:
        computed_s = cores_s + (unit.raw_bytes / rates.device if rates.device else 0.0)
        if unit.name not in streamed:
            cores_s = computed_s
            continue
        joins = able.get(unit.name) in read
        copy_s, product_s = unit.weight_bytes / rates.link, rates.product_s(unit.raw_bytes, joined=joins)
        copied_s, multiplied_s = link_s + copy_s, cores_s + product_s
        may = unit.name in able and (joins or multiplied_s < copied_s) and ahead_s + product_s <= ring_s
        growth = unit.raw().image_bytes - unit.image_bytes if may and unit.coded else 0
        if may and growth <= max(room_bytes, 0):
            chosen.add(unit.name)
            read.add(able[unit.name])
            if joins:
                joined.add(unit.name)
            cores_s = multiplied_s
            ahead_s += product_s
            room_bytes -= growth
        else:
            link_s, cores_s = copied_s, computed_s
            ahead_s = max(ahead_s - copy_s, 0.0)
    share = HostShare(units=frozenset(chosen), rates=rates, joined=frozenset(joined))
    return share, max(link_s, cores_s, len(units) * rates.module_s)


def _in_memory(unit: Unit) -> bool:
    """Return whether weights move from where the model has them, so that they cannot be taken from there twice."""
    return any(isinstance(tensor.entry.raw.source, InMemory) for tensor in unit.tensors)
