"""What limited a run, from invented totals: each cause is named where it is the one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.bench.limits import cpu_shares, gpu_shares, limit_of
from djinn.planning.prediction import Limit
from djinn.transport.stats import Interval, Stats


def totals(**changes: float) -> Stats:
    made = Stats(model_bytes=100, resident_bytes=0, ring_bytes=30, host_bytes=50, disk_bytes=50, traced=True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def stalled(**causes: float) -> Stats:
    made = totals()
    for cause, seconds in causes.items():
        made.add(Interval("stall", "unit", 1.0, 1.0 + seconds, 10, cause))
        made.add(Interval("copy", "unit", 0.0, 9.0, 10))
    return made


@pytest.mark.parametrize(
    ("stats", "limit", "share"),
    [
        (stalled(disk=6.0, link=1.0), "disk", 0.6),
        (stalled(disk=1.0, link=7.0), "link", 0.7),
        (stalled(disk=1.0), "compute", 0.9),
        (totals(hook_s=8.0), "host", 0.8),
    ],
)
def test_a_cpu_waits_computes_or_minds_its_hooks(stats: Stats, limit: Limit, share: float) -> None:
    shares = cpu_shares(stats, 10.0)
    assert limit_of(shares) == limit
    assert shares[limit] == pytest.approx(share)


@pytest.mark.parametrize(
    ("stats", "device_wait_s", "limit", "share"),
    [
        (totals(link_bytes=9.5e9), 9.0, "link", 0.95),
        (totals(link_bytes=2e9), 9.0, "compute", 0.8),
        (totals(link_bytes=2e9, hook_s=0.5), 0.5, "host", 0.95),
        (totals(link_bytes=3e9, hook_s=7.0, disk_read_bytes=2e9), 2.0, "disk", 0.7),
        (totals(), 9.9, "compute", 0.99),
        (totals(link_bytes=2e9, host_s=8.0, product_wait_s=9.0), 0.5, "cores", 0.8),
        (totals(link_bytes=2e9, host_s=8.0), 0.5, "host", 0.95),  # queued: it launches beside them
    ],
)
def test_a_gpu_is_judged_by_its_link_and_by_who_waits(
    stats: Stats, device_wait_s: float, limit: Limit, share: float
) -> None:
    shares = gpu_shares(stats, 10.0, ceiling=1e9, device_wait_s=device_wait_s)
    assert limit_of(shares) == limit
    assert shares[limit] == pytest.approx(share)


@given(st.floats(0, 1e12), st.floats(0, 10), st.floats(0, 10), st.sampled_from([0, 10**9]))
def test_shares_are_shares(link_bytes: float, hook_s: float, device_wait_s: float, from_disk: int) -> None:
    stats = totals(link_bytes=link_bytes, hook_s=hook_s, disk_read_bytes=from_disk)
    shares = gpu_shares(stats, 10.0, ceiling=1e9, device_wait_s=device_wait_s)
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(cpu_shares(stats, 10.0).values()) == pytest.approx(max(1.0, hook_s / 10.0))
