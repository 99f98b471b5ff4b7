"""What the machine is: processor, memory and its limits, NUMA nodes, GPUs and their link, software, disk.

Nothing here names the machine or its user: no host name, no path, no serial number. What cannot be found out
is None; a missing driver, package or ``/proc`` is never an error.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict

_NODES = Path("/sys/devices/system/node")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CAP_IPC_LOCK = 14  # linux/capability.h
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets that decide how fast bf16 is computed on the host."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumaNode(_Frozen):
    """One NUMA node: its index, its processors as the kernel lists them ("0-7,16-23"), its memory in bytes."""

    index: int
    cpus: str
    memory_bytes: int


class Gpu(_Frozen):
    """One GPU, in torch's order where torch sees GPUs. The link's generation may read low while it is idle."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: str | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    numa_node: int | None = None


class Machine(_Frozen):
    """A description of this machine at one moment. Sizes are bytes; None means unknown, or no limit for a limit."""

    os: str
    kernel: str
    cpu: str | None
    cpu_features: tuple[str, ...]
    cores: int | None
    """Physical cores."""
    threads: int | None
    """Logical cores."""
    ram_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    memlock_bytes: int | None
    memlock_exempt: bool
    """Whether this process may lock memory past the limit (CAP_IPC_LOCK)."""
    numa_nodes: tuple[NumaNode, ...]
    gpus: tuple[Gpu, ...]
    driver: str | None
    driver_cuda: str | None
    """The newest CUDA that the driver runs."""
    torch_cuda: str | None
    """The CUDA that torch was built for."""
    rocm: str | None
    python: str
    torch: str | None
    transformers: str | None
    accelerate: str | None
    deepspeed: str | None
    disk_free_bytes: int

    @property
    def ram_limit_bytes(self) -> int:
        """The most memory a process can ever have here: the RAM, or less where a cgroup says so."""
        return min(self.ram_bytes, self.cgroup_limit_bytes or self.ram_bytes)

    @property
    def torch_sees_gpu(self) -> bool:
        """Whether there is a GPU and torch was built for it."""
        return bool(self.gpus) and (self.torch_cuda is not None or self.rocm is not None)


def describe(folder: Path = Path()) -> Machine:
    """Return what this machine is; ``folder`` says which disk's free space is meant."""
    memory = psutil.virtual_memory()
    limit, _ = _cgroup_memory()
    with nvml() as library:
        driver = library and _asked(library.nvmlSystemGetDriverVersion)
        cuda = library and _asked(library.nvmlSystemGetCudaDriverVersion)
    model, features = _processor()
    return Machine(
        os=_os_name(),
        kernel=platform.release(),
        cpu=model,
        cpu_features=features,
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(logical=True),
        ram_bytes=memory.total,
        available_bytes=memory.available,
        cgroup_limit_bytes=limit if limit is not None and limit < memory.total else None,
        memlock_bytes=_memlock(),
        memlock_exempt=_may_lock_memory(),
        numa_nodes=_numa_nodes(),
        gpus=_gpus(),
        driver=driver,
        driver_cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        torch_cuda=torch.version.cuda,
        rocm=torch.version.hip,
        python=platform.python_version(),
        torch=installed("torch"),
        transformers=installed("transformers"),
        accelerate=installed("accelerate"),
        deepspeed=installed("deepspeed"),
        disk_free_bytes=free_disk(folder),
    )


