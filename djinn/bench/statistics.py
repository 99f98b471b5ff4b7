"""Numbers derived from records: medians with their spread, one row per system, agreement of outputs.

Everything here is pure and works on records alone; a measurement that is missing stays missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial

import pandas as pd

from djinn.bench.records import Record, latest, system_label
from djinn.errors import ConfigError
from djinn.profiles import HOST_COMPUTE

MEASURES = (
    "load_s",
    "ttft_s",
    "token_s",
    "wall_s",
    "link_gbps",
    "ceiling_gbps",
    "link_utilisation",
    "bare_share",
    "effective_gbps",
    "hit_rate",
)
"""What :func:`summary_frame` summarises: a number of each run. ``token_s`` is the median of a run's inter-token times,
since those of one run depend on each other; ``bare_share`` is :attr:`djinn.bench.records.Record.bare_share`."""

ALIKE = ("djinn", "resident")
"""Systems that add up in the same order where several GPUs hold a model: no other's tokens are compared there."""

SIZES = ("model_bytes", "resident_bytes", "ring_bytes", "peak_device_bytes", "peak_host_bytes", "peak_anon_bytes")


INTERVAL_FROM = 5
"""Samples from which on there is an interval; fewer have their range."""
CONFIDENCE = 15 / 16
"""With which an interval holds the median: what the whole range of five samples has, 1 - 2 / 2^5."""


@dataclass(frozen=True)
class Summary:
    """Samples in short: their median, and how far they spread.

    ``low`` and ``high`` are the smallest and the largest of fewer than :data:`INTERVAL_FROM` samples, and of more the
    bounds of an interval of the median. One sample has no spread: these are None, not equal to it.
    """

    n: int
    median: float
    low: float | None
    high: float | None


def summarise(samples: Sequence[float]) -> Summary:
    """Summarise ``samples`` (any unit) without assuming how they are distributed.

    The interval lies between two samples, the k-th smallest and the k-th largest. It holds the median with probability
    1 - 2 P(B < k), where B is binomial of n and 1/2, and k is the largest number for which that is :data:`CONFIDENCE`
    or more: H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition, section 7.1.

    Raises:
        ConfigError: no samples, or one that is not finite.
    """
    if not samples or not all(math.isfinite(sample) for sample in samples):
        raise ConfigError(f"cannot summarise {list(samples)!r}: expected at least one sample, all of them finite")
    ordered = sorted(samples)
    n, median = len(ordered), statistics.median(ordered)
    if n == 1:
        return Summary(n, median, None, None)
    outside = _outside(n) if n >= INTERVAL_FROM else 0
    return Summary(n, median, ordered[outside], ordered[-1 - outside])


def _outside(n: int) -> int:
    """Return how many of ``n`` samples lie below the interval of the median, which as many lie above."""
    allowed = Fraction(1 - CONFIDENCE) / 2 * 2**n
    outside, ways = 0, 1
    while ways + math.comb(n, outside + 1) <= allowed:
        outside += 1
        ways += math.comb(n, outside)
    return outside


def is_exceeded(rate: float, looks: Sequence[float]) -> bool:
    """Return whether ``rate`` is above the highest of ``looks`` at a ceiling by more than these differ.

    What was exceeded so is no ceiling, whatever it was measured for.
    """
    return rate > max(looks) + (max(looks) - min(looks))


def summary_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per experiment, system and variant, in order of first appearance; failed ones have a row too.

    Columns:
        experiment, system, variant, label: which measurement; label is ``system:variant``.
        status, reason: ``ok`` if any run is ok, otherwise the last run's.
        runs: how many runs are ok.
        model, synthetic, device_name, budget_bytes: as recorded.
        SIZES: the largest over the ok runs, bytes.
        For each of MEASURES: ``<m>_n``, ``_median``, ``_low`` and ``_high`` (see :class:`Summary`). Seconds; 10^9
        bytes/s; link_gbps is bytes over the link ÷ wall time, and link_utilisation its ratio to the ceiling measured
        beside the same run. What was not measured is NaN.
        is_ceiling: False where a run exceeded all looks at the ceiling by more than these differ (:func:`is_exceeded`).
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in latest(records):
        groups.setdefault((record.experiment, record.system, record.variant), []).append(record)
    return pd.DataFrame([_row(group) for group in groups.values()])


