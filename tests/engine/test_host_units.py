"""Host units on a CPU that stands for the device: what is copied, what is computed, and how near the outputs are.

That the device is refused where it is the CPU is the public door's; here models are loaded behind it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import engine_of, load_requested, placement
from djinn.errors import ConfigError, UnavailableError
from djinn.host.products import HostProducts
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.placement import Tier
from djinn.planning.request import Request
from djinn.planning.workspace import Workload

Tiny = Callable[[str], Path]
EVEN = HostRates(link=1e9, cores=1e9, wait_s=0.0)
WORK = Workload(prompt_tokens=32, new_tokens=16, batch=2)
NAMES = ["llama", "qwen2", "opt"]
"""Without biases; with some; with all, and a position table."""


@pytest.fixture(autouse=True)
def one_torch_thread(one_thread: None) -> Iterator[None]:
    yield
    gc.collect()


def asked(folder: Path, rates: HostRates | None = EVEN, **options: Any) -> Request:
    """Return a request whose budget keeps about a third of the model on the device."""
    every = djinn.plan(folder, budget="1 GB", device="cpu", prompt_tokens=32, new_tokens=16, batch=2)
    budget = every.workspace_bytes + sum(unit.image_bytes for unit in every.units) * 4 // 10
    request = Request.of(budget=budget, keep=WORK, device="cpu", host_memory="1 GB", **options)
    return replace(request, host=HostCompute(threads=1, rates=rates) if rates is not None else None)


def loaded(folder: Path, rates: HostRates | None = EVEN, **options: Any) -> PreTrainedModel:
    return load_requested(folder, asked(folder, rates, **options))


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def prompt(length: int = 20, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


def generated(model: PreTrainedModel, tokens: torch.Tensor | None = None, count: int = 8) -> Any:
    return model.generate(
        prompt() if tokens is None else tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def decode(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of one token after a prompt, which is a pass of few tokens."""
    with torch.no_grad():
        cache = model(tokens[:, :-1]).past_key_values
        return model(tokens[:, -1:], past_key_values=cache).logits


def host_names(model: PreTrainedModel) -> frozenset[str]:
    share = placement(model).host
    assert share is not None
    return share.units


class InFloat32(nn.Module):
    """A linear layer as the host computes it: sums in float32, rounded once; then the bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        products = (x.float() @ self.layer.weight.float().T).bfloat16()
        return products if self.layer.bias is None else products + self.layer.bias


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_is_that_of_products_summed_in_float32(tiny_checkpoint: Tiny, name: str) -> None:
    folder = tiny_checkpoint(name)
    model = loaded(folder)
    reference = resident(folder)
    cache = decode(model, prompt())
    for layer in host_names(model):
        parent, _, child = layer.rpartition(".")
        setattr(reference.get_submodule(parent), child, InFloat32(reference.get_submodule(layer)))
    assert len(host_names(model)) >= 4
    # The prompt is computed with products in another order by the reference, so the caches are near, not equal.
    torch.testing.assert_close(cache, decode(reference, prompt()), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_pass_is_the_resident_models_bit_for_bit(tiny_checkpoint: Tiny, name: str) -> None:
    folder = tiny_checkpoint(name)
    model, whole = loaded(folder), resident(folder)
    made, exact = generated(model), generated(whole)
    assert torch.equal(made.logits[0], exact.logits[0])
    assert djinn.stats(model).host_computed_bytes > 0
    with torch.no_grad():  # in the middle of a generation, with parameters bound to the slots of the other order
        assert torch.equal(model(prompt(17)).logits, whole(prompt(17)).logits)


def test_tokens_of_a_generation_are_near_the_resident_models(tiny_checkpoint: Tiny) -> None:
    made, exact = generated(loaded(tiny_checkpoint("llama"))), generated(resident(tiny_checkpoint("llama")))
    for step, (logits, expected) in enumerate(zip(made.logits, exact.logits, strict=True)):
        torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)
        if made.sequences[0, 20 + step] != exact.sequences[0, 20 + step]:
            break


@pytest.mark.parametrize("coding", [None, "lossless"])
def test_host_units_are_not_copied_in_decode_steps(codable_checkpoint: Path, coding: str | None) -> None:
    """The link carries the prompt's pass whole, and of every other one what is left, byte for byte."""
    model = loaded(codable_checkpoint, coding=coding)
    planned, stats = placement(model), djinn.stats(model)
    assert planned.is_coded is (coding == "lossless")
    generated(model, count=6)
    every, left = (sum(unit.weight_bytes for unit in units) for units in (planned.streamed, planned.second))
    computed = sum(unit.raw_bytes for unit in planned.streamed if unit.name in host_names(model))
    assert stats.link_bytes == every + 5 * left
    assert stats.host_computed_bytes == 5 * computed
    assert stats.reloads == 0
    assert stats.host_s > 0


