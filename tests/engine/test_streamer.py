"""The streamer on a simulated device: two queues that run as late or as early as they like, and a ring of numbers.

The simulation keeps what CUDA keeps: what was issued to a queue runs in order, events order the two queues, and nothing
else does. While a copy runs its slot holds garbage. Every read checks the whole slot, when it begins and when it ends.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import FrameType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from djinn.engine import streamer as streamer_module
from djinn.engine.coding import Scratch
from djinn.engine.presence import Presence
from djinn.engine.second_order import SecondOrder
from djinn.engine.streamer import Streamer
from djinn.errors import CheckpointError, PlanError
from djinn.planning.ring import Slot, schedule
from djinn.transport.stats import Stats
from djinn.weights.tensors import Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

GARBAGE = -1


class Event:
    """Passed once the queue that it was recorded in has come to it."""

    def __init__(self) -> None:
        self.passed = False

    def passing(self) -> bool:
        self.passed = True
        return True


class SimulatedDevice:
    """A copier whose copy queue and compute queue advance at random, and in the end as far as they can."""

    def __init__(self, slots: tuple[Slot, ...], ring_bytes: int, seed: int) -> None:
        self.ring = torch.full((ring_bytes,), GARBAGE, dtype=torch.int64)
        self.slots = slots
        self.copies: deque[Callable[[], bool]] = deque()
        self.compute: deque[Callable[[], bool]] = deque()
        self.ready: dict[int, Event] = {}
        self.free: dict[int, Event] = {}
        self.waited: list[int] = []
        self.released: list[int] = []
        self.submitted: list[int] = []
        self.unreadable: set[int] = set()
        """Units whose copies fail if they are submitted now."""
        self.failed: set[int] = set()
        self.under_way: set[int] = set()
        """Units whose copy nobody has waited for yet."""
        self.random = random.Random(seed)

    # What the streamer calls.

    def submit(self, unit: int, after: int | None) -> None:
        assert unit not in self.under_way, f"two copies of unit {unit} are under way, and only one is waited for"
        self.under_way.add(unit)
        self.submitted.append(unit)
        self.failed.discard(unit)
        if unit in self.unreadable:
            self.failed.add(unit)
        if after is not None and after in self.free:
            released = self.free[after]
            self.copies.append(lambda: released.passed)
        self.copies.append(lambda: self._write(unit, GARBAGE))
        if unit not in self.failed:
            self.copies.append(lambda: self._write(unit, unit))
        event = self.ready[unit] = Event()
        self.copies.append(event.passing)
        self._advance()

    def wait(self, unit: int) -> None:
        if unit in self.failed:
            raise CheckpointError(f"unit {unit} cannot be read")
        self.under_way.discard(unit)
        self.waited.append(unit)
        arrived = self.ready[unit]
        self.compute.append(lambda: arrived.passed)
        self._advance()

    def release(self, unit: int) -> None:
        self.released.append(unit)
        event = self.free[unit] = Event()
        self.compute.append(event.passing)
        self._advance()

    def settle(self) -> None:
        self.under_way.clear()
        event = Event()
        self.compute.append(event.passing)
        self.copies.append(lambda: event.passed)
        self._advance()

    def resolve_timeline(self) -> None: ...

    def close(self) -> None: ...

    # What the model does, and how time goes on.

    def read(self, unit: int) -> None:
        """Issue compute that reads ``unit`` from its beginning to its end."""
        self.compute.append(lambda: self._check(unit))
        self.compute.append(lambda: self._check(unit))
        self._advance()

    def finish(self) -> None:
        """Run everything that was issued."""
        while any([self._step(self.copies), self._step(self.compute)]):
            pass
        assert not self.compute, "compute waits for a copy that was never issued"
        assert not self.copies, "a copy waits for a release that was never recorded"

    def _advance(self) -> None:
        for _ in range(self.random.randrange(8)):
            self._step(self.random.choice((self.copies, self.compute)))

    @staticmethod
    def _step(queue: deque[Callable[[], bool]]) -> bool:
        if queue and queue[0]():
            queue.popleft()
            return True
        return False

    def _bytes(self, unit: int) -> torch.Tensor:
        slot = self.slots[unit]
        return self.ring[slot.offset : slot.offset + slot.nbytes]

    def _write(self, unit: int, value: int) -> bool:
        self._bytes(unit).fill_(value)
        return True

    def _check(self, unit: int) -> bool:
        assert self._bytes(unit).eq(unit).all(), f"unit {unit} read {self._bytes(unit).tolist()}"
        return True


def named_unit(number: int, nbytes: int) -> Unit:
    entry = TensorEntry(torch.uint8, (nbytes,), Seeded(f"w{number}", 0))
    return Unit(name=f"u{number}", readers=(f"u{number}",), tensors=(PlacedTensor(f"w{number}", entry, 0),))


def streaming(
    sizes: list[int], ring_bytes: int, seed: int = 0, second: SecondOrder | None = None
) -> tuple[Streamer, SimulatedDevice, Stats]:
    fewer = [unit.raw_bytes for unit in second.units] if second is not None else []
    slots = tuple(schedule(sizes, ring_bytes, fewer))
    device = SimulatedDevice(slots, ring_bytes, seed)
    stats = Stats(model_bytes=sum(sizes), resident_bytes=0, ring_bytes=ring_bytes, host_bytes=sum(sizes), disk_bytes=0)
    units = tuple(named_unit(number, size) for number, size in enumerate(sizes))
    nothing = {unit.name: Presence((), ()) for unit in units}
    streamer = Streamer(units, slots, device, stats, {}, Scratch(0, torch.device("cpu")), nothing, second)
    return streamer, device, stats


def visit(streamer: Streamer, device: SimulatedDevice, unit: int) -> None:
    streamer.acquire(unit)
    device.read(unit)
    streamer.release(unit)


def begin_turn(streamer: Streamer, tokens: int = 100) -> None:
    """What calling the model with so many tokens does before it visits anything."""
    streamer.turns.begin()
    with torch.no_grad():
        streamer.count_pass(None, (), {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)})


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[int], int]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    return sizes, draw(st.integers(max(sizes), 3 * max(sizes) + 2))


@given(rings(), st.integers(0, 2**32), st.integers(1, 6))
def test_passes_in_order_read_right_bytes_and_never_start_anew(
    ring: tuple[list[int], int], seed: int, passes: int
) -> None:
    sizes, ring_bytes = ring
    streamer, device, stats = streaming(sizes, ring_bytes, seed)
    for _ in range(passes):
        begin_turn(streamer)
        for unit in range(len(sizes)):
            visit(streamer, device, unit)
    device.finish()
    order = list(range(len(sizes))) * passes
    assert device.waited == device.released == order
    assert device.submitted[: len(order)] == order
    assert stats.reloads == stats.skips == 0
    assert (stats.passes, stats.visits) == (passes, len(order))


@given(rings(), st.integers(0, 2**32), st.data())
def test_any_order_of_visits_reads_right_bytes(ring: tuple[list[int], int], seed: int, data: st.DataObject) -> None:
    """Invariants 1, 2 and 8: repeats, skips, reversed passes and passes that end early."""
    sizes, ring_bytes = ring
    streamer, device, stats = streaming(sizes, ring_bytes, seed)
    orders = data.draw(st.lists(st.lists(st.integers(0, len(sizes) - 1), max_size=12), max_size=4))
    for order in orders:
        begin_turn(streamer)
        for unit in order:
            visit(streamer, device, unit)
    device.finish()
    assert stats.visits == sum(map(len, orders))
    assert device.released == device.waited  # in order, every visit once


@given(rings(), st.integers(0, 2**32), st.data())
def test_passes_that_break_off_leave_a_streamer_that_works(
    ring: tuple[list[int], int], seed: int, data: st.DataObject
) -> None:
    """An exception releases what is read, an interrupt does not, and a unit may not be readable for a while."""
    sizes, ring_bytes = ring
    streamer, device, _ = streaming(sizes, ring_bytes, seed)
    units = st.integers(0, len(sizes) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        begin_turn(streamer)
        unreadable = data.draw(st.none() | units)
        device.unreadable = set() if unreadable is None else {unreadable}
        with suppress(CheckpointError):
            for unit in range(data.draw(units) + 1):
                visit(streamer, device, unit)
        device.unreadable = set()
        if data.draw(st.booleans()):
            begin_turn(streamer)
            with suppress(CheckpointError):
                streamer.acquire(data.draw(units))  # and then Ctrl-C: no hook runs any more
        if data.draw(st.booleans()):
            streamer.cool()
    if device.failed:  # prefetched while it could not be read: that is still to be told
        with suppress(CheckpointError):
            begin_turn(streamer)
            for unit in range(len(sizes)):
                visit(streamer, device, unit)
    for _ in range(2):
        begin_turn(streamer)
        for unit in range(len(sizes)):
            visit(streamer, device, unit)
    device.finish()


@given(rings(), st.integers(0, 2**32), st.data())
def test_reads_within_reads_are_right_or_refused(ring: tuple[list[int], int], seed: int, data: st.DataObject) -> None:
    """Invariant 8 where the order is not even flat: a unit read again inside itself, or another inside it."""
    sizes, ring_bytes = ring
    streamer, device, _ = streaming(sizes, ring_bytes, seed)
    units = st.integers(0, len(sizes) - 1)
    begin_turn(streamer)
    for outer, inner in data.draw(st.lists(st.tuples(units, units), max_size=6)):
        streamer.acquire(outer)
        device.read(outer)
        with suppress(PlanError):
            visit(streamer, device, inner)
        device.read(outer)
        streamer.release(outer)
    device.finish()


def two_orders(
    sizes: list[int], left: list[int], ring_bytes: int, seed: int = 0
) -> tuple[Streamer, SimulatedDevice, Stats, dict[str, int]]:
    """A streamer whose passes of few tokens visit only the units ``left``; which visit each is bound to, by name."""
    units = tuple(named_unit(number, sizes[number]) for number in left)
    names = [f"u{number}" for number in [*range(len(sizes)), *left]]
    bound = {f"u{number}": number for number in range(len(sizes))}

    def bind(visit: int) -> None:
        bound[names[visit]] = visit

    streamer, device, stats = streaming(sizes, ring_bytes, seed, SecondOrder(units, 4, {}, bind))
    return streamer, device, stats, bound


def pass_of(
    streamer: Streamer, device: SimulatedDevice, bound: dict[str, int], tokens: int, units: list[int]
) -> list[int]:
    """Make a pass of so many tokens over ``units``, given as in the first order; return its visits."""
    begin_turn(streamer, tokens)
    visits = [number for unit in units if (number := streamer.orders.number(unit)) is not None]
    for unit, number in zip([u for u in units if streamer.orders.number(u) is not None], visits, strict=True):
        streamer.acquire(number)
        assert bound[f"u{unit}"] == number, "its parameters are bound to the slot of the other order"
        device.read(number)
        streamer.release(number)
    return visits


@given(rings(), st.integers(0, 2**32), st.data())
def test_passes_of_both_orders_read_right_bytes(ring: tuple[list[int], int], seed: int, data: st.DataObject) -> None:
    """Invariants 1, 2 and 8 over two orders: whichever follow each other, whole or in part, interrupted or not."""
    sizes, ring_bytes = ring
    left = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    streamer, device, stats, bound = two_orders(sizes, left, ring_bytes, seed)
    made = 0
    for _ in range(data.draw(st.integers(1, 6))):
        units = data.draw(
            st.just(list(range(len(sizes)))) | st.lists(st.integers(0, len(sizes) - 1), max_size=len(sizes))
        )
        made += len(pass_of(streamer, device, bound, data.draw(st.sampled_from([1, 4, 5, 100])), units))
        if left and data.draw(st.booleans()):
            begin_turn(streamer, 1)
            streamer.acquire(len(sizes))  # and then Ctrl-C: no hook runs any more
            made += 1
        if data.draw(st.booleans()):
            streamer.cool()
    device.finish()
    assert stats.visits == made


@given(rings(), st.integers(0, 2**32), st.data())
def test_a_generation_is_prefetched_in_the_second_order(
    ring: tuple[list[int], int], seed: int, data: st.DataObject
) -> None:
    """Invariant 4: after the prompt, and after each token, the units that the next token reads are on their way."""
    sizes, ring_bytes = ring
    left = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    streamer, device, stats, bound = two_orders(sizes, left, ring_bytes, seed)
    every = list(range(len(sizes)))
    visits = pass_of(streamer, device, bound, 100, every)
    for _ in range(4):
        visits += pass_of(streamer, device, bound, 1, every)
    device.finish()
    decode = [len(sizes) + number for number in range(len(left))]
    assert visits == every + decode * 4
    assert device.submitted[: len(visits)] == visits
    assert stats.reloads == stats.skips == 0


def test_the_first_order_comes_back_for_one_reload() -> None:
    streamer, device, stats, bound = two_orders([4, 4, 4, 4], [0, 2], 12)
    every = [0, 1, 2, 3]
    for tokens in (100, 1, 1, 100, 1, 1):
        pass_of(streamer, device, bound, tokens, every)
    device.finish()
    assert stats.reloads == 1


@pytest.mark.parametrize("tokens", [1, 100])
def test_passes_of_one_kind_alone_are_prefetched_from_the_third_on(tokens: int) -> None:
    streamer, device, stats, bound = two_orders([4, 4, 4, 4], [0, 2], 12)
    for _ in range(3):
        pass_of(streamer, device, bound, tokens, [0, 1, 2, 3])
    reloads = stats.reloads
    for _ in range(3):
        pass_of(streamer, device, bound, tokens, [0, 1, 2, 3])
    device.finish()
    assert stats.reloads == reloads


def test_an_interrupt_while_parameters_are_bound_leaves_none_in_the_other_slot() -> None:
    streamer, device, _, bound = two_orders([4, 4], [0], 12)
    second = streamer.orders._second
    assert second is not None

    def interrupted(visit: int) -> None:
        second.bind(visit)
        raise KeyboardInterrupt

    begin_turn(streamer, 1)
    streamer.orders._second = replace(second, bind=interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamer._acquire_hook(0)()
    streamer.orders._second = second
    pass_of(streamer, device, bound, 100, [0, 1])
    device.finish()


def test_a_read_that_cannot_be_nested_says_which_units() -> None:
    streamer, _, _ = streaming([4, 4, 4], 4)
    begin_turn(streamer)
    streamer.acquire(0)
    with pytest.raises(PlanError, match="unit u1 is read inside u0"):
        streamer.acquire(1)


def test_the_next_pass_is_prefetched_while_the_host_samples() -> None:
    """Invariant 4: once a pass has ended, the copies of the next one's first units have been issued."""
    streamer, device, _ = streaming([4, 4, 4, 4, 4], 12)
    begin_turn(streamer)
    for unit in range(5):
        visit(streamer, device, unit)
    assert device.submitted == [0, 1, 2, 3, 4, 0, 1, 2][: len(device.submitted)]
    assert len(device.submitted) >= 7


