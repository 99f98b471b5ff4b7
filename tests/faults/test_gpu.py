"""Faults on a GPU: memory that runs out in a pass, hostile packed files, streams of any speed for many passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from codec_cases import normal
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.codec.checksums import checksums, verify
from djinn.codec.encode import encode
from djinn.codec.layout import TILE, sections
from djinn.engine.load import engine_of
from djinn.errors import CheckpointError

pytestmark = pytest.mark.gpu

IDS = torch.arange(5, 12)[None]


@pytest.fixture
def streaming(tiny_checkpoint: Callable[[str], Path]) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A model that streams, and the same one resident."""
    folder = tiny_checkpoint("llama")
    planned = djinn.plan(folder, budget="80 GB", prompt_tokens=8, new_tokens=8, device="cuda")
    budget = planned.workspace_bytes + planned.model_bytes * 6 // 10
    model = djinn.load(folder, budget=budget, prompt_tokens=8, new_tokens=8, device="cuda", host_memory="1 GB")
    assert engine_of(model).plan.streamed
    yield model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def prefill(model: PreTrainedModel) -> None:
    """Ask for more sequences than there is memory for."""
    model(torch.ones((4096, 64), dtype=torch.long, device="cuda"))


@torch.no_grad()
def decode(model: PreTrainedModel) -> None:
    """Let the cache grow until there is no room for it."""
    cache = None
    for _ in range(100_000):
        ids = torch.ones((1, 512), dtype=torch.long, device="cuda")
        cache = model(ids, past_key_values=cache, use_cache=True).past_key_values


@pytest.mark.parametrize("exhaust", [prefill, decode])
def test_memory_that_runs_out_in_a_pass_leaves_a_model_that_works(
    streaming: tuple[PreTrainedModel, PreTrainedModel], exhaust: Callable[[PreTrainedModel], None]
) -> None:
    model, whole = streaming
    wanted = whole(IDS.cuda()).logits
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 48 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        exhaust(model)
    assert any("djinn kept device memory for" in note for note in failure.value.__notes__)
    del failure
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    with torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits, wanted)


@pytest.mark.parametrize("value", [1, -1, 2**31 - 1])
def test_a_blob_whose_offsets_lie_is_refused_before_the_gpu_reads_where_it_says(value: int) -> None:
    made = encode(normal(5 * TILE).cuda())
    assert made is not None
    stored, layout = made[0].cpu(), made[1]
    verify(stored, layout, checksums(stored, layout), "as it was")
    sections(stored, layout).off[2] = value
    with pytest.raises(CheckpointError, match="hostile"):
        verify(stored, layout, checksums(stored, layout), "hostile")


def test_two_hundred_passes_of_streams_of_any_speed_are_bit_stable(
    streaming: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, whole = streaming
    chance = random.Random(0)
    copier = engine_of(model).copier
    really = copier.submit

    def late(unit: int, after: int | None) -> None:
        really(unit, after)
        if chance.random() < 0.3:
            stream = chance.choice([copier.stream, torch.cuda.current_stream()])  # type: ignore[attr-defined]
            with torch.cuda.stream(stream):
                torch.cuda._sleep(chance.randrange(2_000_000))

    copier.submit = late  # type: ignore[method-assign]
    with torch.no_grad():
        for number in range(200):
            ids = torch.randint(whole.config.vocab_size, (1, 7), device="cuda")
            if chance.random() < 0.1:
                djinn.cool(model)
            assert torch.equal(model(ids).logits, whole(ids).logits), number


@pytest.mark.parametrize("coding", [None, "lossless"])
def test_weights_read_between_passes_are_the_true_ones(codable_checkpoint: Path, coding: str | None) -> None:
    """Streamed ones, from pinned memory and from disk, raw and coded; passes go on as before."""
    planned = djinn.plan(codable_checkpoint, budget="80 GB", prompt_tokens=8, new_tokens=8, device="cuda")
    model = djinn.load(
        codable_checkpoint,
        budget=planned.workspace_bytes + planned.model_bytes * 6 // 10,
        ring="6 MB",
        prompt_tokens=8,
        new_tokens=8,
        device="cuda",
        host_memory="30 MB" if coding else "4 MB",
        coding=coding,  # type: ignore[arg-type]
    )
    whole = AutoModelForCausalLM.from_pretrained(codable_checkpoint, dtype="auto").eval().to("cuda")
    plan = engine_of(model).plan
    assert plan.streamed
    assert coding or plan.disk_bytes
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(IDS.cuda()).logits, whole(IDS.cuda()).logits)
            for (name, weight), (_, wanted) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
                assert weight.device.type == "cuda"
                assert torch.equal(weight * 2, wanted * 2), name
                assert torch.equal(weight[0], wanted[0]), name
    state = model.state_dict()
    assert all(torch.equal(state[name].cpu(), wanted.cpu()) for name, wanted in whole.state_dict().items())
    djinn.detach(model)
    assert torch.equal(model.cuda()(IDS.cuda()).logits, whole(IDS.cuda()).logits)
