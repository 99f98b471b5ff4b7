"""The kernels on a real GPU: the reference's bytes and bits, at sizes that the interpreter cannot reach."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import BATCHES, CASES, DISTRIBUTIONS, bits, normal, random_bits, spread

from djinn.codec.decode import BatchDecoder, Decoder, decode
from djinn.codec.encode import encode, layout_of
from djinn.codec.layout import TILE, Layout, sections

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
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
    assert not out.any()  # loads its kernel, which may wait for the device
    torch.cuda.synchronize()  # so that page-locked memory is free for the next call: asking for more would wait
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


def placed(blobs: list[tuple[torch.Tensor, Layout]]) -> list[tuple[torch.Tensor, Layout]]:
    """Copy blobs into one block of the GPU, at odd multiples of 16 bytes: a wider load than that would fail."""
    starts = [0]
    for blob, _ in blobs:
        starts.append(starts[-1] + -(-len(blob) // 32) * 32)
    block = torch.full((starts[-1] + 16,), 0xA5, dtype=torch.uint8, device=GPU)[16:]
    for (blob, _), start in zip(blobs, starts, strict=False):
        block[start : start + len(blob)] = blob
    return [(block[start : start + len(blob)], layout) for (blob, layout), start in zip(blobs, starts, strict=False)]


def some_blobs(count: int, elements: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, Layout]]]:
    """Return the bits of weights on the GPU, int16 [count, elements], more of them escapes from row to row; blobs."""
    rows = torch.empty(count, elements, dtype=torch.int16, device=GPU)
    blobs = []
    for number, row in enumerate(rows):
        generator = torch.Generator(GPU).manual_seed(number)
        weights = 0.02 * torch.randn(elements, generator=generator, device=GPU)
        stray = torch.rand(elements, generator=generator, device=GPU) < 0.3 * number / count
        row.copy_(
            bits(torch.where(stray, weights * 2.0 ** (torch.arange(elements, device=GPU) % 60), weights).bfloat16())
        )
        blobs.append(forced(row.view(torch.bfloat16)))
    return rows, blobs


@pytest.mark.parametrize("name", BATCHES)
def test_many_blobs_are_decoded_into_rows(name: str) -> None:
    batch = BATCHES[name]()
    elements = batch[0].layout.elements
    places = {id(one.blob): (one.blob, one.layout) for one in batch}
    moved = dict(zip(places, placed(list(places.values())), strict=True))
    rows = torch.full((len(batch) + 2, elements), 0x5A5A, dtype=torch.int16, device=GPU)
    BatchDecoder(elements, GPU)([moved[id(one.blob)] for one in batch], rows[1:-1].view(torch.bfloat16))
    assert torch.equal(rows[1:-1].cpu(), torch.stack([bits(one.weights) for one in batch]))
    assert (rows[[0, -1]] == 0x5A5A).all()


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_tuning_does_not_change_a_bit_of_many(warps: int) -> None:
    from djinn.codec import gpu

    rows, blobs = some_blobs(5, 64 * TILE)
    out = torch.zeros_like(rows)
    gpu.batch_decoder(64 * TILE, out.device, warps=warps)(placed(blobs), out)
    assert torch.equal(out, rows)


def test_as_many_experts_as_models_have_are_decoded_as_one_by_one() -> None:
    rows, blobs = some_blobs(128, 3_145_728)
    assert len({layout.escapes for _, layout in blobs}) == 128
    out = torch.zeros_like(rows)
    BatchDecoder(3_145_728, GPU)(blobs, out.view(torch.bfloat16))
    one = torch.empty(6_291_456, dtype=torch.uint8, device=GPU)
    for (blob, layout), row, expected in zip(blobs, out, rows, strict=True):
        decode(blob, layout, one)
        assert torch.equal(row, one.view(torch.int16))
        assert torch.equal(row, expected)


def test_two_large_blobs_are_decoded() -> None:
    rows, blobs = some_blobs(2, 117_440_512)
    out = torch.zeros_like(rows)
    BatchDecoder(117_440_512, GPU)(blobs, out.view(torch.uint8))
    assert torch.equal(out, rows)


def test_calls_that_the_device_has_not_begun_keep_their_addresses() -> None:
    """Each call has other blobs, and all are issued, on two streams in turn, before the device comes to the first."""
    rows, blobs = some_blobs(16, 8 * TILE)
    run = BatchDecoder(8 * TILE, GPU)
    calls = [[(call + step * (1 + call % 5)) % 16 for step in range(1 + call % 7)] for call in range(300)]
    outs = [torch.zeros(len(picked), 8 * TILE, dtype=torch.int16, device=GPU) for picked in calls]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for warm in (False, True):  # page-locking memory for the first time may wait for the device
        for out in outs:
            out.zero_()
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10**9)  # some half a second
        for call, picked in enumerate(calls):
            with torch.cuda.stream(streams[call % 2]):
                run([blobs[number] for number in picked], outs[call].view(torch.bfloat16))
        assert not (warm and any(stream.query() for stream in streams)), "the host waited, so that this shows nothing"
        torch.cuda.synchronize()
        for picked, out in zip(calls, outs, strict=True):
            assert torch.equal(out, rows[picked])


def test_a_decoder_of_many_issues_on_the_current_stream() -> None:
    rows, blobs = some_blobs(3, 8 * TILE)
    run = BatchDecoder(8 * TILE, GPU)
    out = torch.zeros_like(rows)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are loaded, and page-locked memory is there: either may wait for the device
            run(blobs, out.view(torch.bfloat16))
            torch.cuda.synchronize()
    out.zero_()
    assert not out.any()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # some 50 ms, during which nothing may be decoded
        run(blobs, out.view(torch.bfloat16))
    assert not out.any()
    stream.synchronize()
    assert torch.equal(out, rows)


def test_a_blob_elsewhere_is_refused() -> None:
    rows, blobs = some_blobs(1, TILE)
    with pytest.raises(ValueError, match=r"blob 0 must have 4096 weights on cuda:0 .* on cpu at"):
        BatchDecoder(TILE, GPU)([(blobs[0][0].cpu(), blobs[0][1])], rows.view(torch.bfloat16))
