"""Numbers derived from records: means with their uncertainty, one row per system, agreement of outputs.

Everything here is pure and works on records alone; a measurement that is missing stays missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from djinn.bench.records import Record, latest, system_label
from djinn.errors import ConfigError
from djinn.profiles import HOST_COMPUTE

# 0.975 quantiles of Student's t for 1..30, 40, 60 and 120 degrees of freedom and for the normal distribution:
# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
# fmt: off
_T_975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086,
    21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064, 25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042,
    40: 2.021, 60: 2.000, 120: 1.980,
}
# fmt: on

MEASURES = (
    "load_s",
    "ttft_s",
    "token_s",
    "wall_s",
    "link_gbps",
    "ceiling_gbps",
    "link_utilisation",
    "effective_gbps",
    "hit_rate",
)
"""What :func:`summary_frame` summarises; ``token_s`` pools every inter-token time of every run."""

ALIKE = ("djinn", "resident")
"""Systems that add up in the same order where several GPUs hold a model: no other's tokens are compared there."""

SIZES = ("model_bytes", "resident_bytes", "ring_bytes", "peak_device_bytes", "peak_host_bytes", "peak_anon_bytes")


@dataclass(frozen=True)
class Summary:
    """Samples in short. ``std`` is the sample standard deviation; ``low`` and ``high`` bound the 95% interval of
    the mean. One sample has neither spread nor interval: these are None, not zero. Two have no interval that says
    anything: Student's t is 12.7 there.
    """

    n: int
    mean: float
    std: float | None
    median: float
    low: float | None
    high: float | None


def summarise(samples: Sequence[float]) -> Summary:
    """Summarise ``samples`` (any unit) with Student's t: mean ± t(0.975, n - 1) · std / √n.

    Between two tabulated degrees of freedom the smaller is used, so the interval is never too narrow.

    Raises:
        ConfigError: no samples, or one that is not finite.
    """
    if not samples or not all(math.isfinite(sample) for sample in samples):
        raise ConfigError(f"cannot summarise {list(samples)!r}: expected at least one sample, all of them finite")
    n, mean, median = len(samples), statistics.fmean(samples), statistics.median(samples)
    if n == 1:
        return Summary(n, mean, None, median, None, None)
    std = statistics.stdev(samples)
    if n == 2:
        return Summary(n, mean, std, median, None, None)
    half = _T_975[max(df for df in _T_975 if df < n)] * std / math.sqrt(n)
    return Summary(n, mean, std, median, mean - half, mean + half)


def summary_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per experiment, system and variant, in order of first appearance; failed ones have a row too.

    Columns:
        experiment, system, variant, label: which measurement; label is ``system:variant``.
        status, reason: ``ok`` if any run is ok, otherwise the last run's.
        runs: how many runs are ok.
        model, synthetic, device_name, budget_bytes: as recorded.
        SIZES: the largest over the ok runs, bytes.
        For each of MEASURES: ``<m>_mean``, ``_std``, ``_median``, ``_low``, ``_high`` (95% interval of the mean) and
        ``_n``. Seconds; 10^9 bytes/s; link_gbps is bytes over the link ÷ wall time, and link_utilisation its ratio
        to the ceiling measured beside the same run. What was not measured is NaN.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in latest(records):
        groups.setdefault((record.experiment, record.system, record.variant), []).append(record)
    return pd.DataFrame([_row(group) for group in groups.values()])


def reference_label(records: Iterable[Record]) -> str | None:
    """Return the system whose tokens the others are held against, or None where no run is ok.

    It is ``resident`` if that ran; otherwise the first independent system that did, since two systems that share
    nothing but the weights agree only if both are right: accelerate, then deepspeed, then djinn. A system whose own
    runs differ is no reference, nor on several GPUs one that is not of :data:`ALIKE`.
    """
    order = ("resident", "accelerate", "deepspeed", "djinn")
    tokens: dict[tuple[int, str], set[tuple[int, ...]]] = {}
    for record in latest(records):
        if _is_compared(record):
            key = (order.index(record.system), system_label(record))
            tokens.setdefault(key, set()).add(tuple(record.tokens))
    steady = [key for key, found in tokens.items() if len(found) == 1]
    return min(steady)[1] if steady else None


def tokens_agree(records: Iterable[Record]) -> dict[str, bool | None]:
    """Return, for each ``system:variant``, whether every ok run generated the tokens of :func:`reference_label`.

    None means that it has no ok run, or on several GPUs is not of :data:`ALIKE`, or is of
    :data:`djinn.profiles.HOST_COMPUTE`. The reference itself is True if its
    runs agree with each other.
    """
    records = latest(records)
    reference = reference_label(records)
    runs: dict[str, list[list[int]]] = {}
    for record in records:
        runs.setdefault(system_label(record), []).extend([record.tokens] if _is_compared(record) else [])
    expected = runs[reference][0] if reference is not None else []
    return {label: all(tokens == expected for tokens in each) if each else None for label, each in runs.items()}


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
        for part in ("n", "mean", "std", "median", "low", "high"):
            value = summary.get(part)
            row[f"{measure}_{part}"] = math.nan if value is None else value
    return row


def _samples(record: Record, measure: str) -> list[float]:
    if measure == "token_s":
        return record.per_token_s
    value = getattr(record, measure)
    return [] if value is None else [value]