def test_the_ring_is_full_before_the_first_unit_is_read() -> None:
    streamer, device, _ = streaming([4, 4, 4, 4, 4], 12)
    begin_turn(streamer)
    assert device.submitted == [0, 1, 2]


def test_a_skipped_unit_costs_no_reload_while_the_next_one_is_there() -> None:
    streamer, device, stats = streaming([4, 4, 4, 4, 4], 12)
    for order in ([0, 1, 3, 4], [0, 1, 2, 3, 4]):
        begin_turn(streamer)
        for unit in order:
            visit(streamer, device, unit)
    device.finish()
    assert (stats.skips, stats.reloads) == (1, 0)


@given(rings(), st.integers(0, 2**32), st.data())
def test_an_order_that_repeats_is_followed(ring: tuple[list[int], int], seed: int, data: st.DataObject) -> None:
    """As in decode, where an encoder does not run: after it has been seen twice it is the order."""
    sizes, ring_bytes = ring
    streamer, device, stats = streaming(sizes, ring_bytes, seed)
    order = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True, min_size=1))

    def run(units: list[int], passes: int) -> None:
        for _ in range(passes):
            begin_turn(streamer)
            for unit in units:
                visit(streamer, device, unit)

    run(order, 4)
    left = stats.skips, stats.reloads
    device.submitted.clear()
    run(order, 3)
    assert (stats.skips, stats.reloads) == left
    assert set(device.submitted) <= set(order)
    run(list(range(len(sizes))), 4)
    left = stats.skips, stats.reloads
    run(list(range(len(sizes))), 2)
    assert (stats.skips, stats.reloads) == left, "nor is it followed for ever"
    device.finish()


