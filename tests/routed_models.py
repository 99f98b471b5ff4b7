"""Tiny mixtures of experts that stream by expert, with pools of chosen sizes; for tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import djinn
from djinn.engine.experts import Experts
from djinn.engine.load import cool, engine_of, placement
from djinn.errors import PlanError
from djinn.weights.experts import routed_experts

ROUTED: dict[str, PretrainedConfig] = {
    # Of all, an expert's tensors are whole tiles of the code: 4096 weights.
    "mixtral": MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=256,
    ),
    # A layer without experts in between.
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=12, num_experts_per_tok=3, mlp_only_layers=[1], vocab_size=256,
    ),
    # Transposed, with biases beside.
    "gpt_oss": GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=8, num_experts_per_tok=4, vocab_size=256, pad_token_id=0,
    ),
    # Groups of experts, and a shared one beside; the first layer without.
    "deepseek_v3": DeepseekV3Config(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=4, n_group=2, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, n_shared_experts=1, vocab_size=256,
    ),
}  # fmt: skip
ROUTED_ON_GPU: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen3": Qwen3MoeConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, moe_intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
    ),
    "gpt_oss": GptOssConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, num_local_experts=16, num_experts_per_tok=4, pad_token_id=0,
    ),
}  # fmt: skip
"""Wide enough for the kernels that a GPU has for large models."""
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 8, "batch": 3, "device": "cpu"}


def routed(folder: Path, pool: str, **options: Any) -> PreTrainedModel:
    """Load with a pool of so many slots: ``k`` that a token picks, ``half`` a layer, ``two windows``, ``all but one``.

    All other weights stay, but for ``least``: then the budget is the smallest there is.
    """
    made = options | WORK
    with pytest.raises(PlanError) as refusal:
        djinn.plan(folder, budget=1, **made)
    least = int(re.findall(r"need (\d+) bytes", str(refusal.value))[0])
    planned = djinn.plan(folder, budget=least, **made)
    if pool == "least":
        return djinn.load(folder, budget=least, **made)
    dense = sum(unit.image_bytes for unit in planned.units if not unit.experts)
    slots = {
        "k": planned.pool.picked,
        "half": planned.pool.widest // 2,
        "two windows": 2 * planned.pool.widest + 1,
        "all but one": planned.pool.experts - 1,
    }[pool]
    beside = planned.workspace_bytes + planned.scratch_bytes + dense
    model = djinn.load(folder, budget=beside + slots * planned.pool.slot_bytes, **made)
    assert engine_experts(model)._pool.slots == slots
    assert not placement(model).streamed
    return model


def engine_experts(model: PreTrainedModel) -> Experts:
    experts = engine_of(model).experts
    assert experts is not None
    return experts


def poisoned(model: PreTrainedModel) -> None:
    """Empty the pool and fill it with what no weight is: NaN, of which every output that reads it has some."""
    cool(model)
    engine_experts(model).fetcher.pool.view(torch.bfloat16).fill_(float("nan"))


PROMPT = torch.arange(3, 23).view(2, 10)


def streaming(folder: Path, pool: str = "two windows", whole_from: int | None = None, **options: Any) -> Any:
    """Load with a poisoned pool (see :func:`routed`); passes of so many tokens are whole, by default none."""
    model = routed(folder, pool, **options)
    poisoned(model)
    engine_experts(model)._whole_from = whole_from
    return model


def logits(model: PreTrainedModel, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    """Return a pass's logits."""
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def assert_right(model: PreTrainedModel, resident: PreTrainedModel) -> None:
    """Hold passes of several lengths against the resident model's."""
    for ids in (PROMPT, PROMPT[:1, :1], PROMPT[:, :3]):
        assert torch.equal(logits(model, ids), logits(resident, ids)), tuple(ids.shape)


def experts_of(model: Any, layer: int) -> nn.Module:
    """Return a layer's experts module."""
    module: nn.Module = model.model.layers[layer].mlp.experts
    return module


def counted_picks(model: PreTrainedModel) -> list[set[int]]:
    """Return a list that from now on gets the experts picked in every call of an experts module."""
    picks: list[set[int]] = []
    for module in model.modules():
        if routed_experts(module):
            module.register_forward_pre_hook(lambda _, args: picks.append(set(args[1].flatten().tolist())))
    return picks
