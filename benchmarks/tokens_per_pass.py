"""How many tokens one pass over the weights gives, with and without prompt lookup, on a repetitive prompt.

    python benchmarks/tokens_per_pass.py [--model synthetic:llama-tiny] [--budget "5 MB"] [--output tokens.json]

Prompt lookup guesses the next tokens from an earlier place of the text that ends alike, and one pass verifies them all.
Where passes take as long as the link, tokens per pass is by how much it is faster. How many guesses are right is the
model's and the text's doing: synthetic weights do not copy a prompt as trained ones do, but soon repeat themselves.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import djinn

PHRASE, REPEATS = 12, 8
"""Tokens of the phrase that the prompt repeats, and how often."""


def main() -> None:
    """Generate once for each number of guesses, greedily; print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-tiny")
    parser.add_argument("--budget", default="5 MB")
    parser.add_argument("--device")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--guesses", type=int, nargs="+", default=[0, 2, 5, 10])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = {"prompt_tokens": PHRASE * REPEATS, "new_tokens": options.new_tokens, "device": options.device}
    model: Any = djinn.load(options.model, budget=options.budget, **work)
    vocabulary = model.config.get_text_config().vocab_size
    phrase = torch.randint(3, vocabulary, (1, PHRASE), generator=torch.Generator().manual_seed(0))
    prompt = phrase.repeat(1, REPEATS).to(model.device)
    stats = djinn.stats(model)
    runs = []
    for guesses in options.guesses:
        passes, link_bytes, start = stats.passes, stats.link_bytes, time.perf_counter()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=options.new_tokens,
            max_new_tokens=options.new_tokens,
            pad_token_id=0,
            prompt_lookup_num_tokens=guesses or None,
        )
        tokens = output[0, prompt.shape[1] :].tolist()
        wall_s = time.perf_counter() - start
        run = {
            "guesses": guesses,
            "new_tokens": len(tokens),
            "passes": stats.passes - passes,
            "link_bytes": stats.link_bytes - link_bytes,
            "wall_s": wall_s,
            "tokens": tokens,
        }
        runs.append(run)
        print(
            f"{guesses} guesses: {len(tokens)} tokens in {run['passes']} passes, "
            f"{len(tokens) / run['passes']:.3g} tokens per pass, {wall_s:.3g} s",
            flush=True,
        )
    result = {
        "model": options.model,
        "device": str(model.device),
        "budget": options.budget,
        "prompt": prompt[0].tolist(),
        "runs": runs,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
