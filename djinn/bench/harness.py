"""The comparison: every system in processes of its own, run by run, one record each, resumable.

A system that cannot run, is killed or hangs becomes records with a status and a reason; the others go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from djinn import hardware
from djinn.bench.ownership import owned
from djinn.bench.rank_workers import RankWorkers
from djinn.bench.records import Record, append_record, latest, read_records
from djinn.bench.worker_client import Worker, WorkerError, WorkerProcess, close
from djinn.profiles import Profile
from djinn.text import printable
from djinn.weights.resolve import is_synthetic, resolve

Experiment = Literal["baselines", "sweep", "benchmark"]
Order = Literal["by run", "by lane"]

_START_S = 300.0
_BUILD_S = 3600.0
"""Longest that a system may take to compile what it needs: DeepSpeed's async_io took 4 minutes on two idle cores."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One thing that is measured several times: a system with its settings."""

    system: str
    target: str = ""
    """Where the system offloads to."""
    variant: str = ""
    """What a record calls it: the target, or the point of a sweep."""
    tuning: tuple[tuple[str, int | bool], ...] = ()
    """Settings of the system's own, in place of those it would choose."""
    profile: Profile
    """What the system is asked for; in a sweep, the profile with the point's values."""
    timeline: Path | None = None
    """Where to write the copy engine's intervals of the lane's first run."""
    most_runs: int = 10**6
    """How often it is measured, where that is less than the others are."""

    @property
    def label(self) -> str:
        """The lane as people read it, and as file names hold it."""
        return f"{self.system}:{self.variant}" if self.variant else self.system


def run_baselines(profile: Profile, run_dir: Path) -> list[Record]:
    """Measure every system of ``profile``; append to ``run_dir/results/baselines.jsonl`` and return its records.

    Runs that are already ``ok`` under the same configuration are not repeated.

    Raises:
        ConfigError: another process measures in ``run_dir``.
        DjinnError: the checkpoint cannot be had, or the result file is damaged.
        OSError: ``run_dir`` cannot be written.
    """
    lanes = []
    for name in profile.systems:
        system, _, target = name.partition(":")
        own, tuning = profile.of(name), profile.tuning(name)
        lanes.append(Lane(system=system, target=target, variant=target, profile=own, tuning=tuning, most_runs=own.runs))
    with Bench("baselines", profile, run_dir, keep=profile.interleave) as bench:
        return bench.measure(lanes, runs=profile.runs, order="by run" if profile.interleave else "by lane")


