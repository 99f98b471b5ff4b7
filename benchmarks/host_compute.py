"""The host's cores beside the link on one GPU: seconds per token with them and without, and how close outputs are.

    python benchmarks/host_compute.py llama-2-70b-16-layers --budget "3.5 GB" --coding none lossless --runs 5

The weights are synthetic. The exact mode and the host mode are loaded one after the other, never both at once, because
there may be no room for two models. Each run begins with an empty ring. A line of JSON for each run has the seconds of
the first token and of every other, what the link carried and the cores computed in decode steps, what the plan
predicted, and how far the tokens are those of the exact mode. ``logits_differ`` is the largest difference of a logit up
to the first token that differs, and ``logits_are`` the largest logit there.

The rates that the plan needs are measured first, as ``djinn certify`` does; ``--link-gbps`` and ``--cores-gbps`` give
others.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import djinn
from djinn.bench.measure import TokenTimes, prompt_ids
from djinn.bench.rates import compute, streaming
from djinn.bench.rates.link import pinned_h2d_rate
from djinn.bench.systems.common import deterministic_attention
from djinn.engine.load import engine_of, load_requested, placement
from djinn.errors import UnavailableError
from djinn.host import rates as host
from djinn.host.cores import choose_cpus
from djinn.planning.host import HostCompute, HostRates, assumed_rates
from djinn.planning.prediction import predict
from djinn.planning.rates import Rates
from djinn.planning.request import Request
from djinn.planning.work import work_of
from djinn.planning.workspace import Workload
from djinn.weights.opening import outline_of

COUNTED = ("link_bytes", "host_computed_bytes", "host_s", "host_wait_s", "hook_s", "reloads", "passes", "visits")


def requested(options: argparse.Namespace, coding: str, computing: HostCompute | None) -> Request:
    """Return the request of one mode."""
    request = Request.of(
        budget=options.budget,
        keep=Workload(prompt_tokens=options.prompt, new_tokens=options.new_tokens, batch=1),
        device=options.device,
        host_memory=options.host_memory,
        ring=options.ring,
        chunk=options.chunk,
        coding=coding,  # type: ignore[arg-type]
    )
    return replace(request, host=computing)


def host_compute(options: argparse.Namespace, known: Rates) -> HostCompute:
    """Return what is asked of the cores, with the rates that were given, or are measured; on a CPU they are assumed."""
    rates: HostRates | None
    if options.link_gbps and options.cores_gbps:
        rates = HostRates(link=options.link_gbps * 1e9, cores=options.cores_gbps * 1e9)
    elif options.device == "cpu":
        rates = assumed_rates(len(choose_cpus(options.threads)))
    else:
        cores = host.measure(torch.device("cuda"))
        print(cores.model_dump_json(), flush=True)
        rates = cores.added_to(known).host
    return HostCompute(threads=options.threads, rates=rates)


def device_rates(device: str) -> Rates:
    """Return what the device computes, what streaming costs beside copies, and the link's rate alone."""
    computed, streamed = compute.measure(torch.device(device)), streaming.measure(torch.device(device))
    link = pinned_h2d_rate(64 * 2**20) if device == "cuda" else 1e9
    return streamed.beside(replace(computed.rates_with(link=link, disk=None), device="cuda"))


def predicted(model: Any, rates: Rates) -> dict[str, float | None]:
    """Return what the plan of a loaded model promises with these rates."""
    planned = placement(model)
    once = Workload(prompt_tokens=1, new_tokens=1, batch=1)
    work = work_of(outline_of(model.name_or_path, Path(), model.device), planned.units, once)
    try:
        times = predict(planned, rates, work)
    except UnavailableError:
        return {"predicted_token_s": None}
    parts = {name: getattr(times, name) for name in ("link_s", "cores_s", "compute_s", "host_s")}
    return {"predicted_token_s": times.token_s, **parts}


def generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[list[float], dict[str, float], Any]:
    """Generate greedily from an empty ring; return each token's seconds, what decode steps moved, and the output."""
    djinn.cool(model)
    if prompt.is_cuda:
        torch.cuda.synchronize()

    class Clock(TokenTimes):
        """Also notes what streaming had done when the first token was there."""

        def __init__(self) -> None:
            super().__init__()
            self.first: dict[str, float] = {}

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **rest: Any) -> torch.Tensor:
            done = super().__call__(input_ids, scores, **rest)
            if len(self.stamps) == 1:
                self.first = counts(model)
            return done

    clock = Clock()
    begin = time.perf_counter()
    with torch.no_grad():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, stopping_criteria=[clock], pad_token_id=0, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    stamps = [begin, *clock.stamps]
    times = [late - early for early, late in itertools.pairwise(stamps)]
    moved = {name: value - clock.first[name] for name, value in counts(model).items()}
    return times, moved, made


