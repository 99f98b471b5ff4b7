"""The stall report: what a streaming model did, and what held it back, as one small table."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from djinn.errors import ConfigError
from djinn.figures import frames
from djinn.sizes import format_bytes
from djinn.transport.stats import Stats

_WAITS = {"disk": "the disk", "link": "copies from host memory"}
_REMEDIES = {
    "disk": "more host_memory takes weights off the disk; a larger budget keeps more on the device",
    "link": "a larger budget keeps more on the device; on a GPU, coding='lossless' copies fewer bytes",
    "compute": "weights are there when they are needed: a faster link would change little",
}


def stall_report(stats: Stats, wall_s: float, link: Literal["disk", "pcie"], ceiling_gbps: float) -> pd.DataFrame:
    """Return a table with a row for each fact: its value, and how to read it.

    Args:
        stats: statistics of a model loaded with ``trace=True``, from :func:`djinn.stats`.
        wall_s: seconds that its passes took, all since loading.
        link: what the bytes crossed: "pcie" on a GPU, "disk" on a CPU.
        ceiling_gbps: the link's raw rate, 10^9 bytes/s.

    Raises:
        ConfigError: no pass yet, or a model that was loaded without a timeline.
    """
    if not stats.traced or not stats.timeline:
        raise ConfigError("no timeline: load the model with trace=True and generate something")
    intervals = frames.timeline(stats.timeline)
    seconds = (intervals["end_s"] - intervals["start_s"]).groupby([intervals["lane"], intervals["cause"]]).sum()
    waits = {cause: float(seconds.get(("stall", cause), 0.0)) for cause in _WAITS}
    crossed = stats.disk_read_bytes if link == "disk" else stats.link_bytes
    rate = crossed / wall_s / 1e9
    limit = max(waits, key=lambda cause: waits[cause]) if sum(waits.values()) > wall_s / 2 else "compute"
    share = frames.shares(intervals)
    facts = {
        "passes": (f"{stats.passes}", "one for the prompt, one for each further token"),
        "model": (format_bytes(stats.model_bytes), "all weights"),
        "on the device": (format_bytes(stats.resident_bytes), "resident: never cross the link again"),
        "from host memory": (format_bytes(stats.host_bytes), "streamed in every pass"),
        "from disk": (format_bytes(stats.disk_bytes), "read in every pass"),
        f"{link}, GB/s": (f"{rate:.3g}", "bytes that crossed it / wall time"),
        "of the ceiling": (f"{rate / ceiling_gbps:.0%}", f"its raw rate is {ceiling_gbps:.3g} GB/s"),
        "computing": (f"{share.get('compute', 0.0):.0%}", "share of the timeline in which a unit was being read"),
        **{f"waiting for {what}": (f"{waits[cause]:.3g} s", f"of {wall_s:.3g} s") for cause, what in _WAITS.items()},
        "out of order": (f"{stats.reloads + stats.skips}", "above 0: modules ran in another order than was recorded"),
        "what limits": (_WAITS.get(limit, limit), _REMEDIES[limit]),
    }
    return pd.DataFrame.from_dict(facts, orient="index", columns=["value", "how to read it"])
