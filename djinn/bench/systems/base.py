"""The one interface behind which every compared system stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from djinn.gpus import own_gpu, ranks_started
from djinn.profiles import Profile
from djinn.transport.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a system is asked to load. ``model`` is a checkpoint folder, or ``synthetic:<name>`` made in memory."""

    profile: Profile
    variant: str
    model: str
    scratch: Path
    """A folder of this job's own, removed after it: a baseline's second copy of the weights goes here."""
    trace: bool = False
    """Whether the copy engine's timeline is wanted; on a GPU its events cost host time in every visit."""
    tuning: dict[str, int | bool] = field(default_factory=dict)
    """Settings of the system's own that replace those it would choose: a point of a grid."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return getattr(torch, self.profile.dtype)

    @property
    def in_memory(self) -> bool:
        """Whether the weights are made in host memory instead of read from files."""
        return self.profile.weights == "memory"

    @property
    def own_gpus(self) -> Sequence[int]:
        """The GPUs of this process, as torch counts them: a rank's own, or all where one process holds the model."""
        return [own_gpu()] if ranks_started() > 1 else range(self.profile.gpus)

    @property
    def distributed_config(self) -> DistributedConfig | None:
        """How transformers splits the model over the processes that hold it; None where there is one."""
        return DistributedConfig(tp_plan="auto") if self.profile.gpus > 1 else None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; otherwise it is a budget of host memory."""
        return self.profile.device == "cuda"


class System(ABC):
    """A loaded model and what is needed to measure it. One process holds one system."""

    model: PreTrainedModel
    resident_bytes: int
    """Weights that stay on the device."""
    ring_bytes: int = 0
    host_bytes: int = 0
    """Weights that it keeps in host memory, apart from the device."""
    settings: dict[str, str | int | float | bool]
    """What it was set to, as a record keeps it."""

    @abstractmethod
    def link_bytes(self) -> int:
        """Return the weight bytes that have crossed the link since loading."""

    def cool(self) -> None:  # noqa: B027 (optional)
        """Make the next pass start cold. Most systems prefetch nothing across passes, so there is nothing to do."""

    def begin(self) -> None:
        """Begin a run, cold."""
        self.cool()

    def stall_s(self) -> float | None:
        """Return the seconds since loading in which compute waited for weights; None where nobody knows."""
        return None

    def bare_gbps(self) -> float | None:
        """Return the rate at which its weights cross the link while nothing computes, 10^9 bytes/s; None if unknown.

        It is called while the system is cold.
        """
        return None

    def experts(self) -> dict[str, float]:
        """Return what a record says of experts, counted since loading; nothing where none are fetched as picked."""
        return {}

    def timeline(self) -> list[Interval]:
        """Return what the copy engine did since :meth:`begin`, if the system keeps account of it."""
        return []

    def close(self) -> None:  # noqa: B027 (optional)
        """Release what the end of the process does not: by default nothing."""


class PassCounter(System):
    """A system that moves the same weights across the link in every pass, and keeps no count itself."""

    def __init__(
        self, model: PreTrainedModel, *, resident: int, streamed: int, settings: dict[str, str | int | float | bool]
    ) -> None:
        self.model = model
        self.resident_bytes = resident
        self.settings = settings
        self._streamed_bytes = streamed
        self._passes = 0
        model.register_forward_hook(self._count)

    def link_bytes(self) -> int:
        """Return streamed bytes × passes."""
        return self._streamed_bytes * self._passes

    def _count(self, *_: object) -> None:
        self._passes += 1


class Loader(Protocol):
    """A module of ``djinn.bench.systems``."""

    def check(self, job: Job) -> None:
        """Import and build what the system needs, so that ``load`` takes no time for it.

        Raises:
            UnavailableError: this machine cannot run the job; says what is missing, with numbers.
        """
        ...

    def load(self, job: Job) -> System:
        """Load the model, ready to generate."""
        ...
