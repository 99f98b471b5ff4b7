"""Which experts are in the pool, which slot each is in, and which make room for others. Pure.

Layers come in a cycle, so what was used longest ago is what comes next: evicting by that alone loses everything once a
token asks for more experts than there are slots. Instead the layer at hand gives up its own experts that were not
picked, since it comes again last of all, the one that was used longest ago first; then the layer passed before it gives
up its own, and so on around the cycle. On synthetic routing (uniform, Zipf, with repetition; pools from a fifth of a
token's demand to five times of it) that was at most a hundredth below evicting what was used longest ago, and far above
it where the pool is smaller than a token's demand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

Trace = Sequence[Sequence[Collection[int]]]
"""Of every pass, for every layer in order, the experts that its router picked."""


class ExpertCache:
    """Slots and what is in them. A slot is free, lent (see :meth:`lend`), or holds one expert of one layer."""

    def __init__(self, slots: int, layers: int) -> None:
        self.slots = slots
        self._layers: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layers)]
        self._held: dict[int, tuple[int, int]] = {}
        """By slot, the layer and expert that it holds."""
        self._free = list(reversed(range(slots)))
        self._lent: set[int] = set()

    @property
    def free(self) -> int:
        """Slots that hold nothing and are not lent."""
        return len(self._free)

    def held(self, layer: int) -> dict[int, int]:
        """Return the slot of every expert of ``layer`` that is in the pool."""
        return dict(self._layers[layer])

    def whole(self, layer: int, experts: int) -> Mapping[int, int] | None:
        """Return the slots of all ``experts`` of a layer, as they are now; None where one is not in the pool."""
        held = self._layers[layer]
        return held if len(held) == experts else None

    def use(self, layer: int, experts: Iterable[int]) -> dict[int, int]:
        """Note that ``experts`` are used now; return the slot of each that is in the pool."""
        held = self._layers[layer]
        found = {}
        for expert in experts:
            if expert in held:
                held.move_to_end(expert)
                found[expert] = held[expert]
        return found

    def make_room(self, layer: int, keep: Collection[int]) -> int:
        """Return a slot that holds nothing from now on, for an expert of ``layer``, which needs ``keep`` at once.

        The slot is nobody's until :meth:`enter`.

        Raises:
            ValueError: every slot is lent, or holds one of ``keep``.
        """
        if self._free:
            return self._free.pop()
        count = len(self._layers)
        for number in (layer - back for back in range(count)):
            for expert, slot in self._layers[number % count].items():
                if number != layer or expert not in keep:
                    del self._layers[number % count][expert], self._held[slot]
                    return slot
        raise ValueError(f"layer {layer}: all {self.slots} slots are lent or hold what is needed at once")

    def take_free(self) -> int | None:
        """Return a free slot, nobody's until :meth:`enter`; None where none is free."""
        return self._free.pop() if self._free else None

    def enter(self, layer: int, expert: int, slot: int) -> None:
        """Note that ``slot``, which is nobody's or lent, holds an expert: its copy has been issued."""
        self._lent.discard(slot)
        self._held[slot] = layer, expert
        self._layers[layer][expert] = slot

    def lend(self, slots: Iterable[int]) -> None:
        """Take what is in ``slots`` out of the pool, and these with it, until :meth:`enter` or :meth:`take_back`."""
        lent = set(slots)
        for slot in lent & self._held.keys():
            layer, expert = self._held.pop(slot)
            del self._layers[layer][expert]
        self._free = [slot for slot in self._free if slot not in lent]
        self._lent |= lent

    def take_back(self) -> None:
        """Make all slots that are still lent free."""
        if self._lent:
            self._free += sorted(self._lent, reverse=True)
            self._lent.clear()

    def forget(self) -> None:
        """Make all slots free."""
        self.__init__(self.slots, len(self._layers))  # type: ignore[misc]


def hit_rate(trace: Trace, slots: int) -> float:
    """Return the share of picked experts that a pool of ``slots``, empty at first, would have had when they were used.

    Raises:
        ValueError: a pool too small for what one layer needs at once, or a trace without picks.
    """
    cache = ExpertCache(slots, max(map(len, trace), default=0))
    hits = picks = 0
    for layers in trace:
        for layer, experts in enumerate(layers):
            found = cache.use(layer, experts)
            hits, picks = hits + len(found), picks + len(experts)
            for expert in experts:
                if expert not in found:
                    cache.enter(layer, expert, cache.make_room(layer, experts))
    if not picks:
        raise ValueError("the trace has no picked experts")
    return hits / picks
