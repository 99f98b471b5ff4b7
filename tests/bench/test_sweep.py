import json
from pathlib import Path

import pytest

from djinn import hardware
from djinn.bench import harness
from djinn.bench.sweep import _fit_together, run_sweep, sweep_lanes
from djinn.figures import frames
from djinn.profiles import load_profile
from djinn.transport.stats import Interval


def test_points_change_one_thing_each():
    profile = load_profile("smoke_tiny")
    lanes = sweep_lanes(profile, Path("results"))
    assert [lane.variant for lane in lanes] == [
        "chunk=64 KiB",
        "chunk=256 KiB",
        "chunk=1 MiB",
        "ring=1 MB",
        "ring=2 MB",
    ]
    assert [lane.profile.chunk for lane in lanes] == [2**16, 2**18, 2**20, 2**18, 2**18]
    assert [lane.profile.ring for lane in lanes] == [2_000_000] * 3 + [1_000_000, 2_000_000]
    assert {lane.profile.new_tokens for lane in lanes} == {profile.sweep.new_tokens}
    assert [lane.timeline is not None for lane in lanes] == [False, True, False, False, False]


def test_another_point_is_traced_if_the_profiles_own_is_not_swept():
    lanes = sweep_lanes(load_profile("smoke_tiny").override(chunk="128 KiB"), Path("results"))
    assert [lane.timeline is not None for lane in lanes] == [True, False, False, False, False]
    assert sweep_lanes(load_profile("smoke_tiny").override(sweep={}), Path("results")) == []


def test_coded_weights_are_a_point_with_a_timeline_of_its_own():
    *_, coded = sweep_lanes(load_profile("virt_mem_h100"), Path("results"))
    assert (coded.variant, coded.profile.coding) == ("coding=lossless", "lossless")
    assert coded.timeline == Path("results/timeline_coded.jsonl")


def test_budgets_are_points_of_a_mixture():
    profile = load_profile("smoke_moe")
    lanes = [lane for lane in sweep_lanes(profile, Path("results")) if lane.variant.startswith("budget=")]
    assert [lane.variant for lane in lanes] == ["budget=2500 KB", "budget=3 MB", "budget=5 MB", "budget=8 MB"]
    assert [lane.profile.budget for lane in lanes] == list(profile.sweep.budgets)
    assert {(lane.profile.chunk, lane.profile.new_tokens) for lane in lanes} == {(profile.chunk, 24)}


def test_batches_and_prompts_are_points_of_every_system_that_is_named() -> None:
    profile = load_profile("compare_34b")
    lanes = sweep_lanes(profile, Path("results"))
    batches = [lane for lane in lanes if "batch=" in lane.variant]
    assert [(lane.system, lane.target, lane.variant) for lane in batches[::4]] == [
        ("djinn", "", "batch=1"),
        ("djinn", "lossless", "lossless:batch=1"),
        ("accelerate", "cpu-pinned", "cpu-pinned:batch=1"),
    ]
    assert [lane.profile.batch for lane in batches] == [1, 4, 16, 64] * 3
    assert {lane.profile.prompt_tokens for lane in batches} == {profile.prompt_tokens}
    prompts = [lane for lane in lanes if "prompt=" in lane.variant]
    assert [lane.profile.prompt_tokens for lane in prompts] == [128, 512, 2048] * 3
    assert {lane.profile.batch for lane in prompts} == {1}
    for lane in [*batches, *prompts]:
        assert (lane.profile.coding == "lossless") is (lane.target == "lossless")
    assert not any(lane.timeline for lane in [*batches, *prompts])
    assert len(lanes) == 23, "chunk and coded too"


def test_only_djinn_is_swept_where_no_system_is_named() -> None:
    lanes = sweep_lanes(load_profile("smoke_tiny").override(sweep={"batches": [1, 2]}), Path("results"))
    assert [(lane.system, lane.variant) for lane in lanes] == [("djinn", "batch=1"), ("djinn", "batch=2")]


def test_points_stay_loaded_where_each_of_them_has_room_for_its_own_budget(monkeypatch):
    profile = load_profile("smoke_moe").override(sweep={"budgets": ["3 MB", "5 GB"]})
    lanes = sweep_lanes(profile, Path("results"))
    for free, together in ((13 * 10**9, False), (15 * 10**9, True)):
        monkeypatch.setattr(hardware, "usable_ram", lambda free=free: free)
        assert _fit_together(lanes, profile) is together


@pytest.mark.slow
def test_batches_of_two_systems_for_real(profile, tmp_path):
    swept = {"batches": [1, 2], "systems": ["djinn", "accelerate:disk"], "runs": 1, "new_tokens": 2}
    profile = profile.override(sweep=swept)
    assert {record.status for record in run_sweep(profile, tmp_path)} == {"ok"}
    points = frames.read_sweep(tmp_path)
    assert points[["name", "axis", "size_bytes", "batch"]].to_numpy().tolist() == [
        ["djinn", "batch", 1, 1],
        ["djinn", "batch", 2, 2],
        ["accelerate:disk", "batch", 1, 1],
        ["accelerate:disk", "batch", 2, 2],
    ]


@pytest.mark.slow
def test_a_real_sweep_records_points_and_a_timeline_and_resumes(profile, tmp_path, monkeypatch):
    profile = profile.override(sweep={"chunks": ["256 KiB"], "runs": 2, "new_tokens": 2})
    records = run_sweep(profile, tmp_path)
    assert [(record.variant, record.run, record.status) for record in records] == [
        ("chunk=256 KiB", 0, "ok"),
        ("chunk=256 KiB", 1, "ok"),
    ], [record.reason for record in records]
    assert {record.chunk_bytes for record in records} == {2**18}
    assert {record.config_digest for record in records} == {profile.digest}
    lines = (tmp_path / "results" / "timeline.jsonl").read_text().splitlines()
    intervals = [Interval(**json.loads(line)) for line in lines]
    assert {"copy", "compute"} <= {interval.lane for interval in intervals}
    assert all(interval.end_s >= interval.start_s for interval in intervals)

    monkeypatch.setattr(harness, "WorkerProcess", None)
    assert run_sweep(profile, tmp_path) == records
