"""Figures over what a sweep varies: sizes of chunks and rings, batches, lengths of prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from djinn.errors import DjinnError
from djinn.figures import frames
from djinn.figures.bars import SPREAD, digits, sample_key, spread
from djinn.figures.headline import SMALL_BYTES
from djinn.figures.plots import require
from djinn.figures.style import LOOKS, canvas, explain, figure_of, house_style, look_of, words_at
from djinn.sizes import exact_bytes

_FEWEST = 3
"""Points that make a line; fewer are no figure."""


@house_style()
def sweep(points: pd.DataFrame, axis: str, ax: Axes | None = None) -> Figure:
    """Link bandwidth over chunk sizes or ring sizes (``axis``: "chunk" or "ring") under the link's ceiling.

    Raises:
        DjinnError: fewer than three sizes.
    """
    points = points[points["axis"] == axis].sort_values("size_bytes")
    require(points, f"no sweep records over {axis} sizes")
    if (found := points["size_bytes"].nunique()) < _FEWEST:
        raise DjinnError(f"{found} {axis} size{'s' * (found > 1)}: fewer than {_FEWEST} make no figure")
    ax = canvas(ax, 2.2)
    key: list[Artist] = [sample_key("one run")]
    ceilings = points["ceiling_gbps"].dropna()
    if len(ceilings):
        ax.axhspan(ceilings.min(), ceilings.max(), color="black", alpha=0.12, linewidth=0)
        words = f"ceiling {digits(ceilings.median())} GB/s"
        key.append(ax.axhline(ceilings.median(), color="black", linestyle="--", label=words))
    over_sizes(ax, points, "link_gbps")
    ax.set_xlabel(f"{axis} size")
    ax.set_ylabel("rate (GB/s)")
    if points["model_bytes"].max() < SMALL_BYTES:
        ax.annotate(
            "a smoke run: too small a model\nfor its rates to mean anything", (0.5, 0.5), xycoords="axes fraction",
            ha="center", va="center", style="italic", bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            zorder=8,
        )  # fmt: skip
    explain(
        ax,
        f"Rate by {axis} size",
        f"Bytes over the link per second, all else as the profile has it: medians. {SPREAD} A line joins points of "
        f"{_FEWEST} runs or more. Dashed: the ceiling, the link's raw rate beside the runs (band: its range).",
        key,
    )
    return figure_of(ax)


def over_sizes(ax: Axes, points: pd.DataFrame, column: str) -> None:
    """Draw a column over the sizes of a sweep, which are sorted: every sample, median and whiskers, and the gaps.

    Points of fewer than three runs are not joined by a line.
    """
    look = LOOKS["djinn"]
    sizes = points["size_bytes"].unique().tolist()
    samples = [points.loc[points["size_bytes"] == size, column].dropna().tolist() for size in sizes]
    medians, below, above = zip(*map(spread, samples), strict=True)
    for place, each in enumerate(samples):
        ax.plot([place] * len(each), each, ".", color="black", markersize=3, zorder=4)
    joined = "-" if min(len(each) for each in samples if each or len(samples) == 1) >= _FEWEST else ""
    ax.errorbar(
        range(len(sizes)), medians, yerr=[below, above], color=look.colour, marker=look.marker, markersize=5, capsize=2,
        linestyle=joined,
    )  # fmt: skip
    for size, words in frames.gaps(points, column, by="size_bytes").items():
        words_at(ax, words, sizes.index(size), up=True)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_xticks(range(len(sizes)), [exact_bytes(int(size)) for size in sizes])


@house_style()
def by_batch(runs: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Tokens per second of all sequences together over the batch, a line for each system (see :func:`_curves`)."""
    measured = runs.assign(tokens_per_s=runs["batch"] / runs["token_s"])
    ax = _curves(measured, "batch", "tokens_per_s", canvas(ax, 2.4))
    ax.set(xlabel="batch (sequences at a time)", ylabel="tokens/s")
    _explained(ax, "Tokens per second by batch", "Tokens of all sequences together, per second, after the first.")
    return figure_of(ax)


@house_style()
def by_prompt(runs: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Time to first token over the length of the prompt, a line for each system (see :func:`_curves`)."""
    ax = _curves(runs, "prompt_tokens", "ttft_s", canvas(ax, 2.4))
    ax.set(xlabel="prompt (tokens)", ylabel="time to first token (s)", ylim=(0, None))
    _explained(ax, "Time to first token by prompt", "Time from the call of generate to the first token.")
    return figure_of(ax)


def _curves(runs: pd.DataFrame, x: str, y: str, ax: Axes) -> Axes:
    """Draw the medians of ``y`` over ``x``, which doubles from tick to tick, with whiskers; a line for each system.

    Raises:
        DjinnError: fewer than two values of ``x`` that have samples.
    """
    runs = runs.dropna(subset=[y])
    places = sorted(runs[x].unique())
    if len(places) < 2:
        raise DjinnError(f"no records over {x}")
    for name in frames.names(runs):
        own, look = runs[runs["name"] == name], look_of(name)
        at = sorted(own[x].unique())
        samples = [own.loc[own[x] == place, y].tolist() for place in at]
        medians, below, above = zip(*map(spread, samples), strict=True)
        ax.errorbar(
            at, medians, yerr=np.nan_to_num([below, above]), color=look.colour, marker=look.marker, markersize=4,
            capsize=2, label=look.label,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(places, [f"{place:g}" for place in places])
    return ax


def _explained(ax: Axes, title: str, what: str) -> None:
    containers = [container for container in ax.containers if container.get_label()]
    explain(ax, title, f"{what} Marks: medians of the runs. {SPREAD}")
    ax.legend(handles=containers, loc="best")
