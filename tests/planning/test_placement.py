"""The plan: what it places where, what it refuses, and that what a refusal says would do, does."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn.errors import PlanError
from djinn.planning.memory import require_device_memory
from djinn.planning.placement import Plan, Tier, make_plan, place_on
from djinn.planning.ring import RING_FLOOR_SHARE
from djinn.planning.workspace import CUDA_CONTEXT_BYTES
from djinn.weights.tensors import PAGE, FileSpan, Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

GB = 10**9


def unit(name: str, nbytes: int, *, readers: int = 1, held: bool = False) -> Unit:
    entry = TensorEntry(torch.uint8, (nbytes,), FileSpan(Path(name), 0))
    return Unit(
        name=name,
        readers=tuple(f"{name}.reader{number}" for number in range(readers)),
        tensors=(PlacedTensor(f"{name}.weight", entry, 0),),
        held=held,
    )


def in_memory(units: list[Unit]) -> list[Unit]:
    """Return the units with weights that are made instead of read."""
    return [
        replace(
            unit,
            tensors=tuple(
                replace(tensor, entry=replace(tensor.entry, source=Seeded(tensor.name, 0))) for tensor in unit.tensors
            ),
        )
        for unit in units
    ]


def decoder(layers: int = 20, block: int = 10 * PAGE, head: int = 35 * PAGE) -> list[Unit]:
    """Embedding, blocks of two matrices and a norm, output projection."""
    units = [unit("embed", head)]
    for layer in range(layers):
        units += [unit(f"{layer}.norm", 64), unit(f"{layer}.up", block), unit(f"{layer}.down", block)]
    return [*units, unit("head", head)]


@st.composite
def models(draw: st.DrawFn) -> list[Unit]:
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=15))
    return [
        unit(
            f"u{number}",
            size * 1000,
            readers=draw(st.sampled_from([1, 1, 1, 2])),
            held=draw(st.sampled_from([False, False, False, True])),
        )
        for number, size in enumerate(sizes)
    ]


@given(models(), st.integers(1, 4000), st.integers(0, 4000), st.integers(0, 300), st.none() | st.integers(1, 700))
def test_a_plan_keeps_its_limits_or_is_refused(
    units: list[Unit], budget: int, host: int, workspace: int, ring: int | None
) -> None:
    try:
        made = make_plan(
            units,
            budget=budget * 1000,
            workspace_bytes=workspace * 1000,
            host_bytes=host * 1000,
            ring_bytes=None if ring is None else ring * 1000,
        )
    except PlanError:
        return
    assert made.units == tuple(units)
    assert len(made.tiers) == len(units)
    assert made.device_bytes <= made.budget == budget * 1000
    assert made.pinned_bytes <= host * 1000
    assert made.ring_bytes <= (made.budget if ring is None else ring * 1000)
    assert made.model_bytes == sum(unit.weight_bytes for unit in units)
    assert made.resident_bytes + made.pinned_bytes + made.disk_bytes == sum(unit.image_bytes for unit in units)
    assert [slot.nbytes for slot in made.slots] == [unit.image_bytes for unit in made.streamed]
    assert all(slot.offset + slot.nbytes <= made.ring_bytes for slot in made.slots)
    assert all(slot.offset % PAGE == 0 for slot in made.slots)
    assert not any(unit.held for unit in made.streamed)


@given(models(), st.integers(1, 3000), st.integers(0, 300), st.none() | st.integers(1, 700), st.booleans())
def test_what_a_refusal_says_would_do_does(
    units: list[Unit], budget: int, workspace: int, ring: int | None, made: bool
) -> None:
    units = in_memory(units) if made else units
    given_bytes = {"budget": budget * 1000, "host_bytes": 10**9, "ring_bytes": None if ring is None else ring * 1000}
    for _ in range(3):  # a larger ring may then need a larger budget
        try:
            make_plan(units, workspace_bytes=workspace * 1000, **given_bytes)  # type: ignore[arg-type]
        except PlanError as error:
            what = re.match(r"(ring|budget): ", str(error))
            number = re.search(r"(\d+) bytes", str(error))
            assert what is not None
            assert number is not None
            key = {"ring": "ring_bytes", "budget": "budget"}[what[1]]
            assert int(number[1]) > (given_bytes[key] or 0)
            given_bytes[key] = int(number[1])
        else:
            return
    make_plan(units, workspace_bytes=workspace * 1000, **given_bytes)  # type: ignore[arg-type]


@given(models(), st.integers(0, 300))
def test_a_budget_one_byte_below_what_is_needed_is_refused(units: list[Unit], workspace: int) -> None:
    with pytest.raises(PlanError) as refusal:
        make_plan(units, budget=1, workspace_bytes=workspace * 1000, host_bytes=10**9)
    number = re.search(r"(\d+) bytes", str(refusal.value))
    assert number is not None
    make_plan(units, budget=int(number[1]), workspace_bytes=workspace * 1000, host_bytes=10**9)
    with pytest.raises(PlanError):
        make_plan(units, budget=int(number[1]) - 1, workspace_bytes=workspace * 1000, host_bytes=10**9)


@given(models(), st.integers(0, 300))
def test_a_model_that_fits_is_not_streamed(units: list[Unit], workspace: int) -> None:
    total = sum(unit.image_bytes for unit in units)
    for ring in (None, 10**9):
        made = make_plan(
            units, budget=total + workspace * 1000, workspace_bytes=workspace * 1000, host_bytes=0, ring_bytes=ring
        )
        assert made.streamed == ()
        assert made.ring_bytes == 0


def streamed_bytes(made: Plan) -> int:
    return made.pinned_bytes + made.disk_bytes


@given(st.integers(3, 40), st.integers(1, 30), st.integers(1, 60), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_budget_never_streams_more(layers: int, block: int, head: int, budget: int, more: int) -> None:
    units = decoder(layers, block * PAGE, head * PAGE)
    try:
        less_made = make_plan(units, budget=budget, workspace_bytes=0, host_bytes=10**9)
    except PlanError:
        return
    more_made = make_plan(units, budget=budget + more, workspace_bytes=0, host_bytes=10**9)
    assert streamed_bytes(more_made) <= streamed_bytes(less_made)


@given(st.integers(0, 500), st.integers(0, 500))
def test_more_host_memory_never_reads_more_from_disk(host: int, more: int) -> None:
    units = decoder()
    budget = 200 * PAGE
    made = [
        make_plan(units, budget=budget, workspace_bytes=0, host_bytes=pages * PAGE) for pages in (host, host + more)
    ]
    assert made[1].disk_bytes <= made[0].disk_bytes


def test_the_parts_of_a_decoder_go_where_they_should() -> None:
    made = make_plan(decoder(), budget=210 * PAGE, workspace_bytes=10 * PAGE, host_bytes=150 * PAGE)
    tier = dict(zip((unit.name for unit in made.units), made.tiers, strict=True))
    assert {tier[name] for name in tier if "norm" in name} == {Tier.RESIDENT}, "a norm is not worth a copy"
    assert tier["embed"] is tier["head"] is Tier.RESIDENT, "streaming them would need a ring three times their size"
    assert made.ring_bytes == 3 * 10 * PAGE
    assert {Tier.PINNED, Tier.DISK} <= set(made.tiers)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_residents_are_spread_over_the_pass(share: float) -> None:
    """Then no long stretch of the pass leaves the link idle, and none waits for it all the time."""
    units = [unit(f"u{number}", 10 * PAGE) for number in range(40)]
    kept = round(40 * share)
    made = make_plan(units, budget=(10 * kept + 30) * PAGE, workspace_bytes=0, host_bytes=0)
    resident = [number for number, tier in enumerate(made.tiers) if tier is Tier.RESIDENT]
    assert len(resident) == kept
    for quarter in range(4):
        assert abs(sum(10 * quarter <= number < 10 * quarter + 10 for number in resident) - kept / 4) <= 1


def test_the_largest_unit_must_fit_the_ring() -> None:
    """Llama-3.1's output projection, 128256 x 8192 in bfloat16, is 2.1 GB."""
    units = [unit("model.embed_tokens", 128256 * 8192 * 2), *(unit(f"{n}", GB // 2) for n in range(80))]
    with pytest.raises(PlanError) as refusal:
        make_plan(units, budget=3 * GB, workspace_bytes=0, host_bytes=200 * GB, ring_bytes=GB)
    assert "unit model.embed_tokens has 2.1 GB, more than the ring's 1 GB" in str(refusal.value)
    assert f"a ring of {128256 * 8192 * 2} bytes would do" in str(refusal.value)
    made = make_plan(units, budget=3 * GB, workspace_bytes=0, host_bytes=200 * GB, ring_bytes=128256 * 8192 * 2)
    assert made.ring_bytes == 128256 * 8192 * 2


def test_a_small_budget_is_refused_with_its_parts() -> None:
    with pytest.raises(PlanError) as refusal:
        make_plan(
            [*decoder(), unit("whole", 40 * PAGE, held=True)], budget=5 * PAGE, workspace_bytes=PAGE, host_bytes=0
        )
    text = str(refusal.value)
    assert "budget: 20.5 KB is too small" in text
    assert "workspace 4.1 KB" in text
    assert "weights that cannot be streamed" in text
    assert "(unit embed)" in text


def test_weights_made_in_memory_have_no_disk_to_come_from() -> None:
    units = in_memory(decoder())
    with pytest.raises(
        PlanError, match=r"host memory: .* made, converted or coded in memory have no disk tier and need"
    ):
        make_plan(units, budget=150 * PAGE, workspace_bytes=0, host_bytes=PAGE)
    assert make_plan(units, budget=150 * PAGE, workspace_bytes=0, host_bytes=GB).disk_bytes == 0


def test_weights_that_have_files_make_room_for_those_that_have_none() -> None:
    units = decoder()
    some = [unit for unit in units if unit.name.startswith("1")]
    mixed = [in_memory([unit])[0] if unit in some else unit for unit in units]
    made = make_plan(mixed, budget=150 * PAGE, workspace_bytes=0, host_bytes=210 * PAGE)
    assert made.disk_bytes > 0
    assert all(unit.on_disk for unit in made.at(Tier.DISK))


def test_a_gpu_that_is_too_small_is_refused_with_a_budget_that_fits_it() -> None:
    workspace = CUDA_CONTEXT_BYTES + 10 * PAGE
    made = make_plan(decoder(), budget=workspace + 150 * PAGE, workspace_bytes=workspace, host_bytes=500 * PAGE)
    enough = made.device_bytes - CUDA_CONTEXT_BYTES
    require_device_memory(made, enough, 2 * GB)
    with pytest.raises(PlanError, match="of the GPU's 2 GB only") as refusal:
        require_device_memory(made, enough - 4 * PAGE, 2 * GB)
    fitting = int(re.findall(r"a budget of (\d+) bytes", str(refusal.value))[0])
    again = make_plan(decoder(), budget=fitting, workspace_bytes=workspace, host_bytes=500 * PAGE)
    require_device_memory(again, enough - 4 * PAGE, 2 * GB)


def test_the_ring_of_a_small_model_is_an_eighth_of_the_budget_where_that_helps() -> None:
    """Three of its largest units would be too few to keep a disk busy, or a link through what the host does."""
    units = decoder()
    three = make_plan(units, budget=300 * PAGE, workspace_bytes=0, host_bytes=500 * PAGE)
    floor = round(RING_FLOOR_SHARE * 300 * PAGE) // PAGE * PAGE
    assert floor > three.ring_bytes

    def ring(device: str, host_bytes: int) -> int:
        made = place_on(
            torch.device(device), units, budget=300 * PAGE, workspace_bytes=0, host_bytes=host_bytes, ring_bytes=None
        )
        return made.ring_bytes

    assert ring("cuda", 500 * PAGE) == ring("cuda", 0) == ring("cpu", 0) == floor
    assert ring("cpu", 500 * PAGE) == three.ring_bytes, "no disk is read"


def test_oversubscription_is_model_over_budget() -> None:
    made = make_plan(decoder(), budget=150 * PAGE, workspace_bytes=0, host_bytes=100 * PAGE)
    assert made.oversubscription == made.model_bytes / made.budget


def test_the_table_names_every_place_and_its_size() -> None:
    made = make_plan(decoder(), budget=210 * PAGE, workspace_bytes=10 * PAGE, host_bytes=150 * PAGE)
    rows = [line.split()[0] for line in made.table().splitlines()]
    assert rows == ["model", "budget", "residents", "ring", "workspace", "pinned", "disk"]


@st.composite
def models_with_readers_in_common(draw: st.DrawFn) -> list[Unit]:
    readers = [f"module{number}" for number in range(6)]
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=12))
    return [
        replace(unit(f"u{number}", size * 1000), readers=tuple(draw(st.sets(st.sampled_from(readers), min_size=1))))
        for number, size in enumerate(sizes)
    ]


@given(models_with_readers_in_common(), st.integers(1, 4000), st.none() | st.integers(1, 700))
def test_units_that_one_module_reads_together_do_not_stream_together(
    units: list[Unit], budget: int, ring: int | None
) -> None:
    """Their slots could overlap, and then every pass would be refused; a refusal comes from the plan."""
    options = {"workspace_bytes": 0, "host_bytes": 0, "ring_bytes": None if ring is None else ring * 1000}
    try:
        made = make_plan(units, budget=budget * 1000, **options)
    except PlanError as error:
        needed = re.search(r"need (\d+) bytes", str(error))
        if needed is None:
            return  # the ring
        made = make_plan(units, budget=int(needed[1]), **options)
    together = Counter(reader for unit in made.streamed for reader in unit.readers)
    assert max(together.values(), default=0) <= 1
