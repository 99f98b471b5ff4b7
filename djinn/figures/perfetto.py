"""A timeline as a Trace Event file, which https://ui.perfetto.dev opens.

Format: "Trace Event Format", Google: complete events (``ph: X``) with times in microseconds. Events of one track may
not overlap unless one lies within the other, so that copies under way at once are given tracks side by side.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from djinn.figures.style import LANES


def trace_events(intervals: pd.DataFrame) -> dict[str, Any]:
    """Return the JSON document of a ``timeline`` frame (see :mod:`djinn.figures.frames`): tracks for each lane."""
    begin = float(intervals["start_s"].min())
    names: list[dict[str, Any]] = []
    spans: list[dict[str, Any]] = []
    for lane in LANES:
        ends: list[float] = []  # of the last event of each of the lane's tracks
        tracks = len(names) // 2
        rows = intervals[intervals["lane"] == lane].sort_values("start_s").fillna({"cause": ""})
        for span in rows.to_dict("records"):
            start, end = (round((span[edge] - begin) * 1e6, 3) for edge in ("start_s", "end_s"))
            track = next((place for place, last in enumerate(ends) if last <= start), len(ends))
            ends[track : track + 1] = [end]
            spans.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": tracks + track + 1,
                    "name": span["unit"],
                    "cat": lane,
                    "ts": start,
                    "dur": round(end - start, 3),
                    "args": {"bytes": int(span["nbytes"])} | ({"waits for": span["cause"]} if span["cause"] else {}),
                }
            )
        for track in range(len(ends)):
            event = {"ph": "M", "pid": 1, "tid": tracks + track + 1}
            names.append(event | {"name": "thread_name", "args": {"name": f"{lane} {track + 1}" if track else lane}})
            names.append(event | {"name": "thread_sort_index", "args": {"sort_index": tracks + track}})
    return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
