"""Forecasts: what else would fit, and what it would give, against plans made one by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from djinn.engine.forecast import forecast
from djinn.engine.opened import outlined
from djinn.errors import PlanError
from djinn.planning.outlook import Forecast
from djinn.planning.placement import Plan
from djinn.planning.prediction import predict
from djinn.planning.rates import ComputeRate, Rates
from djinn.planning.request import Request
from djinn.planning.work import work_of
from djinn.planning.workspace import Workload
from djinn.weights import opening
from djinn.weights.opening import index_of

MODEL = "synthetic:llama-2-7b"
FREE = 8 * 10**9
RATES = Rates(device="cuda", link=10e9, disk=2e9, compute=(ComputeRate(tokens=1, rate=1e12),), module_s=1e-4)
WORK = {"prompt_tokens": 128, "new_tokens": 8}


@pytest.fixture(scope="module")
def found() -> Forecast:
    return forecast(MODEL, budget="6 GB", device="cuda", rates=RATES, free=FREE, **WORK)


def planned(budget: int, **changes: int) -> Plan:
    work = Workload(**({"batch": 1, **WORK} | changes))
    request = Request.of(budget=budget, keep=work, device="cuda", dtype=torch.bfloat16)
    return outlined(MODEL, request).on_disk().plan(FREE)


@pytest.mark.slow
def test_a_machine_that_is_not_here_is_planned_in_its_own_memory(found: Forecast) -> None:
    assert found.plan == planned(6 * 10**9)
    assert found.plan.disk_bytes > 0
    assert found.plan.pinned_bytes <= 0.8 * FREE


def test_what_fits_is_the_most_that_fits(found: Forecast) -> None:
    planned(6 * 10**9, batch=found.largest_batch)
    with pytest.raises(PlanError):
        planned(6 * 10**9, batch=found.largest_batch + 1)
    assert found.longest_prompt == 4096 - 8  # what the model was made for
    assert [choice.batch for choice in found.batches] == [2**k for k in range(len(found.batches))]
    assert found.batches[-1].batch <= found.largest_batch < 2 * found.batches[-1].batch


def test_one_more_gb_is_planned_again(found: Forecast) -> None:
    index = index_of(MODEL, Path(), torch.device("cpu"))
    more = planned(7 * 10**9)
    times = [predict(plan, RATES, work_of(index, plan.units, found.work)).token_s for plan in (found.plan, more)]
    assert found.gain_s == pytest.approx(times[0] - times[1])
    assert found.gain_s > 0


def test_budgets_go_from_the_smallest_that_works_to_all_of_the_model(found: Forecast) -> None:
    budgets = [choice.budget for choice in found.budgets]
    assert budgets == sorted(budgets)
    assert found.plan.budget in budgets
    assert found.budgets[-1].plan.resident_bytes >= found.plan.model_bytes
    with pytest.raises(PlanError):
        planned(budgets[0] - 10**6)
    times = [choice.predicted.token_s for choice in found.budgets]
    assert times[0] > times[-1] > 0


def test_without_rates_there_is_a_plan_and_a_reason() -> None:
    bare = forecast("synthetic:llama-tiny", budget="5 MB", device="cpu", prompt_tokens=8, new_tokens=4)
    assert (bare.predicted, bare.more, bare.batches, bare.budgets, bare.gain_s) == (None, None, (), (), None)
    assert "no rates" in bare.unknown
    assert bare.largest_batch >= 1
    blind = forecast(
        "synthetic:llama-tiny", budget="5 MB", device="cpu", prompt_tokens=8, new_tokens=4, host_memory="1 MB",
        rates=Rates(device="cpu", link=1e9),
    )  # fmt: skip
    assert "over the disk" in blind.unknown


def test_a_budget_that_cannot_work_says_what_would() -> None:
    with pytest.raises(PlanError, match=r"budget: .*it would fit a prompt of \d+ tokens"):
        forecast(MODEL, budget="6 GB", device="cuda", free=FREE, prompt_tokens=4000, batch=48)


def test_a_hub_id_is_planned_as_its_checkpoint(
    codable_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this one the headers are all there is: what stands for the hub fetches them from a folder."""

    def outline(model: str, into: Path) -> str:
        assert model == "org/name"
        return shutil.copytree(codable_checkpoint, into)

    monkeypatch.setattr(opening, "outline", outline)
    told = {
        "budget": "20 MB",
        "device": "cpu",
        "prompt_tokens": 8,
        "new_tokens": 4,
        "free": FREE,
        "host_memory": "1 GB",
    }
    hub = forecast("org/name", rates=RATES, **told)  # type: ignore[arg-type]
    monkeypatch.undo()
    here = forecast(codable_checkpoint, rates=RATES, **told)  # type: ignore[arg-type]
    assert hub.predicted == here.predicted
    assert (hub.plan.tiers, hub.plan.slots) == (here.plan.tiers, here.plan.slots)


def test_a_resident_model_takes_no_time_that_is_known() -> None:
    """Where only the link was measured."""
    known = Rates(device="cuda", link=10e9)
    found = forecast("synthetic:llama-tiny", budget="4 GB", device="cuda", rates=known, free=FREE, **WORK)
    assert not found.plan.streamed
    assert found.predicted is None
    assert "all weights are resident" in found.unknown
