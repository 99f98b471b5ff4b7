"""The figures of the artifact: pure functions from a tidy frame (see :mod:`djinn.figures.frames`) to a Figure.

Each takes an optional ``ax`` to draw into and returns the whole Figure. An empty frame is refused with a
:class:`~djinn.errors.DjinnError` that says what is missing; a missing value is drawn as its words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from djinn.bench.statistics import summarise
from djinn.errors import DjinnError
from djinn.figures import frames
from djinn.figures.style import (
    LANES,
    LOOKS,
    PAGE_IN,
    beside,
    canvas,
    explain,
    figure_of,
    house_style,
    words_at,
)
from djinn.sizes import exact_bytes, format_bytes

SPREAD = "Whiskers: range of the runs, from 5 on the interval of their median."
_ENLARGED = 40
"""Intervals in the enlarged part of a timeline."""
_CEILING = "Dashed: the ceiling, the raw link rate beside the runs (median; band: range)."


@house_style()
def bandwidth(runs: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Link bandwidth (filled) and effective bandwidth (outline) of each system against the link's ceiling.

    ``reference`` is another run's frame, whose medians are drawn over this one's.
    """
    _require(runs, "no baseline records")
    ax = canvas(ax, _bar_height(runs))
    _ceiling(runs, ax.axvline, ax.axvspan)
    for row, name in enumerate(frames.names(runs)):
        effective = runs.loc[runs["name"] == name, "effective_gbps"].dropna()
        if len(effective):
            ax.barh(row, effective.median(), height=0.84, fill=False, edgecolor=LOOKS[name].colour, linewidth=0.8)
    _bars(ax, runs, "link_gbps")
    ax.set_xlabel("GB/s")
    filled = "Filled: bytes that crossed the link, median of the runs (dots). Outline: weight bytes the model consumed."
    explain(ax, "Bandwidth", f"{filled} {SPREAD} {_CEILING}{_overlay(ax, runs, reference, 'link_gbps')}")
    return figure_of(ax)


