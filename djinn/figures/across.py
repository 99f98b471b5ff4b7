"""Figures of several runs: what was predicted against what was measured, and systems over models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from pydantic import BaseModel, ConfigDict, Field

from djinn.bench.records import Record
from djinn.errors import DjinnError, UnavailableError
from djinn.figures import frames, headline
from djinn.figures.plots import require
from djinn.figures.style import LIMITS, canvas, explain, figure_of, house_style, look_of
from djinn.planning.prediction import Limit
from djinn.reading import read_json
from djinn.sizes import format_bytes

_WITHIN = 0.1
"""How far from what was measured a prediction may lie to be called right."""
_FEWEST = 3
"""Cases that make a figure."""
_EMPTY = 0.2
"""Systems that leave more than this share of their budget empty are named, since memory is not equal then."""
_MARKS = {"disk": "s", "link": "o", "compute": "^", "host": "v"}
"""Of what limits a case, as the prediction says."""


class Prediction(BaseModel):
    """A case of ``predictions.json``, which ``benchmarks/predictions.py`` writes; seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    case: str
    limit: Limit
    ttft_s: float = Field(gt=0)
    predicted_ttft_s: float = Field(gt=0)
    token_s: float = Field(gt=0)
    predicted_token_s: float = Field(gt=0)


def read_predictions(folders: Iterable[Path]) -> pd.DataFrame:
    """Return machine (the folder's name), case, limit, what ("first token", "per token"), measured_s and predicted_s.

    Raises:
        ConfigError: a damaged file.
    """
    rows = [
        {"machine": folder.name, "case": each.case, "limit": each.limit, "what": what}
        | {"measured_s": getattr(each, field), "predicted_s": getattr(each, f"predicted_{field}")}
        for folder in folders
        for path in (folder / "predictions.json", folder / "results" / "predictions.json")
        if path.is_file()
        for each in read_json(path, list[Prediction])
        for what, field in (("first token", "ttft_s"), ("per token", "token_s"))
    ]
    return pd.DataFrame(rows, columns=["machine", "case", "limit", "what", "measured_s", "predicted_s"])


