"""Real checkpoints of tiny models, for tests: the architectures differ in what can go wrong with them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

TINY: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    ),
    # Tied embeddings; weights stored transposed.
    "gpt2": GPT2Config(n_embd=128, n_layer=5, n_head=4, vocab_size=256, n_positions=128),
    # Experts, which transformers fuses when it loads them.
    "mixtral": MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=256,
    ),
    # Biases beside a tied embedding.
    "qwen2": Qwen2Config(
        hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True,
    ),
    # Learned positions that are read at an offset.
    "opt": OPTConfig(
        hidden_size=128, ffn_dim=352, num_hidden_layers=5, num_attention_heads=4, vocab_size=256,
        word_embed_proj_dim=128, max_position_embeddings=128,
    ),
    # Norm behind the embedding, tied, fused query, key and value.
    "bloom": BloomConfig(hidden_size=128, n_layer=5, n_head=4, vocab_size=256),
}  # fmt: skip

MIXTURES: dict[str, PretrainedConfig] = {
    # More than ten experts, whose numbers do not sort as texts do; w1, w2 and w3 of each in files.
    "mixtral": MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=12, vocab_size=256,
    ),
    # gate_proj, up_proj and down_proj of each; a layer without experts; matrices that are not whole pages.
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=12, num_experts_per_tok=3, mlp_only_layers=[1], vocab_size=256,
    ),
}  # fmt: skip


def save_tiny(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "200KB") -> Path:
    """Write a checkpoint of ``TINY[name]`` in several shards, all of its weights random; return ``folder``."""
    return save_config(TINY[name], name, folder, dtype=dtype, shard=shard)


def save_config(
    config: PretrainedConfig, name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "200KB"
) -> Path:
    """Write a causal language model of ``config`` as :func:`save_model` does; return ``folder``."""
    return save_model(AutoModelForCausalLM.from_config(config, dtype=dtype), name, folder, shard=shard)


def save_model(model: PreTrainedModel, name: str, folder: Path, *, shard: str = "200KB") -> Path:
    """Write ``model`` with random weights, seeded by ``name``, as a checkpoint in several shards; return ``folder``."""
    torch.manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from zero and from one: a weight that stands for another changes the output.
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 10)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) / 10)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # whole sequences
        model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
