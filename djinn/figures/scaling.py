"""Time per token against the number of GPUs that hold the model together, from the records of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from djinn.bench.records import Record, system_label
from djinn.errors import DjinnError
from djinn.figures.style import LOOKS, canvas, explain, figure_of, house_style

_SAME = ("model", "budget_bytes", "prompt_tokens", "batch")
"""What runs have to have in common to be drawn together. A budget is each GPU's."""


def by_gpus(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per system and number of GPUs with finished runs, in order.

    Columns:
        name: ``system`` or ``system:variant``.
        gpus: how many held the model.
        token_s: median of all times from one token to the next, seconds.
        low_s, high_s: the shortest and the longest of them.

    Raises:
        DjinnError: runs of another model, budget, prompt or batch among them, or none with a second token.
    """
    times: dict[tuple[int, int], list[float]] = {}
    order = list(LOOKS)
    finished = [record for record in records if record.status == "ok" and record.per_token_s]
    for field in _SAME:
        if len(found := {str(getattr(record, field)) for record in finished}) > 1:
            raise DjinnError(f"runs that differ in {field} are not drawn together: {', '.join(sorted(found))}")
    for record in finished:
        times.setdefault((order.index(system_label(record)), record.gpus), []).extend(record.per_token_s)
    if not times:
        raise DjinnError("no finished run with more than one token")
    return pd.DataFrame(
        [
            {
                "name": order[system],
                "gpus": gpus,
                "token_s": statistics.median(samples),
                "low_s": min(samples),
                "high_s": max(samples),
            }
            for (system, gpus), samples in sorted(times.items())
        ]
    )


@house_style()
def draw(rows: pd.DataFrame) -> Figure:
    """Draw ``rows`` (see :func:`by_gpus`): a line for each system, and djinn's first point divided by the GPUs."""
    ax = canvas(None, 2.6)
    for name, points in rows.groupby("name", sort=False):
        look = LOOKS[str(name)]
        reach = [points["token_s"] - points["low_s"], points["high_s"] - points["token_s"]]
        ax.errorbar(
            points["gpus"], points["token_s"], yerr=reach, color=look.colour, marker=look.marker, markersize=4,
            capsize=2, label=look.label,
        )  # fmt: skip
    ours = rows[rows["name"] == "djinn"]
    if len(ours) > 1:
        first = ours.iloc[0]
        ax.plot(ours["gpus"], first["token_s"] * first["gpus"] / ours["gpus"], "--", color="black", linewidth=0.8)
    ax.set(xlabel="GPUs", ylabel="time per token (s)", ylim=(0, None), xticks=sorted(set(rows["gpus"])))
    ax.legend()
    words = "Median of all tokens after the first; bars reach from the shortest to the longest. A budget is each GPU's."
    if len(ours) > 1:
        words += " Dashed: djinn's first point divided by the GPUs; residents add up, so that it can pass this."
    explain(ax, "Time per token by GPUs", words)
    return figure_of(ax)
