"""The cache of experts: where each one is, which makes room, and how often what is picked is there."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from djinn.bench.steering import steered_picks
from djinn.planning.expert_cache import ExpertCache, Trace, hit_rate

LAYERS, EXPERTS = 3, 6
layers, experts = st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)
picks = st.frozensets(experts, max_size=4)


class Pool(RuleBasedStateMachine):
    """Everything that may happen to slots; the test keeps books of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 0
        self.held: dict[tuple[int, int], int] = {}
        self.lent: set[int] = set()
        self.out: set[int] = set()
        """Handed out and not entered yet."""

    @initialize(slots=st.integers(1, 8))
    def begin(self, slots: int) -> None:
        self.slots = slots
        self.cache = ExpertCache(slots, LAYERS)

    @property
    def free(self) -> set[int]:
        return set(range(self.slots)) - set(self.held.values()) - self.lent - self.out

    @rule(layer=layers, picked=picks)
    def use(self, layer: int, picked: frozenset[int]) -> None:
        found = self.cache.use(layer, picked)
        assert found == {expert: self.held[layer, expert] for expert in picked if (layer, expert) in self.held}

    @rule(layer=layers, keep=picks)
    def make_room(self, layer: int, keep: frozenset[int]) -> None:
        evictable = {key: slot for key, slot in self.held.items() if key[0] != layer or key[1] not in keep}
        free = self.free
        try:
            slot = self.cache.make_room(layer, keep)
        except ValueError:
            assert not free
            assert not evictable
            return
        assert slot in (free or set(evictable.values()))
        self.held = {key: place for key, place in self.held.items() if place != slot}
        self.out.add(slot)

    @rule()
    def take_free(self) -> None:
        free = self.free
        slot = self.cache.take_free()
        assert (slot is None) == (not free)
        if slot is not None:
            assert slot in free
            self.out.add(slot)

    @precondition(lambda self: self.out or self.lent)
    @rule(data=st.data(), layer=layers, expert=experts)
    def enter(self, data: st.DataObject, layer: int, expert: int) -> None:
        if (layer, expert) not in self.held:
            slot = data.draw(st.sampled_from(sorted(self.out | self.lent)))
            self.cache.enter(layer, expert, slot)
            self.out.discard(slot)
            self.lent.discard(slot)
            self.held[layer, expert] = slot

    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        slots = data.draw(st.sets(st.integers(0, self.slots - 1))) - self.out
        self.cache.lend(slots)
        self.held = {key: slot for key, slot in self.held.items() if slot not in slots}
        self.lent |= slots

    @rule()
    def take_back(self) -> None:
        self.cache.take_back()
        self.lent.clear()

    @rule()
    def forget(self) -> None:
        self.cache.forget()
        self.held.clear()
        self.lent.clear()
        self.out.clear()

    @invariant()
    def the_books_agree(self) -> None:
        if not self.slots:
            return
        found = {(layer, expert): slot for layer in range(LAYERS) for expert, slot in self.cache.held(layer).items()}
        assert found == self.held
        assert len(set(found.values())) == len(found), "a slot holds at most one expert"
        assert self.cache.free == len(self.free)
        assert self.cache.free + len(found) + len(self.lent) + len(self.out) == self.slots


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def filled(slots: int, count: int, *held: tuple[int, int]) -> ExpertCache:
    """Return a cache of ``count`` layers that holds these, (layer, expert), each used after those before it."""
    cache = ExpertCache(slots, count)
    for layer, expert in held:
        cache.enter(layer, expert, cache.make_room(layer, [expert]))
    return cache


def test_the_layer_at_hand_gives_up_its_own_first_and_the_oldest_of_them() -> None:
    cache = filled(4, 2, (0, 0), (1, 0), (1, 1), (1, 2))
    cache.use(1, [0])
    cache.make_room(1, [3])
    assert sorted(cache.held(1)) == [0, 2]
    assert sorted(cache.held(0)) == [0], "which comes next"


