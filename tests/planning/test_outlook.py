"""What else would fit, from plans and predictions that are handed in: what is left out, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from djinn.errors import PlanError, UnavailableError
from djinn.planning.outlook import Asked, Forecast, outlook
from djinn.planning.placement import Plan, make_plan
from djinn.planning.prediction import Prediction, predict
from djinn.planning.rates import Rates
from djinn.planning.request import Request
from djinn.planning.work import Work
from djinn.planning.workspace import Workload
from djinn.weights.tensors import PAGE, FileSpan, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

LOAD = Workload(prompt_tokens=8, new_tokens=4, batch=1)
BUDGET, SEQUENCE = 2000 * PAGE, 50 * PAGE
ENTRY = TensorEntry(torch.uint8, (100 * PAGE,), FileSpan(Path(), 0))
UNITS = [Unit(name=f"u{k}", readers=(f"u{k}",), tensors=(PlacedTensor(f"u{k}.weight", ENTRY, 0),)) for k in range(40)]
WORK = Work(shares={}, head=frozenset(), attention_flops=0.0, cache_bytes=0, workload=LOAD)


def found(rates: Rates | None, host_bytes: int, without_cores: Plan | None = None) -> Forecast:
    """Return the forecast of a model of 40 equal units, half of which fit beside one sequence."""

    def plan_for(budget: int, work: Workload) -> Plan:
        if work.batch > 20:
            raise PlanError("too many")
        return make_plan(UNITS, budget=budget, workspace_bytes=work.batch * SEQUENCE, host_bytes=host_bytes)

    def predict_for(plan: Plan, work: Workload) -> Prediction:
        if rates is None:
            raise UnavailableError("no rates")
        return predict(plan, rates, replace(WORK, workload=work))

    request = Request.of(budget=BUDGET, keep=LOAD, device="cuda")
    asked = Asked(
        request=request, gpus=1, whole_bytes=0, arena_bytes=host_bytes, threads=1, without_cores=without_cores
    )
    return outlook(plan_for(BUDGET, LOAD), asked, LOAD, plan_for, predict_for)


def test_choices_that_need_a_rate_nobody_knows_are_left_out_and_the_others_stay() -> None:
    """Sequences take the place of residents, which then have to come from disk."""
    whole = found(Rates(device="cuda", link=1e9, disk=1e9), host_bytes=2700 * PAGE)
    assert [choice.batch for choice in whole.batches] == [1, 2, 4, 8, 16]
    assert whole.unknown == ""
    some = found(Rates(device="cuda", link=1e9), host_bytes=2700 * PAGE)
    assert some.predicted == whole.predicted
    assert some.batches == whole.batches[: len(some.batches)]
    assert 0 < len(some.batches) < 5
    assert 0 < len(some.budgets) < len(whole.budgets)
    assert some.gain_s == whole.gain_s
    assert some.unknown == "the plan streams over the disk, whose rate has not been measured"


def test_nothing_is_predicted_where_the_chosen_plan_needs_a_rate_nobody_knows() -> None:
    for bare in (found(None, 10**9), found(Rates(device="cuda", link=1e9), host_bytes=0)):
        assert (bare.predicted, bare.batches, bare.budgets, bare.gain_s) == (None, (), (), None)
        assert bare.unknown


def test_the_same_plan_without_the_hosts_cores_is_predicted_beside() -> None:
    larger = make_plan(UNITS, budget=2 * BUDGET, workspace_bytes=SEQUENCE, host_bytes=10**9)
    both = found(Rates(device="cuda", link=1e9), 10**9, without_cores=larger)
    assert both.without_cores is not None
    assert both.predicted is not None
    assert both.without_cores.token_s < both.predicted.token_s
    assert found(Rates(device="cuda", link=1e9), 10**9).without_cores is None
