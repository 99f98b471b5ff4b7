"""Architectures: each config is the model it says it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from djinn.errors import ConfigError
from djinn.weights.architectures import architecture_names, load_architecture

# Parameters as the model cards give them (hub, "Safetensors: model size"); the tiny ones are ours.
PUBLISHED = {
    "llama-2-7b": 6.74e9,
    "llama-2-13b": 13.02e9,
    "llama-2-70b": 68.98e9,
    "llama-2-70b-16-layers": 14.22e9,  # the same cut to 16 of its 80 layers: streamed a pass, it takes half a second
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.55e9,
    "llama-3.1-405b": 405.9e9,
    "codellama-34b": 33.74e9,
    "mixtral-8x7b": 46.70e9,
    "qwen3-30b-a3b": 30.53e9,
    "qwen3-235b-a22b": 235.1e9,
    "gpt-oss-20b": 20.91e9,
    "gpt-oss-120b": 116.8e9,
    "deepseek-v3": 671.0e9,
    "qwen2.5-7b": 7.62e9,
    "gpt2": 124.4e6,
    "opt-30b": 29.97e9,
    "llama-tiny": 10.85e6,
    "gpt2-tiny": 1.055e6,
    "mixtral-tiny": 2.035e6,
    "qwen3-moe-tiny": 3.884e6,
    "qwen2-tiny": 0.920e6,
    "opt-tiny": 1.056e6,
}


def test_every_architecture_has_a_published_size() -> None:
    assert architecture_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    config = load_architecture(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(PUBLISHED[name], rel=0.01)
    assert config.architectures == [type(model).__name__]


@pytest.mark.parametrize("name", PUBLISHED)
def test_special_tokens_are_in_the_vocabulary(name: str) -> None:
    config = load_architecture(name)
    assert 0 <= config.bos_token_id < config.vocab_size
    assert 0 <= config.eos_token_id < config.vocab_size


def test_unknown_architecture_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no architecture 'llama-2-14b'.*llama-2-13b"):
        load_architecture("llama-2-14b")