def test_a_way_taken_once_in_a_while_is_not_expected() -> None:
    streamer, device, stats = streaming([4] * 6, 12)
    for order in ([0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]) * 4:
        begin_turn(streamer)
        for unit in order:
            visit(streamer, device, unit)
    device.finish()
    assert (stats.skips, stats.reloads) == (4, 0)


def test_what_is_expected_is_prefetched_over_the_end_of_a_pass() -> None:
    """Invariant 4 where passes leave out the first units of the recorded order."""
    streamer, device, _ = streaming([4] * 12, 12)
    for _ in range(4):
        begin_turn(streamer)
        for unit in range(3, 12):
            visit(streamer, device, unit)
    begin_turn(streamer)
    for unit in range(3, 11):
        visit(streamer, device, unit)
    assert device.submitted[-3:] == [11, 3, 4]


def test_cooling_forgets_what_was_prefetched() -> None:
    streamer, device, stats = streaming([4, 4, 4, 4], 12)
    for _ in range(2):
        begin_turn(streamer)
        for unit in range(4):
            visit(streamer, device, unit)
        device.submitted.clear()
        streamer.cool()
        assert device.submitted == []
        begin_turn(streamer)
        assert device.submitted == [0, 1, 2]
        streamer.cool()
    device.finish()
    assert stats.reloads == 0


