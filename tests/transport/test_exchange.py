"""Inputs of products to the host and outputs back: every bit, and on a GPU past the copies that wait."""

from __future__ import annotations

import pytest
import torch

from djinn.transport.exchange import exchange_with

DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
    pytest.param(  # while another one is the current one
        "cuda:1",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [[3], [8, 1, 4], [28672, 28672], [4097]])
def test_every_bit_comes_and_goes(device: str, rows: list[int]) -> None:
    exchange = exchange_with(torch.device(device))
    chance = torch.Generator().manual_seed(len(rows))
    for tokens in (1, 3, 16, 2):
        inputs = torch.randint(-(2**15), 2**15, (tokens, 24), generator=chance, dtype=torch.int16)
        came = exchange.to_host(inputs.view(torch.bfloat16).to(device))
        assert torch.equal(came.view(torch.int16), inputs)
        room = exchange.room(tokens, rows)
        made = [torch.randint(-(2**15), 2**15, part.shape, generator=chance, dtype=torch.int16) for part in room]
        for part, values in zip(room, made, strict=True):
            part.view(torch.int16).copy_(values)
        gone = exchange.to_device(room)
        assert all(part.device == torch.device(device) for part in gone)
        assert all(torch.equal(part.cpu().view(torch.int16), values) for part, values in zip(gone, made, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_outputs_pass_the_copies_that_were_issued_before() -> None:
    exchange = exchange_with(torch.device("cuda"))
    (room,) = exchange.room(1, [57344])
    room.fill_(1.5)
    exchange.to_device([room])
    source = torch.zeros(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    prefetching, over = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(prefetching):
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        over.record()
    (room,) = exchange.room(1, [57344])
    (there,) = exchange.to_device([room])
    torch.cuda.current_stream().synchronize()
    assert not over.query()
    assert torch.equal(there, torch.full_like(there, 1.5))
