"""Pools and plans of models with routed experts: how large, when whole passes pay, what goes where, and how fast."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from djinn.errors import PlanError
from djinn.planning.experts import (
    HOST_S,
    LAYER_IDLE_S,
    MOST_GROUPS,
    MOVE_S,
    NO_POOL,
    ONE_S,
    Pool,
    mean_rate,
    pool_for,
)
from djinn.planning.memory import require_host_memory
from djinn.planning.placement import Plan, Tier, make_plan
from djinn.planning.prediction import predict
from djinn.planning.rates import ComputeRate, Rates
from djinn.planning.work import Work
from djinn.planning.workspace import Workload
from djinn.weights.tensors import PAGE, FileSpan, Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

BIG = 10**12
EXPERT = 3 * PAGE


def unit(name: str, nbytes: int, *, in_files: bool = True) -> Unit:
    entry = TensorEntry(torch.uint8, (nbytes,), FileSpan(Path(name), 0) if in_files else Seeded(name, 0))
    return Unit(name=name, readers=(f"{name}.reader",), tensors=(PlacedTensor(f"{name}.weight", entry, 0),))


def mixture(name: str, count: int, nbytes: int = EXPERT, *, in_files: bool = True) -> Unit:
    """Return a unit of ``count`` experts."""
    whole = unit(name, count * nbytes, in_files=in_files)
    experts = tuple(
        Unit(f"{name}[{number}]", whole.readers, unit(name, nbytes, in_files=in_files).tensors, is_expert=True)
        for number in range(count)
    )
    return Unit(name, whole.readers, whole.tensors, experts=experts)


def model(layers: int = 6, count: int = 8, *, in_files: bool = True) -> list[Unit]:
    """An embedding, layers of attention and experts, a head."""
    units = [unit("embed", 20 * PAGE)]
    for layer in range(layers):
        units += [unit(f"{layer}.attention", 5 * PAGE), mixture(f"{layer}.experts", count, in_files=in_files)]
    return [*units, unit("head", 20 * PAGE)]


DENSE = (20 + 6 * 5 + 20) * PAGE
"""Of ``model()``, whose experts have 6 * 8 * EXPERT."""


def plan(units: list[Unit], budget: int, *, host: int = BIG, workspace: int = 0, picked: int = 2) -> Plan:
    return make_plan(units, budget=budget, workspace_bytes=workspace, host_bytes=host, picked=picked)


# The pool


def test_a_pools_numbers() -> None:
    pool = Pool(slots=20, slot_bytes=1000, experts=80, widest=8, picked=2)
    assert (pool.nbytes, pool.share, pool.windows) == (20_000, 0.25, 2)
    assert Pool(15, 1000, 80, 8, 2).windows == 1
    assert Pool(7, 1000, 80, 8, 2).windows == 0
    assert (NO_POOL.nbytes, NO_POOL.share, NO_POOL.windows, NO_POOL.whole_from(1e9)) == (0, 1.0, 0, None)


def test_layers_that_pass_by_leave_equally_many_or_all_of_the_first() -> None:
    half = Pool(slots=40, slot_bytes=1, experts=80, widest=8, picked=2)
    assert [half.kept(24, layers) for layers in (10, 5, 1)] == [2, 4, 24]
    assert Pool(72, 1, 80, 8, 2).kept(56, 10) == 5, "a layer's worth is missing"
    assert Pool(73, 1, 80, 8, 2).kept(57, 10) == 57


def test_tokens_that_pick_evenly_need_as_many_experts_as_drawing_them_shows() -> None:
    pool = Pool(8, 1, 64, 32, 4)
    assert pool.distinct(1) == pytest.approx(4)
    draw = random.Random(0)
    for tokens in (2, 8, 30):
        made = [len({e for _ in range(tokens) for e in draw.sample(range(32), 4)}) for _ in range(400)]
        assert pool.distinct(tokens) == pytest.approx(sum(made) / 400, rel=0.02)
    assert Pool(8, 1, 64, 4, 9).distinct(1) == 4, "no more than there are"


@given(st.integers(1, 12), st.integers(0, 60 * EXPERT), st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_a_pool_has_what_one_token_needs_at_least_and_all_experts_at_most(
    picked: int, spare: int, counts: list[int]
) -> None:
    units = [mixture(str(number), count) for number, count in enumerate(counts)]
    pool = pool_for(units, picked, spare)
    floor = min(picked, max(counts))
    assert (pool.slot_bytes, pool.experts, pool.widest) == (EXPERT, sum(counts), max(counts))
    assert pool.slots == min(max(spare // EXPERT, floor), sum(counts))


def test_the_largest_expert_sets_the_slots_and_without_units_there_is_no_pool() -> None:
    assert pool_for([mixture("a", 4, PAGE), mixture("b", 2, 7 * PAGE)], 1, 100 * PAGE).slot_bytes == 7 * PAGE
    assert pool_for([], 4, BIG) == NO_POOL


def test_the_rate_of_several_layers_is_that_at_which_all_of_them_come() -> None:
    assert mean_rate([(10, 5.0)]) == 5.0
    assert mean_rate([(10, 5.0), (30, 1.0)]) == 40 / (2 + 30)


pools = st.builds(
    lambda slots, nbytes, layers, widest, picked: Pool(min(slots, layers * widest), nbytes, layers * widest, widest,
                                                       min(picked, widest)),
    st.integers(1, 3000), st.integers(10**5, 10**9), st.integers(1, 60), st.integers(2, 256), st.integers(1, 10),
)  # fmt: skip


@given(pools, st.floats(1e8, 1e12))
@example(Pool(512, 10**6, 48 * 128, 128, 8), 53e9)
@example(Pool(2000, 10**6, 48 * 128, 128, 8), 53e9)
def test_whole_passes_begin_where_they_are_faster(pool: Pool, link: float) -> None:
    """By the times of a layer as the module's text has them."""
    begin = pool.whole_from(link)
    if not pool.windows:
        assert begin is None
        return
    assert begin is not None
    assert begin >= 1
    each = (1 - pool.share) * pool.slot_bytes / link
    whole = max(pool.widest * each, HOST_S + pool.widest * pool.share * MOVE_S)

    def routed(tokens: int) -> float:
        one_by_one = ONE_S if pool.slots > MOST_GROUPS else 0.0
        return pool.distinct(tokens) * (each + one_by_one) + LAYER_IDLE_S

    nearly_all = 0.97 * pool.widest * (1 - 1e-9)
    assert routed(begin) >= whole * (1 - 1e-6) or pool.distinct(begin) >= nearly_all
    if begin > 1:
        assert routed(begin - 1) <= whole * (1 + 1e-6), "one token less would be faster routed"
        assert pool.distinct(begin - 1) <= nearly_all * (1 + 1e-6)


