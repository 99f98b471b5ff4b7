"""Mixtures of experts on one GPU: whole layers, routed, coded, all in the pool, resident; the same tokens from all.

``host`` is routed, with the host's cores computing a part of the experts that the pool lacks: its tokens are close.

    python benchmarks/experts.py qwen3-30b-a3b --budget "24 GB" "40 GB" --modes whole routed coded

The weights are synthetic, and what their routers pick says nothing of trained ones: greedy decoding soon repeats a
token, and so its experts. ``--steer 0,0 0.3,0.7`` therefore also steers them, for single tokens, by a seeded process
of a stated reuse probability and Zipf exponent (djinn.bench.steering); 0,0 picks evenly, the worst case of a pool. A
line of JSON for each run has every token's seconds, what crossed the link, hits, and waits.

    python benchmarks/experts.py any --draw data/benchmarks/experts_h100_2026-11-27/*.jsonl --output experts
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from contextlib import nullcontext
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


def measure(mode: str, asked: str, options: argparse.Namespace) -> None:
    """Load in one mode and budget and generate; write a record for each run under each steering."""
    work = {"prompt_tokens": options.prompt, "new_tokens": options.new_tokens, "batch": 1}
    budget = parse_bytes("200 GB" if mode == "resident" else asked)
    name = f"synthetic:{options.model}"
    if mode == "pool":
        whole = djinn.plan(name, budget=parse_bytes("1 TB"), device="cuda", host_memory="2 TB", **work)
        budget = whole.device_bytes - whole.model_bytes // 1000
    begin = time.perf_counter()
    model: Any = djinn.load(
        name, budget=budget, device="cuda", host_memory=options.host_memory, trace=mode in ("routed", "coded"),
        experts="whole" if mode == "whole" else "routed", coding="lossless" if mode == "coded" else None,
        host_compute=mode == "host", **work,
    )  # fmt: skip
    loaded = time.perf_counter() - begin
    planned, experts = placement(model), engine_of(model).experts
    zero = None
    if experts is not None:
        zero, experts.fetcher._zero = getattr(experts.fetcher, "_zero", None), None  # type: ignore[attr-defined]
    prompt = torch.randint(10, 20000, (1, options.prompt), generator=torch.Generator().manual_seed(0)).cuda()
    shared = {
        "model": options.model, "mode": mode, "device": torch.cuda.get_device_name(), "budget": budget,
        "load_s": loaded, "pool_slots": planned.pool.slots, "experts": planned.pool.experts,
        "slot_bytes": planned.pool.slot_bytes, "host_bytes": planned.pinned_bytes, "torch": torch.__version__,
        "bare_gbps": bare_gbps(experts) if experts else None, "whole_from": experts and experts._whole_from,
    }  # fmt: skip
    for steer in [None, *options.steer]:
        reuse, zipf = map(float, steer.split(",")) if steer else (0.0, 0.0)
        with SteeredRouting(model, reuse=reuse, zipf=zipf) if steer else nullcontext():
            timed_tokens(model, prompt, min(options.new_tokens, 8))
            for run in range(options.runs):
                before = vars(djinn.stats(model)).copy()
                torch.cuda.reset_peak_memory_stats()
                times, tokens = timed_tokens(model, prompt, options.new_tokens)
                after = vars(djinn.stats(model))
                moved = {
                    key: after[key] - before[key]
                    for key in ("link_bytes", "expert_hits", "expert_misses", "expert_computed", "routed_layers",
                                "whole_layers", "index_wait_s", "hook_s", "host_computed_bytes", "host_s",
                                "host_wait_s")
                }  # fmt: skip
                record = {
                    **shared, "steer": steer, "run": run, "times": times, "tokens": tokens,
                    "token_s": statistics.median(times[1:]), "peak_reserved": torch.cuda.max_memory_reserved(), **moved,
                }  # fmt: skip
                write(record, options.output)
                shown = ("mode", "steer", "token_s", "bare_gbps", "peak_reserved", *moved)
                print(json.dumps({key: record[key] for key in shown} | {"ttft": times[0]}), flush=True)
    if zero is not None and experts is not None:
        experts.fetcher._zero = zero  # type: ignore[attr-defined]
        first = len(djinn.stats(model).timeline)
        timed_tokens(model, prompt, 8)
        copies = [each for each in djinn.stats(model).timeline[first:] if each.lane == "copy"]
        copies = copies[len(experts._layers) :]
        busy = sum(copy.end_s - copy.start_s for copy in copies)
        traced = {
            **shared,
            "traced_copy_gbps": sum(copy.nbytes for copy in copies) / max(busy, 1e-9) / 1e9,
            "busy_s": busy,
        }
        write(traced, options.output)
        print(json.dumps(traced), flush=True)


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
    parser.add_argument("--output", type=Path, default=Path("experts.jsonl"))
    parser.add_argument("--draw", nargs="+", type=Path, help="Draw these records beside --output; measure nothing.")
    options = parser.parse_args()
    if options.draw:
        runs = read(options.draw)
        save(draw(runs), runs, options.output.with_suffix(""))
        return
    for mode in options.modes:
        for budget in options.budget if mode in ("whole", "routed", "coded", "host") else options.budget[:1]:
            measure(mode, budget, options)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
