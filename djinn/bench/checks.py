"""What a profile needs of a machine, against what the machine is and was measured to do. Pure: findings in, checks out.

``fail`` means that the profile cannot give its result here; ``warn`` that it runs, but slower, or without one of the
compared systems. Every verdict that is not ``pass`` comes with a sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from djinn.bench.disk import DiskRate
from djinn.bench.link import LinkRate
from djinn.bench.proof import Proof
from djinn.config import Profile
from djinn.engine.plan import Plan
from djinn.hardware import Gpu, Machine
from djinn.sizes import format_bytes

_LINK_SHARE = 0.7
"""Share of PCIe's raw rate that page-locked copies reach on a healthy link: 87% on an H100 (Gen5 x16, 54.8 GB/s)
and 73% on an L4 (23 GB/s of its slot's 31.5) were measured."""
_RAM_SHARE = 0.9
"""Share of the RAM a machine is sold with that programs see at least; firmware and kernel keep the rest."""
_INSTALL = {
    "C++ compiler": "apt install g++",
    "ninja": "pip install ninja",
    "libaio headers": "apt install libaio-dev",
}
"""How to get what DeepSpeed builds its extensions with, on Debian and Ubuntu."""
_LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""10^9 bytes/s of one PCIe lane by generation, after line coding (PCI-SIG)."""


Verdict = Literal["pass", "warn", "fail"]


class Check(BaseModel):
    """One requirement, as people read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    measured: str
    needed: str
    verdict: Verdict
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of the supported set: installed version or None, allowed range, and whether djinn runs without it."""

    name: str
    version: str | None
    allowed: str
    fits: bool
    optional: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that :func:`check_all` looks at. Sizes are bytes; a reason is empty where the measurement succeeded."""

    profile: Profile
    machine: Machine
    usable_ram: int
    allowed_cpus: frozenset[int]
    """Processors this process may use; empty where the system does not say."""
    gpu_cpus: frozenset[int]
    """Processors of the GPU's NUMA node; empty where unknown."""
    checkpoint_bytes: int
    """What the profile's checkpoint already takes of the disk space it needs."""
    link: Sequence[LinkRate]
    link_reason: str
    disk: Sequence[DiskRate]
    disk_reason: str
    plan: Plan | None
    plan_reason: str
    tools: dict[str, bool]
    """Whether each tool that DeepSpeed builds its extensions with was found."""
    packages: Sequence[Package]
    proof: Proof | None
    proof_reason: str
    cpu_profiles: Sequence[str]
    """Profiles that need no GPU, to be named where there is none."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that the profile uses, where it asks for one and there is one."""
        usable = self.profile.device == "cuda" and self.machine.torch_sees_gpu
        return self.machine.gpus[0] if usable else None


def check_all(findings: Findings) -> list[Check]:
    """Return every check that applies to the profile, in the order in which a person would fix them."""
    checks, gpu = [_device(findings)], findings.gpu
    if gpu is not None:
        checks += [_device_memory(findings, gpu), _driver(findings), _pcie(gpu), _numa(findings, gpu)]
        checks += [_link_rate(findings, gpu)]
    checks += [_ram(findings), _host_memory(findings), _memlock(findings), _disk_space(findings), _direct_io(findings)]
    checks += [*_disk_rate(findings), _plan(findings)]
    if any(system.startswith("deepspeed") for system in findings.profile.systems):
        checks += [_tool(name, found) for name, found in findings.tools.items()]
    return [*checks, *map(_package, findings.packages), _proof(findings)]


def _check(name: str, measured: str, needed: str, verdict: Verdict, remedy: str) -> Check:
    return Check(
        name=name, measured=measured, needed=needed, verdict=verdict, remedy="" if verdict == "pass" else remedy
    )


def _device(findings: Findings) -> Check:
    machine, needed = findings.machine, findings.profile.device
    if needed == "cpu":
        return _check(
            "device", f"{machine.cpu or 'CPU'}, {machine.cores or machine.threads} cores", "a CPU", "pass", ""
        )
    names = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    remedy = f"choose a profile that needs no GPU: {', '.join(findings.cpu_profiles)}"
    if machine.gpus and not machine.torch_sees_gpu:
        names += ", but torch was built without CUDA"
        remedy = f"install a torch built for CUDA, or {remedy}"
    return _check("device", names, "a CUDA GPU", "pass" if findings.gpu else "fail", remedy)


def _device_memory(findings: Findings, gpu: Gpu) -> Check:
    budget = findings.profile.budget
    return _check(
        "device memory",
        format_bytes(gpu.memory_bytes),
        f"{format_bytes(budget)} budget",
        "pass" if gpu.memory_bytes >= budget else "fail",
        "lower the profile's budget, and its ring with it",
    )


def _driver(findings: Findings) -> Check:
    machine = findings.machine
    has, needs = machine.driver_cuda, machine.torch_cuda
    # Within a major version, CUDA's drivers and programs are compatible (NVIDIA, CUDA Compatibility).
    fits = None if has is None or needs is None else int(has.split(".")[0]) >= int(needs.split(".")[0])
    return _check(
        "driver",
        f"driver {machine.driver or 'unknown'} for CUDA {has or 'unknown'}",
        f"CUDA {needs}" if needs else "any",
        "pass" if fits or machine.rocm else "warn" if fits is None else "fail",
        f"install an NVIDIA driver for CUDA {needs}"
        if has
        else "install nvidia-ml-py, so that the driver can be asked",
    )


def _pcie(gpu: Gpu) -> Check:
    now, most = (gpu.pcie_generation, gpu.pcie_width), (gpu.pcie_generation_max, gpu.pcie_width_max)
    return _check(
        "PCIe link",
        _link_text(*now),
        _link_text(*most),
        "pass" if None not in now and now == most else "warn",
        "the driver does not tell; compare the link rate"
        if None in now
        else "an idle GPU lowers its generation; if it stays low under load, look at the slot, riser and BIOS",
    )


def _link_text(generation: int | None, width: int | None) -> str:
    return f"Gen{generation or '?'} x{width or '?'}"


def _numa(findings: Findings, gpu: Gpu) -> Check:
    nodes, node = len(findings.machine.numa_nodes), gpu.numa_node
    local = nodes <= 1 or (node is not None and findings.allowed_cpus <= findings.gpu_cpus)
    return _check(
        "NUMA",
        f"GPU on node {'unknown' if node is None else node} of {nodes}",
        "the process on the GPU's node",
        "pass" if local else "warn",
        f"run under numactl --cpunodebind={node} --membind={node}" if node is not None else "bind the process by hand",
    )


def _link_rate(findings: Findings, gpu: Gpu) -> Check:
    best = max((rate.gbps for rate in findings.link if rate.kind == "pinned to device"), default=None)
    needed = _LINK_SHARE * _LANE_GBPS.get(gpu.pcie_generation_max or 0, 0) * (gpu.pcie_width_max or 0)
    return _check(
        "link rate",
        f"{best:.1f} GB/s" if best is not None else "not measured",
        f"{needed:.1f} GB/s, {_LINK_SHARE:.0%} of the PCIe link" if needed else "any",
        "fail" if best is None else "pass" if best >= needed else "warn",
        f"page-locked copies do not work: {findings.link_reason}"
        if best is None
        else "look at the PCIe link and NUMA above, and at what else uses them",
    )


def _ram(findings: Findings) -> Check:
    needed, usable = findings.profile.min_ram, findings.usable_ram
    limit = findings.machine.ram_limit_bytes
    return _check(
        "RAM",
        f"{format_bytes(usable)} usable of {format_bytes(limit)}",
        format_bytes(needed),
        "pass" if usable >= needed else "warn" if limit >= _RAM_SHARE * needed else "fail",
        "close other programs" if limit >= needed else "raise the memory limit, or choose a smaller profile",
    )


def _host_memory(findings: Findings) -> Check:
    profile, limit = findings.profile, findings.machine.ram_limit_bytes
    on_host = profile.host_memory + (profile.budget if profile.device == "cpu" else 0)
    return _check(
        "host memory",
        f"{format_bytes(findings.usable_ram)} usable of {format_bytes(limit)}",
        f"{format_bytes(on_host)} for streamed weights" + (" and the budget" if profile.device == "cpu" else ""),
        "pass" if findings.usable_ram >= on_host else "warn" if limit >= on_host else "fail",
        "close other programs" if limit >= on_host else "lower the profile's host_memory",
    )


def _memlock(findings: Findings) -> Check:
    machine, profile = findings.machine, findings.profile
    limit = machine.memlock_bytes
    enough = limit is None or machine.memlock_exempt or limit >= profile.host_memory
    # The NVIDIA driver locks pages without charging them to the limit; that it did so here has been tried.
    pinned = any(rate.kind == "pinned to device" for rate in findings.link)
    on_gpu = findings.gpu is not None
    return _check(
        "memlock",
        ("no limit" if limit is None else format_bytes(limit))
        + (", does not bind this process" if limit is not None and machine.memlock_exempt else "")
        + (", does not bind the GPU's driver" if not enough and pinned else ""),
        f"{format_bytes(profile.host_memory)} for streamed weights",
        "pass" if enough or pinned else "fail" if on_gpu else "warn",
        "raise it: ulimit -l unlimited, or memlock in /etc/security/limits.conf"
        + ("" if on_gpu else "; without a GPU nothing is page-locked by djinn, only by DeepSpeed"),
    )


def _disk_space(findings: Findings) -> Check:
    needed = max(0, findings.profile.min_disk - findings.checkpoint_bytes)
    return _check(
        "disk space",
        f"{format_bytes(findings.machine.disk_free_bytes)} free",
        f"{format_bytes(needed)}"
        + (f" beside the {format_bytes(findings.checkpoint_bytes)} there" if findings.checkpoint_bytes else ""),
        "pass" if findings.machine.disk_free_bytes >= needed else "fail",
        "free some space, or choose a smaller profile",
    )


def _direct_io(findings: Findings) -> Check:
    best = _best_read(findings)
    reasons = (rate.reason for rate in findings.disk if rate.mode == "direct" and rate.reason)
    return _check(
        "direct I/O",
        f"{best:.2f} GB/s" if best is not None else next(reasons, findings.disk_reason),
        "O_DIRECT reads",
        "pass" if best is not None else "warn",
        "put the checkpoint on a disk with direct I/O (ext4 or xfs, for example); reads go through the page cache here",
    )


def _disk_rate(findings: Findings) -> list[Check]:
    """Every run reads the plan's disk tier once per pass, and has to end before its time-out."""
    plan, profile = findings.plan, findings.profile
    if plan is None or not plan.disk_bytes:
        return []
    buffered = max((rate.gbps or 0 for rate in findings.disk if rate.kind == "read"), default=0.0)
    best = _best_read(findings) or buffered
    needed = plan.disk_bytes * profile.new_tokens / profile.timeout_s / 1e9
    return [
        _check(
            "disk rate",
            f"{best:.2f} GB/s" if best else "not measured",
            f"{needed:.3g} GB/s to end a run in {profile.timeout_s:.0f} s",
            "pass" if best >= needed else "warn",
            "use a faster disk, or raise the profile's host_memory or timeout_s",
        )
    ]


def _best_read(findings: Findings) -> float | None:
    direct = (rate.gbps for rate in findings.disk if (rate.kind, rate.mode) == ("read", "direct"))
    return max((rate for rate in direct if rate is not None), default=None)


def _plan(findings: Findings) -> Check:
    plan = findings.plan
    return _check(
        "plan",
        f"{format_bytes(plan.model_bytes)} model, {plan.oversubscription:.2f}x the budget" if plan else "none",
        "a placement within the budget",
        "pass" if plan else "fail",
        findings.plan_reason,
    )


def _tool(name: str, found: bool) -> Check:
    return _check(
        name,
        "found" if found else "not found",
        "for DeepSpeed's extensions",
        "pass" if found else "warn",
        f"{_INSTALL[name]}; without it DeepSpeed is recorded as unavailable",
    )


def _package(package: Package) -> Check:
    return _check(
        package.name,
        package.version or "not installed",
        package.allowed or "any",
        "pass" if package.fits else "warn" if package.optional else "fail",
        f"pip install '{package.name}{package.allowed}'",
    )


def _proof(findings: Findings) -> Check:
    proof = findings.proof
    measured = "not run"
    if proof is not None:
        same = "equal" if proof.logits_equal and proof.tokens_equal else "not equal"
        share = proof.device_bytes / proof.model_bytes
        measured = f"{same} over {proof.steps} passes, {share:.0%} of the weights on the {proof.device} device"
    return _check(
        "streamed = resident",
        measured,
        "equal bit for bit, less than half of the weights on the device",
        "pass" if proof is not None and proof.holds else "fail",
        findings.proof_reason or "report this: on one device streaming must not change a bit",
    )
