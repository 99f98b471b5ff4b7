"""What a profile needs of a machine, against what the machine is and was measured to do. Pure: findings in, checks out.

``fail`` means that the profile cannot give its result here; ``warn`` that it runs, but slower, or without one of the
compared systems. Every verdict that is not ``pass`` comes with a sentence that says what to do.
"""

from __future__ import annotations

from djinn.bench.certify.device import device_checks
from djinn.bench.certify.findings import Check, Findings, Package, verdict_of
from djinn.bench.certify.host import host_checks
from djinn.sizes import format_bytes

_INSTALL = {
    "C++ compiler": "apt install g++",
    "ninja": "pip install ninja",
    "libaio headers": "apt install libaio-dev",
}
"""How to get what DeepSpeed builds its extensions with, on Debian and Ubuntu."""


def check_all(findings: Findings) -> list[Check]:
    """Return every check that applies to the profile, in the order in which a person would fix them."""
    checks = [*device_checks(findings), *host_checks(findings), _plan(findings)]
    if any(system.startswith("deepspeed") for system in findings.profile.systems):
        checks += [_tool(name, found) for name, found in findings.tools.items()]
    checks += [_missing(name, reason) for name, reason in findings.missing.items() if reason]
    return [*checks, *map(_package, findings.packages), _proof(findings)]


def _plan(findings: Findings) -> Check:
    plan = findings.plan
    return verdict_of(
        "plan",
        f"{format_bytes(plan.model_bytes)} model, {plan.oversubscription:.2f}x the budget" if plan else "none",
        "a placement within the budget",
        "pass" if plan else "fail",
        findings.plan_reason,
    )


def _missing(name: str, reason: str) -> Check:
    return verdict_of(name, "not measured", "for predictions", "warn", f"predicted without: {reason}")


def _tool(name: str, found: bool) -> Check:
    return verdict_of(
        name,
        "found" if found else "not found",
        "for DeepSpeed's extensions",
        "pass" if found else "warn",
        f"{_INSTALL[name]}; without it DeepSpeed is recorded as unavailable",
    )


def _package(package: Package) -> Check:
    return verdict_of(
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
    return verdict_of(
        "streamed = resident",
        measured,
        "equal bit for bit, less than half of the weights on the device",
        "pass" if proof is not None and proof.holds else "fail",
        findings.proof_reason or "report this: on one device streaming must not change a bit",
    )
