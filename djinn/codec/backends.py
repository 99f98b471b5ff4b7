"""Which code runs on which device. A backend is a module with `survey`, `write`, `decoder` and `batch_decoder`."""

from __future__ import annotations

from types import ModuleType

import torch

from djinn.codec import cpu
from djinn.errors import UnavailableError


def backend(device: torch.device) -> ModuleType:
    """Return the backend of ``device``.

    Raises:
        UnavailableError: Triton is not installed and ``device`` is a GPU.
    """
    if device.type == "cpu":
        return cpu
    try:
        from djinn.codec import gpu
    except ImportError as error:
        raise UnavailableError(
            f"coded weights on {device} need Triton ({error}); install it, or leave them raw"
        ) from error
    return gpu
