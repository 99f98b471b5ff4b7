"""Hold a plan against the memory that there is. Pure."""

from __future__ import annotations

import torch

from djinn.errors import PlanError
from djinn.planning.placement import Plan
from djinn.planning.workspace import CUDA_CONTEXT_BYTES
from djinn.sizes import format_bytes


def require_host_memory(planned: Plan, device: torch.device, free: int, staging_bytes: int) -> None:
    """Hold a plan against the host memory that is free, bytes; a stream from disk to a GPU takes ``staging_bytes``.

    Raises:
        PlanError: it needs more.
    """
    beside = planned.device_bytes if device.type == "cpu" else planned.disk_streams * staging_bytes
    needed = planned.pinned_bytes + beside
    if needed > free:
        raise PlanError(
            f"host memory: the plan needs {format_bytes(needed)}, but {format_bytes(free)} are free; "
            "lower host_memory or budget"
        )


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
