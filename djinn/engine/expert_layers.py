"""One layer of routed experts: where each one waits, what their module's tensors are, and where these are now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from djinn.engine.expert_tensors import ExpertTensor
from djinn.engine.whereabouts import Whereabouts
from djinn.planning.experts import Pool, mean_rate
from djinn.transport.copier import Source
from djinn.transport.fetcher import Arrival, Fetcher
from djinn.transport.reader import Buffer
from djinn.weights.units import Unit

SPLIT_BYTES = 32 * 2**20
"""Experts of at least this size come tensor by tensor: the first is multiplied while the second is still on its way.
The halves of smaller ones would take longer to come (9.4 MB in one copy 53.6 GB/s, 3 MB 51.7, on an H100)."""
MEASURED_BYTES = 2**30
"""Of experts, by which the rate is measured at which they come."""


@dataclass(frozen=True)
class Layer:
    """One unit of experts: where each one waits, and what their module's tensors are."""

    unit: Unit
    sources: tuple[Source, ...]
    tensors: tuple[ExpertTensor, ...]
    by_tensor: Mapping[str, tuple[Source, ...]]
    """The sources of each tensor alone."""
    where: Whereabouts

    @classmethod
    def of(cls, unit: Unit, image: Buffer | None, pool: torch.Tensor) -> Layer:
        """``image``: of the unit, in host memory; None where it is on disk."""
        places = zip(unit.experts, unit.expert_offsets, strict=True)
        sources = tuple(
            Source(expert, None if image is None else image[start : start + expert.image_bytes])
            for expert, start in places
        )
        by_tensor = {tensor.name: tuple(_only(source, tensor.name) for source in sources) for tensor in unit.tensors}
        tensors = tuple(ExpertTensor(unit, name, pool) for name in by_tensor)
        return cls(unit, sources, tensors, by_tensor, Whereabouts(len(sources), tensors))

    def fetched(self, slot_bytes: int) -> list[tuple[Sequence[str], tuple[Source, ...]]]:
        """Return what comes at once: names of tensors, and the sources of them."""
        if slot_bytes < SPLIT_BYTES:
            return [(tuple(self.by_tensor), self.sources)]
        return [((name,), sources) for name, sources in self.by_tensor.items()]

    def waiting(self, expert: int, name: str) -> torch.Tensor:
        """Return a raw tensor of an expert, by its name in the module, where it waits in host memory."""
        source = self.sources[expert]
        assert source.image is not None, "an expert on disk waits nowhere"
        tensor = next(each for each in self.tensors if each.local == name)
        start = next(part.offset for part in source.unit.tensors if part.name == tensor.name)
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        return torch.from_numpy(source.image[start : start + nbytes]).view(tensor.dtype).view(tensor.shape)


def _only(source: Source, name: str) -> Source:
    """Return the source of one tensor of an expert, which comes while its others are in the slot already.

    So it stays marked if it shares pages with them.
    """
    unit = source.unit
    tensors = tuple(tensor for tensor in unit.stored if tensor.name == name)
    return Source(replace(unit, name=f"{unit.name} {name}", tensors=tensors), source.image)


def measured_rate(layers: Sequence[Layer], fetcher: Fetcher, pool: Pool) -> float:
    """Return how fast the experts of all ``layers`` come, bytes/s: from bringing some of them into the pool.

    A layer waits in host memory or on disk as a whole, so one of each is measured. Nobody waits for what comes, so
    neither statistics nor the timeline know of it.
    """
    by_tier: dict[bool, list[Layer]] = {}
    for layer in layers:
        by_tier.setdefault(layer.sources[0].image is None, []).append(layer)
    return mean_rate(
        [
            (sum(layer.unit.weight_bytes for layer in alike), _rate(alike[0], fetcher, pool))
            for alike in by_tier.values()
        ]
    )


def _rate(layer: Layer, fetcher: Fetcher, pool: Pool) -> float:
    count = min(pool.slots, len(layer.sources), max(MEASURED_BYTES // pool.slot_bytes, 1))
    arrivals = [Arrival(source, slot) for slot, source in enumerate(layer.sources[:count])]
    fetcher.fetch(arrivals[:1], [])  # the first one opens files
    begin = fetcher.clock()
    fetcher.fetch(arrivals, [])
    seconds = fetcher.clock() - begin
    return sum(arrival.source.unit.weight_bytes for arrival in arrivals) / max(seconds, 1e-9)
