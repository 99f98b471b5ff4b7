"""How far the host mode's outputs are those of the exact mode, for a trained model: tokens, logits, perplexity.

    python benchmarks/trained.py trained
    python benchmarks/host_quality.py trained/smollm2 --budget "195 MB"

Both modes answer a question greedily, in ``--new-tokens`` tokens. Then both read the same passage token by token, as in
decode steps, and say how likely each next token was; perplexity is the exponential of the mean of that, negated.
The same weights in float32, resident, say which rounding is nearer.
A line of JSON has what came of it. Without a GPU the device is the processor, and what is compared are PyTorch's
products with djinn's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from host_compute import agreement
from transformers import AutoModelForCausalLM, AutoTokenizer

import djinn
from djinn.engine.load import engine_of, load_requested
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.request import Request
from djinn.planning.workspace import Workload

QUESTION = "Explain in a few sentences why the sky is blue, and why it is red when the sun sets."
PASSAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
EVEN = HostRates(link=50e9, cores=50e9, wait_s=0.0)
"""Half of what streams is computed by the host: how near outputs are does not depend on how fast they come."""


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after each of ``ids`` ([1, tokens]), read one at a time: float32, [tokens, vocabulary]."""
    cache, found = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            step = model(token, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            found.append(step.logits[0, -1].float().cpu())
    return torch.stack(found)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the perplexity of ``ids`` ([1, tokens]) by the logits ([tokens, vocabulary]) after each of them."""
    likely = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None].cpu())
    return math.exp(-likely.mean().item())


def answer(model: Any, question: dict[str, torch.Tensor], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Return the tokens of a greedy answer, and the logits behind each: float32, [tokens, vocabulary]."""
    made = model.generate(
        **question, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return made.sequences[0, question["input_ids"].shape[1] :].tolist(), torch.cat(made.logits).float().cpu()


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="A trained checkpoint with its tokenizer.")
    parser.add_argument("--budget", default="195 MB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--passage-tokens", type=int, default=256, help=f"Of {PASSAGE.name}.")
    parser.add_argument("--output", type=Path, default=Path("host_quality.jsonl"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    asked = [{"role": "user", "content": QUESTION}]
    question = dict(
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )
    passage = tokenizer(PASSAGE.read_text(), return_tensors="pt").input_ids[:, : options.passage_tokens]
    work = Workload(
        prompt_tokens=question["input_ids"].shape[1],
        new_tokens=max(options.new_tokens, options.passage_tokens),
        batch=1,
    )
    request = Request.of(budget=options.budget, keep=work, device=options.device, host_memory="1 GB", coding="none")
    answers, passages, kernel = [], [], ""
    for computing in (None, HostCompute(rates=EVEN)):
        model = load_requested(options.folder, replace(request, host=computing))
        placed = {name: tensor.to(model.device) for name, tensor in question.items()}
        answers.append(answer(model, placed, options.new_tokens))
        passages.append(read(model, passage.to(model.device)))
        host = engine_of(model).host
        share = djinn.stats(model).host_computed_bytes / max(1, djinn.stats(model).link_bytes)
        kernel = kernel if host is None else host.products.name
        del model
        gc.collect()
    whole = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval().to(options.device)
    truth = read(whole, passage.to(whole.device))
    exact, near = answers
    record = {
        "model": options.folder.name, "device": options.device, "torch": torch.__version__, "kernel": kernel,
        "host_over_link_bytes": share, "new_tokens": options.new_tokens,
        **agreement(*near, exact), "passage_tokens": passage.shape[1],
        "passage_logits_differ": (passages[0] - passages[1]).abs().max().item(),
        "passage_error_exact": (passages[0] - truth).abs().mean().item(),
        "passage_error_host": (passages[1] - truth).abs().mean().item(),
        "perplexity_exact": perplexity(passages[0], passage), "perplexity_host": perplexity(passages[1], passage),
        "perplexity_float32": perplexity(truth, passage),
        "text_exact": tokenizer.decode(exact[0]), "text_host": tokenizer.decode(near[0]),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    with options.output.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
