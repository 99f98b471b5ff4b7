"""Profiles: what one reproduction runs, read from ``artifact/configs/*.yaml`` into a frozen, validated object."""

from __future__ import annotations

import difflib
import functools
import hashlib
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from djinn.errors import ConfigError
from djinn.names import plain_name
from djinn.places import CONFIG_DIR
from djinn.reading import read_yaml
from djinn.sizes import Bytes, format_bytes

if TYPE_CHECKING:
    from djinn.planning.request import Request
    from djinn.planning.workspace import Workload

SYSTEM_VARIANTS: dict[str, tuple[str, ...]] = {
    "djinn": ("", "lossless", "whole", "host", "lossless+host"),
    "accelerate": ("disk", "cpu", "cpu-pinned"),
    "deepspeed": ("cpu", "nvme"),
    "resident": (),
}
"""The systems that can be compared, each with the places it can offload to, and djinn as the profile says, with its
weights coded, without routing experts, or with the host's cores computing; written ``system:variant``."""
CODED = ("djinn:lossless", "djinn:lossless+host")
HOST_COMPUTE = ("djinn:host", "djinn:lossless+host")
"""Systems of which the host's cores compute a part of the tokens' passes: their outputs are close to the resident
model's and not equal to them, so no claim of equal tokens is about these."""
_ONE_PROCESS = ("accelerate",)
"""Systems that hold several GPUs in one process; the others start one for each."""


def system_names() -> list[str]:
    """Return every ``system`` or ``system:variant`` that a profile may list."""
    return [
        f"{system}:{variant}" if variant else system
        for system, variants in SYSTEM_VARIANTS.items()
        for variant in variants or ("",)
    ]


def _known_system(name: str) -> str:
    if name not in system_names():
        raise ValueError(f"no system {name!r}; the systems are {', '.join(system_names())}")
    return name


SystemName = Annotated[str, AfterValidator(_known_system)]


