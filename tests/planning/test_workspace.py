"""Workspace sizes against what the formulas give by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from caching_allocator import MIB, CachingAllocator, OutOfMemoryError, events_of, play
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, OPTConfig

import djinn
from djinn.engine.device_memory import held_bytes, hold_workspace
from djinn.engine.load import placement
from djinn.errors import PlanError
from djinn.planning.workspace import (
    CUDA_CONTEXT_BYTES,
    CUDA_OVERHEAD_BYTES,
    Workload,
    activation_bytes,
    kv_cache_bytes,
    largest,
    routed_bytes,
    what_fits,
    workspace_bytes,
)
from djinn.weights.architectures import load_architecture

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-13b", 2 * 40 * 40 * 128 * 528 * 2),
        ("llama-2-70b", 2 * 80 * 8 * 128 * 528 * 2),  # 8 KV heads of 64
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 528 * 2),
        ("mixtral-8x7b", 2 * 32 * 8 * 128 * 528 * 2),
        ("gpt2", 2 * 12 * 12 * 64 * 528 * 2),
        ("opt-30b", 2 * 48 * 56 * 128 * 528 * 2),
    ],
)
def test_kv_cache_of_published_models(name: str, expected: int) -> None:
    work = Workload(prompt_tokens=512, new_tokens=16, batch=1)
    assert kv_cache_bytes(load_architecture(name), BF16, work) == expected


def test_kv_cache_grows_with_the_batch_and_the_dtype() -> None:
    config = load_architecture("llama-2-7b")
    one = kv_cache_bytes(config, BF16, Workload(prompt_tokens=10, new_tokens=6, batch=1))
    assert one == 2 * 32 * 4096 * 16 * 2
    assert kv_cache_bytes(config, BF16, Workload(prompt_tokens=10, new_tokens=6, batch=3)) == 3 * one
    assert kv_cache_bytes(config, torch.float32, Workload(prompt_tokens=10, new_tokens=6, batch=1)) == 2 * one


def test_activations_of_a_gated_mlp_and_last_logits() -> None:
    work = Workload(prompt_tokens=512, new_tokens=16, batch=2)
    tokens, logits = 2 * 512, 2 * 32000 * (2 + 8)
    assert activation_bytes(load_architecture("llama-2-13b"), BF16, work) == (
        tokens * (2 * 5120 + 4 * 13824) * 2 + logits
    )


@pytest.mark.parametrize(
    ("config", "intermediate"),
    [(OPTConfig(hidden_size=64, ffn_dim=300, vocab_size=10), 300), (GPT2Config(n_embd=64, vocab_size=10), 256)],
    ids=["opt", "gpt2"],
)
def test_other_names_of_the_intermediate_size(config: OPTConfig | GPT2Config, intermediate: int) -> None:
    work = Workload(prompt_tokens=1, new_tokens=1, batch=1)
    assert activation_bytes(config, BF16, work) == (2 * 64 + 4 * intermediate) * 2 + 10 * (2 + 8)


WORK = Workload(prompt_tokens=100, new_tokens=10, batch=2)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("t5", 4 * 2 * 128 * (110 + 100)),  # what the encoder read is cached, too
        ("whisper", 4 * 2 * 128 * (110 + 100)),
        ("deepseek-v3", 4 * 4 * (32 + 16) * 110),  # keys and values of two sizes
        ("falcon", 5 * 2 * 2 * 32 * 110),
        ("mamba2", 5 * 128 * (16 + 4)),  # a state that does not grow
        ("llava", 5 * 2 * 2 * 32 * 110),
        ("vit", 0),
    ],
)
def test_what_models_of_every_kind_cache(name: str, values: int) -> None:
    assert kv_cache_bytes(ARCHITECTURES[name].config, BF16, WORK) == values * 2 * 2


def test_an_image_has_activations_of_its_own() -> None:
    one = Workload(prompt_tokens=1, new_tokens=1, batch=3)
    patches, widths = 4 * 4 + 1, 2 * 128 + 4 * 176
    assert activation_bytes(ARCHITECTURES["vit"].config, BF16, one) == 3 * patches * widths * 2
    text, image = 2 * 128 + 4 * 352, 2 * 64 + 4 * 176
    logits = 3 * 256 * (2 + 8)
    llava = ARCHITECTURES["llava"].config
    assert activation_bytes(llava, BF16, one) == 3 * max(text, patches * image) * 2 + logits
    assert activation_bytes(llava, BF16, WORK) == 2 * 100 * text * 2 + logits * 2 // 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_workspace(name: str) -> None:
    for device in ("cpu", "cuda"):
        assert workspace_bytes(ARCHITECTURES[name].config, BF16, torch.device(device), WORK) > 0


def test_every_device_keeps_room_for_its_libraries() -> None:
    work = Workload(prompt_tokens=8, new_tokens=8, batch=1)
    config = load_architecture("llama-tiny")
    on_cpu = workspace_bytes(config, BF16, torch.device("cpu"), work)
    either = kv_cache_bytes(config, BF16, work) + activation_bytes(config, BF16, work)
    assert on_cpu == 11 * (either + 1024 * 256 * 2) // 10, "the output projection, which torch copies there"
    on_gpu = workspace_bytes(config, BF16, torch.device("cuda"), work)
    assert on_gpu == pytest.approx(CUDA_OVERHEAD_BYTES + 1.02 * either)


EXPERT = {"gate_up": (96, 64), "down": (64, 48), "bias": (96,)}


def test_a_gpu_gathers_the_weights_of_every_sequences_experts_and_a_cpu_does_not() -> None:
    one_token = Workload(prompt_tokens=1, new_tokens=10, batch=5)
    rows = 5 * 3 * 3 * (96 + 64 + 64 + 48)  # what each of two products reads and writes
    assert routed_bytes(EXPERT, 3, BF16, torch.device("cpu"), one_token) == 2 * rows
    gathered = 5 * 3 * (96 * 64 + 64 * 48 + 96)
    assert routed_bytes(EXPERT, 3, BF16, torch.device("cuda"), one_token) == 2 * gathered > 2 * rows
    assert routed_bytes(EXPERT, 3, torch.float32, torch.device("cuda"), one_token) == 4 * gathered


def test_a_long_prompts_rows_outgrow_what_decode_gathers() -> None:
    prompt = Workload(prompt_tokens=1000, new_tokens=10, batch=5)
    on_both = {routed_bytes(EXPERT, 3, BF16, torch.device(name), prompt) for name in ("cpu", "cuda")}
    assert on_both == {2 * 5 * 1000 * 3 * 3 * (96 + 64 + 64 + 48)}


def test_a_model_without_routed_experts_needs_nothing_for_them() -> None:
    assert routed_bytes({}, 1, BF16, torch.device("cuda"), WORK) == 0


DEEP = LlamaConfig(
    hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8
)
"""Llama-3.1-405B: the most layers of any."""
FITTING = {
    "llama-2-7b": [(8192, 3, 1), (64, 9, 32), (2000, 12, 1)],
    "llama-2-70b": [(512, 3, 1), (100, 12, 1), (2048, 2, 8)],
    "codellama-34b": [(512, 3, 1)],
    "qwen2.5-7b": [(512, 4, 4)],
    "opt-30b": [(512, 3, 4)],
    "deep": [(500, 3, 1)],
}
CUBLAS_BYTES = 32 * MIB


def played(held: bool, name: str, work: Workload) -> CachingAllocator:
    """Return a GPU's allocator, which may take what a plan's workspace leaves of the context, after a generation."""
    config = DEEP if name == "deep" else load_architecture(name)
    planned = workspace_bytes(config, BF16, torch.device("cuda"), work)
    allocator = CachingAllocator(planned - CUDA_CONTEXT_BYTES)
    if held:
        allocator.release(allocator.allocate(held_bytes(planned)))
    allocator.allocate(CUBLAS_BYTES)
    play(events_of(config, work), allocator)
    return allocator


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "work"),
    [
        pytest.param(name, Workload(prompt_tokens=prompt, new_tokens=new, batch=batch), id=f"{name}-{batch}x{prompt}")
        for name, works in FITTING.items()
        for prompt, new, batch in works
    ],
)
def test_generation_fits_the_workspace_as_torchs_allocator_cuts_it(name: str, work: Workload) -> None:
    played(True, name, work)


def test_without_one_piece_the_same_workspace_would_not_do() -> None:
    with pytest.raises(OutOfMemoryError):
        played(False, "llama-2-7b", Workload(prompt_tokens=8192, new_tokens=3, batch=1))


@pytest.mark.gpu
def test_a_cache_that_grows_stays_within_what_is_allowed() -> None:
    """As in the tests above, with torch's own allocator."""
    work: dict[str, Any] = {"prompt_tokens": 2048, "new_tokens": 12, "batch": 4, "device": "cuda"}
    model = "synthetic:llama-2-7b"
    budget = djinn.plan(model, budget="40 GB", **work).workspace_bytes + 6 * 10**9
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((begun + budget - CUDA_CONTEXT_BYTES) / total)
    try:
        streaming = djinn.load(model, budget=budget, **work)
        ids = torch.ones(4, 2048, dtype=torch.int64, device="cuda")
        for _ in range(2):
            streaming.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_loading_another_model_gives_nothing_back_that_one_holds() -> None:
    work: dict[str, Any] = {"new_tokens": 16, "device": "cuda", "host_memory": "4 GB"}
    gc.collect()  # models of other tests give back what they held
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved()
    first = djinn.load("synthetic:llama-tiny", budget="6 GB", prompt_tokens=900, batch=64, **work)
    reserved = torch.cuda.memory_reserved()
    assert reserved - begun >= held_bytes(placement(first).workspace_bytes) > 2**28
    second = djinn.load("synthetic:gpt2", budget="4 GB", prompt_tokens=8, **work)
    assert torch.cuda.memory_reserved() >= reserved
    assert placement(second).device_bytes > 0


