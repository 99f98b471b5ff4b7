"""The stall report: what limits, and every number where it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from djinn.errors import ConfigError
from djinn.figures.stalls import stall_report
from djinn.transport.stats import Interval, Stats

TRACED = Stats(
    model_bytes=10**10, resident_bytes=2 * 10**9, ring_bytes=10**9, host_bytes=6 * 10**9, disk_bytes=2 * 10**9,
    traced=True, link_bytes=16 * 10**9, disk_read_bytes=4 * 10**9, passes=2, reloads=1, skips=2,
)  # fmt: skip


def timeline(*stalls: tuple[float, str]) -> list[Interval]:
    """One second of compute, then each stall."""
    found, now = [Interval("compute", "a", 5.0, 6.0)], 6.0
    for seconds, cause in stalls:
        found.append(Interval("stall", "a", now, now + seconds, cause=cause))
        now += seconds
    return found


@pytest.mark.parametrize(
    ("stalls", "limit", "remedy"),
    [
        ([(2.0, "disk"), (1.0, "link")], "the disk", "host_memory"),
        ([(1.0, "disk"), (2.0, "link")], "copies from host memory", "coding='lossless'"),
        ([(0.2, "disk"), (0.2, "link")], "compute", "a faster link would change little"),
        ([], "compute", "a faster link"),
    ],
)
def test_what_was_waited_for_most_of_the_time_is_the_limit(stalls, limit: str, remedy: str):
    stats = replace(TRACED, timeline=timeline(*stalls))
    table = stall_report(stats, 4.0, "pcie", 5.0)
    assert table.loc["what limits", "value"] == limit
    assert remedy in table.loc["what limits", "how to read it"]


def test_the_numbers():
    value = stall_report(replace(TRACED, timeline=timeline((1.0, "disk"))), 4.0, "pcie", 5.0)["value"]
    assert (value["pcie, GB/s"], value["of the ceiling"]) == ("4", "80%")
    assert (value["computing"], value["waiting for the disk"]) == ("50%", "1 s")
    assert (value["waiting for copies from host memory"], value["out of order"]) == ("0 s", "3")
    # On a CPU only what was read crosses the link.
    value = stall_report(replace(TRACED, timeline=timeline()), 4.0, "disk", 2.0)["value"]
    assert (value["disk, GB/s"], value["of the ceiling"]) == ("1", "50%")


def test_without_a_timeline_it_says_what_to_do():
    for stats in (TRACED, replace(TRACED, traced=False, timeline=timeline())):
        with pytest.raises(ConfigError, match="trace=True"):
            stall_report(stats, 1.0, "disk", 1.0)
