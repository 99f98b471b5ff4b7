"""The GPUs of this machine and their link, as the driver's management library and torch know them.

What cannot be found out is None; a missing driver or package is never an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from djinn.sizes import Count

_LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""10^9 bytes/s of one PCIe lane by generation, after line coding (PCI-SIG)."""


class Gpu(BaseModel):
    """One GPU, in torch's order where torch sees GPUs. The link's generation may read low while it is idle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    memory_bytes: Count
    compute_capability: str | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    numa_node: int | None = None

    @property
    def pcie_gbps(self) -> float | None:
        """Raw rate of its slot, 10^9 bytes/s; None where that cannot be found out."""
        return _LANE_GBPS.get(self.pcie_generation_max or 0, 0.0) * (self.pcie_width_max or 0) or None


def numa_node_of(gpu_index: int) -> int | None:
    """Return the NUMA node that the GPU hangs on; None where there is no such GPU or the kernel does not say."""
    found = gpus()
    return found[gpu_index].numa_node if gpu_index < len(found) else None


def own_gpu() -> int:
    """Return the number of this process's own GPU, as torch counts: a rank's is that of the rank on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_rank() -> int:
    """Return this process's number among those that torchrun, or whoever else, has started together; 0 if alone."""
    return int(os.environ.get("RANK", "0"))


def ranks_started() -> int:
    """Return how many processes were started together, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpu_used_bytes(gpu_index: int = 0) -> int | None:
    """Return the memory in use on a GPU, whoever uses it; None without NVML. Makes no CUDA context."""
    with nvml() as library:
        handle = library and nvml_handle(library, gpu_index)
        memory = handle and library and asked(library.nvmlDeviceGetMemoryInfo, handle)
        return memory.used if memory else None


@contextmanager
def nvml() -> Iterator[Any | None]:
    """Yield NVIDIA's management library (the module ``pynvml``), started; None without it or without its driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the package, the driver's library or the driver itself is missing: all mean "no NVIDIA GPU"
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def nvml_handle(library: Any, index: int) -> Any | None:
    """Return NVML's handle of the GPU that torch calls ``index``, None where there is no such GPU.

    NVML and torch may number GPUs differently.
    """
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            return None
        uuid = torch.cuda.get_device_properties(index).uuid  # NVML writes it with a prefix that torch leaves out
        return asked(library.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    return asked(library.nvmlDeviceGetHandleByIndex, index)


def gpus() -> tuple[Gpu, ...]:
    """Return every GPU here."""
    with nvml() as library:
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
        else:
            count = (library and asked(library.nvmlDeviceGetCount)) or 0
        return tuple(_gpu(library, index) for index in range(count))


def _gpu(library: Any | None, index: int) -> Gpu:
    facts: dict[str, Any] = {"index": index}
    handle = library and nvml_handle(library, index)
    if library and handle:
        memory = asked(library.nvmlDeviceGetMemoryInfo, handle)
        capability = asked(library.nvmlDeviceGetCudaComputeCapability, handle)
        pci = asked(library.nvmlDeviceGetPciInfo, handle)
        facts |= {
            "name": asked(library.nvmlDeviceGetName, handle) or "unknown",
            "memory_bytes": memory.total if memory else 0,
            "compute_capability": ".".join(map(str, capability)) if capability else None,
            "pcie_generation": asked(library.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            "pcie_generation_max": asked(library.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            "pcie_width": asked(library.nvmlDeviceGetCurrPcieLinkWidth, handle),
            "pcie_width_max": asked(library.nvmlDeviceGetMaxPcieLinkWidth, handle),
            "numa_node": _pci_numa_node(pci.busId) if pci else None,
        }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        # What torch can allocate is the smaller, and the one that a budget has to fit in.
        facts |= {"name": properties.name, "memory_bytes": properties.total_memory}
        facts |= {"compute_capability": f"{properties.major}.{properties.minor}"}
    return Gpu(**{"name": "unknown", "memory_bytes": 0, **facts})


def asked(question: Callable[..., Any], *arguments: Any) -> Any | None:
    """Ask NVML; None where this GPU or driver has no answer (virtual machines answer few questions)."""
    try:
        return question(*arguments)
    except Exception:  # NVMLError has one subclass per code, and an old driver lacks whole functions
        return None


def _pci_numa_node(bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    # NVML writes an eight-digit domain in capitals; sysfs has four digits in small letters.
    try:
        node = int((devices / bus_id.lower()[-12:] / "numa_node").read_text())
    except OSError:
        return None
    return node if node >= 0 else None
