"""What a copy engine did when: the timeline, where a token's time goes, how fast each copy was."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from djinn.errors import DjinnError
from djinn.figures import frames
from djinn.figures.bars import digits
from djinn.figures.plots import require
from djinn.figures.style import LANES, PAGE_IN, beside, canvas, explain, figure_of, house_style, look_of

_ENLARGED = 40
"""Intervals in the enlarged part of a timeline."""
_COLUMNS = 900
"""Of a whole timeline: each is drawn as high as the share of its time in which the lane is busy."""
_BOUND_FROM = 0.9
"""The link is what bounds a run in which copies take at least this share of the time."""
_LEAST_BYTES = 10**7
"""Of a copy whose rate is drawn: shorter ones are mostly the cost of a command."""

_STATES = {"compute": LANES["compute"], "decode": LANES["decode"], "stall": LANES["stall"], "rest": "#DDCC77"}
_STATE_WORDS = {
    "compute": "computing",
    "decode": "decoding",
    "stall": "waiting for weights",
    "rest": "host, gaps, not traced",
}


@house_style()
def timeline(intervals: pd.DataFrame, ax: Axes | None = None, gpu: int | None = None) -> Figure:
    """Copies, decoding, compute and waiting over time, and a part of them enlarged; ``ax`` takes the whole alone.

    The title names the ``gpu``, where there are several.
    """
    require(intervals, "no timeline")
    starts = intervals["start_s"].sort_values().tolist()
    enlarged = ax is None and len(starts) > 2 * _ENLARGED
    ax = canvas(ax, 1.8 + 1.3 * enlarged, PAGE_IN)
    figure = figure_of(ax)
    words = f"Each of {_COLUMNS} columns is as high as the share of its time in which the lane is busy. "
    words += "Right: share of the whole time. Waiting: compute waits for weights, as it must where the link limits."
    if enlarged:
        figure.clear()
        ax, below = figure.subplots(2)
        middle = len(starts) // 2
        _spans(below, intervals, (starts[middle], starts[middle + _ENLARGED]))
        words += f" Below: {_ENLARGED} intervals from the middle, as they are."
    _occupancy(ax, intervals)
    lanes = set(intervals["lane"])
    shown = ["Copies", *(each for lane, each in (("decode", "decoding"), ("compute", "compute")) if lane in lanes)]
    if "compute" not in lanes:
        words += " Compute was not recorded in this run."
    title = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    explain(ax, title if gpu is None else f"{title}, GPU {gpu}", words)
    return figure


def occupancy(spans: pd.DataFrame, edges: np.ndarray) -> np.ndarray:
    """Return the share of each stretch between ``edges`` (seconds, ascending) in which one of ``spans`` is under way.

    Spans that overlap count once.
    """
    ordered = spans.sort_values("start_s")
    starts = ordered["start_s"].to_numpy(dtype=float)
    ends = ordered["end_s"].cummax().to_numpy(dtype=float)
    starts = np.maximum(starts, np.concatenate([[-np.inf], ends[:-1]]))  # only what no earlier span has covered
    ends = np.maximum(starts, ends)
    # Busy time up to a moment grows by one second per second in a span, and stands still between spans.
    busy = np.concatenate([[0.0], np.cumsum(ends - starts)])
    times = np.column_stack([starts, ends]).ravel()
    grown = np.column_stack([busy[:-1], busy[1:]]).ravel()
    return np.asarray(np.diff(np.interp(edges, times, grown)) / np.diff(edges))


def _occupancy(ax: Axes, intervals: pd.DataFrame) -> None:
    begin, end = float(intervals["start_s"].min()), float(intervals["end_s"].max())
    edges = np.linspace(begin, max(end, begin + 1e-9), _COLUMNS + 1)
    shares = frames.shares(intervals)
    lanes = [lane for lane in LANES if lane in shares]
    for row, lane in enumerate(lanes):
        high = 0.8 * occupancy(intervals[intervals["lane"] == lane], edges)
        floor = row + 0.4
        ax.stairs(floor - high, edges - begin, baseline=floor, fill=True, color=LANES[lane], linewidth=0)
        ax.axhline(floor, color=LANES[lane], linewidth=0.4)
        beside(ax, f"{shares[lane]:.0%}", row)
    _labelled(ax, intervals, lanes, end - begin, "time (s)")


def _spans(ax: Axes, intervals: pd.DataFrame, between: tuple[float, float]) -> None:
    """Draw the intervals between two times as they are."""
    begin, end = between
    lanes = [lane for lane in LANES if (intervals["lane"] == lane).any()]
    for row, lane in enumerate(lanes):
        spans = intervals[(intervals["lane"] == lane) & (intervals["end_s"] > begin) & (intervals["start_s"] < end)]
        bars = [(start - begin, until - start) for start, until in zip(spans["start_s"], spans["end_s"], strict=True)]
        # A white edge parts copies, which follow closely; one of its own colour keeps a short interval visible.
        edge, width = ("white", 0.5) if lane == "copy" else (LANES[lane], 0.2)
        ax.broken_barh(bars, (row - 0.38, 0.76), facecolor=LANES[lane], edgecolor=edge, linewidth=width)
    first = intervals["start_s"].min()
    _labelled(ax, intervals, lanes, end - begin, f"time (s), from {begin - first:.3g} s on")


def _labelled(ax: Axes, intervals: pd.DataFrame, lanes: list[str], length: float, label: str) -> None:
    ax.set_yticks(range(len(lanes)), [waiting(intervals) if lane == "stall" else lane for lane in lanes])
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.set_xlim(0, length)
    ax.grid(False, axis="y")
    ax.set_xlabel(label)


def waiting(intervals: pd.DataFrame) -> str:
    """Return what the lane of stalls is called: what compute waits for, and whether that bounds the run."""
    stalls = intervals[intervals["lane"] == "stall"]
    seconds = (stalls["end_s"] - stalls["start_s"]).groupby(stalls["cause"].fillna("")).sum()
    cause = str(seconds.idxmax()) if len(seconds) and seconds.idxmax() else "link"
    bound = frames.shares(intervals).get("copy", 0.0) >= _BOUND_FROM
    return f"waiting for\nthe {cause}{' (the bound)' if bound else ''}"


def token_parts(intervals: pd.DataFrame) -> dict[str, float]:
    """Return the seconds of the traced run's last pass in each state of the device: compute, decode, stall, rest.

    ``rest`` is what is left: launches, sampling, and compute of coded units where a trace has not recorded it.

    Raises:
        DjinnError: fewer than two passes in the timeline.
    """
    on_device = intervals[intervals["lane"].isin(["compute", "decode", "stall"])].sort_values("start_s")
    visit = on_device.groupby(["lane", "unit"]).cumcount()
    last = visit.max() if len(visit) else 0
    if not last:
        raise DjinnError("fewer than two passes in the timeline")
    now, before = on_device[visit == last], on_device[visit < last]
    wall = float(now["end_s"].max() - before["end_s"].max())
    edges = np.array([before["end_s"].max(), now["end_s"].max()])
    parts = {}
    for state in ("compute", "decode", "stall"):
        spans = now[now["lane"] == state]
        parts[state] = float(occupancy(spans, edges)[0]) * wall if len(spans) else 0.0
    return parts | {"rest": max(0.0, wall - sum(parts.values()))}


@house_style()
def where_time_goes(parts: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Draw a stacked bar for each system from a frame with name, state and seconds (see :func:`parts_frame`)."""
    require(parts, "no timeline with two passes")
    order = frames.names(parts)
    ax = canvas(ax, 1.0 + 0.28 * len(order))
    for row, name in enumerate(order):
        begin = 0.0
        for state, colour in _STATES.items():
            seconds = float(parts.loc[(parts["name"] == name) & (parts["state"] == state), "seconds"].sum())
            ax.barh(row, seconds, left=begin, height=0.64, color=colour, linewidth=0)
            begin += seconds
        beside(ax, f"{digits(begin)} s", row)
    ax.set_yticks(range(len(order)), [look_of(name).label for name in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel("time of a pass (s)")
    shown = parts.groupby("state")["seconds"].sum()
    key = [Patch(color=_STATES[state], label=_STATE_WORDS[state]) for state in _STATES if shown.get(state, 0) > 0]
    words = "What the device did in the last traced pass, one token: computing, decoding, or waiting for weights that "
    words += "were still on the link or the disk. What is left are launches, sampling and whatever was not traced. "
    explain(ax, "Where a token's time goes", words + "Other systems keep no trace.", key)
    return figure_of(ax)


def parts_frame(timelines: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return name, state and seconds of the last pass of each timeline, by the name of its system; see token_parts."""
    rows = []
    for name, intervals in timelines.items():
        if intervals.empty:
            continue
        try:
            parts = token_parts(intervals)
        except DjinnError:
            continue  # a single pass is no token
        rows += [{"name": name, "state": state, "seconds": seconds} for state, seconds in parts.items()]
    return pd.DataFrame(rows, columns=["name", "state", "seconds"])


@house_style()
def copy_rates(rates: pd.DataFrame, small_gbps: Mapping[str, float] | None = None, ax: Axes | None = None) -> Figure:
    """Draw the share of copies that ran at a rate or slower, from a frame with name and gbps (see rates_frame).

    ``small_gbps`` is by system the rate of a small buffer in the traced run, 10^9 bytes/s (see
    :func:`djinn.figures.per_gpu.beside_traces`).
    """
    require(rates, "no timeline of copies over a GPU's link")
    ax = canvas(ax, 2.2)
    for name in frames.names(rates):
        look, own = look_of(name), np.sort(rates.loc[rates["name"] == name, "gbps"])
        ax.ecdf(own, color=look.colour, label=f"{look.label}: {len(own)} copies")
        if small := (small_gbps or {}).get(name):
            words = f"{look.label}: a small buffer beside this run, {digits(small)} GB/s"
            ax.axvline(small, color=look.colour, linestyle="--", label=words)
    ax.set(xlabel="rate of a copy (GB/s)", ylabel="share of copies")
    explain(
        ax,
        "How fast each copy was",
        f"Share of the traced copies of {_LEAST_BYTES // 10**6} MB and more that ran at this rate or slower. Dashed, "
        "in the colour of its system: the link's ceiling, the rate of a small buffer copied over and over before and "
        "after the traced run; of several GPUs the median of their own. Why copies are slower is not told here.",
        ax.get_lines(),
        columns=1,
    )
    return figure_of(ax)


def rates_frame(*traced: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return name and gbps (10^9 bytes/s) of each larger copy over a GPU's link, by the name of its system.

    ``traced`` are the timelines of each GPU. Copies from disk overlap, so that no single one has a rate; a timeline
    with any has no rows.
    """
    rows = [pd.DataFrame({"name": [], "gbps": []}).astype({"name": str, "gbps": float})]
    for name, intervals in (timeline for own in traced for timeline in own.items()):
        copies = intervals[intervals["lane"] == "copy"].sort_values("start_s")
        if (copies["start_s"] < copies["end_s"].shift(fill_value=-np.inf) - 1e-6).any():
            continue
        copies = copies[copies["nbytes"] >= _LEAST_BYTES]
        rates = copies["nbytes"] / (copies["end_s"] - copies["start_s"]) / 1e9
        rows.append(pd.DataFrame({"name": name, "gbps": rates}))
    return pd.concat([each for each in rows if len(each)] or rows, ignore_index=True)
