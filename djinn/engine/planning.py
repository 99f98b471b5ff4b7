"""``plan``: what :func:`djinn.load` would do, without loading; and the steps of it that loading shares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from djinn.codec.layout import Layout
from djinn.engine.coding import Coder, coded, uncoded
from djinn.engine.plan import Plan, make_plan
from djinn.engine.reader import Reader
from djinn.engine.workspace import Workload, what_fits, workspace_bytes
from djinn.errors import ConfigError, PlanError
from djinn.hardware import usable_ram
from djinn.sizes import format_bytes, parse_bytes
from djinn.weights import checkpoint
from djinn.weights.architectures import load_architecture
from djinn.weights.index import WeightIndex, checkpoint_index, empty_model, synthetic_index
from djinn.weights.tensors import TensorEntry
from djinn.weights.units import PAGE, Unit, find_units

Coding = Literal["none", "lossless"]

RING_FLOOR_BYTES = 1_250_000_000
"""A ring of 25 ms of the fastest link outlasts whatever the host does between two tokens."""
RING_FLOOR_SHARE = 0.125
"""The most of the budget that such a ring may take: a resident byte is worth more than a byte of ring."""
HOST_SHARE = 0.8
"""Share of the host memory that is free now which streamed weights may take, if no other limit is given."""


def plan(
    model: str | Path,
    *,
    budget: int | str,
    device: str | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    coding: Coding | None = None,
) -> Plan:
    """Return the plan that :func:`djinn.load` would follow with the same arguments; loads no weights.

    What weights would come to if they were coded while they are loaded is estimated from the first MiB of each.

    Raises:
        ConfigError, CheckpointError, PlanError: as :func:`djinn.load`.
    """
    where = device_of(device)
    work = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    with tempfile.TemporaryDirectory(prefix="djinn-") as spill, estimating() as layout:
        index = index_of(model, Path(spill), dtype, 0)
        index = as_coded(index, workspace_of(index, where, work), budget, coding, layout)
        return place_here(index, where, work, budget, ring, host_memory)


@contextmanager
def estimating() -> Iterator[Callable[[TensorEntry], Layout | None]]:
    """Yield a function that estimates the layout of a tensor's code, for :func:`as_coded`."""
    reader = Reader(PAGE)
    try:
        yield Coder(reader, torch.device("cpu")).estimate
    finally:
        reader.close()


def device_of(name: str | None) -> torch.device:
    """Return the device that a user means; None is a GPU where there is one.

    Raises:
        ConfigError: neither cpu nor cuda.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: the devices are cpu and cuda")
    return torch.device(name)


def index_of(model: str | Path, spill: Path, dtype: torch.dtype, seed: int) -> WeightIndex:
    """Return the index of what a user calls a model; ``dtype`` and ``seed`` are of a synthetic one.

    Raises:
        ConfigError, CheckpointError, UnavailableError: a model that cannot be had, or is damaged.
    """
    name = str(model)
    if name.startswith("synthetic:"):
        return synthetic_index(empty_model(load_architecture(name.removeprefix("synthetic:")), dtype), seed)
    return checkpoint_index(checkpoint.resolve(name), spill)


def as_coded(
    index: WeightIndex,
    workspace_bytes: int,
    budget: int | str,
    coding: Coding | None,
    layout: Callable[[TensorEntry], Layout | None],
) -> WeightIndex:
    """Return ``index`` with its tensors coded or raw as ``coding`` says, None for as they are stored.

    A model that fits the budget is raw whatever it says. ``layout`` is as for :func:`djinn.engine.coding.coded`.

    Raises:
        ConfigError: another coding.
    """
    if coding not in ("none", "lossless", None):
        raise ConfigError(f"coding {coding!r}: it is none or lossless")
    fits = index.nbytes + workspace_bytes <= parse_bytes(budget)
    if fits or coding == "none":
        return uncoded(index)
    is_packed = any(entry.crc32 is not None for entry in index.tensors.values())
    return coded(index, layout) if coding == "lossless" or is_packed else index


def place(
    index: WeightIndex,
    device: torch.device,
    work: Workload,
    budget: int | str,
    ring: int | str | None,
    host_bytes: int,
) -> Plan:
    """Return the plan of ``index`` on a device; ``host_bytes`` is the largest arena.

    Raises:
        PlanError: a budget, ring or host memory that cannot work; says what would, the workload included.
    """
    units = find_units(index)

    def plan_for(workload: Workload) -> Plan:
        return place_units(units, device, workspace_of(index, device, workload), budget, ring, host_bytes)

    try:
        return plan_for(work)
    except PlanError as error:
        raise PlanError(f"{error}{what_fits(plan_for, work)}") from None


def place_units(
    units: Sequence[Unit],
    device: torch.device,
    workspace_bytes: int,
    budget: int | str,
    ring: int | str | None,
    host_bytes: int,
) -> Plan:
    """Return the plan of ``units`` on a device; ``host_bytes`` is the largest arena.

    Raises:
        PlanError: a budget, ring or host memory that cannot work.
    """
    budget_bytes = parse_bytes(budget)
    return make_plan(
        units,
        budget=budget_bytes,
        workspace_bytes=workspace_bytes,
        host_bytes=max(host_bytes, 0),
        ring_bytes=None if ring is None else parse_bytes(ring),
        ring_floor=min(RING_FLOOR_BYTES, round(RING_FLOOR_SHARE * budget_bytes)) if device.type == "cuda" else 0,
    )


def place_here(
    index: WeightIndex,
    device: torch.device,
    work: Workload,
    budget: int | str,
    ring: int | str | None,
    host_memory: int | str | None,
) -> Plan:
    """Return the plan of ``index`` in the host memory that is free now.

    Raises:
        PlanError: as for :func:`place`, or host memory that is not there.
    """
    return in_free_memory(
        lambda host_bytes: place(index, device, work, budget, ring, host_bytes), device, budget, host_memory
    )


def in_free_memory(
    plan_for: Callable[[int], Plan],
    device: torch.device,
    budget: int | str,
    host_memory: int | str | None,
    given_back: int = 0,
) -> Plan:
    """Return what ``plan_for`` makes of the host memory that is free now, and of what loading gives back, in bytes.

    Raises:
        PlanError: as ``plan_for``, or host memory that is not there.
    """
    free = usable_ram()
    on_device = parse_bytes(budget) if device.type == "cpu" else 0
    share = given_back + max(round(HOST_SHARE * free) - on_device, 0)
    planned = plan_for(share if host_memory is None else parse_bytes(host_memory))
    needed = planned.pinned_bytes + (planned.device_bytes if device.type == "cpu" else 0)
    if needed > free + given_back:
        raise PlanError(
            f"host memory: the plan needs {format_bytes(needed)}, but {format_bytes(free + given_back)} are free; "
            "lower host_memory or budget"
        )
    return planned


def workspace_of(index: WeightIndex, device: torch.device, work: Workload) -> int:
    """Return the device memory to keep free of weights."""
    return workspace_bytes(index.model.config, index.model.dtype, device, work)
