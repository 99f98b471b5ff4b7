"""Every architecture of the compatibility table: its class, a tiny config, and inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tiny_models import TINY, save_model
from transformers import PretrainedConfig, PreTrainedModel

import djinn
from djinn.errors import PlanError
from djinn.planning.placement import Plan

Inputs = dict[str, torch.Tensor]
VOCABULARY = 256


def tokens(length: int = 7, *, first: int = 10, last: int = 250) -> torch.Tensor:
    """Token ids, shape [1, length], none of them special in the configs below."""
    return torch.randint(first, last, (1, length), generator=torch.Generator().manual_seed(length))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.bfloat16)


def text() -> Inputs:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image() -> Inputs:
    return {"pixel_values": noise(1, 3, 32, 32)}


def image_and_text() -> Inputs:
    return text() | image()


def image_in_text() -> Inputs:
    """A prompt with a place for each of the image's 16 patches."""
    ids = torch.cat([tokens(3), torch.full((1, 16), 5), tokens(4)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image()


def speech() -> Inputs:
    return {"input_features": noise(1, 16, 64)}


@dataclass(frozen=True)
class Architecture:
    """What is saved as a checkpoint and run, resident and streamed."""

    model_class: str
    config: PretrainedConfig
    inputs: Callable[[], Inputs] = text
    decoder: Inputs = field(default_factory=dict)
    """What a pass of an encoder-decoder takes besides."""

    @property
    def cls(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(transformers, self.model_class)
        return found

    @property
    def generates(self) -> bool:
        return bool(self.cls.can_generate())


_DECODER = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = _DECODER | {"hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "moe_intermediate_size": 96}
_ENCODER_DECODER = {"decoder_input_ids": tokens(3)}
_VISION = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _config(name: str, **values: object) -> PretrainedConfig:
    found: PretrainedConfig = getattr(transformers, name)(**values)
    return found


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", TINY["llama"]),
    "mistral": Architecture("MistralForCausalLM", _config("MistralConfig", **_DECODER, sliding_window=4)),
    "qwen2": Architecture("Qwen2ForCausalLM", TINY["qwen2"]),
    "qwen3": Architecture("Qwen3ForCausalLM", _config("Qwen3Config", **_DECODER)),
    "gemma2": Architecture("Gemma2ForCausalLM", _config("Gemma2Config", **_DECODER, sliding_window=4)),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", _config("Gemma3TextConfig", **_DECODER | {"vocab_size": 8192}, sliding_window=4)
    ),
    "phi3": Architecture("Phi3ForCausalLM", _config("Phi3Config", **_DECODER)),
    "gpt2": Architecture("GPT2LMHeadModel", TINY["gpt2"]),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM",
        _config(
            "GPTNeoXConfig", hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
            vocab_size=VOCABULARY,
        ),
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        _config(
            "OPTConfig", hidden_size=128, ffn_dim=352, num_hidden_layers=5, num_attention_heads=4,
            vocab_size=VOCABULARY, word_embed_proj_dim=64, do_layer_norm_before=False, max_position_embeddings=128,
        ),
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        _config(
            "FalconConfig", hidden_size=128, num_hidden_layers=5, num_attention_heads=4, vocab_size=VOCABULARY,
            new_decoder_architecture=True, num_kv_heads=2,
        ),
    ),
    "bloom": Architecture("BloomForCausalLM", TINY["bloom"]),
    "mixtral": Architecture("MixtralForCausalLM", TINY["mixtral"]),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM", _config("Qwen3MoeConfig", **_EXPERTS, num_experts=4, num_experts_per_tok=2)
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3ForCausalLM",
        _config(
            "DeepseekV3Config", **_EXPERTS | {"num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
            n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16,
            qk_nope_head_dim=16, v_head_dim=16,
        ),
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        _config("GptOssConfig", **_EXPERTS | {"intermediate_size": 96}, num_local_experts=4, num_experts_per_tok=2),
    ),
    # Two mixtures whose experts transformers does not mark.
    "llama4": Architecture(
        "Llama4ForCausalLM",
        _config(
            "Llama4TextConfig", **_EXPERTS | {"intermediate_size": 96}, intermediate_size_mlp=96, num_local_experts=4,
            num_experts_per_tok=1,
        ),
    ),
    "jetmoe": Architecture(
        "JetMoeForCausalLM",
        _config(
            "JetMoeConfig", hidden_size=64, num_hidden_layers=4, num_key_value_heads=2, kv_channels=16,
            intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        ),
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", _config("Olmo2Config", **_DECODER)),
    "cohere2": Architecture("Cohere2ForCausalLM", _config("Cohere2Config", **_DECODER, sliding_window=4)),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        _config(
            "Mamba2Config", hidden_size=64, num_hidden_layers=5, state_size=16, num_heads=8, head_dim=16, n_groups=2,
            chunk_size=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        _config(
            "T5Config", d_model=128, d_kv=32, d_ff=352, num_layers=4, num_heads=4, vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        ),
        decoder=_ENCODER_DECODER,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        _config(
            "BartConfig", d_model=128, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=352, decoder_ffn_dim=352,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=64,
        ),
        decoder=_ENCODER_DECODER,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        _config(
            "WhisperConfig", d_model=128, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=352, decoder_ffn_dim=352,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=VOCABULARY, num_mel_bins=16,
            max_source_positions=32, max_target_positions=64, decoder_start_token_id=3, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        speech,
        decoder=_ENCODER_DECODER,
    ),
    "bert": Architecture(
        "BertForMaskedLM",
        _config(
            "BertConfig", hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
            vocab_size=VOCABULARY,
        ),
    ),
    # One layer, which runs several times.
    "albert": Architecture(
        "AlbertForMaskedLM",
        _config(
            "AlbertConfig", hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=VOCABULARY, embedding_size=64,
        ),
    ),
    "vit": Architecture("ViTForImageClassification", _config("ViTConfig", **_VISION | {"hidden_size": 128}), image),
    "clip": Architecture(
        "CLIPModel",
        _config(
            "CLIPConfig",
            text_config={
                "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
                "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1,
            },
            vision_config=_VISION, projection_dim=32,
        ),
        image_and_text,
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        _config(
            "LlavaConfig",
            text_config=_config("LlamaConfig", **_DECODER),
            vision_config=_config("CLIPVisionConfig", **_VISION), image_token_index=5,
        ),
        image_in_text,
    ),
}  # fmt: skip


def save_architecture(name: str, folder: Path) -> Path:
    """Write a checkpoint of ``ARCHITECTURES[name]`` in several shards; return ``folder``."""
    architecture = ARCHITECTURES[name]
    return save_model(architecture.cls._from_config(architecture.config, dtype=torch.bfloat16), name, folder)


WORK = {"prompt_tokens": 32, "new_tokens": 16, "device": "cpu"}


class Pair:
    """A checkpoint loaded streaming, with as little on the device as its largest unit allows, and whole."""

    def __init__(self, name: str, folder: Path) -> None:
        self.plan = small_plan(folder)
        budget = self.plan.budget
        self.streamed = djinn.load(folder, budget=budget, host_memory="1 B", chunk="32 KiB", **WORK)  # type: ignore[arg-type]
        self.resident: PreTrainedModel = ARCHITECTURES[name].cls.from_pretrained(folder, dtype="auto").eval()

    @property
    def both(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return self.streamed, self.resident


def small_plan(folder: Path) -> Plan:
    """Return a plan that streams from disk, with the smallest of some budgets that works."""
    whole = djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    images = sum(unit.image_bytes for unit in whole.units)
    for kept in (0.3, 0.4, 0.5, 0.6):
        try:
            budget = whole.workspace_bytes + round(kept * images)
            return djinn.plan(folder, budget=budget, host_memory="1 B", **WORK)  # type: ignore[arg-type]
        except PlanError as error:
            refusal = error
    raise refusal
