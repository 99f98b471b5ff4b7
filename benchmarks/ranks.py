"""One model over one GPU or several, each with its own link: seconds per token, the links, and what sums cost.

    python benchmarks/ranks.py llama-2-70b --budget "24 GB" --coding none lossless
    torchrun --nproc-per-node 2 benchmarks/ranks.py llama-2-70b --budget "24 GB" --coding none lossless

The weights are synthetic. Before and after the runs of each coding every rank copies the same page-locked bytes with
nothing computed beside them, all ranks at once: what the links carry together, bare. A line of JSON for each run, by
the first rank, has every token's seconds and, by rank, the bytes over the link, the waits and the memory. With --check
the model is also resident on the same ranks, and logits of the prompt and tokens are compared bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import djinn
from djinn.bench.measure import timed_tokens
from djinn.bench.rates.link import memcpy_rate, pinned_h2d_rate
from djinn.engine.load import engine_of, placement
from djinn.sizes import parse_bytes
from djinn.weights.resolve import resolve

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = torch.cuda.is_available()
SUM_BYTES = (16 * 2**10, 8 * 2**20)
"""One token's hidden state of a 70B model, and 512 tokens'."""


def settle() -> None:
    """Wait for this rank's device."""
    if ON_GPU:
        torch.cuda.synchronize()


def together(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    if RANKS == 1:
        return [value]
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, value)
    return found


def bare_gbps(model: Any) -> list[float]:
    """Return by rank the rate of copies of the arena itself, all ranks at once, nothing computed beside them.

    Where nothing streams, and on a CPU, it is that of a small buffer.
    """
    djinn.cool(model)
    settle()
    together(None)
    small = pinned_h2d_rate if ON_GPU else memcpy_rate
    return together((engine_of(model).copier.bare_rate() or small(64 * 2**20)) / 1e9)


def sums_s(device: str) -> dict[str, float]:
    """Return the seconds of adding up over all ranks, by bytes: of many in a row, each waited for by the next."""
    found = {}
    for nbytes in SUM_BYTES if RANKS > 1 else ():
        values = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=device)
        for repeats in (5, 50):
            settle()
            begin = time.perf_counter()
            for _ in range(repeats):
                dist.all_reduce(values)
            settle()
            found[str(nbytes)] = (time.perf_counter() - begin) / repeats
    return found


def logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Return the logits of the prompt's last token, on the host."""
    with torch.no_grad():
        found: torch.Tensor = model(prompt, logits_to_keep=1).logits.cpu()
    return found


def driver_bytes() -> int:
    """Return the device memory that this rank's driver and libraries hold beside torch's allocator."""
    if not ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def host_bytes() -> int:
    """Return the host memory that this rank has to itself, page-locked included."""
    return int(psutil.Process().memory_full_info().uss)


def measure(coding: str, options: argparse.Namespace) -> list[tuple[torch.Tensor, list[int]]]:
    """Load and generate; write a record for each run; return its logits and tokens."""
    work = {"prompt_tokens": options.prompt, "new_tokens": options.new_tokens, "batch": 1}
    split = {"distributed_config": DistributedConfig(tp_plan="auto")} if RANKS > 1 else {}
    device = "cuda" if ON_GPU else "cpu"
    begin = time.perf_counter()
    model: Any = djinn.load(
        options.source, budget=parse_bytes(options.budget), device=device, host_memory=options.host_memory,
        coding=coding, trace=options.trace, **work, **split,
    )  # fmt: skip
    load_s = time.perf_counter() - begin
    planned = placement(model)
    prompt = torch.randint(10, 200, (1, options.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    shared = {
        "model": options.model, "coding": coding, "ranks": RANKS, "prompt": options.prompt, "budget": options.budget,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu", "torch": torch.__version__, "load_s": load_s,
        "resident_bytes": together(planned.resident_bytes), "pinned_bytes": together(planned.pinned_bytes),
        "host_bytes": together(host_bytes()), "sums_s": sums_s(device), "bare_gbps_before": bare_gbps(model),
    }  # fmt: skip
    djinn.cool(model)
    timed_tokens(model, prompt, options.new_tokens)  # torch's allocator meets every length of the cache once
    made = []
    for run in range(options.runs):
        djinn.cool(model)
        before = vars(djinn.stats(model)).copy()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        settle()
        times, tokens = timed_tokens(model, prompt, options.new_tokens)
        after = vars(djinn.stats(model))
        peak = torch.cuda.max_memory_reserved() if ON_GPU else 0
        memory = {"peak_reserved": peak, "driver_bytes": driver_bytes()}
        moved = {key: after[key] - before[key] for key in ("link_bytes", "stall_s", "hook_s", "skips", "reloads")}
        record = {
            **shared, "run": run, "times": times, "tokens": tokens, "ttft_s": times[0],
            "token_s": statistics.median(times[1:]), "by_rank": together({**moved, **memory}),
        }  # fmt: skip
        made.append((logits(model, prompt), tokens))
        write(record | ({"bare_gbps_after": bare_gbps(model)} if run == options.runs - 1 else {}), options)
        djinn.cool(model)
    if options.trace:
        for rank, timeline in enumerate(together([vars(each) for each in djinn.stats(model).timeline])):
            if RANK == 0:
                path = options.output.with_name(f"{options.output.stem}_{coding}_timeline_{rank}.jsonl")
                path.write_text("".join(json.dumps(each) + "\n" for each in timeline))
    return made


def write(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a record and show what matters of it, in the first rank."""
    if RANK == 0:
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        links = [each["link_bytes"] / sum(record["times"]) / 1e9 for each in record["by_rank"]]
        shown = {key: record.get(key) for key in ("coding", "ranks", "ttft_s", "token_s", "bare_gbps_before", "sums_s")}
        print(json.dumps(shown | {"link_gbps": links}), flush=True)


def check(options: argparse.Namespace, made: list[tuple[torch.Tensor, list[int]]]) -> None:
    """Compare with the model that is resident on the same ranks."""
    split = {"distributed_config": DistributedConfig(tp_plan="auto")} if RANKS > 1 else {}
    device = "cuda" if ON_GPU else "cpu"
    if RANK == 0:
        resolve(options.source)  # once: it is written there
    together(None)
    whole: Any = AutoModelForCausalLM.from_pretrained(resolve(options.source), dtype="auto", **split).eval()
    if RANKS == 1:
        whole.to(device)
    prompt = torch.randint(10, 200, (1, options.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    times, tokens = timed_tokens(whole, prompt, options.new_tokens)
    wanted = logits(whole, prompt)
    equal = together(all(tokens == each and torch.equal(wanted, found) for found, each in made))
    if RANK == 0:
        record = {
            "model": options.model,
            "ranks": RANKS,
            "resident_token_s": statistics.median(times[1:]),
            "equal": equal,
        }
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A name of data/architectures.")
    parser.add_argument("--budget", default="24 GB", help="Of each GPU.")
    parser.add_argument("--host-memory", default=None, help="Of all ranks together.")
    parser.add_argument("--coding", nargs="+", default=["none"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trace", action="store_true", help="Keep timelines of all ranks.")
    parser.add_argument("--check", action="store_true", help="Compare with the resident model: it has to fit.")
    parser.add_argument("--output", type=Path, default=Path("ranks.jsonl"))
    options = parser.parse_args()
    options.source = f"synthetic:{options.model}"
    torch.backends.cuda.enable_cudnn_sdp(False)  # its results differ from run to run on an H100
    made = []
    for coding in options.coding:
        made += measure(coding, options)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    if options.check:
        check(options, made)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
