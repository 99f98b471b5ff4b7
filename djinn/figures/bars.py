"""Horizontal bars, one row per system: what the figures of a run have in common.

A bar is the median of the runs, each of which counts with its own median. Whiskers are the runs' range while there are
fewer than five, from five on the interval of their median (:func:`djinn.bench.statistics.summarise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from djinn.bench.statistics import summarise
from djinn.figures import frames
from djinn.figures.style import beside, look_of, words_at

SPREAD = "Whiskers: the range of the runs, from five on the interval of their median."
CUT = "Bars with two white strokes are cut; their numbers are whole."
_JUMP = 3.0
"""Bars more than this many times as long as the next shorter one are cut, so that the others can be told apart."""
_CUT = 1.35
"""Where: at this many times the longest of the others."""


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and how far below and above it the whiskers reach; NaN for what the samples cannot say."""
    if not samples:
        return math.nan, math.nan, math.nan
    summary = summarise(samples)
    if summary.low is None or summary.high is None:
        return summary.median, math.nan, math.nan
    return summary.median, summary.median - summary.low, summary.high - summary.median


def by_run(rows: pd.DataFrame, column: str) -> list[float]:
    """Return the median of each run that has samples in ``column``."""
    return [float(value) for value in rows.dropna(subset=[column]).groupby("run")[column].median()]


def cut_at(lengths: Sequence[float]) -> float:
    """Return the length at which bars are cut: infinity where none is out of proportion, or too many would be."""
    ordered = sorted(lengths)
    for place, (shorter, longer) in enumerate(pairwise(ordered), start=1):
        if place > 1 and longer > _JUMP * shorter and len(ordered) - place < place:
            return _CUT * shorter
    return math.inf


def break_marks(ax: Axes, row: float, length: float) -> None:
    """Draw two white strokes across a bar that is cut at ``length``: it goes on."""
    for place in (0.93, 0.95):
        ax.plot([place * length, (place + 0.012) * length], [row + 0.42, row - 0.42], color="white", zorder=4)


def digits(value: float) -> str:
    """Return three digits of a number, the zeros at its end too."""
    return f"{value:.3g}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def bars(
    ax: Axes, frame: pd.DataFrame, column: str, unit: str, *, of: Literal["median", "max"] = "median",
    height: float = 0.64, shift: float = 0, plain: bool = True,
) -> float:  # fmt: skip
    """Draw a bar for each system: its value, whiskers, every sample, the number at the right, and gaps as words.

    Args:
        frame: rows with ``name``, ``run``, ``words`` and ``column`` (see :mod:`djinn.figures.frames`).
        unit: what follows the number.
        of: how samples become a bar; the largest has no whiskers.
        height: of a bar; rows are one apart.
        shift: of the bars from the middle of their rows.
        plain: filled in the system's colour; otherwise an outline of it, without names and gaps.

    Returns:
        The length at which bars that are out of proportion were cut; infinity where none was.
    """
    order = frames.names(frame)
    values = {name: pd.Series(by_run(frame[frame["name"] == name], column), dtype=float).agg(of) for name in order}
    longest = cut_at([value for value in values.values() if np.isfinite(value)])
    for place, name in enumerate(order):
        rows, row = frame[frame["name"] == name], place + shift
        samples = rows[column].dropna().tolist()
        if not samples:
            continue
        value, look = values[name], look_of(name)
        face, width = (look.colour, 0.0) if plain else ("white", 0.9)
        ax.barh(row, min(value, longest), height=height, facecolor=face, edgecolor=look.colour, linewidth=width)
        if value > longest:
            break_marks(ax, row, longest)
        else:
            # Spread the dots evenly over the bar: the same samples give the same picture.
            spots = row + height * np.linspace(-0.4, 0.4, len(samples) + 2)[1:-1]
            ax.plot(samples, spots, ".", color="black", markersize=2.5, zorder=4)
            _, below, above = spread(by_run(rows, column))
            if of == "median" and np.isfinite(below):
                ax.errorbar(value, row, xerr=[[below], [above]], color="black", capsize=2, linewidth=0.8, zorder=5)
        beside(ax, f"{digits(value)} {unit}", row)
    if plain:
        _rows(ax, frame, column, order)
    return longest


def _rows(ax: Axes, frame: pd.DataFrame, column: str, order: list[str]) -> None:
    labels = {name: look_of(name).label for name in order}
    for name, words in frames.gaps(frame, column).items():
        if frame.loc[frame["name"] == name, column].isna().all():
            words_at(ax, words, order.index(name))
        else:
            labels[name] += f"\n{words}"
    ax.set_yticks(range(len(order)), list(labels.values()), linespacing=1)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.margins(x=0.04)
    ax.grid(False, axis="y")


def overlay(ax: Axes, frame: pd.DataFrame, reference: pd.DataFrame | None, column: str, longest: float) -> list[Line2D]:
    """Draw the reference run's medians, as far as ``longest``, at this run's systems; return them for the key."""
    if reference is None:
        return []
    medians = reference.groupby(["name", "run"])[column].median().groupby("name").median().dropna()
    rows = [(medians.get(name, np.inf), row) for row, name in enumerate(frames.names(frame))]
    rows = [(value, row) for value, row in rows if value <= longest and np.isfinite(value)]
    if not rows:
        return []
    values, places = zip(*rows, strict=True)
    return ax.plot(values, places, "D", mfc="white", mec="black", markersize=4, zorder=7, label="reference run")


def sample_key(words: str) -> Line2D:
    """Return the key's entry for the dots."""
    return Line2D([], [], linestyle="", marker=".", color="black", markersize=4, label=words)
