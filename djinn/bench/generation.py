"""``djinn generate``: continue one prompt with a streaming model, and say how fast it was and what limited it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer
from transformers.distributed import DistributedConfig

import djinn
from djinn.bench.limits import cpu_shares, gpu_shares, limit_of
from djinn.bench.machines import host_rates_here
from djinn.bench.measure import MemoryPeak, peak_device
from djinn.bench.rates.link import pinned_h2d_rate
from djinn.devices import require_here
from djinn.engine.load import load_requested
from djinn.engine.ranks import own_device
from djinn.errors import CheckpointError, ConfigError
from djinn.planning.prediction import Limit
from djinn.planning.request import Request
from djinn.planning.workspace import Workload
from djinn.weights.foreign import refusing
from djinn.weights.models import config_of
from djinn.weights.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The text, and how fast it came. Times are seconds from the call of ``generate``, rates 10^9 bytes/s."""

    text: str
    new_tokens: int
    wall_s: float
    tokens_per_s: float
    link_gbps: float
    effective_gbps: float
    """Bytes of weights that the passes consumed, streamed or resident, over ``wall_s``."""
    stall_s: float
    peak_device_bytes: int
    limit: Limit
    shares: dict[Limit, float]
    """Share of ``wall_s`` that link, disk, compute and host each took."""


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
    request: Request,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    distributed_config: DistributedConfig | None = None,
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Continue ``prompt`` by as many tokens as ``request`` keeps memory for, with a prompt of whatever length it has.

    Args:
        temperature: for sampling, which ``seed`` seeds; 0 takes the most likely token.
        chat: put the prompt into the tokenizer's chat template, as the message of a user.
        distributed_config: as for :func:`djinn.load`; what is returned is then of this rank.
        show: is given the text piece by piece, as it comes.
        say: is told what is done next, in a few words.

    Raises:
        ConfigError: a chat with a tokenizer that has no template, or a prompt without tokens.
        CheckpointError: a tokenizer that is missing, damaged or another model's, or a model that cannot generate.
        DjinnError: as :func:`djinn.load`.
    """
    where, work = request.device, request.keep
    assert isinstance(work, Workload)
    require_here(where)
    if distributed_config is not None:
        where = own_device(where)
    on_gpu = where.type == "cuda"
    peak = MemoryPeak()
    peak.mark_bare()
    say("reading the tokenizer")
    ceiling = pinned_h2d_rate(request.chunk) if on_gpu else 0.0  # before the link carries anything else
    folder = resolve(model)
    with refusing(f"{folder}: transformers cannot use its tokenizer", "djinn generate needs the model's own"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        inputs = _inputs(tokenizer, folder, prompt, chat)
        tokenizer.decode(inputs["input_ids"][0])
    _require_tokens(inputs["input_ids"], folder, prompt)
    prompt_tokens = inputs["input_ids"].shape[1]
    request = request.asking(work=replace(work, prompt_tokens=prompt_tokens))
    if request.host is not None:
        request = request.knowing(host_rates_here())
    say("loading the weights")
    # Events around every unit would slow a GPU; on a CPU they are two clock readings.
    streaming = load_requested(folder, request, distributed_config=distributed_config, trace=not on_gpu)
    if not streaming.can_generate():
        raise CheckpointError(
            f"{folder}: a {type(streaming).__name__} does not generate text; djinn.load gives the model"
        )
    say("generating")
    wait = _DeviceWait()
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = streaming.generate(  # type: ignore[operator]
        **{name: tensor.to(where) for name, tensor in inputs.items()},
        max_new_tokens=work.new_tokens,
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


def _require_tokens(ids: torch.Tensor, folder: Path, prompt: str) -> None:
    """Refuse a prompt's ids (int64 of [1, length]) that the model in ``folder`` cannot take."""
    if ids.numel() == 0 and prompt:
        raise CheckpointError(f"{folder}: its tokenizer knows none of the prompt; djinn generate needs the model's own")
    if ids.numel() == 0:
        raise ConfigError("prompt: it is empty; give some text to continue")
    known = getattr(config_of(folder).get_text_config(), "vocab_size", None)
    if known is not None and int(ids.max()) >= known:
        raise CheckpointError(
            f"{folder}: its tokenizer gives id {int(ids.max())}, and vocab_size in config.json is {known}; it is "
            "another model's"
        )


def _inputs(tokenizer: PreTrainedTokenizerBase, folder: Path, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    if not chat:
        return dict(tokenizer(prompt, return_tensors="pt"))
    if not tokenizer.chat_template:
        raise ConfigError(f"{folder}: the tokenizer has no chat template; leave the chat out")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return dict(tokenizer(str(text), add_special_tokens=False, return_tensors="pt"))
