"""The picture at the top of README: time per token of every system, and the bound that the link sets.

The bound is the time that the link needs at its measured ceiling for the fewest bytes that must cross it per token:
the model's bytes beyond the budget. Coded weights are fewer bytes, so that djinn can pass it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from djinn.bench.records import Record
from djinn.bench.statistics import summary_frame
from djinn.errors import DjinnError, UnavailableError
from djinn.figures.bars import break_marks, cut_at
from djinn.figures.style import COLUMN_IN, LOOKS, PAGE_IN, SMALLEST_PT, beside, canvas, explain, figure_of, house_style

SMALL_BYTES = 10**9
"""A smaller model's times and rates mean nothing: fixed costs outweigh its copies."""
OURS = ("djinn", "djinn:lossless")
_OTHERS = "#B8B8B8"
_GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
"""Of words that stand on a line."""
_TITLE_LETTERS = 44
"""In a line of the narrow picture's title."""


def medians(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per finished system, fastest first.

    Columns:
        name: ``system`` or ``system:variant``.
        label: its display name.
        runs: how many runs finished.
        token_s: median of all times from one token to the next, seconds.
        ceiling_gbps: median of the ceilings of all GPUs' links beside the runs of all systems, 10^9 bytes/s.
        model_bytes, budget_bytes: as recorded.
        peak_device_bytes: the largest peak; NaN where it was not measured.
        bound_s: (model_bytes - budget_bytes of every GPU) / ceiling, seconds; NaN where the link is the disk, of which
            host memory may keep a part, and where only those experts cross it that routers pick.
        djinn, djinn:lossless: how many times faster that one's median is than this system's.

    Raises:
        UnavailableError: djinn has no finished run among ``records``.
    """
    frame = summary_frame(records)
    if frame.empty:
        raise UnavailableError("no records")
    frame = frame[(frame["runs"] > 0) & frame["label"].isin(LOOKS)].sort_values("token_s_median")
    times = frame.set_index("label")["token_s_median"]
    if OURS[0] not in times:
        raise UnavailableError("no finished run of djinn to compare with")
    ceilings = [each.total_ceiling_gbps for each in records]
    ceiling = pd.Series([each for each in ceilings if each is not None], dtype=float).median()
    rows = pd.DataFrame(
        {
            "name": frame["label"],
            "label": [LOOKS[name].label for name in frame["label"]],
            "runs": frame["runs"],
            "token_s": frame["token_s_median"],
            "ceiling_gbps": ceiling,
            "model_bytes": frame["model_bytes"].astype("int64"),
            "budget_bytes": frame["budget_bytes"],
            "peak_device_bytes": frame["peak_device_bytes"],
        }
    )
    bounded = any(record.link == "pcie" for record in records) and not any(record.expert_hits for record in records)
    on_devices = max(record.gpus for record in records) * rows["budget_bytes"]
    rows["bound_s"] = (rows["model_bytes"] - on_devices).clip(lower=0) / ceiling / 1e9 if bounded else float("nan")
    for ours in OURS:
        rows[ours] = rows["token_s"] / times.get(ours, float("nan"))
    return rows.reset_index(drop=True)


def rows_of(records: Sequence[Record]) -> pd.DataFrame:
    """Return :func:`medians`, or no rows where djinn has no finished run with more than one token."""
    try:
        rows = medians(records)
    except UnavailableError:
        return pd.DataFrame()
    return rows.dropna(subset=["token_s"]).reset_index(drop=True)


def about(records: Sequence[Record], rows: pd.DataFrame, date: str = "") -> str:
    """Return the words under the picture: machine, date, runs, weights, and what the bound is."""
    few, many = rows["runs"].min(), rows["runs"].max()
    counted = f"{few}" if few == many else f"{few} to {many}"
    weights = "synthetic weights" if records[0].synthetic else "weights of a checkpoint"
    when = f", {date}" if date else ""
    small = " A smoke run: these times mean nothing." if rows["model_bytes"].max() < SMALL_BYTES else ""
    bound = (
        f" Bound: the time that the link needs at its ceiling, {rows['ceiling_gbps'].iloc[0]:.3g} GB/s, for the bytes "
        "beyond the budget."
        if rows["bound_s"].iloc[0] > 0
        else ""
    )
    return (
        f"{records[0].device_name}{when}: median of {counted} runs, batch {records[0].batch}, {weights}.{bound}{small}"
    )


def faster(ratio: float) -> str:
    """Return a speedup in words: "1.3x faster", from 10 on "12x faster", below 1 "1.1x slower"."""
    times, word = (ratio, "faster") if ratio >= 1 else (1 / ratio, "slower")
    return f"{times:.0f}x {word}" if times >= 10 else f"{times:.1f}x {word}"


@house_style()
def draw(rows: pd.DataFrame, title: str, caption: str, ax: Axes | None = None, *, narrow: bool = False) -> Figure:
    """Draw ``rows`` (see :func:`medians`): a bar for each system, its time, and how much faster djinn is.

    Args:
        rows: systems of one run, fastest first.
        title: what is compared.
        caption: machine, runs and weights (see :func:`about`).
        ax: an axes to draw into instead of a figure of its own.
        narrow: as wide as one column, or a phone: words stand above the bars instead of beside them.

    Raises:
        DjinnError: no rows.
    """
    if rows.empty:
        raise DjinnError("no finished run of djinn with more than one token")
    thick = 0.36 if narrow else 0.7
    ax = canvas(ax, *((1.4 + 0.5 * len(rows), COLUMN_IN) if narrow else (0.9 + 0.25 * len(rows), PAGE_IN)))
    bound, longest = rows["bound_s"].iloc[0], cut_at(rows["token_s"].tolist())
    for row, system in enumerate(rows.to_dict("records")):
        name, seconds = str(system["name"]), float(system["token_s"])
        ours, drawn = name in OURS, min(seconds, longest)
        ax.barh(row, drawn, height=thick, color=LOOKS[name].colour if ours else _OTHERS, linewidth=0)
        if seconds > longest:
            break_marks(ax, row, longest)
        ax.annotate(
            f"{seconds:#.3g} s",
            (drawn, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold" if ours else "normal",
            zorder=6,
            bbox=_GROUND,
        )
        gains = [] if ours else [f"{LOOKS[each].label} {faster(system[each])}" for each in _measured(system)]
        if narrow:
            _above(ax, row - thick / 2, "\n".join([str(system["label"]), *filter(None, ["; ".join(gains)])]))
        elif gains:
            beside(ax, "; ".join(gains), row)
    if bound > 0:
        ax.axvline(bound, color="black", linestyle="--", zorder=5)
        late = bound > 0.6 * rows["token_s"].clip(upper=longest).max()
        words = f"the link's bound{'' if narrow else ' for raw weights'}, {bound:#.3g} s"
        ax.annotate(
            words, (bound, len(rows) - 0.2), xytext=(-4 if late else 4, 0), textcoords="offset points", va="center",
            ha="right" if late else "left", fontsize=SMALLEST_PT,
        )  # fmt: skip
    ax.set_yticks([] if narrow else range(len(rows)), [] if narrow else list(rows["label"]))
    ax.set_ylim(len(rows) + 0.1, -0.8 if narrow else -0.5)
    ax.margins(x=0.18 if narrow else 0.12)  # room for the numbers
    ax.grid(False, axis="y")
    ax.set_xlabel("time per token (s)")
    explain(ax, textwrap.fill(title, _TITLE_LETTERS) if narrow else title, caption)
    return figure_of(ax)


def _above(ax: Axes, row: float, words: str) -> None:
    """Write ``words`` above a bar, from the left edge of the axes on; they cover the line of the bound."""
    ax.annotate(
        words, (0, row), xytext=(2, 1.5), textcoords="offset points", va="bottom", fontsize=SMALLEST_PT, zorder=6,
        linespacing=1.05, bbox=_GROUND,
    )  # fmt: skip


def _measured(system: Mapping[Any, Any]) -> list[str]:
    return [each for each in OURS if pd.notna(system[each])]
