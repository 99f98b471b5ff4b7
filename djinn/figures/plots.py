"""The bars of a run: pure functions from a tidy frame (see :mod:`djinn.figures.frames`) to a Figure.

Each takes an optional ``ax`` to draw into and returns the whole Figure. An empty frame is refused with a
:class:`~djinn.errors.DjinnError` that says what is missing; a missing value is drawn as its words.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from djinn.bench.statistics import is_exceeded
from djinn.errors import DjinnError
from djinn.figures import frames
from djinn.figures.bars import CUT, SPREAD, bars, digits, overlay, sample_key
from djinn.figures.style import GREY, LOOKS, beside, canvas, explain, figure_of, house_style
from djinn.sizes import format_bytes

_ROW_IN = 0.24
_SAME_BITS = 0.005
"""Kinds of tensors whose bits differ by less share a bar."""


@house_style()
def bandwidth(runs: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Two bars for each system: bytes that crossed the link, and bytes of weights consumed, both per second.

    ``reference`` is another run's frame, whose medians are drawn over this one's.
    """
    require(runs, "no baseline records")
    ax = canvas(ax, 1.1 + 0.36 * len(frames.names(runs)))
    key: list[Artist] = [Patch(color=GREY, label="over the link"), Patch(fc="white", ec=GREY, label="consumed")]
    bars(ax, runs, "effective_gbps", "GB/s", height=0.36, shift=-0.21, plain=False)
    longest = bars(ax, runs, "link_gbps", "GB/s", height=0.36, shift=0.21)
    key += [*_ceiling(ax, runs), *overlay(ax, runs, reference, "link_gbps", longest)]
    ax.set_xlabel("rate (GB/s)")
    explain(
        ax,
        "Bandwidth",
        "For each system, the bytes that crossed the link per second (filled) and the bytes of raw weights that the "
        "model consumed per second (outline; more than the link carries where weights are resident or coded). Bars: "
        f"medians of the runs, dots: every run. {SPREAD} Dashed: the link's ceiling, its raw rate for a small buffer "
        "or for reads beside the runs (band: its range). Dotted, where measured: bare copies of the same weights.",
        key,
    )
    return figure_of(ax)


