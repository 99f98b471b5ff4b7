"""The reference: the whole model on the device, nothing streamed, and so not held to the budget.

On several GPUs transformers splits it over them as it does for djinn: sums over ranks are in the same order.

On a CPU that is ``from_pretrained`` copied into anonymous memory, because a model that is only mapped would be read
from the disk again whenever the page cache gives it up.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn.bench.systems.base import Job, System
from djinn.bench.systems.common import host_model, require_ram, skeleton, synthetic_weight, weight_bytes
from djinn.engine.sharding import filled, like
from djinn.errors import UnavailableError
from djinn.gpus import own_gpu
from djinn.sizes import format_bytes
from djinn.weights.models import held_here


class Resident(System):
    """See the module's text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.resident_bytes = sum(held_here(parameter).nbytes for parameter in model.parameters())
        self.settings = {"held_to_budget": False}

    def link_bytes(self) -> int:
        """Nothing is streamed."""
        return 0


def check(job: Job) -> None:
    """Refuse where the model does not fit host memory, or on a GPU device memory.

    Raises:
        UnavailableError: with what it needs and what there is.
    """
    needed = weight_bytes(skeleton(job))
    if job.profile.gpus == 1 or not job.on_gpu:
        require_ram(needed, "the whole model in host memory")
    if job.on_gpu:
        needed = needed // job.profile.gpus
        free, _ = torch.cuda.mem_get_info(own_gpu())
        if needed * 11 // 10 > free:
            what = "the whole model" if job.profile.gpus == 1 else "this rank of the whole model"
            raise UnavailableError(
                f"device memory: {what} needs {format_bytes(needed * 11 // 10)}, {format_bytes(free)} are free"
            )


def load(job: Job) -> Resident:
    """Load the model onto the device, or onto those of all ranks."""
    if job.distributed_config is not None:
        return Resident(_split(job))
    model = host_model(job)
    return Resident(model.to("cuda") if job.on_gpu else model)  # type: ignore[arg-type]


def _split(job: Job) -> PreTrainedModel:
    """Return the model as transformers' own tensor parallelism holds it."""
    config = job.distributed_config
    if job.in_memory:

        def weight_of(name: str, parameter: nn.Parameter) -> torch.Tensor:
            return synthetic_weight(name, parameter.shape, parameter.dtype, job.profile.seed)

        assert config is not None
        return filled(skeleton(job), config, torch.device("cuda", own_gpu()), weight_of).eval()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=job.dtype, distributed_config=config, trust_remote_code=False
    )
    for parameter in [] if job.on_gpu else list(model.parameters()):  # whole rows are still the mapped files'
        held = held_here(parameter.data).clone()
        if isinstance(parameter, DTensor):
            held = like(parameter, held)
        torch.utils.swap_tensors(parameter, nn.Parameter(held, requires_grad=False))
    return model.eval()
