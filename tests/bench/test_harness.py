import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from djinn import hardware
from djinn.bench import harness, worker_client
from djinn.bench.harness import Bench, Lane, run_baselines
from djinn.bench.measure import MemoryPeak, measure
from djinn.bench.records import read_records
from djinn.bench.statistics import tokens_agree
from djinn.bench.systems import resident
from djinn.bench.worker_client import WorkerError, WorkerProcess
from djinn.errors import CheckpointError
from djinn.profiles import load_profile

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(worker_client, "COMMAND", FAKE)


def lanes(profile, *variants):
    return [Lane(system="fake", target=variant, variant=variant, profile=profile) for variant in variants]


def test_a_lane_may_be_measured_less_often_than_the_others(fake, profile, tmp_path):
    often, seldom = lanes(profile, "good", "lacks")
    seldom = dataclasses.replace(seldom, most_runs=1)
    for order in ("by run", "by lane"):
        with Bench("baselines", profile, tmp_path / order, keep=True) as bench:
            missing = bench.missing([often, seldom], runs=3, order=order)
        counts = Counter(lane.variant for lane, _ in missing)
        assert (counts["good"], counts["lacks"]) == (3, 1)


def test_every_system_gets_what_the_profile_asks_of_it(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(Bench, "measure", lambda _, lanes, **__: seen.extend(lanes))
    profile = load_profile("compare_70b").override(deepspeed={"stage3_max_live_parameters": 7})
    run_baselines(profile, tmp_path)
    by_name = {f"{lane.system}:{lane.target}".removesuffix(":"): lane for lane in seen}
    assert list(by_name) == list(profile.systems)
    assert by_name["deepspeed:cpu"].tuning == (("stage3_max_live_parameters", 7),)
    assert by_name["djinn:lossless"].profile.coding == "lossless"
    assert (by_name["accelerate:cpu"].most_runs, by_name["accelerate:cpu"].profile.new_tokens) == (2, 3)
    assert (by_name["djinn"].most_runs, by_name["djinn"].profile.new_tokens) == (5, 16)


BEFORE = set()
"""Children of this process that other tests have left: a compiler's, say."""


@pytest.fixture(autouse=True)
def only_own_children():
    BEFORE.clear()
    BEFORE.update(child.pid for child in psutil.Process().children())


def children():
    found = (child for child in psutil.Process().children() if child.pid not in BEFORE)
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_real_systems_agree_and_a_second_call_measures_nothing(profile, tmp_path, monkeypatch):
    profile = profile.override(systems=["djinn", "accelerate:disk"])
    records = run_baselines(profile, tmp_path)
    assert [(record.system, record.run) for record in records] == [
        ("djinn", 0),
        ("accelerate", 0),
        ("accelerate", 1),  # each run begins with another system
        ("djinn", 1),
    ]
    assert {record.status for record in records} == {"ok"}, [record.reason for record in records]
    assert set(tokens_agree(records).values()) == {True}
    ours, theirs = records[:2]
    assert {record.model_bytes for record in records} == {21_708_288}
    assert ours.ring_bytes > 0
    assert ours.peak_device_bytes < ours.peak_anon_bytes
    assert ours.resident_bytes < ours.model_bytes
    assert theirs.resident_bytes == 0
    for record in records:
        assert record.synthetic
        assert record.peak_host_bytes >= record.peak_anon_bytes > 0
        assert record.ceiling_gbps > 0
        assert record.wall_s >= record.ttft_s + sum(record.per_token_s) - 1e-6
    assert not (tmp_path / "scratch").exists()
    assert not children()

    monkeypatch.setattr(harness, "WorkerProcess", None)
    assert run_baselines(profile, tmp_path) == records
    assert len(read_records(tmp_path / "results" / "baselines.jsonl")) == 4


@pytest.mark.slow
@pytest.mark.skipif(
    hardware.installed("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed and a C++ compiler for its extensions",
)
def test_deepspeed_for_real(profile, job, tmp_path):
    (record,) = run_baselines(profile.override(systems=["deepspeed:cpu"], runs=1), tmp_path)
    assert record.status == "ok", record.reason
    reference = measure(resident.load(job), job, record.model_bytes, MemoryPeak())
    assert record.tokens == reference["tokens"]
    assert record.settings["stage3_prefetch_bucket_size"] > 0
    assert record.peak_anon_bytes > record.model_bytes


def test_one_systems_misfortune_is_a_record_and_the_others_go_on(fake, profile, tmp_path):
    profile = profile.override(timeout_s=1.5)
    everyone = lanes(profile, "good", "killed", "hangs", "exits", "crashes", "babbles", "lacks")
    with Bench("baselines", profile, tmp_path, keep=True) as bench:
        records = bench.measure(everyone, runs=3, order="by run")
    assert len(records) == 21
    status = {(record.variant, record.run): record.status for record in records}
    reason = {record.variant: record.reason for record in records if record.status != "ok"}
    assert [status["good", run] for run in range(3)] == ["ok"] * 3
    assert [status["killed", run] for run in range(3)] == ["ok", "oom", "oom"]
    assert [status["hangs", run] for run in range(3)] == ["timeout"] * 3
    assert [status["lacks", run] for run in range(3)] == ["unavailable"] * 3
    for variant in ("exits", "crashes", "babbles"):
        assert [status[variant, run] for run in range(3)] == ["error"] * 3
    assert "out of memory" in reason["killed"]
    assert "peaked at" in reason["killed"]
    assert "1.5 s" in reason["hangs"]
    assert "status 3" in reason["exits"]
    assert "SIGABRT" in reason["crashes"]
    assert "neither JSON" in reason["babbles"]
    assert reason["lacks"] == "no such device"
    assert "chatter" in (tmp_path / "logs" / "fake-good.log").read_text()
    assert not (tmp_path / "scratch").exists()
    assert not children()


def test_an_interrupted_comparison_goes_on_where_it_stopped(fake, profile, tmp_path, monkeypatch):
    everyone = lanes(profile, "good", "better")
    append = harness.append_record

    def interrupted(path, record):
        if len(read_records(path)) == 3:
            raise KeyboardInterrupt
        append(path, record)

    monkeypatch.setattr(harness, "append_record", interrupted)
    with pytest.raises(KeyboardInterrupt), Bench("baselines", profile, tmp_path, keep=True) as bench:
        bench.measure(everyone, runs=3, order="by run")
    assert not children()
    assert not (tmp_path / "scratch").exists()

    monkeypatch.setattr(harness, "append_record", append)
    with Bench("baselines", profile, tmp_path, keep=True) as bench:
        assert len(bench.missing(everyone, runs=3, order="by run")) == 3
        records = bench.measure(everyone, runs=3, order="by run")
    points = [record.point for record in read_records(tmp_path / "results" / "baselines.jsonl")]
    assert len(points) == len(set(points)) == len(records) == 6


def test_a_failed_point_is_tried_again_and_replaced(fake, profile, tmp_path):
    (lane,) = lanes(profile, "hangs")
    impatient = Lane(system="fake", target="hangs", variant="good", profile=profile.override(timeout_s=1.0))
    for tried, status in ((impatient, "timeout"), (lanes(profile, "good")[0], "ok")):
        with Bench("baselines", profile, tmp_path, keep=True) as bench:
            (record,) = bench.measure([tried], runs=1, order="by run")
            assert record.status == status
    assert lane.label == "fake:hangs"


@pytest.mark.parametrize("keep", [True, False])
def test_without_keeping_one_worker_is_loaded_at_a_time(fake, profile, tmp_path, keep):
    with Bench("baselines", profile, tmp_path, keep=keep) as bench:
        bench.measure(lanes(profile, "good", "better"), runs=2, order="by run" if keep else "by lane")
        assert len(children()) == (2 if keep else 1)


def test_order_by_lane(profile, tmp_path):
    with Bench("baselines", profile, tmp_path, keep=False) as bench:
        pairs = bench.missing(lanes(profile, "a", "b"), runs=2, order="by lane")
    assert [(lane.variant, run) for lane, run in pairs] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_scratch_of_a_killed_harness_is_removed(profile, tmp_path):
    left = tmp_path / "scratch" / "deepspeed-nvme" / "weights.swp"
    left.parent.mkdir(parents=True)
    left.write_text("26 GB")
    with Bench("baselines", profile, tmp_path, keep=True):
        assert not left.exists()


def test_a_real_worker_killed_while_it_works_is_out_of_memory(profile, tmp_path, job):
    worker = WorkerProcess(tmp_path / "log")
    (child,) = children()
    child.send_signal(signal.SIGKILL)
    with pytest.raises(WorkerError) as caught:
        worker.ask({"do": "run"}, 60)
    assert caught.value.status == "oom"


def test_a_missing_checkpoint_stops_the_comparison(profile, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        run_baselines(profile.override(model="nowhere"), tmp_path)


SLOW = """
import os, sys, time
replies = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    if "start" not in line:
        time.sleep(600)  # hears nothing any more
    print('{"status": "ok", "fields": {}}', file=replies, flush=True)
"""


def test_workers_have_the_same_seconds_to_go_in(monkeypatch, profile, tmp_path):
    monkeypatch.setattr(worker_client, "COMMAND", (sys.executable, "-c", SLOW))
    monkeypatch.setattr(worker_client, "_CLOSE_S", 1.0)
    with Bench("baselines", profile, tmp_path, keep=True) as bench:
        bench._start(lanes(profile, *"abcdef"))
        assert len(children()) == 6
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert not children()


def test_who_is_interrupted_waits_for_no_worker(monkeypatch, profile, tmp_path):
    monkeypatch.setattr(worker_client, "COMMAND", (sys.executable, "-c", SLOW))
    bench = Bench("baselines", profile, tmp_path, keep=True).__enter__()
    bench._start(lanes(profile, *"abc"))
    began = time.monotonic()
    bench.__exit__(KeyboardInterrupt, None, None)
    assert time.monotonic() - began < 5
    assert not children()


TETHERED = """
import sys, time, types
worker = types.ModuleType("djinn.bench.worker")
worker.main = lambda: print("importing", flush=True) or time.sleep(600)  # and hears nothing
sys.modules["djinn.bench.worker"] = worker
from djinn.bench import tethered
tethered.main()
"""
HARNESS = """
import sys, time
from pathlib import Path
from djinn.bench import worker_client
worker_client.COMMAND = (sys.executable, "-c", sys.argv[1])
worker = worker_client.WorkerProcess(Path(sys.argv[2]))
print(worker._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_still_importing_dies_with_its_harness(tmp_path, number):
    command = [sys.executable, "-c", HARNESS, TETHERED, str(tmp_path / "log")]
    harness = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(harness.stdout.readline()))
    while "importing" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    harness.send_signal(number)
    harness.communicate()
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_worker_is_tied_before_it_imports_anything_heavy():
    code = "import sys; from djinn.bench import tethered; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "pydantic", "numpy"} & set(said.split())
