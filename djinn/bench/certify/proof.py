"""The functional claim, proved on this machine: streamed output equals resident output, bit for bit.

A small synthetic model is run twice on the same device: with all its weights there, and streamed with less than half
of them there. The logits of the prefill and of every decode step, and what ``generate`` returns, have to be equal.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.bench.systems.common import deterministic_attention
from djinn.planning.workspace import Workload, workspace_bytes
from djinn.sizes import Count
from djinn.weights.synthetic_checkpoint import synthesise

MODEL = "llama-tiny"
_DEVICE_SHARE = 0.45
"""Share of the weights for which residents and ring have room."""
_WORK = Workload(prompt_tokens=16, new_tokens=4, batch=2)


class Proof(BaseModel):
    """What was run and what came out. Sizes are bytes; ``device_bytes`` counts residents and ring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    device: str
    model_bytes: Count
    device_bytes: Count
    link_bytes: Count
    steps: int
    """Forward passes whose logits were compared: the prefill and the decode steps."""
    logits_equal: bool
    tokens_equal: bool

    @property
    def holds(self) -> bool:
        """Whether the outputs are equal and the weights really streamed, less than half of them on the device."""
        streamed = self.link_bytes > 0 and self.device_bytes < self.model_bytes / 2
        return streamed and self.logits_equal and self.tokens_equal


def prove(device: Literal["cpu", "cuda"]) -> Proof:
    """Run the small model resident and streamed on ``device`` and compare.

    Raises:
        DjinnError: the small model cannot be made or loaded.
    """
    deterministic_attention()
    with tempfile.TemporaryDirectory(prefix="djinn-proof-") as scratch:
        folder = synthesise(MODEL, Path(scratch) / MODEL, progress=False)
        config = AutoConfig.from_pretrained(folder)
        prompt = torch.randint(
            config.vocab_size, (_WORK.batch, _WORK.prompt_tokens), generator=torch.Generator().manual_seed(0)
        ).to(device)

        resident = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device).eval()
        model_bytes = sum(parameter.nbytes for parameter in resident.parameters())
        expected_logits, expected_tokens = _logits(resident, prompt), _tokens(resident, prompt)
        del resident

        workspace = workspace_bytes(config, torch.bfloat16, torch.device(device), _WORK)
        streamed = djinn.load(
            folder,
            budget=workspace + int(_DEVICE_SHARE * model_bytes),
            device=device,
            chunk="256 KiB",
            prompt_tokens=_WORK.prompt_tokens,
            new_tokens=_WORK.new_tokens,
            batch=_WORK.batch,
        )
        logits, tokens = _logits(streamed, prompt), _tokens(streamed, prompt)
        stats = djinn.stats(streamed)
        return Proof(
            model=f"synthetic:{MODEL}",
            device=device,
            model_bytes=model_bytes,
            device_bytes=stats.resident_bytes + stats.ring_bytes,
            link_bytes=stats.link_bytes,
            steps=len(logits),
            logits_equal=all(map(torch.equal, logits, expected_logits)),
            tokens_equal=torch.equal(tokens, expected_tokens),
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, prompt: Tensor) -> list[Tensor]:
    """Return the logits, [batch, positions, vocabulary], of the prefill and of each greedy decode step."""
    step = model(prompt, use_cache=True)
    found = [step.logits]
    for _ in range(_WORK.new_tokens - 1):
        token = step.logits[:, -1:].argmax(-1)
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
        found.append(step.logits)
    return found


def _tokens(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    mask = torch.ones_like(prompt)
    tokens = model.generate(  # type: ignore[operator]
        prompt, attention_mask=mask, do_sample=False, min_new_tokens=_WORK.new_tokens, max_new_tokens=_WORK.new_tokens
    )
    assert isinstance(tokens, Tensor)
    return tokens
