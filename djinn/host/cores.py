"""Which processors multiply: as many as this process may use, less those that streaming and the user need."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from djinn.errors import ConfigError
from djinn.hardware import allowed_cpus, cgroup_cpus, cpu_list

KEPT = 2
"""Processors that are left alone: one for the threads that copy and read, one for the user."""
_CPUS = Path("/sys/devices/system/cpu")


def choose_cpus(threads: int | None = None, near: Collection[int] | None = None) -> tuple[int, ...]:
    """Return the processors that multiply, one for each thread; each is -1 where the system does not tell them apart.

    Args:
        threads: how many; by default all that there are but two, and one for each core.
        near: processors to choose from, such as those of the NUMA node where the weights lie; all if None.

    Raises:
        ConfigError: there are not as many, or ``threads`` is less than one.
    """
    allowed = allowed_cpus()
    quota = cgroup_cpus()
    if allowed is None:
        count = os.cpu_count() or 1
        cores = [[-1]] * count
    else:
        usable = allowed & set(near) if near is not None else allowed
        cores = siblings(usable or allowed)
    return choose(cores, quota, threads)


def choose(cores: Sequence[Sequence[int]], quota: float | None, threads: int | None) -> tuple[int, ...]:
    """Choose from ``cores``, the processors of each, so many that they fit the ``quota`` of processors. Pure.

    A core's second processor shares its path to memory, so second ones come last and only when they are asked for.

    Raises:
        ConfigError: as :func:`choose_cpus`.
    """
    longest = max(map(len, cores))
    in_turn = [core[place] for place in range(longest) for core in cores if place < len(core)]
    most = len(in_turn) if quota is None else max(1, min(len(in_turn), int(quota)))
    if threads is None:
        threads = max(1, min(len(cores), most - KEPT))
    if not 1 <= threads <= most:
        limit = "" if most == len(in_turn) else f", as its cgroup's quota of {quota:g} processors says"
        raise ConfigError(f"host_threads: {threads} is not between 1 and {most}, what this process may use{limit}")
    return tuple(in_turn[:threads])


def siblings(cpus: Collection[int], root: Path = _CPUS) -> list[list[int]]:
    """Group processors by the core that they are of; each is a core of its own where the system does not say."""
    groups: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            core = (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        groups.setdefault(core if cpu in cpu_list(core) else str(cpu), []).append(cpu)
    return list(groups.values())
