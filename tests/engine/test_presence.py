"""Weights that are read, or written, while their module does not run: the true ones, or a refusal by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import Pair, equal, pair, prompt
from tiny_models import save_model
from torch import nn
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

import djinn
from djinn.engine.load import placement
from djinn.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

Tiny = Callable[[str], Path]
STREAMED = "model.layers.2.mlp.up_proj"


@pytest.fixture(params=["1 B", "1 GB"], ids=["disk", "pinned"])
def llamas(tiny_checkpoint: Tiny, request: pytest.FixtureRequest) -> Pair:
    both = pair(tiny_checkpoint("llama"), host_memory=request.param)
    assert STREAMED in {unit.name for unit in placement(both.streamed).streamed}
    return both


def weight(model: nn.Module) -> nn.Parameter:
    return model.get_submodule(STREAMED).weight  # type: ignore[return-value]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(7)).logits  # type: ignore[no-any-return]


READINGS: dict[str, Callable[[nn.Parameter], object]] = {
    "a row": lambda weight: weight[3],
    "a row of its data": lambda weight: weight.data[3],
    "statistics": lambda weight: (weight.float().mean(), weight.norm(), weight.std()),
    "transposed": lambda weight: weight.T,
    "detached": lambda weight: weight.detach().flatten(),
    "product": lambda weight: nn.functional.linear(torch.ones(2, weight.shape[1], dtype=weight.dtype), weight),
    "in a list": lambda weight: torch.cat([weight, weight]),
    "numbers": lambda weight: torch.tensor(weight.detach().float().numpy()),
    "one number": lambda weight: weight[0, 0].item(),
    "for each": lambda weight: torch._foreach_norm([weight]),
    "copied": copy.deepcopy,
    "a row, copied": lambda weight: copy.deepcopy(weight.data[2]),
    "pickled": lambda weight: pickle.loads(pickle.dumps(weight)),
    "saved": lambda weight: _saved(weight.data[1]),
    "as a parameter": lambda weight: nn.Parameter(weight.data + 0),
    "in inference mode": lambda weight: torch.inference_mode()(lambda: (weight * 2).clone())(),
}


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reading", READINGS)
def test_who_reads_a_weight_between_passes_gets_the_true_one(llamas: Pair, reading: str) -> None:
    logits(llamas.streamed)
    found, wanted = (READINGS[reading](weight(model)) for model in llamas)
    assert equal(found, wanted)
    assert torch.equal(*(logits(model) for model in llamas))


def test_all_of_a_models_weights_are_true(llamas: Pair) -> None:
    logits(llamas.streamed)
    for (name, found), (_, wanted) in zip(*(model.named_parameters() for model in llamas), strict=True):
        assert torch.equal(found, wanted), name
        assert (found.shape, found.dtype, found.device, found.stride()) == (
            wanted.shape, wanted.dtype, wanted.device, wanted.stride(),
        )  # fmt: skip


WRITINGS: dict[str, Callable[[nn.Parameter], object]] = {
    "data": lambda weight: setattr(weight, "data", torch.zeros(3)),
    "data of its data": lambda weight: setattr(weight.data, "data", torch.zeros(3)),
    "in place": lambda weight: weight.add_(1),
    "in place, of its data": lambda weight: weight.data.mul_(2),
    "in inference mode": lambda weight: torch.inference_mode()(lambda: weight.data.mul_(2))(),
    "a row": lambda weight: weight.__setitem__(0, 0),
    "a row of its data": lambda weight: weight.data[0].zero_(),
    "of a view": lambda weight: weight.view(-1)[:4].copy_(torch.ones(4)),
    "initialised": nn.init.zeros_,
    "as output": lambda weight: torch.add(torch.ones(()), torch.ones(()), out=weight),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_who_writes_to_a_weight_that_streams_is_refused_by_name(llamas: Pair, writing: str) -> None:
    wanted = logits(llamas.streamed)
    with pytest.raises(ConfigError, match=rf"{STREAMED}\.weight streams and cannot be overwritten"), torch.no_grad():
        WRITINGS[writing](weight(llamas.streamed))
    assert torch.equal(weight(llamas.streamed), weight(llamas.resident))
    assert torch.equal(logits(llamas.streamed), wanted)


def test_an_address_is_refused(llamas: Pair) -> None:
    with pytest.raises(ConfigError, match=rf"{STREAMED}\.weight streams: its weights have no address"):
        weight(llamas.streamed).data_ptr()


def test_a_detached_model_has_ordinary_parameters(llamas: Pair) -> None:
    djinn.detach(llamas.streamed)
    assert {type(parameter) for parameter in llamas.streamed.parameters()} == {nn.Parameter}
    with torch.no_grad():
        for model in llamas:
            weight(model)[0] = 0
    assert torch.equal(*(logits(model) for model in llamas))


def test_an_interrupt_leaves_no_slot_that_is_taken_for_a_weight(llamas: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = llamas.streamed.get_submodule(STREAMED).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(llamas.streamed)
    handle.remove()
    assert torch.equal(*(logits(model) for model in llamas))
    assert torch.equal(*(weight(model) for model in llamas))


def test_coded_weights_are_true_too(codable_checkpoint: Path) -> None:
    """Resident or streamed: scratch holds what was decoded last."""
    both = pair(codable_checkpoint, host_memory="1 GB", coding="lossless")
    assert placement(both.streamed).is_coded
    assert torch.equal(*(logits(model) for model in both))
    for (name, found), (_, wanted) in zip(*(model.named_parameters() for model in both), strict=True):
        assert torch.equal(found, wanted), name


def test_a_vocabulary_is_resized_as_a_resident_models_or_refused(llamas: Pair, tmp_path: Path) -> None:
    """Here embedding and head are resident; what was resized is what is saved, and what a detached model has."""
    streamed, resident = llamas
    for model in llamas:
        torch.manual_seed(0)
        model.resize_token_embeddings(300)
    assert torch.equal(logits(streamed), logits(resident))
    assert equal(dict(streamed.state_dict()), dict(resident.state_dict()))
    djinn.detach(streamed)
    assert torch.equal(logits(streamed), logits(resident))
    assert logits(streamed).shape[-1] == 300


def test_a_block_whose_forward_is_called_without_its_hooks(tmp_path: Path) -> None:
    """SqueezeBERT does that for all of them; with a pad token it cannot be traced either."""
    config = SqueezeBertConfig(
        vocab_size=256, hidden_size=64, embedding_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, pad_token_id=0, max_position_embeddings=64,
        q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1, output_groups=1,
    )  # fmt: skip
    folder = save_model(SqueezeBertForMaskedLM(config), "squeezebert", tmp_path)
    whole = SqueezeBertForMaskedLM.from_pretrained(folder).eval()
    images = sum(unit.image_bytes for unit in djinn.plan(folder, budget="1 GB", device="cpu").units)
    for kept in (0.3, 0.5, 0.8):
        work = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
        workspace = djinn.plan(folder, budget="1 GB", **work).workspace_bytes  # type: ignore[arg-type]
        try:
            model = djinn.load(folder, budget=workspace + round(kept * images), host_memory="1 B", **work)  # type: ignore[arg-type]
        except djinn.errors.PlanError:
            continue
        assert placement(model).streamed
        for _ in range(2):
            assert torch.equal(logits(model), logits(whole))
        break
    else:
        pytest.fail("no budget streams")


def test_a_block_called_without_its_hooks_in_a_model_that_streams_by_modules(llamas: Pair) -> None:
    """And in between as ever."""
    for model in llamas:
        layer = model.get_submodule("model.layers.1.mlp")
        layer.forward = lambda x, own=layer: own.down_proj(own.act_fn(own.gate_proj.forward(x)) * own.up_proj(x))  # type: ignore[method-assign, misc]
    for _ in range(3):
        assert torch.equal(*(logits(model) for model in llamas))
