"""What streaming costs beside copies: plausible, and only asked of what there is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from djinn.bench.certify.certification import Certification
from djinn.bench.rates import compute, streaming
from djinn.errors import UnavailableError


@pytest.mark.slow
def test_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long anything took says how busy the machine is, so only what was measured is looked at."""
    monkeypatch.setattr(compute, "_STEPS", 2)
    alone = streaming.measure(torch.device("cpu"))
    assert alone.decode_gbps
    assert alone.split_s is None
    if not torch.cuda.is_available():  # where there are GPUs, transformers splits models over them alone
        assert streaming.split_s(torch.device("cpu")) >= 0
    assert not dist.is_initialized()


def test_where_nothing_can_be_decoded_there_is_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise UnavailableError("no Triton")

    monkeypatch.setattr(streaming, "encode", lacking)
    assert streaming._decode_gbps(torch.device("cpu")) is None


def test_old_certifications_have_none() -> None:
    assert Certification.model_fields["streaming"].default is None


@pytest.mark.gpu
def test_a_gpu_decodes_faster_than_any_link() -> None:
    found = streaming.measure(torch.device("cuda"))
    assert found.decode_gbps
    assert found.decode_gbps > 100
    assert 0 < found.unit_s < 1e-3
    assert streaming.split_s(torch.device("cuda")) < 1e-3
