import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.bench.records import Record
from djinn.bench.statistics import (
    CONFIDENCE,
    MEASURES,
    Summary,
    is_exceeded,
    reference_label,
    summarise,
    summary_frame,
    tokens_agree,
)
from djinn.errors import ConfigError

finite = st.floats(min_value=1e-3, max_value=1e3)


def record(system="djinn", variant="", run=0, tokens=(1, 2, 3), **fields):
    ok = {"load_s": 1.0, "ttft_s": 0.5, "per_token_s": [0.1, 0.3], "wall_s": 2.0, "tokens": list(tokens)}
    failed = fields.get("status", "ok") != "ok"
    document = {
        "experiment": "baselines",
        "model": "synthetic:llama-tiny",
        "synthetic": True,
        "device_name": "a CPU",
        "status": "ok",
        "budget_bytes": 5_000_000,
        "prompt_tokens": 8,
        "new_tokens": 3,
        "batch": 1,
        "config_digest": "0" * 16,
    }
    return Record(system=system, variant=variant, run=run, **(document | ({} if failed else ok) | fields))


def test_one_sample_has_no_spread():
    assert summarise([3.0]) == Summary(1, 3.0, None, None)


def test_few_samples_have_their_range():
    assert summarise([5.0, 3.0]) == Summary(2, 4.0, 3.0, 5.0)
    assert summarise([4.0, 1.0, 9.0, 2.0]) == Summary(4, 3.0, 1.0, 9.0)


# How many samples lie outside on each side: the table of the sign test, with an error of at most 1/16 on both together.
@pytest.mark.parametrize(("n", "outside"), [(5, 0), (8, 0), (9, 1), (11, 1), (12, 2), (17, 4), (20, 5), (100, 40)])
def test_more_have_an_interval_of_their_median(n: int, outside: int) -> None:
    samples = [float(value) for value in range(n)]
    random.Random(n).shuffle(samples)
    summary = summarise(samples)
    assert (summary.low, summary.high) == (outside, n - 1 - outside)


@pytest.mark.parametrize("n", [5, 9, 16])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    drawn = np.random.default_rng(n).exponential(size=(4000, n))
    held = [summary.low <= math.log(2) <= summary.high for summary in map(summarise, drawn.tolist())]
    assert np.mean(held) > CONFIDENCE - 0.015


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_nothing_to_summarise_is_an_error(samples):
    with pytest.raises(ConfigError, match="finite"):
        summarise(samples)


@given(st.lists(finite, min_size=2, max_size=200))
def test_the_spread_holds_the_median_and_scales(samples):
    summary, double = summarise(samples), summarise([2 * sample for sample in samples])
    assert min(samples) <= summary.low <= summary.median <= summary.high <= max(samples)
    assert (double.low, double.median, double.high) == (2 * summary.low, 2 * summary.median, 2 * summary.high)


@given(st.lists(finite, min_size=1, max_size=5), st.floats(min_value=0, max_value=10))
def test_a_ceiling_may_be_exceeded_by_as_much_as_its_looks_differ(looks, beyond):
    spread = max(looks) - min(looks)
    assert is_exceeded(max(looks) + spread + beyond, looks) is (max(looks) + spread + beyond > max(looks) + spread)
    assert not is_exceeded(max(looks), looks)


def test_the_frame_has_one_row_per_system_and_a_number_of_each_run():
    frame = summary_frame(
        [
            record(run=0, ttft_s=0.4, link_bytes=4 * 10**9, peak_host_bytes=10),
            record(run=1, ttft_s=0.6, link_bytes=8 * 10**9, peak_host_bytes=30),
            record("deepspeed", "nvme", status="unavailable", reason="no disk"),
        ]
    ).set_index("label")
    assert list(frame.index) == ["djinn", "deepspeed:nvme"]
    ours = frame.loc["djinn"]
    assert (ours["runs"], ours["status"], ours["peak_host_bytes"]) == (2, "ok", 30)
    assert ours["ttft_s_median"] == pytest.approx(0.5)
    assert (ours["ttft_s_low"], ours["ttft_s_high"]) == (0.4, 0.6)
    assert (ours["token_s_n"], ours["token_s_median"]) == (2, pytest.approx(0.2))
    assert ours["link_gbps_median"] == pytest.approx(3.0)
    theirs = frame.loc["deepspeed:nvme"]
    assert (theirs["runs"], theirs["status"], theirs["reason"]) == (0, "unavailable", "no disk")
    for measure in MEASURES:
        assert theirs[f"{measure}_n"] == 0
        assert math.isnan(theirs[f"{measure}_median"])
    assert frame["ttft_s_median"].dtype == float