class Bench:
    """Workers, and the result file that their runs go to.

    Args:
        experiment: as in a record.
        profile: whose digest the records carry.
        run_dir: results, logs and scratch space go here.
        keep: leave every worker loaded until the end; otherwise one is closed before another loads.
    """

    def __init__(self, experiment: Experiment, profile: Profile, run_dir: Path, *, keep: bool) -> None:
        self.profile = profile
        self.path = run_dir / "results" / f"{experiment}.jsonl"
        self._experiment = experiment
        self._run_dir = run_dir
        self._keep = keep
        self._workers: dict[Lane, Worker] = {}
        self._loaded: dict[Lane, dict[str, Any]] = {}
        self._failed: dict[Lane, WorkerError] = {}
        self._held = ExitStack()

    def __enter__(self) -> Bench:
        self._held.enter_context(owned(self._run_dir))
        self._remove_scratch()  # of an earlier harness that was killed
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held:
            try:
                if kind is None:
                    close(list(self._workers.values()))
            finally:  # who is interrupted waits for nobody
                for worker in self._workers.values():
                    worker.kill()
                self._remove_scratch()

    def missing(self, lanes: Sequence[Lane], *, runs: int, order: Order) -> list[tuple[Lane, int]]:
        """Return the runs that have no ``ok`` record yet, in the order in which they are to be measured."""
        done = {record.point for record in read_records(self.path) if record.status == "ok"}
        pairs = [(lane, run) for lane in lanes for run in range(min(runs, lane.most_runs))]
        if order == "by run":
            # Each run begins with another lane, so that none always finds the caches that the same other one left.
            pairs.sort(key=lambda pair: (pair[1], (lanes.index(pair[0]) - pair[1]) % len(lanes)))
        return [
            (lane, run)
            for lane, run in pairs
            if (self._experiment, lane.system, lane.variant, run, self.profile.digest) not in done
        ]

    def measure(self, lanes: Sequence[Lane], *, runs: int, order: Order) -> list[Record]:
        """Measure what is missing, and return every record of this configuration."""
        missing = self.missing(lanes, runs=runs, order=order)
        if missing:
            self._prepare()
        if self._keep:
            self._start(list(dict.fromkeys(lane for lane, _ in missing)))
        with tqdm(missing, desc=self._experiment, unit="run", dynamic_ncols=True) as progress:
            for lane, run in progress:
                progress.set_postfix_str(f"{lane.label}, run {run + 1}")
                record = self._record(lane, run)
                append_record(self.path, record)
                progress.write(printable(_line(record)))
        return [record for record in latest(read_records(self.path)) if record.config_digest == self.profile.digest]

    def _prepare(self) -> None:
        profile = self.profile
        self._model = profile.model
        self._synthetic = profile.synthetic
        if profile.weights == "disk":
            folder = resolve(profile.model, seed=profile.seed, dtype=profile.dtype)
            self._synthetic = is_synthetic(folder)
            self._model = str(folder.absolute())
        machine = hardware.describe()
        gpu = machine.gpus[0].name if profile.device == "cuda" and machine.gpus else None
        self._device_name = gpu or machine.cpu or "unknown"

    def _record(self, lane: Lane, run: int) -> Record:
        """Measure one run of ``lane``, or say why there is none."""
        profile = lane.profile
        known: dict[str, Any] = {
            "experiment": self._experiment,
            "system": lane.system,
            "variant": lane.variant,
            "model": profile.model,
            "synthetic": self._synthetic,
            "device_name": self._device_name,
            "gpus": profile.gpus,
            "coding": profile.coding if lane.system == "djinn" else "none",
            "run": run,
            "budget_bytes": profile.budget,
            "chunk_bytes": profile.chunk if lane.system == "djinn" else None,
            "prompt_tokens": profile.prompt_tokens,
            "new_tokens": profile.new_tokens,
            "batch": profile.batch,
            "config_digest": self.profile.digest,
        }
        try:
            known |= self._load(lane)
            measured = self._workers[lane].ask({"do": "run"}, profile.timeout_s)
            if lane.timeline is not None and run == 0:
                self._workers[lane].ask({"do": "timeline", "path": str(lane.timeline.absolute())}, profile.timeout_s)
        except WorkerError as failure:
            self._failed[lane] = failure
            self._close(lane)
            return Record(**known, status=failure.status, reason=failure.reason)
        return Record(**known | measured, status="ok")

    def _start(self, lanes: Sequence[Lane]) -> None:
        """Start a worker for each of ``lanes``; importing takes seconds, so they do it at once, before any is timed."""
        for lane in lanes:
            log = self._run_dir / "logs" / f"{_file_name(lane)}.log"
            count = lane.profile.processes(lane.system)
            self._workers[lane] = WorkerProcess(log) if count == 1 else RankWorkers(log, count)
        for lane in lanes:
            try:
                self._workers[lane].ask({"do": "start"}, _START_S)
            except WorkerError as error:
                self._failed[lane] = error

    def _load(self, lane: Lane) -> dict[str, Any]:
        """Have ``lane`` loaded and warm; return what loading gives a record."""
        if lane not in self._loaded:
            if not self._keep and lane not in self._failed:
                for other in list(self._workers):
                    self._close(other)
                self._start([lane])
            if lane in self._failed:
                raise self._failed[lane]
            scratch = self._scratch(lane)
            scratch.mkdir(parents=True)
            job = {
                "system": lane.system,
                "variant": lane.target,
                "model": self._model,
                "scratch": str(scratch.absolute()),
                "profile": lane.profile.model_dump(mode="json"),
                "trace": lane.timeline is not None,
                "tuning": dict(lane.tuning),
            }
            worker = self._workers[lane]
            if lane.system == "deepspeed":
                tqdm.write("deepspeed: compiles its operators if this machine has not yet, in about five minutes")
            worker.ask({"do": "check", **job}, _BUILD_S)
            self._loaded[lane] = worker.ask({"do": "load"}, lane.profile.timeout_s)
            for _ in range(lane.profile.warmups):
                worker.ask({"do": "warm"}, lane.profile.timeout_s)
        return self._loaded[lane]

    def _close(self, lane: Lane) -> None:
        """End the lane's worker and delete its scratch space."""
        self._loaded.pop(lane, None)
        if (worker := self._workers.pop(lane, None)) is not None:
            close([worker])
        shutil.rmtree(self._scratch(lane), ignore_errors=True)

    def _scratch(self, lane: Lane) -> Path:
        return self._run_dir / "scratch" / _file_name(lane)

    def _remove_scratch(self) -> None:
        shutil.rmtree(self._run_dir / "scratch", ignore_errors=True)


def _file_name(lane: Lane) -> str:
    return "".join(character if character.isalnum() else "-" for character in lane.label)


def _line(record: Record) -> str:
    name = f"{record.system}:{record.variant}" if record.variant else record.system
    if record.status != "ok" or record.ttft_s is None or record.wall_s is None:
        return f"{name:<22} run {record.run + 1}  {record.status}: {record.reason}"
    rate = f"  {record.effective_gbps:.2f} GB/s" if record.effective_gbps is not None else ""
    return f"{name:<22} run {record.run + 1}  TTFT {record.ttft_s:.2f} s  total {record.wall_s:.2f} s{rate}"
