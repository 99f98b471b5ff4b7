"""What a user calls a device: the name, and whether this machine has it."""

from __future__ import annotations

import torch

from djinn.errors import UnavailableError
from djinn.hardware import local_cpus
from djinn.names import device_name


def device_of(name: str | None) -> torch.device:
    """Return the device that a user means, which need not be here; None is a GPU where there is one.

    Raises:
        ConfigError: neither cpu nor cuda, nor cuda with the number of a GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device_name(name))


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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {device}: the last GPU of this machine is cuda:{torch.cuda.device_count() - 1}")


def free_device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that this process can still allocate, and those that it has in all."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def gpu_index(device: torch.device) -> int:
    """Return the number of a GPU; without one in its name it is the current one's."""
    return device.index if device.index is not None else torch.cuda.current_device()


def cpus_near(device: torch.device) -> set[int] | None:
    """Return the processors of the NUMA node that a GPU hangs on; None for a CPU, and where it is not known."""
    return local_cpus(device.index or 0) if device.type == "cuda" else None
