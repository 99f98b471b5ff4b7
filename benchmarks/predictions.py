"""How well ``djinn plan`` foresees what then happens: each case measured, and predicted from rates measured beside it.

    python benchmarks/predictions.py --run-dir artifact/runs/predictions [--device cpu] [--cases disk memory ...]

Cases differ in what limits them: the disk, host memory or the link, compute with a long prompt or a large batch,
decoding, and the host with a model of small modules. Rates are measured before and after every case, since a shared
machine's drift within minutes: compute and host memory here, disk and link by the runs themselves. Records go to
RUN_DIR/results/benchmark.jsonl and the comparison to RUN_DIR/results/predictions.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from djinn.bench.harness import Bench, Lane
from djinn.bench.rates import compute, streaming
from djinn.bench.rates.link import memcpy_rate
from djinn.bench.records import Record
from djinn.cli.show import print_table
from djinn.engine.forecast import forecast
from djinn.planning.rates import Rates
from djinn.profiles import Profile, load_profile

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
CPU["small, coded"] = CPU["small"] | {"coding": "lossless", "budget": "250 MB"}
GPU: dict[str, dict[str, Any]] = {
    "link": {"budget": "6 GB"},
    "resident": {"budget": "40 GB"},
    "prompt of 8192": {"budget": "10 GB", "prompt_tokens": 8192},
    "batch of 32": {"budget": "10 GB", "batch": 32, "prompt_tokens": 64},
    "small": {"model": "synthetic:gpt2", "budget": "2 GB"},
    "link, coded": {"budget": "6 GB", "coding": "lossless"},
    "resident, coded": {"budget": "40 GB", "coding": "lossless"},
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


def look(device: str) -> Rates:
    """Measure what a run does not measure itself."""
    found, streamed = compute.measure(torch.device(device)), streaming.measure(torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()
    rates = found.rates_with(link=memcpy_rate(64 * 2**20) if device == "cpu" else None, disk=None)
    return streamed.beside(rates)


def between(before: Rates, after: Rates, ceiling: float) -> Rates:
    """Return rates whose seconds lie in the middle of two looks; ``ceiling`` is the disk's or the link's, bytes/s."""

    def middle(one: float | None, other: float | None) -> float:
        assert one
        assert other
        return 2 / (1 / one + 1 / other)

    pairs = zip(before.compute, after.compute, strict=False)
    on_cpu = before.device == "cpu"
    return Rates(
        device=before.device,
        link=middle(before.link, after.link) if on_cpu else ceiling,
        disk=ceiling if on_cpu else None,
        compute=tuple(replace(one, rate=middle(one.rate, other.rate)) for one, other in pairs),
        decode=middle(before.decode, after.decode),
        unit_s=(before.unit_s + after.unit_s) / 2,
        module_s=(before.module_s + after.module_s) / 2,
        pass_s=(before.pass_s + after.pass_s) / 2,
        call_s=(before.call_s + after.call_s) / 2,
        last_token=middle(before.last_token, after.last_token),
    )


def compare(name: str, profile: Profile, runs: list[Record], rates: Rates) -> dict[str, Any]:
    """Return predicted and measured seconds of a case, medians over its runs, and over its tokens after the first."""
    predicted = forecast(
        profile.model,
        budget=profile.budget,
        device=profile.device,
        rates=rates,
        ring=profile.ring,
        host_memory=profile.host_memory,
        prompt_tokens=profile.prompt_tokens,
        new_tokens=profile.new_tokens,
        batch=profile.batch,
        dtype=getattr(torch, profile.dtype),
        coding=profile.coding,
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
        "peak_of_budget": max(run.peak_device_bytes or 0 for run in runs) / profile.budget,
        "rates": {
            "link": rates.link,
            "disk": rates.disk,
            "compute": {rate.tokens: rate.rate for rate in rates.compute},
            "decode": rates.decode,
            "unit_s": rates.unit_s,
            "module_s": rates.module_s,
            "pass_s": rates.pass_s,
            "call_s": rates.call_s,
            "last_token": rates.last_token,
        },
    }


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+")
    options = parser.parse_args()
    chosen = cases(options.device)
    path = options.run_dir / "results" / "predictions.json"
    rows = []
    for name in options.cases or chosen:
        lane = Lane(system="djinn", variant=name, profile=chosen[name])
        before = look(options.device)
        with Bench("benchmark", chosen[name], options.run_dir, keep=False) as bench:
            records = bench.measure([lane], runs=lane.profile.runs, order="by lane")
        runs = [record for record in records if record.status == "ok" and record.variant == name]
        if runs:
            ceiling = statistics.median(1e9 * (run.ceiling_gbps or 0.0) for run in runs)
            rows.append(compare(name, chosen[name], runs, between(before, look(options.device), ceiling)))
            path.write_text(json.dumps(rows, indent=2) + "\n")
    columns = [key for key in rows[0] if key != "rates"]
    print_table(columns, [[row[key] for key in columns] for row in rows])


if __name__ == "__main__":
    main()
