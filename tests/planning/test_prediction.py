"""Predicted times: what must hold for any plan and rates, and what the reference records measured."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Ernie4_5_MoeConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from djinn.bench.certify.certification import read_certification
from djinn.bench.records import Record, read_records
from djinn.codec.layout import TILE, Layout
from djinn.engine.opened import Opened, outlined
from djinn.errors import UnavailableError
from djinn.places import REFERENCE_DIR
from djinn.planning.placement import Plan, make_plan
from djinn.planning.prediction import Prediction, predict
from djinn.planning.rates import ComputeRate, Rates
from djinn.planning.request import Request
from djinn.planning.work import Work, work_of
from djinn.planning.workspace import Workload, attention_flops
from djinn.weights.architectures import load_architecture
from djinn.weights.experts import picked_share
from djinn.weights.tensors import PAGE, FileSpan, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

LOAD = Workload(prompt_tokens=64, new_tokens=8, batch=2)
COMPUTE = (ComputeRate(tokens=1, rate=10e9), ComputeRate(tokens=8, rate=9e9), ComputeRate(tokens=64, rate=2e9))
rate = st.floats(1e6, 1e12)


def unit(name: str, pages: int) -> Unit:
    entry = TensorEntry(torch.uint8, (pages * PAGE,), FileSpan(Path(), 0))
    return Unit(name=name, readers=(name,), tensors=(PlacedTensor(f"{name}.weight", entry, 0),))


def coded_unit(name: str, tiles: int) -> Unit:
    elements = TILE * tiles
    entry = TensorEntry(torch.bfloat16, (elements,), FileSpan(Path(), 0), Layout(elements, elements // 100))
    return Unit(name=name, readers=(name,), tensors=(PlacedTensor(f"{name}.weight", entry, 0),))


def work(workload: Workload = LOAD, **changes: object) -> Work:
    plain = Work(shares={}, head=frozenset(), attention_flops=1e9, cache_bytes=10**6, workload=workload)
    return replace(plain, **changes)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    make = draw(st.sampled_from([unit, coded_unit]))  # a coded tile takes less than two pages
    units = [make(str(k), size) for k, size in enumerate(sizes)]
    pages = [size * (1 if make is unit else 2) for size in sizes]
    total, largest = sum(pages), max(pages)
    return make_plan(
        units,
        budget=PAGE * draw(st.integers(5 * largest, 5 * largest + total)),
        workspace_bytes=0,
        host_bytes=PAGE * draw(st.integers(0, total)),
    )


@st.composite
def rates(draw: st.DrawFn) -> Rates:
    compute = tuple(ComputeRate(tokens=tokens, rate=draw(rate)) for tokens in (1, 8, 64))
    return Rates(
        device=draw(st.sampled_from(["cpu", "cuda"])),
        link=draw(rate),
        disk=draw(rate),
        compute=draw(st.sampled_from([(), compute])),
        decode=draw(rate),
        module_s=draw(st.floats(0, 1e-3)),
        unit_s=draw(st.floats(0, 1e-3)),
        split_s=draw(st.floats(0, 1e-3)),
    )


@given(plans(), rates())
def test_no_pass_is_faster_than_its_bytes(plan: Plan, known: Rates) -> None:
    assert known.link
    assert known.disk
    over_link = plan.pinned_bytes + (plan.disk_bytes if known.device == "cuda" else 0)
    bound = max(over_link / known.link, plan.disk_bytes / known.disk)
    predicted = predict(plan, known, work())
    assert predicted.ttft_s >= bound * (1 - 1e-9)
    assert predicted.token_s >= bound * (1 - 1e-9)
    assert predicted.token_s >= max(predicted.compute_s, predicted.host_s) * (1 - 1e-9)


@given(
    plans(), rates(), st.sampled_from(["link", "disk", "decode", "compute", "module_s", "unit_s"]), st.floats(1, 100)
)
def test_a_faster_machine_is_never_slower(plan: Plan, known: Rates, which: str, times: float) -> None:
    now = getattr(known, which)
    faster = {
        "link": lambda: now * times,
        "disk": lambda: now * times,
        "compute": lambda: tuple(replace(each, rate=each.rate * times) for each in now),
        "decode": lambda: now * times,
        "module_s": lambda: now / times,
        "unit_s": lambda: now / times,
    }[which]()
    before, after = predict(plan, known, work()), predict(plan, replace(known, **{which: faster}), work())
    assert after.ttft_s <= before.ttft_s * (1 + 1e-9)
    assert after.token_s <= before.token_s * (1 + 1e-9)


@given(plans(), rates(), st.integers(1, 300), st.integers(1, 300))
def test_more_tokens_are_never_faster(plan: Plan, known: Rates, some: int, more: int) -> None:
    few, many = (predict(plan, known, work(replace(LOAD, prompt_tokens=tokens))) for tokens in sorted((some, more)))
    assert few.ttft_s <= many.ttft_s * (1 + 1e-9)
    assert few.token_s == many.token_s


def test_a_resident_model_takes_its_compute() -> None:
    plan = make_plan([unit("a", 1000), unit("b", 3000)], budget=10**9, workspace_bytes=0, host_bytes=0)
    plain = work(attention_flops=0.0, cache_bytes=0)
    known = Rates(device="cpu", compute=COMPUTE)
    predicted = predict(plan, known, plain)
    # A prompt of 128 tokens takes twice what 64 do; of two tokens, a seventh of the way from one to eight.
    assert predicted.ttft_s == pytest.approx(plan.model_bytes / 2e9 * 2)
    assert predicted.token_s == pytest.approx(plan.model_bytes * (1 / 10e9 + (1 / 9e9 - 1 / 10e9) / 7))
    called = predict(plan, replace(known, call_s=0.5), plain)
    assert (called.ttft_s, called.token_s) == (predicted.ttft_s + 0.5, predicted.token_s)
    assert predicted.limit == "compute"
    assert predicted.tokens_per_s == 2 / predicted.token_s
    slow_host = replace(known, module_s=1.0)
    assert predict(plan, slow_host, plain).token_s == pytest.approx(predicted.token_s + 2)
    assert predict(plan, replace(slow_host, device="cuda"), plain).token_s == pytest.approx(2)
    assert predict(plan, slow_host, plain).limit == "host"
    slow_pass = replace(known, pass_s=1.0)
    assert predict(plan, slow_pass, plain).token_s == pytest.approx(predicted.token_s + 1)


def test_sums_over_gpus_are_waited_for() -> None:
    """In decode for their latency, in prefill for their bytes as well; a rate that is missing is named."""
    plan = make_plan([unit("a", 1000), unit("b", 3000)], budget=10**9, workspace_bytes=0, host_bytes=0)
    known = Rates(device="cuda", compute=COMPUTE)
    summed = work(attention_flops=0.0, cache_bytes=0, sums=3, sum_bytes=100)
    alone = predict(plan, known, replace(summed, sums=0))
    assert "sums over GPUs" in predict(plan, known, summed).blind
    assert "sums over GPUs" not in alone.blind
    quick = predict(plan, replace(known, sum_s=1.0, sum_rate=1e9), summed)
    assert "sums over GPUs" not in quick.blind
    tokens = LOAD.prompt_tokens * LOAD.batch
    assert quick.token_s - alone.token_s == pytest.approx(3 * (1.0 + LOAD.batch * 100 / 1e9))
    assert quick.ttft_s - alone.ttft_s == pytest.approx(3 * (1.0 + tokens * 100 / 1e9))


@pytest.mark.parametrize(
    ("gpus", "links", "count", "link"),
    [
        (1, ((2, 50e9),), 2, 55e9),  # alone
        (2, ((2, 50e9), (4, 40e9)), 2, 50e9),
        (3, ((2, 50e9), (4, 40e9)), 4, 40e9),
        (8, ((2, 50e9), (4, 40e9)), 4, 40e9),
        (4, (), None, 55e9),
    ],
)
def test_busy_links_have_the_rate_of_the_nearest_number_that_was_measured(
    gpus: int, links: tuple[tuple[int, float], ...], count: int | None, link: float
) -> None:
    known = Rates(device="cuda", link=55e9, links=links)
    assert known.busy_links(gpus) == count
    assert known.beside(gpus).link == link


def test_what_is_coded_is_decoded_before_it_is_computed_with() -> None:
    """Resident or not, in every pass, and no faster for few tokens; a rate that is missing is named."""
    units = [coded_unit(str(k), 100) for k in range(4)]
    plain = work(attention_flops=0.0, cache_bytes=0)
    known = Rates(device="cuda", link=1e9, compute=COMPUTE)
    resident = make_plan(units, budget=10**9, workspace_bytes=0, host_bytes=0)
    streamed = make_plan(units, budget=5 * 10**6, workspace_bytes=0, host_bytes=10**9)
    decoding_s = resident.model_bytes / 1e8
    for plan in (resident, streamed):
        free, counted = predict(plan, known, plain), predict(plan, replace(known, decode=1e8), plain)
        assert "decoding" in free.blind
        assert "decoding" not in counted.blind
        assert counted.compute_s - free.compute_s == pytest.approx(decoding_s)
        assert counted.ttft_s >= decoding_s
    assert "decoding" not in predict(make_plan([unit("a", 9)], budget=10**9, workspace_bytes=0, host_bytes=0),
                                     known, plain).blind  # fmt: skip


def test_the_host_has_more_to_do_for_what_streams_is_coded_or_is_split() -> None:
    plain = work(attention_flops=0.0, cache_bytes=0)
    known = Rates(device="cuda", link=1e12, module_s=1.0, unit_s=0.1, split_s=0.01)
    raw, coded = [unit(str(k), 100) for k in range(4)], [coded_unit(str(k), 50) for k in range(4)]
    resident = make_plan(raw, budget=10**9, workspace_bytes=0, host_bytes=0)
    assert predict(resident, known, plain).host_s == pytest.approx(4)
    assert predict(resident, known, replace(plain, sums=1)).host_s == pytest.approx(4.04)
    decoded = make_plan(coded, budget=10**9, workspace_bytes=0, host_bytes=0)
    assert predict(decoded, known, plain).host_s == pytest.approx(4.4)
    streamed = make_plan(raw, budget=350 * PAGE, workspace_bytes=0, host_bytes=10**9)
    assert predict(streamed, known, plain).host_s == pytest.approx(4 + 0.1 * len(streamed.streamed))


def test_the_head_sees_one_token_of_each_sequence_and_looked_up_rows_cost_nothing() -> None:
    plan = make_plan([unit("a", 1000), unit("b", 3000)], budget=10**9, workspace_bytes=0, host_bytes=0)
    known = Rates(device="cuda", compute=COMPUTE)
    plain = work(attention_flops=0.0, cache_bytes=0)
    one = plan.units[0].raw_bytes
    looked_up = predict(plan, known, replace(plain, shares={"b": 0.0}))
    assert looked_up.ttft_s == pytest.approx(one / 2e9 * 2)
    headed = predict(plan, known, replace(plain, shares={"b": 0.0}, head=frozenset({"a"})))
    assert headed.ttft_s == pytest.approx(headed.token_s)


def test_a_cpu_copies_the_output_projection_for_each_sequence_of_a_prompt() -> None:
    plan = make_plan([unit("a", 1000), unit("b", 3000)], budget=10**9, workspace_bytes=0, host_bytes=0)
    plain = work(attention_flops=0.0, cache_bytes=0, head=frozenset({"b"}))
    known = Rates(device="cpu", compute=COMPUTE, last_token=1e8)
    first, head = plan.units[0].raw_bytes / 2e9 * 2, plan.units[1].raw_bytes
    found = predict(plan, known, plain)
    assert found.ttft_s == pytest.approx(first + LOAD.batch * head / 1e8)
    assert found.token_s == predict(plan, replace(known, device="cuda"), plain).token_s
    assert "last token" not in found.blind
    assert "last token" in predict(plan, replace(known, last_token=None), plain).blind
    assert "last token" not in predict(plan, replace(known, device="cuda", last_token=None), plain).blind


def test_compute_and_copies_overlap_on_a_gpu_and_add_up_from_a_cpus_own_memory() -> None:
    units = [unit(str(k), 100) for k in range(50)]
    plan = make_plan(units, budget=400 * PAGE, workspace_bytes=0, host_bytes=10**9, ring_bytes=300 * PAGE)
    assert plan.resident_bytes == 100 * PAGE
    plain = work(attention_flops=0.0, cache_bytes=0, workload=replace(LOAD, batch=1))
    known = Rates(device="cuda", link=10e9, compute=COMPUTE)
    each = plan.model_bytes / 10e9
    assert predict(plan, known, plain).token_s == pytest.approx(each, rel=0.02)
    assert predict(plan, replace(known, device="cpu"), plain).token_s == pytest.approx(2 * each, rel=0.02)


def test_a_rate_that_is_missing_is_named() -> None:
    plan = make_plan([unit(str(k), 100) for k in range(50)], budget=400 * PAGE, workspace_bytes=0, host_bytes=0)
    with pytest.raises(UnavailableError, match="streams over the disk, whose rate has not been measured"):
        predict(plan, Rates(device="cpu", link=1e9), work())
    with pytest.raises(UnavailableError, match="link"):
        predict(plan, Rates(device="cuda", disk=1e9), work())
    assert predict(plan, Rates(device="cpu", disk=1e9), work()).blind == ("compute", "host")


def test_what_a_model_computes_is_read_from_its_modules() -> None:
    model = outlined("synthetic:mixtral-tiny", Request.of(budget="1 GB", keep=LOAD, device="cpu"))
    index = model.index
    found = work_of(index, model.units, LOAD)
    assert found.shares["model.embed_tokens"] == 0
    assert found.shares["model.layers.0.mlp.experts"] == pytest.approx(2 / index.model.config.num_local_experts)
    assert found.head == {"lm_head"}
    config = load_architecture("llama-2-13b")
    assert attention_flops(config, LOAD) == 40 * 2 * 40 * 128 * 64**2 * 2


def test_experts_that_every_token_goes_to_are_no_routed_ones() -> None:
    model = outlined("synthetic:deepseek-v3", Request.of(budget="80 GB", keep=LOAD, device="cpu"))
    found = work_of(model.index, model.units, LOAD).shares
    assert found["model.layers.5.mlp.experts"] == 8 / 256
    assert not [name for name in found if "shared_experts" in name]


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (MixtralConfig(num_local_experts=8, num_experts_per_tok=2), 1 / 4),
        (Ernie4_5_MoeConfig(moe_num_experts=16, moe_k=2), 1 / 8),
        (LlamaConfig(), 1),
    ],
)
def test_the_share_that_routers_pick_is_found_under_the_names_that_configs_have(
    config: PretrainedConfig, share: float
) -> None:
    assert picked_share(config) == share


CPU_FILES = ("2-cores_2026-11-25/results/baselines.jsonl", "2-cores_2026-11-25/results/sweep.jsonl")
GPU_FILES = (
    "h100-34b_2026-11-25/results/baselines.jsonl",
    "h100-34b_2026-11-25/results/sweep.jsonl",
    "h100_2026-11-25/results/baselines.jsonl",
    "h100_2026-11-25/results/sweep.jsonl",
    "h100_2026-11-25/benchmark.jsonl",
    "h200_2026-11-24/results/baselines.jsonl",
    "h200_2026-11-24/results/sweep.jsonl",
    "h200_2026-11-24/benchmark.jsonl",
)


def records(*files: str) -> list[tuple[str, Record]]:
    """Every streaming run of djinn in these files; what decodes on the device all the time has no rate in them."""
    return [
        (f"{file}:{number}", record)
        for file in files
        for number, record in enumerate(read_records(REFERENCE_DIR / file), 1)
        if record.system == "djinn" and record.status == "ok" and record.coding == "none"
    ]


@cache
def opened_of_record(model: str, link: str) -> Opened:
    request = Request.of(budget="1 GB", keep=LOAD, device="cuda" if link == "pcie" else "cpu", dtype=torch.bfloat16)
    found = outlined(model, request)
    return found.on_disk() if link == "disk" else found


@cache
def plan_of_record(
    model: str, link: str, load: Workload, budget: int, ring: int, host_memory: int
) -> tuple[Plan, Work]:
    found = opened_of_record(model, link)
    asked = replace(found, request=replace(found.request, budget=budget, keep=load, ring=ring))
    return asked.place(host_memory), work_of(found.index, found.units, load)


def predicted_of(record: Record) -> Prediction:
    """Return what the plan of a run would have foreseen, from the link's or the disk's rate measured beside it."""
    on_gpu = record.link == "pcie"
    load = Workload(prompt_tokens=record.prompt_tokens, new_tokens=record.new_tokens, batch=record.batch)
    assert record.link
    assert record.ring_bytes
    assert record.ceiling_gbps
    plan, done = plan_of_record(
        record.model, record.link, load, record.budget_bytes, record.ring_bytes, int(record.settings["host_memory"])
    )
    ceiling = record.ceiling_gbps * 1e9
    if on_gpu:
        return predict(plan, Rates(device="cuda", link=ceiling), done)
    certification = read_certification(REFERENCE_DIR / "2-cores_2026-11-25")
    assert certification is not None
    return predict(plan, replace(certification.rates, disk=ceiling), done)


@pytest.mark.slow
@pytest.mark.parametrize("record", [pytest.param(record, id=name) for name, record in records(*GPU_FILES)])
def test_what_was_measured_on_a_gpu_is_predicted_within_a_tenth(record: Record) -> None:
    predicted = predicted_of(record)
    if record.per_token_s:
        assert predicted.token_s == pytest.approx(statistics.median(record.per_token_s), rel=0.1)
    assert record.ttft_s
    assert predicted.ttft_s == pytest.approx(record.ttft_s, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("file", CPU_FILES)
def test_the_median_run_on_a_cpu_is_predicted_nearly_as_well(file: str) -> None:
    """Of a disk whose raw rate, too, is another a minute later."""
    first, later = [], []
    for _, record in records(file):
        predicted = predicted_of(record)
        assert record.ttft_s
        first.append(predicted.ttft_s / record.ttft_s)
        later += [predicted.token_s / seconds for seconds in record.per_token_s]
    assert statistics.median(first) == pytest.approx(1, abs=0.15)
    if later:
        assert statistics.median(later) == pytest.approx(1, abs=0.15)
