"""Records with invented numbers, for testing what reads records; never shown as results."""

from __future__ import annotations

from djinn.bench.records import Record
from djinn.profiles import Profile


def fabricated(profile: Profile, system: str, run: int, **changes: object) -> Record:
    """Return a record with invented numbers."""
    name, _, variant = system.partition(":")
    slow = {"djinn": 1.0, "accelerate": 2.5, "deepspeed": 1.8, "resident": 0.3}[name] + 0.02 * run
    tokens = profile.new_tokens
    fields: dict[str, object] = {
        "experiment": "baselines",
        "system": name,
        "variant": variant,
        "model": profile.model,
        "synthetic": True,
        "device_name": "fabricated",
        "status": "ok",
        "run": run,
        "budget_bytes": profile.budget,
        "model_bytes": 26_031_728_640,
        "ring_bytes": profile.ring if name == "djinn" else None,
        "chunk_bytes": profile.chunk if name == "djinn" else None,
        "prompt_tokens": profile.prompt_tokens,
        "new_tokens": tokens,
        "batch": profile.batch,
        "load_s": 5.0,
        "ttft_s": 20 * slow,
        "per_token_s": [19 * slow + 0.4 * k for k in range(tokens - 1)],
        "wall_s": 20 * slow + (tokens - 1) * 19.5 * slow,
        "link_bytes": int(tokens * 25e9),
        "link": "disk",
        "ceiling_gbps": 1.35 + 0.03 * run,
        "link_utilisation": min(1.0, 1.25 / slow / 1.35),
        "stall_s": 2 * slow if name == "djinn" else None,
        "effective_gbps": 1.32 / slow,
        "peak_device_bytes": 4_200_000_000 if name == "djinn" else None,
        "peak_host_bytes": 9_000_000_000,
        "peak_anon_bytes": 8_000_000_000,
        "tokens": list(range(7, 7 + tokens)),
        "config_digest": profile.digest,
    } | changes
    return Record.model_validate(fields)


def failed(profile: Profile, system: str, run: int, status: str, reason: str) -> Record:
    """Return a record of a run that gave no numbers."""
    numbers = (
        "load_s",
        "ttft_s",
        "wall_s",
        "link_bytes",
        "link_utilisation",
        "stall_s",
        "effective_gbps",
        "ceiling_gbps",
    )
    nothing: dict[str, object] = dict.fromkeys((*numbers, "peak_device_bytes", "peak_host_bytes", "peak_anon_bytes"))
    return fabricated(
        profile, system, run, **nothing, status=status, reason=reason, per_token_s=[], tokens=[], link=None
    )
