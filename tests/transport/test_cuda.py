"""The CUDA copy engine on a real GPU: equal bits however the queues run, and a host that waits for nothing."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import engine_of, placement
from djinn.planning.placement import Tier
from djinn.planning.workspace import CUDA_OVERHEAD_BYTES
from djinn.transport.cuda import CudaCopier
from djinn.transport.reader import allocate

pytestmark = pytest.mark.gpu

Tiny = Callable[[str], Path]
WORK = {"prompt_tokens": 16, "new_tokens": 16, "device": "cuda"}
TIERS = ("pinned", "disk", "both")


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    yield
    gc.collect()


def streaming(folder: Path, tiers: str, **options: object) -> PreTrainedModel:
    """Return a streaming model that keeps about 40% of its weights, the ring included."""
    all_of_it = djinn.plan(folder, budget="2 GB", host_memory="1 GB", **WORK)  # type: ignore[arg-type]
    budget = all_of_it.workspace_bytes + round(0.4 * sum(unit.image_bytes for unit in all_of_it.units))
    planned = djinn.plan(folder, budget=budget, host_memory="1 GB", **WORK)  # type: ignore[arg-type]
    host = {"disk": 1, "pinned": 10**9, "both": planned.pinned_bytes // 2}[tiers]
    arguments = {"budget": budget, "host_memory": host, "chunk": "32 KiB", **WORK}
    return djinn.load(folder, **arguments | options)  # type: ignore[arg-type]


def copier_of(model: PreTrainedModel) -> CudaCopier:
    copier = engine_of(model).copier
    assert isinstance(copier, CudaCopier)
    return copier


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().cuda()


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(length)).cuda()


def logits(model: PreTrainedModel, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(length)).logits


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2", "opt", "bloom"])
def test_output_is_the_resident_models_bit_for_bit(tiny_checkpoint: Tiny, name: str, tiers: str) -> None:
    """Invariant 7."""
    model, whole = streaming(tiny_checkpoint(name), tiers), resident(tiny_checkpoint(name))
    assert placement(model).resident_bytes < placement(model).model_bytes / 2
    for length in (1, 16):
        assert torch.equal(logits(model, length), logits(whole, length))
    ids, greedy = prompt(5), {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **greedy), whole.generate(ids, **greedy))
    static = greedy | {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **static), whole.generate(ids, **static))


def delayed(model: PreTrainedModel, seed: int) -> None:
    """Make every queue late at random: compute before and after each module, copies before and after each unit."""
    chance = random.Random(seed)
    copier = copier_of(model)
    streams = [copier.stream] + ([copier.disk.stream] if copier.disk is not None else [])

    def doze(stream: torch.cuda.Stream) -> None:
        if chance.random() < 0.4:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(chance.randrange(300_000))

    really = copier.submit

    def submit(unit: int, after: int | None) -> None:
        doze(chance.choice(streams))
        really(unit, after)
        doze(chance.choice(streams))

    copier.submit = submit  # type: ignore[method-assign]
    for module in model.modules():
        if module._parameters:
            forward = module.forward

            def late(*args: object, forward: Callable[..., object] = forward, **kwargs: object) -> object:
                doze(torch.cuda.current_stream())
                result = forward(*args, **kwargs)
                doze(torch.cuda.current_stream())
                return result

            module.forward = late


@pytest.mark.parametrize("tiers", TIERS)
def test_queues_of_any_speed_give_equal_bits(tiny_checkpoint: Tiny, tiers: str) -> None:
    """Invariants 1, 2 and 3, on the real thing: a missing wait shows as other bits."""
    model = streaming(tiny_checkpoint("llama"), tiers)
    wanted = logits(resident(tiny_checkpoint("llama")))
    delayed(model, seed=1)
    found = [logits(model) for _ in range(200)]  # compared at the end, so that no pass waits for the one before
    assert all(torch.equal(output, wanted) for output in found)
    assert djinn.stats(model).reloads == 0


@pytest.mark.parametrize("tiers", TIERS)
def test_threads_with_streams_of_their_own_give_equal_bits(tiny_checkpoint: Tiny, tiers: str) -> None:
    """A pass on one stream may not overwrite what a pass on another still reads."""
    model = streaming(tiny_checkpoint("llama"), tiers)
    wanted = logits(resident(tiny_checkpoint("llama")))
    delayed(model, seed=4)

    def run(_: int) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [logits(model) for _ in range(30)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(3) as threads:
        assert all(torch.equal(output, wanted) for found in threads.map(run, range(3)) for output in found)


@pytest.mark.parametrize("tiers", TIERS)
def test_any_order_and_cold_rings_give_equal_bits(tiny_checkpoint: Tiny, tiers: str) -> None:
    """Invariant 8; what was prefetched for nothing must not land on what is copied next."""
    model, whole = streaming(tiny_checkpoint("llama"), tiers), resident(tiny_checkpoint("llama"))
    wanted = logits(whole)
    x = torch.randn(1, 3, 128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        alone = [layer.mlp(x) for layer in whole.model.layers]
    delayed(model, seed=2)
    chance = random.Random(3)
    pairs = []
    for _ in range(60):
        what = chance.randrange(3)
        if what == 0:
            djinn.cool(model)
        elif what == 1:
            number = chance.randrange(len(alone))
            with torch.no_grad():
                pairs.append((model.model.layers[number].mlp(x), alone[number]))
        else:
            pairs.append((logits(model), wanted))
    assert all(torch.equal(found, expected) for found, expected in pairs)
    assert djinn.stats(model).reloads > 0


def test_the_host_waits_for_nothing(tiny_checkpoint: Tiny) -> None:
    """A pass whose weights are pinned holds no call that waits for the device."""
    model, whole = streaming(tiny_checkpoint("llama"), "pinned"), resident(tiny_checkpoint("llama"))
    ids = prompt(7)
    for either in (whole, model):
        with torch.no_grad():
            either(ids)
            torch.cuda.set_sync_debug_mode("error")
            try:
                either(ids)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_arena_is_page_locked(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "pinned")
    images = [source.image for source in copier_of(model)._sources]
    assert all(image is not None and torch.from_numpy(image).is_pinned() for image in images)
    assert not torch.from_numpy(allocate(100)).is_pinned()


def test_device_memory_is_within_the_budget_and_given_back(tiny_checkpoint: Tiny) -> None:
    logits(resident(tiny_checkpoint("llama")))  # the libraries' own memory is taken once
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = streaming(tiny_checkpoint("llama"), "both")
    made = placement(model)
    taken = torch.cuda.memory_allocated() - before
    assert taken <= made.resident_bytes + made.ring_bytes + 2**16, "buffers are small"
    torch.cuda.reset_peak_memory_stats()
    model.generate(prompt(16), do_sample=False, max_new_tokens=16)
    assert torch.cuda.max_memory_allocated() - before <= made.device_bytes - CUDA_OVERHEAD_BYTES + 2**20
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_the_timeline_shows_copies_compute_and_stalls(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "pinned", trace=True)
    logits(model)
    logits(model)
    stats = djinn.stats(model)
    names = [unit.name for unit in placement(model).streamed]
    for lane in ("copy", "compute", "stall"):
        spans = [interval for interval in stats.timeline if interval.lane == lane]
        assert [interval.unit for interval in spans] == 2 * names
        assert all(interval.start_s <= interval.end_s for interval in spans)
    copies = [interval for interval in stats.timeline if interval.lane == "copy"]
    computes = [interval for interval in stats.timeline if interval.lane == "compute"]
    assert all(copy.end_s <= compute.start_s + 1e-4 for copy, compute in zip(copies, computes, strict=True))
    assert stats.stall_s >= 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU, and there is none here")
def test_the_timeline_of_a_gpu_that_is_not_the_current_one(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "pinned", trace=True, device="cuda:1")
    with torch.no_grad():
        model(prompt(7).to("cuda:1"))
    spans = djinn.stats(model).timeline
    assert {"copy", "compute", "stall"} == {span.lane for span in spans}
    assert all(0 <= span.start_s <= span.end_s for span in spans)


def test_bytes_are_counted_by_tier(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "both")
    made = placement(model)
    for _ in range(3):
        logits(model)
    stats = djinn.stats(model)
    for counted, units in ((stats.link_bytes, made.streamed), (stats.disk_read_bytes, made.at(Tier.DISK))):
        assert counted == 3 * sum(unit.weight_bytes for unit in units)


@pytest.mark.parametrize("tiers", TIERS)
def test_detaching_brings_the_weights_back(tiny_checkpoint: Tiny, tiers: str) -> None:
    model, whole = streaming(tiny_checkpoint("gpt2"), tiers), resident(tiny_checkpoint("gpt2"))
    logits(model)
    djinn.detach(model)
    wanted = dict(whole.named_parameters())
    assert all(torch.equal(value, wanted[name].cpu()) for name, value in model.named_parameters())
    assert torch.equal(logits(model.cuda()), logits(whole))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_in_a_pass_leaves_a_model_that_works(tiny_checkpoint: Tiny, error: BaseException) -> None:
    model = streaming(tiny_checkpoint("llama"), "both")
    wanted = logits(resident(tiny_checkpoint("llama")))

    def fail(*_: object) -> None:
        raise error

    for name in ("model.embed_tokens", "model.layers.2.mlp", "lm_head"):
        handle = model.get_submodule(name).register_forward_hook(fail)
        with pytest.raises(type(error)):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), wanted)


def test_weights_made_in_memory_stream() -> None:
    budget = djinn.plan("synthetic:llama-tiny", budget="2 GB", host_memory="1 GB", **WORK).workspace_bytes + 6 * 10**6
    model = djinn.load("synthetic:llama-tiny", budget=budget, host_memory="1 GB", **WORK)
    assert placement(model).streamed
    streamed = logits(model)
    assert torch.equal(logits(djinn.detach(model).cuda()), streamed)


def test_models_side_by_side_give_their_own_bits(tiny_checkpoint: Tiny) -> None:
    first, second = streaming(tiny_checkpoint("llama"), "pinned"), streaming(tiny_checkpoint("llama"), "both")
    other = streaming(tiny_checkpoint("gpt2"), "pinned")
    llama, gpt2 = logits(resident(tiny_checkpoint("llama"))), logits(resident(tiny_checkpoint("gpt2")))
    for _ in range(3):
        assert torch.equal(logits(first), llama)
        assert torch.equal(logits(other), gpt2)
        assert torch.equal(logits(second), llama)


def test_memory_that_runs_out_in_prefill_is_explained_and_the_model_works_again(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "pinned")
    wanted = logits(model)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught, torch.no_grad():
            model(torch.zeros(4096, 16, dtype=torch.long, device="cuda"))
        assert "kept device memory for prompt_tokens=16" in caught.value.__notes__[0]
        del caught
        assert torch.equal(logits(model), wanted)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_page_locked_memory_is_given_back(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "pinned")
    image = copier_of(model)._sources[0].image
    assert image is not None
    lying_there = torch.from_numpy(image)
    assert lying_there.is_pinned()
    del model
    gc.collect()
    assert not lying_there.is_pinned()


@pytest.mark.parametrize("tiers", TIERS)
def test_bare_copies_are_timed_and_change_nothing(tiny_checkpoint: Tiny, tiers: str) -> None:
    folder = tiny_checkpoint("llama")
    model = streaming(folder, tiers)
    expected = logits(model)
    djinn.cool(model)
    crossed = djinn.stats(model).link_bytes
    rate = copier_of(model).bare_rate()
    assert (rate is None) is (tiers == "disk")
    assert rate is None or 10**8 < rate < 10**12
    assert djinn.stats(model).link_bytes == crossed
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), logits(resident(folder)))
    djinn.detach(model)
