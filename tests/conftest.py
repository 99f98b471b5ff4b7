"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from djinn.bench.records import Record, append_record
from djinn.config import Profile, load_profile


def fabricated(profile: Profile, system: str, run: int, **changes: object) -> Record:
    """Return a record with invented numbers: for testing what reads records, never shown as a result."""
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
    numbers = ("load_s", "ttft_s", "wall_s", "link_bytes", "link_utilisation", "effective_gbps", "ceiling_gbps")
    nothing: dict[str, object] = dict.fromkeys((*numbers, "peak_device_bytes", "peak_host_bytes", "peak_anon_bytes"))
    return fabricated(
        profile, system, run, **nothing, status=status, reason=reason, per_token_s=[], tokens=[], link=None
    )


@pytest.fixture
def fabricated_run(tmp_path: Path) -> Path:
    """A run directory with invented records: some systems finished, one out of memory, one for want of disk."""
    profile = load_profile("smoke_13b")
    run_dir = tmp_path / "run"
    results = run_dir / "results"
    results.mkdir(parents=True)
    (run_dir / "profile.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False))
    for run in range(3):
        for system in ("djinn", "accelerate:disk"):
            append_record(results / "baselines.jsonl", fabricated(profile, system, run))
    append_record(results / "baselines.jsonl", fabricated(profile, "deepspeed:nvme", 0))
    append_record(results / "baselines.jsonl", failed(profile, "deepspeed:nvme", 1, "timeout", "no answer in 900 s"))
    reason = "out of memory: 26 GB of weights, 12 GB of RAM"
    append_record(results / "baselines.jsonl", failed(profile, "deepspeed:cpu", 0, "oom", reason))
    for size, rate in (("4 MiB", 0.9), ("16 MiB", 1.2), ("64 MiB", 1.3)):
        for run in range(2):
            point = fabricated(
                profile, "djinn", run, experiment="sweep", variant=f"chunk={size}", link_bytes=int(rate * 1e10),
                wall_s=10 + 0.1 * run,
            )  # fmt: skip
            append_record(results / "sweep.jsonl", point)
    append_record(
        results / "sweep.jsonl",
        failed(profile, "djinn", 0, "error", "refused").model_copy(
            update={"experiment": "sweep", "variant": "chunk=512 MiB"}
        ),
    )
    with (results / "timeline.jsonl").open("w") as lines:
        for unit in range(40):
            for lane, offset in (("copy", 0.0), ("compute", 0.4), ("stall", 0.32)):
                span = {"lane": lane, "unit": f"layers.{unit}", "start_s": unit * 0.5 + offset, "nbytes": 600_000_000}
                length = {"copy": 0.48, "compute": 0.1, "stall": 0.05}[lane]
                lines.write(json.dumps(span | {"end_s": span["start_s"] + length, "cause": ""}) + "\n")  # type: ignore[operator]
    return run_dir
