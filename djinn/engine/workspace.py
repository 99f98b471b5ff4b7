"""Device memory beside the weights: KV cache, activations, logits, libraries' scratch. Estimated from the config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

CUDA_LIBRARIES_BYTES = 128 * 2**20
"""cuBLAS workspaces (32 MiB per stream and handle on Hopper) and the allocator's rounding."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What will be generated: tokens per sequence, and sequences at once."""

    prompt_tokens: int
    new_tokens: int
    batch: int


def kv_cache_bytes(config: PretrainedConfig, dtype: torch.dtype, work: Workload) -> int:
    """Return the size of the KV cache at its longest: 2 · layers · KV heads · head size · tokens · batch."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = work.prompt_tokens + work.new_tokens
    return 2 * text.num_hidden_layers * heads * head_size * tokens * work.batch * dtype.itemsize


def activation_bytes(config: PretrainedConfig, dtype: torch.dtype, work: Workload) -> int:
    """Return the largest set of activations alive at once.

    In a gated MLP: the residual stream and the normed input (2 · hidden), gate, its activation, up and their product
    (4 · intermediate). Then the logits of each sequence's last token, once in the model's dtype and twice in float32.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    tokens = work.prompt_tokens * work.batch
    logits = work.batch * text.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    return tokens * (2 * hidden + 4 * intermediate) * dtype.itemsize + logits


def workspace_bytes(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, work: Workload) -> int:
    """Return the device memory to keep free of weights."""
    libraries = CUDA_LIBRARIES_BYTES if device.type == "cuda" else 0
    return kv_cache_bytes(config, dtype, work) + activation_bytes(config, dtype, work) + libraries
