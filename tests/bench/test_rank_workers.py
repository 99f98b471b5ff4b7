"""Workers of several ranks behave as one: one reply, one failure, and nobody left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.bench import harness, worker_client
from djinn.bench.harness import run_baselines
from djinn.bench.rank_workers import MERGED, RankWorkers, merged, rendezvous
from djinn.bench.records import RankNumbers, Record
from djinn.bench.statistics import tokens_agree
from djinn.bench.worker_client import WorkerError
from djinn.profiles import Profile, load_profile

WORKER = """
import json, os, signal, sys, time
replies = os.fdopen(int(sys.argv[1]), "w")
rank = int(os.environ["RANK"])
for line in sys.stdin:
    do = json.loads(line)["do"]
    reply = {"status": "ok", "fields": {"tokens": [1], "wall_s": 1.0 + rank, "link_bytes": 10 + rank}}
    if do == "load":
        reply["fields"] = {"load_s": 2.0, "resident_bytes": 5 + rank, "settings": {"rank": rank}}
    if do == "environment":
        reply["fields"] = {"settings": [os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]}
    if do == "differ":
        reply["fields"]["tokens"] = [rank]
    if rank == 1 and do == "refuse":
        reply = {"status": "unavailable", "reason": "too little memory"}
    if rank == 1 and do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and do == "exit":
        sys.exit(70)
    if do in ("die", "exit", "refuse", "hang"):
        time.sleep(600 if rank != 1 or do == "hang" else 0)
    print(json.dumps(reply), file=replies, flush=True)
    if do == "close":
        break
"""
numbers = st.integers(0, 10**12)
replies = st.lists(st.fixed_dictionaries(dict.fromkeys(MERGED, st.none() | numbers)), min_size=1, max_size=8)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RankWorkers:
    monkeypatch.setattr(worker_client, "COMMAND", (sys.executable, "-c", WORKER))
    return RankWorkers(tmp_path / "logs" / "fake.log", 2)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@given(found=replies)
def test_sums_are_sums_and_claims_see_the_worst_rank(found: Sequence[dict[str, Any]]) -> None:
    one = merged([reply | {"tokens": [3, 4], "wall_s": 1.0 + rank} for rank, reply in enumerate(found)])
    assert (one["tokens"], one["wall_s"]) == ([3, 4], 1.0)
    for name in MERGED:
        values = [reply[name] for reply in found]
        if None in values:
            assert one[name] is None
        elif MERGED[name] is sum:
            assert one[name] == sum(values)
        else:
            assert one[name] == sorted(values)[0 if name == "link_utilisation" else -1]
    assert [{name: rank[name] for name in MERGED} for rank in one["by_rank"]] == list(found)


@given(
    tokens=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=2, max_size=4).filter(
        lambda each: any(tokens != each[0] for tokens in each)
    )
)
def test_ranks_that_generate_other_tokens_are_an_error(tokens: list[list[int]]) -> None:
    with pytest.raises(WorkerError, match=r"rank \d generated other tokens than rank 0"):
        merged([{"tokens": each} for each in tokens])


def test_what_is_merged_are_numbers_of_a_record() -> None:
    assert set(MERGED) | {"wall_s"} == set(RankNumbers.model_fields)
    assert set(RankNumbers.model_fields) <= set(Record.model_fields)
    assert merged([{}, {}]) == {}  # a command that gives no numbers


def test_ranks_find_each_other_and_reply_as_one(workers: RankWorkers, tmp_path: Path) -> None:
    loaded = workers.ask({"do": "load"}, 60)
    assert (loaded["resident_bytes"], loaded["settings"]) == (11, {"rank": 0})
    run = workers.ask({"do": "run"}, 60)
    assert (run["link_bytes"], run["wall_s"]) == (21, 1.0)
    assert [(rank["resident_bytes"], rank["link_bytes"], rank["wall_s"]) for rank in run["by_rank"]] == [
        (5, 10, 1.0),
        (6, 11, 2.0),
    ]
    assert workers.ask({"do": "environment"}, 60)["settings"][:2] == ["2", "0"]
    worker_client.close([workers])
    assert not workers.alive
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["fake-0.log", "fake-1.log"]


@pytest.mark.parametrize(
    ("do", "status", "words"),
    [
        ("die", "oom", "rank 1: killed, probably out of memory"),
        ("exit", "error", r"rank 1: the worker ended with exit status 70; see logs/fake-1.log"),
        ("refuse", "unavailable", "rank 1: too little memory"),
        ("hang", "timeout", "rank 0: hang took longer than 1 s"),
        ("differ", "error", "rank 1 generated other tokens"),
    ],
)
def test_a_rank_that_fails_ends_all_and_its_reason_is_given(
    workers: RankWorkers, do: str, status: str, words: str
) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=words) as caught:
        workers.ask({"do": do}, 1 if do == "hang" else 60)
    assert caught.value.status == status
    assert time.monotonic() - began < 20  # the other rank sleeps for ten minutes
    assert not workers.alive
    assert not children()


def test_ports_are_free_and_sizes_words() -> None:
    first, second = rendezvous(2), rendezvous(2)
    assert first["MASTER_PORT"] != second["MASTER_PORT"]
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == "2"


@pytest.fixture
def ranks(checkpoint: Path) -> Profile:
    """smoke_ranks over the tiny checkpoint, short."""
    return load_profile("smoke_ranks").override(
        model=str(checkpoint), systems=["djinn", "resident"], runs=1, warmups=0, new_tokens=3
    )


@pytest.mark.slow
def test_two_real_ranks_stream_what_the_model_resident_on_them_computes(
    ranks: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = run_baselines(ranks, tmp_path)
    assert [record.status for record in records] == ["ok", "ok"], [record.reason for record in records]
    assert tokens_agree(records) == {"djinn": True, "resident": True}
    ours, whole = records
    assert (ours.gpus, len(ours.by_rank)) == (2, 2)
    assert ours.link_bytes == sum(rank.link_bytes or 0 for rank in ours.by_rank) > 0
    assert ours.peak_device_bytes == max(rank.peak_device_bytes or 0 for rank in ours.by_rank)
    assert all(rank.load_s and rank.ceiling_gbps and rank.wall_s for rank in ours.by_rank)
    assert ours.model_bytes is not None
    assert whole.resident_bytes is not None
    # Each rank holds half of the weights, and norms whole.
    assert ours.model_bytes < whole.resident_bytes < 1.01 * ours.model_bytes
    assert Record.model_validate_json(ours.model_dump_json()) == ours
    assert not children()

    monkeypatch.setattr(harness, "RankWorkers", None)
    assert run_baselines(ranks, tmp_path) == records


@pytest.mark.slow
def test_a_real_rank_that_is_killed_is_the_records_reason(ranks: Profile, tmp_path: Path) -> None:
    workers = RankWorkers(tmp_path / "djinn.log", 2)
    (tmp_path / "scratch").mkdir()
    job = {
        "system": "djinn",
        "variant": "",
        "model": ranks.model,
        "scratch": str(tmp_path / "scratch"),
        "profile": json.loads(ranks.model_dump_json()),
        "trace": False,
        "tuning": {},
    }
    workers.ask({"do": "check", **job}, 120)
    workers.ask({"do": "load"}, 120)
    next(child for child in children() if child.environ()["RANK"] == "1").kill()
    with pytest.raises(WorkerError, match="rank 1: killed, probably out of memory"):
        workers.ask({"do": "run"}, 120)
    assert not children()
