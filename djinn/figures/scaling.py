"""Time per token against the number of GPUs that hold the model together: from the records of several runs, and, with
what their links carried, from samples of ``benchmarks/ranks.py``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from djinn.bench.records import Record, system_label
from djinn.errors import DjinnError
from djinn.figures.style import COLUMN_IN, LOOKS, canvas, explain, figure_of, house_style
from djinn.reading import samples

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


def read_links(paths: Iterable[Path]) -> pd.DataFrame:
    """Return a row per run of ``benchmarks/ranks.py``; of each file all runs are of one coding.

    Columns:
        model: its name.
        gpus: how many held the model.
        run: its number; the first one after loading meets what only a first run compiles and allocates.
        token_s: median of the times from one token to the next, seconds.
        link_gbps: what all links carried together over the run, 10^9 bytes/s.
        slowest_gbps: the least that one of them carried.
        bare_gbps: what all carried in copies of the same bytes, nothing computed: the mean of before and after.
        bound_s: the longest time, over GPUs, of their streamed bytes at that rate.

    Raises:
        ConfigError: a file without such records; says which.
    """
    rows = []
    for path in paths:
        with samples(path, "benchmarks/ranks.py") as records:
            bare = [records[0]["bare_gbps_before"], records[-1]["bare_gbps_after"]]
            by_gpu = [statistics.mean(rates) for rates in zip(*bare, strict=True)]
            for record in records:
                carried = [each["link_bytes"] / sum(record["times"]) / 1e9 for each in record["by_rank"]]
                streamed = zip(record["pinned_bytes"], by_gpu, strict=True)
                rows.append(
                    {
                        "model": record["model"],
                        "gpus": record["ranks"],
                        "run": record["run"],
                        "token_s": statistics.median(record["times"][1:]),
                        "link_gbps": sum(carried),
                        "slowest_gbps": min(carried),
                        "bare_gbps": sum(by_gpu),
                        "bound_s": max(nbytes / rate / 1e9 for nbytes, rate in streamed),
                    }
                )
    return pd.DataFrame(rows)


@house_style()
def links(runs: pd.DataFrame) -> Figure:
    """Draw ``runs`` (see :func:`read_links`): what all links carry, and the time per token, each with its bound."""
    figure = Figure(figsize=(COLUMN_IN, 3.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    look, bounds = LOOKS["djinn"], runs.groupby("gpus")[["bare_gbps", "bound_s"]].mean()
    for ax, column in ((upper, "bare_gbps"), (lower, "bound_s")):
        ax.plot(bounds.index, bounds[column], "--", color="black", linewidth=0.8, zorder=2, label="bare copies")
    first = runs["run"] == 0
    # First runs stand left of the others, so that no mark hides another.
    for chosen, face, aside, words in ((~first, look.colour, 0.05, "later run"), (first, "white", -0.05, "first run")):
        mark = {"color": look.colour, "markerfacecolor": face, "markersize": 4, "linestyle": "", "zorder": 4}
        for ax, column in ((upper, "link_gbps"), (lower, "token_s")):
            ax.plot(runs["gpus"][chosen] + aside, runs[column][chosen], marker=look.marker, label=words, **mark)
    several = ~first & (runs["gpus"] > 1)  # of one link the slowest is all
    upper.plot(runs["gpus"][several], runs["slowest_gbps"][several], "_", color=look.colour, label="its slowest link")
    upper.set(ylabel="all links (GB/s)", ylim=(0, None))
    lower.set(xlabel="GPUs", ylabel="time per token (s)", ylim=(0, None), xticks=sorted(set(runs["gpus"])))
    explain(
        upper,
        f"{' and '.join(dict.fromkeys(runs['model']))} over one link per GPU",
        "Each circle is a run, hollow the first one after loading; its time is the median of its tokens. Short dashes: "
        "the link that carried least, where there are several. Dashed line: copies of the same bytes over all links at "
        "once, nothing computed, and what a token takes at that rate.",
        upper.get_lines(),
    )
    return figure
