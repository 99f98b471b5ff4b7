"""Everything that generate() does, on a streamed model as on the resident one: equal tokens, scores and states."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import Pair, equal, pair, prompt, resident, streamed
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import djinn
from djinn.engine.load import placement
from djinn.weights.tokenizer import byte_tokenizer

Tiny = Callable[[str], Path]
FAMILIES = ("llama", "gpt2", "mixtral")
OUTPUTS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def models(tiny_checkpoint: Tiny, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A model that goes through all of this module's tests, one after the other."""
    both = pair(tiny_checkpoint(request.param))
    assert placement(both.streamed).away
    yield both
    stats = djinn.stats(both.streamed)
    assert stats.link_bytes > 0


@pytest.fixture(scope="module")
def tokenizer(models: Pair) -> PreTrainedTokenizerFast:
    """One token per byte; what the vocabulary of 256 does not reach is not used in these prompts."""
    config = models.resident.config.__class__(**{**models.resident.config.to_dict(), "eos_token_id": 2})
    config.bos_token_id, config.pad_token_id = 1, 0
    tokenizer = byte_tokenizer(config)
    tokenizer.padding_side = "left"
    return tokenizer


def generated(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> dict[str, Any]:
    """Return all that generate() gives, the cache excepted, with the same seed for every call."""
    torch.manual_seed(11)
    result = model.generate(ids, **{"max_new_tokens": 6, **OUTPUTS, **options})
    return {name: value for name, value in result.items() if name != "past_key_values"}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7, "early_stopping": True},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "states": {"output_hidden_states": True, "output_attentions": True},
    "end of sequence": {"eos_token_id": list(range(0, 256, 5)), "do_sample": True, "max_new_tokens": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 10},
    "sampled prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": True, "max_new_tokens": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_what_the_resident_model_gives(models: Pair, mode: str) -> None:
    ids = prompt(5, batch=1 if "lookup" in mode else 2)
    found, wanted = (generated(model, ids, **MODES[mode]) for model in models)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert equal(found[name], wanted[name]), name
    assert wanted["sequences"].shape[1] > ids.shape[1]


def test_a_batch_with_left_padding(models: Pair) -> None:
    ids, mask = prompt(6, batch=3), torch.ones(3, 6, dtype=torch.long)
    for row, padding in enumerate((0, 2, 4)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    for options in ({"do_sample": False}, {"num_beams": 2}):
        assert equal(*(generated(model, ids, attention_mask=mask, **options) for model in models))


def test_stopping_criteria_end_it_where_they_end_the_resident_model(models: Pair) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

    found, wanted = (generated(model, prompt(5), stopping_criteria=[AfterThree()], do_sample=True) for model in models)
    assert equal(found, wanted)
    assert wanted["sequences"].shape == (1, 8)


def test_a_conversation_goes_on_with_its_cache(models: Pair) -> None:
    """The second turn reads the first one's keys and values; the resident model's second turn starts from nothing."""
    turns = []
    for model in models:
        first = model.generate(prompt(5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, prompt(3)], dim=1)
        turns.append(model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False))
    assert torch.equal(*turns)
    before = djinn.stats(models.streamed).passes
    static = StaticCache(config=models.streamed.config, max_cache_len=32)
    for _ in range(2):
        static.reset()
        found = models.streamed.generate(prompt(5), past_key_values=static, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, models.resident.generate(prompt(5), max_new_tokens=4, do_sample=False))
    assert djinn.stats(models.streamed).passes == before + 8


def test_text_is_streamed_as_it_comes(
    models: Pair, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer("stream", return_tensors="pt")
    printed = []
    for model in models:
        model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("stream")
    texts = []
    for model in models:
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        options = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert "".join(texts[0]) == printed[0].removesuffix("\n")


def test_a_pipeline_takes_a_streamed_model(models: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompts = ["one", "another", "and a third"]
    found, wanted = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=2, generation_config=options)
        for model in models
    )
    assert found == wanted
    assert all(len(answers[0]["generated_text"]) > len(text) for answers, text in zip(wanted, prompts, strict=True))


