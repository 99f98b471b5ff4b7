"""How well ``djinn plan`` foresees what then happens: each case predicted from this machine's rates, then measured.

    python benchmarks/predictions.py --run-dir artifact/runs/predictions [--device cpu] [--cases disk memory ...]

Rates are certified first, in the same run. Cases differ in what limits them: the disk, host memory or the link, compute
with a long prompt or a large batch, and the host with a model of small modules. Records go to
RUN_DIR/results/benchmark.jsonl and the comparison to RUN_DIR/results/predictions.json; the same command resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from djinn.bench.certify import Certification, certify, read_certification
from djinn.bench.harness import Bench, Lane
from djinn.bench.records import Record
from djinn.cli.show import print_table
from djinn.config import Profile, load_profile
from djinn.engine.forecast import forecast

CPU: dict[str, dict[str, Any]] = {
    "disk": {"budget": "3 GB", "host_memory": "1 GB"},
    "disk, cached": {"budget": "3 GB", "host_memory": "7 GB"},
    "memory": {"budget": "3 GB", "host_memory": "14 GB"},
    "resident": {"budget": "15 GB"},
    "prompt of 256": {"budget": "15 GB", "prompt_tokens": 256},
    "prompt of 256, memory": {"budget": "3 GB", "host_memory": "14 GB", "prompt_tokens": 256},
    "batch of 8": {"budget": "15 GB", "batch": 8, "prompt_tokens": 16},
    "large vocabulary": {"model": "synthetic:qwen2.5-7b", "budget": "4 GB", "host_memory": "14 GB"},
    "small": {"model": "synthetic:gpt2", "budget": "200 MB", "host_memory": "1 GB", "prompt_tokens": 64},
}
GPU: dict[str, dict[str, Any]] = {
    "link": {"budget": "6 GB"},
    "resident": {"budget": "40 GB"},
    "prompt of 8192": {"budget": "10 GB", "prompt_tokens": 8192},
    "batch of 32": {"budget": "10 GB", "batch": 32, "prompt_tokens": 64},
    "small": {"model": "synthetic:gpt2", "budget": "2 GB"},
}


def cases(device: str) -> dict[str, Profile]:
    """Return every case as a profile, by name."""
    if device == "cpu":
        base = load_profile("smoke_13b").override(model="synthetic:llama-2-7b", ring=None, new_tokens=5, warmups=1)
        table = CPU
    else:
        base = load_profile("virt_mem_h100").override(model="synthetic:llama-2-7b", host_memory="20 GB", new_tokens=9)
        table = GPU
    return {name: base.override(runs=2, **changes) for name, changes in table.items()}


def compare(name: str, profile: Profile, runs: list[Record], found: Certification) -> dict[str, Any]:
    """Return predicted and measured seconds of a case, medians over its runs, and over its tokens after the first."""
    predicted = forecast(
        profile.model,
        budget=profile.budget,
        device=profile.device,
        rates=found.rates,
        ring=profile.ring,
        host_memory=profile.host_memory,
        prompt_tokens=profile.prompt_tokens,
        new_tokens=profile.new_tokens,
        batch=profile.batch,
        dtype=getattr(torch, profile.dtype),
    ).predicted
    assert predicted is not None
    first = statistics.median(run.ttft_s for run in runs if run.ttft_s is not None)
    later = statistics.median(itertools.chain(*(run.per_token_s for run in runs)))
    return {
        "case": name,
        "limit": predicted.limit,
        "ttft_s": first,
        "predicted_ttft_s": predicted.ttft_s,
        "token_s": later,
        "predicted_token_s": predicted.token_s,
        "ttft_ratio": predicted.ttft_s / first,
        "token_ratio": predicted.token_s / later,
    }


def main() -> None:
    """Certify, measure what is missing, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+")
    options = parser.parse_args()
    chosen = cases(options.device)
    found = read_certification(options.run_dir) or certify(next(iter(chosen.values())), options.run_dir)
    rows = []
    for name in options.cases or chosen:
        lane = Lane(system="djinn", variant=name, profile=chosen[name])
        with Bench("benchmark", chosen[name], options.run_dir, keep=False) as bench:
            records = bench.measure([lane], runs=lane.profile.runs, order="by lane")
        runs = [record for record in records if record.status == "ok" and record.variant == name]
        if runs:
            rows.append(compare(name, chosen[name], runs, found))
    path = options.run_dir / "results" / "predictions.json"
    path.write_text(json.dumps(rows, indent=2) + "\n")
    print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
