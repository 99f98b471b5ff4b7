"""Where nobody has measured the host's cores, a load does; planned for a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from djinn.engine import load
from djinn.engine import opened as planning
from djinn.engine.opened import Opened, outlined
from djinn.errors import PlanError
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.placement import Plan
from djinn.planning.request import Request
from djinn.planning.workspace import Workload

FREE = 10**12
WORK = Workload(prompt_tokens=64, new_tokens=16, batch=1)
FAST = HostRates(link=40e9, cores=110e9, alone=50e9, tokens=8, threads=9)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The threads of each measurement, which finds ``FAST``."""
    asked: list[int | None] = []

    def beside_link(_: object, threads: int | None) -> HostRates:
        asked.append(threads)
        return FAST

    monkeypatch.setattr(load, "beside_link", beside_link)
    return asked


@pytest.fixture(autouse=True)
def fourteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "choose_cpus", lambda threads, _: tuple(range(threads or 14)))


def opened(model: str, budget: str, **host: Any) -> tuple[Opened, Plan]:
    request = Request.of(budget=budget, keep=WORK, device="cuda", coding="none")
    found = outlined(f"synthetic:{model}", replace(request, host=HostCompute(**host)))
    return found, found.plan(FREE)


def test_a_plan_with_assumed_rates_is_made_again_with_measured_ones(measured: list[int | None]) -> None:
    found, assumed = opened("llama-2-7b", "3 GB", threads=9)
    assert assumed.host is not None
    assert assumed.host.rates.assumed
    planned = load._with_measured_cores(found, assumed, FREE)
    assert measured == [9]
    assert planned.host is not None
    assert (planned.host.rates.cores, planned.host.rates.assumed) == (110e9, False)
    assert len(planned.host.units) > len(assumed.host.units)


@pytest.mark.parametrize(
    ("model", "budget", "host"),
    [("llama-2-7b", "40 GB", {}), ("llama-2-7b", "3 GB", {"rates": FAST}), ("llama-2-7b", "14 GB", {})],
    ids=["all fits", "known", "nothing for the cores"],
)
def test_nothing_is_measured_where_it_would_change_nothing(
    model: str, budget: str, host: dict[str, Any], measured: list[int | None]
) -> None:
    found, planned = opened(model, budget, **host)
    assert load._with_measured_cores(found, planned, FREE) is planned
    assert measured == []


def test_where_the_driver_page_locks_nothing_rates_stay_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> HostRates:
        raise PlanError("no page-locked memory")

    monkeypatch.setattr(load, "beside_link", refused)
    found, planned = opened("llama-2-7b", "3 GB")
    assert load._with_measured_cores(found, planned, FREE) is planned


def test_a_small_arena_is_not_worth_it(measured: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    found, planned = opened("llama-2-7b", "3 GB")
    monkeypatch.setattr(load, "MEASURED_BYTES", planned.pinned_bytes + 1)
    assert load._with_measured_cores(found, planned, FREE) is planned
    assert measured == []