@given(pools)
def test_on_a_link_that_never_ends_only_nearly_all_experts_make_it_whole(pool: Pool) -> None:
    begin = pool.whole_from(1.0)
    if begin is not None and pool.share < 1:
        assert pool.distinct(begin) >= 0.96 * pool.widest


@given(pools, st.floats(1e8, 1e12))
def test_with_everything_in_the_pool_a_single_token_is_never_whole(pool: Pool, link: float) -> None:
    assume(pool.picked <= pool.widest / 2)
    everything = Pool(pool.experts, pool.slot_bytes, pool.experts, pool.widest, pool.picked)
    begin = everything.whole_from(link)
    assert begin is not None
    assert begin > 1


# Plans

sizes = st.integers(1, 60_000)


@st.composite
def mixtures(draw: st.DrawFn) -> list[Unit]:
    in_files = draw(st.sampled_from([True, True, False]))
    units = []
    for number in range(draw(st.integers(1, 6))):
        units.append(unit(f"{number}.dense", draw(sizes)))
        if draw(st.booleans()):
            units.append(mixture(f"{number}.experts", draw(st.integers(2, 6)), draw(sizes), in_files=in_files))
    return units


@given(mixtures(), st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**5), st.integers(1, 4))
def test_plans_keep_their_limits_or_say_what_would_do(
    units: list[Unit], budget: int, host: int, workspace: int, picked: int
) -> None:
    try:
        made = plan(units, budget, host=host, workspace=workspace, picked=picked)
    except PlanError as refusal:
        needed = re.search(r"need (\d+) bytes", str(refusal))
        if needed is None:
            return  # host memory
        made = plan(units, int(needed[1]), host=BIG, workspace=workspace, picked=picked)
    assert made.device_bytes <= made.budget
    assert made.pinned_bytes <= (host if made.budget == budget else BIG)
    assert not any(unit.experts for unit in made.at(Tier.RESIDENT))
    assert [slot.nbytes for slot in made.slots] == [unit.image_bytes for unit in made.streamed]
    assert made.resident_bytes + made.pinned_bytes + made.disk_bytes == sum(unit.image_bytes for unit in made.units)
    if made.routed:
        widest = max(len(unit.experts) for unit in made.routed)
        assert min(picked, widest) <= made.pool.slots <= made.pool.experts
        assert made.pool.slots == made.pool.experts or made.budget - made.device_bytes < made.pool.slot_bytes
    else:
        assert made.pool == NO_POOL


