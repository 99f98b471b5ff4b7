"""Of the experts that a layer's pool lacks, how many the host's cores compute with while the others come. Pure."""

from __future__ import annotations

from djinn.planning.experts import HOST_S
from djinn.planning.host import RESUME_S, HostRates
from djinn.planning.placement import Plan


def whole_from(plan: Plan, link: float) -> int | None:
    """Return from how many tokens on a pass takes whole layers of experts, which come at ``link`` bytes/s; None: never.

    In a pass of fewer tokens the cores take a part of the experts, which makes it the faster one.
    """
    found = plan.pool.whole_from(link)
    if found is None or plan.host is None or not plan.computed_experts:
        return found
    return max(found, plan.host.rates.tokens + 1)


def misses_to_compute(lacking: int, nbytes: int, rates: HostRates) -> int:
    """Return how many of the experts that a layer's pool is ``lacking`` the cores compute with; others cross the link.

    Both begin at once. The host waits for the cores, and still has to launch what a layer computes when they are done;
    if the copies take no longer than that, the cores would only hold it up. ``nbytes`` are one expert's, raw.
    """

    def seconds(computed: int) -> float:
        if not computed:
            return max(lacking * nbytes / rates.idle_link, HOST_S)
        cores_s = rates.wait_s + RESUME_S + computed * nbytes / rates.cores
        return max((lacking - computed) * nbytes / rates.link, cores_s + HOST_S)

    return min(range(lacking + 1), key=seconds)


def mean_computed(lacking: float, nbytes: int, rates: HostRates) -> float:
    """Return :func:`misses_to_compute` on average over layers that lack ``lacking`` experts on average."""
    few, rest = int(lacking), lacking % 1
    by_count = (misses_to_compute(count, nbytes, rates) for count in (few, few + 1))
    return (1 - rest) * next(by_count) + (rest * next(by_count) if rest else 0.0)
