"""The pool: device memory in slots, each of which holds one expert of one layer. How large it is, and when it is used.

A **routed** pass fetches what its routers pick. A **whole** pass, one of many tokens, streams whole layers through two
**windows** of the same memory, each of as many slots as a layer has experts; while one layer is computed, the next one
arrives. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from djinn.weights.units import Unit

WINDOWS = 2
"""One layer's experts are computed while the next one's arrive."""
LAYER_IDLE_S = 0.3e-3
"""How long the link is idle in a routed layer, between its copies' end and the next one's start: its experts, the next
attention, the router's answer. Of 48 layers of Qwen3-30B-A3B's shape on an H100 with all experts there: 10.9 ms of
small kernels and answers, and the experts' own time."""
MOVE_S = 8e-6
"""What the host takes to have one expert copied within the pool."""
HOST_S = 1.1e-3
"""What the host takes for a layer: ten modules of 115 µs on an H100's host."""
ONE_S = 80e-6
"""What it takes for both products of one expert, where experts are multiplied one by one."""
MOST_GROUPS = 1023
"""That torch's grouped product takes on a GPU; of a pool of more slots, experts are multiplied one by one."""


@dataclass(frozen=True)
class Pool:
    """``slots`` of ``slot_bytes`` each; 0 where all weights are resident, or no unit has experts."""

    slots: int
    slot_bytes: int
    experts: int
    """Of all layers together."""
    widest: int
    """Experts of the layer that has most."""
    picked: int
    """Experts that a router picks for a token."""

    @property
    def nbytes(self) -> int:
        """Device memory of the pool."""
        return self.slots * self.slot_bytes

    @property
    def share(self) -> float:
        """The share of all experts that are in the pool: the hit rate to expect of routers that pick evenly."""
        return self.slots / self.experts if self.experts else 1.0

    @property
    def windows(self) -> int:
        """How many whole layers it holds at once, as far as that matters."""
        return min(WINDOWS, self.slots // self.widest) if self.widest else 0

    def kept(self, free: int, layers: int) -> int:
        """Return how many experts of a layer that passes by stay in ``free`` slots, with so many ``layers`` to come.

        All layers keep equally many; but where the pool has all experts but less than a layer's, the first layers keep
        all of theirs: of a layer that is there as a whole nobody has to ask what was picked.
        """
        return free if self.experts - self.slots < self.widest else free // layers

    def distinct(self, tokens: int) -> float:
        """Return how many experts of a layer ``tokens`` need together, if routers pick evenly."""
        return self.widest * (1 - (1 - min(self.picked / self.widest, 1)) ** tokens)

    def most_hits(self, tokens: int, *, whole: bool) -> float:
        """Return the most that a hit rate can be where ``tokens`` pick together: the pool holds no more.

        In a ``whole`` pass a layer needs all of its experts, and the windows hold none for long.
        """
        if whole:
            return max(self.slots - self.windows * self.widest, 0) / self.experts
        return min(self.share * self.widest / self.distinct(tokens), 1.0)

    def whole_from(self, link: float, idle_s: float = LAYER_IDLE_S) -> int | None:
        """Return from how many tokens on a whole pass is faster; None if it never is, for want of windows.

        Of a routed layer's experts those that are not in the pool cross the ``link`` (bytes/s), which then is idle; of
        a whole one's all that are not, without a pause, and those in the pool are copied within it.
        """
        if not self.windows:
            return None
        missing_s = (1 - self.share) * self.slot_bytes / link
        whole_s = max(self.widest * missing_s, HOST_S + self.widest * self.share * MOVE_S)
        one_by_one_s = ONE_S if self.slots > MOST_GROUPS else 0.0
        each_s = missing_s + one_by_one_s
        most = 0.97 * self.widest  # of experts that only very many tokens would need
        needed = min((whole_s - idle_s) / each_s, most) if each_s else most
        missed = 1 - min(self.picked / self.widest, 1 - 1e-9)
        return max(math.ceil(math.log(1 - max(needed, 0.0) / self.widest) / math.log(missed)), 1)


def mean_rate(parts: Sequence[tuple[int, float]]) -> float:
    """Return the rate at which all of ``parts`` come one after the other: of each its bytes, and bytes/s."""
    return sum(nbytes for nbytes, _ in parts) / sum(nbytes / rate for nbytes, rate in parts)


NO_POOL = Pool(0, 0, 0, 0, 0)


def pool_for(units: Sequence[Unit], picked: int, spare: int) -> Pool:
    """Return the pool for ``units``, which have experts, in ``spare`` bytes, of a model that picks so many for a token.

    It has at least as many slots as one token needs of a layer, whether there is room for them or not.
    """
    if not units:
        return NO_POOL
    slot_bytes = max(expert.image_bytes for unit in units for expert in unit.experts)
    experts, widest = sum(len(unit.experts) for unit in units), max(len(unit.experts) for unit in units)
    slots = min(max(spare // slot_bytes, min(picked, widest)), experts)
    return Pool(slots, slot_bytes, experts, widest, picked)
