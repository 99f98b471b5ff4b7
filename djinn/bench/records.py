"""Result records: one JSON line per system, run and point, validated when written and when read.

A record holds raw samples and the configuration they were taken with. A measurement that could not be made is
a record too, with a status and a reason; its numbers are absent, never zero and never filled in.
"""

from __future__ import annotations

import errno
import functools
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from djinn.files import naming
from djinn.reading import read_json_lines
from djinn.sizes import Count

_Amount = Annotated[float, Field(ge=0, le=10**15)]
"""Seconds, or a rate: no more than can be added up and drawn."""
_Time = Annotated[float, Field(ge=1e-12, le=10**15)]
"""Seconds that something took, so that a rate can be had by dividing."""
_Rate = Annotated[_Amount, Field(gt=0)]
Status = Literal["ok", "oom", "timeout", "unavailable", "error"]


class RankNumbers(BaseModel):
    """What one of several ranks measured of itself; each number is what a :class:`Record` calls so."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    load_s: _Amount | None = None
    resident_bytes: Count | None = None
    ring_bytes: Count | None = None
    wall_s: _Time | None = None
    link_bytes: Count | None = None
    ceiling_gbps: _Rate | None = None
    bare_gbps_before: _Rate | None = None
    bare_gbps_after: _Rate | None = None
    link_utilisation: _Amount | None = None
    stall_s: _Amount | None = None
    peak_device_bytes: Count | None = None
    peak_host_bytes: Count | None = None
    peak_anon_bytes: Count | None = None

    @property
    def link_gbps(self) -> float | None:
        """Bytes that crossed the link ÷ wall time, in 10^9 bytes/s."""
        return None if self.link_bytes is None or self.wall_s is None else self.link_bytes / self.wall_s / 1e9


class Record(BaseModel):
    """One measured run, or the reason why there is none. Times are seconds, sizes bytes, rates 10^9 bytes/s."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experiment: Literal["baselines", "sweep", "benchmark"]
    system: str
    variant: str = ""
    """Which of the system's settings: an offload target, or a point of the sweep ("chunk=64 MiB")."""
    model: str
    synthetic: bool
    device_name: str
    gpus: int = Field(default=1, ge=1, le=64, exclude_if=functools.partial(operator.eq, 1))
    """GPUs that held the model together. ``budget_bytes`` is each one's. What ranks measured comes to one number by the
    rules of ``djinn.bench.rank_workers.MERGED``; times, tokens and settings are the first rank's."""
    coding: Literal["none", "lossless"] = "none"
    status: Status
    reason: str = ""
    run: Count
    budget_bytes: Count = Field(gt=0)
    model_bytes: Annotated[Count, Field(gt=0)] | None = None
    resident_bytes: Count | None = None
    ring_bytes: Count | None = None
    chunk_bytes: Annotated[Count, Field(gt=0)] | None = None
    prompt_tokens: Count = Field(ge=1)
    new_tokens: Count = Field(ge=1)
    batch: Count = Field(ge=1)
    load_s: _Amount | None = None
    ttft_s: _Time | None = None
    per_token_s: list[_Amount] = []
    """Seconds from each token to the next, first token excluded: new_tokens - 1 samples."""
    wall_s: _Time | None = None
    """From the call of generate() to its return."""
    link_bytes: Count | None = None
    """Bytes that crossed the link in wall_s: the disk's on a CPU, PCIe's on a GPU."""
    link: Literal["disk", "pcie"] | None = None
    ceiling_gbps: _Rate | None = None
    """The link's raw rate for a small buffer, or a disk's: the higher of two looks, before this run and after it."""
    bare_gbps_before: _Rate | None = None
    """Rate of copies of what this system streams with nothing computed, directly before this run; the next is directly
    after it. None where a system cannot say it, on a CPU, and in records that are older than this number."""
    bare_gbps_after: _Rate | None = None
    link_utilisation: _Amount | None = None
    """Bytes over the link ÷ wall time ÷ ``ceiling_gbps``."""
    stall_s: _Amount | None = None
    """The part of wall_s in which compute waited for weights, where the system knows it."""
    effective_gbps: _Amount | None = None
    expert_hits: Count | None = None
    """Of experts that routers picked in this run, those that were in the pool; this and the next four: see
    :class:`djinn.transport.stats.Stats`. None where no experts are fetched as routers pick them."""
    expert_misses: Count | None = None
    routed_layers: Count | None = None
    whole_layers: Count | None = None
    index_wait_s: _Amount | None = None
    peak_device_bytes: Count | None = None
    peak_host_bytes: Count | None = None
    """Peak resident set of the process, file pages included, in bytes."""
    peak_anon_bytes: Count | None = None
    """Peak anonymous memory of the process: what the machine cannot take back."""
    tokens: list[Count] = []
    """The generated ids of the first sequence, to compare systems token by token."""
    settings: dict[str, str | int | float | bool] = {}
    """The system's own settings for this run."""
    by_rank: list[RankNumbers] = Field(default=[], exclude_if=operator.not_)
    """What each rank measured of itself; empty where one process held the model."""
    config_digest: str

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "ok":
            if self.ttft_s is None or self.wall_s is None or self.load_s is None or not self.tokens:
                raise ValueError("a record with status ok needs load_s, ttft_s, wall_s and tokens")
            if len(self.per_token_s) != self.new_tokens - 1:
                raise ValueError(f"expected {self.new_tokens - 1} per_token_s samples, found {len(self.per_token_s)}")
        elif not self.reason:
            raise ValueError(f"a record with status {self.status} needs a reason")
        return self

    @property
    def point(self) -> tuple[str, str, str, int, str]:
        """What makes a record the same measurement: experiment, system, variant, run, configuration."""
        return (self.experiment, self.system, self.variant, self.run, self.config_digest)

    @property
    def link_gbps(self) -> float | None:
        """Bytes that crossed the link ÷ wall time, in 10^9 bytes/s."""
        return None if self.link_bytes is None or self.wall_s is None else self.link_bytes / self.wall_s / 1e9

    @property
    def each_rank(self) -> Sequence[Record | RankNumbers]:
        """What each rank measured; this record itself where one process held the model."""
        return self.by_rank or (self,)

    @property
    def total_ceiling_gbps(self) -> float | None:
        """``ceiling_gbps`` of the links of all GPUs; None where one process held several and measured one's alone."""
        return self.ceiling_gbps if len(self.each_rank) == self.gpus else None

    @property
    def bare_gbps(self) -> float | None:
        """The higher rate of the bare copies before and after this run; None where they were not measured."""
        return max(bare_looks(self), default=None)

    @property
    def bare_share(self) -> float | None:
        """Bytes over the link ÷ wall time ÷ the higher rate of the bare copies before and after this run.

        Of several GPUs it is that of the one that used its link least. None where it was not measured.
        """
        shares = [_bare_share(each) for each in self.each_rank]
        return None if None in shares else min(shares)  # type: ignore[type-var]

    @property
    def hit_rate(self) -> float | None:
        """The share of picked experts that were in the pool; see :func:`hit_rate`."""
        if self.expert_hits is None or self.expert_misses is None:
            return None
        return hit_rate(self.expert_hits, self.expert_misses)


