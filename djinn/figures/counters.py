"""What GPUs themselves count on their links, over the longest stretch of work in a trace."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from djinn.figures.bars import digits
from djinn.figures.plots import require
from djinn.figures.style import GREY, PAGE_IN, canvas, explain, figure_of, house_style

_GAP_S = 1.0
"""Between samples of the counters that belong to one stretch of work."""
_CAPTION = (
    "Bytes on the link as the GPU counts them, over the longest stretch of the sweep in which it is busy. They are "
    "bytes of the protocol, headers and requests included: so they may exceed the ceiling, which counts bytes of "
    "weights alone, and there is some traffic back. They have a clock of their own."
)


@house_style()
def counters(pcie: pd.DataFrame, ceilings_gbps: Sequence[float] = (), ax: Axes | None = None) -> Figure:
    """Draw what each GPU counts on its link, in both directions, over the longest stretch of work in the trace.

    ``ceilings_gbps`` are the raw rates of each GPU's link. ``ax`` takes the first GPU alone.
    """
    require(pcie, "no trace of the GPU's link")
    gpus = sorted(pcie["gpu"].unique()) if ax is None else [pcie["gpu"].min()]
    alone = len(gpus) == 1
    ax = canvas(ax, 0.9 + 1.1 * len(gpus), PAGE_IN)
    figure, panels = figure_of(ax), [ax]
    if not alone:
        figure.clear()
        panels = list(figure.subplots(len(gpus), sharex=True, sharey=True))
    stretch = longest_stretch(pcie)
    for gpu, panel in zip(gpus, panels, strict=True):
        handles = _counted(panel, pcie[pcie["gpu"] == gpu], stretch)
        if gpu < len(ceilings_gbps):
            words = f"ceiling {digits(ceilings_gbps[gpu])} GB/s" if alone else "ceiling of its link"
            handles.append(panel.axhline(ceilings_gbps[gpu], color=GREY, linestyle="--", label=words))
        panel.set(ylabel="rate (GB/s)" if alone else f"GPU {gpu} (GB/s)", ylim=(0, None))
        if panel is panels[0]:
            title = "The GPU's own counters of its link" if alone else "The GPUs' own counters of their links"
            explain(panel, title, _CAPTION, handles, columns=len(handles))
        else:
            explain(panel, "", "")
    panels[-1].set(xlabel="time (s)")
    return figure


def _counted(ax: Axes, pcie: pd.DataFrame, stretch: tuple[float, float]) -> list[Line2D]:
    """Draw one GPU's counters within a stretch of time; return a line for each direction and source."""
    begin, end = stretch
    shown = pcie[pcie["time_s"].between(begin - _GAP_S, end + _GAP_S)]
    handles = []
    for source, rows in shown.groupby("source"):
        line = "-" if source == "nvml" else ":"
        for column, colour, words in (("rx_gbps", "black", "to the GPU"), ("tx_gbps", "#999999", "from it")):
            label = f"{words} ({source})"
            handles += ax.plot(rows["time_s"] - begin, rows[column], line, color=colour, linewidth=0.8, label=label)
    return handles


def longest_stretch(pcie: pd.DataFrame) -> tuple[float, float]:
    """Return begin and end, seconds, of the longest time in which the link carries more than half of its most.

    Samples less than a second apart belong together.
    """
    busy = pcie.loc[pcie["rx_gbps"] > pcie["rx_gbps"].max() / 2, "time_s"].sort_values()
    if busy.empty:
        return float(pcie["time_s"].min()), float(pcie["time_s"].max())
    stretch = (busy.diff() > _GAP_S).cumsum()
    bounds = busy.groupby(stretch).agg(["min", "max"])
    first, last = bounds.loc[(bounds["max"] - bounds["min"]).idxmax()]
    return float(first), float(last)
