"""Mixtures of experts on one GPU: whole layers, routed, coded, all in the pool, resident; the same tokens from all.

``host`` is routed, with the host's cores computing a part of the experts that the pool lacks: its tokens are close.

    python benchmarks/experts.py qwen3-30b-a3b --budget "24 GB" "40 GB" --modes whole routed coded

The weights are synthetic, and what their routers pick says nothing of trained ones: greedy decoding soon repeats a
token, and so its experts. ``--steer 0,0 0.3,0.7`` therefore also steers them, for single tokens, by a seeded process
of a stated reuse probability and Zipf exponent (djinn.bench.steering); 0,0 picks evenly, the worst case of a pool. A
line of JSON for each run has every token's seconds, what crossed the link, hits, and waits.

Times of one and the same work differ by up to 1.8x within minutes where hosts are shared. ``--in-turns`` loads all
modes at once, on the ``--gpus`` in turn, and lets each run go from one mode to the next.

    python benchmarks/experts.py any --draw data/benchmarks/experts_h100_2026-11-27/*.jsonl --output experts
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import djinn
from djinn.bench.measure import timed_tokens
from djinn.bench.steering import SteeredRouting
from djinn.engine.experts import Experts
from djinn.engine.load import engine_of, placement
from djinn.figures.draw import save
from djinn.figures.experts import draw, read
from djinn.sizes import parse_bytes
from djinn.transport.fetcher import Arrival

COUNTED = (
    "link_bytes", "expert_hits", "expert_misses", "expert_computed", "routed_layers", "whole_layers", "index_wait_s",
    "hook_s", "host_computed_bytes", "host_s", "host_wait_s",
)  # fmt: skip


def bare_gbps(experts: Experts) -> float:
    """Return the rate at which randomly chosen experts come, one call's copies behind the other's."""
    chance = random.Random(0)
    sources = [source for layer in experts._layers for source in layer.sources if source.image is not None]
    slots = range(min(experts._cache.slots, 64))
    arrivals = [Arrival(source, slots[n % len(slots)]) for n, source in enumerate(chance.sample(sources, 200))]
    begin = experts.fetcher.clock()
    for start in range(0, len(arrivals), 8):
        experts.fetcher.wait(experts.fetcher.fetch(arrivals[start : start + 8], []))
    seconds = experts.fetcher.clock() - begin
    experts.cool()
    return sum(arrival.source.unit.weight_bytes for arrival in arrivals) / seconds / 1e9


def write(record: dict[str, Any], output: Path) -> None:
    """Append a record."""
    with output.open("a") as file:
        file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Loaded:
    """A model in one mode, and what all its records say."""

    mode: str
    model: Any
    shared: dict[str, Any]
    zero: Any
    """What its fetcher needs to keep a timeline, which it does not while times count."""

    @property
    def experts(self) -> Experts | None:
        """What fetches its experts; None of a resident one."""
        return engine_of(self.model).experts


def load(mode: str, asked: str, device: str, options: argparse.Namespace) -> Loaded:
    """Load in one mode and budget, on one GPU."""
    work = {"prompt_tokens": options.prompt, "new_tokens": options.new_tokens, "batch": 1}
    budget = parse_bytes("200 GB" if mode == "resident" else asked)
    name = f"synthetic:{options.model}"
    if mode == "pool":
        whole = djinn.plan(name, budget=parse_bytes("1 TB"), device=device, host_memory="2 TB", **work)
        budget = whole.device_bytes - whole.model_bytes // 1000
    begin = time.perf_counter()
    model: Any = djinn.load(
        name, budget=budget, device=device, host_memory=options.host_memory, trace=mode in ("routed", "coded"),
        experts="whole" if mode == "whole" else "routed", coding="lossless" if mode == "coded" else None,
        host_compute=mode == "host", **work,
    )  # fmt: skip
    loaded = time.perf_counter() - begin
    planned, experts, zero = placement(model), engine_of(model).experts, None
    if experts is not None:
        zero, experts.fetcher._zero = getattr(experts.fetcher, "_zero", None), None  # type: ignore[attr-defined]
    shared = {
        "model": options.model, "mode": mode, "gpu": device, "device": torch.cuda.get_device_name(device),
        "budget": budget, "load_s": loaded, "pool_slots": planned.pool.slots, "experts": planned.pool.experts,
        "slot_bytes": planned.pool.slot_bytes, "host_bytes": planned.pinned_bytes, "torch": torch.__version__,
        "in_turns": options.in_turns, "bare_gbps": bare_gbps(experts) if experts else None,
        "whole_from": experts and experts._whole_from,
    }  # fmt: skip
    return Loaded(mode, model, shared, zero)


def measure(group: Sequence[Loaded], options: argparse.Namespace) -> None:
    """Generate, one model of the group after the other in every run; write a record for each run of each steering."""
    prompt = torch.randint(10, 20000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    for steer in [None, *options.steer]:
        for run in range(-1, options.runs):  # the first one only warms up
            for each in group:
                record = generate(each, prompt.to(each.model.device), steer, run, options)
                if run >= 0:
                    write(record, options.output)
    for each in group:
        if each.experts is not None and each.zero is not None:
            each.experts.fetcher._zero = each.zero  # type: ignore[attr-defined]
            write(traced(each, each.experts, prompt.to(each.model.device)), options.output)


def generate(
    loaded: Loaded, prompt: torch.Tensor, steer: str | None, run: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Generate once; return the record."""
    model, new_tokens = loaded.model, options.new_tokens if run >= 0 else min(options.new_tokens, 8)
    reuse, zipf = map(float, steer.split(",")) if steer else (0.0, 0.0)
    with SteeredRouting(model, reuse=reuse, zipf=zipf, seed=run + 1) if steer else nullcontext():
        before = vars(djinn.stats(model)).copy()
        torch.cuda.reset_peak_memory_stats(model.device)
        times, tokens = timed_tokens(model, prompt, new_tokens)
    moved = {key: vars(djinn.stats(model))[key] - before[key] for key in COUNTED}
    record = {
        **loaded.shared, "steer": steer, "run": run, "times": times, "tokens": tokens,
        "token_s": statistics.median(times[1:]), "peak_reserved": torch.cuda.max_memory_reserved(model.device), **moved,
    }  # fmt: skip
    shown = ("mode", "steer", "run", "token_s", "bare_gbps", "peak_reserved", *moved)
    print(json.dumps({key: record[key] for key in shown} | {"ttft": times[0]}), flush=True)
    return record


