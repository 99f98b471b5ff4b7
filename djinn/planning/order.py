"""The order in which passes are expected to visit the streamed units, and how another one is learned. Pure.

Visits are numbered through all passes: visit ``v`` is of unit ``v % count``. A way that passes take twice running
instead of the expected one is expected from then on: an encoder that runs for the first token alone is not prefetched
for the others, nor is what follows an early exit. Visits that are then left out keep their numbers.

Units of a second order (see :mod:`djinn.planning.ring`) have the numbers behind those of the first. After a pass of
either order one of the second is expected: of a generation all passes but the first are.
"""

from __future__ import annotations


class Order:
    """Follows the recorded order until passes show another.

    Args:
        count: units of all orders.
        again: the first unit of the pass that is expected after the last unit.
    """

    def __init__(self, count: int, again: int = 0) -> None:
        self._count = count
        self._steps = [1] * count
        """How many visits on from each unit the pass is expected to go."""
        if count:
            self._steps[-1] += again
        self._strayed: dict[int, int] = {}
        """After which unit the last pass went to which other than the expected one."""
        self._previous: int | None = None

    def after(self, visit: int) -> int:
        """Return the visit that is expected after ``visit``."""
        return visit + self._steps[visit % self._count]

    def follow(self, unit: int) -> None:
        """Note that the pass went to ``unit``, as was expected."""
        if self._strayed and self._previous is not None:
            self._strayed.pop(self._previous, None)
        self._previous = unit

    def stray(self, unit: int) -> bool:
        """Note that the pass went to ``unit`` instead; return whether the last one did so too: then it is expected."""
        previous, self._previous = self._previous, unit
        if previous is None:
            return False
        again = self._strayed.get(previous) == unit
        if again:
            del self._strayed[previous]
            self._steps[previous] = (unit - previous) % self._count or self._count
        else:
            self._strayed[previous] = unit
        return again
