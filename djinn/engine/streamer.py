"""Prefetch-only forward hooks: they wait for a unit, release it, and start the copies that the release allows.

Nothing is decided here: where a unit lands and which others lie there was computed before. Visits are numbered through
all passes; in the expected order (:mod:`djinn.planning.order`) the next visit's copy has long been submitted, and
prefetching goes on over the end of a pass, so the next token's first units move while the host still samples this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.compiler import disable as opaque  # called where it stands, in compiled code too

from djinn.engine.coding import Scratch
from djinn.engine.decoded import DecodedResidents
from djinn.engine.presence import Presence
from djinn.engine.second_order import Orders, SecondOrder
from djinn.engine.turns import Turns
from djinn.errors import PlanError
from djinn.planning.order import Order
from djinn.planning.ring import Slot
from djinn.transport.copier import Copier
from djinn.transport.stats import Stats
from djinn.weights.units import Unit


class Streamer:
    """Runs the ring: one instance per streaming model.

    Three counters say everything. Visits before ``released`` have been released, the pass will next read ``cursor``,
    and copies have been submitted for all visits before ``submitted``: released <= cursor <= submitted.

    They are one thread's at a time (see ``turns``), and ``torn`` while one is changing them: an interrupt may come
    between any two lines, and the next turn then begins with an empty ring.

    Args:
        units: the units that stream, in order.
        slots: theirs, and behind them those of the ``second`` order.
        second: the order of passes of few tokens, where the host computes with units.
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        slots: tuple[Slot, ...],
        copier: Copier,
        stats: Stats,
        decodings: Mapping[str, Callable[[], None]],
        scratch: Scratch,
        presences: Mapping[str, Presence],
        second: SecondOrder | None = None,
    ) -> None:
        self.orders = orders = Orders(units, decodings, second)
        self._units = orders.units
        self._decodes = orders.decodes
        self._residents = DecodedResidents(copier, decodings, scratch, presences)
        self._in_slots = [presences[unit.name] for unit in self._units]
        self._scratch = scratch
        self._slots = slots
        self._copier = copier
        self._stats = stats
        self._released = 0
        self._cursor = 0
        self._submitted = 0
        self._order = Order(len(self._units), orders.again)
        self._next = self._order.after
        self._last_released: int | None = None
        self._occupied = 0
        """The units that are in the ring or on their way and have not been released: a set, as in ``Slot.clashes``."""
        self._reading: dict[int, _Reading] = {}
        self._torn = False
        self._handles: list[Any] = []
        self.turns = Turns(self._recover)

    def attach(self, model: nn.Module) -> None:
        """Hook every reader of every streamed unit."""
        begin = opaque(self.count_pass)
        self._handles.append(model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        for index, unit in enumerate(self.orders.first):
            self._hook(model, unit, self._acquire_hook(index), self._release_hook(index))

    def attach_residents(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Hook the readers of coded units that stay on the device: they have only to be decoded."""
        for unit in units:
            self._hook(model, unit, *self._residents.hooks(unit))

    def _hook(self, model: nn.Module, unit: Unit, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Hook the unit's readers; they and the modules around them take turns from now on."""
        for name in unit.readers:
            around = [name[:end] for end, letter in enumerate(name) if letter == "."]
            self.turns.cover(model.get_submodule(path) for path in ("", *around, name))
            reader = model.get_submodule(name)
            # First before the module's forward and, called always, last after it: its other hooks see its weights.
            self._handles.append(reader.register_forward_pre_hook(opaque(before), prepend=True))
            self._handles.append(reader.register_forward_hook(opaque(after), always_call=True))

    def detach(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.turns.uncover()

    def cool(self) -> None:
        """Forget all that was prefetched, so that the next pass begins with a cold ring."""
        self._torn = True
        self._copier.settle()
        self._forget_readers()
        if self._units:
            self._restart(0)
        self._torn = False

    def _recover(self) -> None:
        """Mend what an interrupt (not an Exception) has left: it ran no release hook, and nothing is read any more."""
        if self._torn:
            self.cool()
        self.orders.few = False  # until the whole model is called, which says of how many tokens
        self._torn = True
        self._forget_readers()
        self._release_unread()
        self._torn = False

    def count_pass(self, _: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a pass begins, and which order it takes."""
        self._stats.passes += 1
        self.orders.begin(args, kwargs)

    def _forget_readers(self) -> None:
        for unit in self._reading:
            self._in_slots[unit].end()
        self._reading.clear()
        self._scratch.clear()
        self._residents.forget()

    def _acquire_hook(self, unit: int) -> Callable[..., None]:
        def acquire(*_: object) -> None:
            number = self.orders.number(unit)
            if number is not None:
                self._torn = True
                self.acquire(number)
                self._torn = False

        return acquire

    def _release_hook(self, unit: int) -> Callable[..., None]:
        def release(*_: object) -> None:
            number = self.orders.number(unit)
            if number is not None:
                self._torn = True
                self.release(number)
                self._torn = False

        return release

    def acquire(self, unit: int) -> None:
        """Make the compute that follows see ``unit`` in its slot.

        Raises:
            CheckpointError: its bytes cannot be read.
            PlanError: its slot overlaps a unit that is still being read around it.
        """
        begin, stalled = time.perf_counter(), self._stats.stall_s
        reading = self._reading.get(unit)
        if reading is not None:
            reading.depth += 1
            return
        if self._cursor % len(self._units) != unit:
            self._leave_order(unit)
        else:
            self._order.follow(unit)
        if self._cursor == self._submitted:
            self._advance()
            if self._cursor == self._submitted:
                self._refuse_nesting(unit)
        decode = self._decodes[unit]
        if decode is not None:
            self._scratch.enter(self._units[unit].name)
        self._wait(unit)
        visit, self._cursor = self._cursor, self._next(self._cursor)
        self._stats.visits += 1
        if decode is None:
            self._reading[unit] = _Reading(visit)
            self.orders.bind(unit)
        else:
            # Once it is decoded nothing reads the slot any more: it is free long before the unit has been used.
            decode()
            self._reading[unit] = _Reading(None)
            self._release_unread()
        self._in_slots[unit].begin()
        self._stats.hook_s += time.perf_counter() - begin - (self._stats.stall_s - stalled)

    def release(self, unit: int) -> None:
        """Note that ``unit`` has been read, and start the copies that waited for that."""
        begin = time.perf_counter()
        reading = self._reading.get(unit)
        if reading is None:
            return  # acquiring it failed; that error is on its way to the caller
        reading.depth -= 1
        if reading.depth == 0:
            self._in_slots[unit].end()
            del self._reading[unit]
            if reading.visit is None:
                self._scratch.leave(self._units[unit].name)
            self._release_unread()
        self._stats.hook_s += time.perf_counter() - begin

    def is_reading(self, unit: str) -> bool:
        """Return whether the weights of ``unit``, which streams or is decoded, may be read now."""
        return self._scratch.is_used_by(unit) or any(self._units[index].name == unit for index in self._reading)

    def _wait(self, unit: int) -> None:
        try:
            self._copier.wait(unit)
        except BaseException:
            self.cool()  # so that the next pass asks for the unit again
            raise

    def _release_unread(self) -> None:
        """Release all visits before the first whose slot is still being read, and start what waited for that."""
        first = self._cursor
        if self._reading:
            visits = [reading.visit for reading in self._reading.values() if reading.visit is not None]
            first = min(visits, default=first)
        self._release_until(first)
        self._advance()

    def _release_until(self, visit: int) -> None:
        """Release visits in their order, so that waiting for one means waiting for all before it."""
        while self._released < visit:
            unit = self._released % len(self._units)
            self._copier.release(unit)
            self._occupied &= ~(1 << unit)
            self._last_released = unit
            self._released = self._next(self._released)

    def _advance(self) -> None:
        """Submit every copy whose slot has been released.

        It waits for the latest release: that is the one which let it start, or one that a copy before it waits for.
        """
        count = len(self._units)
        while count and not self._occupied & self._slots[unit := self._submitted % count].clashes:
            self._copier.submit(unit, self._last_released)
            self._occupied |= 1 << unit
            self._submitted = self._next(self._submitted)

    def _leave_order(self, unit: int) -> None:
        """Get to ``unit`` although another was due: skip what was prefetched in between, or start anew from it."""
        if self._reading:
            self._refuse_nesting(unit)
        count = len(self._units)
        again = self._order.stray(unit)
        skipped = []
        target = self._cursor
        while target < self._submitted and target % count != unit:
            skipped.append(target)
            target = self._next(target)
        if target < self._submitted and not again:
            for visit in skipped:
                self._wait(visit % count)
            self._stats.skips += len(skipped)
            self._cursor = target
            self._release_until(target)
            self._advance()
        else:
            self._copier.settle()
            self._restart(unit)
            self._stats.reloads += 1

    def _restart(self, unit: int) -> None:
        """Make ``unit`` the next visit, with an empty ring; nothing to do where all units are resident."""
        if not self._units:
            return
        self._cursor = self._submitted + (unit - self._submitted) % len(self._units)
        self._released = self._submitted = self._cursor
        self._occupied = 0

    def _refuse_nesting(self, unit: int) -> None:
        around = ", ".join(self._units[index].name for index in self._reading)
        raise PlanError(
            f"unit {self._units[unit].name} is read inside {around}, which the recorded pass did not do, and both "
            "cannot be in the ring at once; a larger budget keeps them on the device"
        )


@dataclass
class _Reading:
    """A unit that is being read: its visit, None once its slot is free, and how many of its readers are running."""

    visit: int | None
    depth: int = 1
