"""What a profile needs of the device and its link, against what they are."""

from __future__ import annotations

from djinn.bench.certify.findings import Check, Findings, verdict_of
from djinn.gpus import Gpu
from djinn.sizes import format_bytes

_LINK_SHARE = 0.7
"""Share of PCIe's raw rate that page-locked copies reach on a healthy link: 87% on an H100 (Gen5 x16, 54.8 GB/s)
and 73% on an L4 (23 GB/s of its slot's 31.5) were measured."""
_AT_ONCE_SHARE = 0.95
"""Of each link's own rate, while others carry too, below which they share something."""


def device_checks(findings: Findings) -> list[Check]:
    """Return the checks of the device and its link."""
    gpu = findings.gpu
    if gpu is None:
        return [_device(findings)]
    return [
        _device(findings),
        _device_memory(findings, gpu),
        _driver(findings),
        _pcie(gpu),
        _numa(findings, gpu),
        _link_rate(findings, gpu),
        *_links(findings),
    ]


def _device(findings: Findings) -> Check:
    machine, needed = findings.machine, findings.profile.device
    if needed == "cpu":
        return verdict_of(
            "device", f"{machine.cpu or 'CPU'}, {machine.cores or machine.threads} cores", "a CPU", "pass", ""
        )
    names = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    remedy = f"choose a profile that needs no GPU: {', '.join(findings.cpu_profiles)}"
    if machine.gpus and not machine.torch_sees_gpu:
        names += ", but torch was built without CUDA"
        remedy = f"install a torch built for CUDA, or {remedy}"
    count = findings.profile.gpus
    wanted = "a CUDA GPU" if count == 1 else f"{count} CUDA GPUs"
    enough = findings.gpu is not None and len(machine.gpus) >= count
    return verdict_of("device", names, wanted, "pass" if enough else "fail", remedy)


def _device_memory(findings: Findings, gpu: Gpu) -> Check:
    budget = findings.profile.budget
    return verdict_of(
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
    return verdict_of(
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
    return verdict_of(
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
    return verdict_of(
        "NUMA",
        f"GPU on node {'unknown' if node is None else node} of {nodes}",
        "the process on the GPU's node",
        "pass" if local else "warn",
        f"run under numactl --cpunodebind={node} --membind={node}" if node is not None else "bind the process by hand",
    )


def _link_rate(findings: Findings, gpu: Gpu) -> Check:
    best = max((rate.gbps for rate in findings.link if rate.kind == "pinned to device"), default=None)
    needed = _LINK_SHARE * (gpu.pcie_gbps or 0)
    return verdict_of(
        "link rate",
        f"{best:.1f} GB/s" if best is not None else "not measured",
        f"{needed:.1f} GB/s, {_LINK_SHARE:.0%} of the PCIe link" if needed else "any",
        "fail" if best is None else "pass" if best >= needed else "warn",
        f"page-locked copies do not work: {findings.link_reason}"
        if best is None
        else "look at the PCIe link and NUMA above, and at what else uses them",
    )


def _links(findings: Findings) -> list[Check]:
    """Return whether the links of several GPUs carry at once what each carries alone."""
    if findings.links_reason:
        found = verdict_of("links at once", "not measured", "any", "warn", findings.links_reason)
        return [found]
    alone = {rate.gpus[0]: rate.gbps[0] for rate in findings.links if len(rate.gpus) == 1}
    shares = {
        rate.gpus: min(gbps / alone[gpu] for gpu, gbps in zip(rate.gpus, rate.gbps, strict=True))
        for rate in findings.links
        if len(rate.gpus) > 1
    }
    if not shares:
        return []
    worst = min(shares, key=lambda gpus: shares[gpus])
    pairs = [gpus for gpus, share in shares.items() if share < _AT_ONCE_SHARE and len(gpus) == 2]
    names = "; ".join(" and ".join(map(str, gpus)) for gpus in pairs) or " and ".join(map(str, worst))
    return [
        verdict_of(
            "links at once",
            f"{shares[worst]:.0%} of what each carries alone",
            f"{_AT_ONCE_SHARE:.0%}",
            "pass" if shares[worst] >= _AT_ONCE_SHARE else "warn",
            f"the links of GPUs {names} share a root port or host memory: djinn runs at what they carry at once",
        )
    ]