def test_dense_weights_stay_first_and_the_pool_gets_the_rest() -> None:
    made = plan(model(), DENSE + 10 * EXPERT)
    assert made.streamed == ()
    assert made.pool.slots == 10
    made = plan(model(), DENSE + 2 * EXPERT - 1)
    assert made.streamed
    assert made.pool.slots >= 2, "what a token needs is kept even so"
    assert made.pool.slots < 10


def test_a_model_that_fits_has_no_pool_and_no_experts() -> None:
    units = model()
    everything = sum(unit.image_bytes for unit in units)
    made = plan(units, everything)
    assert made.pool == NO_POOL
    assert made.away == ()
    assert not any(unit.experts for unit in made.units)
    made = plan(units, everything - 1)
    assert made.pool.slots == 6 * 8 - 1
    assert len(made.routed) == 6


def test_a_budget_too_small_for_a_tokens_experts_names_them_and_what_would_do() -> None:
    with pytest.raises(PlanError, match=r"too small: .*, 4 experts of 12\.3 KB and a ring of") as refusal:
        plan(model(), 5 * EXPERT, picked=4)
    needed = int(re.findall(r"need (\d+) bytes", str(refusal.value))[0])
    assert plan(model(), needed, picked=4).pool.slots >= 4
    with pytest.raises(PlanError):
        plan(model(), needed - 1, picked=4)


def test_dense_weights_are_in_host_memory_before_experts_are() -> None:
    budget = 60 * PAGE
    streamed = sum(unit.image_bytes for unit in plan(model(), budget).streamed)
    assert streamed
    made = plan(model(), budget, host=streamed)
    assert not any(unit.experts for unit in made.at(Tier.PINNED))
    assert {unit.name for unit in made.at(Tier.DISK)} == {unit.name for unit in made.routed}
    made = plan(model(), budget, host=streamed + 2 * 8 * EXPERT)
    assert len([unit for unit in made.at(Tier.PINNED) if unit.experts]) == 2
    made = plan(model(), budget, host=streamed - 1)
    assert any(not unit.experts for unit in made.at(Tier.DISK))
    assert plan(model(), budget).disk_bytes == 0


def test_experts_made_in_memory_cannot_be_on_disk() -> None:
    units = model(in_files=False)
    with pytest.raises(PlanError, match="host memory: streamed weights that are made"):
        plan(units, DENSE + 3 * EXPERT, host=6 * 8 * EXPERT - 1)
    made = plan(units, DENSE + 3 * EXPERT, host=6 * 8 * EXPERT)
    assert {tier for unit, tier in zip(made.units, made.tiers, strict=True) if unit.experts} == {Tier.PINNED}


def test_the_table_has_the_pool() -> None:
    table = plan(model(), DENSE + 10 * EXPERT).table()
    assert "10 of 48 experts; what else a router picks is fetched" in table
    assert "streamed each pass, but for experts" in table
    assert "pool" not in plan(model(), BIG).table()


# How fast

RATES = Rates(
    device="cuda", link=10e9, disk=1e9, compute=(ComputeRate(tokens=1, rate=1e12), ComputeRate(tokens=64, rate=1e11))
)
rates = st.builds(
    lambda device, link, disk: Rates(device=device, link=link, disk=disk),
    st.sampled_from(["cpu", "cuda"]), st.floats(1e6, 1e12), st.floats(1e6, 1e12),
)  # fmt: skip


def work(prompt: int = 4, batch: int = 1) -> Work:
    load = Workload(prompt_tokens=prompt, new_tokens=8, batch=batch)
    return Work(shares={}, head=frozenset(), attention_flops=0.0, cache_bytes=0, workload=load)


