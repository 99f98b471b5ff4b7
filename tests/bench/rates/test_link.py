"""Copy rates of this machine's link, whichever it has."""

import pytest
import torch

from djinn.bench.rates import link


@pytest.mark.parametrize("chunk", [4096, 3 * 2**20, 40 * 2**20])
def test_memcpy_has_a_rate_also_for_chunks_that_do_not_divide_the_sample(chunk: int) -> None:
    assert link.memcpy_rate(chunk, nbytes=2**25) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_copy_is_called_memcpy() -> None:
    found = link.rates([2**20, 2**22])
    assert [(rate.kind, rate.chunk_bytes) for rate in found] == [("memcpy", 2**20), ("memcpy", 2**22)]
    assert all(rate.gbps > 0 for rate in found)


@pytest.mark.gpu
def test_pinned_copies_beat_pageable_ones() -> None:
    assert link.pinned_h2d_rate(2**24) > link.pageable_h2d_rate(2**24) > 0
    assert link.d2h_rate(2**24) > 0


@pytest.mark.gpu
def test_pinning_holds_for_the_measurement_alone() -> None:
    with link._page_locked(2**20) as memory:
        assert memory.is_pinned()
    assert not memory.is_pinned()


@pytest.mark.gpu
def test_every_kind_of_copy_is_measured_at_every_chunk_size() -> None:
    found = link.rates([2**20, 2**26])
    assert len({(rate.kind, rate.chunk_bytes) for rate in found}) == len(found) == 6