def traced(loaded: Loaded, experts: Experts, prompt: torch.Tensor) -> dict[str, Any]:
    """Generate with a timeline; return the record of how fast experts came while they came."""
    model = loaded.model
    first = len(djinn.stats(model).timeline)
    timed_tokens(model, prompt, 8)
    copies = [each for each in djinn.stats(model).timeline[first:] if each.lane == "copy"]
    copies = copies[len(experts._layers) :]
    busy = sum(copy.end_s - copy.start_s for copy in copies)
    found = {
        **loaded.shared,
        "traced_copy_gbps": sum(copy.nbytes for copy in copies) / max(busy, 1e-9) / 1e9,
        "busy_s": busy,
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", nargs="+", default=["24 GB"])
    parser.add_argument("--host-memory", default=None)
    parser.add_argument("--modes", nargs="+", default=["whole", "routed"])
    parser.add_argument("--steer", nargs="*", default=[])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--in-turns", action="store_true", help="Load all modes at once; runs go from one to the next.")
    parser.add_argument("--gpus", nargs="+", default=["cuda"], help="Where modes are loaded, one after the other.")
    parser.add_argument("--output", type=Path, default=Path("experts.jsonl"))
    parser.add_argument("--draw", nargs="+", type=Path, help="Draw these records beside --output; measure nothing.")
    options = parser.parse_args()
    if options.draw:
        runs = read(options.draw)
        save(draw(runs), runs, options.output.with_suffix(""))
        return
    asked = [
        (mode, budget)
        for mode in options.modes
        for budget in (options.budget if mode in ("whole", "routed", "coded", "host") else options.budget[:1])
    ]
    gpus = options.gpus
    for group in [asked] if options.in_turns else [[one] for one in asked]:
        measure([load(*one, gpu, options) for one, gpu in zip(group, itertools.cycle(gpus))], options)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
