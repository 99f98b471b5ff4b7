import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from djinn.bench.records import Record, append_record, latest, read_records
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.places import REFERENCE_DIR

GOOD = {
    "experiment": "baselines",
    "system": "djinn",
    "model": "synthetic:llama-tiny",
    "synthetic": True,
    "device_name": "a CPU",
    "status": "ok",
    "run": 0,
    "budget_bytes": 5_000_000,
    "prompt_tokens": 8,
    "new_tokens": 3,
    "batch": 1,
    "load_s": 1.0,
    "ttft_s": 0.5,
    "per_token_s": [0.1, 0.2],
    "wall_s": 0.8,
    "tokens": [4, 5, 6],
    "config_digest": "0123456789abcdef",
}
RECORDED = [path for path in sorted(REFERENCE_DIR.rglob("*.jsonl")) if path.stem in ("baselines", "sweep", "benchmark")]


@given(
    run=st.integers(0, 9),
    ttft_s=st.floats(1e-9, 1e9),
    reason=st.text(max_size=50),
    settings=st.dictionaries(st.text(max_size=8), st.integers() | st.booleans() | st.text(max_size=8), max_size=3),
)
def test_records_survive_the_file(tmp_path_factory, run, ttft_s, reason, settings):
    record = Record(**GOOD | {"run": run, "ttft_s": ttft_s, "reason": reason, "settings": settings})
    path = tmp_path_factory.mktemp("records") / "results" / "r.jsonl"
    append_record(path, record)
    append_record(path, record)
    assert read_records(path) == [record, record]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"ttft_s": None},
        {"tokens": []},
        {"per_token_s": [0.1]},
        {"wall_s": float("nan")},
        {"status": "error", "reason": ""},
        {"status": "slow"},
        {"run": -1},
        {"surprise": 1},
        {"link_bytes": -1},
    ],
)
def test_incomplete_or_impossible_records_are_refused(changes):
    with pytest.raises(ValidationError):
        Record(**GOOD | changes)


def test_a_failure_needs_no_numbers():
    missing = dict.fromkeys(("load_s", "ttft_s", "wall_s"))
    record = Record(**GOOD | missing | {"status": "oom", "reason": "killed", "tokens": [], "per_token_s": []})
    assert record.link_gbps is None


def test_a_record_of_one_process_says_nothing_of_ranks():
    one = Record(**GOOD)
    assert (one.gpus, one.by_rank) == (1, [])
    assert not {"gpus", "by_rank"} & json.loads(one.model_dump_json()).keys()
    two = Record(**GOOD | {"gpus": 2, "by_rank": [{"link_bytes": 5}, {"link_bytes": 6, "stall_s": 0.5}]})
    assert Record.model_validate_json(two.model_dump_json()) == two


def test_a_process_of_several_gpus_has_measured_one_link_and_not_all():
    one = GOOD | {"ceiling_gbps": 25.0}
    ranks = {"gpus": 2, "ceiling_gbps": 50.0, "by_rank": [{"ceiling_gbps": 25.0}, {"ceiling_gbps": 25.0}]}
    found = [Record(**GOOD | changes).total_ceiling_gbps for changes in (one, one | {"gpus": 2}, ranks)]
    assert found == [25.0, None, 50.0]


def test_link_rate_is_bytes_over_wall_time():
    assert Record(**GOOD | {"link_bytes": 4 * 10**9, "wall_s": 2.0}).link_gbps == 2.0


def test_a_hit_rate_is_of_experts_that_were_picked():
    assert Record(**GOOD).hit_rate is None
    assert Record(**GOOD | {"expert_hits": 1, "expert_misses": 3}).hit_rate == 0.25
    assert Record(**GOOD | {"expert_hits": 0, "expert_misses": 0}).hit_rate is None


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.relative_to(REFERENCE_DIR).as_posix())
def test_records_older_than_experts_are_read_as_they_are(path):
    assert {record.expert_hits for record in read_records(path)} == {None}


def test_no_file_holds_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, Record(**GOOD))
    path.write_text(path.read_text() + json.dumps(GOOD | {"status": "ok", "tokens": []}) + "\n")
    with pytest.raises(ConfigError, match=r"r\.jsonl, line 2"):
        read_records(path)
    path.write_text("{not json\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_records(path)


@pytest.mark.parametrize("length", [1, 300, -1])
def test_a_torn_last_line_is_no_record_and_the_next_one_takes_its_place(tmp_path, length):
    path = tmp_path / "r.jsonl"
    first, second = (Record(**GOOD | {"run": run}) for run in (0, 1))
    append_record(path, first)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:length])
    assert read_records(path) == [first]
    append_record(path, second)
    assert read_records(path) == [first, second]
    path.write_bytes(whole[:length])
    assert read_records(path) == []
    append_record(path, second)
    assert read_records(path) == [second]


def test_a_torn_line_between_others_is_told_of(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, Record(**GOOD))
    whole = path.read_bytes()
    for torn in (whole[:300], whole[:300] + b"\n"):
        path.write_bytes(whole + torn + whole)
        with pytest.raises(ConfigError, match=r"r\.jsonl, line 2: damaged"):
            read_records(path)


def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    append_record(path, Record(**GOOD))
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space"):
        append_record(path, Record(**GOOD | {"run": 1}))
    assert path.read_bytes() == before


def test_latest_keeps_the_retry():
    failed = Record(**GOOD | {"status": "timeout", "reason": "slow", "tokens": [], "per_token_s": []})
    other, retried = Record(**GOOD | {"run": 1}), Record(**GOOD)
    assert latest([failed, other, retried]) == [retried, other]


def test_a_run_shows_the_machine_that_was_certified_wherever_it_was_drawn_again(tmp_path):
    run = REFERENCE_DIR / "h100_2026-11-25"
    elsewhere = Run(REFERENCE_DIR / "2-cores_2026-11-25").provenance["machine"]
    shutil.copytree(run / "results", tmp_path / "results")
    (tmp_path / "provenance.json").write_text(json.dumps({"machine": elsewhere.model_dump(mode="json")}))
    assert not elsewhere.gpus
    assert [gpu.name for gpu in Run(tmp_path).machine.gpus] == ["NVIDIA H100 80GB HBM3"]
    (tmp_path / "results" / "certify.json").unlink()
    assert Run(tmp_path).machine == elsewhere
