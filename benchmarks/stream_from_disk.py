"""How close streaming from disk comes to the disk, and how it compares: ratios within one run, systems taking turns.

    python benchmarks/stream_from_disk.py --run-dir artifact/runs/benchmark [--profile smoke_13b] [--runs 3]

Every run drops the page cache and empties the ring. Records go to RUN_DIR/results/benchmark.jsonl; the same command
resumes. Prints, from the records:

- djinn's time per pass against the better of the baselines, run by run;
- the same model with more host memory: time per pass against the share of the weights that is still read from disk.

Then, in this process, raw direct reads and streamed passes of the same number of bytes take turns, because a virtual
disk may drift by half within a minute. Samples go to RUN_DIR/results/beside_raw.json; prints what a pass reads per
second ÷ the mean of the raw rates before and after it, the share of the pass in which compute waited for the disk
(little waiting means that compute is the limit, not the disk), and the share of host time in hooks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import djinn
from djinn.bench.harness import Bench, Lane
from djinn.bench.measure import drop_pages
from djinn.bench.rates.disk import read_rate
from djinn.bench.records import Record
from djinn.bench.systems import loader
from djinn.bench.systems.base import Job
from djinn.profiles import Profile, load_profile
from djinn.weights.resolve import resolve

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


def beside_raw(profile: Profile, path: Path, pairs: int) -> list[dict[str, float]]:
    """Return one sample per streamed pass, each between two raw reads of as many bytes; also written to ``path``."""
    job = Job(profile=profile, variant="", model=str(resolve(profile.model)), scratch=Path())
    model = loader("djinn").load(job).model
    stats = djinn.stats(model)
    files = sorted(Path(job.model).glob("*.safetensors"))
    prompt = torch.arange(5, 5 + profile.prompt_tokens)[None]
    samples = []
    before = read_rate(files, stats.disk_bytes, profile.chunk)
    for _ in range(pairs):
        djinn.cool(model)
        drop_pages(files)
        read, stalled, hooked = stats.disk_read_bytes, stats.stall_s, stats.hook_s
        start = time.perf_counter()
        with torch.no_grad():
            model(prompt, logits_to_keep=1)
        pass_s = time.perf_counter() - start
        djinn.cool(model)  # ends what it has begun to read for a next pass
        after = read_rate(files, stats.disk_bytes, profile.chunk)
        sample = {
            "pass_s": pass_s,
            "disk_bytes": stats.disk_bytes,
            "submitted_bytes": stats.disk_read_bytes - read,
            "raw_before": before,
            "raw_after": after,
            "stall_s": stats.stall_s - stalled,
            "hook_s": stats.hook_s - hooked,
        }
        print(
            f"pass {pass_s:.1f} s, {stats.disk_bytes / pass_s / 1e9:.2f} GB/s from disk, raw {before / 1e9:.2f} before "
            f"and {after / 1e9:.2f} after, waited {sample['stall_s'] / pass_s:.0%}"
        )
        samples.append(sample)
        path.write_text(json.dumps(samples, indent=1) + "\n")
        before = after
    return samples


def report(records: dict[str, list[Record]]) -> None:
    """Print the ratios."""
    for label, runs in records.items():
        times = ", ".join(f"{pass_s(run):.1f}" for run in runs)
        memory = max(run.peak_anon_bytes or 0 for run in runs) / 1e9
        print(f"{label:<28} s per pass {times:<20} anonymous memory {memory:.1f} GB")
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
    parser.add_argument("--pairs", type=int, default=6, help="passes between raw reads")
    options = parser.parse_args()
    profile = load_profile(options.profile).override(runs=options.runs)
    report(measure(profile, options.run_dir))
    frugal = profile.override(host_memory=next(iter(HOST_MEMORY.values())))
    samples = beside_raw(frugal, options.run_dir / "results" / "beside_raw.json", options.pairs)
    of_raw = [2 * s["disk_bytes"] / s["pass_s"] / (s["raw_before"] + s["raw_after"]) for s in samples]
    waited = [s["stall_s"] / s["pass_s"] for s in samples]
    hooked = [s["hook_s"] / s["pass_s"] for s in samples]
    print(f"bytes read ÷ pass time ÷ raw rate: median {statistics.median(of_raw):.2f} of {len(samples)} passes")
    print(f"share of a pass that compute waited for the disk: median {statistics.median(waited):.0%}")
    print(f"host time in hooks: median {statistics.median(hooked):.2%} of a pass")


if __name__ == "__main__":
    main()
