"""Experts on demand: a hook on each experts module sees what the router picked, and fetches what is not in the pool.

The module then runs as ever, with objects in the place of its weights that know where each expert is
(:mod:`djinn.engine.handed`). Asking the device for the router's answer also proves that every layer before has been
computed, so a slot may be filled anew at once. A pass of many tokens asks nothing: it takes whole layers, each of which
arrives in a window of the pool while the one before is computed. See :mod:`djinn.planning.experts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.compiler import disable as opaque

from djinn.engine.expert_layers import Layer, measured_rate
from djinn.engine.handed import Asked, Call, HandedWeights
from djinn.engine.host_experts import HostExperts, HostPart
from djinn.engine.turns import Turns
from djinn.planning.expert_cache import ExpertCache
from djinn.planning.host_experts import whole_from
from djinn.planning.placement import Plan
from djinn.transport.fetcher import Arrival, Fetch, Fetcher
from djinn.transport.stats import Stats

Picked = Callable[[int, Sequence[int]], None]
"""Told of every routed layer, by its number, and the experts that were picked there."""


class Experts:
    """Runs the pool: one instance per model that has routed experts away from the device."""

    def __init__(
        self,
        layers: Sequence[Layer],
        fetcher: Fetcher,
        plan: Plan,
        stats: Stats,
        turns: Turns,
        host: HostExperts | None = None,
    ) -> None:
        self._layers = layers
        self.fetcher = fetcher
        self._pool = pool = plan.pool
        self._stats = stats
        self._turns = turns
        self._host = host
        """What the host's cores compute experts with, where they do."""
        self._part: HostPart | None = None
        """What they have taken of the call under way."""
        self._cache = ExpertCache(pool.slots, len(layers))
        self._whole_from = whole_from(plan, measured_rate(layers, fetcher, pool))
        self._coming: dict[int, Fetch] = {}
        """By layer, what a whole pass has fetched of it and nobody has waited for."""
        self._released: dict[int, Any] = {}
        """By window, the end of the compute that read it, in this whole pass."""
        self._fetched: dict[str, Fetch] = {}
        """By tensor, what the module that runs has not waited for yet."""
        self._told_otherwise: set[int] = set()
        """Layers of which a whole pass has moved experts, and whose whereabouts are to be told anew."""
        self._torn = False
        self._handles: list[Any] = []
        self._handed: list[tuple[dict[str, Any], Layer]] = []
        """Attributes of modules that have what stands for their weights among them, and the layer that it is of."""
        self.picked: Picked | None = None

    def attach(self, model: nn.Module) -> None:
        """Hook every experts module."""
        for number, layer in enumerate(self._layers):
            name = layer.unit.readers[0]
            around = [name[:end] for end, letter in enumerate(name) if letter == "."]
            self._turns.cover(model.get_submodule(path) for path in ("", *around, name))
            module = model.get_submodule(name)
            enter, leave = opaque(partial(self._enter, number)), opaque(partial(self._leave, number))
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._turns.beginnings.append(self.recover)
        self._turns.endings.append(self._take_away)  # an interrupt runs no hook

    def detach(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._take_away()

    def cool(self) -> None:
        """Empty the pool."""
        self.fetcher.settle()
        self._cache.forget()
        self._coming.clear()
        self._fetched.clear()
        self._released.clear()
        self._torn = False

    def recover(self) -> None:
        """Mend what an interrupt (not an Exception) has left: it ran no hook, and nothing is read any more."""
        self._take_away()
        if self._torn or self._fetched:  # or what is in the cache already may still be on its way
            self.cool()

    def _take_away(self) -> None:
        for attributes, layer in self._handed:
            for tensor in layer.tensors:
                attributes.pop(tensor.local, None)
        self._handed.clear()

    def _enter(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layer = self._layers[number]
        begin, waited = time.perf_counter(), self._waited()
        self._torn = True
        try:
            asked = Asked(module, args, kwargs)
            index, known = asked.picked(len(layer.sources))
            self.fetcher.follow()
            whole = self._whole_from is not None and len(index) >= self._whole_from
            self._part = None
            given = self._whole(number, index, known) if whole else self._routed(number, index, known, asked)
        except BaseException:
            self.cool()  # so that the next pass asks for all of it again
            raise
        attributes = vars(module)
        self._handed.append((attributes, layer))
        attributes.update(given)
        self._torn = False
        self._stats.hook_s += time.perf_counter() - begin - (self._waited() - waited)
        return None if self._part is None else self._part.instead

    def _leave(self, number: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        part, self._part = self._part, None
        try:
            for name in list(self._fetched):
                self._arrive(name)
            if self._released and number % self._pool.windows in self._released:
                self._released[number % self._pool.windows] = self.fetcher.mark()
        finally:
            self._take_away()
            if torch.is_grad_enabled():
                increment_version(self.fetcher.pool)  # so that no gradient is made with what the slots hold later
        return None if part is None or output is None else output + part.outputs

    def _waited(self) -> float:
        """Return how long hooks have waited so far for what is not theirs."""
        stats = self._stats
        return stats.stall_s + stats.index_wait_s + stats.product_wait_s

    def _routed(self, number: int, index: torch.Tensor, known: bool, asked: Asked) -> dict[str, Any]:
        """Return what stands for the weights once all that was picked is there, or will come in rounds."""
        layer, cache = self._layers[number], self._cache
        while self._coming:
            self.fetcher.wait(self._coming.popitem()[1])
        self._released.clear()
        cache.take_back()
        call = Call(len(layer.sources), index, layer.where, is_known=known)
        self._stats.routed_layers += 1
        if known and (places := self._unasked(number, index)) is not None:
            call.places = places
            self._stats.expert_hits += index.numel()
            return {tensor.local: HandedWeights(call, tensor) for tensor in layer.tensors}
        begin = time.perf_counter()
        wanted = call.wanted
        self._stats.index_wait_s += time.perf_counter() - begin
        if self.picked is not None:
            self.picked(number, wanted)
        if self._host is not None and known:
            held = cache.held(number)
            self._part = self._host.share(layer, asked, call, [expert for expert in wanted if expert not in held])
        if self._part is not None:
            call = self._part.call
            self._stats.expert_misses += len(wanted) - len(call.wanted)
        if len(call.wanted) > cache.slots:
            cache.lend(range(cache.slots))
            call.bring = partial(self._round, layer)
            self._stats.expert_misses += len(call.wanted)
        else:
            self._bring(number, call)
        if self._part is not None:
            self._part.compute()  # beside the copies that have just begun
        return {tensor.local: HandedWeights(call, tensor) for tensor in layer.tensors}

    def _unasked(self, number: int, index: torch.Tensor) -> Mapping[int, int] | None:
        """Return the slots of all experts of a layer if the pool has them and one token picks: nobody need know which.

        Asking would let the device wait for the host. A token picks no expert twice, so its picks are counted unseen.
        """
        if len(index) > 1 or number in self._told_otherwise or self.picked is not None:
            return None
        return self._cache.whole(number, len(self._layers[number].sources))

    def _bring(self, number: int, call: Call) -> None:
        """Let come what is not in the pool of the experts that were picked, and tell ``call`` where each one is."""
        cache = self._cache
        call.places = places = cache.use(number, call.wanted)
        missing = [expert for expert in call.wanted if expert not in places]
        self._stats.expert_hits += len(places)
        self._stats.expert_misses += len(missing)
        if missing:
            keep = frozenset(call.wanted)
            coming = {expert: cache.make_room(number, keep) for expert in missing}
            call.places = places | coming
            self._tell(number, coming if number not in self._told_otherwise else cache.held(number) | coming)
            self._begin_fetch(number, call, coming)
        elif number in self._told_otherwise:
            self._tell(number, cache.held(number))

    def _begin_fetch(self, number: int, call: Call, coming: Mapping[int, int]) -> None:
        """Let experts come to their slots, of which ``call`` knows; compute waits for them when it reads them."""
        layer, cache = self._layers[number], self._cache
        # A router's answer that came from the device came after all compute before it: nothing is to be waited for.
        after = None if call.index.is_cuda else self.fetcher.mark()
        for names, sources in layer.fetched(self._pool.slot_bytes):
            arrivals = [Arrival(sources[expert], slot) for expert, slot in coming.items()]
            self._fetched |= dict.fromkeys(names, self.fetcher.fetch(arrivals, [], after))
        for expert, slot in coming.items():
            cache.enter(number, expert, slot)
        call.arrive = self._arrive

    def _tell(self, number: int, places: Mapping[int, int]) -> None:
        """Upload where experts are; before their copies begin, behind which it would arrive after them."""
        self._layers[number].where.note(places)
        self._told_otherwise.discard(number)

    def _arrive(self, name: str) -> None:
        """Make compute wait for a tensor that was fetched, if that has not been done."""
        fetch = self._fetched.get(name)
        if fetch is None:
            return
        try:
            self.fetcher.wait(fetch)
        except BaseException:
            self.cool()
            raise
        self._fetched = {other: found for other, found in self._fetched.items() if found is not fetch}

    def _round(self, layer: Layer, name: str, experts: Sequence[int]) -> dict[int, int]:
        """Fetch one tensor of the first of ``experts``, as many as there are slots; return their slots."""
        coming = dict(zip(experts, range(self._cache.slots), strict=False))
        arrivals = [Arrival(layer.by_tensor[name][expert], slot) for expert, slot in coming.items()]
        try:
            self.fetcher.wait(self.fetcher.fetch(arrivals, [], self.fetcher.mark()))
        except BaseException:
            self.cool()  # or what is still on its way would land on what the next pass fetches
            raise
        return coming

    def _whole(self, number: int, index: torch.Tensor, known: bool) -> dict[str, Any]:
        """Return the weights of all experts, which are in their window, and let the next layer's come."""
        layer = self._layers[number]
        self._stats.whole_layers += 1
        if number not in self._coming:
            self._begin_whole_pass()
            self._fetch_whole(number)
        self.fetcher.wait(self._coming.pop(number))
        window = number % self._pool.windows
        self._released.setdefault(window, None)
        first = window * self._pool.widest
        slots = range(first, first + len(layer.sources))
        call = Call(len(slots), index, layer.where, places=dict(enumerate(slots)), is_known=known)
        if any(tensor.coded for tensor in layer.tensors):
            self._tell(number, dict(enumerate(slots)))
            self._told_otherwise.add(number)
        if self._pool.windows > 1 and number + 1 < len(self._layers):
            self._fetch_whole(number + 1)
        return {
            tensor.local: HandedWeights(call, tensor) if tensor.coded else tensor.slots[slots.start : slots.stop]
            for tensor in layer.tensors
        }

    def _begin_whole_pass(self) -> None:
        while self._coming:
            self.fetcher.wait(self._coming.popitem()[1])
        self._released.clear()
        self._cache.take_back()
        self._cache.lend(range(self._pool.windows * self._pool.widest))

    def _fetch_whole(self, number: int) -> None:
        """Let all experts of a layer come into its window: those in the pool from there, and leave these there."""
        cache, sources = self._cache, self._layers[number].sources
        window = number % self._pool.windows
        first = window * self._pool.widest
        cache.lend(range(first, first + self._pool.widest))
        within = cache.held(number)
        missing = [expert for expert in range(len(sources)) if expert not in within]
        places = {expert: first + expert for expert in missing}
        # While the pool has free slots, some of what passes by stays in one for the tokens to come.
        for expert in missing[: self._pool.kept(cache.free, len(self._layers) - number)]:
            slot = cache.take_free() if sources[expert].image is not None else None
            if slot is not None:
                places[expert] = within[expert] = slot
        copies = [(slot, first + expert) for expert, slot in within.items()]
        arrivals = [Arrival(sources[expert], slot) for expert, slot in places.items()]
        self._coming[number] = self.fetcher.fetch(arrivals, copies, self._released.get(window) or self.fetcher.mark())
        for expert, slot in places.items():
            cache.enter(number, expert, slot)
        self._told_otherwise.add(number)
