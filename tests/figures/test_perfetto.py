"""The Trace Event file: a named track for each lane, every interval once, in microseconds."""

from __future__ import annotations

import json

import pandas as pd

from djinn.figures.frames import TIMELINE_COLUMNS
from djinn.figures.perfetto import trace_events


def test_intervals_become_events_of_their_lanes_track() -> None:
    rows = [
        ("copy", "a", 5.0, 5.5, 100, None),
        ("stall", "a", 5.25, 5.5, 100, "link"),
        ("compute", "a", 5.5, 6, 100, ""),
    ]
    document = json.loads(json.dumps(trace_events(pd.DataFrame(rows, columns=TIMELINE_COLUMNS))))
    tracks = {event["tid"]: event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [tracks[span["tid"]] for span in spans] == ["copy", "stall", "compute"]
    assert [(span["ts"], span["dur"]) for span in spans] == [(0, 5e5), (25e4, 25e4), (5e5, 5e5)]
    assert [span["args"].get("waits for") for span in spans] == [None, "link", None]
