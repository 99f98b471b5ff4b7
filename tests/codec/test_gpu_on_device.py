"""The kernels on a real GPU: the reference's bytes and bits, at sizes that the interpreter cannot reach."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import CASES, DISTRIBUTIONS, bits, normal, random_bits, spread

from djinn.codec.decode import Decoder, decode
from djinn.codec.encode import encode, layout_of
from djinn.codec.layout import TILE, Layout, sections

pytestmark = pytest.mark.gpu

BIG = {
    "64 Mi weights": lambda: normal(2**26),
    "ragged": lambda: normal(10_000_001),
    "noise": lambda: random_bits(5_000_003),
    **{name: lambda name=name: spread(name, 2048) for name in DISTRIBUTIONS},
    **{name: lambda weights=weights: weights for name, weights in CASES.items()},
}


def forced(weights: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    coded = encode(weights, min_gain=-math.inf)
    assert coded is not None
    return coded


def decoded(blob: torch.Tensor, layout: Layout) -> torch.Tensor:
    out = torch.full((layout.decoded_bytes,), 0xA5, dtype=torch.uint8, device="cuda")
    decode(blob, layout, out)
    return out.view(torch.int16)


@pytest.mark.parametrize("name", BIG)
def test_the_gpu_codes_and_decodes_as_the_cpu_does(name: str) -> None:
    weights = BIG[name]()
    blob, layout = forced(weights)
    on_gpu, layout_on_gpu = forced(weights.cuda())
    assert layout_on_gpu == layout
    assert torch.equal(on_gpu.cpu(), blob)
    assert torch.equal(decoded(on_gpu, layout)[: layout.elements].cpu(), bits(weights))


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_the_kernels_tuning_does_not_change_a_bit(warps: int) -> None:
    from djinn.codec import gpu

    weights = torch.cat([spread("laplace").view(-1), random_bits(3 * TILE)])
    blob, layout = forced(weights.cuda())
    out = torch.empty(layout.decoded_bytes, dtype=torch.uint8, device="cuda")
    gpu.decoder(sections(blob, layout), out, warps=warps)()
    assert torch.equal(out.view(torch.int16)[: layout.elements].cpu(), bits(weights))


def test_decoding_again_and_again_gives_the_same_bits() -> None:
    weights = spread("student t(4)", 4096).cuda()
    blob, layout = forced(weights)
    out = torch.empty(layout.decoded_bytes // 2, dtype=torch.bfloat16, device="cuda")
    run = Decoder(layout, blob, out)
    for _ in range(50):
        out.fill_(float("nan"))
        run()
        assert torch.equal(bits(out), bits(weights))


def test_a_decoder_issues_on_the_current_stream_and_in_a_graph() -> None:
    weights = normal(2**22).cuda()
    blob, layout = forced(weights)
    out = torch.zeros(layout.decoded_bytes, dtype=torch.uint8, device="cuda")
    run = Decoder(layout, blob, out)
    run()
    assert out.any()  # has loaded all kernels: loading one may wait for the device
    out.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # some 50 ms, during which nothing may be decoded
        run()
    assert not out.any()
    stream.synchronize()
    assert torch.equal(bits(out.view(torch.bfloat16)), bits(weights))

    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    assert not out.any()
    graph.replay()
    assert torch.equal(bits(out.view(torch.bfloat16)), bits(weights))


def test_what_does_not_gain_stays_raw() -> None:
    assert encode(random_bits(2**20).cuda()) is None
    assert encode(normal(100).cuda()) is None
    weights = normal(2**20).cuda()
    coded = encode(weights)
    assert coded is not None
    assert layout_of(weights) == coded[1]
