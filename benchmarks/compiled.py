"""Where compiling the layers of a streaming model helps: passes as they are and compiled, in the same process.

    python benchmarks/compiled.py [--model synthetic:llama-2-7b] [--budgets "10 GB" "40 GB"] [--output compiled.json]

``layer.compile()`` fuses what lies between two streamed weights; the graph breaks at each, because djinn moves weights
there. Compiled kernels round otherwise, so the largest difference of the logits is printed beside the times. Weights
are synthetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import djinn

PASSES, WARMUPS = 5, 3


def main() -> None:
    """Measure each budget with each number of tokens; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-2-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budgets", nargs="+", default=["10 GB", "40 GB"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4096])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for budget in options.budgets:
        model: Any = djinn.load(
            options.model, budget=budget, device=options.device, prompt_tokens=max(options.tokens), new_tokens=1
        )
        stats = djinn.stats(model)
        plain = [seconds(model, tokens) for tokens in options.tokens]
        for layer in model.model.layers:
            layer.compile()
        for tokens, (before_s, before) in zip(options.tokens, plain, strict=True):
            after_s, after = seconds(model, tokens)
            row = {
                "budget": budget,
                "streamed_share": 1 - stats.resident_bytes / stats.model_bytes,
                "tokens": tokens,
                "plain_s": before_s,
                "compiled_s": after_s,
                "speedup": statistics.median(before_s) / statistics.median(after_s),
                "largest_difference": (after - before).abs().max().item(),
                "largest_logit": before.abs().max().item(),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        del model, layer  # both hold the memory that the next budget needs
        torch._dynamo.reset()
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


@torch.no_grad()
def seconds(model: Any, tokens: int) -> tuple[list[float], torch.Tensor]:
    """Return the seconds of passes over ``tokens`` tokens, and the last token's logits, float32 of [vocabulary]."""
    ids = torch.arange(5, 5 + tokens, device=model.device)[None] % 30_000
    times = []
    for _ in range(WARMUPS + PASSES):
        begun = time.perf_counter()
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()  # waits for the pass
        times.append(time.perf_counter() - begun)
    return times[WARMUPS:], logits


if __name__ == "__main__":
    main()
