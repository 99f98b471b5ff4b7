"""How close streaming comes to the PCIe link of a GPU, and how it compares: one run, one machine, systems in turn.

    python benchmarks/stream_over_pcie.py --run-dir artifact/runs/pcie [--parts djinn deepspeed ...]

The model is a Llama-2-70B cut to 16 layers with synthetic weights, 28 GB, made in host memory. Parts:

- ``djinn``: a budget in which none of its layers stays on the device, 512 prompt tokens, 16 new ones; the same with
  24 GB, with the ring that the plan chooses and with the paper's 20 GB;
- ``deepspeed``: ZeRO-3 with pinned parameters in host memory and 24 GB of device memory, over a grid of its settings;
- ``accelerate``: as shipped, and with its weights pinned by hand, in the budget in which no layer stays;
- ``chunks``, ``rings``: djinn over chunk and ring sizes;
- ``coded``: djinn with losslessly coded weights, in both budgets of ``djinn``;
- ``trace``: a profiler's view of passes in this process: host synchronisations, time in hooks, gaps between copies.

Every run measures the pinned copy rate beside itself. Records go to RUN_DIR/results/benchmark.jsonl and the trace's
summary to RUN_DIR/results/trace.json; the same command resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import djinn
from djinn.bench.harness import Bench, Lane
from djinn.bench.rates.link import pinned_h2d_rate
from djinn.bench.records import Record
from djinn.bench.systems import loader
from djinn.bench.systems.base import Job
from djinn.engine.load import engine_of
from djinn.profiles import Profile, load_profile
from djinn.transport.cuda import CudaCopier

MODEL = "synthetic:llama-2-70b-16-layers"
BASE_BYTES = 2_200_000_000
"""What embeddings, context, KV cache and activations take: a budget of this and the ring keeps no layer."""
NONE_RESIDENT = BASE_BYTES + 1_450_000_000
PAPER_BUDGET = 24_000_000_000
MATRIX, LAYER = 235_000_000, 856_000_000
"""Elements of the largest matrix and of a layer."""
GRID: dict[str, dict[str, int | bool]] = {
    "tuned": {},
    "persistent": {
        "stage3_prefetch_bucket_size": LAYER,
        "stage3_max_live_parameters": 4 * LAYER,
        "stage3_param_persistence_threshold": 100_000_000,
        "stage3_model_persistence_threshold": 10**12,
    },
    "two layers ahead": {
        "stage3_prefetch_bucket_size": 2 * LAYER,
        "stage3_max_live_parameters": 7 * LAYER,
        "stage3_param_persistence_threshold": 0,
    },
    "one matrix ahead": {
        "stage3_prefetch_bucket_size": MATRIX,
        "stage3_max_live_parameters": 2 * LAYER,
        "stage3_param_persistence_threshold": 0,
    },
}
PARTS = ("djinn", "coded", "chunks", "deepspeed", "accelerate", "rings", "trace")
HOST_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def base_profile() -> Profile:
    """Return the profile that every lane changes in one respect."""
    return load_profile("virt_mem_h100").override(
        title="Llama-2-70B cut to 16 layers over PCIe", model=MODEL, budget=f"{NONE_RESIDENT} B", host_memory="30 GB"
    )


def lanes(part: str, base: Profile) -> list[Lane]:
    """Return the lanes of a part."""

    def ours(variant: str, **changes: Any) -> Lane:
        return Lane(system="djinn", variant=variant, profile=base.override(**changes))

    short = {"new_tokens": 4, "runs": 2}
    if part == "djinn":
        return [
            ours("no layer resident"),
            ours("24 GB", budget=f"{PAPER_BUDGET} B"),
            ours("24 GB, ring 20 GB", budget=f"{PAPER_BUDGET} B", ring="20 GB"),
        ]
    if part == "coded":
        room = NONE_RESIDENT + 2 * MATRIX  # for the scratch that matrices are decoded into
        return [
            ours("coded, no layer resident", budget=f"{room} B", coding="lossless"),
            ours("coded, 24 GB", budget=f"{PAPER_BUDGET} B", coding="lossless"),
        ]
    if part == "chunks":
        sizes = ("4 MiB", "16 MiB", "64 MiB")
        return [ours(f"chunk={size}", chunk=size, **short) for size in sizes]
    if part == "rings":
        sizes_mb = (500, 6000)
        return [
            ours(f"ring={size} MB", ring=f"{size} MB", budget=f"{BASE_BYTES + size * 10**6} B", **short)
            for size in sizes_mb
        ]
    if part == "deepspeed":
        roomy = base.override(budget=f"{PAPER_BUDGET} B", runs=2, new_tokens=8)
        return [
            Lane(system="deepspeed", target="cpu", variant=f"cpu, {name}", tuning=tuple(tuning.items()), profile=roomy)
            for name, tuning in GRID.items()
        ]
    slow = base.override(**short | {"warmups": 0})
    return [Lane(system="accelerate", target=target, variant=target, profile=slow) for target in ("cpu", "cpu-pinned")]


def measure(part: str, base: Profile, run_dir: Path) -> list[Record]:
    """Run the lanes of a part and return every record so far."""
    records: list[Record] = []
    for lane in lanes(part, base):
        with Bench("benchmark", base, run_dir, keep=False) as bench:
            records = bench.measure([lane], runs=lane.profile.runs, order="by lane")
    return records


def report(records: list[Record]) -> None:
    """Print a line per lane: medians over its runs, and over its tokens after the first."""
    by_label: dict[str, list[Record]] = {}
    for record in records:
        if record.status == "ok":
            by_label.setdefault(f"{record.system}: {record.variant}", []).append(record)
    for label, runs in by_label.items():
        used = statistics.median(run.link_utilisation or 0.0 for run in runs)
        rate = statistics.median(run.link_gbps or 0.0 for run in runs)
        first = statistics.median(run.ttft_s or 0.0 for run in runs)
        later = statistics.median(itertools.chain(*(run.per_token_s for run in runs)))
        loaded = runs[0].load_s or 0.0
        print(
            f"{label:<34} link {rate:5.1f} GB/s, {used:.3f} of the ceiling  TTFT {first:.3f} s  {later:.3f} s per token"
            f"  loaded in {loaded:.0f} s  device {(runs[0].peak_device_bytes or 0) / 1e9:.2f} GB"
        )


def trace(base: Profile) -> dict[str, Any]:
    """Return what a profiler sees of four passes, and host time in hooks without the profiler."""
    job = Job(profile=base, variant="", model=MODEL, scratch=Path())
    model = loader("djinn").load(job).model
    stats = djinn.stats(model)
    prompt = torch.arange(5, 5 + base.prompt_tokens, device="cuda")[None]
    greedy = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=2, min_new_tokens=2, **greedy)  # type: ignore[operator]
    hooked, visits = stats.hook_s, stats.visits
    model.generate(prompt, max_new_tokens=8, min_new_tokens=8, **greedy)  # type: ignore[operator]
    per_visit = (stats.hook_s - hooked) / (stats.visits - visits)
    running: list[record_function] = []

    def begin(*_: object) -> None:
        running.append(record_function("djinn: pass"))
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    handles = [model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, torch.no_grad():
        step = model(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            token = step.logits[:, -1:].argmax(-1)
            token.item()  # as generate() does between passes
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
        torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    return {
        "hook_us_per_visit": per_visit * 1e6,
        "prefill": prefill(model, prompt),
        "bare_copies": bare_copies(model),
        **summarise(list(profiler.events() or [])),
    }


def prefill(model: Any, prompt: torch.Tensor) -> dict[str, list[float]]:
    """Return the rate of passes over a whole prompt in a row, GB/s, with the ceiling before and after, three times."""
    stats = djinn.stats(model)
    rates: dict[str, list[float]] = {"ceiling_gbps": [pinned_h2d_rate(64 * 2**20) / 1e9], "link_gbps": []}
    for _ in range(3):
        with torch.no_grad():
            model(prompt, logits_to_keep=1)  # fills the ring and leaves it full, as every pass after it does
            torch.cuda.synchronize()
            start, crossed = time.perf_counter(), stats.link_bytes
            for _ in range(6):
                model(prompt, logits_to_keep=1)
            torch.cuda.synchronize()
        rates["link_gbps"].append((stats.link_bytes - crossed) / (time.perf_counter() - start) / 1e9)
        djinn.cool(model)
        rates["ceiling_gbps"].append(pinned_h2d_rate(64 * 2**20) / 1e9)
    return rates


def bare_copies(model: Any) -> dict[str, Any]:
    """Return the rate of the same copies with no compute beside them, GB/s, and of each unit's the extremes.

    Below the ceiling, which is read from a small buffer, it is where the weights lie in host memory that costs the
    rate: how much of it is in huge pages, and what the host keeps under them.
    """
    copier = engine_of(model).copier
    assert isinstance(copier, CudaCopier)
    djinn.cool(model)
    sizes = [source.unit.image_bytes for source in copier._sources]
    rates = []
    for _ in range(3):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(sizes) + 1)]
        marks[0].record(copier.stream)
        for issue, mark in zip(copier._issue, marks[1:], strict=True):
            assert issue is not None, "every unit is in host memory"
            issue(copier.stream.cuda_stream)
            mark.record(copier.stream)
        torch.cuda.synchronize()
        milliseconds = [early.elapsed_time(late) for early, late in itertools.pairwise(marks)]
        rates.append(sum(sizes) / sum(milliseconds) / 1e6)
    by_unit = [size / each / 1e6 for size, each in zip(sizes, milliseconds, strict=True) if size > 10**8]
    huge = [line.split()[1] for line in Path("/proc/self/smaps").read_text().splitlines() if "AnonHugePages" in line]
    return {
        "gbps": rates,
        "slowest_unit_gbps": min(by_unit),
        "fastest_unit_gbps": max(by_unit),
        "host_bytes": djinn.stats(model).host_bytes,
        "anonymous_huge_page_bytes": 1024 * sum(map(int, huge)),
    }


def summarise(events: list[Any]) -> dict[str, Any]:
    """Return counts of driver calls inside and outside of passes, and the copies' busy time and gaps in µs."""
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    passes = [event.time_range for event in host if event.name == "djinn: pass"]
    calls: dict[str, Counter[str]] = {"inside passes": Counter(), "between passes": Counter()}
    spent: Counter[str] = Counter()
    for event in host:
        if event.name.startswith("cuda"):
            inside = any(span.start <= event.time_range.start <= span.end for span in passes)
            calls["inside passes" if inside else "between passes"][event.name] += 1
            spent[event.name] += event.time_range.elapsed_us()
    copies = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and "HtoD" in event.name
        and event.time_range.elapsed_us() > 100
    )
    gaps = sorted((later[0] - early[1] for early, later in itertools.pairwise(copies)), reverse=True)
    return {
        "passes": len(passes),
        "calls": {where: dict(counter) for where, counter in calls.items()},
        "host_us": dict(spent),
        "host_syncs_inside_passes": sum(calls["inside passes"][name] for name in HOST_SYNCS),
        "copies": len(copies),
        "copy_busy_us": sum(end - start for start, end in copies),
        "copy_span_us": copies[-1][1] - copies[0][0] if copies else 0,
        "largest_gaps_us": gaps[:10],
        "gaps_over_20us": sum(gap > 20 for gap in gaps),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    base = base_profile()
    records: list[Record] = []
    for part in options.parts:
        if part == "trace":
            summary = trace(base)
            path = options.run_dir / "results" / "trace.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=2) + "\n")
            print(json.dumps(summary))
        else:
            records = measure(part, base, options.run_dir)
    report(records)


if __name__ == "__main__":
    main()
