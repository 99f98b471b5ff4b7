"""What a run answers: sentences and a small table, computed from its records, for its page and its notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from djinn.bench.records import Record, system_label
from djinn.bench.statistics import summary_frame, tokens_agree
from djinn.figures import frames, headline
from djinn.figures.bars import digits
from djinn.figures.headline import SMALL_BYTES
from djinn.figures.style import display_name
from djinn.profiles import Profile
from djinn.sizes import format_bytes

_OURS, _CODED = headline.OURS
_NAMED = 2
"""Other systems that the answer names, the fastest ones."""


def answer(records: Sequence[Record]) -> str:
    """Return what the comparison shows, in a sentence; or why it shows nothing."""
    rows = headline.rows_of(records)
    if rows.empty:
        ours = [record for record in records if system_label(record) == _OURS]
        if not ours:
            return "djinn has not run here yet."
        last = ours[-1]
        return "djinn generated one token alone." if last.status == "ok" else f"djinn did not finish: {last.reason}."
    model_bytes = int(rows["model_bytes"].iloc[0])
    if model_bytes < SMALL_BYTES:
        return smoke(model_bytes)
    seconds = dict(zip(rows["name"], rows["token_s"], strict=True))
    peers = rows[~rows["name"].isin([*headline.OURS, "djinn:whole", "resident"])].head(_NAMED).to_dict("records")
    text = f"djinn takes {digits(seconds[_OURS])} s per token"
    if peers:
        text += ": " + _and([f"{headline.faster(row[_OURS])} than {row['label']}" for row in peers])
    if _CODED in seconds:
        text += f"; with weights coded without loss {digits(seconds[_CODED])} s"
        text += f": {_and([headline.faster(row[_CODED]) for row in peers])}" if peers else ""
    return f"{text}."


def beside(records: Sequence[Record]) -> str:
    """Return what belongs to the answer: memory, the resident model where it fits, tokens; nothing without djinn."""
    rows = headline.rows_of(records)
    if rows.empty:
        return ""
    text = ""
    peaks = [record.peak_device_bytes for record in records if system_label(record) == _OURS]
    if (model_bytes := int(rows["model_bytes"].iloc[0])) >= SMALL_BYTES and all(peaks):
        budget = format_bytes(int(rows["budget_bytes"].iloc[0]))
        peak = format_bytes(max(peak for peak in peaks if peak))
        text += f"The model has {format_bytes(model_bytes)}; djinn took {peak} of its {budget} of device memory. "
    resident = rows.loc[rows["name"] == "resident", "token_s"]
    if len(resident):
        text += f"Resident, the model takes {digits(float(resident.iloc[0]))} s per token: it fits this machine. "
    return text + _tokens(records)


def smoke(model_bytes: int | None = None) -> str:
    """Return what a run of a small model can mean; ``model_bytes`` where its size is known."""
    size = "only megabytes" if model_bytes is None else format_bytes(model_bytes)
    return (
        f"This is a smoke run: its model has {size}, so that fixed costs outweigh the copies. It shows that everything "
        "runs and whether tokens agree; its times and rates mean nothing."
    )


def meaning(profile: Profile) -> str:
    """Return what to make of a run of a profile, before it has any records."""
    if profile.budget < SMALL_BYTES / 10:
        return smoke()
    weights = " All weights are synthetic: sizes and times are real, texts are not." if profile.synthetic else ""
    link = "the disk" if profile.device == "cpu" else "PCIe"
    return f"The link that weights cross in this run is {link}.{weights}"


def best_rate(records: Sequence[Record]) -> str:
    """Return what a sweep came to, in a sentence: the range of its points' shares of the ceiling."""
    points = frames.sweep(list(records))
    swept = points[points["axis"].isin(["chunk", "ring"])].dropna(subset=["link_utilisation"])
    if swept.empty:
        return "No point of the sweep over chunks and rings finished."
    if points["model_bytes"].max() < SMALL_BYTES:
        return smoke(int(points["model_bytes"].max()))
    shares = swept.groupby(["axis", "size_bytes"])["link_utilisation"].median()
    low, high = shares.min(), shares.max()
    return (
        f"Over {len(shares)} sizes of chunk and ring the link carried {low:.0%} to {high:.0%} of its ceiling "
        f"(medians): {'neither needs tuning here.' if high - low < 0.1 * high else 'their choice matters here.'}"
    )


@dataclass(frozen=True)
class Cell:
    """A cell of the table of answers; ``best`` where no other system's number is better."""

    column: str
    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A system's line in it: its cells, or why it has none."""

    system: str
    cells: tuple[Cell, ...]
    reason: str = ""


def lines(records: Sequence[Record], systems: Sequence[str]) -> list[Line]:
    """Return a line per system: time per token, speedups, first token, share of the ceiling, memory, tokens."""
    records = list(records)
    rows = {str(row["label"]): row for row in summary_frame(records).to_dict("records")}
    ours = {name: rows[name]["token_s_median"] for name in headline.OURS if rows.get(name, {}).get("runs")}
    peers = [name for name, row in rows.items() if row["runs"] and name not in headline.OURS]
    ours = {name: seconds for name, seconds in ours.items() if seconds > 0 and peers}
    agree = tokens_agree(records)
    finished = [row for row in rows.values() if row["runs"]]
    times = ("token_s_median", "ttft_s_median")
    fastest = {column: min((row[column] for row in finished), default=0) for column in times}
    found = []
    for name in dict.fromkeys([*systems, *rows]):
        row = rows.get(name)
        if row is None or not row["runs"]:
            reason = f"{row['status']}: {row['reason']}" if row is not None else frames.NOT_RUN
            found.append(Line(display_name(name), (), reason))
            continue
        cells = [
            _seconds("time per token", row, "token_s_median", fastest),
            *(Cell(f"{display_name(our)} is", _faster(name, row, seconds)) for our, seconds in ours.items()),
            _seconds("first token", row, "ttft_s_median", fastest),
            Cell("of the link's ceiling", _share(row)),
            Cell("peak device memory", _size(row["peak_device_bytes"])),
            Cell("same tokens", {True: "yes", False: "NO", None: "nothing to compare"}[agree.get(name)]),
        ]
        found.append(Line(display_name(name), tuple(cells)))
    return found


def _tokens(records: Sequence[Record]) -> str:
    return {
        True: "Its tokens are those of the systems beside it.",
        False: "Its tokens are NOT those of the systems beside it.",
        None: "No other system finished to compare its tokens with.",
    }[tokens_agree(list(records)).get(_OURS)]


def _seconds(column: str, row: Mapping[Any, Any], measure: str, fastest: Mapping[str, float]) -> Cell:
    value = row[measure]
    return Cell(column, "" if math.isnan(value) else f"{digits(value)} s", best=value == fastest[measure])


def _faster(name: str, row: Mapping[Any, Any], seconds: float) -> str:
    own = row["token_s_median"]
    return "" if name in headline.OURS or math.isnan(own) else headline.faster(own / seconds)


def _share(row: Mapping[Any, Any]) -> str:
    share = row["link_utilisation_median"]
    return "" if math.isnan(share) else f"{share:.0%}{'' if row['is_ceiling'] else ', no ceiling'}"


def _size(size: float) -> str:
    return "" if math.isnan(size) else format_bytes(int(size))


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
