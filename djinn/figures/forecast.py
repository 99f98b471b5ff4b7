"""A forecast as a picture: time per token against budget, and where every unit of the chosen plan lies."""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from djinn.errors import UnavailableError
from djinn.figures.style import GREY, LIMITS, PAGE_IN, beyond, explain, house_style
from djinn.planning.outlook import Forecast
from djinn.planning.placement import Plan, Tier
from djinn.sizes import format_bytes

COLOURS = {Tier.RESIDENT: "#0072B2", Tier.PINNED: "#E69F00", Tier.DISK: "#D55E00"}
_PLACES = {Tier.RESIDENT: "resident", Tier.PINNED: "host memory", Tier.DISK: "disk"}


def budgets_frame(forecast: Forecast) -> pd.DataFrame:
    """Return a row per budget: budget_bytes, token_s, limit, resident_bytes, pinned_bytes, disk_bytes, chosen."""
    return pd.DataFrame(
        {
            "budget_bytes": choice.budget,
            "token_s": choice.predicted.token_s,
            "limit": choice.predicted.limit,
            "resident_bytes": choice.plan.resident_bytes,
            "pinned_bytes": choice.plan.pinned_bytes,
            "disk_bytes": choice.plan.disk_bytes,
            "chosen": choice.budget == forecast.plan.budget,
        }
        for choice in forecast.budgets
    )


@house_style()
def draw(forecast: Forecast, title: str, gpu_bytes: int | None = None) -> Figure:
    """Draw a forecast; budgets beyond ``gpu_bytes``, the memory of the GPU where that is known, are shaded.

    Raises:
        UnavailableError: nothing was predicted.
    """
    if forecast.predicted is None:
        raise UnavailableError(f"no figure: {forecast.unknown}")
    figure = Figure(figsize=(PAGE_IN, 3.1), layout="constrained")
    curve, strip = figure.subplots(2, 1, height_ratios=[5, 1])
    frame = budgets_frame(forecast)
    curve.plot(frame["budget_bytes"] / 1e9, frame["token_s"], color="#BBBBBB")
    key: list[Artist] = []
    for limit, points in frame.groupby("limit", sort=False):
        look = {"color": LIMITS[str(limit)], "label": f"limited by {limit}", "markersize": 4, "linestyle": ""}
        key += curve.plot(points["budget_bytes"] / 1e9, points["token_s"], marker="o", **look)
    x, y = forecast.plan.budget / 1e9, forecast.predicted.token_s
    chosen = f"chosen: {format_bytes(forecast.plan.budget)}, {y:.3g} s"
    key += curve.plot(
        [x], [y], marker="o", mfc="white", mec="black", markersize=7, linestyle="", zorder=1.9, label=chosen
    )
    curve.set(xlabel="budget (GB)", ylabel="time per token (s)", xlim=(0, None), ylim=(0, None))
    key += beyond(curve, gpu_bytes)
    explain(
        curve,
        title,
        "Time per token as predicted from measured rates, and what limits it: the disk where weights do not fit host "
        "memory, the link where they stream, compute once all are resident. Shaded: budgets beyond the GPU's memory, "
        "where that is known. Below: the units of the chosen plan in execution order.",
        key,
        columns=len(key),
    )
    _units(strip, forecast.plan)
    return figure


def _units(ax: Axes, plan: Plan) -> None:
    """Draw the units as one bar, each as wide as its bytes, coloured by where it lies."""
    begin = 0.0
    named: set[Tier] = set()
    for unit, tier in zip(plan.units, plan.tiers, strict=True):
        width = unit.raw_bytes / 1e9
        label = "" if tier in named else f"{_PLACES[tier]} {format_bytes(sum(u.raw_bytes for u in plan.at(tier)))}"
        ax.barh(0, width, left=begin, color=COLOURS[tier], linewidth=0, label=label)
        named.add(tier)
        begin += width
    ax.set(xlim=(0, begin), yticks=[], xlabel="model (GB of weights, in execution order)")
    ax.xaxis.set_major_locator(MaxNLocator(8))
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    ax.legend(ncols=len(named), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