class Leaf(nn.Module):
    """Reads its unit on the simulated device; raises ``error`` if it has one."""

    def __init__(self, device: SimulatedDevice, unit: int) -> None:
        super().__init__()
        self.device = device
        self.unit = unit
        self.error: BaseException | None = None

    def forward(self, x: int) -> int:
        self.device.read(self.unit)
        if self.error is not None:
            raise self.error
        self.device.read(self.unit)
        return x + 1


class Chain(nn.Module):
    """Leaves u0, u1, ... one after the other."""

    def __init__(self, device: SimulatedDevice, count: int) -> None:
        super().__init__()
        for unit in range(count):
            self.add_module(f"u{unit}", Leaf(device, unit))

    def forward(self, x: int) -> int:
        for leaf in self.children():
            x = leaf(x)
        return x


def hooked(count: int = 5) -> tuple[Chain, Streamer, SimulatedDevice, Stats]:
    streamer, device, stats = streaming([4] * count, 12)
    model = Chain(device, count)
    streamer.attach(model)
    return model, streamer, device, stats


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_whatever_a_module_raises_the_next_pass_works(error: BaseException) -> None:
    model, _, device, stats = hooked()
    for unit in (0, 2, 4):
        leaf = model.get_submodule(f"u{unit}")
        assert isinstance(leaf, Leaf)
        leaf.error = error
        with pytest.raises(type(error)):
            model(0)
        leaf.error = None
        assert model(0) == 5
    device.finish()
    assert stats.passes == 6


