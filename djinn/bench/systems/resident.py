"""The reference: the whole model on the device, nothing streamed, and so not held to the budget.

On a CPU that is ``from_pretrained`` copied into anonymous memory, because a model that is only mapped would be read
from the disk again whenever the page cache gives it up.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from djinn.bench.systems.base import Job, System
from djinn.bench.systems.common import host_model, require_ram, skeleton, weight_bytes
from djinn.errors import UnavailableError
from djinn.sizes import format_bytes


class Resident(System):
    """See the module's text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.resident_bytes = weight_bytes(model)
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
    require_ram(needed, "the whole model in host memory")
    if job.on_gpu:
        free, _ = torch.cuda.mem_get_info()
        if needed * 11 // 10 > free:
            raise UnavailableError(
                f"device memory: the whole model needs {format_bytes(needed * 11 // 10)}, {format_bytes(free)} are free"
            )


def load(job: Job) -> Resident:
    """Load the model onto the device."""
    model = host_model(job)
    return Resident(model.to("cuda") if job.on_gpu else model)  # type: ignore[arg-type]
