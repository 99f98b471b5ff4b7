"""Experts that the host's cores compute: what is fetched beside them, and how near outputs are. On a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_models import ROUTED, WORK, engine_experts, experts_of, logits, poisoned, routed
from tiny_models import save_config
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import load_requested, placement
from djinn.host.products import HostProducts
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.request import Request
from djinn.planning.workspace import Workload

SLOW_LINK = HostRates(link=1e6, cores=1e9, wait_s=0.0)
"""One that makes it worth while to compute with experts this small."""
COMPUTED = [name for name in ROUTED if name != "gpt_oss"]
"""Of gpt-oss matrices are stored transposed, so the cores take none."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_config(ROUTED[name], name, tmp_path_factory.mktemp("experts") / name)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def dropped() -> Iterator[None]:
    yield
    gc.collect()


def loaded(folder: Path, rates: HostRates = SLOW_LINK, pool: str = "half", **options: Any) -> PreTrainedModel:
    """Load with a pool of so many slots, NaN in each, and the cores beside."""
    plain = routed(folder, pool, **options)
    budget = placement(plain).budget
    work = Workload(**{name: WORK[name] for name in ("prompt_tokens", "new_tokens", "batch")})
    request = Request.of(budget=budget, keep=work, device="cpu", **options)
    model = load_requested(folder, replace(request, host=HostCompute(threads=1, rates=rates)))
    poisoned(model)
    return model


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", COMPUTED)
def test_passes_of_few_tokens_are_near_the_resident_models(
    folders: Callable[[str], Path], name: str, implementation: str
) -> None:
    model, whole = loaded(folders(name)), resident(folders(name))
    for each in (model, whole):
        each.set_experts_implementation(implementation)
    for ids in (torch.tensor([[5]]), torch.tensor([[7, 9]]), torch.tensor([[3], [4], [5]])):
        torch.testing.assert_close(logits(model, ids), logits(whole, ids), atol=0.15, rtol=0.05)
    stats = djinn.stats(model)
    assert 0 < stats.expert_computed < stats.expert_misses
    assert stats.host_computed_bytes > 0
    fetched = stats.expert_misses - stats.expert_computed
    each_bytes = next(unit for unit in placement(model).routed).experts[0].weight_bytes
    assert stats.link_bytes == fetched * each_bytes


def test_long_passes_and_transposed_experts_are_the_resident_models_bit_for_bit(folders: Callable[[str], Path]) -> None:
    for name, ids in (("mixtral", torch.arange(3, 23)[None]), ("gpt_oss", torch.tensor([[5]]))):
        model, whole = loaded(folders(name)), resident(folders(name))
        assert torch.equal(logits(model, ids), logits(whole, ids))
        assert djinn.stats(model).expert_computed == 0


def test_a_fast_link_leaves_nothing_to_the_cores(folders: Callable[[str], Path]) -> None:
    model, whole = loaded(folders("mixtral"), HostRates(link=1e12, cores=1e9)), resident(folders("mixtral"))
    assert torch.equal(logits(model, torch.tensor([[5]])), logits(whole, torch.tensor([[5]])))
    assert djinn.stats(model).expert_computed == 0


def test_coded_experts_are_fetched(folders: Callable[[str], Path]) -> None:
    model, whole = loaded(folders("mixtral"), coding="lossless"), resident(folders("mixtral"))
    assert torch.equal(logits(model, torch.tensor([[5]])), logits(whole, torch.tensor([[5]])))
    assert djinn.stats(model).expert_computed == 0


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_picks_give_what_the_resident_module_gives(folders: Callable[[str], Path], data: st.DataObject) -> None:
    """Whatever is picked, by how many tokens, and whatever is in the pool by then; an expert stays with the device."""
    if not hasattr(folders, "pair"):
        folders.pair = loaded(folders("mixtral")), resident(folders("mixtral"))  # type: ignore[attr-defined]
    model, whole = folders.pair  # type: ignore[attr-defined]
    stats = djinn.stats(model)
    picked = data.draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 7), min_size=picked, max_size=picked, unique=True)
    index = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hidden = torch.randn(len(index), 64, generator=generator).bfloat16()
    weights = torch.rand(index.shape, generator=generator).bfloat16()
    before = stats.expert_hits + stats.expert_misses
    number = data.draw(st.integers(0, 2))
    with torch.no_grad():
        found, wanted = (experts_of(each, number)(hidden, index, weights) for each in (model, whole))
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.05)
    assert stats.expert_hits + stats.expert_misses - before == len(index.unique())


def test_arguments_may_come_by_name(folders: Callable[[str], Path]) -> None:
    model, whole = loaded(folders("mixtral")), resident(folders("mixtral"))
    call = {"hidden_states": torch.ones(1, 64).bfloat16(), "top_k_index": torch.tensor([[1, 6]]),
            "top_k_weights": torch.tensor([[0.5, 0.25]])}  # fmt: skip
    with torch.no_grad():
        found, wanted = (experts_of(each, 0)(**call) for each in (model, whole))
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.05)
    assert djinn.stats(model).expert_computed == 1


def test_gradients_see_the_weights(folders: Callable[[str], Path]) -> None:
    model, whole = loaded(folders("mixtral")), resident(folders("mixtral"))
    with torch.enable_grad():
        found, wanted = (each(torch.tensor([[5]])).logits for each in (model, whole))
    assert torch.equal(found, wanted)
    assert djinn.stats(model).expert_computed == 0


class BrokenError(Exception):
    """What an interrupted product raises."""


def test_a_product_that_fails_leaves_nothing_behind(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = loaded(folders("mixtral")), resident(folders("mixtral"))

    def broken(*_: object) -> None:
        raise BrokenError

    with monkeypatch.context() as patched:
        patched.setattr(HostProducts, "outputs_of", broken)
        with pytest.raises(BrokenError):
            logits(model, torch.tensor([[5]]))
    long = torch.arange(3, 23)[None]
    assert torch.equal(logits(model, long), logits(whole, long))
    torch.testing.assert_close(logits(model, long[:, :1]), logits(whole, long[:, :1]), atol=0.05, rtol=0.05)
    assert engine_experts(model)._part is None


def test_generation_counts_what_the_cores_computed(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("qwen3_moe"))
    model.generate(torch.arange(3, 23)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    stats = djinn.stats(model)
    assert stats.expert_computed
    assert stats.host_computed_bytes == stats.expert_computed * placement(model).routed[0].experts[0].raw_bytes
    assert "some of the experts that the pool lacks" in placement(model).table()
