"""Threads, signals and exceptions around generate() on a streamed model: every result is the resident model's."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pairs import Pair, pair, prompt, resident, streamed
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import djinn
from djinn.engine.load import engine_of
from djinn.errors import ConfigError

Tiny = Callable[[str], Path]
GREEDY = {"do_sample": False, "max_new_tokens": 6}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Tiny) -> Pair:
    return pair(tiny_checkpoint("llama"))


@pytest.fixture(scope="module")
def wanted(models: Pair) -> dict[int, torch.Tensor]:
    """What the resident model generates from prompts of several lengths."""
    return {length: models.resident.generate(prompt(length), **GREEDY) for length in range(3, 9)}


def states(model: PreTrainedModel, length: int = 5) -> torch.Tensor:
    """Call the decoder without its head, as generate() calls an encoder: no pass of the whole model is around it."""
    with torch.no_grad():
        return model.model(prompt(length)).last_hidden_state


def right(model: nn.Module, wanted: dict[int, torch.Tensor], length: int = 5) -> bool:
    return torch.equal(model.generate(prompt(length), **GREEDY), wanted[length])  # type: ignore[operator]


@pytest.mark.slow
def test_threads_that_generate_at_once_are_all_right(models: Pair, wanted: dict[int, torch.Tensor]) -> None:
    """Passes take turns, and in the recorded order: nothing is copied twice for it."""
    stats = djinn.stats(models.streamed)
    before, reloads = stats.passes, stats.reloads
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda length: right(models.streamed, wanted, length), list(wanted) * 3)
        assert all(results)
    assert stats.passes - before == 3 * len(wanted) * GREEDY["max_new_tokens"]
    assert stats.reloads == reloads


def test_threads_that_call_modules_of_it_meanwhile_are_right_too(models: Pair, wanted: dict[int, torch.Tensor]) -> None:
    """Single modules, whole models, an empty ring: everything at once, each as if it were alone."""
    layers = range(len(models.resident.model.layers))
    x = torch.randn(1, 3, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = [models.resident.model.layers[number].mlp(x) for number in layers]
        head, hidden = models.resident.lm_head(x), states(models.resident)

    def run(seed: int) -> bool:
        chance = random.Random(seed)
        for _ in range(12):
            what = chance.randrange(5)
            number = chance.choice(layers)
            with torch.no_grad():
                if what == 0 and not torch.equal(models.streamed.model.layers[number].mlp(x), alone[number]):
                    return False
                if what == 1 and not torch.equal(models.streamed.lm_head(x), head):
                    return False
                if what == 2:
                    djinn.cool(models.streamed)
                if what == 3 and not torch.equal(states(models.streamed), hidden):
                    return False
                if what == 4 and not right(models.streamed, wanted, chance.choice(list(wanted))):
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(8)))


def test_a_model_detached_while_a_thread_generates(tiny_checkpoint: Tiny, wanted: dict[int, torch.Tensor]) -> None:
    """It waits for the pass, and the thread goes on with the resident model that it has now."""
    model = streamed(tiny_checkpoint("llama"))
    begun = threading.Event()

    class Begun(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            begun.set()

        def end(self) -> None: ...

    with ThreadPoolExecutor(2) as threads:
        results = [
            threads.submit(model.generate, prompt(5), streamer=Begun(), **GREEDY | {"max_new_tokens": 30})
            for _ in range(2)
        ]
        begun.wait()
        djinn.detach(model)
        first, second = (result.result() for result in results)
    assert torch.equal(first[:, :11], wanted[5])
    assert torch.equal(first, second)
    whole = resident(tiny_checkpoint("llama"))
    assert [type(module) for module in model.modules()] == [type(module) for module in whole.modules()]
    assert "_turns" not in {name for module in model.modules() for name in vars(module)}


def test_what_would_change_the_ring_in_the_middle_of_a_pass_is_refused(models: Pair) -> None:
    for call in (djinn.cool, djinn.detach):
        handle = models.streamed.model.layers[2].register_forward_hook(lambda *_, call=call: call(models.streamed))
        with pytest.raises(ConfigError, match=rf"djinn\.{call.__name__} was called in the middle of a pass"):
            models.streamed(prompt(3))
        handle.remove()


def test_a_streamed_model_has_the_classes_that_it_had(models: Pair) -> None:
    """Its modules have classes of their own, of the same name, which are the original ones' children."""
    for ours, theirs in zip(models.streamed.modules(), models.resident.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
    assert repr(models.streamed) == repr(models.resident)


class Raising(StoppingCriteria, BaseStreamer):
    """Raises where generate() asks it for the third time, as a stopping criterion or as a streamer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == 3:
            raise self.error

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self._count()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def put(self, value: torch.Tensor) -> None:
        self._count()

    def end(self) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_whatever_is_raised_in_generate_the_next_one_is_right(
    models: Pair, wanted: dict[int, torch.Tensor], error: BaseException
) -> None:
    for options in ({"streamer": Raising(error)}, {"stopping_criteria": [Raising(error)]}):
        with pytest.raises(type(error)):
            models.streamed.generate(prompt(5), **GREEDY, **options)
        assert right(models.streamed, wanted)
    for name in ("model.embed_tokens", "model.layers.1", "model.layers.3.mlp.up_proj", "lm_head"):
        raising = Raising(error)
        module = models.streamed.get_submodule(name)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            raising.calls = 0
            handle = register(lambda *_, raising=raising: raising._count())
            with pytest.raises(type(error)):
                models.streamed.generate(prompt(5), **GREEDY)
            handle.remove()
            with ThreadPoolExecutor(1) as other:
                assert other.submit(right, models.streamed, wanted).result(timeout=60)
            assert right(models.streamed, wanted)


def test_a_part_called_after_an_interrupt_begins_anew(models: Pair) -> None:
    """What the interrupted pass was reading is not being read any more, although no new pass has begun."""
    hidden = states(models.resident)
    for name in ("model.embed_tokens", "model.layers.1.self_attn.o_proj", "model.layers.3.mlp.up_proj", "lm_head"):
        raising = Raising(KeyboardInterrupt())
        handle = models.streamed.get_submodule(name).register_forward_hook(lambda *_, raising=raising: raising._count())
        with pytest.raises(KeyboardInterrupt):
            models.streamed.generate(prompt(5), **GREEDY)
        handle.remove()
        assert torch.equal(states(models.streamed), hidden)


@pytest.fixture
def interrupt_after() -> Iterator[Callable[[float], threading.Timer]]:
    """Interrupts the main thread as Ctrl-C does, after some seconds."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def start(seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        return timer

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield start
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
@pytest.mark.parametrize("host_memory", ["1 B", "1 GB"])
def test_signals_at_any_time_leave_a_model_that_works(
    tiny_checkpoint: Tiny,
    wanted: dict[int, torch.Tensor],
    interrupt_after: Callable[[float], threading.Timer],
    host_memory: str,
) -> None:
    """Real signals, at random times, while another thread generates as well: its result is not theirs to change."""
    model = streamed(tiny_checkpoint("llama"), host_memory=host_memory)
    chance = random.Random(4)
    uninterrupted = 0
    with ThreadPoolExecutor(1) as threads:
        for number in range(24):
            other = threads.submit(right, model, wanted, 4) if number % 2 else None
            with suppress(KeyboardInterrupt):
                timer = interrupt_after(chance.uniform(0.002, 0.05))
                model.generate(prompt(5), **GREEDY)
                uninterrupted += 1
                timer.join()
            assert right(model, wanted, 6)
            assert other is None or other.result(timeout=60)
    assert uninterrupted < 24
    assert not engine_of(model).streamer.turns.running
