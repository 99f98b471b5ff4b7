"""What a profile needs of host memory and disk, against what they are."""

from __future__ import annotations

from djinn.bench.certify.findings import Check, Findings, verdict_of
from djinn.sizes import format_bytes

_RAM_SHARE = 0.9
"""Share of the RAM a machine is sold with that programs see at least; firmware and kernel keep the rest."""


def host_checks(findings: Findings) -> list[Check]:
    """Return the checks of host memory and disk."""
    return [
        _ram(findings),
        _host_memory(findings),
        _memlock(findings),
        _disk_space(findings),
        _direct_io(findings),
        *_disk_rate(findings),
    ]


def _ram(findings: Findings) -> Check:
    needed, usable = findings.profile.min_ram, findings.usable_ram
    limit = findings.machine.ram_limit_bytes
    return verdict_of(
        "RAM",
        f"{format_bytes(usable)} usable of {format_bytes(limit)}",
        format_bytes(needed),
        "pass" if usable >= needed else "warn" if limit >= _RAM_SHARE * needed else "fail",
        "close other programs" if limit >= needed else "raise the memory limit, or choose a smaller profile",
    )


def _host_memory(findings: Findings) -> Check:
    profile, limit = findings.profile, findings.machine.ram_limit_bytes
    on_host = profile.host_memory + (profile.budget if profile.device == "cpu" else 0)
    return verdict_of(
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
    return verdict_of(
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
    return verdict_of(
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
    return verdict_of(
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
        verdict_of(
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