def free_disk(path: Path) -> int:
    """Return the free bytes of the disk that holds ``path``, or will hold it once it is made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def usable_ram() -> int:
    """Return the bytes a process can still take: what is available, or less where a cgroup leaves less."""
    _, headroom = _cgroup_memory()
    available = psutil.virtual_memory().available
    return available if headroom is None else min(available, headroom)


def numa_node_of(gpu_index: int) -> int | None:
    """Return the NUMA node that the GPU hangs on; None where there is no such GPU or the kernel does not say."""
    gpus = _gpus()
    return gpus[gpu_index].numa_node if gpu_index < len(gpus) else None


def gpu_used_bytes(gpu_index: int = 0) -> int | None:
    """Return the memory in use on a GPU, whoever uses it; None without NVML. Makes no CUDA context."""
    with nvml() as library:
        handle = library and nvml_handle(library, gpu_index)
        memory = handle and library and _asked(library.nvmlDeviceGetMemoryInfo, handle)
        return memory.used if memory else None


def local_cpus(gpu_index: int) -> set[int] | None:
    """Return the processors of the NUMA node that the GPU hangs on; None where there is one node or it is unknown."""
    nodes, local = _numa_nodes(), numa_node_of(gpu_index)
    if len(nodes) < 2 or local is None:
        return None
    listed = next((node.cpus for node in nodes if node.index == local), "")
    return _cpu_list(listed) or None


def allowed_cpus() -> set[int] | None:
    """Return the processors this process may run on; None where the system does not say."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def installed(package: str) -> str | None:
    """Return the installed version of a package without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    """Return NVML's handle of the GPU that torch calls ``index``: NVML and torch may number GPUs differently."""
    if torch.cuda.is_available():
        uuid = torch.cuda.get_device_properties(index).uuid  # NVML writes it with a prefix that torch leaves out
        return _asked(library.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    return _asked(library.nvmlDeviceGetHandleByIndex, index)


def _gpus() -> tuple[Gpu, ...]:
    with nvml() as library:
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
        else:
            count = (library and _asked(library.nvmlDeviceGetCount)) or 0
        return tuple(_gpu(library, index) for index in range(count))


def _gpu(library: Any | None, index: int) -> Gpu:
    facts: dict[str, Any] = {"index": index}
    handle = library and nvml_handle(library, index)
    if library and handle:
        memory = _asked(library.nvmlDeviceGetMemoryInfo, handle)
        capability = _asked(library.nvmlDeviceGetCudaComputeCapability, handle)
        pci = _asked(library.nvmlDeviceGetPciInfo, handle)
        facts |= {
            "name": _asked(library.nvmlDeviceGetName, handle) or "unknown",
            "memory_bytes": memory.total if memory else 0,
            "compute_capability": ".".join(map(str, capability)) if capability else None,
            "pcie_generation": _asked(library.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            "pcie_generation_max": _asked(library.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            "pcie_width": _asked(library.nvmlDeviceGetCurrPcieLinkWidth, handle),
            "pcie_width_max": _asked(library.nvmlDeviceGetMaxPcieLinkWidth, handle),
            "numa_node": _pci_numa_node(pci.busId) if pci else None,
        }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        # What torch can allocate is the smaller, and the one that a budget has to fit in.
        facts |= {"name": properties.name, "memory_bytes": properties.total_memory}
        facts |= {"compute_capability": f"{properties.major}.{properties.minor}"}
    return Gpu(**{"name": "unknown", "memory_bytes": 0, **facts})


def _asked(question: Callable[..., Any], *arguments: Any) -> Any | None:
    """Ask NVML; None where this GPU or driver has no answer (virtual machines answer few questions)."""
    try:
        return question(*arguments)
    except Exception:  # NVMLError has one subclass per code, and an old driver lacks whole functions
        return None


def _pci_numa_node(bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    # NVML writes an eight-digit domain in capitals; sysfs has four digits in small letters.
    node = _read(devices / bus_id.lower()[-12:] / "numa_node")
    return int(node) if node is not None and int(node) >= 0 else None


def _cpu_list(text: str) -> set[int]:
    """Return the processors of the kernel's notation: "0-3,8" is 0, 1, 2, 3 and 8."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _numa_nodes(root: Path = _NODES) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in root.glob("node[0-9]*"):
        words = (_read(folder / "meminfo") or "").split()
        size = int(words[words.index("MemTotal:") + 1]) * 1024 if "MemTotal:" in words else 0
        index = int(folder.name.removeprefix("node"))
        nodes.append(NumaNode(index=index, cpus=_read(folder / "cpulist") or "", memory_bytes=size))
    return tuple(sorted(nodes, key=lambda node: node.index))


def _cgroup_memory(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> tuple[int | None, int | None]:
    """Return (limit, headroom) in bytes over this process's cgroup and all above it; None without a limit.

    Page cache counts as used but is given back on demand, so it is part of the headroom.
    """
    limits, headrooms = [], []
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            tops, limit_file, usage_file = [root, root / "unified"], "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            tops, limit_file, usage_file = [root / "memory"], "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for top in tops:
            inside = top / path.lstrip("/")
            for folder in (inside, *inside.parents):
                limit = _read(folder / limit_file)
                if folder.is_relative_to(top) and limit is not None and limit != "max" and int(limit) < 2**60:
                    used = int(_read(folder / usage_file) or 0) - _page_cache(folder)
                    limits.append(int(limit))
                    headrooms.append(max(0, int(limit) - used))
    return min(limits, default=None), min(headrooms, default=None)


def _page_cache(cgroup: Path) -> int:
    counts = dict(line.split() for line in (_read(cgroup / "memory.stat") or "").splitlines())
    # Version 1 counts descendants under names with a prefix; version 2 always counts them.
    return sum(int(counts.get(f"total_{key}", counts.get(key, 0))) for key in ("active_file", "inactive_file"))


def _memlock() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _may_lock_memory(status: Path = Path("/proc/self/status")) -> bool:
    for line in (_read(status) or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


@functools.cache
def _processor() -> tuple[str | None, tuple[str, ...]]:
    """Return (model, features) from /proc/cpuinfo, and from py-cpuinfo, which takes a second, where there is none."""
    fields = [line.partition(":") for line in (_read(Path("/proc/cpuinfo")) or "").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(fields)}
    model, flags = facts.get("model name"), set((facts.get("flags") or facts.get("Features") or "").split())
    if model is None:
        try:
            import cpuinfo

            found = cpuinfo.get_cpu_info()
        except Exception:  # py-cpuinfo is optional, and raises plain exceptions on processors it does not know
            found = {}
        model, flags = found.get("brand_raw") or platform.processor() or None, flags or set(found.get("flags", ()))
    return model, tuple(feature for feature in _CPU_FEATURES if feature in flags)


def _os_name() -> str:
    if sys.platform == "linux":
        try:
            return platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            pass
    return f"{platform.system()} {platform.mac_ver()[0] or platform.version()}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