_Many = Annotated[int, Field(ge=1, le=10**6)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Brief(_Frozen):
    """Systems that are so slow that they run fewer times, and shorter, than the others."""

    systems: tuple[SystemName, ...] = Field(min_length=1)
    runs: _Many
    new_tokens: _Many


class DeepSpeedLimits(_Frozen):
    """ZeRO-3's limits in elements, under DeepSpeed's own names, in place of those that djinn would choose for it.

    https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training says what each does.
    """

    stage3_prefetch_bucket_size: int | None = Field(default=None, ge=0, le=10**13)
    stage3_max_live_parameters: int | None = Field(default=None, ge=0, le=10**13)
    stage3_param_persistence_threshold: int | None = Field(default=None, ge=0, le=10**13)
    stage3_model_persistence_threshold: int | None = Field(default=None, ge=0, le=10**13)


class Sweep(_Frozen):
    """Points of notebook 03: sizes, batches and prompts, one changed at a time, and coded weights."""

    chunks: tuple[Bytes, ...] = ()
    rings: tuple[Bytes, ...] = ()
    # Left out of the dump where there are none: the digests in records are older than this field.
    budgets: tuple[Bytes, ...] = Field(default=(), exclude_if=operator.not_)
    """Device budgets, over which a mixture's hit rate and speed are drawn."""
    batches: tuple[_Many, ...] = Field(default=(), exclude_if=operator.not_)
    """Sequences at once, over which tokens per second are drawn."""
    prompts: tuple[_Many, ...] = Field(default=(), exclude_if=operator.not_)
    """Lengths of the prompt in tokens, over which the time to the first token is drawn."""
    systems: tuple[SystemName, ...] = Field(default=(), exclude_if=operator.not_)
    """The systems that are measured over batches and prompts; djinn alone by default."""
    runs: int = Field(default=3, ge=1, le=10**6)
    new_tokens: int = Field(default=2, ge=1, le=10**6)
    coded: bool = False
    """Whether there is one point more, with losslessly coded weights."""


class Profile(_Frozen):
    """One reproduction, complete: model, memory, workload, systems, sweep. Sizes are bytes."""

    name: str
    title: str
    model: str
    """A local checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``."""
    weights: Literal["disk", "memory"] = "disk"
    """Where a synthetic model is made: a real safetensors checkpoint on disk, or straight in host memory."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Literal["cpu", "cuda"]
    # Left out of the dump where there is one, as Sweep.budgets is.
    gpus: int = Field(default=1, ge=1, le=64, exclude_if=functools.partial(operator.eq, 1))
    """GPUs that hold the model together, each over its own link. On a CPU they are processes, to rehearse with."""
    budget: Bytes
    """The most memory of each GPU that may be used: residents, ring, KV cache, activations, scratch."""
    ring: Bytes | None = None
    """Device ring; by default the plan chooses the smallest that still overlaps."""
    host_memory: Bytes
    """The most page-locked host memory for streamed weights; what does not fit stays on disk."""
    chunk: Bytes
    coding: Literal["none", "lossless"] = "none"
    """Whether djinn codes bfloat16 weights without loss while it loads them, and decodes them on the device."""
    prompt_tokens: int = Field(ge=1, le=10**6)
    new_tokens: int = Field(ge=1, le=10**6)
    batch: int = Field(default=1, ge=1, le=10**6)
    runs: int = Field(ge=1, le=10**6)
    warmups: int = Field(default=0, ge=0, le=10**6)
    systems: tuple[SystemName, ...] = Field(min_length=1)
    # Left out of the dump where there are none, as Sweep.budgets are.
    brief: Brief | None = Field(default=None, exclude_if=operator.not_)
    deepspeed: DeepSpeedLimits | None = Field(default=None, exclude_if=operator.not_)
    interleave: bool = True
    """Keep every system loaded and take turns run by run, so that a drifting machine drifts for all alike."""
    sweep: Sweep = Sweep()
    disable_kv_swap: bool = True
    """True keeps the KV cache on the device; False uses transformers' offloaded cache (CUDA only)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    timeout_s: float = Field(default=1800, gt=0, le=10**9)
    """Longest that one system may take for loading, or for one run, before it is recorded as a time-out."""
    minutes: float = Field(gt=0, le=10**6)
    """Estimate for all four notebooks on the machine that the profile is meant for."""
    min_ram: Bytes
    """Host memory the profile needs in all."""
    min_disk: Bytes
    """Free disk the profile needs."""
    min_device: Bytes | None = None
    """Device memory the profile needs, as the driver reports it; None where the device is a budget of host memory."""

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str) -> str:
        try:
            return plain_name(name)  # it becomes the run directory's
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("model")
    @classmethod
    def _one_model(cls, model: str) -> str:
        if not model or any(character < " " for character in model):
            raise ValueError(f"{model!r} is no model; it is a folder, org/name@revision or synthetic:<name>")
        return model

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.brief is not None and (others := set(self.brief.systems) - set(self.systems)):
            raise ValueError(f"brief: {min(others)} is none of the profile's systems")
        smallest = min([self.budget, *self.sweep.budgets])
        if self.ring is not None and self.ring > smallest:
            which = "budget" if smallest == self.budget else "sweep's budget"
            raise ValueError(
                f"ring {format_bytes(self.ring)} is larger than the {which} {format_bytes(smallest)} it must fit in"
            )
        if not self.disable_kv_swap and self.device != "cuda":
            raise ValueError("disable_kv_swap: false needs device: cuda (transformers' offloaded cache is CUDA-only)")
        if self.weights == "memory" and not self.synthetic:
            raise ValueError("weights: memory is for synthetic models; a checkpoint is read from disk")
        if self.weights == "memory" and self.device == "cpu":
            raise ValueError("weights: memory needs device: cuda; on a CPU the link is the disk that weights come from")
        return self

    @property
    def synthetic(self) -> bool:
        """Whether the weights are seeded random numbers instead of a trained model."""
        return self.model.startswith("synthetic:")

    def of(self, system: str) -> Profile:
        """Return what ``system`` is asked for: this profile, but for coded weights, and for what :attr:`brief` says."""
        changes: dict[str, Any] = {"coding": "lossless"} if system in CODED else {}
        if self.brief is not None and system in self.brief.systems:
            changes |= {"runs": min(self.runs, self.brief.runs), "new_tokens": self.brief.new_tokens}
        return self.override(**changes) if changes else self

    def tuning(self, system: str) -> tuple[tuple[str, int], ...]:
        """Return the settings of a system's own that the profile names."""
        limits = self.deepspeed if system.partition(":")[0] == "deepspeed" else None
        return () if limits is None else tuple(limits.model_dump(exclude_none=True).items())

    def processes(self, system: str) -> int:
        """Return how many processes hold ``system``: one for each GPU, or one for all."""
        return 1 if system in _ONE_PROCESS else self.gpus

    @property
    def digest(self) -> str:
        """Short SHA-256 of every field: two records with the same digest were asked for the same thing."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def work(self) -> Workload:
        """The generation that is measured."""
        from djinn.planning.workspace import Workload  # imports torch, which takes seconds; a list of profiles does not

        return Workload(prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, batch=self.batch)

    def request(self) -> Request:
        """Return what the profile asks of djinn."""
        import torch

        from djinn.planning.request import Request

        return Request.of(
            budget=self.budget,
            keep=self.work,
            device=self.device,
            ring=self.ring,
            host_memory=self.host_memory,
            chunk=self.chunk,
            dtype=getattr(torch, self.dtype),
            coding=self.coding,
        )

    def override(self, **changes: Any) -> Profile:
        """Return a validated copy with ``changes`` applied; sizes are strings with units.

        Raises:
            ConfigError: an unknown field or an impossible value, named.
        """
        return _validated(self.model_dump(mode="json") | changes, f"profile {self.name}")


def profile_names() -> list[str]:
    """Return the names of the profiles in ``artifact/configs``."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """Read a profile by name, or from a path that ends in ``.yaml``.

    Raises:
        ConfigError: no such profile, not a mapping, an unknown key or an impossible value; each is named.
    """
    names = profile_names()
    path = Path(name) if str(name).endswith(".yaml") else CONFIG_DIR / f"{name}.yaml"
    if not (path.is_file() if path == Path(name) else name in names):
        raise ConfigError(f"no profile {str(name)!r}; the profiles are {', '.join(names)}")
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(document).__name__}")
    return _validated({"name": path.stem, **document}, str(path))


_PARTS: dict[str, type[_Frozen]] = {"sweep": Sweep, "brief": Brief, "deepspeed": DeepSpeedLimits}


def _validated(document: dict[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "profile"
            if problem["type"] == "extra_forbidden":
                fields = _PARTS.get(key.partition(".")[0], Profile).model_fields if "." in key else Profile.model_fields
                near = difflib.get_close_matches(str(problem["loc"][-1]), fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(fields)}"
                problems.append(f"unknown key {key}{hint}")
            else:
                problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None
