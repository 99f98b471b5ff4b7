"""Device memory beside the weights: KV cache, activations, logits, libraries, the CUDA context. From the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from djinn.errors import PlanError
from djinn.planning.dimensions import dimensions

CUDA_LIBRARIES_BYTES = 64 * 2**20
"""cuBLAS workspaces: 32 MiB per stream and handle on Hopper."""

SMALL_TENSORS_BYTES = 288 * 2**20
"""Torch's allocator keeps tensors of up to 1 MiB apart: a short KV cache among them, two for each of 128 layers."""

CUDA_CONTEXT_BYTES = 1050 * 10**6
"""What the driver takes outside of torch's allocator, with kernels and cuBLAS loaded: up to 855 MB on an H100 and
1,015 MB on an H200, both with CUDA 13."""

CUDA_OVERHEAD_BYTES = CUDA_CONTEXT_BYTES + CUDA_LIBRARIES_BYTES + SMALL_TENSORS_BYTES
"""What a GPU needs beside weights, KV cache and activations."""


COLLECTIVES_BYTES = 860 * 10**6
"""What NCCL takes on a GPU to add up what several have computed: 774 to 854 MB on two and four H100s with NVLink and
NCCL 2.28 (data/benchmarks/ranks_h100_2026-11-28). It takes them from the driver, not from torch's allocator."""

_FRAGMENTS_SHARE = 0.02
"""What may be lost between tensors that torch's allocator cuts from one piece: more than in any case of the tests."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What will be generated: tokens per sequence, and sequences at once."""

    prompt_tokens: int
    new_tokens: int
    batch: int

    def __str__(self) -> str:
        return f"prompt_tokens={self.prompt_tokens}, new_tokens={self.new_tokens} and batch={self.batch}"


def kv_cache_bytes(config: PretrainedConfig, dtype: torch.dtype, work: Workload, ranks: int = 1) -> int:
    """Return the size of the KV cache at its longest: 2 · layers · KV heads · head size · tokens · batch.

    Each of several ``ranks`` caches its own heads.

    An encoder-decoder caches keys and values of what the encoder read, too; the layers of a state-space model keep a
    state of the same size for any length. A model without a vocabulary caches nothing.
    """
    text = next(dimensions(config, ranks))
    if not text.vocab:
        return 0
    tokens = work.prompt_tokens + work.new_tokens
    if config.is_encoder_decoder:
        tokens += max(work.prompt_tokens, text.positions)
    return text.layers * (text.cache * tokens + text.state) * work.batch * dtype.itemsize


def attention_flops(config: PretrainedConfig, work: Workload, ranks: int = 1) -> float:
    """Return what a prefill computes between its tokens: 2 products · 2 · head size · heads · tokens² ÷ 2 a layer."""
    text = next(dimensions(config, ranks))
    return float(2 * text.layers * text.attention * work.prompt_tokens**2 * work.batch)


def activation_bytes(config: PretrainedConfig, dtype: torch.dtype, work: Workload, ranks: int = 1) -> int:
    """Return the largest set of activations alive at once.

    In a gated MLP: the residual stream and the normed input (2 · hidden), gate, its activation, up and their product
    (4 · intermediate), for each token of the prompt, patch of an image or frame of a sound, whichever part of the model
    needs most. Then the logits of each sequence's last token, once in the model's dtype and twice in float32.
    """
    text, *others = dimensions(config, ranks)
    widths = [max(work.prompt_tokens, text.positions) * (2 * text.hidden + 4 * text.intermediate)]
    widths += [part.positions * (2 * part.hidden + 4 * part.intermediate) for part in others]
    logits = text.vocab * (dtype.itemsize + 2 * torch.float32.itemsize)
    return work.batch * (max(widths) * dtype.itemsize + logits)


def routed_bytes(
    expert: Mapping[str, tuple[int, ...]], picked: int, dtype: torch.dtype, device: torch.device, work: Workload
) -> int:
    """Return what a layer of routed experts needs of memory beside the weights; ``expert`` says one's shapes.

    In a prefill that is, for each token and each of the experts ``picked`` for it, a row for what every product reads
    and gives, in the order of experts and back. In decode, where a device is no CPU, transformers copies the weights
    of every sequence's experts side by side (its ``batched_mm``): all of an expert's at once.
    """
    # Each matrix reads rows of one length and writes rows of the other; both stay until the next product is done.
    widths = 3 * sum(sum(shape) for shape in expert.values() if len(shape) == 2)
    prefill = work.batch * work.prompt_tokens * picked * widths
    gathered = work.batch * picked * sum(map(math.prod, expert.values())) if device.type != "cpu" else 0
    return max(prefill, gathered) * dtype.itemsize


def workspace_bytes(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    work: Workload,
    routed: int = 0,
    ranks: int = 1,
) -> int:
    """Return the device memory to keep free of weights; ``routed`` is what :func:`routed_bytes` says.

    Over several ``ranks`` it is each one's.

    A CPU's torch (2.13) copies the output projection for every sequence whose last position alone goes through it,
    as it does in ``generate``; a tenth more is for what the C library keeps around such copies and other tensors, once
    it maps large ones by themselves (:func:`djinn.engine.heap.map_large_blocks`).
    """
    tensors = kv_cache_bytes(config, dtype, work, ranks) + activation_bytes(config, dtype, work, ranks) + routed
    if device.type == "cuda":
        return CUDA_OVERHEAD_BYTES + round((1 + _FRAGMENTS_SHARE) * tensors)
    text = next(dimensions(config))
    return 11 * (tensors + work.batch * text.vocab * text.hidden * dtype.itemsize) // 10


def largest(fits: Callable[[int], bool], below: int) -> int:
    """Return the largest number under ``below`` that fits, 0 if not even 1 does; what is smaller fits too."""
    low = 0
    while below - low > 1:
        middle = (low + below) // 2
        low, below = (middle, below) if fits(middle) else (low, middle)
    return low


def what_fits(plan_for: Callable[[Workload], object], work: Workload) -> str:
    """Return words on the longest prompt and largest batch that ``plan_for`` takes; none if no workload would help."""

    def fits(**change: int) -> bool:
        try:
            plan_for(replace(work, **change))
        except PlanError:
            return False
        return True

    prompt = largest(lambda tokens: fits(prompt_tokens=tokens), work.prompt_tokens)
    batch = largest(lambda size: fits(batch=size), work.batch)
    words = [f"a prompt of {prompt} tokens"] * (prompt > 0) + [f"a batch of {batch}"] * (batch > 0)
    return f"; it would fit {' or '.join(words)}" if words else ""
