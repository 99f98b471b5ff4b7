"""Mixtures of experts: hit rate and time per token over the budgets of a run's sweep, and time per token over the hit
rate of runs with steered routing, which ``benchmarks/experts.py`` measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from djinn.bench.records import hit_rate
from djinn.errors import ConfigError, DjinnError
from djinn.figures.bars import SPREAD
from djinn.figures.style import COLUMN_IN, GREY, LOOKS, SMALLEST_PT, explain, house_style
from djinn.figures.sweeps import over_sizes
from djinn.reading import samples
from djinn.sizes import format_bytes

_LOOKS = {"routed": LOOKS["djinn"], "coded": LOOKS["djinn:lossless"]}
_LINES = {"whole": (LOOKS["djinn:whole"], "whole layers"), "resident": (LOOKS["resident"], "resident")}
_TICKS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_PANELS = {"hit_rate": "hit rate", "token_s": "time per token (s)"}


@house_style()
def by_budget(points: pd.DataFrame) -> Figure:
    """Draw hit rate and time per token over the budgets of a sweep (see :mod:`djinn.figures.frames`).

    Where no experts were fetched as routers pick them there is no hit rate to draw.

    Raises:
        DjinnError: no records over budgets.
    """
    points = points[points["axis"] == "budget"].sort_values("size_bytes")
    if points.empty:
        raise DjinnError("no sweep records over budgets")
    columns = [column for column in _PANELS if column == "token_s" or points[column].notna().any()]
    figure = Figure(figsize=(COLUMN_IN, 0.7 + 1.3 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), 1, squeeze=False)[:, 0]
    words = f"Medians of the runs (dots). {SPREAD}"
    for ax, column in zip(panels, columns, strict=True):
        if column == "hit_rate":  # of a model that fits whole there is no pool
            over_sizes(ax, points.assign(words=points["words"].replace("", "no pool")), column)
            shares = points.groupby("size_bytes")["pool_share"].first()
            ax.plot(range(len(shares)), shares, "--", color="black")
            ax.set_ylim(-0.05, 1.05)
            words += (
                " Hit rate: picked experts that were in the pool, which is empty when a run begins. Dashed: the share "
                "of all experts that the pool holds, the rate of routers that pick evenly, once it is full. Routers "
                "of synthetic weights say nothing of trained ones."
            )
        else:
            over_sizes(ax, points, column)
        ax.set_ylabel(_PANELS[column])
    panels[-1].set_xlabel("budget")
    explain(panels[0], "Experts by budget" if len(columns) > 1 else "Time per token by budget", words)
    return figure


def read(paths: Iterable[Path]) -> pd.DataFrame:
    """Return a row per run: model, mode, budget_bytes, steer ("reuse,zipf"), hit_rate, token_s (median after the first)
    and moved_gb.

    Raises:
        ConfigError: a file without such records; says which.
    """
    rows = []
    for path in paths:
        with samples(path, "benchmarks/experts.py") as records:
            for record in records:
                if "times" not in record:  # what a traced run adds has none
                    continue
                rows.append(
                    {
                        "model": record["model"],
                        "mode": record["mode"],
                        "budget_bytes": record["budget"],
                        "steer": record["steer"] or "",
                        "hit_rate": hit_rate(record["expert_hits"], record["expert_misses"]),
                        "token_s": record["token_s"],
                        "moved_gb": record["link_bytes"] / len(record["times"]) / 1e9,
                    }
                )
    return pd.DataFrame(rows)


@house_style()
def draw(runs: pd.DataFrame) -> Figure:
    """Draw every run that was steered, a panel for each model, over time on a logarithmic axis.

    Whole layers and the resident model have no hit rate: each is a line at the median of its runs, in a band of their
    range.

    Raises:
        ConfigError: no steered runs of experts in a pool.
    """
    pooled = runs[runs["mode"].isin(list(_LOOKS)) & (runs["steer"] != "")]
    if pooled.empty:
        raise ConfigError("no steered runs of routed or coded experts: --steer 0,0 makes them")
    models = list(dict.fromkeys(pooled["model"]))
    figure = Figure(figsize=(COLUMN_IN, 0.6 + 2.1 * len(models)), layout="constrained")
    for ax, model in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
        for mode, look in _LOOKS.items():
            points = pooled[(pooled["model"] == model) & (pooled["mode"] == mode)]
            ax.plot(
                points["hit_rate"], points["token_s"], look.marker, color=look.colour, markerfacecolor="none",
                markersize=4, markeredgewidth=0.9, zorder=4, label=mode,
            )  # fmt: skip
        for mode, (look, words) in _LINES.items():
            times = runs.loc[(runs["model"] == model) & (runs["mode"] == mode), "token_s"]
            if not times.empty:
                ax.axhline(times.median(), color=look.colour, linestyle="--", linewidth=1, zorder=2)
                ax.axhspan(times.min(), times.max(), color=look.colour, alpha=0.25, linewidth=0, zorder=1)
                ax.annotate(
                    words, (0.01, times.max()), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", color=GREY, fontsize=SMALLEST_PT,
                )  # fmt: skip
        lowest, highest = ax.dataLim.intervaly
        ax.set(
            xlim=(0, 1),
            yscale="log",
            ylim=(lowest / 1.3, highest * 1.6),
            xlabel="hit rate",
            ylabel="time per token (s)",
        )
        ax.yaxis.set_minor_locator(NullLocator())
        ticks = [tick for tick in _TICKS_S if lowest / 1.3 <= tick <= highest * 1.6]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.legend(loc="upper right", bbox_to_anchor=(1, 0.85))
        own = pooled.loc[pooled["model"] == model, "budget_bytes"].unique()
        explain(ax, f"{model} in {' and '.join(format_bytes(int(size)) for size in sorted(own))}", "")
    figure.axes[0].set_label(
        "Experts fetched as routers pick them, by the hit rate: picked experts that were in the pool. Each mark is a "
        "run's median. Dashed: the median of the runs with whole layers and of the resident model, in a band of their "
        "range. Synthetic weights; routing is steered, from picking evenly to picking the same again."
    )
    return figure
