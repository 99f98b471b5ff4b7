"""Points with one thing changed each: chunk, ring, budget and coding of djinn, batch and prompt of several systems.

The points take turns run by run. They stay loaded all at once where host memory holds them; else each is loaded anew.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from djinn import hardware
from djinn.bench.harness import Bench, Lane, Order
from djinn.bench.pcie import trace
from djinn.bench.records import Record
from djinn.profiles import Profile
from djinn.sizes import exact_bytes

_PROCESS_BYTES = 10**9
"""What Python, torch and transformers take in a worker, generously."""


def run_sweep(profile: Profile, run_dir: Path) -> list[Record]:
    """Measure every point of ``profile.sweep``; append to ``run_dir/results/sweep.jsonl`` and return its records.

    The first run of the point with the profile's own chunk (else of the first point) also writes
    ``results/timeline.jsonl``, an :class:`djinn.transport.stats.Interval` per line, and that of the coded point
    ``results/timeline_coded.jsonl``. Of several GPUs the second one's is ``results/timeline_1.jsonl``, and so on. Where
    there is an NVIDIA GPU, the whole sweep is traced to ``results/pcie.csv``.
    Runs that are already ``ok`` are not repeated.

    Raises:
        ConfigError: another process measures in ``run_dir``.
        DjinnError: the checkpoint cannot be had, or the result file is damaged.
        OSError: ``run_dir`` cannot be written.
    """
    lanes = sweep_lanes(profile, run_dir / "results")
    # Where points take turns, each turn loads the model again, unless all fit in memory at once.
    order: Order = "by run" if profile.interleave else "by lane"
    with Bench("sweep", profile, run_dir, keep=_fit_together(lanes, profile)) as bench:
        missing = bench.missing(lanes, runs=profile.sweep.runs, order=order)
        with trace(run_dir / "results" / "pcie.csv", profile.gpus) if missing else nullcontext():
            return bench.measure(lanes, runs=profile.sweep.runs, order=order)


def sweep_lanes(profile: Profile, results: Path) -> list[Lane]:
    """Return the points in order: chunks, rings, budgets, coded, batches, prompts. Two of djinn's write timelines."""
    sizes = {"chunk": profile.sweep.chunks, "ring": profile.sweep.rings, "budget": profile.sweep.budgets}
    points = [(axis, exact_bytes(size)) for axis, swept in sizes.items() for size in swept]
    own = ("chunk", exact_bytes(profile.chunk))
    timelines = {own if own in points else next(iter(points), None): results / "timeline.jsonl"}
    if profile.sweep.coded:
        points.append(("coding", "lossless"))
        timelines[points[-1]] = results / "timeline_coded.jsonl"
    new_tokens = profile.sweep.new_tokens
    lanes = [
        Lane(
            system="djinn",
            variant=f"{axis}={value}",
            profile=profile.override(**{axis: value, "new_tokens": new_tokens}),
            timeline=timelines.get((axis, value)),
        )
        for axis, value in points
    ]
    counts = {"batch": ("batch", profile.sweep.batches), "prompt": ("prompt_tokens", profile.sweep.prompts)}
    return lanes + [
        _lane_of(name, f"{axis}={count}", profile.override(**{field: count, "new_tokens": new_tokens}))
        for axis, (field, swept) in counts.items()
        for name in profile.sweep.systems or ("djinn",)
        for count in swept
    ]


def _lane_of(name: str, point: str, profile: Profile) -> Lane:
    """Return the lane of any system at a point; the variant of its records names its target too."""
    system, _, target = name.partition(":")
    return Lane(
        system=system,
        target=target,
        variant=f"{target}:{point}" if target else point,
        tuning=profile.tuning(name),
        profile=profile.of(name),
    )


def _fit_together(lanes: list[Lane], profile: Profile) -> bool:
    """Whether half of the free host memory holds every point at once; GPU memory is never shared between points."""
    one = [lane.profile.gpus * (lane.profile.budget + _PROCESS_BYTES) + lane.profile.host_memory for lane in lanes]
    together = sum(one)
    return profile.device == "cpu" and together <= hardware.usable_ram() // 2
