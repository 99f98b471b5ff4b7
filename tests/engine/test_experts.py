"""Routed experts give the resident model's bits, whatever way transformers runs them and however small the pool is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import ROUTED, WORK, counted_picks, engine_experts, poisoned, routed
from tiny_models import save_model
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, PretrainedConfig, PreTrainedModel

import djinn
from djinn.engine import coding as coding_in_engine
from djinn.engine.handed import HandedWeights
from djinn.engine.load import cool, engine_of, placement
from djinn.engine.whereabouts import Whereabouts
from djinn.planning.placement import Tier
from djinn.weights.experts import routed_experts
from djinn.weights.tensors import FileSpan

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 20},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
]
POOLS = ["k", "half", "two windows", "all but one"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
PROMPT = torch.arange(3, 23).view(2, 10)
MASK = torch.ones_like(PROMPT)
MASK[0, :4] = 0


Folders = Callable[[str], Path]
Residents = Callable[[str], PreTrainedModel]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def generated(model: PreTrainedModel, way: dict[str, Any], ids: torch.Tensor = PROMPT) -> list[torch.Tensor]:
    """Return the sequences, and the logits of every step."""
    torch.manual_seed(1)
    found = model.generate(
        ids,
        attention_mask=MASK[: len(ids)],
        max_new_tokens=5,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **way,
    )
    return [found.sequences, *(found.logits or ())]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def assert_same_bits(model: PreTrainedModel, resident: PreTrainedModel, implementation: str, way: int) -> None:
    """Compare passes of many tokens, of one, of a few, of many again; and a way of generating."""
    experts = engine_experts(model)
    for each in (resident, model):
        each.set_experts_implementation(implementation)
    for whole_from in (None, 8) if experts._pool.windows else (None,):
        experts._whole_from = whole_from
        poisoned(model)
        for ids in (PROMPT, PROMPT[:1, :1], PROMPT[:, :3], PROMPT[1:, 4:5], PROMPT):
            assert torch.equal(logits(model, ids), logits(resident, ids)), (whole_from, tuple(ids.shape))
        assert equal(generated(model, WAYS[way]), generated(resident, WAYS[way])), (whole_from, WAYS[way])


@pytest.mark.parametrize("coding", [None, "lossless"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ROUTED)
def test_bits_are_those_of_the_resident_model(
    folders: Folders, residents: Residents, name: str, pool: str, coding: str | None
) -> None:
    """Every implementation; with each another way of generating, which the slow test below crosses."""
    model = routed(folders(name), pool, coding=coding)
    tensors = [tensor for layer in engine_experts(model)._layers for tensor in layer.tensors]
    assert {tensor.coded for tensor in tensors} == {coding is not None}
    first = POOLS.index(pool) + list(ROUTED).index(name)
    for number, implementation in enumerate(IMPLEMENTATIONS):
        assert_same_bits(model, residents(name), implementation, (first + number) % len(WAYS))
    assert djinn.stats(model).expert_misses > 0
    assert (djinn.stats(model).whole_layers > 0) == (engine_experts(model)._pool.windows > 0)


@pytest.mark.slow
@pytest.mark.parametrize("coding", [None, "lossless"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ROUTED)
def test_bits_of_every_way_of_generating(
    folders: Folders, residents: Residents, name: str, pool: str, coding: str | None
) -> None:
    model = routed(folders(name), pool, coding=coding)
    for implementation in IMPLEMENTATIONS:
        for way in range(len(WAYS)):
            assert_same_bits(model, residents(name), implementation, way)


@pytest.mark.parametrize(
    ("pool", "host_memory"), [("k", "1 GB"), ("half", "1 B"), ("two windows", "400 KB")], ids=["host", "disk", "both"]
)
@pytest.mark.parametrize("name", ROUTED)
def test_packed_experts_of_one_tensor_are_fetched_one_by_one_and_give_the_same_bits(
    residents: Residents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pool: str, host_memory: str
) -> None:
    residents(name).save_pretrained(tmp_path / "plain", save_original_format=False, max_shard_size="200KB")
    packed = djinn.pack(tmp_path / "plain", tmp_path / "packed", device="cpu")
    with monkeypatch.context() as patch:
        for what in ("encode", "decode"):
            patch.setattr(coding_in_engine, what, None)  # nothing is coded or decoded while it is loaded
        model = routed(packed, pool, host_memory=host_memory)
    made = placement(model)
    parts = [part.entry for unit in made.routed for expert in unit.experts for part in expert.tensors]
    assert all(part.layout is not None and isinstance(part.source, FileSpan) for part in parts)
    assert {Tier.PINNED: host_memory != "1 B", Tier.DISK: host_memory != "1 GB"} == {
        tier: any(unit.experts for unit in made.at(tier)) for tier in (Tier.PINNED, Tier.DISK)
    }
    first = list(ROUTED).index(name)
    for number, implementation in enumerate(IMPLEMENTATIONS):
        assert_same_bits(model, residents(name), implementation, (first + number) % len(WAYS))
    assert djinn.stats(model).expert_misses > 0


@pytest.mark.parametrize("pool", ["k", "two windows"])
def test_guessed_tokens_give_the_same_text(folders: Folders, residents: Residents, pool: str) -> None:
    """Passes of several tokens in between, by what the prompt repeats and by a smaller model."""
    model, resident = routed(folders("mixtral"), pool), residents("mixtral")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    helper = residents("gpt_oss")
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        found, wanted = (generated(each, {"do_sample": False} | way, ids) for each in (model, resident))
        assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("host_memory", ["1 B", "1 GB"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_dense_weights_may_stream_beside_experts_and_both_wait_on_disk(
    folders: Folders, residents: Residents, name: str, host_memory: str
) -> None:
    model = routed(folders(name), "least", host_memory=host_memory)
    assert placement(model).streamed
    for number, implementation in enumerate(IMPLEMENTATIONS):
        assert_same_bits(model, residents(name), implementation, number)
    read = djinn.stats(model).disk_read_bytes
    assert (read > 0) == (host_memory == "1 B")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_comparison_sees_experts_that_are_taken_for_others(
    folders: Folders, residents: Residents, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """A control: with two slots exchanged, the test above fails."""
    model, resident = routed(folders("mixtral"), "all but one"), residents("mixtral")
    slots, look_up = HandedWeights._slots, Whereabouts.look_up

    def exchanged(self: HandedWeights, experts: list[int]) -> dict[int, int]:
        places = slots(self, experts)
        return dict(zip(places, reversed(places.values()), strict=True))

    monkeypatch.setattr(HandedWeights, "_slots", exchanged)
    monkeypatch.setattr(Whereabouts, "look_up", lambda self, tensor, key: look_up(self, tensor, key).flip(0))
    with pytest.raises(AssertionError):
        assert_same_bits(model, resident, implementation, 0)


def test_the_comparison_sees_slots_that_nothing_was_fetched_into(
    folders: Folders, residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another control: poison shows."""
    model = routed(folders("mixtral"), "two windows")
    poisoned(model)
    monkeypatch.setattr(engine_experts(model).fetcher, "wait", lambda fetch: None)
    monkeypatch.setattr(engine_experts(model).fetcher, "fetch", lambda arrivals, within, after=None: None)
    assert logits(model, PROMPT).isnan().any()


