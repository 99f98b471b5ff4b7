"""Records as tidy DataFrames: the one place where result files become the rows that figures and the report use.

Every system that the profile lists has rows. Where a measurement is missing its number is NaN and ``words`` says
why ("OOM", "not run"); nothing is dropped and nothing becomes zero.

``runs``: one row per run.
    name             system, or system:variant
    run              number of the run, from 0; -1 where there is none
    status, reason   as recorded; status "not run" where there is no record
    words            "" for a finished run, else the few words to draw in its place
    link             what the bytes crossed: "disk" or "pcie"
    load_s, ttft_s, wall_s   seconds
    token_s          mean seconds from one token to the next; NaN for a single token
    generate_s       ttft_s plus every per-token time: what the passes of the run took
    link_gbps        bytes that crossed the link / wall_s, 10^9 bytes/s
    effective_gbps   weight bytes the model consumed / wall_s, 10^9 bytes/s
    ceiling_gbps     the raw rate beside this run of all GPUs' links, 10^9 bytes/s; NaN where not all were measured
    bare_gbps        the rate of bare copies of the same weights, the higher of those before and after this run
    bound_s          the least seconds that a pass over raw weights can take: bytes of the model beyond the budget of
                     all GPUs / ceiling; NaN where only those experts cross the link that routers pick, and
                     where the link is the disk, of which host memory may keep a part
    hit_rate         share of the experts that routers picked in the run that were in the pool; NaN where there is none
    pool_share       share of all experts that the pool holds: the hit rate to expect of routers that pick evenly
    link_utilisation, model_bytes, budget_bytes, ring_bytes, chunk_bytes, resident_bytes   as recorded
    batch, prompt_tokens   as recorded
    peak_device_bytes, peak_host_bytes, peak_anon_bytes   as recorded
    tokens           the generated ids, as a tuple
``tokens``: one row per token after the first: name, run, token (from 1), token_s, bound_s, words.
``sweep``: as ``runs``, and
    axis             what was varied: "chunk", "ring", "budget", "batch", "prompt" or "coding"
    size_bytes       the point: bytes, of "batch" sequences, of "prompt" tokens; NaN for "coding"
``bits``: one row per kind of coded tensor and run of djinn: name, run, kind, bits (stored for every 16 of the weights).
``timeline``: one row per interval of the copy engine: lane, unit, start_s, end_s, nbytes, cause.
``pcie``: the trace of each GPU's link: time_s, rx_gbps, tx_gbps, source, gpu.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from djinn.bench.records import Record, swept_label, system_label
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.reading import read_csv, read_json_lines
from djinn.sizes import Count, parse_bytes
from djinn.transport.stats import Interval, Lane

NOT_RUN = "not run"
NOT_MEASURED = "not measured"
_BITS = "bits "
"""How the settings of a record begin that djinn's adapter writes for each kind of coded tensor."""
_MOST_DIGITS = 9
"""Of a batch or a prompt's length."""
_MOST_BITS = 64
"""Of a coded weight: what says more is no number of bits."""
_WORDS = {"oom": "OOM", "timeout": "timed out", "unavailable": "unavailable", "error": "failed"}

