"""What limited a run: the shares of its time that link, disk, compute and host took. Pure."""

from __future__ import annotations

from djinn.planning.prediction import Limit
from djinn.transport.stats import Stats


def cpu_shares(stats: Stats, wall_s: float) -> dict[Limit, float]:
    """Return shares of ``wall_s`` on a CPU, where one thing is done at a time; they add up to 1.

    Compute waits for a unit that comes from the disk or over the link, as the timeline of a traced run says; hooks are
    the host's; the rest is compute.
    """
    waits: dict[Limit, float] = {"link": 0.0, "disk": 0.0}
    for interval in stats.timeline:
        if interval.lane == "stall":
            waits["disk" if interval.cause == "disk" else "link"] += interval.end_s - interval.start_s
    shares: dict[Limit, float] = {name: seconds / wall_s for name, seconds in waits.items()}
    shares["host"] = stats.hook_s / wall_s
    shares["compute"] = max(1 - sum(shares.values()), 0.0)
    return shares


def gpu_shares(stats: Stats, wall_s: float, *, ceiling: float, device_wait_s: float) -> dict[Limit, float]:
    """Return shares of ``wall_s`` on a GPU, where things are done at once, so that they may add up to more than 1.

    The link is busy while it carries bytes, at its measured ceiling (bytes/s). The host is busy whenever it does not
    wait for the device (``device_wait_s``), nor for what its cores multiply; its hooks wait for the disk where units
    come from there. What none of them accounts for is compute.
    """
    busy = 1 - device_wait_s / wall_s
    from_disk = min(stats.hook_s / wall_s, busy) if stats.disk_read_bytes else 0.0
    shares: dict[Limit, float] = {
        "link": min(stats.link_bytes / ceiling / wall_s, 1.0),
        "disk": from_disk,
        "host": max(busy - from_disk - stats.product_wait_s / wall_s, 0.0),
    }
    if stats.host_s:
        shares["cores"] = stats.host_s / wall_s
    shares["compute"] = max(1 - max(shares.values()), 0.0)
    return shares


def limit_of(shares: dict[Limit, float]) -> Limit:
    """Return what took the largest share."""
    return max(shares, key=lambda name: shares[name])
