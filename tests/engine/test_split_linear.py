"""Split linear layers computed directly give what transformers' own way gives, bit for bit, and can be undone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from djinn.engine.sharding import LEAST, filled, pretended
from djinn.engine.split_linear import shorten
from djinn.weights.models import empty_model

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < LEAST, reason=f"ranks need transformers {LEAST}")

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, attention_bias=True, mlp_bias=True,
)  # fmt: skip
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(6)[None]


@pytest.fixture
def split() -> Iterator[PreTrainedModel]:
    """A rank's part of a model; the group that it belongs to sends nothing, so sums are of its own part alone."""
    torch.manual_seed(0)
    whole = {name: torch.randn(each.shape, dtype=each.dtype) for name, each in _whole().named_parameters()}
    with pretended(2) as config:
        skeleton = empty_model(CONFIG, torch.bfloat16)
        yield filled(skeleton, config, torch.device("cpu"), lambda name, _: whole[name]).eval()


def _whole() -> nn.Module:
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16)


def forwards(model: nn.Module) -> dict[str, object]:
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


def test_all_linear_layers_of_both_styles_are_computed_directly(split: PreTrainedModel) -> None:
    before = forwards(split)
    list(shorten(split))
    changed = {name for name, forward in forwards(split).items() if forward is not before[name]}
    kinds = [name.rsplit(".", 1)[-1] for name in sorted(changed)]
    assert sorted(kinds) == sorted(2 * LAYERS), "the head gathers its output, which takes more than a product"


def test_bits_are_the_same(split: PreTrainedModel) -> None:
    with torch.no_grad():
        wanted = split(IDS).logits
        list(shorten(split))
        assert torch.equal(split(IDS).logits, wanted)
        layer = split.get_submodule("model.layers.0.mlp.down_proj")
        assert layer.bias is not None
        layer.bias.to_local().add_(1)  # the control: what is computed directly adds biases, too
        assert not torch.equal(split(IDS).logits, wanted)


def test_with_gradients_transformers_way_is_taken(split: PreTrainedModel) -> None:
    wanted = split(IDS).logits
    list(shorten(split))
    layer = split.get_submodule("model.layers.1.self_attn.o_proj")
    layer.weight.requires_grad_(True)
    found = split(IDS).logits
    assert torch.equal(found, wanted)
    found.float().sum().backward()
    assert layer.weight.grad is not None


def test_what_was_shortened_gets_its_own_forward_back(split: PreTrainedModel) -> None:
    before = forwards(split)
    for handle in shorten(split):
        handle.remove()
    assert forwards(split) == before


def test_other_forwards_are_left_alone(split: PreTrainedModel) -> None:
    """One that somebody has put around transformers', and modules that are not split."""
    layer = split.get_submodule("model.layers.0.mlp.up_proj")
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)  # type: ignore[method-assign]
    mine = vars(layer)["forward"]
    list(shorten(split))
    assert vars(layer)["forward"] is mine
    assert not list(shorten(_whole()))
