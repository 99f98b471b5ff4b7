"""torch.compile on a streamed model: right, or refused where one graph is asked for; never yesterday's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from pairs import Pair, pair, prompt, resident, streamed
from tiny_models import TINY
from torch import nn
from transformers import AutoModelForCausalLM

import djinn
from djinn.engine.load import engine_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def short_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few layers as can differ in what of them is streamed: compiling takes seconds for each."""
    folder = tmp_path_factory.mktemp("short")
    config = copy.deepcopy(TINY["llama"])
    config.num_hidden_layers = 2
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 10)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model: Callable[..., object], length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(length)).logits  # type: ignore[attr-defined]


def wrapped(model: nn.Module, backend: object) -> Callable[..., object]:
    return torch.compile(model, backend=backend)


def layers_in_place(model: nn.Module, backend: object) -> Callable[..., object]:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def layers_wrapped(model: nn.Module, backend: object) -> Callable[..., object]:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend=backend)
    return model


def forward(model: nn.Module, backend: object) -> Callable[..., object]:
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


WAYS = [wrapped, layers_in_place, layers_wrapped, forward]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_gives_the_resident_models_bits(
    short_checkpoint: Path, way: Callable[[nn.Module, object], Callable[..., object]]
) -> None:
    """With a backend that runs torch's own kernels; also after the compiler was there before djinn.

    Layers of equal shape share their code. Some of a streamed model's are resident and have no hooks; code compiled
    for them, or for another model, would read a slot before its weights are there if it ran for a streamed one.
    """
    whole = resident(short_checkpoint)
    wanted = {length: logits(whole, length) for length in (1, 7)}
    logits(way(whole, "eager"), 7)
    model = streamed(short_checkpoint)
    names = [name for layer in model.model.layers for name, module in layer.named_modules() if "_turns" in vars(module)]
    assert min(map(names.count, names)) < len(model.model.layers)
    backend = torch._dynamo.testing.CompileCounter()
    compiled = way(model, backend)
    for length in (7, 7, 1):
        assert torch.equal(logits(compiled, length), wanted[length])
    assert backend.frame_count > 0
    stats = djinn.stats(model)
    assert (stats.passes, stats.reloads, stats.skips) == (3, 0, 0)
    assert stats.visits == 3 * len(engine_of(model).plan.streamed)


def test_a_compiled_model_generates(short_checkpoint: Path) -> None:
    both = pair(short_checkpoint)
    both.streamed.compile(backend="eager")
    found, wanted = (model.generate(prompt(5), max_new_tokens=3, do_sample=False) for model in both)
    assert torch.equal(found, wanted)


def test_the_default_backend_computes_with_the_weights_of_this_pass(short_checkpoint: Path) -> None:
    """Inductor's own kernels round otherwise; every pass gives the same, and nearly the resident model's."""
    both: Pair = pair(short_checkpoint)
    wanted = logits(both.resident, 7)
    layers_in_place(both.streamed, "inductor")
    first, *later = (logits(both.streamed, 7) for _ in range(3))
    assert all(torch.equal(first, other) for other in later)
    torch.testing.assert_close(first, wanted, atol=0.2, rtol=0)
    assert (first.argmax(-1) == wanted.argmax(-1)).all()


def test_one_graph_is_refused_with_what_to_do_instead(short_checkpoint: Path) -> None:
    model = streamed(short_checkpoint)
    wanted = logits(model, 7)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"):
        logits(compiled, 7)
    assert torch.equal(logits(model, 7), wanted)


def test_a_model_that_fits_compiles_whole(short_checkpoint: Path) -> None:
    folder = short_checkpoint
    model = djinn.load(folder, budget="1 GB", device="cpu")
    wanted = logits(model, 7)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.equal(logits(model, 7), wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_reads_a_weight_without_its_module_reads_the_true_one(
    short_checkpoint: Path, backend: str
) -> None:
    both = pair(short_checkpoint)
    for model in both:
        for layer in model.model.layers:
            mlp = layer.mlp
            mlp.forward = lambda x, own=mlp: own.down_proj(  # type: ignore[misc]
                own.act_fn(own.gate_proj.forward(x)) * nn.functional.linear(x, own.up_proj.weight)
            )
    wanted = logits(both.resident, 7)
    compiled = wrapped(both.streamed, backend)
    for _ in range(2):
        assert torch.equal(logits(compiled, 7), wanted)
