"""The rate at which a device computes: plausible, and slower per weight with more tokens."""

from __future__ import annotations

import pytest
import torch

from djinn.bench.certify.certification import Certification
from djinn.bench.rates import compute


@pytest.mark.slow
def test_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_HEAD", (512, 512))
    monkeypatch.setattr(compute, "_LAYER_OF", {"cpu": "llama-tiny"})
    monkeypatch.setattr(compute, "_STEPS", 2)
    monkeypatch.setattr(compute, "_LAYERS", (1, 8))
    found = compute.measure(torch.device("cpu"))
    assert found.device == "cpu"
    assert [rate.tokens for rate in found.rates] == list(compute.TOKENS[: len(found.rates)])
    assert all(rate.gbps > 0 for rate in found.rates)
    # How long anything took says how busy the machine is.
    assert found.pass_s is not None
    assert min(found.module_s, found.pass_s, found.call_s) >= 0
    assert found.last_token_gbps


def test_a_slow_device_is_not_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_LAYER_OF", {"cpu": "llama-tiny"})
    monkeypatch.setattr(compute, "_LONGEST_S", 0.0)
    assert [rate.tokens for rate in compute._rates(torch.device("cpu"))] == [1]


def test_old_certifications_have_none() -> None:
    assert Certification.model_fields["compute"].default is None


@pytest.mark.gpu
def test_a_gpu_multiplies_many_tokens_at_tens_of_teraflops() -> None:
    found = compute.measure(torch.device("cuda"))
    last = found.rates[-1]
    assert last.tokens == compute.TOKENS[-1]
    assert last.gbps * last.tokens > 10_000
