"""Routed experts on a GPU give the resident model's bits, whatever way transformers runs them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import ROUTED_ON_GPU
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import engine_of, load_requested, placement
from djinn.errors import PlanError
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.request import Request
from djinn.planning.workspace import Workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WORK = {"prompt_tokens": 40, "new_tokens": 12, "batch": 4}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(scope="module", params=ROUTED_ON_GPU)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(ROUTED_ON_GPU[request.param], dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").cuda().eval()


@pytest.fixture(scope="module")
def expected(resident: PreTrainedModel) -> dict[tuple[str, str], Any]:
    """What the resident model generates, by implementation and way; filled as tests come to it."""
    return {}


def generated(model: PreTrainedModel, prompt: torch.Tensor, way: dict[str, Any]) -> Any:
    """Generate for a prompt whose first sequence is padded."""
    mask = torch.ones_like(prompt)
    mask[0, :17] = 0
    torch.manual_seed(1)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **way,
    )  # fmt: skip


@functools.cache
def smallest(folder: Path, **options: object) -> int:
    low, high = 0, 8 * 10**9
    while high - low > 10**5:
        middle = (low + high) // 2
        try:
            djinn.plan(folder, budget=middle, device="cuda", **WORK, **options)
            high = middle
        except PlanError:
            low = middle
    return high


@pytest.mark.parametrize("host_memory", ["1 GB", "1 B"])
def test_packed_experts_of_one_tensor_give_the_same_bits(
    folder: Path, resident: PreTrainedModel, tmp_path: Path, host_memory: str
) -> None:
    resident.save_pretrained(tmp_path / "plain", save_original_format=False)
    packed = djinn.pack(tmp_path / "plain", tmp_path / "packed")
    back = djinn.unpack(packed, tmp_path / "back")
    for path in (tmp_path / "plain").iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    budget = smallest(packed) + 30 * 10**6
    model = djinn.load(packed, budget=budget, host_memory=host_memory, device="cuda", **WORK)
    assert placement(model).routed
    assert all(unit.on_disk and unit.coded for unit in placement(model).routed)
    prompt = torch.randint(1, 512, (2, 40), device="cuda")
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        for each in (resident, model):
            each.set_experts_implementation(implementation)
        with torch.no_grad():
            for ids in (prompt, prompt[:1, :1], prompt[:, :3]):
                assert torch.equal(model(ids).logits, resident(ids).logits), (implementation, ids.shape)
    assert djinn.stats(model).expert_misses > 0
    djinn.detach(model)


@pytest.mark.parametrize("coding", [None, "lossless"])
@pytest.mark.parametrize("spare", [0.0, 0.3, 0.6])
def test_bits_are_those_of_the_resident_model(
    folder: Path, resident: PreTrainedModel, expected: dict[tuple[str, str], Any], spare: float, coding: str | None
) -> None:
    expert_bytes = sum(p.nbytes for name, p in resident.named_parameters() if p.dim() == 3)
    budget = smallest(folder, coding=coding) + int(spare * expert_bytes)
    model = djinn.load(folder, budget=budget, device="cuda", coding=coding, **WORK)
    experts = engine_of(model).experts
    assert experts is not None
    experts.fetcher.pool.view(torch.bfloat16).fill_(float("nan"))
    experts.cool()
    prompt = torch.randint(1, 512, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    for implementation, whole in itertools.product(("grouped_mm", "batched_mm", "eager"), (False, True)):
        experts._whole_from = 32 if whole and experts._pool.windows else None
        for each in (resident, model):
            each.set_experts_implementation(implementation)
        with torch.no_grad():
            for ids in (prompt, prompt[:1, :1], prompt[:, :3]):
                assert torch.equal(model(ids).logits, resident(ids).logits), (implementation, whole, ids.shape)
        for name, way in WAYS.items():
            if (implementation, name) not in expected:
                expected[implementation, name] = generated(resident, prompt, way)
            found, known = generated(model, prompt, way), expected[implementation, name]
            assert torch.equal(found.sequences, known.sequences), (implementation, whole, name)
            for one, other in zip(found.logits, known.logits, strict=True):
                assert torch.equal(one, other), (implementation, whole, name)
    assert djinn.stats(model).expert_misses > 0
    djinn.detach(model)


@pytest.mark.parametrize("coding", [None, "lossless"])
def test_bits_are_the_same_where_nobody_asks_what_was_picked(
    folder: Path, resident: PreTrainedModel, coding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens one by one, after passes of whole layers, with all experts but one in the pool; the host runs ahead."""
    least = djinn.plan(folder, budget=smallest(folder, coding=coding), device="cuda", coding=coding, **WORK)
    whole = djinn.plan(folder, budget="8 GB", device="cuda", coding=coding, **WORK)
    budget = whole.device_bytes - least.pool.slot_bytes
    model = djinn.load(folder, budget=budget, device="cuda", coding=coding, **WORK)
    experts = engine_of(model).experts
    assert experts is not None
    experts._whole_from = 32
    experts.fetcher.pool.view(torch.bfloat16).fill_(float("nan"))
    experts.cool()
    asked: list[int] = []
    bring = experts._bring
    monkeypatch.setattr(experts, "_bring", lambda number, call: asked.append(number) or bring(number, call))
    prompt = torch.randint(1, 512, (1, 40), generator=torch.Generator().manual_seed(0)).cuda()
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        for each in (resident, model):
            each.set_experts_implementation(implementation)
        inputs = [prompt, *prompt.split(1, 1)[:6], prompt, *prompt.split(1, 1)[6:12]]
        with torch.no_grad():
            expected = [resident(ids).logits for ids in inputs]
            asked.clear()
            found = [model(ids).logits for ids in inputs]  # nothing waits for the device in between
        assert all(map(torch.equal, found, expected)), implementation
        assert len(asked) < 12 * len(experts._layers) / 2
    djinn.detach(model)


def test_the_hosts_cores_take_a_part(folder: Path, resident: PreTrainedModel) -> None:
    """Of what the pool lacks, in passes of few tokens; matrices that are stored transposed are fetched."""
    expert_bytes = sum(p.nbytes for name, p in resident.named_parameters() if p.dim() == 3)
    request = Request.of(budget=smallest(folder) + int(0.3 * expert_bytes), keep=Workload(**WORK), device="cuda")
    host = HostCompute(threads=2, rates=HostRates(link=1e6, cores=1e9, wait_s=0.0))
    model = load_requested(folder, replace(request, host=host))
    experts = engine_of(model).experts
    assert experts is not None
    experts.fetcher.pool.view(torch.bfloat16).fill_(float("nan"))
    experts.cool()
    # A close call of a router falls on either side: the same tokens in every run.
    prompt = torch.randint(1, 512, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        for each in (resident, model):
            each.set_experts_implementation(implementation)
        with torch.no_grad():
            for ids in (prompt[:1, :1], prompt[:, :3]):
                torch.testing.assert_close(model(ids).logits, resident(ids).logits, atol=0.1, rtol=0.05)
            assert torch.equal(model(prompt).logits, resident(prompt).logits)
    is_transposed = resident.config.model_type == "gpt_oss"
    assert bool(djinn.stats(model).expert_computed) is not is_transposed
