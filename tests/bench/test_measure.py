import time
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from djinn.bench import measure
from djinn.bench.measure import DiskLink, MemoryPeak, TokenTimes, drop_pages, prompt_ids, timed_tokens
from djinn.bench.systems.base import Job, PassCounter, System
from djinn.bench.systems.common import skeleton


def test_prompts_are_seeded_and_hold_no_special_ids():
    config = LlamaConfig(vocab_size=8, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    prompt = prompt_ids(config, batch=3, tokens=200, seed=7)
    assert prompt.shape == (3, 200)
    assert prompt.dtype == torch.int64
    assert set(prompt.flatten().tolist()) == {0, 4, 5, 6, 7}
    assert torch.equal(prompt, prompt_ids(config, batch=3, tokens=200, seed=7))
    assert not torch.equal(prompt, prompt_ids(config, batch=3, tokens=200, seed=8))


def test_token_times_stop_nothing_and_stamp_each_token():
    times = TokenTimes()
    for tokens in range(1, 4):
        stop = times(torch.zeros(2, tokens, dtype=torch.int64), torch.zeros(2, 5))
        assert stop.tolist() == [False, False]
    assert len(times.stamps) == 3
    assert times.stamps == sorted(times.stamps)


def test_every_token_is_timed_from_the_call_on(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    prompt = torch.arange(3, 13).view(2, 5)
    start = time.perf_counter()
    seconds, tokens = timed_tokens(model, prompt, 4)
    assert sum(seconds) <= time.perf_counter() - start
    assert len(seconds) == len(tokens) == 4
    wanted = model.generate(prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    assert tokens == wanted[0, 5:].tolist()


def test_the_peak_sees_memory_that_was_given_back():
    peak = MemoryPeak()
    peak.sample()
    before = peak.anon_bytes
    held = torch.ones(60_000_000, dtype=torch.uint8)
    deadline = time.monotonic() + 30
    while peak.anon_bytes < before + 40_000_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    del held
    peak.sample()
    assert peak.anon_bytes >= before + 40_000_000
    assert peak.rss_bytes >= peak.anon_bytes


def test_dropped_pages_are_read_again_and_the_kernel_counts_them(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in files:
        path.write_bytes(bytes(8_000_000))
    link = DiskLink(files)
    drop_pages(files)
    assert link.ceiling() > 0
    if not link._counted:
        pytest.skip("the kernel does not count reads of this file system")
    drop_pages(files)
    moved = link.moved(None)
    for path in files:
        path.read_bytes()
    assert link.moved(None) - moved >= 16_000_000


def test_without_the_kernels_count_the_systems_own_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(1_000_000))
    monkeypatch.setattr(measure, "_read_bytes", lambda: 0)

    class Streaming:
        def link_bytes(self):
            return 42

    link = DiskLink([path])
    link.ceiling()
    assert link.moved(Streaming()) == 42


class Recorded(System):
    """A system that says in which order it was asked."""

    settings: ClassVar[dict[str, Any]] = {}
    resident_bytes = 0

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, []

    def link_bytes(self) -> int:
        return 10**9 * self.asked.count("generate")

    def cool(self) -> None:
        self.asked.append("cool")

    def bare_gbps(self) -> float:
        self.asked.append("bare")
        return 50.0 + self.asked.count("bare")


def test_bare_copies_are_timed_directly_before_and_after_a_run_on_a_cold_system(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Recorded(skeleton(job))

    def generate(*_: Any) -> tuple[list[float], list[int]]:
        system.asked.append("generate")
        return [0.0] * job.profile.new_tokens, [1]

    monkeypatch.setattr(measure, "_generate", generate)
    monkeypatch.setattr(DiskLink, "ceiling", lambda _: system.asked.append("ceiling") or 1e9)
    monkeypatch.setattr(DiskLink, "moved", lambda _, each: each.link_bytes())
    fields = measure.measure(system, job, 10**9, MemoryPeak())
    assert system.asked == ["cool", "ceiling", "bare", "generate", "cool", "bare", "ceiling"]
    assert (fields["bare_gbps_before"], fields["bare_gbps_after"]) == (51.0, 52.0)


def test_systems_that_cannot_say_it_have_no_bare_rate(job: Job) -> None:
    assert PassCounter(skeleton(job), resident=0, streamed=1, settings={}).bare_gbps() is None