budgets = st.integers(DENSE // 2, DENSE + 48 * EXPERT)


@given(budgets, st.integers(0, DENSE + 48 * EXPERT), rates, st.floats(0, 1), st.floats(0, 1), st.integers(1, 40))
def test_more_hits_are_never_slower(budget: int, host: int, known: Rates, one: float, other: float, batch: int) -> None:
    made = plan(model(), budget, host=host)
    few, many = (predict(made, known, work(batch=batch), hit_rate=rate) for rate in sorted((one, other)))
    assert many.token_s <= few.token_s * (1 + 1e-9)
    assert many.ttft_s == few.ttft_s, "a prefill finds none"


def test_without_a_hit_rate_it_is_the_share_that_the_pool_holds() -> None:
    made = plan(model(), DENSE + 12 * EXPERT)
    by_share, given_share = predict(made, RATES, work()), predict(made, RATES, work(), hit_rate=0.25)
    assert by_share == given_share
    assert predict(made, RATES, work(), hit_rate=0.9).token_s < by_share.token_s


def test_a_token_moves_what_it_picks_and_is_not_in_the_pool() -> None:
    made = plan(model(), DENSE + 7 * EXPERT, picked=2)
    assert made.pool.windows == 0
    predicted = predict(made, RATES, work(), hit_rate=0.5)
    assert predicted.link_s == pytest.approx(6 * 2 * EXPERT / 2 / 10e9)
    all_found = predict(plan(model(), DENSE + 12 * EXPERT, picked=2), RATES, work(), hit_rate=1.0)
    assert (all_found.link_s, all_found.hit_rate) == (0, 1)
    on_disk = predict(plan(model(), DENSE + 7 * EXPERT, host=0), RATES, work(), hit_rate=0.5)
    assert on_disk.disk_s == pytest.approx(6 * 2 * EXPERT / 2 / 1e9)


def test_no_more_is_found_in_the_pool_than_it_can_hold() -> None:
    """However much a user gives: sequences pick other experts, and a whole pass needs all but reads what stays."""
    made = plan(model(), DENSE + 7 * EXPERT, picked=2)
    for batch in (1, 2, 4):
        needed = 6 * made.pool.distinct(batch)
        found = predict(made, RATES, work(batch=batch), hit_rate=1.0)
        assert found.link_s == pytest.approx((needed - 7) * EXPERT / 10e9, rel=1e-6)
        assert found.hit_rate == pytest.approx(7 / needed)
    whole = plan(model(), DENSE + 20 * EXPERT)
    assert whole.pool.windows == 2
    many = predict(whole, RATES, work(batch=500), hit_rate=1.0)
    assert many.link_s == pytest.approx((48 - (20 - 16)) * EXPERT / 10e9, rel=1e-6)
    assert many.hit_rate == pytest.approx(4 / 48)


def test_routed_layers_wait_for_their_router_and_whole_ones_do_not() -> None:
    """Of experts large enough that the link is what counts."""
    nbytes = 100 * 2**20
    units = [mixture(f"{layer}.experts", 8, nbytes) for layer in range(6)]
    routed, whole = plan(units, 15 * nbytes), plan(units, 16 * nbytes)
    assert (routed.pool.windows, whole.pool.windows) == (1, 2)
    everything = 6 * 8 * nbytes / 10e9
    many = predict(whole, RATES, work(prompt=500))
    assert many.ttft_s == pytest.approx(everything, rel=0.15)
    few = predict(routed, RATES, work(prompt=1), hit_rate=0.0)
    assert few.token_s >= 6 * (2 * nbytes / 10e9 + LAYER_IDLE_S)
    assert few.token_s < everything / 2


def test_host_memory_has_to_hold_the_buffers_of_each_stream_from_disk() -> None:
    """One brings what is read in every pass, the other one experts; they are page-locked before the first of both."""
    gpu, buffers = torch.device("cuda"), 1000 * PAGE
    for host, streams in ((BIG, 0), (DENSE, 1), (0, 2)):
        planned = plan(model(), 60 * PAGE, host=host)
        assert planned.disk_streams == streams, host
        needed = planned.pinned_bytes + streams * buffers
        require_host_memory(planned, gpu, needed, buffers)
        with pytest.raises(PlanError, match="host memory: the plan needs"):
            require_host_memory(planned, gpu, needed - 1, buffers)
        require_host_memory(planned, torch.device("cpu"), planned.pinned_bytes + planned.device_bytes, buffers)
