"""Several GPUs' links at once, and their sums."""

import pytest
import torch

from djinn.bench.rates import several

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two GPUs"),
]


def test_links_are_measured_alone_and_at_once() -> None:
    found = several.links(2)
    assert [rate.gpus for rate in found] == [(0,), (1,), (0, 1)]
    assert all(len(rate.gbps) == len(rate.gpus) and min(rate.gbps) > 0 for rate in found)


def test_sums_are_measured_idle_and_beside_copies() -> None:
    found = several.sums(2)
    assert [(rate.nbytes, rate.beside_copies) for rate in found] == [
        (nbytes, beside) for nbytes in several.SUM_BYTES for beside in (False, True)
    ]
    assert all(rate.seconds > 0 for rate in found)
