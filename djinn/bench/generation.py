"""``djinn generate``: one prompt continued by a streaming model, and how fast, how large and limited by what it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

import djinn
from djinn.bench.link import pinned_h2d_rate
from djinn.bench.measure import MemoryPeak, peak_device
from djinn.devices import device_here
from djinn.engine.limits import cpu_shares, gpu_shares, limit_of
from djinn.engine.planning import Coding
from djinn.engine.predict import Limit
from djinn.errors import ConfigError
from djinn.sizes import parse_bytes
from djinn.weights.checkpoint import resolve


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was generated, and how. Times are seconds from the call of ``generate``, rates 10^9 bytes/s."""

    text: str
    new_tokens: int
    wall_s: float
    tokens_per_s: float
    link_gbps: float
    effective_gbps: float
    """Bytes of weights that the passes consumed, from wherever, over time."""
    stall_s: float
    peak_device_bytes: int
    limit: Limit
    shares: dict[Limit, float]
    """Of the time, by what it was taken by."""


class _DeviceWait(LogitsProcessor):
    """Measures how long the host waits for each pass to end on the device, where it would have to wait anyway."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return ``scores``, float32 of [batch, vocabulary], as they are; see ``transformers.LogitsProcessor``."""
        begun = time.perf_counter()
        torch.cuda.synchronize(scores.device)
        self.seconds += time.perf_counter() - begun
        return scores


class _Pieces(TextStreamer):
    """Hands the generated text on, piece by piece, once later tokens can no longer change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece; see ``transformers.TextStreamer``."""
        self._show(text + "\n" * stream_end)


def generate(
    model: str,
    prompt: str,
    *,
    budget: str,
    new_tokens: int,
    device: str | None = None,
    ring: str | None = None,
    host_memory: str | None = None,
    chunk: str = "64 MiB",
    coding: Coding | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Continue ``prompt``; every other argument is as for :func:`djinn.load`.

    Args:
        temperature: of sampling, seeded by ``seed``; 0 takes the most likely token.
        chat: put the prompt into the tokenizer's chat template, as a user's message.
        show: is given the text piece by piece, as it comes.
        say: is told what is done next, in a few words.

    Raises:
        ConfigError: a chat with a tokenizer that has no template.
        DjinnError: as :func:`djinn.load`.
    """
    where = device_here(device)
    on_gpu = where.type == "cuda"
    peak = MemoryPeak()
    peak.mark_bare()
    say("reading the tokenizer")
    ceiling = pinned_h2d_rate(parse_bytes(chunk)) if on_gpu else 0.0  # before the link carries anything else
    folder = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = _inputs(tokenizer, folder, prompt, chat)
    prompt_tokens = inputs["input_ids"].shape[1]
    say("loading the weights")
    streaming = djinn.load(
        folder,
        budget=budget,
        device=str(where),
        ring=ring,
        host_memory=host_memory,
        chunk=chunk,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        coding=coding,
        trace=not on_gpu,  # events around every unit would slow a GPU; on a CPU they are two clock readings
    )
    say("generating")
    wait = _DeviceWait()
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = streaming.generate(  # type: ignore[operator]
        **{name: tensor.to(where) for name, tensor in inputs.items()},
        max_new_tokens=new_tokens,
        **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
        logits_processor=LogitsProcessorList([wait] if on_gpu else []),
        streamer=_Pieces(tokenizer, show) if show else None,
    )[0, prompt_tokens:]
    wall_s = time.perf_counter() - start
    peak.sample()
    stats = djinn.stats(streaming)
    if on_gpu:
        shares = gpu_shares(stats, wall_s, ceiling=ceiling, device_wait_s=wait.seconds)
    else:
        shares = cpu_shares(stats, wall_s)
    return Generated(
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
        new_tokens=len(ids),
        wall_s=wall_s,
        tokens_per_s=len(ids) / wall_s,
        link_gbps=stats.link_bytes / wall_s / 1e9,
        effective_gbps=stats.passes * stats.model_bytes / wall_s / 1e9,
        stall_s=stats.stall_s,
        peak_device_bytes=peak_device(peak, on_gpu=on_gpu, host_bytes=stats.host_bytes),
        limit=limit_of(shares),
        shares=shares,
    )


def _inputs(tokenizer: PreTrainedTokenizerBase, folder: Path, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    if not chat:
        return dict(tokenizer(prompt, return_tensors="pt"))
    if not tokenizer.chat_template:
        raise ConfigError(f"{folder}: the tokenizer has no chat template; leave the chat out")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return dict(tokenizer(str(text), add_special_tokens=False, return_tensors="pt"))
