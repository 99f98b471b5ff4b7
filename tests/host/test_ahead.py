"""Layers that the cores compute for a device: what comes back, and who waits for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from djinn.host.ahead import SLOTS, Ahead, InOrder, computing_beside
from djinn.host.products import HostProducts, Linear
from djinn.transport.stats import Stats

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SECOND = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")]
DEVICES = ["cpu", pytest.param("cuda:0", marks=GPU), pytest.param("cuda:1", marks=SECOND)]
"""The second GPU while the first one is the current one."""


def layers(seed: int, columns: int = 96) -> list[Linear]:
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, columns, generator=random).bfloat16() for rows in (70 + seed, 33)]
    return [Linear(weights[0]), Linear(weights[1], torch.randn(33, generator=random).bfloat16())]


def vectors(seed: int, count: int = 2, columns: int = 96) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def products() -> Iterator[HostProducts]:
    made = HostProducts(threads=1)
    yield made
    made.close()


@pytest.fixture
def stats() -> Stats:
    return Stats(model_bytes=0, resident_bytes=0, ring_bytes=0, host_bytes=0, disk_bytes=0, traced=True)


@pytest.mark.parametrize("device", DEVICES)
def test_many_products_in_a_row_are_all_right(device: str, products: HostProducts, stats: Stats) -> None:
    """More than there are slots, of different sizes, each with the last one's outputs among its inputs."""
    computing = computing_beside(torch.device(device), products, stats)
    assert isinstance(computing, InOrder if device == "cpu" else Ahead)
    chain, expected = vectors(0).to(device), vectors(0)
    nbytes = 0
    for seed in range(5 * SLOTS):
        count = 1 + seed % 3
        ours, theirs = chain[:1].expand(count, -1).contiguous(), expected[:1].expand(count, -1).contiguous()
        made = computing.outputs_of(layers(seed), ours, f"product {seed}")
        known = products.outputs_of(layers(seed), theirs)
        assert [tuple(each.shape) for each in made] == [(count, 70 + seed), (count, 33)]
        chain, expected = (torch.cat([each[1][:, :32] / 8] * 3, 1) for each in (made, known))
        nbytes += sum(layer.nbytes for layer in layers(seed))
        if seed % 7 == 0:
            assert all(torch.equal(one.cpu(), other) for one, other in zip(made, known, strict=True))
    assert torch.equal(chain.cpu(), expected)
    computing.count()
    assert stats.host_computed_bytes == nbytes
    assert min(stats.host_s, stats.host_wait_s, stats.product_wait_s) > 0
    assert {each.unit for each in stats.timeline} == {f"product {seed}" for seed in range(5 * SLOTS)}
    computing.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_caller_goes_on_while_inputs_are_not_there(products: HostProducts, stats: Stats) -> None:
    computing = computing_beside(torch.device("cuda"), products, stats)
    assert isinstance(computing, Ahead)
    inputs = vectors(1).cuda()
    computing.outputs_of(layers(1), inputs, "")  # allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second
    (made, _) = computing.outputs_of(layers(1), inputs, "")
    assert computing._queue.unfinished == 1
    assert torch.equal(made.cpu(), products.outputs_of(layers(1), vectors(1))[0])
    assert computing._queue.unfinished == 0
    computing.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("at", ["send", "write", "put", "wait", "to_device"])
def test_an_interrupt_leaves_nothing_that_later_products_meet(
    products: HostProducts, stats: Stats, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    from djinn.host import ahead

    computing = computing_beside(torch.device("cuda"), products, stats)
    assert isinstance(computing, Ahead)
    owner = {
        "send": computing._slots[0].exchange, "to_device": computing._slots[0].exchange, "put": computing._queue,
        "write": ahead.marks, "wait": ahead.marks,
    }[at]  # fmt: skip
    real = getattr(owner, at)

    def interrupted(*given: object) -> None:
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            computing.outputs_of(layers(0), vectors(0).cuda(), "")
    for seed in range(3 * SLOTS):
        made = computing.outputs_of(layers(seed), vectors(seed).cuda(), "")
        known = products.outputs_of(layers(seed), vectors(seed))
        assert all(torch.equal(one.cpu(), other) for one, other in zip(made, known, strict=True))
    computing.close()