def test_a_ceiling_that_runs_exceed_is_not_called_one():
    looks = {"link_bytes": 4 * 10**9, "wall_s": 2.0}
    for ceilings, is_ceiling in (((1.9, 1.7), True), ((1.9, 1.85), False), ((2.0, None), True), ((None, None), True)):
        frame = summary_frame([record(run=run, ceiling_gbps=each, **looks) for run, each in enumerate(ceilings)])
        assert frame["is_ceiling"].tolist() == [is_ceiling]


def test_a_retried_point_counts_once():
    frame = summary_frame([record(status="error", reason="broke"), record(ttft_s=0.4)])
    assert frame["runs"].tolist() == [1]
    assert frame["ttft_s_n"].tolist() == [1]


def test_the_reference_is_resident_then_an_independent_system():
    ours, theirs = record(), record("accelerate", "disk")
    assert reference_label([ours, theirs, record("resident")]) == "resident"
    assert reference_label([ours, theirs, record("resident", status="oom", reason="killed")]) == "accelerate:disk"
    assert reference_label([ours]) is None, "djinn is not its own reference"
    unsteady = [record("resident", tokens=[1, 2]), record("resident", run=1, tokens=[1, 3])]
    assert reference_label([ours, theirs, *unsteady]) == "accelerate:disk"
    assert reference_label([record(status="timeout", reason="slow")]) is None


def test_tokens_are_compared_one_by_one():
    records = [
        record("resident"),
        record(),
        record("accelerate", "disk", tokens=(1, 2, 4)),
        record("deepspeed", "cpu", status="error", reason="broke"),
    ]
    expected = {"resident": True, "djinn": True, "accelerate:disk": False, "deepspeed:cpu": None}
    assert tokens_agree(records) == expected
    assert tokens_agree([*records, record(run=1, tokens=(9, 9, 9))])["djinn"] is False


def test_a_system_that_was_asked_for_fewer_tokens_is_compared_as_far_as_they_go():
    short = record("accelerate", "cpu", tokens=(1,), new_tokens=1, per_token_s=[])
    longer = record("accelerate", "cpu-pinned")
    assert reference_label([short, longer, record()]) == "accelerate:cpu-pinned"
    agree = {"accelerate:cpu": True, "accelerate:cpu-pinned": True, "djinn": True}
    assert tokens_agree([short, longer, record()]) == agree
    other = record("accelerate", "cpu", tokens=(2,), new_tokens=1, per_token_s=[])
    assert tokens_agree([other, longer, record()]) == agree | {"accelerate:cpu": False}


def test_on_several_gpus_only_systems_that_add_up_alike_are_compared():
    two = {"gpus": 2}
    other = [
        record("deepspeed", "cpu", tokens=(7, 8, 9), **two),
        record("accelerate", "cpu", tokens=(7, 8, 9), **two),
    ]
    ours = [record(**two), record(variant="lossless", **two)]
    none = {"deepspeed:cpu": None, "accelerate:cpu": None}
    assert reference_label([*other, *ours]) is None
    assert tokens_agree([*other, *ours]) == {"djinn": None, "djinn:lossless": None} | none
    held = [*other, *ours, record("resident", tokens=(1, 2, 4), **two)]
    assert reference_label(held) == "resident"
    assert tokens_agree(held) == {"djinn": False, "djinn:lossless": False, "resident": True} | none


@pytest.mark.parametrize("variant", ["host", "lossless+host"])
def test_tokens_that_the_hosts_cores_compute_are_neither_compared_nor_a_reference(variant):
    computed, ours = record("djinn", variant, tokens=[1, 2, 3]), record(tokens=[1, 2, 4])
    assert reference_label([computed]) is None
    assert tokens_agree([computed, ours]) == {f"djinn:{variant}": None, "djinn": None}
    held = tokens_agree([computed, ours, record("resident", tokens=[1, 2, 4])])
    assert held == {f"djinn:{variant}": None, "djinn": True, "resident": True}
