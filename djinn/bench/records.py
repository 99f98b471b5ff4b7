"""Result records: one JSON line per system, run and point, validated when written and when read.

A record holds raw samples and the configuration they were taken with. A measurement that could not be made is
a record too, with a status and a reason; its numbers are absent, never zero and never filled in.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from djinn.errors import ConfigError

Status = Literal["ok", "oom", "timeout", "unavailable", "error"]


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
    coding: Literal["none", "lossless"] = "none"
    status: Status
    reason: str = ""
    run: int = Field(ge=0)
    budget_bytes: int = Field(gt=0)
    model_bytes: int | None = Field(default=None, gt=0)
    resident_bytes: int | None = Field(default=None, ge=0)
    ring_bytes: int | None = Field(default=None, ge=0)
    chunk_bytes: int | None = Field(default=None, gt=0)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)
    batch: int = Field(ge=1)
    load_s: float | None = Field(default=None, ge=0)
    ttft_s: float | None = Field(default=None, gt=0)
    per_token_s: list[float] = []
    """Seconds from each token to the next, first token excluded: new_tokens - 1 samples."""
    wall_s: float | None = Field(default=None, gt=0)
    """From the call of generate() to its return."""
    link_bytes: int | None = Field(default=None, ge=0)
    """Bytes that crossed the link in wall_s: the disk's on a CPU, PCIe's on a GPU."""
    link: Literal["disk", "pcie"] | None = None
    ceiling_gbps: float | None = Field(default=None, gt=0)
    """The link's raw rate, measured beside this run."""
    link_utilisation: float | None = Field(default=None, ge=0)
    stall_s: float | None = Field(default=None, ge=0)
    """The part of wall_s in which compute waited for weights, where the system knows it."""
    effective_gbps: float | None = Field(default=None, ge=0)
    peak_device_bytes: int | None = Field(default=None, ge=0)
    peak_host_bytes: int | None = Field(default=None, ge=0)
    """Peak resident set of the process, file pages included, in bytes."""
    peak_anon_bytes: int | None = Field(default=None, ge=0)
    """Peak anonymous memory of the process: what the machine cannot take back."""
    tokens: list[int] = []
    """The generated ids of the first sequence, to compare systems token by token."""
    settings: dict[str, str | int | float | bool] = {}
    """The system's own settings for this run."""
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


def append_record(path: Path, record: Record) -> None:
    """Append ``record`` as one line, written and flushed in one call so that an interrupt cannot tear it.

    Raises:
        OSError: the folder is not writable, or the disk is full; the file then ends with the record before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (record.model_dump_json() + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[Record]:
    """Read every record of a JSON Lines file; a file that does not exist holds none.

    Raises:
        ConfigError: a line that is not a valid record, with its number and what is wrong.
    """
    if not path.is_file():
        return []
    records = []
    # Lines of bytes: text would also be split at characters that JSON leaves as they are, such as U+2028.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(Record.model_validate(json.loads(line)))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not a valid record: {error}") from None
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of every point, in order of first appearance (a retried point replaces its failure)."""
    return list({record.point: record for record in records}.values())
