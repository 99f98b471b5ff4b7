"""Which experts the cores take: as many as make link and cores end together, and none where the host has no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn.planning.experts import HOST_S, LAYER_IDLE_S
from djinn.planning.host import RESUME_S, HostRates, HostShare
from djinn.planning.host_experts import mean_computed, misses_to_compute, whole_from
from djinn.planning.placement import Plan, make_plan
from djinn.planning.prediction import predict
from djinn.planning.rates import Rates
from djinn.planning.work import Work
from djinn.planning.workspace import Workload
from djinn.weights.tensors import PAGE, FileSpan, Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

EVEN = HostRates(link=1e9, cores=1e9, wait_s=0.0)
WORK = Work(shares={}, head=frozenset(), attention_flops=0.0, cache_bytes=0,
            workload=Workload(prompt_tokens=64, new_tokens=8, batch=1))  # fmt: skip
rate = st.floats(1e9, 1e11)


def tensor(name: str, shape: tuple[int, ...], *, made: bool = True) -> PlacedTensor:
    source = Seeded(name, 0) if made else FileSpan(Path(), 0)
    return PlacedTensor(name, TensorEntry(torch.bfloat16, shape, source), 0)


def layer(number: int, experts: int, pages: int, *, made: bool = True) -> Unit:
    name, size = f"layer {number}", pages * PAGE // 2
    parts = [Unit(f"{name} {k}", (name,), (tensor(f"{name}.w", (size,), made=made),)) for k in range(experts)]
    return Unit(name, (name,), (tensor(f"{name}.w", (experts, size), made=made),), experts=tuple(parts))


def planned(rates: HostRates | None = EVEN, slots: int = 4, host_bytes: int = 10**12, *, made: bool = True) -> Plan:
    """Return a plan of four layers of eight experts of 10 MB, two picked, with a pool of some slots."""
    units = [layer(number, 8, 10**7 // PAGE, made=made) for number in range(4)]
    return make_plan(
        units, budget=slots * units[0].experts[0].image_bytes, workspace_bytes=0, host_bytes=host_bytes, picked=2,
        host=None if rates is None else HostShare(units=frozenset(), rates=rates),
    )  # fmt: skip


@given(st.integers(0, 40), st.integers(10**5, 10**9), rate, rate, st.floats(0, 1e-3))
def test_no_other_share_ends_earlier(lacking: int, nbytes: int, link: float, cores: float, wait_s: float) -> None:
    rates = HostRates(link=link, cores=cores, wait_s=wait_s)

    def end(computed: int) -> float:
        cores_s = wait_s + RESUME_S + computed * nbytes / cores if computed else 0.0
        return max((lacking - computed) * nbytes / link, cores_s + HOST_S)

    chosen = misses_to_compute(lacking, nbytes, rates)
    assert 0 <= chosen <= lacking
    assert end(chosen) == min(map(end, range(lacking + 1)))


def test_even_rates_share_evenly_and_small_experts_come_over_the_link() -> None:
    assert misses_to_compute(8, 10**9, EVEN) == 4
    assert misses_to_compute(8, 10**5, EVEN) == 0  # 0.8 ms of copies, beside which the host launches a layer
    assert misses_to_compute(0, 10**9, EVEN) == 0
    assert mean_computed(3.0, 10**9, EVEN) == misses_to_compute(3, 10**9, EVEN)
    three, four = (misses_to_compute(lacking, 10**9, EVEN) for lacking in (3, 4))
    assert mean_computed(3.5, 10**9, EVEN) == (three + four) / 2


def test_experts_that_the_cores_leave_alone_come_over_an_idle_link() -> None:
    """Beside cores that are far slower than the link none is computed, and the link is as fast as without them."""
    slow = HostRates(link=1e9, cores=1e6, alone=1.1e9, wait_s=0.0)
    assert misses_to_compute(8, 10**9, slow) == 0
    known = Rates(device="cuda", link=1.1e9)
    assert predict(planned(slow), known, WORK, 0.0).token_s == predict(planned(None), known, WORK, 0.0).token_s
    nearly = HostRates(link=1e9, cores=1.15e8, wait_s=0.0)
    assert misses_to_compute(10, 10**9, nearly) == 1
    assert misses_to_compute(10, 10**9, replace(nearly, alone=1.2e9)) == 0


def test_only_raw_experts_in_host_memory_are_computed() -> None:
    assert len(planned().computed_experts) == 4
    assert planned(None).computed_experts == ()
    on_disk = planned(host_bytes=0, made=False)
    assert on_disk.disk_bytes
    assert on_disk.computed_experts == ()


def test_passes_of_few_tokens_are_routed() -> None:
    alone, beside = planned(None, slots=20), planned(slots=20)
    first = whole_from(alone, 1e12)
    assert first is not None
    assert first <= EVEN.tokens
    assert whole_from(beside, 1e12) == EVEN.tokens + 1
    assert whole_from(planned(), 1e9) is None, "no window, no whole pass"


def test_a_layer_takes_as_long_as_the_longer_of_its_two_parts() -> None:
    known = Rates(device="cuda", link=1.0, cores_beside_link=1e9, link_beside_cores=1e9)
    each = planned().units[0].experts[0].image_bytes
    predicted = predict(planned(), known, WORK, hit_rate=0.0)
    # Of two experts that a token picks, and lacks, one comes and one is computed.
    assert predicted.token_s == pytest.approx(4 * (each / 1e9 + RESUME_S + LAYER_IDLE_S), rel=1e-3)
    assert predicted.link_s == pytest.approx(4 * each / 1e9, rel=1e-3)
    assert predicted.cores_s == pytest.approx(4 * (each / 1e9 + RESUME_S), rel=1e-3)
    alone = predict(planned(None), replace(known, link=1e9), WORK, hit_rate=0.0)
    assert alone.token_s == pytest.approx(4 * (2 * each / 1e9 + LAYER_IDLE_S), rel=1e-3)
    assert alone.cores_s == 0


@given(rate, rate, st.floats(0, 1), st.integers(1, 16))
def test_cores_never_make_it_slower(link: float, cores: float, hit_rate: float, batch: int) -> None:
    known = Rates(device="cuda", link=link)
    work = replace(WORK, workload=replace(WORK.workload, batch=batch))
    beside = planned(HostRates(link=link, cores=cores, wait_s=0.0))
    with_cores, without = predict(beside, known, work, hit_rate), predict(planned(None), known, work, hit_rate)
    assert with_cores.token_s <= without.token_s * (1 + 1e-6) + 4 * HOST_S
