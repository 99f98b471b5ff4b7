"""Real models whose passes leave the recorded order: right, counted, and no slower than the order allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from architectures import ARCHITECTURES, Pair, tokens
from torch import nn
from transformers import PreTrainedModel

import djinn
from djinn.planning.placement import Tier
from djinn.weights import tracing

pytestmark = pytest.mark.usefixtures("one_thread")

Checkpoint = Callable[[str], Path]


@pytest.fixture
def llamas(architecture_checkpoint: Checkpoint) -> Pair:
    return Pair("llama", architecture_checkpoint("llama"))


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers  # type: ignore[no-any-return]


def logits(model: PreTrainedModel, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(length), use_cache=False).logits  # type: ignore[no-any-return]


def strayed(pair: Pair, lengths: list[int]) -> list[tuple[int, int]]:
    """Run prompts of these lengths, which must give equal bits; return the skips and reloads of each pass."""
    stats, counts = djinn.stats(pair.streamed), []
    for length in lengths:
        before = stats.skips, stats.reloads
        assert torch.equal(*(logits(model, length) for model in pair.both))
        counts.append((stats.skips - before[0], stats.reloads - before[1]))
    return counts


def skip_if(layer: nn.Module, condition: Callable[[torch.Tensor], bool]) -> None:
    """Make a decoder layer pass its input on where ``condition`` holds."""
    run = layer.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states if condition(hidden_states) else run(hidden_states, *args, **kwargs)

    layer.forward = MethodType(forward, layer)


def test_a_layer_that_runs_several_times(architecture_checkpoint: Checkpoint) -> None:
    """ALBERT's one layer is visited once for each of its depths, and has to come again each time."""
    pair = Pair("albert", architecture_checkpoint("albert"))
    stats = djinn.stats(pair.streamed)
    visits = len(pair.plan.streamed)
    for passes in (1, 2, 3):
        with torch.no_grad():
            assert torch.equal(*(model(**ARCHITECTURES["albert"].inputs()).logits for model in pair.both))
        assert stats.passes == passes
    assert stats.visits > 3 * visits
    assert stats.reloads > 0


def test_a_layer_in_two_places(llamas: Pair) -> None:
    for model in llamas.both:
        layers(model)[3] = layers(model)[1]
    counts = strayed(llamas, [7] * 4)
    assert all(skips + reloads > 0 for skips, reloads in counts)


def test_layers_that_a_condition_leaves_out(llamas: Pair) -> None:
    for model in llamas.both:
        for number in (1, 2):
            skip_if(layers(model)[number], lambda hidden: hidden.shape[1] % 2 == 0)
    in_order, skipping = (0, 0), strayed(llamas, [7, 8])[1]
    assert skipping != in_order
    strayed(llamas, [7, 8, 8, 7])
    assert strayed(llamas, [8, 8, 8, 8])[2:] == [in_order] * 2, "what repeats is followed"
    assert strayed(llamas, [7, 7, 7, 7])[2:] == [in_order] * 2


def test_an_early_exit(llamas: Pair) -> None:
    for model in llamas.both:
        for number in (3, 4):
            skip_if(layers(model)[number], lambda _: True)
    counts = strayed(llamas, [7] * 5)
    assert counts[1] != (0, 0), "what lies behind the exit was prefetched"
    assert counts[3:] == [(0, 0)] * 2
    before = djinn.stats(llamas.streamed).link_bytes
    logits(llamas.streamed)
    moved = djinn.stats(llamas.streamed).link_bytes - before
    left_out = ("model.layers.3.", "model.layers.4.")
    assert moved == sum(u.weight_bytes for u in llamas.plan.streamed if not u.name.startswith(left_out))


def test_another_order_in_later_passes(llamas: Pair) -> None:
    assert strayed(llamas, [7, 7]) == [(0, 0)] * 2
    for model in llamas.both:
        order = list(layers(model))
        for number, layer in enumerate(reversed(order)):
            layers(model)[number] = layer
    counts = strayed(llamas, [7] * 5)
    assert counts[0] != (0, 0)
    assert counts[3:] == [(0, 0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["encoder.block.2.layer.0", "decoder.block.1.layer.1"])
def test_an_interrupt_in_the_encoder_or_decoder_leaves_a_model_that_works(
    architecture_checkpoint: Checkpoint, where: str
) -> None:
    pair = Pair("t5", architecture_checkpoint("t5"))
    options = ARCHITECTURES["t5"].inputs() | {"do_sample": False, "max_new_tokens": 4}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = pair.resident.generate(**options)
    for reader in (unit.readers[0] for unit in pair.plan.streamed if unit.name.startswith(where)):
        handle = pair.streamed.get_submodule(reader).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            pair.streamed.generate(**options)
        handle.remove()
        assert torch.equal(pair.streamed.generate(**options), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "mamba2", "t5", "whisper", "clip", "llava"])
def test_models_that_cannot_be_traced_stream_by_blocks(
    architecture_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def untraceable(*_: object) -> None:
        raise RuntimeError("its control flow asks for values")

    monkeypatch.setattr(tracing, "_trace", untraceable)
    architecture = ARCHITECTURES[name]
    pair = Pair(name, architecture_checkpoint(name))
    streamed = [unit for unit, tier in zip(pair.plan.units, pair.plan.tiers, strict=True) if tier is not Tier.RESIDENT]
    assert streamed
    assert all(unit.name.rpartition(".")[2].isdigit() for unit in streamed)
    with torch.no_grad():
        outputs = [model(**architecture.inputs(), **architecture.decoder) for model in pair.both]
    for key in ("logits", "logits_per_image"):
        if key in outputs[0]:
            assert torch.equal(outputs[0][key], outputs[1][key])
    if architecture.generates:
        options = architecture.inputs() | {"do_sample": False, "max_new_tokens": 4}
        assert torch.equal(*(model.generate(**options) for model in pair.both))
    assert djinn.stats(pair.streamed).link_bytes > 0
