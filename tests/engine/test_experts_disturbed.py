"""Routed experts after errors, interrupts and other threads, and what is left when they are taken off."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import PROMPT, assert_right, engine_experts, experts_of, logits, streaming
from transformers import PreTrainedModel

import djinn
from djinn.engine.load import engine_of, placement
from djinn.errors import CheckpointError
from djinn.planning.placement import Tier
from djinn.transport.fetcher import CpuFetcher

pytestmark = pytest.mark.usefixtures("one_thread")
whole_too = pytest.mark.parametrize("whole_from", [None, 8], ids=["routed", "whole"])


class OfTheTestError(Exception):
    """Raised by a hook of the test."""


# Errors and interrupts


@whole_too
@pytest.mark.parametrize("error", [OfTheTestError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_after_an_error_in_an_experts_module_passes_are_right(
    folder: Path, resident: PreTrainedModel, whole_from: int | None, error: type[BaseException], layer: int
) -> None:
    model = streaming(folder, whole_from=whole_from)
    expected = logits(resident)

    def fail(*_: object) -> None:
        raise error

    for place in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(experts_of(model, layer), place)(fail)
        with pytest.raises(error):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)
    assert_right(model, resident)


@whole_too
def test_after_an_interrupt_a_module_shows_its_weights_at_once(
    folder: Path, resident: PreTrainedModel, whole_from: int | None
) -> None:
    model = streaming(folder, whole_from=whole_from)
    module = experts_of(model, 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert not {"gate_up_proj", "down_proj"} & vars(module).keys()
    assert torch.equal(module.gate_up_proj.detach(), experts_of(resident, 1).gate_up_proj)  # type: ignore[operator]
    assert_right(model, resident)


@whole_too
@pytest.mark.parametrize("layer", [0, 1])
def test_what_was_on_its_way_at_an_interrupt_is_waited_for_in_the_next_pass(
    folder: Path, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, whole_from: int | None, layer: int
) -> None:
    model = streaming(folder, whole_from=whole_from)
    move = CpuFetcher._move

    def slow(*args: Any) -> float:
        time.sleep(0.05)
        return move(*args)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CpuFetcher, "_move", slow)
    handle = experts_of(model, layer).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), logits(resident))


def test_rounds_that_were_interrupted_land_on_nothing(
    folder: Path, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still on its way then must not come into a slot that the next pass has filled."""
    model = streaming(folder, "half")
    move, fetcher = CpuFetcher._move, engine_experts(model).fetcher

    def slow(*args: Any) -> float:
        time.sleep(0.05)
        return move(*args)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CpuFetcher, "_move", slow)
        patch.setattr(fetcher, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    for _ in range(3):
        assert torch.equal(logits(model, PROMPT[:1, :1]), logits(resident, PROMPT[:1, :1]))
        time.sleep(0.2)  # by now all that was on its way has come


def test_no_gradient_is_made_with_experts_that_have_left(folder: Path) -> None:
    model = streaming(folder)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(PROMPT)
    hidden = model.model(inputs_embeds=embedded.requires_grad_()).last_hidden_state
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@whole_too
@pytest.mark.parametrize("step", ["enter", "note", "wait"])
def test_an_interrupt_while_experts_are_fetched_leaves_nothing_wrong(
    folder: Path, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, whole_from: int | None, step: str
) -> None:
    model = streaming(folder, whole_from=whole_from)
    experts = engine_experts(model)
    target: object = {"enter": experts._cache, "note": experts._layers[1].where, "wait": experts.fetcher}[step]
    for calls in (0, 1, 3):
        left = calls
        usual = getattr(target, step)

        def interrupted(*args: object, usual: Callable[..., None] = usual) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
            usual(*args)

        with monkeypatch.context() as patch:
            patch.setattr(target, step, interrupted)
            if left == 0 and not (step == "note" and whole_from):  # raw experts that come whole are not looked up
                with pytest.raises(KeyboardInterrupt):
                    logits(model)
            else:
                with contextlib.suppress(KeyboardInterrupt):
                    logits(model)
        assert_right(model, resident)


@whole_too
def test_a_file_that_ends_in_the_middle_of_a_pass_is_named_and_passes_are_right_once_it_is_back(
    tmp_path: Path, resident: PreTrainedModel, whole_from: int | None
) -> None:
    resident.save_pretrained(tmp_path, max_shard_size="200KB")
    model = streaming(tmp_path, "half" if whole_from is None else "two windows", whole_from, host_memory="1 B")
    assert {unit.name for unit in placement(model).at(Tier.DISK)} == {unit.name for unit in placement(model).routed}
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

    def cut(*_: object) -> None:
        for path in files:
            os.truncate(path, 0)

    handle = experts_of(model, 0).register_forward_hook(cut)
    with pytest.raises(CheckpointError, match="it was longer when indexed"):
        logits(model, PROMPT)
    handle.remove()
    with pytest.raises(CheckpointError, match="it was longer when indexed"):
        logits(model, PROMPT)
    for path, content in files.items():
        path.write_bytes(content)
    assert_right(model, resident)


def test_experts_that_nobody_read_and_that_cannot_be_read_leave_their_module_as_it_was(
    tmp_path: Path, resident: PreTrainedModel
) -> None:
    resident.save_pretrained(tmp_path, max_shard_size="200KB")
    model = streaming(tmp_path, host_memory="1 B")
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    module = experts_of(model, 0)
    vars(module)["forward"] = lambda hidden, *_: hidden
    for path in files:
        os.truncate(path, 0)
    with pytest.raises(CheckpointError, match="it was longer when indexed"):
        logits(model)
    del vars(module)["forward"]
    assert not {"gate_up_proj", "down_proj"} & vars(module).keys()
    for path, content in files.items():
        path.write_bytes(content)
    assert_right(model, resident)


@whole_too
def test_two_threads_take_turns(folder: Path, resident: PreTrainedModel, whole_from: int | None) -> None:
    model = streaming(folder, whole_from=whole_from)
    prompts = [PROMPT, PROMPT[:1, :1], PROMPT[:, 2:5]]
    expected = [logits(resident, ids) for ids in prompts]
    wrong: list[int] = []

    def run(first: int) -> None:
        for number in (first, first + 1, first + 2) * 3:
            if not torch.equal(logits(model, prompts[number % 3]), expected[number % 3]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The end


@whole_too
def test_detaching_gives_the_model_back_and_leaves_nothing(
    folder: Path, resident: PreTrainedModel, whole_from: int | None
) -> None:
    model = streaming(folder, whole_from=whole_from)
    logits(model)
    djinn.detach(model)
    for (name, module), plain in zip(model.named_modules(), resident.modules(), strict=True):
        assert vars(module).keys() == vars(plain).keys(), name
        assert type(module) is type(plain), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    wanted = resident.state_dict()
    found = model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert_right(model, resident)


@pytest.mark.parametrize("error", [None, OfTheTestError, KeyboardInterrupt])
def test_a_model_that_is_dropped_is_freed_with_its_pool(folder: Path, error: type[BaseException] | None) -> None:
    model = streaming(folder)
    if error is not None:

        def fail(*_: object) -> None:
            raise error

        handle = experts_of(model, 1).register_forward_pre_hook(fail)
        with pytest.raises(error):
            logits(model)
        handle.remove()
    else:
        logits(model)
    experts, weights = engine_experts(model), engine_of(model).weights
    pool = experts.fetcher._slots  # type: ignore[attr-defined]
    image = experts._layers[0].sources[0].image
    parts = [weakref.ref(part) for part in (model, experts, weights, experts.fetcher, pool, image)]
    del experts, weights, pool, image
    del model
    if error is not None:
        del handle
    gc.collect()
    assert [part() for part in parts] == [None] * 6
