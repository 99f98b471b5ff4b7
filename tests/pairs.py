"""One checkpoint twice: streamed with most of its weights out of the budget, and resident."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn

STREAMED_SHARE = 0.6
"""Share of the model that the budget leaves no room for."""


@dataclass(frozen=True)
class Pair:
    """The same weights behind two models."""

    streamed: PreTrainedModel
    resident: PreTrainedModel

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.streamed, self.resident))


def streamed(folder: Path, device: str = "cpu", **options: object) -> PreTrainedModel:
    """Return the checkpoint streamed from disk."""
    work = {"prompt_tokens": 16, "new_tokens": 16, "batch": 4, "device": device}
    whole = djinn.plan(folder, budget="2 GB", **work)  # type: ignore[arg-type]
    images = sum(unit.image_bytes for unit in whole.units)
    budget = whole.workspace_bytes + round((1 - STREAMED_SHARE) * images)
    arguments = {"budget": budget, "host_memory": "1 B", "chunk": "32 KiB", **work}
    return djinn.load(folder, **arguments | options)  # type: ignore[arg-type]


def resident(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Return the checkpoint loaded whole."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)


def pair(folder: Path, device: str = "cpu", **options: object) -> Pair:
    """Return both; ``options`` are those of ``djinn.load``."""
    return Pair(streamed(folder, device, **options), resident(folder, device))


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    """Return random token ids, int64 of [batch, length], the same for the same shape."""
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


def equal(found: object, wanted: object) -> bool:
    """Whether two results are equal in all their tensors, however deep they lie."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(map(equal, found.values(), wanted.values()))
        )
    if isinstance(wanted, tuple | list):
        return isinstance(found, tuple | list) and len(found) == len(wanted) and all(map(equal, found, wanted))
    return found == wanted
