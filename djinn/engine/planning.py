"""``plan``: what :func:`djinn.load` would do, without loading; and the steps of it that loading shares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from djinn.codec.layout import Layout
from djinn.devices import device_of
from djinn.engine.coding import Coder, coded, uncoded
from djinn.engine.plan import Plan, make_plan
from djinn.engine.reader import Reader
from djinn.engine.workspace import CUDA_CONTEXT_BYTES, Workload, what_fits, workspace_bytes
from djinn.errors import CheckpointError, ConfigError, PlanError
from djinn.hardware import usable_ram
from djinn.sizes import format_bytes, parse_bytes
from djinn.weights import checkpoint
from djinn.weights.architectures import load_architecture
from djinn.weights.index import WeightIndex, checkpoint_index, empty_model, header_index, synthetic_index
from djinn.weights.quantised import IN_MEMORY, quantisation_of, quantised_index, require_streamable
from djinn.weights.tensors import FileSpan, Seeded, TensorEntry
from djinn.weights.units import PAGE, Unit, find_units

Coding = Literal["none", "lossless"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RING_FLOOR_BYTES = 1_250_000_000
"""A ring of 25 ms of the fastest link outlasts whatever the host does between two tokens; one of a few units more than
overlap needs keeps more disk reads under way."""
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
    dtype: torch.dtype | None = None,
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
        index = outline_of(model, Path(spill), where, dtype)
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


def index_of(model: str | Path, spill: Path, device: torch.device, dtype: torch.dtype | None, seed: int) -> WeightIndex:
    """Return the index of what a user calls a model, to run on ``device``; ``seed`` is of a synthetic one.

    Raises:
        ConfigError, CheckpointError, UnavailableError: a model that cannot be had, or is damaged.
    """
    _check_dtype(dtype)
    name = str(model)
    if name.startswith("synthetic:"):
        config = load_architecture(name.removeprefix("synthetic:"))
        return synthetic_index(empty_model(config, dtype or torch.bfloat16), seed)
    folder = checkpoint.resolve(name)
    method = quantisation_of(folder)
    if method is not None:
        require_streamable(folder, method)
    if method in IN_MEMORY:
        return quantised_index(folder, dtype, device)
    return checkpoint_index(folder, spill, dtype)


def outline_of(model: str | Path, spill: Path, device: torch.device, dtype: torch.dtype | None) -> WeightIndex:
    """Return the index of a model for planning alone: of a hub id, only headers are fetched.

    A quantised checkpoint is loaded into host memory all the same.

    Raises:
        ConfigError, CheckpointError, UnavailableError: as for :func:`index_of`.
    """
    _check_dtype(dtype)
    outline = spill / "outline"
    found = checkpoint.outline(str(model), outline)
    if not outline.is_dir():
        return index_of(found, spill, device, dtype, 0)
    method = quantisation_of(outline)
    if method is not None:
        require_streamable(Path(str(model)), method)
        raise CheckpointError(f"{model}: quantised, so that headers do not tell its plan; fetch it first: hf download")
    return header_index(outline, dtype)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (*_DTYPES, None):
        raise ConfigError(f"dtype {dtype}: it is {', '.join(map(str, _DTYPES))}, or None for the checkpoint's own")


def on_disk(index: WeightIndex) -> WeightIndex:
    """Return the index of a synthetic model as it will be once its checkpoint is written; any other as it is.

    Where in its file a tensor will be does not matter to a plan.
    """
    tensors = {
        name: replace(entry, source=FileSpan(Path(), 0)) if isinstance(entry.source, Seeded) else entry
        for name, entry in index.tensors.items()
    }
    return replace(index, tensors=tensors)


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


def planner(index: WeightIndex, device: torch.device, ring: int | str | None) -> Callable[[int, int, Workload], Plan]:
    """Return a function that plans ``index`` for a budget, a largest arena (both bytes) and a workload.

    The model's units are found once, which is what takes time; each call raises PlanError as
    :func:`djinn.engine.plan.make_plan` does.
    """
    units = find_units(index)

    def plan_for(budget: int, host_bytes: int, work: Workload) -> Plan:
        return place_units(units, device, workspace_of(index, device, work), budget, ring, host_bytes)

    return plan_for


def require_device_memory(planned: Plan, free: int, total: int) -> None:
    """Hold a plan against the memory of a GPU, bytes; ``free`` is what is free once the CUDA context is there.

    Raises:
        PlanError: it needs more.
    """
    needed = planned.device_bytes - CUDA_CONTEXT_BYTES
    if needed > free:
        raise PlanError(
            f"device memory: the plan needs {format_bytes(planned.device_bytes)}, but of the GPU's "
            f"{format_bytes(total)} only {format_bytes(free)} are free; a budget of "
            f"{free + CUDA_CONTEXT_BYTES} bytes fits, as does what other processes give back"
        )


def place_units(
    units: Sequence[Unit],
    device: torch.device,
    workspace_bytes: int,
    budget: int | str,
    ring: int | str | None,
    host_bytes: int,
) -> Plan:
    """Return the plan of ``units``; ``host_bytes`` is the largest arena.

    Raises:
        PlanError: a budget, ring or host memory that cannot work.
    """
    budget_bytes = parse_bytes(budget)
    make = partial(
        make_plan,
        units,
        budget=budget_bytes,
        workspace_bytes=workspace_bytes,
        host_bytes=max(host_bytes, 0),
        ring_bytes=None if ring is None else parse_bytes(ring),
    )
    if device.type == "cpu":
        made = make()
        if not made.disk_bytes:  # copies out of host memory cost the cores as much, however far ahead they are made
            return made
    return make(ring_floor=min(RING_FLOOR_BYTES, round(RING_FLOOR_SHARE * budget_bytes)))


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
    budget_bytes = parse_bytes(budget)
    plan_for = planner(index, device, ring)
    try:
        return plan_for(budget_bytes, host_bytes, work)
    except PlanError as error:
        would_fit = what_fits(partial(plan_for, budget_bytes, host_bytes), work)
        raise PlanError(f"{error}{would_fit}") from None


def host_bytes_of(
    device: torch.device, budget: int, host_memory: int | str | None, free: int, given_back: int = 0
) -> int:
    """Return the largest arena, bytes: what was asked for, or a share of the host memory that is free.

    What loading gives back while it fills the arena is all the arena's.
    """
    if host_memory is not None:
        return parse_bytes(host_memory)
    on_device = budget if device.type == "cpu" else 0
    return given_back + max(round(HOST_SHARE * free) - on_device, 0)


def require_host_memory(planned: Plan, device: torch.device, free: int) -> None:
    """Hold a plan against the host memory that is free, bytes.

    Raises:
        PlanError: it needs more.
    """
    needed = planned.pinned_bytes + (planned.device_bytes if device.type == "cpu" else 0)
    if needed > free:
        raise PlanError(
            f"host memory: the plan needs {format_bytes(needed)}, but {format_bytes(free)} are free; "
            "lower host_memory or budget"
        )


def place_here(
    index: WeightIndex,
    device: torch.device,
    work: Workload,
    budget: int | str,
    ring: int | str | None,
    host_memory: int | str | None,
    free: int | None = None,
) -> Plan:
    """Return the plan of ``index`` in the host memory that is ``free``, bytes; by default what is free here now.

    Raises:
        PlanError: as for :func:`place`, or host memory that is not there.
    """
    return in_free_memory(
        lambda host_bytes: place(index, device, work, budget, ring, host_bytes),
        device, budget, host_memory, free, index.in_memory_bytes,
    )  # fmt: skip


def in_free_memory(
    plan_for: Callable[[int], Plan],
    device: torch.device,
    budget: int | str,
    host_memory: int | str | None,
    free: int | None = None,
    given_back: int = 0,
) -> Plan:
    """Return what ``plan_for`` makes of a largest arena, for the memory that is ``free`` and what loading gives back.

    All in bytes; by default free is what is free here now.

    Raises:
        PlanError: as ``plan_for``, or host memory that is not there.
    """
    free = usable_ram() if free is None else free
    planned = plan_for(host_bytes_of(device, parse_bytes(budget), host_memory, free, given_back))
    require_host_memory(planned, device, free + given_back)
    return planned


def workspace_of(index: WeightIndex, device: torch.device, work: Workload) -> int:
    """Return the device memory to keep free of weights."""
    return workspace_bytes(index.model.config, index.model.dtype, device, work) + index.kept_bytes
