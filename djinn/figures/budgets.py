"""Time per token against the budget: what plans predict, and what djinn and other systems were measured to take."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from djinn.bench.run import Run
from djinn.errors import DjinnError
from djinn.figures import frames
from djinn.figures.bars import cut_at, digits
from djinn.figures.headline import SMALL_BYTES
from djinn.figures.plots import require
from djinn.figures.style import GREY, SMALLEST_PT, beyond, canvas, explain, figure_of, house_style, look_of
from djinn.names import Coding

_CODINGS: dict[str, Coding] = {"djinn": "none", "djinn:lossless": "lossless"}


def predicted(run: Run) -> pd.DataFrame:
    """Return what djinn's plans come to for the profile of a run with the rates that its certification measured.

    Columns: name ("djinn" or "djinn:lossless"), budget_bytes, token_s. Only what the run has finished is predicted;
    nothing for a model of less than a gigabyte, and without a certification.

    Raises:
        DjinnError: the model cannot be planned.
    """
    from djinn.engine.forecast import forecast  # it imports torch, which figures of records alone do without
    from djinn.figures.forecast import budgets_frame

    rows = [pd.DataFrame([], columns=["name", "budget_bytes", "token_s"])]
    found = run.certification
    finished = {name for name, row in frames.runs(run.baselines).groupby("name") if row["token_s"].notna().any()}
    large = any((record.model_bytes or 0) >= SMALL_BYTES for record in run.baselines)
    for name, coding in _CODINGS.items():
        if found is None or name not in finished or not large:
            continue
        profile = run.profile
        told = forecast(
            profile.model, budget=profile.budget, device=profile.device, rates=found.rates, ring=profile.ring,
            host_memory=profile.host_memory, free=found.machine.ram_bytes, batch=profile.batch,
            prompt_tokens=profile.prompt_tokens, new_tokens=profile.new_tokens, coding=coding, gpus=profile.gpus,
        )  # fmt: skip
        if told.budgets:
            rows.append(budgets_frame(told).assign(name=name)[["name", "budget_bytes", "token_s"]])
    return pd.concat([each for each in rows if len(each)] or rows, ignore_index=True)


def measured(run: Run) -> pd.DataFrame:
    """Return name, budget_bytes and token_s (the median of all runs) of every system and budget that has finished."""
    points = frames.sweep(run.sweep)
    rows = pd.concat([frames.runs(run.baselines), points[points["axis"] == "budget"]])
    return rows.groupby(["name", "budget_bytes"], sort=False)["token_s"].median().dropna().reset_index()


def gpu_bytes(run: Run) -> int | None:
    """Return the memory of the GPU that a run was measured on; None without one, and where nobody knows."""
    on_gpu = run.has_profile and run.profile.device == "cuda"
    return run.machine.gpu_bytes if on_gpu and run.machine else None


def model_of(run: Run) -> str:
    """Return what a run's model is called in a title; nothing where there is no profile."""
    return run.profile.model.removeprefix("synthetic:") if run.has_profile else ""


@house_style()
def draw(
    lines: pd.DataFrame, points: pd.DataFrame, memory_bytes: int | None = None, model: str = "", ax: Axes | None = None
) -> Figure:
    """Draw predicted ``lines`` and measured ``points`` (see :func:`predicted` and :func:`measured`).

    Budgets beyond ``memory_bytes``, the memory of the GPU where there is one, are shaded. The title names ``model``.

    Raises:
        DjinnError: no points, or neither a line nor a second budget: that is no figure.
    """
    require(points, "no baseline records")
    if lines.empty and points["budget_bytes"].nunique() < 2:
        raise DjinnError("one budget alone, and no predictions")
    ax = canvas(ax, 3.4)
    highest = min(cut_at(points["token_s"].tolist()), 1.1 * max(points["token_s"].max(), lines["token_s"].max()))
    key: list[Line2D] = []
    for name, own in lines.groupby("name", sort=False):
        look = look_of(str(name))
        key += ax.plot(own["budget_bytes"] / 1e9, own["token_s"], color=look.colour, label=f"{look.label}, predicted")
    for name, own in points.groupby("name", sort=False):
        look, shown = look_of(str(name)), own[own["token_s"] <= highest]
        key += ax.plot(
            shown["budget_bytes"] / 1e9, shown["token_s"], look.marker, color=look.colour, markersize=5,
            markeredgecolor="black", markeredgewidth=0.4, zorder=4, label=look.label,
        )  # fmt: skip
        for budget, token_s in own.loc[own["token_s"] > highest, ["budget_bytes", "token_s"]].to_numpy():
            ax.annotate(
                f"{look.label}: {digits(token_s)} s", (budget / 1e9, highest), xytext=(4, -4), color=GREY,
                textcoords="offset points", ha="left", va="top", fontsize=SMALLEST_PT, style="italic",
            )  # fmt: skip
    ax.set(xlabel="budget (GB)", ylabel="time per token (s)", xlim=(0, None), ylim=(0, highest))
    shaded = beyond(ax, memory_bytes)
    words = "Lines: what djinn's plans are predicted to take with the rates that were measured on this machine; steep "
    words += "where weights do not fit host memory either and come from disk, flat once all of them are resident. "
    words += "Marks: medians of what was measured, at the budget that a system was given, whatever it took of it."
    if shaded:
        words += " Shaded: budgets beyond the GPU's memory."
    explain(ax, f"{model}: time per token by budget" if model else "Time per token by budget", words, [*key, *shaded])
    return figure_of(ax)
