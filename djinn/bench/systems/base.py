"""The one interface behind which every compared system stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from djinn.config import Profile


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a system is asked to load. ``model`` is a checkpoint folder, or ``synthetic:<name>`` made in memory."""

    profile: Profile
    variant: str
    model: str
    scratch: Path
    """A folder of this job's own, removed after it: a baseline's second copy of the weights goes here."""


class System(Protocol):
    """A loaded model and what is needed to measure it. One process holds one system."""

    model: PreTrainedModel
    resident_bytes: int
    """Weights that stay on the device."""
    ring_bytes: int
    settings: dict[str, str | int | float | bool]

    def link_bytes(self) -> int:
        """Return the weight bytes that have crossed the link since loading."""
        ...

    def cool(self) -> None:
        """Make the next pass start cold: nothing prefetched on the device."""
        ...

    def close(self) -> None:
        """Release device and host memory, and files in the job's scratch folder."""
        ...
