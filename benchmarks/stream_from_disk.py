"""How close streaming from disk comes to the disk, and how it compares: ratios within one run, systems taking turns.

    python benchmarks/stream_from_disk.py --run-dir artifact/runs/benchmark [--profile smoke_13b] [--runs 3]

Every run drops the page cache, empties the ring and measures the raw direct-read rate right beside itself. Records go
to RUN_DIR/results/benchmark.jsonl; the same command resumes. Prints, from the records:

- what djinn read ÷ (time × raw rate), and its time per pass against the better of the baselines, run by run;
- the same model with more host memory: time per pass against the share of the weights that is still read from disk;
- host time in hooks as a share of a pass, measured in this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import djinn
from djinn.bench.harness import Bench, Lane
from djinn.bench.records import Record
from djinn.bench.systems import loader
from djinn.bench.systems.base import Job
from djinn.config import Profile, load_profile
from djinn.weights.checkpoint import resolve

HOST_MEMORY = {"12 GiB in all": "7 GB", "18 GiB in all": "13.5 GB"}
"""djinn's lanes: host memory that makes so much with the budget of 4.3 GB and the interpreter."""
FRUGAL, ROOMY = (f"djinn:{name}" for name in HOST_MEMORY)


def pass_s(record: Record) -> float:
    """Return the seconds of a pass, averaged over the run's passes."""
    return (record.wall_s or 0.0) / record.new_tokens


def measure(profile: Profile, run_dir: Path) -> dict[str, list[Record]]:
    """Run the lanes in turns and return their good records by label."""
    baselines = [name.split(":") for name in profile.systems if name not in ("djinn", "resident")]
    frugal, roomy = (
        Lane(system="djinn", variant=name, profile=profile.override(host_memory=size))
        for name, size in HOST_MEMORY.items()
    )
    peers = [Lane(system=system, target=target, variant=target, profile=profile) for system, target in baselines]
    with Bench("benchmark", profile, run_dir, keep=True) as bench:
        bench.measure([frugal, *peers], runs=profile.runs, order="by run")
    with Bench("benchmark", profile, run_dir, keep=True) as bench:
        records = bench.measure([roomy], runs=profile.runs, order="by run")
    by_label: dict[str, list[Record]] = {}
    for record in records:
        label = f"{record.system}:{record.variant}" if record.variant else record.system
        if record.status == "ok":
            by_label.setdefault(label, []).append(record)
        else:
            print(f"{label}, run {record.run}: {record.status}: {record.reason}")
    return by_label


def hook_share(profile: Profile) -> float:
    """Return host time in hooks ÷ time of a pass."""
    job = Job(profile=profile.override(new_tokens=2), variant="", model=str(resolve(profile.model)), scratch=Path())
    model = loader("djinn").load(job).model
    stats = djinn.stats(model)
    start = time.perf_counter()
    prompt = torch.arange(5, 5 + profile.prompt_tokens)[None]
    model.generate(prompt, max_new_tokens=2, min_new_tokens=2)  # type: ignore[operator]
    return stats.hook_s / (time.perf_counter() - start)


def report(records: dict[str, list[Record]]) -> None:
    """Print the ratios."""
    for label, runs in records.items():
        times = ", ".join(f"{pass_s(run):.1f}" for run in runs)
        memory = max(run.peak_anon_bytes or 0 for run in runs) / 1e9
        used = ", ".join(f"{run.link_utilisation:.2f}" for run in runs if run.link_utilisation is not None)
        print(f"{label:<28} s per pass {times:<20} of the raw disk rate {used:<20} anonymous memory {memory:.1f} GB")
    ours = {run.run: run for run in records.get(FRUGAL, [])}
    peers = [label for label in records if not label.startswith("djinn")]
    ratios = [
        pass_s(run) / min(pass_s(peer) for label in peers for peer in records[label] if peer.run == number)
        for number, run in ours.items()
        if any(peer.run == number for label in peers for peer in records[label])
    ]
    if ratios:
        print(f"time of a pass ÷ the better baseline's: median {statistics.median(ratios):.2f} of {len(ratios)} runs")
    if ours and ROOMY in records:
        roomy = records[ROOMY]
        time_ratio = statistics.median(map(pass_s, roomy)) / statistics.median(map(pass_s, ours.values()))
        read_ratio = (roomy[0].link_bytes or 0) / (ours[min(ours)].link_bytes or 1)
        print(f"{ROOMY}: {read_ratio:.2f} of the disk bytes of {FRUGAL}, {time_ratio:.2f} of the time of a pass")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smoke_13b")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    profile = load_profile(options.profile).override(runs=options.runs)
    report(measure(profile, options.run_dir))
    print(f"host time in hooks: {hook_share(profile):.2%} of a pass")


if __name__ == "__main__":
    main()
