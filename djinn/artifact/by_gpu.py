"""What each of several GPUs did in the runs of a comparison, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import pandas as pd

from djinn.bench.records import RankNumbers, Record, bare_looks, system_label
from djinn.figures.style import display_name
from djinn.sizes import format_bytes

ABOUT = (
    "A rank is the process of one GPU, or where there is none, one that stands in for it. Medians of the finished "
    "runs; the largest peak of memory."
)
"""What the table shows, for its readers."""


def _streamed(ranks: Sequence[RankNumbers]) -> str:
    found = [rank.link_bytes for rank in ranks if rank.link_bytes is not None]
    return format_bytes(round(median(found))) if found else ""


def _peak(ranks: Sequence[RankNumbers]) -> str:
    found = [rank.peak_device_bytes for rank in ranks if rank.peak_device_bytes is not None]
    return format_bytes(max(found)) if found else ""


def _median_of(number: Callable[[RankNumbers], float | None]) -> Callable[[Sequence[RankNumbers]], str]:
    def words(ranks: Sequence[RankNumbers]) -> str:
        found = [value for rank in ranks if (value := number(rank)) is not None]
        return f"{median(found):.3g}" if found else ""

    return words


_COLUMNS: Mapping[str, Callable[[Sequence[RankNumbers]], str]] = {
    "streamed in a run": _streamed,
    "link, GB/s": _median_of(lambda rank: rank.link_gbps),
    "ceiling of the link, GB/s": _median_of(lambda rank: rank.ceiling_gbps),
    "bare copies of the same weights, GB/s": _median_of(lambda rank: max(bare_looks(rank), default=None)),
    "stall, s": _median_of(lambda rank: rank.stall_s),
    "peak device memory": _peak,
}


def by_gpu_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per system and rank, in words; no rows where no system had a process for each of several GPUs.

    Columns: system, rank, then bytes that crossed the rank's link in a run, their rate over the run, the link's rate
    for a small buffer, the rate of bare copies (the higher look of each run), seconds of stall, and peak device memory.
    Peaks are the largest of the finished runs, all else is their median. A column that no rank has is left out.
    """
    runs: dict[tuple[str, int], list[RankNumbers]] = {}
    for record in records:
        if record.status == "ok" and len(record.by_rank) > 1:
            for rank, numbers in enumerate(record.by_rank):
                runs.setdefault((display_name(system_label(record)), rank), []).append(numbers)
    rows = [
        {"system": system, "rank": str(rank)} | {column: words(ranks) for column, words in _COLUMNS.items()}
        for (system, rank), ranks in runs.items()
    ]
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "").any()] if rows else frame
