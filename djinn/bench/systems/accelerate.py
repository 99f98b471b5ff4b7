"""Hugging Face Accelerate: weights offloaded by its hooks, at its best settings for the place they are offloaded to.

``disk`` is transformers' ``device_map`` with "disk", which reads the original shards in place; on a GPU as many
layers as fit stay there. ``cpu`` keeps what does not fit the GPU in ordinary host memory, and ``cpu-pinned`` is the
same with those weights page-locked by hand, which Accelerate does not do itself. Several GPUs belong to one process,
which computes on one after the other.
"""

from __future__ import annotations

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn.bench.systems.base import Job, PassCounter, System
from djinn.bench.systems.common import host_model, require_ram, skeleton, weight_bytes
from djinn.errors import UnavailableError
from djinn.planning.workspace import workspace_bytes

_FRAGMENTS_BYTES = 10**9
"""Room left on a GPU for what its allocator cannot use: Accelerate allocates every offloaded weight anew."""


def check(job: Job) -> None:
    """Refuse a place that there is nothing to offload to or from.

    Raises:
        UnavailableError: says why, with numbers where memory is short.
    """
    if job.profile.gpus > 1 and not job.on_gpu:
        raise UnavailableError("accelerate holds several GPUs in one process; on a CPU there is only one device")
    if job.variant == "disk" and job.in_memory:
        raise UnavailableError("accelerate:disk reads a checkpoint, and this profile makes its weights in memory")
    if job.variant != "disk":
        if not job.on_gpu:
            raise UnavailableError(
                f"accelerate:{job.variant} offloads from a GPU to host memory; on a CPU the weights are already there"
            )
        require_ram(weight_bytes(skeleton(job)), f"accelerate:{job.variant}, which first loads the whole model,")


def load(job: Job) -> System:
    """Load the model and attach Accelerate's hooks."""
    if not job.on_gpu:
        return _counted(_from_disk(job, {"": "disk"}), {"device_map": "all on disk"})
    device_map = map_blocks(job)
    on_gpu = sum(isinstance(place, int) for place in device_map.values())
    where = "the GPU" if job.profile.gpus == 1 else f"{job.profile.gpus} GPUs"
    settings: dict[str, str | int | float | bool] = {
        "device_map": f"{on_gpu} of {len(device_map)} blocks on {where}",
        "pinned": job.variant == "cpu-pinned",
    }
    if job.variant == "disk":
        return _counted(_from_disk(job, device_map), settings)
    model = host_model(job)
    if job.variant == "cpu-pinned":
        for name, parameter in model.named_parameters():
            if place_of(name, device_map) == "cpu":
                _page_lock(parameter)
    return _counted(dispatch_model(model, device_map, main_device=0), settings)


def offloaded_bytes(model: nn.Module) -> int:
    """Return the weight bytes that Accelerate's hooks load in one pass; a tied weight counts in each module."""
    total = 0
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for inner in getattr(hook, "hooks", [hook]):
            if getattr(inner, "offload", False):
                total += sum(weight.nbytes for weight in module.parameters(recurse=inner.place_submodules))
    return total


def _counted(model: PreTrainedModel, settings: dict[str, str | int | float | bool]) -> System:
    streamed = offloaded_bytes(model)
    return PassCounter(model, resident=max(weight_bytes(model) - streamed, 0), streamed=streamed, settings=settings)


def _from_disk(job: Job, device_map: dict[str, str | int]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=job.dtype,
        device_map=device_map,
        offload_folder=str(job.scratch / "offload"),
        trust_remote_code=False,
    )


def map_blocks(job: Job) -> dict[str, str | int]:
    """Return Accelerate's own placement of blocks for the budget less workspace and fragments.

    Accelerate itself leaves room for the largest offloaded block.
    """
    model = skeleton(job)
    workspace = workspace_bytes(model.config, job.dtype, torch.device("cuda"), job.profile.work)
    room = max(job.profile.budget - workspace - _FRAGMENTS_BYTES, 0)
    places: dict[int | str, int | str] = dict.fromkeys(range(job.profile.gpus), room)
    places["cpu"] = 0 if job.variant == "disk" else 2 * weight_bytes(model)
    if job.variant == "disk":
        places["disk"] = 2 * weight_bytes(model)
    return infer_auto_device_map(model, places, no_split_module_classes=list(model._no_split_modules or []))


def place_of(name: str, device_map: dict[str, str | int]) -> str | int:
    """Return where the longest prefix of ``name`` in the map says that it goes."""
    prefixes = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
    return device_map[max(prefixes, key=len)]


def _page_lock(parameter: nn.Parameter) -> None:
    """Page-lock a weight where it lies; ``pin_memory`` would copy it into a block of a power of two."""
    error = torch.cuda.cudart().cudaHostRegister(parameter.data_ptr(), parameter.nbytes, 0)
    if int(error) != 0:
        raise UnavailableError(f"memory: cannot page-lock {parameter.nbytes} bytes: {error}")