_COPIED = [
    "load_s",
    "ttft_s",
    "wall_s",
    "effective_gbps",
    "ceiling_gbps",
    "bare_gbps",
    "link_utilisation",
    "model_bytes",
    "budget_bytes",
    "ring_bytes",
    "chunk_bytes",
    "resident_bytes",
    "peak_device_bytes",
    "peak_host_bytes",
    "peak_anon_bytes",
    "batch",
    "prompt_tokens",
]
_NUMBERS = [*_COPIED, "token_s", "generate_s", "link_gbps", "bound_s", "hit_rate", "pool_share"]
RUN_COLUMNS = ["name", "run", "status", "reason", "words", "link", *_NUMBERS, "tokens"]
_Number = Annotated[float, Field(ge=-(10**12), le=10**12)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Span(_Line):
    """A line of a timeline's file: an :class:`~djinn.transport.stats.Interval`."""

    lane: Lane
    unit: str
    start_s: _Number
    end_s: _Number
    nbytes: Count
    cause: str | None = None

    @model_validator(mode="after")
    def _forward(self) -> Self:
        if self.end_s < self.start_s:
            raise ValueError(f"it ends at {self.end_s} s, before it starts at {self.start_s} s")
        return self


class _Sample(_Line):
    """A row of ``pcie.csv``, which :mod:`djinn.bench.pcie` writes."""

    time_s: _Number
    rx_gbps: _Number | None
    tx_gbps: _Number | None
    source: Literal["nvml", "dmon"]
    gpu: Count = 0
    """Older traces are of the first GPU and do not say so."""


TIMELINE_COLUMNS = ["lane", "unit", "start_s", "end_s", "nbytes", "cause"]


def read_runs(run_dir: Path, systems: Sequence[str] = ()) -> pd.DataFrame:
    """Return ``runs`` of a run directory's baselines; ``systems`` without a record get a "not run" row."""
    return runs(Run(run_dir).baselines, systems)


def read_sweep(run_dir: Path) -> pd.DataFrame:
    """Return ``sweep`` of a run directory."""
    return sweep(Run(run_dir).sweep)


def read_timeline(run_dir: Path, name: str = "timeline") -> pd.DataFrame:
    """Return ``timeline`` of a run directory, or ``timeline_coded``; no rows where none was recorded.

    Raises:
        ConfigError: a damaged line, with its number.
    """
    path = Run(run_dir).results / f"{name}.jsonl"
    spans = read_json_lines(path, _Span) if path.is_file() else []
    return pd.DataFrame([span.model_dump() for span in spans], columns=TIMELINE_COLUMNS)


def timeline(intervals: Sequence[Interval]) -> pd.DataFrame:
    """Return ``timeline`` of a model's statistics."""
    return pd.DataFrame([asdict(interval) for interval in intervals], columns=TIMELINE_COLUMNS)


def read_pcie(run_dir: Path) -> pd.DataFrame:
    """Return ``pcie`` of a run directory; no rows where none was recorded.

    Raises:
        ConfigError: a damaged file.
    """
    path = Run(run_dir).results / "pcie.csv"
    samples = read_csv(path, _Sample) if path.is_file() else []
    frame = pd.DataFrame([sample.model_dump() for sample in samples], columns=list(_Sample.model_fields))
    return frame.astype({"rx_gbps": float, "tx_gbps": float})


def runs(records: Sequence[Record], systems: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row per record, in the order of ``systems``, and a "not run" row for each of them that has none."""
    rows = [_row(record) for record in _ordered(records, systems)]
    seen = {row["name"] for row in rows}
    rows += [
        {"name": name, "run": -1, "status": NOT_RUN, "reason": "", "words": NOT_RUN, "tokens": ()}
        for name in systems
        if name not in seen
    ]
    return pd.DataFrame(rows, columns=RUN_COLUMNS).astype(dict.fromkeys(_NUMBERS, float))


def tokens(records: Sequence[Record], systems: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row per token after the first; a run without one keeps a row with NaN and words."""
    samples = [record.per_token_s or [np.nan] for record in _ordered(records, systems)]
    frame = runs(records, systems)
    samples += [[np.nan]] * (len(frame) - len(records))
    rows = [
        {"name": run.name, "run": run.run, "token": number, "token_s": seconds}
        | {"bound_s": run.bound_s, "words": run.words}
        for run, measured in zip(frame.itertuples(), samples, strict=True)
        for number, seconds in enumerate(measured, start=1)
    ]
    return pd.DataFrame(rows, columns=["name", "run", "token", "token_s", "bound_s", "words"]).astype(
        {"token_s": float, "bound_s": float}
    )


def sweep(records: Sequence[Record]) -> pd.DataFrame:
    """Return ``runs`` with the varied axis and its size.

    They are read from each record's variant: "chunk=64 MiB", or "cpu-pinned:batch=4" of a system with a target.

    Raises:
        ConfigError: a record whose variant names no point.
    """
    frame = runs(records)
    points = [_point(record.variant.rpartition(":")[2]) for record in records]
    frame.insert(1, "axis", [axis for axis, _ in points])
    frame.insert(2, "size_bytes", [size for _, size in points])
    frame["name"] = [swept_label(record) for record in records]
    return frame


def bits(records: Sequence[Record]) -> pd.DataFrame:
    """Return the bits that coded tensors take, by kind, in every finished run that streamed coded weights."""
    rows = [
        {"name": system_label(record), "run": record.run, "kind": key.removeprefix(_BITS), "bits": value}
        for record in records
        for key, value in record.settings.items()
        if key.startswith(_BITS) and isinstance(value, int | float) and 0 <= value <= _MOST_BITS
    ]
    return pd.DataFrame(rows, columns=["name", "run", "kind", "bits"]).astype({"bits": float})


def shares(intervals: pd.DataFrame) -> pd.Series:
    """Return the share of a timeline's time in which each of its lanes is busy, indexed by lane.

    Copies from disk overlap: time in which several are under way counts once.
    """
    ordered = intervals.sort_values("start_s")
    seen = ordered.groupby("lane")["end_s"].transform(lambda ends: ends.cummax().shift(fill_value=-np.inf))
    fresh = (ordered["end_s"] - np.maximum(ordered["start_s"], seen)).clip(lower=0)
    return fresh.groupby(ordered["lane"]).sum() / (intervals["end_s"].max() - intervals["start_s"].min())


def names(frame: pd.DataFrame) -> list[str]:
    """Return the systems of ``frame`` in order of first appearance."""
    return list(dict.fromkeys(frame["name"]))


def gaps(frame: pd.DataFrame, column: str, by: str = "name") -> dict[Any, str]:
    """Return the words to draw for each group of ``by`` that has no number, or not for every run, in ``column``.

    A group with no number at all has its words alone ("OOM"); one with some has its runs counted ("OOM in 1 of 3").
    """
    words: dict[Any, str] = {}
    for group, rows in frame.groupby(by, sort=False):
        missing = rows[rows[column].isna()]
        if missing.empty:
            continue
        said = missing["words"].replace("", NOT_MEASURED).value_counts().index[0]
        missed, all_runs = missing["run"].nunique(), rows["run"].nunique()
        words[group] = said if len(missing) == len(rows) else f"{said} in {missed} of {all_runs}"
    return words


def _ordered(records: Sequence[Record], systems: Sequence[str]) -> list[Record]:
    ranks = {name: rank for rank, name in enumerate(systems)}
    return sorted(records, key=lambda record: ranks.get(system_label(record), len(ranks)))


def _row(record: Record) -> dict[str, object]:
    row: dict[str, object] = {column: getattr(record, column) for column in _COPIED}
    row |= {"name": system_label(record), "run": record.run, "status": record.status, "reason": record.reason}
    row |= {"hit_rate": record.hit_rate, "pool_share": _pool_share(record)}
    row |= {"words": _words(record.status, record.reason), "link": record.link, "tokens": tuple(record.tokens)}
    if record.per_token_s:
        row["token_s"] = sum(record.per_token_s) / len(record.per_token_s)
    if record.status == "ok" and record.ttft_s is not None:
        row["generate_s"] = record.ttft_s + sum(record.per_token_s)
    if record.link_bytes is not None and record.wall_s is not None:
        row["link_gbps"] = record.link_bytes / record.wall_s / 1e9
    row["ceiling_gbps"] = ceiling = record.total_ceiling_gbps
    if record.link == "pcie" and record.model_bytes and ceiling and record.expert_hits is None:
        beyond = max(0, record.model_bytes - record.gpus * record.budget_bytes)
        row["bound_s"] = beyond / ceiling / 1e9
    return row


def _pool_share(record: Record) -> float | None:
    slots, experts = record.settings.get("pool_slots"), record.settings.get("pool_experts")
    return slots / experts if isinstance(slots, int) and isinstance(experts, int) and 0 < slots <= experts else None


def _words(status: str, reason: str) -> str:
    if status == "ok":
        return ""
    if status == "unavailable" and reason:
        # A reason says first what is lacking ("memory: ..."); the report's table and the CSV have the whole of it.
        lacking = reason.removeprefix("unavailable: ").partition(":")[0]
        return f"unavailable: {textwrap.shorten(lacking, 24, placeholder=' …')}"
    return _WORDS[status]


def _point(variant: str) -> tuple[str, float]:
    axis, _, value = variant.partition("=")
    if axis == "coding" and value:
        return axis, np.nan
    if axis in ("batch", "prompt") and value.isdecimal() and len(value) <= _MOST_DIGITS:
        return axis, float(value)
    if axis not in ("chunk", "ring", "budget") or not value:
        raise ConfigError(
            f"sweep record with variant {variant!r}: expected chunk=<size>, ring=<size>, budget=<size>, "
            "batch=<number>, prompt=<number> or coding=lossless"
        )
    return axis, parse_bytes(value)
