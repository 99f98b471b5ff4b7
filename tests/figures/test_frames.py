"""Records become tidy rows; what is missing keeps a row and its words."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from fabricated import fabricated, failed

from djinn.errors import ConfigError
from djinn.figures import frames
from djinn.profiles import load_profile
from djinn.transport.stats import Interval

PROFILE = load_profile("smoke_tiny")


def test_a_listed_system_without_records_is_not_run():
    runs = frames.runs([fabricated(PROFILE, "djinn", 0)], ["resident", "djinn"])
    missing = runs[runs["name"] == "resident"].iloc[0]
    assert missing["words"] == "not run"
    assert runs.drop(columns="tokens").select_dtypes("number").drop(columns="run").loc[missing.name].isna().all()


def test_rows_come_in_the_order_of_the_profile():
    records = [fabricated(PROFILE, "resident", 0), fabricated(PROFILE, "djinn", 0)]
    assert frames.names(frames.runs(records, ["djinn", "resident"])) == ["djinn", "resident"]


def test_derived_numbers():
    record = fabricated(
        PROFILE, "djinn", 0, per_token_s=[1.0, 2.0, 3.0], ttft_s=4.0, wall_s=10.0, link_bytes=2 * 10**10
    )
    row = frames.runs([record]).iloc[0]
    assert (row["token_s"], row["generate_s"], row["link_gbps"]) == (2.0, 10.0, 2.0)


def test_tokens_of_interleaved_runs_stay_with_their_system():
    records = [
        fabricated(PROFILE, system, run, per_token_s=[seconds] * 3)
        for run in range(2)
        for system, seconds in (("djinn", 1.0), ("accelerate:disk", 2.0), ("resident", 3.0))
    ]
    tokens = frames.tokens(records, ["resident", "djinn", "accelerate:disk"])
    means = tokens.groupby("name", sort=False)["token_s"].agg(["mean", "count"])
    assert means.index.tolist() == ["resident", "djinn", "accelerate:disk"]
    assert means["mean"].tolist() == [3.0, 1.0, 2.0]
    assert means["count"].tolist() == [6, 6, 6]


def test_tokens_keep_every_sample_and_every_gap():
    records = [
        fabricated(PROFILE, "djinn", 0, per_token_s=[1.0, 2.0, 3.0]),
        failed(PROFILE, "djinn", 1, "timeout", "no answer"),
    ]
    tokens = frames.tokens(records, ["djinn", "resident"])
    assert tokens["token_s"].dropna().tolist() == [1.0, 2.0, 3.0]
    assert frames.gaps(tokens, "token_s") == {"djinn": "timed out in 1 of 2", "resident": "not run"}


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        ("oom", "killed", "OOM"),
        ("unavailable", "disk", "unavailable: disk"),
        ("unavailable", "memory: the whole model in host memory needs 28.9 GB", "unavailable: memory"),
        ("unavailable", "needs a GPU that torch can use and that has room", "unavailable: needs a GPU that torch …"),
        ("error", "Traceback", "failed"),
    ],
)
def test_words_of_a_failure(status: str, reason: str, words: str):
    runs = frames.runs([failed(PROFILE, "djinn", 0, status, reason)])
    assert frames.gaps(runs, "ttft_s") == {"djinn": words}


def test_a_number_missing_from_a_finished_run_is_not_measured():
    runs = frames.runs([fabricated(PROFILE, "djinn", 0, peak_device_bytes=None)])
    assert frames.gaps(runs, "peak_device_bytes") == {"djinn": "not measured"}
    assert frames.gaps(runs, "ttft_s") == {}


def test_sweep_points_are_read_from_the_variant():
    record = fabricated(PROFILE, "djinn", 0, experiment="sweep", variant="ring=2 MB")
    points = frames.sweep([record])
    assert points[["name", "axis", "size_bytes"]].iloc[0].tolist() == ["djinn", "ring", 2_000_000]
    with pytest.raises(ConfigError, match="chunk=<size>"):
        frames.sweep([record.model_copy(update={"variant": "disk"})])


def test_a_mixtures_runs_have_their_hit_rate_and_the_pools_share():
    counts = {"expert_hits": 3, "expert_misses": 1}
    pool = {"pool_slots": 52, "pool_experts": 256}
    mixture = fabricated(PROFILE, "djinn", 0, variant="budget=3 MB", **counts, settings=pool)
    points = frames.sweep([mixture, fabricated(PROFILE, "djinn", 0, variant="chunk=3 MB")])
    assert points[["axis", "hit_rate", "pool_share"]].iloc[0].tolist() == ["budget", 0.75, 52 / 256]
    assert points[["hit_rate", "pool_share"]].iloc[1].isna().all()


@pytest.mark.parametrize(("slots", "experts"), [("many", 4), (5, 4), (0, 0), (10**400, 1), (-1, 4)])
def test_a_pool_that_cannot_be_has_no_share(slots: object, experts: int):
    record = fabricated(PROFILE, "djinn", 0, settings={"pool_slots": slots, "pool_experts": experts})
    assert frames.runs([record])["pool_share"].isna().all()


def test_an_empty_run_directory_gives_empty_frames(tmp_path: Path):
    assert frames.read_sweep(tmp_path).empty
    assert frames.read_timeline(tmp_path).empty
    assert frames.read_pcie(tmp_path).empty


def test_a_lanes_share_counts_overlapping_time_once():
    spans = [("copy", 0.0, 4.0), ("copy", 1.0, 2.0), ("copy", 3.0, 6.0), ("stall", 9.0, 10.0), ("copy", 8.0, 8.5)]
    shares = frames.shares(pd.DataFrame(spans, columns=["lane", "start_s", "end_s"]))
    assert dict(shares) == pytest.approx({"copy": 0.65, "stall": 0.1})


def test_every_column_is_documented():
    documented = frames.__doc__ or ""
    columns = {*frames.RUN_COLUMNS, *frames.TIMELINE_COLUMNS, *frames.tokens([]), *frames.sweep([]), *frames.bits([])}
    columns |= set(frames.read_pcie(Path("nowhere")))
    assert [column for column in sorted(columns) if not re.search(rf"\b{column}\b", documented)] == []


def test_a_models_timeline_is_a_runs():
    intervals = [Interval("copy", "a", 1.0, 2.0, 100), Interval("stall", "a", 1.5, 2.0, 100, "link")]
    frame = frames.timeline(intervals)
    assert list(frame) == frames.TIMELINE_COLUMNS
    assert frame["cause"].tolist() == ["", "link"]