@pytest.mark.parametrize("room", ["none", "for some", "for all"])
def test_coded_weights_on_the_link_and_raw_ones_for_the_cores(codable_checkpoint: Path, room: str) -> None:
    """Where host memory has room for both of a host unit, a prompt streams no more than without the cores."""
    exact = loaded(codable_checkpoint, None, coding="lossless")
    request = asked(codable_checkpoint, coding="lossless")
    most = placement(load_requested(codable_checkpoint, request))
    assert most.host is not None
    coded = [unit.image_bytes for unit in most.streamed if unit.name in most.host.units]
    less = {"none": sum(coded), "for some": sum(coded) - min(coded), "for all": 0}[room]
    # The plan keeps room for a ring that raw units make larger.
    model = load_requested(codable_checkpoint, replace(request, host_memory=most.pinned_bytes + most.ring_bytes - less))
    planned, stats, host = placement(model), djinn.stats(model), placement(model).host
    assert host is not None
    assert host.units == most.host.units
    assert {"none": not host.coded_too, "for some": 0 < len(host.coded_too) < len(coded), "for all": True}[room]
    assert (host.coded_too == host.units) is (room == "for all")
    assert all(unit.coded is (unit.name not in host.units - host.coded_too) for unit in planned.streamed)
    waiting = (*planned.at(Tier.PINNED), *planned.raw_copies)
    assert stats.host_bytes == planned.pinned_bytes == sum(unit.image_bytes for unit in waiting)
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, exact(prompt()).logits)
    assert (stats.link_bytes == djinn.stats(exact).link_bytes) is (room == "for all")
    torch.testing.assert_close(decode(model, prompt()), decode(exact, prompt()), atol=0.05, rtol=0.05)
    assert stats.host_computed_bytes == sum(unit.raw_bytes for unit in planned.streamed if unit.name in host.units)
    given_back, whole = djinn.detach(model).parameters(), resident(codable_checkpoint).parameters()
    assert all(torch.equal(one, other) for one, other in zip(given_back, whole, strict=True))