def interrupted(call: Callable[[], object], line: int) -> bool:
    """Run ``call`` with Ctrl-C before the given line that it runs of the streamer; return whether it got there."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal left
        if frame.f_code.co_filename != streamer_module.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("warm", [False, True])
def test_an_interrupt_before_any_line_leaves_a_model_that_works(warm: bool) -> None:
    """A signal is handled between two lines, wherever that is: the next pass is right."""
    line, came = 0, True
    while came:
        line += 1
        model, streamer, device, _ = hooked()
        if warm:
            model(0)
        came = interrupted(lambda model=model: model(0), line)
        assert model(0) == 5
        came = interrupted(streamer.cool, line) or came
        assert model(0) == 5
        device.finish()
    assert line > 100


@pytest.mark.parametrize("unit", [0, 1, 4])
def test_a_unit_that_cannot_be_read_is_asked_for_again(unit: int) -> None:
    model, streamer, device, _ = hooked()
    assert model(0) == 5
    device.unreadable = {unit}
    streamer.cool()
    with pytest.raises(CheckpointError, match=f"unit {unit} cannot be read"):
        model(0)
    device.unreadable = set()
    device.submitted.clear()
    assert model(0) == 5
    assert unit in device.submitted
    device.finish()


def test_other_hooks_run_while_their_module_may_be_read() -> None:
    streamer, device, _ = streaming([4] * 5, 12)
    model = Chain(device, 5)
    leaf = model.get_submodule("u0")
    leaf.register_forward_pre_hook(lambda *_: device.read(0))
    leaf.register_forward_hook(lambda *_: device.read(0))
    streamer.attach(model)
    leaf.register_forward_pre_hook(lambda *_: device.read(0))
    for _ in range(30):
        model(0)
        streamer.cool()
    device.finish()


def test_a_module_whose_error_its_parent_catches_is_released() -> None:
    class Forgiving(Chain):
        def forward(self, x: int) -> int:
            for leaf in self.children():
                with suppress(ValueError):
                    x = leaf(x)
            return x

    streamer, device, stats = streaming([4] * 5, 12)
    model = Forgiving(device, 5)
    streamer.attach(model)
    leaf = model.get_submodule("u1")
    assert isinstance(leaf, Leaf)
    leaf.error = ValueError("forgiven")
    for _ in range(3):
        assert model(0) == 4
    device.finish()
    assert device.released == [0, 1, 2, 3, 4] * 3
    assert stats.reloads == 0


def test_detaching_leaves_no_hook() -> None:
    model, streamer, _, stats = hooked()
    streamer.detach()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(not module._forward_hooks_always_called for module in model.modules())
    model.device = None  # type: ignore[assignment]
    assert stats.passes == 0


def test_nothing_streamed_is_streamed_well() -> None:
    streamer, device, stats = streaming([], 0)
    model = Chain(device, 0)
    streamer.attach(model)
    assert model(7) == 7
    streamer.cool()
    assert (stats.passes, stats.link_bytes) == (1, 0)
