"""One layer of routed experts: where each one waits, what their module's tensors are, and where these are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from djinn.engine.expert_tensors import ExpertTensor
from djinn.engine.whereabouts import Whereabouts
from djinn.transport.copier import Source
from djinn.transport.reader import Buffer
from djinn.weights.units import Unit


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


def _only(source: Source, name: str) -> Source:
    """Return the source of one tensor of an expert."""
    unit = source.unit
    tensors = tuple(tensor for tensor in unit.tensors if tensor.name == name)
    return Source(replace(unit, name=f"{unit.name} {name}", tensors=tensors), source.image)