def reference_label(records: Iterable[Record]) -> str | None:
    """Return the system whose tokens the others are held against, or None where there is none.

    It is ``resident`` if that ran; otherwise the first independent system that did, since two systems that share
    nothing but the weights agree only if both are right: accelerate, then deepspeed. djinn is never its own reference.
    Nor is a system whose own runs differ, or on several GPUs one that is not of :data:`ALIKE`. Of several alike the one
    with the most tokens counts.
    """
    order = ("resident", "accelerate", "deepspeed")
    tokens: dict[tuple[int, int, str], set[tuple[int, ...]]] = {}
    for record in latest(records):
        if record.system in order and _is_compared(record):
            key = (order.index(record.system), -len(record.tokens), system_label(record))
            tokens.setdefault(key, set()).add(tuple(record.tokens))
    steady = [key for key, found in tokens.items() if len(found) == 1]
    return min(steady)[-1] if steady else None


def tokens_agree(records: Iterable[Record]) -> dict[str, bool | None]:
    """Return, for each ``system:variant``, whether every ok run generated the tokens of :func:`reference_label`.

    None means that there is nothing to compare: no reference, no ok run, on several GPUs a system that is not of
    :data:`ALIKE`, or one of :data:`djinn.profiles.HOST_COMPUTE`. The reference itself is True if its runs agree with
    each other. Of a system that was asked for fewer tokens these are compared.
    """
    records = latest(records)
    reference = reference_label(records)
    runs: dict[str, list[list[int]]] = {}
    for record in records:
        runs.setdefault(system_label(record), []).extend([record.tokens] if _is_compared(record) else [])
    if reference is None:
        return dict.fromkeys(runs)
    expected = runs[reference][0]
    return {label: all(map(partial(_agree, expected), each)) if each else None for label, each in runs.items()}


def _agree(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(mine == yours for mine, yours in zip(one, other, strict=False))


def _is_compared(record: Record) -> bool:
    is_exact = system_label(record) not in HOST_COMPUTE
    return record.status == "ok" and is_exact and (record.gpus == 1 or record.system in ALIKE)


def _row(group: list[Record]) -> dict[str, object]:
    good = [record for record in group if record.status == "ok"]
    last = good[-1] if good else group[-1]
    row: dict[str, object] = {
        "experiment": last.experiment,
        "system": last.system,
        "variant": last.variant,
        "label": system_label(last),
        "status": last.status,
        "reason": last.reason,
        "runs": len(good),
        "model": last.model,
        "synthetic": last.synthetic,
        "device_name": last.device_name,
        "budget_bytes": last.budget_bytes,
    }
    for size in SIZES:
        row[size] = max((value for record in good if (value := getattr(record, size)) is not None), default=math.nan)
    for measure in MEASURES:
        samples = [sample for record in good for sample in _samples(record, measure)]
        summary = asdict(summarise(samples)) if samples else {"n": 0}
        for part in ("n", "median", "low", "high"):
            value = summary.get(part)
            row[f"{measure}_{part}"] = math.nan if value is None else value
    row["is_ceiling"] = not _exceeds(good)
    return row


def _exceeds(records: Sequence[Record]) -> bool:
    looks = [record.ceiling_gbps for record in records if record.ceiling_gbps is not None]
    rates = [record.link_gbps for record in records if record.link_gbps is not None]
    return bool(looks) and any(is_exceeded(rate, looks) for rate in rates)


def _samples(record: Record, measure: str) -> list[float]:
    if measure == "token_s":
        return [statistics.median(record.per_token_s)] if record.per_token_s else []
    value = getattr(record, measure)
    return [] if value is None else [value]
