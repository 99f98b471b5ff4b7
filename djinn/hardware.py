"""What the machine is: processor, memory and its limits, NUMA nodes, GPUs, software, disk.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from djinn.gpus import Gpu, asked, gpus, numa_node_of, nvml
from djinn.sizes import Count

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
    memory_bytes: Count


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
    ram_bytes: Count
    available_bytes: Count
    cgroup_limit_bytes: Count | None
    memlock_bytes: Count | None
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
    disk_free_bytes: Count

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of its smallest GPU, bytes; None where there is none, or nobody could say."""
        return min((gpu.memory_bytes for gpu in self.gpus), default=0) or None

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
    limit, _ = cgroup_memory()
    with nvml() as library:
        driver = library and asked(library.nvmlSystemGetDriverVersion)
        cuda = library and asked(library.nvmlSystemGetCudaDriverVersion)
    model, flags = _processor()
    return Machine(
        os=_os_name(),
        kernel=platform.release(),
        cpu=model,
        cpu_features=tuple(feature for feature in _CPU_FEATURES if feature in flags),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(logical=True),
        ram_bytes=memory.total,
        available_bytes=memory.available,
        cgroup_limit_bytes=limit if limit is not None and limit < memory.total else None,
        memlock_bytes=_memlock(),
        memlock_exempt=may_lock_memory(),
        numa_nodes=numa_nodes(),
        gpus=gpus(),
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
    _, headroom = cgroup_memory()
    available = psutil.virtual_memory().available
    return available if headroom is None else min(available, headroom)


def local_cpus(gpu_index: int) -> set[int] | None:
    """Return the processors of the NUMA node that the GPU hangs on; None where there is one node or it is unknown."""
    nodes, local = numa_nodes(), numa_node_of(gpu_index)
    if len(nodes) < 2 or local is None:
        return None
    listed = next((node.cpus for node in nodes if node.index == local), "")
    return cpu_list(listed) or None


def allowed_cpus() -> set[int] | None:
    """Return the processors this process may run on; None where the system does not say."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def installed(package: str) -> str | None:
    """Return the installed version of a package without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_list(text: str) -> set[int]:
    """Return the processors of the kernel's notation: "0-3,8" is 0, 1, 2, 3 and 8."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def numa_nodes(root: Path = _NODES) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in root.glob("node[0-9]*"):
        words = (_read(folder / "meminfo") or "").split()
        size = int(words[words.index("MemTotal:") + 1]) * 1024 if "MemTotal:" in words else 0
        index = int(folder.name.removeprefix("node"))
        nodes.append(NumaNode(index=index, cpus=_read(folder / "cpulist") or "", memory_bytes=size))
    return tuple(sorted(nodes, key=lambda node: node.index))


def cgroup_memory(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> tuple[int | None, int | None]:
    """Return (limit, headroom) in bytes over this process's cgroup and all above it; None without a limit.

    Page cache counts as used but is given back on demand, so it is part of the headroom.
    """
    limits, headrooms = [], []
    for folder, version in _cgroups("memory", membership, root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit = _read(folder / names[0])
        if limit is not None and limit != "max" and int(limit) < 2**60:
            used = int(_read(folder / names[1]) or 0) - _page_cache(folder)
            limits.append(int(limit))
            headrooms.append(max(0, int(limit) - used))
    return min(limits, default=None), min(headrooms, default=None)


def cgroup_cpus(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> float | None:
    """Return how many processors' time this process's cgroup and all above it leave it; None without a quota."""
    quotas = []
    for folder, version in _cgroups("cpu", membership, root):
        words = (_read(folder / "cpu.max") or "").split()
        if version == 1:
            words = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words):  # no limit is "max", and -1 in version 1
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _cgroups(controller: str, membership: Path, root: Path) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """Yield the folders of this process's cgroup and of all above it, with the version of their files."""
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        version: Literal[1, 2]
        if controllers == "":  # version 2, alone or beside version 1
            tops, version = [root, root / "unified"], 2
        elif controller in controllers.split(","):
            tops, version = [root / controller], 1
        else:
            continue
        for top in tops:
            inside = top / path.lstrip("/")
            yield from ((folder, version) for folder in (inside, *inside.parents) if folder.is_relative_to(top))


def _page_cache(cgroup: Path) -> int:
    counts = dict(line.split() for line in (_read(cgroup / "memory.stat") or "").splitlines())
    # Version 1 counts descendants under names with a prefix; version 2 always counts them.
    return sum(int(counts.get(f"total_{key}", counts.get(key, 0))) for key in ("active_file", "inactive_file"))


def _memlock() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def may_lock_memory(status: Path = Path("/proc/self/status")) -> bool:
    for line in (_read(status) or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that programs can use on this processor, as the kernel calls them."""
    return _processor()[1]


@functools.cache
def _processor() -> tuple[str | None, frozenset[str]]:
    """Return (model, flags) from /proc/cpuinfo, and from py-cpuinfo, which takes a second, where there is none."""
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
    return model, frozenset(flags)


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