@house_style()
def predictions(rows: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Draw predicted over measured times, by what was measured (see :func:`read_predictions`), and a band of 10%."""
    require(rows, "no predictions that were tested")
    if (cases := len(rows[["machine", "case"]].drop_duplicates())) < _FEWEST:
        raise DjinnError(f"{cases} tested prediction{'s' * (cases > 1)}: fewer than {_FEWEST} make no figure")
    ax = canvas(ax, 2.4)
    ratios = rows["predicted_s"] / rows["measured_s"]
    ax.axhspan(1 - _WITHIN, 1 + _WITHIN, color="black", alpha=0.12, linewidth=0)
    ax.axhline(1, color="black", linewidth=0.8)
    for (limit, what), own in rows.groupby(["limit", "what"], sort=False):
        colour, marker = LIMITS[str(limit)], _MARKS[str(limit)]
        face = "white" if what == "first token" else colour
        ax.plot(own["measured_s"], ratios[own.index], marker, mfc=face, mec=colour, markersize=4.5, linestyle="")
    ax.set(xscale="log", ylim=(0, max(1.5, 1.1 * float(ratios.max()))))
    _plain_log(ax)
    ax.set(xlabel="measured (s)", ylabel="predicted / measured")
    key: list[Line2D | Patch] = [
        Line2D([], [], linestyle="", marker=_MARKS[limit], color=LIMITS[limit], label=limit)
        for limit in dict.fromkeys(map(str, rows["limit"]))
    ]
    key.append(Patch(color="black", alpha=0.12, label="within 10%"))
    key += [
        Line2D([], [], linestyle="", marker="o", color="black", mfc=face, label=words)
        for face, words in (("black", "per token"), ("white", "first token"))
    ]
    right = ((ratios - 1).abs() <= _WITHIN).sum()
    explain(
        ax,
        "Predicted against measured",
        f"What djinn plan predicted from measured rates, over what then happened: {right} of {len(rows)} times lie "
        f"within {_WITHIN:.0%} (grey). Marks say what limits a case, as predicted.",
        key,
        columns=3,
    )
    return figure_of(ax)


def _plain_log(ax: Axes) -> None:
    """Write numbers on a logarithmic axis as people do."""
    ax.xaxis.set_major_locator(LogLocator(numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def by_model(runs: Sequence[Sequence[Record]]) -> pd.DataFrame:
    """Return the systems of several runs beside djinn, smallest model first; runs without both are left out.

    Of several runs of one model the last one counts.

    Columns: model, model_bytes, name, budget_bytes, peak_device_bytes, token_s, and djinn: how many times longer than
    djinn.
    """
    found = {}
    for records in runs:
        try:
            rows = headline.medians(records)
        except UnavailableError:
            continue
        if not rows["name"].isin(headline.OURS).all():
            model = records[0].model.removeprefix("synthetic:")
            found[model] = rows.assign(model=model)
    columns = ["model", "model_bytes", "name", "budget_bytes", "peak_device_bytes", "token_s", "djinn"]
    if not found:
        return pd.DataFrame([], columns=columns)
    return pd.concat(found.values())[columns].sort_values("model_bytes", kind="stable")


def _left_empty(rows: pd.DataFrame) -> pd.Series:
    return rows["peak_device_bytes"] < (1 - _EMPTY) * rows["budget_bytes"]


def unfilled(rows: pd.DataFrame) -> str:
    """Return in words which systems (see :func:`by_model`) left much of their budget empty; nothing where none did."""
    parts = []
    for model, own in rows[_left_empty(rows)].groupby("model", sort=False):
        peaks = zip(own["name"], own["peak_device_bytes"], strict=True)
        took = " and ".join(f"{look_of(name).label} {format_bytes(int(peak))}" for name, peak in peaks)
        parts.append(f"{took} of {format_bytes(int(own['budget_bytes'].iloc[0]))} ({model})")
    words = f"Memory is not equal. These systems took less than {1 - _EMPTY:.0%} of their budget"
    return f"{words}: {'; '.join(parts)}." if parts else ""


@house_style()
def models(rows: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Draw how many times longer than djinn each system takes per token, a row for each model (see by_model).

    A mark is hollow where its system left much of its budget empty (see :func:`unfilled`).
    """
    require(rows, "no runs of djinn beside another system")
    order = list(dict.fromkeys(rows["model"]))
    ax = canvas(ax, 1.4 + 0.4 * len(order))
    ax.axvline(1, color="black", linewidth=0.8, zorder=1)
    names, empty = frames.names(rows), _left_empty(rows)
    mark: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0.9, "linestyle": ""}
    for place, (model, name, longer, hollow) in enumerate(
        zip(rows["model"], rows["name"], rows["djinn"], empty, strict=True)
    ):
        look = look_of(name)
        # Systems of a model that are nearly as fast stand below each other, so that no mark hides another.
        height = order.index(model) + 0.09 * (place % 3 - 1)
        ax.plot(longer, height, look.marker, mec=look.colour, mfc="white" if hollow else look.colour, zorder=3, **mark)
    key = [
        Line2D([], [], marker=look.marker, color=look.colour, label=look.label, **mark) for look in map(look_of, names)
    ]
    if empty.any():
        key.append(Line2D([], [], marker="o", mec="black", mfc="white", label="budget not filled", **mark))
    ax.set_xscale("log")
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _near(tick, rows["djinn"])]
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    sizes = rows.groupby("model", sort=False)["model_bytes"].first()
    ax.set_yticks(range(len(order)), [f"{model}\n{sizes[model] / 1e9:.3g} GB" for model in order], linespacing=1)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel("time per token over djinn's")
    words = "Median time per token of each system over djinn's in the same run: right of the line, djinn is faster. "
    words += "Each model has a machine and a budget of its own; docs/results.md has them. "
    words += unfilled(rows)
    explain(ax, "Time per token over djinn's", words, key)
    return figure_of(ax)


def _near(tick: float, values: pd.Series) -> bool:
    return bool(values.min() / 2 <= tick <= values.max() * 2)