def test_layers_that_read_the_same_inputs_are_one_product(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on; the first shows which they are."""
    products: list[int] = []
    multiply = HostProducts.outputs_of

    def counted(self: HostProducts, weights: Any, *rest: Any) -> Any:
        products.append(len(weights))
        return multiply(self, weights, *rest)

    monkeypatch.setattr(HostProducts, "outputs_of", counted)
    model = loaded(tiny_checkpoint("llama"), HostRates(link=1e6, cores=1e12, wait_s=0.0))  # all that can be
    names = host_names(model)
    assert {"model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"} <= names
    generated(model, count=2)
    assert products == [1] * len(names)
    products.clear()
    expected = decode(loaded(tiny_checkpoint("llama")), prompt())
    products.clear()
    made = decode(model, prompt())
    assert sum(products) == len(names) > len(products)
    assert max(products) >= 2
    torch.testing.assert_close(made, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("change", ["another tensor", "written into", "left out"])
def test_layers_that_once_read_the_same_inputs_need_not_do_so_again(tiny_checkpoint: Tiny, change: str) -> None:
    model = loaded(tiny_checkpoint("llama"), HostRates(link=1e6, cores=1e12, wait_s=0.0))
    engine_of(model).streamer.orders.few = True
    mlp = model.get_submodule("model.layers.2.mlp")
    gate, up = mlp.gate_proj, mlp.up_proj
    chance = torch.Generator().manual_seed(0)

    def inputs() -> torch.Tensor:
        return torch.randn(1, 1, 128, generator=chance).bfloat16()

    def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ layer.weight.clone().float().T).bfloat16()  # type: ignore[operator, union-attr]

    host = [gate.forward, up.forward]
    with torch.no_grad():
        for _ in range(3):
            x = inputs()
            for layer, forward in zip((gate, up), host, strict=True):
                torch.testing.assert_close(forward(x), expected(layer, x), atol=0.01, rtol=0.01)
        x = inputs()
        torch.testing.assert_close(host[0](x), expected(gate, x), atol=0.01, rtol=0.01)
        if change == "another tensor":
            x = x.clone() + 1
        elif change == "written into":
            x += 1
        if change != "left out":
            torch.testing.assert_close(host[1](x), expected(up, x), atol=0.01, rtol=0.01)
        x = inputs()
        for layer, forward in zip((gate, up), host, strict=True):
            torch.testing.assert_close(forward(x), expected(layer, x), atol=0.01, rtol=0.01)


def test_detach_gives_the_model_back_whole(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("qwen2")
    model, whole = loaded(folder), resident(folder)
    generated(model)
    threads = [thread.name for thread in threading.enumerate()]
    djinn.detach(model)
    assert len(threading.enumerate()) <= len(threads)
    assert all("forward" not in vars(module) for module in model.modules())
    state, expected = model.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(decode(model, prompt()), decode(whole, prompt()))


def test_the_state_dict_and_a_saved_model_are_whole_while_it_streams(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model, whole = loaded(tiny_checkpoint("llama")), resident(tiny_checkpoint("llama"))
    generated(model)
    state, expected = model.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(decode(resident(tmp_path), prompt()), decode(whole, prompt()))


def test_ctrl_c_in_a_product_ends_the_pass_and_the_next_generation_is_right(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    undisturbed = generated(loaded(folder)).sequences
    model = loaded(folder)
    multiply = HostProducts.outputs_of
    left = [0]

    def interrupted(self: HostProducts, *given: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            multiply(self, *given)
            raise KeyboardInterrupt
        return multiply(self, *given)

    monkeypatch.setattr(HostProducts, "outputs_of", interrupted)
    for at in (1, 2, 9, 23):
        left[0] = at
        with pytest.raises(KeyboardInterrupt):
            generated(model)
        left[0] = 0
        assert torch.equal(generated(model).sequences, undisturbed)


def test_a_pass_with_gradients_is_exact_and_many_tokens_are_too(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    model, whole = loaded(folder), resident(folder)
    few, many = prompt(5), prompt(17)
    assert torch.equal(model(few).logits, whole(few).logits)
    assert djinn.stats(model).host_computed_bytes == 0
    with torch.no_grad():
        assert torch.equal(model(many).logits, whole(many).logits)
        assert djinn.stats(model).host_computed_bytes == 0
        model(few)
    assert djinn.stats(model).host_computed_bytes > 0


def test_under_inference_mode_too(tiny_checkpoint: Tiny) -> None:
    model = loaded(tiny_checkpoint("llama"))
    expected = decode(model, prompt())
    with torch.inference_mode():
        cache = model(prompt()[:, :-1]).past_key_values
        made = model(prompt()[:, -1:], past_key_values=cache).logits
    assert torch.equal(made, expected)
    assert torch.equal(decode(model, prompt()), expected)


def test_nothing_is_computed_twice_under_inference_mode(tiny_checkpoint: Tiny) -> None:
    """Which layers read the same inputs was learned outside of it, and inside of it nobody knows."""
    model = loaded(tiny_checkpoint("llama"))
    decode(model, prompt())
    decode(model, prompt())
    once = sum(unit.raw_bytes for unit in placement(model).units if unit.name in host_names(model))
    before = djinn.stats(model).host_computed_bytes
    with torch.inference_mode():
        cache = model(prompt()[:, :-1]).past_key_values
        model(prompt()[:, -1:], past_key_values=cache)
    assert djinn.stats(model).host_computed_bytes - before == once


def test_autocast_to_another_dtype_is_left_to_the_layer(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    model, whole = loaded(folder), resident(folder)
    with torch.autocast("cpu", torch.float16):
        made, expected = (decode(each, prompt()) for each in (model, whole))
    assert torch.equal(made, expected)


def test_a_missing_compiler_is_said(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnavailableError("there is no C++ compiler")

    monkeypatch.setattr("djinn.host.build.load", refuse)
    with pytest.warns(RuntimeWarning, match=r"PyTorch multiplies .*: there is no C\+\+ compiler"):
        loaded(tiny_checkpoint("llama"))


def test_a_part_that_is_called_by_itself_is_exact(tiny_checkpoint: Tiny) -> None:
    """Only the whole model says of how many tokens a pass is."""
    folder = tiny_checkpoint("llama")
    model, whole = loaded(folder), resident(folder)
    generated(model)
    computed = djinn.stats(model).host_computed_bytes
    with torch.no_grad():
        made, expected = (each.get_submodule("model")(prompt(3)).last_hidden_state for each in (model, whole))
    assert torch.equal(made, expected)
    assert djinn.stats(model).host_computed_bytes == computed


def test_several_sequences_are_computed_while_they_are_few(tiny_checkpoint: Tiny) -> None:
    model = loaded(tiny_checkpoint("llama"))
    whole = resident(tiny_checkpoint("llama"))
    for batch, computed in ((2, True), (17, False)):
        before = djinn.stats(model).host_computed_bytes
        made, expected = decode(model, prompt(6, batch)), decode(whole, prompt(6, batch))
        assert (djinn.stats(model).host_computed_bytes > before) is computed
        torch.testing.assert_close(made, expected, atol=0.05, rtol=0.05)
        assert computed or torch.equal(made, expected)


def test_nan_weights_make_nan_as_they_do_in_a_resident_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    whole = resident(tiny_checkpoint("llama"))
    names = host_names(loaded(tiny_checkpoint("llama")))
    with torch.no_grad():
        whole.get_submodule(max(names)).weight[0, 0] = float("nan")  # type: ignore[operator, union-attr]
    whole.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert torch.equal(decode(model, prompt()).isnan(), decode(resident(tmp_path), prompt()).isnan())


def test_two_models_on_two_threads(tiny_checkpoint: Tiny) -> None:
    models = {name: loaded(tiny_checkpoint(name)) for name in ("llama", "qwen2")}
    expected = {name: generated(model).sequences for name, model in models.items()}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in models}

    def run(name: str) -> None:
        for _ in range(3):
            made[name].append(generated(models[name]).sequences)

    threads = [threading.Thread(target=run, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, results in made.items():
        assert all(torch.equal(result, expected[name]) for result in results)


def test_host_products_are_on_the_timeline(tiny_checkpoint: Tiny) -> None:
    model = load_requested(tiny_checkpoint("llama"), asked(tiny_checkpoint("llama")), trace=True)
    generated(model, count=2)
    found = [interval for interval in djinn.stats(model).timeline if interval.lane == "host"]
    assert {interval.unit for interval in found} == host_names(model)
    assert all(interval.start_s < interval.end_s for interval in found)


def test_what_host_compute_is_not_for_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    with pytest.raises(ConfigError, match="whose cores compute already"):
        djinn.load(folder, budget="1 GB", device="cpu", host_compute=True)
    single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    single.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"this model's are torch\.float32"):
        load_requested(tmp_path, asked(folder))
    many = replace(asked(folder), host=HostCompute(threads=10**6, rates=EVEN))
    with pytest.raises(ConfigError, match="host_threads: 1000000 is not between"):
        load_requested(folder, many)


def test_a_model_that_fits_has_no_host_units(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    model = load_requested(folder, replace(asked(folder), budget=10**9))
    assert not placement(model).at(Tier.PINNED)
    assert torch.equal(generated(model).sequences, generated(resident(folder)).sequences)
