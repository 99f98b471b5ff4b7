"""What a user calls a device: the name, and whether this machine has it."""

from __future__ import annotations

import torch

from djinn.errors import ConfigError, UnavailableError


def device_of(name: str | None) -> torch.device:
    """Return the device that a user means, which need not be here; None is a GPU where there is one.

    Raises:
        ConfigError: neither cpu nor cuda, or cuda with an index that is no number.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ConfigError(f"device {name!r}: the devices are cpu and cuda")
    return torch.device(name)


def device_here(name: str | None) -> torch.device:
    """Return the device that a user means, which has to be here.

    Raises:
        ConfigError: as :func:`device_of`.
        UnavailableError: this machine has no such device.
    """
    device = device_of(name)
    require_here(device)
    return device


def require_here(device: torch.device) -> None:
    """Hold a device against those that this machine has.

    Raises:
        UnavailableError: this machine has no such device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device cuda: this machine has no CUDA device that torch can use; device='cpu' works")


def free_device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that this process can still allocate, and those that it has in all."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
