"""The Trace Event file: a named track for each lane, every interval once, in microseconds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest

from djinn.artifact.reference import runs
from djinn.figures.frames import TIMELINE_COLUMNS, read_timeline
from djinn.figures.perfetto import trace_events


def test_intervals_become_events_of_their_lanes_track() -> None:
    rows = [
        ("copy", "a", 5.0, 5.5, 100, None),
        ("stall", "a", 5.25, 5.5, 100, "link"),
        ("compute", "a", 5.5, 6, 100, ""),
    ]
    document = json.loads(json.dumps(trace_events(pd.DataFrame(rows, columns=TIMELINE_COLUMNS))))
    tracks = {
        event["tid"]: event["args"]["name"] for event in document["traceEvents"] if event["name"] == "thread_name"
    }
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [tracks[span["tid"]] for span in spans] == ["copy", "compute", "stall"]
    assert [(span["ts"], span["dur"]) for span in spans] == [(0, 5e5), (5e5, 5e5), (25e4, 25e4)]
    assert [span["args"].get("waits for") for span in spans] == [None, None, "link"]


@pytest.mark.parametrize("folder", runs(), ids=lambda folder: folder.name)
def test_real_timelines_keep_the_formats_rules(folder: Path) -> None:
    intervals = read_timeline(folder)
    events = json.loads(json.dumps(trace_events(intervals), allow_nan=False))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(intervals)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for tid, own in itertools.groupby(sorted(spans, key=lambda span: (span["tid"], span["ts"])), lambda s: s["tid"]):
        assert tid in named
        track = list(own)
        assert len({span["cat"] for span in track}) == 1
        assert all(span["name"] and span["ts"] >= 0 and span["dur"] >= 0 for span in track)
        # Perfetto drops an event that overlaps another of its track.
        assert all(one["ts"] + one["dur"] <= other["ts"] + 1e-6 for one, other in itertools.pairwise(track))
