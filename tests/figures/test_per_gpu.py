"""What is known of each GPU: its timelines by file, its link's ceiling by rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fabricated import fabricated

from djinn.bench.pcie import COLUMNS
from djinn.bench.records import append_record
from djinn.bench.run import Run
from djinn.figures import draw_all, frames
from djinn.figures.per_gpu import beside_traces, ceilings, read_timelines
from djinn.profiles import load_profile

RANKS = load_profile("smoke_ranks")


def test_each_gpus_timelines_are_read_in_order(fabricated_run: Path) -> None:
    results = fabricated_run / "results"
    assert [list(own) for own in read_timelines(fabricated_run)] == [["djinn", "djinn:lossless"]]
    for gpu in (1, 2):
        lines = (results / "timeline.jsonl").read_text().splitlines(keepends=True)
        (results / f"timeline_{gpu}.jsonl").write_text("".join(lines[: 3 * gpu]))
    assert [len(own["djinn"]) for own in read_timelines(fabricated_run)] == [120, 3, 6]
    assert [len(own["djinn:lossless"]) for own in read_timelines(fabricated_run)] == [120, 0, 0]


def test_a_run_without_timelines_has_empty_ones_of_its_first_gpu(tmp_path: Path) -> None:
    (own,) = read_timelines(tmp_path)
    assert all(intervals.empty for intervals in own.values())


def test_ceilings_are_medians_by_rank_and_not_of_all_ranks_together() -> None:
    pairs = [
        fabricated(
            RANKS, "djinn", run, gpus=2, ceiling_gbps=100.0, by_rank=[{"ceiling_gbps": one}, {"ceiling_gbps": two}]
        )
        for run, (one, two) in enumerate([(50.0, 40.0), (52.0, 44.0), (51.0, 48.0)])
    ]
    assert ceilings(pairs) == [51.0, 44.0]
    assert ceilings([fabricated(RANKS, "djinn", 0, ceiling_gbps=None)]) == []
    assert ceilings([fabricated(RANKS, "djinn", run, ceiling_gbps=5.0 + run) for run in range(2)]) == [5.5]


def test_beside_a_trace_is_the_first_run_of_its_own_point(tmp_path: Path) -> None:
    """Other points of the sweep, and later runs, met the link in other minutes."""
    profile = load_profile("virt_mem_h100")
    run = Run.open(tmp_path, profile)

    def swept(variant: str, number: int, gbps: float) -> None:
        record = fabricated(profile, "djinn", number, experiment="sweep", variant=variant, ceiling_gbps=gbps)
        append_record(run.results / "sweep.jsonl", record)

    swept("chunk=64 MiB", 1, 50.0)
    swept("chunk=64 MiB", 0, 55.0)
    swept("chunk=16 MiB", 0, 54.0)
    assert beside_traces(Run(tmp_path)) == {"djinn": 55.0}
    swept("coding=lossless", 0, 47.5)
    assert beside_traces(Run(tmp_path)) == {"djinn": 55.0, "djinn:lossless": 47.5}


def test_older_traces_are_of_the_first_gpu(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    trace = tmp_path / "results" / "pcie.csv"
    trace.write_text("time_s,rx_gbps,tx_gbps,source\n0.0315,50.0,,nvml\n")
    assert frames.read_pcie(tmp_path)["gpu"].tolist() == [0]
    trace.write_text(",".join(COLUMNS) + "\n0.0315,50.0,,nvml,3\n")
    assert frames.read_pcie(tmp_path)["gpu"].tolist() == [3]


@pytest.mark.slow
def test_every_gpu_is_drawn(fabricated_run: Path) -> None:
    results = fabricated_run / "results"
    shutil.copy(results / "timeline.jsonl", results / "timeline_1.jsonl")
    names = {path.name for path in draw_all(fabricated_run)}
    assert {"timeline_1.png", "timeline_1.trace.json", "timeline.png"} <= names
    assert "timeline_coded_1.png" not in names
