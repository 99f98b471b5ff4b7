"""A timeline as a Trace Event file, which https://ui.perfetto.dev opens.

Format: "Trace Event Format", Google, complete events (``ph: X``) with times in microseconds.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from djinn.figures.style import LANES


def trace_events(intervals: pd.DataFrame) -> dict[str, Any]:
    """Return the JSON document of a ``timeline`` frame (see :mod:`djinn.figures.frames`): a track for each lane."""
    tracks = {lane: number for number, lane in enumerate(LANES, start=1)}
    names = [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}}
        for lane, number in tracks.items()
    ]
    begin = float(intervals["start_s"].min())
    spans = [
        {
            "ph": "X",
            "pid": 1,
            "tid": tracks[span["lane"]],
            "name": span["unit"],
            "cat": span["lane"],
            "ts": round((span["start_s"] - begin) * 1e6, 3),
            "dur": round((span["end_s"] - span["start_s"]) * 1e6, 3),
            "args": {"bytes": int(span["nbytes"])} | ({"waits for": span["cause"]} if span["cause"] else {}),
        }
        for span in intervals.fillna({"cause": ""}).to_dict("records")
    ]
    return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