# What is counted


@pytest.fixture
def streaming(folders: Folders) -> Iterator[PreTrainedModel]:
    model = routed(folders("mixtral"), "two windows")
    poisoned(model)
    engine_experts(model)._whole_from = None
    yield model
    djinn.detach(model)


def test_hits_and_misses_are_what_routers_picked(streaming: PreTrainedModel) -> None:
    picks = counted_picks(streaming)
    for ids in (PROMPT[:1], PROMPT[:1, :1], PROMPT[:1, 4:5], PROMPT):
        before = vars(djinn.stats(streaming)).copy()
        picks.clear()
        logits(streaming, ids)
        stats = djinn.stats(streaming)
        hits, misses = stats.expert_hits - before["expert_hits"], stats.expert_misses - before["expert_misses"]
        assert hits + misses == sum(map(len, picks))
        each = engine_experts(streaming)._layers[0].unit.experts[0].weight_bytes
        assert stats.link_bytes - before["link_bytes"] == misses * each
        assert stats.routed_layers - before["routed_layers"] == len(picks) == 3
    assert stats.disk_read_bytes == 0


def test_rounds_bring_every_expert_once_and_as_many_at_once_as_fit(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed(folders("mixtral"), "k")
    picks, fetcher = counted_picks(model), engine_experts(model).fetcher
    fetches: list[int] = []
    fetch = fetcher.fetch
    monkeypatch.setattr(
        fetcher, "fetch", lambda arrivals, *rest: fetches.append(len(arrivals)) or fetch(arrivals, *rest)
    )
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        before = vars(djinn.stats(model)).copy()
        picks.clear()
        fetches.clear()
        logits(model, PROMPT)
        moved = djinn.stats(model).link_bytes - before["link_bytes"]
        assert moved == sum(map(len, picks)) * engine_experts(model)._layers[0].unit.experts[0].weight_bytes
        assert djinn.stats(model).expert_misses - before["expert_misses"] == sum(map(len, picks))
        assert len(fetches) == sum(2 * math.ceil(len(picked) / 2) for picked in picks), "two slots, two tensors"


def test_what_is_in_the_pool_moves_nothing(streaming: PreTrainedModel) -> None:
    first = logits(streaming, PROMPT[:1, :1])
    before = vars(djinn.stats(streaming)).copy()
    assert torch.equal(logits(streaming, PROMPT[:1, :1]), first)
    assert djinn.stats(streaming).link_bytes == before["link_bytes"]
    assert djinn.stats(streaming).expert_misses == before["expert_misses"]
    assert djinn.stats(streaming).expert_hits == before["expert_hits"] + 3 * 2


@pytest.mark.parametrize("coding", [None, "lossless"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nobody_asks_what_was_picked_of_a_layer_that_is_there(
    folders: Folders, residents: Residents, implementation: str, coding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, resident = routed(folders("qwen3_moe"), "all but one", coding=coding), residents("qwen3_moe")
    for each in (resident, model):
        each.set_experts_implementation(implementation)
    experts = engine_experts(model)
    asked: list[int] = []
    bring = experts._bring
    monkeypatch.setattr(experts, "_bring", lambda number, call: asked.append(number) or bring(number, call))
    poisoned(model)
    experts._whole_from = 8
    token = PROMPT[:1, :1]
    assert torch.equal(logits(model, PROMPT), logits(resident, PROMPT))
    for expected in ([0, 1, 2], [0]):  # one lacks an expert; the others are asked once, after they were in windows
        asked.clear()
        before = vars(djinn.stats(model)).copy()
        assert torch.equal(logits(model, token), logits(resident, token))
        assert asked == expected
        stats = djinn.stats(model)
        counted = stats.expert_hits + stats.expert_misses - before["expert_hits"] - before["expert_misses"]
        assert counted == 3 * 3
    asked.clear()
    assert torch.equal(logits(model, PROMPT[:, :3]), logits(resident, PROMPT[:, :3]))
    assert asked == [0, 1, 2], "several tokens may pick an expert twice"
    asked.clear()
    with djinn.trace_experts(model) as passes:
        logits(model, token)
    assert asked == [0, 1, 2]
    assert [len(picked) for picked in passes[0]] == [3, 3, 3]


def test_cooling_empties_the_pool(streaming: PreTrainedModel) -> None:
    first = logits(streaming, PROMPT[:1, :1])
    cool(streaming)
    poisoned(streaming)
    before = djinn.stats(streaming).expert_misses
    assert torch.equal(logits(streaming, PROMPT[:1, :1]), first)
    assert djinn.stats(streaming).expert_misses == before + 3 * 2


def test_a_whole_pass_moves_every_expert_that_is_not_there(streaming: PreTrainedModel) -> None:
    experts = engine_experts(streaming)
    experts._whole_from = 8
    before = djinn.stats(streaming).link_bytes
    logits(streaming, PROMPT)
    layers = [layer.unit for layer in experts._layers]
    assert djinn.stats(streaming).link_bytes - before == sum(unit.weight_bytes for unit in layers)
    assert djinn.stats(streaming).whole_layers == 3


def test_whole_is_chosen_by_tokens(streaming: PreTrainedModel) -> None:
    experts = engine_experts(streaming)
    experts._whole_from = 3
    for tokens, whole in ((1, 0), (2, 0), (3, 3), (20, 6)):
        logits(streaming, PROMPT.view(1, -1)[:, :tokens])
        assert djinn.stats(streaming).whole_layers == whole


def test_experts_may_be_asked_to_stream_whole(folders: Folders, residents: Residents) -> None:
    work = WORK | {"experts": "whole"}
    least = djinn.plan(folders("mixtral"), budget="1 GB", **work).workspace_bytes + 700_000
    model = djinn.load(folders("mixtral"), budget=least, **work)
    assert engine_of(model).experts is None
    assert any("mlp.experts" in unit.name for unit in placement(model).streamed)
    for ids in (PROMPT, PROMPT[:1, :1]):
        assert torch.equal(logits(model, ids), logits(residents("mixtral"), ids))


UNMARKED: dict[str, PretrainedConfig] = {
    "dbrx": DbrxConfig(
        d_model=64, n_heads=4, n_layers=3, vocab_size=256, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "jetmoe": JetMoeConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_key_value_heads=2, kv_channels=16,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=256,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMARKED)
def test_experts_without_the_mark_stream_whole(tmp_path: Path, name: str) -> None:
    save_model(AutoModelForCausalLM.from_config(UNMARKED[name], dtype=torch.bfloat16), name, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert not any(map(routed_experts, plain.modules()))
    planned = djinn.plan(tmp_path, budget="1 GB", **WORK)
    model = djinn.load(tmp_path, budget=planned.workspace_bytes + 6 * planned.model_bytes // 10, **WORK)
    assert engine_of(model).experts is None
    assert placement(model).streamed
    for ids in (PROMPT, PROMPT[:1, :1]):
        assert torch.equal(logits(model, ids), logits(plain, ids))