def counts(model: Any) -> dict[str, float]:
    """Return the totals of a model so far."""
    stats = djinn.stats(model)
    return {name: getattr(stats, name) for name in COUNTED}


def agreement(tokens: list[int], logits: torch.Tensor, exact: tuple[list[int], torch.Tensor]) -> dict[str, Any]:
    """Return how far ``tokens`` and ``logits`` ([steps, vocabulary], float32) are those of the exact mode."""
    equal = next((n for n, (one, other) in enumerate(zip(tokens, exact[0], strict=True)) if one != other), len(tokens))
    same_inputs = slice(0, equal + 1)
    differ = (logits[same_inputs] - exact[1][same_inputs]).abs()
    return {
        "tokens_equal": equal,
        "first_logits_equal": bool(torch.equal(logits[0], exact[1][0])),
        "logits_differ": differ.max().item(),
        "logits_are": exact[1][same_inputs].abs().max().item(),
    }


def measure(options: argparse.Namespace, coding: str, computing: HostCompute | None, exact: Any, rates: Rates) -> Any:
    """Load one mode, generate, print a line for each run; return its tokens and logits."""
    name = f"synthetic:{options.model}"
    begin = time.perf_counter()
    model: Any = load_requested(name, requested(options, coding, computing))
    model.name_or_path = name
    planned, stats = placement(model), djinn.stats(model)
    shared = {
        "model": options.model, "mode": "host" if computing is not None else "exact", "coding": coding,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)), "torch": torch.__version__, "budget": planned.budget,
        "load_s": time.perf_counter() - begin, "page_locked": stats.page_locked,
        "link_alone_gbps": (rates.link or 0.0) / 1e9, "decode_gbps": (rates.decode or 0.0) / 1e9,
        "resident_bytes": planned.resident_bytes, "pinned_bytes": planned.pinned_bytes,
        "disk_bytes": planned.disk_bytes, "ring_bytes": planned.ring_bytes, "prompt": options.prompt,
        **predicted(model, rates),
    }  # fmt: skip
    if planned.host is not None:
        together, host_units = planned.host.rates, engine_of(model).host
        shared |= {
            "host_units": len(planned.host.units), "planned_link_gbps": together.link / 1e9,
            "planned_cores_gbps": together.cores / 1e9, "rates_assumed": together.assumed,
            "kernel": host_units.products.name, "threads": host_units.products.threads,
        }  # fmt: skip
    prompt = prompt_ids(model.config, batch=1, tokens=options.prompt, seed=0).to(model.device)
    generate(model, prompt, 3)  # what only a first pass compiles and allocates
    for run in range(options.runs):
        times, moved, made = generate(model, prompt, options.new_tokens)
        tokens = made.sequences[0, options.prompt :].tolist()
        logits = torch.stack(made.logits)[:, 0].float().cpu()
        decode_s = sum(times[1:])
        record = {
            **shared, "run": run, "ttft_s": times[0], "token_s": statistics.median(times[1:]),
            "per_token_s": times[1:], "link_gbps": moved["link_bytes"] / decode_s / 1e9,
            "cores_gbps": moved["host_computed_bytes"] / decode_s / 1e9,
            "cores_busy_gbps": moved["host_computed_bytes"] / moved["host_s"] / 1e9 if moved["host_s"] else None,
            **{f"decode_{name}": value for name, value in moved.items()}, "tokens": tokens,
            **(agreement(tokens, logits, exact) if exact is not None else {}),
        }  # fmt: skip
        print(json.dumps(record), flush=True)
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return tokens, logits


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", default="24 GB")
    parser.add_argument("--host-memory", default=None)
    parser.add_argument("--ring", default=None)
    parser.add_argument("--chunk", default="64 MiB", help="Size of one copy command.")
    parser.add_argument("--coding", nargs="+", default=["none"], choices=["none", "lossless"])
    parser.add_argument("--modes", nargs="+", default=["exact", "host"], choices=["exact", "host"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--link-gbps", type=float, default=None, help="Of the link while the cores compute.")
    parser.add_argument("--cores-gbps", type=float, default=None, help="Of the cores while the link is busy.")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out: its times say nothing.")
    parser.add_argument("--output", type=Path, default=Path("host_compute.jsonl"))
    options = parser.parse_args()
    deterministic_attention()
    exact = None
    rates = device_rates(options.device)
    asked = host_compute(options, rates) if "host" in options.modes else None
    for coding in options.coding:
        for mode in options.modes:
            found = measure(options, coding, asked if mode == "host" else None, exact, rates)
            exact = exact or (found if mode == "exact" else None)  # coded or not, its bits are the same
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
