import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.bench.records import Record
from djinn.bench.statistics import _T_975, MEASURES, reference_label, summarise, summary_frame, tokens_agree
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


def t_cdf(t: float, df: int) -> float:
    x = np.linspace(0, t, 20001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return 0.5 + scale * float(np.trapezoid(density, x))


@pytest.mark.parametrize("df", sorted(_T_975))
def test_every_tabulated_quantile_is_students(df):
    assert t_cdf(_T_975[df], df) == pytest.approx(0.975, abs=1e-4)


def test_a_known_interval():
    summary = summarise([1.0, 2.0, 3.0, 4.0])
    assert (summary.n, summary.mean, summary.median) == (4, 2.5, 2.5)
    assert summary.std == pytest.approx(1.2909944)
    assert summary.high - summary.mean == pytest.approx(3.182 * 1.2909944 / 2, rel=1e-6)


def test_one_sample_has_no_spread_and_no_interval():
    summary = summarise([3.0])
    assert (summary.mean, summary.median) == (3.0, 3.0)
    assert summary.std is summary.low is summary.high is None


def test_two_samples_have_a_spread_and_no_interval():
    summary = summarise([3.0, 5.0])
    assert summary.std == pytest.approx(2**0.5)
    assert summary.low is summary.high is None


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_nothing_to_summarise_is_an_error(samples):
    with pytest.raises(ConfigError, match="finite"):
        summarise(samples)


@given(st.lists(finite, min_size=3, max_size=200))
def test_the_interval_holds_the_mean_and_scales(samples):
    summary, double = summarise(samples), summarise([2 * sample for sample in samples])
    assert summary.low <= summary.mean <= summary.high
    assert min(samples) <= summary.median <= max(samples)
    assert double.high - double.low == pytest.approx(2 * (summary.high - summary.low), abs=1e-9)


def test_the_frame_has_one_row_per_system_and_pools_tokens():
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
    assert ours["ttft_s_mean"] == pytest.approx(0.5)
    assert ours["token_s_n"] == 4
    assert ours["link_gbps_mean"] == pytest.approx(3.0)
    theirs = frame.loc["deepspeed:nvme"]
    assert (theirs["runs"], theirs["status"], theirs["reason"]) == (0, "unavailable", "no disk")
    for measure in MEASURES:
        assert theirs[f"{measure}_n"] == 0
        assert math.isnan(theirs[f"{measure}_mean"])
    assert frame["ttft_s_mean"].dtype == float


def test_a_retried_point_counts_once():
    frame = summary_frame([record(status="error", reason="broke"), record(ttft_s=0.4)])
    assert frame["runs"].tolist() == [1]
    assert frame["ttft_s_n"].tolist() == [1]


def test_the_reference_is_resident_then_an_independent_system():
    ours, theirs = record(), record("accelerate", "disk")
    assert reference_label([ours, theirs, record("resident")]) == "resident"
    assert reference_label([ours, theirs, record("resident", status="oom", reason="killed")]) == "accelerate:disk"
    assert reference_label([ours]) == "djinn"
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


def test_on_several_gpus_only_systems_that_add_up_alike_are_compared():
    two = {"gpus": 2}
    other = [
        record("deepspeed", "cpu", tokens=(7, 8, 9), **two),
        record("accelerate", "cpu", tokens=(7, 8, 9), **two),
    ]
    ours = [record(**two), record(variant="lossless", **two)]
    none = {"deepspeed:cpu": None, "accelerate:cpu": None}
    assert reference_label([*other, *ours]) == "djinn"
    assert tokens_agree([*other, *ours]) == {"djinn": True, "djinn:lossless": True} | none
    held = [*other, *ours, record("resident", tokens=(1, 2, 4), **two)]
    assert reference_label(held) == "resident"
    assert tokens_agree(held) == {"djinn": False, "djinn:lossless": False, "resident": True} | none


@pytest.mark.parametrize("variant", ["host", "lossless+host"])
def test_tokens_that_the_hosts_cores_compute_are_neither_compared_nor_a_reference(variant):
    computed, ours = record("djinn", variant, tokens=[1, 2, 3]), record(tokens=[1, 2, 4])
    assert reference_label([computed]) is None
    assert tokens_agree([computed, ours]) == {f"djinn:{variant}": None, "djinn": True}
