"""What is known of each GPU of a run: its timelines, and what its link carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from djinn.bench.records import Record
from djinn.bench.run import Run
from djinn.bench.sweep import sweep_lanes
from djinn.figures import frames

TIMELINES = {"djinn": "timeline", "djinn:lossless": "timeline_coded"}
"""Files of timelines by system; those of GPU 1 end in ``_1``, and so on."""


def read_timelines(run_dir: Path) -> list[dict[str, pd.DataFrame]]:
    """Return the timelines of each GPU of a run directory, by system; the first GPU's, even where they are empty.

    Raises:
        ConfigError: a damaged line, with its number.
    """
    found = [_timelines(run_dir, "")]
    while any(not own.empty for own in found[-1].values()):
        found.append(_timelines(run_dir, f"_{len(found)}"))
    return found[:-1] or found


def ceilings(records: Sequence[Record]) -> list[float]:
    """Return each GPU's raw rate over its own link, 10^9 bytes/s: medians over the records that have it.

    A record's own ``ceiling_gbps`` is that of all GPUs together.
    """
    looks: dict[int, list[float]] = {}
    for record in records:
        for gpu, each in enumerate(record.each_rank):
            if each.ceiling_gbps is not None:
                looks.setdefault(gpu, []).append(each.ceiling_gbps)
    return [median(looks[gpu]) for gpu in sorted(looks)]


def beside_traces(run: Run) -> dict[str, float]:
    """Return by system the raw rate of a GPU's link in the run that was traced, 10^9 bytes/s.

    It is that of a small buffer, the higher of the looks before and after the run; of several GPUs the median of their
    own. The traced run is the first one of the sweep's point that writes the timeline. What has no record is left out.
    """
    found = {}
    for lane in sweep_lanes(run.profile, run.results) if run.has_profile else []:
        if lane.timeline is None:
            continue
        own = [each for each in run.sweep if each.variant == lane.variant and each.status == "ok"]
        if looks := ceilings(sorted(own, key=lambda each: each.run)[:1]):
            system = next(name for name, file in TIMELINES.items() if file == lane.timeline.stem)
            found[system] = median(looks)
    return found


def _timelines(run_dir: Path, suffix: str) -> dict[str, pd.DataFrame]:
    return {system: frames.read_timeline(run_dir, f"{name}{suffix}") for system, name in TIMELINES.items()}
