"""What is known of each GPU of a run: its timelines, and what its link carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from djinn.bench.records import Record
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


def _timelines(run_dir: Path, suffix: str) -> dict[str, pd.DataFrame]:
    return {system: frames.read_timeline(run_dir, f"{name}{suffix}") for system, name in TIMELINES.items()}