@pytest.mark.gpu
def test_a_gpu_without_room_for_the_workspace_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("djinn.engine.assembly.hold_workspace", lambda size, device: hold_workspace(10**13, device))
    model = djinn.load("synthetic:llama-tiny", budget="4 GB", prompt_tokens=8, new_tokens=8, device="cuda")
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64, device="cuda"))


def test_a_piece_that_torch_may_not_split_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    hold_workspace(10**13, torch.device("cuda"))  # would fail anywhere


@given(limit=st.integers(0, 1000), below=st.integers(1, 1000))
def test_the_largest_that_fits_is_found(limit: int, below: int) -> None:
    assert largest(lambda size: size <= limit, below) == min(limit, below - 1)


def test_what_fits_is_said_in_words() -> None:
    def plan_for(work: Workload) -> None:
        if work.batch * work.prompt_tokens > 1000:
            raise PlanError("too much")

    work = Workload(prompt_tokens=400, new_tokens=1, batch=3)
    assert what_fits(plan_for, work) == "; it would fit a prompt of 333 tokens or a batch of 2"
    assert what_fits(plan_for, Workload(prompt_tokens=2000, new_tokens=1, batch=1)) == (
        "; it would fit a prompt of 1000 tokens"
    )

    def never(work: Workload) -> None:
        raise PlanError("whatever the workload")

    assert what_fits(never, work) == ""
