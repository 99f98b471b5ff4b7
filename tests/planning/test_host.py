"""Host units: link and cores end together, at any point of a pass, and what is left alone stays so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn.codec.layout import Layout
from djinn.errors import ConfigError
from djinn.planning.host import CORE_MOST, HostCompute, HostRates, HostShare, assumed_rates, host_units, taken_in_turn
from djinn.planning.placement import Tier, make_plan
from djinn.planning.prediction import predict
from djinn.planning.rates import Rates
from djinn.planning.request import Request
from djinn.planning.work import Work
from djinn.planning.workspace import Workload
from djinn.weights.tensors import PAGE, FileSpan, Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

WORK = Workload(prompt_tokens=64, new_tokens=8, batch=1)
PLAIN = Work(shares={}, head=frozenset(), attention_flops=0.0, cache_bytes=0, workload=WORK)
rate = st.floats(1e9, 1e11)
LARGE = 10**12
"""A ring that holds whatever comes while the cores compute."""


def unit(number: int, nbytes: int, *, made: bool = True) -> Unit:
    source = Seeded(f"w{number}", 0) if made else FileSpan(Path(), 0)
    entry = TensorEntry(torch.bfloat16, (nbytes // 2,), source)
    return Unit(name=f"u{number}", readers=(f"u{number}",), tensors=(PlacedTensor(f"u{number}.weight", entry, 0),))


@st.composite
def models(draw: st.DrawFn) -> list[Unit]:
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    return [unit(number, size * PAGE) for number, size in enumerate(sizes)]


@st.composite
def host_rates(draw: st.DrawFn) -> HostRates:
    return HostRates(link=draw(rate), cores=draw(rate), wait_s=draw(st.sampled_from([0.0, 1e-6])))


def names(units: Iterable[Unit]) -> dict[str, str]:
    """All of them, with inputs of their own."""
    return {each.name: each.name for each in units}


def seconds(units: list[Unit], chosen: frozenset[str], rates: HostRates) -> tuple[float, float]:
    link_s = sum(each.weight_bytes / rates.link for each in units if each.name not in chosen)
    return link_s, sum(rates.product_s(each.raw_bytes) for each in units if each.name in chosen)


@given(models(), host_rates())
def test_link_and_cores_end_together_at_every_point_of_a_pass(units: list[Unit], rates: HostRates) -> None:
    share, took_s = taken_in_turn(units, names(units), names(units), rates, 0, LARGE)
    chosen = share.units
    assert took_s == pytest.approx(max(seconds(units, chosen, rates)))
    for end in range(1, len(units) + 1):
        link_s, cores_s = seconds(units[:end], chosen, rates)
        longest = max(max(each.weight_bytes / rates.link, rates.product_s(each.raw_bytes)) for each in units[:end])
        assert abs(link_s - cores_s) <= longest * 1.000001


@given(models(), host_rates(), st.data())
def test_the_slower_of_both_is_never_slower_than_the_link_alone(
    units: list[Unit], rates: HostRates, data: st.DataObject
) -> None:
    able = data.draw(st.sets(st.sampled_from([each.name for each in units])))
    chosen = host_units(units, names(units), {name: name for name in able}, rates, 0, LARGE).units
    assert chosen <= able
    assert max(seconds(units, chosen, rates)) <= seconds(units, frozenset(), rates)[0] * 1.000001


@given(models(), host_rates())
def test_a_pass_is_never_slower_than_if_the_cores_took_all_that_they_can(units: list[Unit], rates: HostRates) -> None:
    chosen = host_units(units, names(units), names(units), rates, 0, LARGE).units
    _, all_s = taken_in_turn(units, names(units), names(units), rates, 0, LARGE)
    assert max(seconds(units, chosen, rates)) <= all_s * 1.000001


def test_the_cores_take_few_large_units_rather_than_many_small_ones() -> None:
    units = [unit(number, (100 if number % 4 == 0 else 10) * PAGE) for number in range(80)]
    sizes = {each.name: each.raw_bytes for each in units}
    for wait_s, smallest in ((0.0, 10 * PAGE), (2e-3, 100 * PAGE)):
        rates = HostRates(link=1e8, cores=1e8, wait_s=wait_s)
        chosen = host_units(units, names(units), names(units), rates, 0, LARGE).units
        assert min(sizes[name] for name in chosen) == smallest


def test_units_that_read_the_same_inputs_are_one_product() -> None:
    """The second of each pair costs no wait of its own, and goes where the first one goes."""
    units = [unit(number, 10 * PAGE) for number in range(80)]
    pairs = {each.name: f"pair {number // 2}" for number, each in enumerate(units)}
    rates = HostRates(link=1e9, cores=1e9, wait_s=5 * PAGE / 1e9)
    share, seconds = taken_in_turn(units, names(units), pairs, rates, 0, LARGE)
    assert share.joined == {f"u{number + 1}" for number in range(0, 80, 2) if f"u{number}" in share.units}
    assert share.joined
    assert share.joined < share.units
    assert seconds < taken_in_turn(units, names(units), names(units), rates, 0, LARGE)[1]
    made = make_plan(units, budget=100 * PAGE, workspace_bytes=0, host_bytes=10**9, host=share)
    alone = replace(made, host=replace(share, joined=frozenset()))
    saved = [predict(each, Rates(device="cuda", link=1e9), PLAIN).cores_s for each in (alone, made)]
    assert saved[0] - saved[1] == pytest.approx(len(share.joined) * rates.wait_s)


def test_fewer_threads_than_were_measured_are_given_less() -> None:
    rates = HostRates(link=1e9, cores=100e9, threads=6)
    assert [rates.with_threads(threads).cores for threads in (7, 6, 5)] == [100e9, 100e9, 5 * CORE_MOST]
    assert replace(rates, threads=None).with_threads(7).cores == 7 * CORE_MOST


def test_launching_costs_nothing_until_it_takes_longer_than_the_pass() -> None:
    units = [unit(number, 10 * PAGE) for number in range(100)]
    copy_s = 10 * PAGE / 1e9
    rates = HostRates(link=1e9, cores=1e9, wait_s=0.0)
    for module_s, expected_s in ((0.0, 50 * copy_s), (copy_s / 3, 50 * copy_s), (copy_s / 1.5, 100 * copy_s / 1.5)):
        share = host_units(units, names(units), names(units), replace(rates, module_s=module_s), 0, LARGE)
        assert len(share.units) == 50
        made = make_plan(units, budget=30 * PAGE, workspace_bytes=0, host_bytes=10**9, host=share)
        known = Rates(device="cuda", link=1e9, module_s=module_s)
        assert predict(made, known, PLAIN).token_s == pytest.approx(expected_s, rel=0.05)


def test_a_product_that_waits_longer_than_it_saves_is_left_to_the_link() -> None:
    units = [unit(number, 10 * PAGE) for number in range(10)]
    rates = HostRates(link=50e9, cores=50e9, wait_s=1e-3)
    assert not host_units(units, names(units), names(units), rates, 0, LARGE).units


def test_a_product_during_which_the_ring_would_be_full_is_left_to_the_link() -> None:
    """Two units fit the ring: cores a third as fast as the link would leave it idle, however many units there are."""
    units = [unit(number, 10 * PAGE) for number in range(100)]
    rates = HostRates(link=3e9, cores=1e9, wait_s=0.0)
    assert not host_units(units, names(units), names(units), rates, 0, 20 * PAGE).units
    assert len(host_units(units, names(units), names(units), rates, 0, 30 * PAGE).units) == 25


def test_products_that_save_less_than_busy_cores_take_from_the_link_are_not_made() -> None:
    units = [unit(number, 10 * PAGE) for number in range(100)]
    for alone, some in ((10.5e9, True), (12e9, False), (None, True)):
        rates = HostRates(link=10e9, cores=1e9, alone=alone, wait_s=0.0)
        assert bool(host_units(units, names(units), names(units), rates, 0, LARGE).units) is some


@given(models(), host_rates(), st.integers(0, 40), st.integers(0, 100))
def test_a_plan_keeps_its_host_units_in_host_memory(
    units: list[Unit], rates: HostRates, more: int, percent: int
) -> None:
    """Whatever the budget: they are pinned, both orders fit the ring, and the second has all others that stream."""
    least = 3 * max(each.image_bytes for each in units)
    budget = least + sum(each.image_bytes for each in units) * percent // 100
    host_bytes = sum(each.image_bytes for each in units)
    before = make_plan(units, budget=budget, workspace_bytes=0, host_bytes=host_bytes)
    share = host_units(units, names(before.streamed), names(units[: len(units) - more % 3]), rates, 0, LARGE)
    chosen = share.units
    made = make_plan(units, budget=budget, workspace_bytes=0, host_bytes=host_bytes, host=share)
    assert made.host is not None
    tiers = {each.name: tier for each, tier in zip(made.units, made.tiers, strict=True)}
    assert all(tiers[name] is Tier.PINNED for name in made.host.units)
    assert made.host.units == chosen
    assert {each.name for each in made.second} == {each.name for each in made.streamed} - chosen
    assert [slot.nbytes for slot in made.slots] == [each.image_bytes for each in made.visits]
    assert all(slot.offset + slot.nbytes <= made.ring_bytes for slot in made.slots)
    assert made.device_bytes <= budget


@given(models(), host_rates(), st.integers(0, 1000))
def test_host_units_wait_coded_too_where_there_is_room(units: list[Unit], rates: HostRates, percent: int) -> None:
    """Raw ones take what coded ones leave; copies of them what is left then; and the plan keeps to it."""
    coded = [each.with_entries(lambda entry: replace(entry, layout=Layout(entry.raw_bytes // 2, 0))) for each in units]
    room = sum(each.image_bytes for each in coded) * percent // 500
    share = host_units(coded, names(coded), names(coded), rates, room, LARGE)
    chosen = [each for each in coded if each.name in share.units]
    raw = sum(each.raw().image_bytes - each.image_bytes for each in chosen)
    twice = sum(each.image_bytes for each in chosen if each.name in share.coded_too)
    assert share.coded_too <= share.units
    assert raw + twice <= room
    assert (share.coded_too == share.units) is (sum(each.image_bytes for each in chosen) <= room - raw)
    waiting = [each.raw() if each.name in share.units - share.coded_too else each for each in coded]
    budget = 4 * max(each.raw_bytes + 2 * PAGE for each in units)
    limit = sum(each.image_bytes for each in coded) + raw + twice
    made = make_plan(waiting, budget=budget, workspace_bytes=0, host_bytes=limit, host=share)
    assert made.pinned_bytes == sum(each.image_bytes for each in (*made.at(Tier.PINNED), *made.raw_copies)) <= limit
    assert not made.disk_bytes


def test_host_units_are_in_host_memory_where_others_are_on_disk() -> None:
    units = [unit(number, 10 * PAGE, made=False) for number in range(10)]
    share = HostShare(units=frozenset({"u3", "u7"}), rates=assumed_rates(4))
    made = make_plan(units, budget=30 * PAGE, workspace_bytes=0, host_bytes=40 * PAGE, host=share)
    assert {"u3", "u7"} <= {each.name for each in made.at(Tier.PINNED)}
    assert len(made.at(Tier.PINNED)) == 4


def test_a_plan_without_host_units_has_one_order() -> None:
    units = [unit(number, 10 * PAGE) for number in range(10)]
    made = make_plan(units, budget=30 * PAGE, workspace_bytes=0, host_bytes=10**9)
    assert made.host is None
    assert made.visits == made.streamed
    assert "computed" not in made.table()


def planned(rates: HostRates | None) -> tuple[float, float]:
    """Predicted seconds of the first token and of each other one, of 40 equal units, a quarter of them resident."""
    units = [unit(number, 100 * PAGE) for number in range(40)]
    before = make_plan(units, budget=1300 * PAGE, workspace_bytes=0, host_bytes=10**9)
    if rates is not None:
        share = host_units(units, names(before.streamed), names(units), rates, 0, LARGE)
        before = make_plan(units, budget=1300 * PAGE, workspace_bytes=0, host_bytes=10**9, host=share)
    times = predict(before, Rates(device="cuda", link=1e9), PLAIN)
    return times.ttft_s, times.token_s


def test_with_cores_as_fast_as_the_link_a_token_takes_half_and_a_prompt_as_long() -> None:
    ttft_s, token_s = planned(HostRates(link=1e9, cores=1e9, wait_s=0.0))
    alone_ttft_s, alone_token_s = planned(None)
    assert ttft_s == pytest.approx(alone_ttft_s, rel=0.02)
    assert token_s == pytest.approx(alone_token_s / 2, rel=0.05)


def test_waits_are_part_of_a_prediction() -> None:
    without, waiting = (planned(HostRates(link=1e9, cores=1e9, wait_s=wait_s))[1] for wait_s in (0.0, 4e-5))
    assert waiting > without


@pytest.mark.parametrize(("alone", "expected"), [(None, 30), (1e9, 30), (2e9, 20)])
def test_the_link_is_faster_while_the_cores_wait_for_it(alone: float | None, expected: int) -> None:
    """A copy of 30 pages beside a product of 10: two thirds of it are left when the product is done."""
    units = [unit(0, 30 * PAGE), unit(1, 10 * PAGE)]
    share = HostShare(units=frozenset({"u1"}), rates=HostRates(link=1e9, cores=1e9, wait_s=0.0, alone=alone))
    made = make_plan(units, budget=35 * PAGE, workspace_bytes=0, host_bytes=10**9, host=share)
    assert [each.name for each in made.second] == ["u0"]
    token_s = predict(made, Rates(device="cuda", link=1e9), PLAIN).token_s
    assert token_s == pytest.approx(expected * PAGE / 1e9, rel=0.05)


def test_without_host_units_the_link_is_idle_already() -> None:
    units = [unit(0, 30 * PAGE), unit(1, 10 * PAGE)]
    share = HostShare(units=frozenset(), rates=HostRates(link=1e9, cores=1e9, wait_s=0.0, alone=2e9))
    plans = [
        make_plan(units, budget=35 * PAGE, workspace_bytes=0, host_bytes=10**9, host=host) for host in (None, share)
    ]
    alone, beside = (predict(plan, Rates(device="cuda", link=2e9), PLAIN).token_s for plan in plans)
    assert beside == pytest.approx(alone)


def test_a_faster_link_makes_no_disk_faster() -> None:
    """A read of 60 pages, then a copy of 30 beside a product of 10."""
    units = [unit(0, 30 * PAGE, made=False), unit(1, 10 * PAGE)]
    rates = HostRates(link=1e9, cores=1e9, wait_s=0.0, alone=2e9)
    share = HostShare(units=frozenset({"u1"}), rates=rates)
    made = make_plan(units, budget=35 * PAGE, workspace_bytes=0, host_bytes=10 * PAGE, host=share)
    assert made.tiers == (Tier.DISK, Tier.PINNED)
    token_s = predict(made, Rates(device="cuda", link=1e9, disk=0.5e9), PLAIN).token_s
    assert token_s >= 60 * PAGE / 1e9


def test_what_cannot_be_asked_of_the_cores_is_refused() -> None:
    shared = {"budget": "1 GB", "keep": WORK}
    for device, dtype, threads, words in (
        ("cpu", None, None, "whose cores compute already"),
        ("cuda", torch.float16, None, "dtype is torch.float16"),
        ("cuda", None, 0, "at least 1"),
        ("cuda", None, True, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            Request.of(**shared, device=device, dtype=dtype, host_compute=True, host_threads=threads)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not asked for"):
        Request.of(**shared, device="cuda", host_threads=4)  # type: ignore[arg-type]
    asked = Request.of(**shared, device="cuda", host_compute=True, host_threads=4)  # type: ignore[arg-type]
    assert asked.host == HostCompute(threads=4)
    assert Request.of(**shared, device="cuda") == replace(asked, host=None)  # type: ignore[arg-type]