@house_style()
def ttft(runs: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Time to first token of each system, ring cold; ``reference`` as for :func:`bandwidth`."""
    return _times(
        runs, "ttft_s", "Time to first token", "time to first token (s)", "one run",
        "Time from the call of generate to the first token, with the model loaded and an empty ring.", ax, reference,
    )  # fmt: skip


@house_style()
def time_per_token(tokens: pd.DataFrame, ax: Axes | None = None, reference: pd.DataFrame | None = None) -> Figure:
    """Time from each token to the next: every sample and the median; ``reference`` as its frame of tokens."""
    return _times(
        tokens, "token_s", "Time per token", "time per token (s)", "one token",
        "Time from each token to the next, after the first.", ax, reference,
    )  # fmt: skip


@house_style()
def loading(runs: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Time that each system takes to load the model."""
    require(runs, "no baseline records")
    ax = canvas(ax, 0.9 + _ROW_IN * len(frames.names(runs)))
    loaded = runs.drop_duplicates(["name", "load_s"])  # runs of one loading
    cut = bars(ax, loaded, "load_s", "s") < float("inf")
    ax.set_xlabel("loading time (s)")
    words = "Time to load the model, before any prompt. A system that stays loaded between its runs was loaded once."
    words += " DeepSpeed's first loading includes compiling its operators."
    explain(ax, "Loading", f"{words} {CUT}" if cut else words)
    return figure_of(ax)


@house_style()
def device_memory(runs: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Peak device memory of each system against the size of the model and the budget."""
    require(runs, "no baseline records")
    ax = canvas(ax, 1.1 + _ROW_IN * len(frames.names(runs)))
    unit, scale = _unit(runs[["model_bytes", "budget_bytes", "peak_device_bytes"]].max().max())
    key: list[Artist] = []
    for column, style, words in (("budget_bytes", "--", "budget"), ("model_bytes", "-", "model")):
        for size in runs[column].dropna().unique():
            key.append(ax.axvline(size / scale, color="black", linestyle=style, label=f"{words} {format_bytes(size)}"))
    bars(ax, runs.assign(peak=runs["peak_device_bytes"] / scale), "peak", unit, of="max")
    ax.set_xlabel(f"peak device memory ({unit})")
    words = "The largest peak of device memory in the runs of each system, against the budget and the model's size."
    # Where there is no device, its memory is what djinn/bench/measure.py takes for it.
    on_cpu = " Without a GPU it is what the process grew by, less weights kept in host memory."
    explain(ax, "Device memory", words + (on_cpu if (runs["link"] == "disk").any() else ""), key)
    return figure_of(ax)


@house_style()
def bits_per_weight(bits: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Bits that coded tensors take, by kind, against the 16 of bfloat16; kinds that take the same share a bar.

    Raises:
        DjinnError: no coded weights, or all kinds take the same: that is one number, and no figure.
    """
    require(bits, "no record of coded weights")
    groups: list[tuple[float, list[str]]] = []
    for kind, value in bits.groupby("kind", sort=False)["bits"].median().sort_values().items():
        if not groups or value - groups[-1][0] > _SAME_BITS:
            groups.append((float(value), []))
        groups[-1][1].append(str(kind))
    if len(groups) == 1:
        value, kinds = groups[0]
        raise DjinnError(f"one number needs no figure: {value:.2f} bits per weight, the same in {', '.join(kinds)}")
    ax = canvas(ax, 0.9 + _ROW_IN * len(groups))
    look = LOOKS["djinn:lossless"]
    for row, (value, _) in enumerate(groups):
        ax.barh(row, value, height=0.64, color=look.colour, linewidth=0)
        beside(ax, f"{value:.2f}", row)
    key = [ax.axvline(16, color="black", linestyle="--", label="bfloat16")]
    names = [kinds[0] if len(kinds) == 1 else f"{kinds[0]} and {len(kinds) - 1} more" for _, kinds in groups]
    ax.set_yticks(range(len(groups)), names)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel("bits per weight")
    words = "Bits that a coded weight takes, all tensors of a kind together. Kinds that take the same share a bar."
    explain(ax, "Bits per coded weight", words, key)
    return figure_of(ax)


def require(frame: pd.DataFrame, what: str) -> None:
    """Refuse an empty frame.

    Raises:
        DjinnError: it is empty, so that ``what`` is the matter.
    """
    if frame.empty:
        raise DjinnError(what)


def _times(
    frame: pd.DataFrame, column: str, title: str, label: str, dot: str, what: str, ax: Axes | None,
    reference: pd.DataFrame | None,
) -> Figure:  # fmt: skip
    require(frame, "no baseline records")
    ax = canvas(ax, 1.1 + _ROW_IN * len(frames.names(frame)))
    longest = bars(ax, frame, column, "s")
    key: list[Artist] = [sample_key(dot)]
    caption = f"{what} Bars: medians of the runs. {SPREAD}"
    bound = frame["bound_s"].median()
    if bound > 0:
        key.append(ax.axvline(bound, color="black", linestyle="--", label=f"link's bound {digits(bound)} s"))
        caption += " Dashed: the time that the link needs at its ceiling for the raw bytes beyond the budget."
    if longest < float("inf"):
        caption += f" {CUT}"
    if drawn := overlay(ax, frame, reference, column, longest):
        key += drawn
        caption += " Diamonds: medians of the reference run."
    ax.set_xlabel(label)
    explain(ax, title, caption, key)
    return figure_of(ax)


def _ceiling(ax: Axes, frame: pd.DataFrame) -> list[Line2D]:
    ceilings = frame["ceiling_gbps"].dropna()
    if ceilings.empty:
        return []
    ax.axvspan(ceilings.min(), ceilings.max(), color="black", alpha=0.12, linewidth=0)
    # What a run exceeded by more than all looks at it differ is no ceiling, and is not called so.
    exceeded = any(is_exceeded(rate, ceilings.tolist()) for rate in frame["link_gbps"].dropna())
    lines = [("--", "raw rate" if exceeded else "ceiling", ceilings.median())]
    lines += [(":", "bare copies", frame["bare_gbps"].median())] if frame["bare_gbps"].notna().any() else []
    return [
        ax.axvline(rate, color="black", linestyle=style, label=f"{words} {digits(rate)} GB/s")
        for style, words, rate in lines
    ]


def _unit(largest: float) -> tuple[str, float]:
    return next(
        ((name, scale) for name, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if largest >= scale), ("B", 1.0)
    )
