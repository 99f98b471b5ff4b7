"""What each of several GPUs did: one row per rank, medians over finished runs, nothing where there is one GPU."""

from __future__ import annotations

from pathlib import Path

import yaml
from fabricated import fabricated, failed

from djinn.artifact.by_gpu import by_gpu_frame
from djinn.artifact.report import write_report
from djinn.bench.records import Record, append_record
from djinn.profiles import load_profile

RANKS = load_profile("smoke_ranks")


def run_of(run: int, *ranks: dict[str, object], system: str = "djinn") -> Record:
    return fabricated(RANKS, system, run, gpus=2, by_rank=list(ranks))


def rank(link_bytes: int, **more: object) -> dict[str, object]:
    return {"link_bytes": link_bytes, "wall_s": 2.0, "stall_s": 1.0, "peak_device_bytes": 3 * 10**9} | more


def test_a_rank_has_the_medians_of_its_finished_runs_and_its_largest_peak() -> None:
    records = [
        run_of(0, rank(2 * 10**9, bare_gbps_before=5.0, bare_gbps_after=6.0), rank(4 * 10**9)),
        run_of(1, rank(10 * 10**9, peak_device_bytes=5 * 10**9), rank(4 * 10**9, stall_s=0.5)),
        run_of(2, rank(4 * 10**9, stall_s=None), rank(4 * 10**9)),
        failed(RANKS, "djinn", 3, "oom", "killed").model_copy(update={"gpus": 2, "by_rank": records_of_loading()}),
        fabricated(RANKS, "accelerate:cpu", 0, gpus=2),
    ]
    first, second = by_gpu_frame(records).to_dict("records")
    assert first == {
        "system": "djinn",
        "rank": "0",
        "streamed in a run": "4 GB",
        "link, GB/s": "2",
        "bare copies of the same weights, GB/s": "6",
        "stall, s": "1",
        "peak device memory": "5 GB",
    }
    assert (second["rank"], second["stall, s"], second["bare copies of the same weights, GB/s"]) == ("1", "1", "")


def records_of_loading() -> list[object]:
    return list(run_of(3, {"load_s": 9.0, "link_bytes": 1}, {"load_s": 9.0}).by_rank)


def test_systems_stay_in_order_and_one_process_has_no_row() -> None:
    pairs = [(system, run) for run in range(2) for system in ("resident", "djinn")]
    frame = by_gpu_frame([run_of(run, rank(1), rank(2), system=system) for system, run in pairs])
    assert frame["rank"].tolist() == ["0", "1", "0", "1"]
    assert frame["system"].nunique() == 2
    assert frame["system"].tolist() == sorted(frame["system"], key=list(frame["system"]).index)
    assert by_gpu_frame([fabricated(RANKS, "djinn", 0), run_of(0, rank(1))]).empty


def test_the_report_has_the_table_where_ranks_measured_and_only_there(tmp_path: Path, fabricated_run: Path) -> None:
    run_dir = tmp_path / "ranks"
    (run_dir / "results").mkdir(parents=True)
    (run_dir / "profile.yaml").write_text(yaml.safe_dump(RANKS.model_dump(mode="json"), sort_keys=False))
    append_record(run_dir / "results" / "baselines.jsonl", run_of(0, rank(10**9), rank(123 * 10**6)))
    page = write_report(run_dir)
    for text in (page.read_text(), page.with_name("report.md").read_text()):
        assert "GPU by GPU" in text
        assert "123 MB" in text
    other = write_report(fabricated_run)
    assert "GPU by GPU" not in other.read_text() + other.with_name("report.md").read_text()