def test_then_the_layer_passed_before_it_does() -> None:
    cache = filled(3, 3, (0, 0), (1, 0), (2, 0))
    cache.make_room(1, [1, 0])
    assert [len(cache.held(layer)) for layer in range(3)] == [0, 1, 1], "layer 0 was passed last"
    cache.make_room(1, [1, 0])
    assert [len(cache.held(layer)) for layer in range(3)] == [0, 1, 0], "layer 2 comes before layer 0, a pass ago"
    with pytest.raises(ValueError, match="layer 1: all 3 slots"):
        cache.make_room(1, [1, 0])


def test_a_lent_slot_that_an_expert_is_entered_in_is_not_taken_back() -> None:
    cache = filled(2, 1, (0, 0))
    cache.lend([0, 1])
    assert cache.held(0) == {}
    cache.enter(0, 5, 1)
    cache.take_back()
    assert (cache.held(0), cache.free) == ({5: 1}, 1)


def lru_hit_rate(trace: Trace, slots: int) -> float:
    """Evicts what was used longest ago, of what is not needed at once."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = total = 0
    for token in trace:
        for layer, picked in enumerate(token):
            keys = [(layer, int(expert)) for expert in picked]
            there = [key for key in keys if key in held]
            hits, total = hits + len(there), total + len(keys)
            for key in there:
                held.move_to_end(key)
            for key in keys:
                if key not in held and len(held) == slots:
                    del held[next(old for old in held if old not in keys)]
                held[key] = None
    return hits / total


def routing(reuse: float, zipf: float, seed: int = 0) -> list[list[list[int]]]:
    """Of 60 tokens: 6 layers of 16 experts, of which 3 are picked, so that a token asks for 18."""
    found: list[list[list[int]]] = steered_picks(6, 16, 3, reuse=reuse, zipf=zipf, seed=seed, steps=60).tolist()
    return found


@pytest.mark.parametrize(("reuse", "zipf"), [(0, 0), (0, 1.2), (0.5, 0), (0.9, 0), (0.5, 1.0)])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_hardly_ever_below_what_evicts_by_age_alone(reuse: float, zipf: float, seed: int) -> None:
    trace = routing(reuse, zipf, seed)
    for slots in (4, 9, 17, 18):
        assert hit_rate(trace, slots) >= lru_hit_rate(trace, slots), slots
    for slots in (30, 60, 90):
        assert hit_rate(trace, slots) >= lru_hit_rate(trace, slots) - 0.01, slots


@pytest.mark.parametrize(("reuse", "zipf"), [(0, 1.2), (0.9, 0), (0.5, 1.0)])
@pytest.mark.parametrize("slots", [9, 17])
def test_a_pool_under_a_tokens_demand_has_some_where_age_alone_has_none(reuse: float, zipf: float, slots: int) -> None:
    trace = routing(reuse, zipf)
    assert lru_hit_rate(trace, 9) == 0
    assert hit_rate(trace, slots) > max(0.1, lru_hit_rate(trace, slots) + 0.1)


def test_a_pool_smaller_than_a_tokens_demand_still_has_something() -> None:
    trace = [[[0, 1, 2]] * 6] * 20
    assert lru_hit_rate(trace, 12) == 0, "each layer loses its own just before it comes again"
    assert hit_rate(trace, 12) > 0.4


@given(st.lists(st.lists(picks, min_size=1, max_size=LAYERS), min_size=1, max_size=6))
def test_all_that_repeats_is_there_where_everything_fits(trace: list[list[frozenset[int]]]) -> None:
    total = sum(len(picked) for token in trace for picked in token)
    if total:
        distinct = {(layer, expert) for token in trace for layer, picked in enumerate(token) for expert in picked}
        assert hit_rate(trace, LAYERS * EXPERTS) == (total - len(distinct)) / total


def test_repeats_are_all_there_with_as_many_slots_as_a_token_asks_for() -> None:
    again = [[[0, 3], [1, 2]]] * 100
    assert hit_rate(again, 4) == 0.99
    assert hit_rate(again, 3) < 0.99


def test_hit_rates_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="layer 0: all 2 slots"):
        hit_rate([[[0, 1, 2]]], 2)
    for empty in ([], [[]], [[[]]]):
        with pytest.raises(ValueError, match="no picked experts"):
            hit_rate(empty, 2)
