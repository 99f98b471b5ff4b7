"""The ring schedule against a simulation: any sizes, any ring, any timing of releases."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.planning.ring import Slot, schedule


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draw unit sizes and a ring that holds each of them."""
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    return sizes, draw(st.integers(max(sizes), 3 * max(sizes) + sum(sizes)))


def overlap(one: Slot, other: Slot) -> bool:
    return one.offset < other.offset + other.nbytes and other.offset < one.offset + one.nbytes


def may_start(slots: list[Slot], submitted: int, released: int) -> bool:
    """Whether nothing that clashes is still to be read."""
    unread = sum(1 << visit % len(slots) for visit in range(released, submitted))
    return not slots[submitted % len(slots)].clashes & unread


@given(rings())
def test_slots_lie_within_the_ring_and_keep_their_sizes(ring: tuple[list[int], int]) -> None:
    sizes, ring_bytes = ring
    slots = schedule(sizes, ring_bytes)
    assert [slot.nbytes for slot in slots] == sizes
    assert all(slot.offset >= 0 and slot.offset + slot.nbytes <= ring_bytes for slot in slots)


@given(rings())
def test_units_follow_each_other_and_skip_the_end(ring: tuple[list[int], int]) -> None:
    sizes, ring_bytes = ring
    slots = schedule(sizes, ring_bytes)
    assert slots[0].offset == 0
    for before, slot in pairwise(slots):
        end = before.offset + before.nbytes
        assert slot.offset == (end if end + slot.nbytes <= ring_bytes else 0)


@given(rings(), st.integers(0, 2**32))
def test_a_copy_never_lands_on_bytes_with_a_reader_to_come(ring: tuple[list[int], int], seed: int) -> None:
    """Invariant 1: whatever the timing, and over the end of a pass as within it."""
    sizes, ring_bytes = ring
    slots = schedule(sizes, ring_bytes)
    count, visits, timing = len(slots), 4 * len(slots), random.Random(seed)
    submitted = released = 0
    lying: dict[int, int] = {}  # byte of the ring -> visit whose copy wrote it last
    while released < visits:
        may_copy = submitted < visits and may_start(slots, submitted, released)
        may_release = released < submitted
        assert may_copy or may_release, "the ring is stuck"
        if may_copy and (not may_release or timing.random() < 0.5):
            slot = slots[submitted % count]
            for byte in range(slot.offset, slot.offset + slot.nbytes):
                assert lying.get(byte, -1) < released
                lying[byte] = submitted
            submitted += 1
        else:
            slot = slots[released % count]
            assert all(lying[byte] == released for byte in range(slot.offset, slot.offset + slot.nbytes))
            released += 1


@given(rings())
def test_slots_clash_with_those_whose_bytes_they_share(ring: tuple[list[int], int]) -> None:
    slots = schedule(*ring)
    for slot in slots:
        assert [bool(slot.clashes >> unit & 1) for unit in range(len(slots))] == [
            overlap(slot, other) for other in slots
        ]
        assert slot.clashes < 2 ** len(slots)


@given(st.integers(4, 20), st.integers(1, 50))
def test_the_next_pass_may_move_while_this_one_is_read(count: int, size: int) -> None:
    """Invariant 4: before the last unit of a pass is released, units of the next pass may be copied."""
    slots = schedule([size] * count, 3 * size)
    released = count - 1
    submitted = released
    while may_start(slots, submitted, released):
        submitted += 1
    assert submitted > count or (count - 1) % 3 == 0  # there the last unit lies where the next pass begins


@pytest.mark.parametrize("sizes", [[11], [4, 11, 4], [0]])
def test_a_unit_that_does_not_fit_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="does not fit a ring of 10"):
        schedule(sizes, 10)


@given(rings(), st.data())
def test_a_second_order_has_slots_of_its_own_that_clash_with_those_of_the_first(
    ring: tuple[list[int], int], data: st.DataObject
) -> None:
    sizes, ring_bytes = ring
    fewer = [size for size in sizes if data.draw(st.booleans())]
    slots = schedule(sizes, ring_bytes, fewer)
    places = [(slot.offset, slot.nbytes) for slot in slots]
    alone = [*schedule(sizes, ring_bytes), *schedule(fewer, ring_bytes)]
    assert places == [(slot.offset, slot.nbytes) for slot in alone]
    for slot in slots:
        assert list(slot.sharing) == [unit for unit, other in enumerate(slots) if overlap(slot, other)]
