"""What certification found, and what a check of it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from djinn.bench.certify.proof import Proof
from djinn.bench.rates.disk import DiskRate
from djinn.bench.rates.link import LinkRate
from djinn.bench.rates.several import LinksTogether
from djinn.gpus import Gpu
from djinn.hardware import Machine
from djinn.planning.placement import Plan
from djinn.profiles import Profile

Verdict = Literal["pass", "warn", "fail"]


class Check(BaseModel):
    """One requirement, as people read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    measured: str
    needed: str
    verdict: Verdict
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of the supported set: installed version or None, allowed range, and whether djinn runs without it."""

    name: str
    version: str | None
    allowed: str
    fits: bool
    optional: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that :func:`djinn.bench.certify.checks.check_all` looks at.

    Sizes are bytes; a reason is empty where the measurement succeeded.
    """

    profile: Profile
    machine: Machine
    usable_ram: int
    allowed_cpus: frozenset[int]
    """Processors this process may use; empty where the system does not say."""
    gpu_cpus: frozenset[int]
    """Processors of the GPU's NUMA node; empty where unknown."""
    checkpoint_bytes: int
    """What the profile's checkpoint already takes of the disk space it needs."""
    link: Sequence[LinkRate]
    link_reason: str
    disk: Sequence[DiskRate]
    disk_reason: str
    links: Sequence[LinksTogether] = ()
    links_reason: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By what else predictions are made from, why it was not measured; empty where it was."""
    plan: Plan | None
    plan_reason: str
    tools: dict[str, bool]
    """Whether each tool that DeepSpeed builds its extensions with was found."""
    packages: Sequence[Package]
    proof: Proof | None
    proof_reason: str
    cpu_profiles: Sequence[str]
    """Profiles that need no GPU, to be named where there is none."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that the profile uses, where it asks for one and there is one."""
        usable = self.profile.device == "cuda" and self.machine.torch_sees_gpu
        return self.machine.gpus[0] if usable else None


def verdict_of(name: str, measured: str, needed: str, verdict: Verdict, remedy: str) -> Check:
    """Return a check; its remedy is dropped where there is nothing to mend."""
    return Check(
        name=name, measured=measured, needed=needed, verdict=verdict, remedy="" if verdict == "pass" else remedy
    )