@pytest.mark.slow
def test_a_draft_model_makes_one_pass_verify_several_tokens(models: Pair, tiny_checkpoint: Tiny) -> None:
    """A draft that agrees, which makes one pass give several tokens, and one that does not, which changes no token."""
    agreeing, other = models.resident, resident(tiny_checkpoint("opt"))
    for draft, most in ((agreeing, 6), (other, 12)):
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0
        greedy = {"do_sample": False, "max_new_tokens": 12, "assistant_model": draft}
        stats = djinn.stats(models.streamed)
        before = stats.passes
        found, wanted = (generated(model, prompt(5), **greedy) for model in models)
        assert equal(found, wanted)
        assert stats.passes - before <= most
    sampled = {"assistant_model": other, "do_sample": True, "max_new_tokens": 8}
    assert equal(*(generated(model, prompt(5), **sampled) for model in models))


def test_a_streamed_model_may_be_the_draft(models: Pair) -> None:
    found, wanted = (
        models.resident.generate(prompt(5), assistant_model=draft, do_sample=False, max_new_tokens=8)
        for draft in models
    )
    assert torch.equal(found, wanted)


def test_layers_of_its_own_as_a_draft(tiny_checkpoint: Tiny) -> None:
    """An early exit leaves layers out in some passes: another order, and nothing else."""
    both = pair(tiny_checkpoint("llama"))
    options = {"assistant_early_exit": 2, "do_sample": False, "max_new_tokens": 8}
    assert equal(*(generated(model, prompt(5), **options) for model in both))


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("optimum", "hqq"))), reason="neither optimum-quanto nor hqq is installed"
)
def test_a_quantised_cache(models: Pair) -> None:
    backend = "quanto" if importlib.util.find_spec("optimum") else "hqq"
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, "nbits": 4}}
    assert equal(*(generated(model, prompt(5), **options) for model in models))


def test_modes_that_transformers_keeps_elsewhere_say_so(models: Pair) -> None:
    """Contrastive search is remote code by now, and a streamed model says what a resident one does."""
    for model in models:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            model.generate(prompt(5), penalty_alpha=0.6, top_k=4)


def test_generate_does_not_compile_a_pass_with_hooks(models: Pair) -> None:
    """A static cache on a GPU would; the device map tells it not to."""
    from transformers.generation import CompileConfig

    config = GenerationConfig(compile_config=CompileConfig(backend="eager"))
    config.compile_config._compile_all_devices = True  # type: ignore[union-attr]
    cache = StaticCache(config=models.streamed.config, max_cache_len=8)
    criteria = [model._valid_auto_compile_criteria({"past_key_values": cache}, config) for model in models]
    assert criteria == [False, models.resident._can_compile_fullgraph]


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "static"])
def test_an_offloaded_cache(tiny_checkpoint: Tiny, cache: str) -> None:
    """The cache crosses the link on streams of its own beside the weights."""
    folder = tiny_checkpoint("llama")
    streaming, whole = streamed(folder, "cuda"), resident(folder, "cuda")
    options = {"cache_implementation": cache, "disable_compile": True, "do_sample": False}
    for length in (5, 16):
        ids = prompt(length).cuda()
        assert equal(*(generated(model, ids, **options) for model in (streaming, whole)))


@pytest.mark.parametrize("asks", [True, False])
def test_last_logits_of_several_prompts_are_the_resident_models_whether_weights_ask_for_gradients(
    tiny_checkpoint: Tiny, asks: bool
) -> None:
    """Torch chooses how to multiply what does not lie in one piece by whether weights ask, recording or not."""
    model, whole = pair(tiny_checkpoint("llama"))
    for each in (model, whole):
        each.requires_grad_(asks)
    with torch.no_grad():
        found, wanted = (each(prompt(7, 3), logits_to_keep=1).logits for each in (model, whole))
    assert torch.equal(found, wanted)
    assert all(parameter.requires_grad is asks for parameter in model.parameters())


def test_no_weight_asks_for_gradients_in_a_pass_that_records_them(tiny_checkpoint: Tiny) -> None:
    model = streamed(tiny_checkpoint("llama"))
    head = model.get_submodule("lm_head")
    head.weight.requires_grad_(False)
    seen: list[bool] = []
    handle = model.get_submodule("model.layers.1").register_forward_hook(
        lambda *_: seen.append(any(parameter.requires_grad for parameter in model.parameters()))
    )
    for interrupt in (False, True):
        if interrupt:
            broken = head.register_forward_pre_hook(_interrupting)
            with pytest.raises(KeyboardInterrupt):
                model(prompt(5))
            broken.remove()
        else:
            assert not model(prompt(5)).logits.requires_grad
        silent = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert silent == {"lm_head.weight"}
    handle.remove()
    assert seen == [False, False]


def _interrupting(*_: object) -> None:
    raise KeyboardInterrupt