@house_style()
def ttft(runs: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Time to first token of each system, ring cold; ``reference`` as for :func:`bandwidth`."""
    _require(runs, "no baseline records")
    ax = canvas(ax, _bar_height(runs))
    _bars(ax, runs, "ttft_s")
    ax.set_xlabel("seconds")
    overlay = _overlay(ax, runs, reference, "ttft_s")
    explain(ax, "Time to first token", f"Median of the runs (dots). {SPREAD}{overlay}")
    return figure_of(ax)


@house_style()
def time_per_token(tokens: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Time from each token to the next: every sample, with median and spread; ``reference`` as its frame of tokens."""
    _require(tokens, "no baseline records")
    ax = canvas(ax, _bar_height(tokens))
    _bars(ax, tokens, "token_s")
    ax.set_xlabel("seconds per token")
    overlay = _overlay(ax, tokens, reference, "token_s")
    explain(ax, "Time per output token", f"Median over all tokens of all runs (dots). {SPREAD}{overlay}")
    return figure_of(ax)


@house_style()
def device_memory(runs: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Peak device memory of each system against the size of the model and the budget."""
    _require(runs, "no baseline records")
    ax = canvas(ax, _bar_height(runs))
    unit, scale = _unit(runs[["model_bytes", "budget_bytes", "peak_device_bytes"]].max().max())
    on_disk = (runs["link"] == "disk").any()
    legend = []
    for column, line, words in (("budget_bytes", "dashed", "budget"), ("model_bytes", "solid", "model")):
        for size in runs[column].dropna().unique():
            ax.axvline(size / scale, color="black", linestyle=line)
            legend.append(f"{words} {format_bytes(size)} ({line})")
    _bars(ax, runs.assign(peak=runs["peak_device_bytes"] / scale), "peak", spread=False)
    ax.set_xlabel(f"peak device memory, {unit}")
    # Where there is no device, its memory is what djinn/bench/measure.py takes for it.
    on_cpu = " Without a GPU: what the process grew by, less weights kept in host memory." if on_disk else ""
    explain(ax, "Device memory against model size", f"Largest peak of the runs (dots); {', '.join(legend)}.{on_cpu}")
    return figure_of(ax)


@house_style()
def bits_per_weight(bits: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Bits that coded tensors take, by kind, against the 16 of bfloat16."""
    _require(bits, "no record of coded weights")
    kinds = list(dict.fromkeys(bits["kind"]))
    ax = canvas(ax, 1.2 + 0.2 * len(kinds))
    look = LOOKS["djinn:lossless"]
    for row, kind in enumerate(kinds):
        value = bits.loc[bits["kind"] == kind, "bits"].median()
        ax.barh(row, value, height=0.64, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        beside(ax, f"{value:.2f}", row)
    ax.axvline(16, color="black", linestyle="--")
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.set_xlim(0, 18)
    ax.grid(False, axis="y")
    ax.set_xlabel("bits per weight")
    explain(ax, "Bits per coded weight", "All tensors of a kind together; the same in every run. Dashed: bfloat16.")
    return figure_of(ax)


@house_style()
def sweep(points: pd.DataFrame, axis: str, ax: Axes | None = None) -> Figure:
    """Link bandwidth over chunk sizes or ring sizes (``axis``: "chunk" or "ring") under the link's ceiling."""
    points = points[points["axis"] == axis].sort_values("size_bytes")
    _require(points, f"no sweep records over {axis} sizes")
    ax = canvas(ax, 2.2)
    _ceiling(points, ax.axhline, ax.axhspan)
    over_sizes(ax, points, "link_gbps")
    ax.set_xlabel(f"{axis} size")
    ax.set_ylabel("link, GB/s")
    explain(ax, f"Bandwidth by {axis} size", f"Median of the runs (dots). {SPREAD} {_CEILING}")
    return figure_of(ax)


def over_sizes(ax: Axes, points: pd.DataFrame, column: str) -> None:
    """Draw a column over the sizes of a sweep, which are sorted: every sample, median and spread, and the gaps."""
    look = LOOKS["djinn"]
    sizes = points["size_bytes"].unique().tolist()
    samples = [points.loc[points["size_bytes"] == size, column].dropna().tolist() for size in sizes]
    means, below, above = zip(*map(_interval, samples), strict=True)
    for place, each in enumerate(samples):
        ax.plot([place] * len(each), each, ".", color="black", markersize=3, zorder=4)
    ax.errorbar(
        range(len(sizes)), means, yerr=[below, above], color=look.colour, marker=look.marker, markersize=5, capsize=2
    )
    for size, words in frames.gaps(points, column, by="size_bytes").items():
        words_at(ax, words, sizes.index(size), 0, up=True)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_xticks(range(len(sizes)), [exact_bytes(int(size)) for size in sizes])


@house_style()
def timeline(intervals: pd.DataFrame, pcie: pd.DataFrame | None = None, ax: Axes | None = None) -> Figure:
    """Copies, compute and stalls over time, then a part of them enlarged, then the counters of the link.

    ``ax`` takes the lanes alone: the counters have a clock of their own, and so an axes of their own.
    """
    _require(intervals, "no timeline")
    words = "Every interval; the shortest are drawn a hairline wide. Right: share of the time. "
    words += "Stall: compute waits for copies, as it must where the link limits."
    starts = intervals["start_s"].sort_values().tolist()
    enlarged = ax is None and len(starts) > 2 * _ENLARGED
    traced = ax is None and pcie is not None and not pcie.empty
    panels = 1 + enlarged + traced
    ax = canvas(ax, 0.6 + 1.2 * panels, PAGE_IN)
    figure = figure_of(ax)
    if panels > 1:
        figure.clear()
        ax, *below = figure.subplots(panels)
        if enlarged:
            middle = len(starts) // 2
            _lanes(below[0], intervals, (starts[middle], starts[middle + _ENLARGED]))
            words += f" Below: {_ENLARGED} intervals from the middle."
        if traced and pcie is not None:
            _counters(below[-1], pcie)
    _lanes(ax, intervals)
    explain(ax, "Copies against compute", words)
    return figure


def _lanes(ax: Axes, intervals: pd.DataFrame, between: tuple[float, float] | None = None) -> None:
    """Draw a row of intervals per lane: all of them and the share of the time they take, or those ``between`` times."""
    begin, end = between or (intervals["start_s"].min(), intervals["end_s"].max())
    shares = frames.shares(intervals)
    lanes = [lane for lane in LANES if lane in shares]
    for row, lane in enumerate(lanes):
        spans = intervals[(intervals["lane"] == lane) & (intervals["end_s"] > begin) & (intervals["start_s"] < end)]
        bars = [(start - begin, until - start) for start, until in zip(spans["start_s"], spans["end_s"], strict=True)]
        # An edge of its own colour keeps a short interval visible; a white one parts copies, which follow closely.
        edge, width = ("white", 0.5) if between and lane == "copy" else (LANES[lane], 0.2)
        ax.broken_barh(bars, (row - 0.38, 0.76), facecolor=LANES[lane], edgecolor=edge, linewidth=width)
        if between is None:
            beside(ax, f"{shares[lane]:.0%}", row)
    ax.set_yticks(range(len(lanes)), lanes)
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.set_xlim(0, end - begin)
    ax.grid(False, axis="y")
    ax.set_xlabel("seconds" if between is None else f"seconds from {begin - intervals['start_s'].min():.3g} s on")


def _counters(ax: Axes, pcie: pd.DataFrame) -> None:
    for source, rows in pcie.groupby("source"):
        line = "-" if source == "nvml" else ":"
        ax.plot(rows["time_s"], rows["rx_gbps"], line, color="black", label=f"to the device ({source})")
        ax.plot(rows["time_s"], rows["tx_gbps"], line, color="#999999", label=f"from the device ({source})")
    ax.set_ylabel("PCIe, GB/s")
    ax.set_xlabel("seconds since the trace began")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _require(frame: pd.DataFrame, what: str) -> None:
    if frame.empty:
        raise DjinnError(what)


def _bar_height(frame: pd.DataFrame) -> float:
    return 1.2 + 0.24 * len(frames.names(frame))


def _interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and how far below and above it the spread reaches; NaN for what the samples cannot say."""
    if not samples:
        return np.nan, np.nan, np.nan
    summary = summarise(samples)
    if summary.low is None or summary.high is None:
        return summary.median, np.nan, np.nan
    return summary.median, summary.median - summary.low, summary.high - summary.median


def _bars(ax: Axes, frame: pd.DataFrame, column: str, spread: bool = True) -> None:
    """Draw one bar per system: median and spread (or, without ``spread``, the largest), every sample, and the gaps."""
    order = frames.names(frame)
    for row, name in enumerate(order):
        samples = frame.loc[frame["name"] == name, column].dropna().tolist()
        if not samples:
            continue
        # Spread the dots evenly over the bar: the same samples give the same picture.
        spots = row + np.linspace(-0.25, 0.25, len(samples) + 2)[1:-1]
        ax.plot(samples, spots, ".", color="black", markersize=3, zorder=4)
        look = LOOKS[name]
        value, below, above = _interval(samples) if spread else (max(samples), np.nan, np.nan)
        # A hatch takes the edge's colour: white shows on the fill and in grey print.
        ax.barh(row, value, height=0.64, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        if np.isfinite(below):
            ax.errorbar(
                value, row, xerr=[[min(below, value)], [above]], color="black", capsize=2, linewidth=0.8, zorder=5
            )
        beside(ax, f"{value:.3g}", row)
    labels = {name: LOOKS[name].label for name in order}
    for name, words in frames.gaps(frame, column).items():
        if frame.loc[frame["name"] == name, column].isna().all():
            words_at(ax, words, 0, order.index(name))
        else:
            labels[name] += f"\n{words}"
    ax.set_yticks(range(len(order)), list(labels.values()), linespacing=1)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_ylabel("")
    ax.grid(False, axis="y")


def _overlay(ax: Axes, frame: pd.DataFrame, reference: pd.DataFrame | None, column: str) -> str:
    """Draw the reference run's means at this run's systems; return the words that explain them, if there are any."""
    if reference is None:
        return ""
    medians = reference.groupby("name")[column].median().dropna()
    rows = [(medians[name], row) for row, name in enumerate(frames.names(frame)) if name in medians]
    if not rows:
        return ""
    values, places = zip(*rows, strict=True)
    ax.plot(values, places, "D", mfc="white", mec="black", markersize=4, zorder=7)
    return " Diamonds: medians of the reference run."


def _ceiling(frame: pd.DataFrame, line: Callable[..., object], band: Callable[..., object]) -> None:
    ceilings = frame["ceiling_gbps"].dropna()
    if len(ceilings):
        band(ceilings.min(), ceilings.max(), color="black", alpha=0.12, linewidth=0)
        line(ceilings.median(), color="black", linestyle="--")


def _unit(largest: float) -> tuple[str, float]:
    return next(
        ((name, scale) for name, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if largest >= scale), ("B", 1.0)
    )
