"""That streaming changes no bit at full width: logits of every step, streamed, coded and resident, on one GPU.

    python benchmarks/exact_at_size.py [--model synthetic:llama-2-70b-16-layers] [--output exact.json]

A prompt of 512 tokens, then greedy decode steps. Streamed raw, streamed coded with nothing but embeddings staying, and
streamed coded with half of the layers staying coded on the device; each against the same model wholly on the device,
as ``djinn.detach`` gives it back and ``.to("cuda")`` moves it. The device has to hold the whole model.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

import djinn
from djinn.bench.systems.common import deterministic_attention

PROMPT_TOKENS, STEPS = 512, 16
MODES: dict[str, tuple[float, str]] = {
    "raw": (0.15, "none"),
    "coded": (0.15, "lossless"),
    "coded half": (0.45, "lossless"),
}
"""Share of the raw weights that the budget holds besides the workspace, and coding."""


def steps(model: Any) -> list[torch.Tensor]:
    """Return the logits, float on the host, [batch, vocabulary], of the prefill and of each greedy step after it."""
    prompt = torch.arange(5, 5 + PROMPT_TOKENS, device="cuda")[None]
    found = []
    with torch.no_grad():
        step = model(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(STEPS):
            found.append(step.logits[:, -1].cpu())
            token = step.logits[:, -1:].argmax(-1)
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
    return found


def main() -> None:
    """Compare, print, write; exit with 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-2-70b-16-layers")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    deterministic_attention()
    work = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": STEPS, "device": "cuda"}
    whole = djinn.plan(options.model, budget="1 TB", host_memory="1 TB", **work)
    found: dict[str, list[torch.Tensor]] = {}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "model": options.model,
        "model_bytes": whole.model_bytes,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": STEPS,
        "modes": {},
    }
    for mode, (share, coding) in MODES.items():
        budget = whole.workspace_bytes + round(share * whole.model_bytes)
        model = djinn.load(options.model, budget=budget, host_memory="100 GB", coding=coding, **work)
        found[mode] = steps(model)
        stats = djinn.stats(model)
        result["modes"][mode] = {
            "device_bytes": stats.resident_bytes + stats.ring_bytes,
            "host_bytes": stats.host_bytes,
            "link_bytes": stats.link_bytes,
            "reloads": stats.reloads,
        }
        if mode != list(MODES)[-1]:
            del model
            gc.collect()
            torch.cuda.empty_cache()
    resident = steps(djinn.detach(model).to("cuda"))
    for mode, logits in found.items():
        result["modes"][mode]["equal_steps"] = sum(map(torch.equal, logits, resident))
    result["distinct_tokens"] = len({int(logits.argmax()) for logits in resident})
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    if any(mode["equal_steps"] != STEPS for mode in result["modes"].values()):
        sys.exit("logits differ from the resident model's")


if __name__ == "__main__":
    main()