def hit_rate(hits: int, misses: int) -> float | None:
    """Return the share of picked experts that were in the pool; None where no router picked any."""
    return hits / (hits + misses) if hits + misses else None


def system_label(record: Record) -> str:
    """Return ``system`` or ``system:variant``, as profiles write it."""
    return f"{record.system}:{record.variant}" if record.variant else record.system


def swept_label(record: Record) -> str:
    """Return the system of a sweep's record, whose variant is ``<point>`` or ``<target>:<point>``."""
    target, colon, _ = record.variant.partition(":")
    return f"{record.system}:{target}" if colon else record.system


def bare_looks(measured: Record | RankNumbers) -> list[float]:
    """Return the rates of bare copies before and after a run; empty where they were not measured."""
    looks = (measured.bare_gbps_before, measured.bare_gbps_after)
    return [look for look in looks if look is not None]


def _bare_share(measured: Record | RankNumbers) -> float | None:
    looks = bare_looks(measured)
    return measured.link_gbps / max(looks) if looks and measured.link_gbps is not None else None


def append_record(path: Path, record: Record) -> None:
    """Append ``record`` as one line, written and flushed in one call so that an interrupt cannot tear it.

    What an append that was torn all the same has left at the end (the machine lost power) is cut off first.

    Raises:
        OSError: the folder is not writable, or the disk is full; it names ``path``, which ends with the record before.
    """
    line = (record.model_dump_json() + "\n").encode()
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.pread(descriptor, os.fstat(descriptor).st_size, 0).rfind(b"\n") + 1
            os.ftruncate(descriptor, end)
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_records(path: Path) -> list[Record]:
    """Read every record of a JSON Lines file; a file that does not exist holds none.

    A last line without its end is no record: it is being written now, or was torn, and is then cut off by the next one.

    Raises:
        ConfigError: a line that is not a valid record, with its number and what is wrong.
    """
    return read_json_lines(path, Record, growing=True) if path.is_file() else []


def latest(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of every point, in order of first appearance (a retried point replaces its failure)."""
    return list({record.point: record for record in records}.values())
