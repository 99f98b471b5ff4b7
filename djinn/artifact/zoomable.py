"""The timelines of a run's page as its script takes them, to zoom into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from djinn.figures import frames, per_gpu
from djinn.figures.style import LANES

_LANE_WORDS = {"stall": "waiting"}


def timelines(run_dir: Path, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the page draws of the first GPU's timelines, which ``titles`` has words for by name.

    Each has its lanes with their colours, its units, and (lane, unit, start, length) of every interval, in seconds.
    """
    found = []
    for name in per_gpu.TIMELINES.values():
        intervals = frames.read_timeline(run_dir, name)
        if intervals.empty:
            continue
        lanes = [lane for lane in LANES if (intervals["lane"] == lane).any()]
        units = list(dict.fromkeys(intervals["unit"]))
        places = {unit: place for place, unit in enumerate(units)}
        begin = float(intervals["start_s"].min())
        spans = [
            (
                lanes.index(span["lane"]),
                places[span["unit"]],
                round(span["start_s"] - begin, 6),
                round(span["end_s"] - span["start_s"], 6),
            )
            for span in intervals.to_dict("records")
        ]
        shares = frames.shares(intervals)
        found.append(
            {
                "name": name,
                "words": titles[name],
                "shares": ", ".join(f"{lane} {shares[lane]:.0%}" for lane in lanes),
                "data": {
                    "lanes": [(_LANE_WORDS.get(lane, lane), LANES[lane]) for lane in lanes],
                    "units": units,
                    "spans": spans,
                },
            }
        )
    return found
