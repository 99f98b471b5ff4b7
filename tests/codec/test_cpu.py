"""The codec on a CPU: exact bits, and one encoding of everything."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from codec_cases import BATCHES, CASES, DISTRIBUTIONS, bits, coded, normal, of_exponents, random_bits, spread
from hypothesis import given
from hypothesis import strategies as st

from djinn.codec import reference
from djinn.codec.cpu import BLOCK
from djinn.codec.decode import BatchDecoder, Decoder, decode
from djinn.codec.encode import encode, layout_of
from djinn.codec.layout import MIN_GAIN, TILE, Layout, sections


def forced(weights: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Encode, whatever it costs."""
    coded = encode(weights, min_gain=-math.inf)
    assert coded is not None
    return coded


def decoded(blob: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the bits of whole tiles, decoded into memory that was not zero."""
    out = torch.full((layout.decoded_bytes,), 0xA5, dtype=torch.uint8)
    decode(blob, layout, out)
    return out.view(torch.int16)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Weights of some exponents, few of them common, in any order."""
    size = draw(st.integers(1, 3 * TILE))
    exponents = torch.tensor(draw(st.lists(st.integers(0, 255), min_size=1, max_size=12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen = exponents[torch.randint(len(exponents), (size,), generator=generator)]
    strays = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    stray = torch.randint(256, (size,), generator=generator)
    return of_exponents(torch.where(strays, stray, chosen))


@pytest.mark.parametrize("name", CASES)
def test_the_reference_restores_every_bit(name: str) -> None:
    weights = CASES[name]
    assert torch.equal(bits(reference.decode(*reference.encode(weights))), bits(weights))


@pytest.mark.parametrize("name", CASES)
def test_the_fast_codec_is_the_reference(name: str) -> None:
    weights = CASES[name]
    blob, layout = forced(weights)
    expected, expected_layout = reference.encode(weights)
    assert layout == expected_layout
    assert torch.equal(blob, expected)
    assert torch.equal(decoded(blob, layout)[: layout.elements], bits(weights))


@given(tensors())
def test_any_weights_come_back_and_are_coded_as_the_reference_does(weights: torch.Tensor) -> None:
    blob, layout = forced(weights)
    assert torch.equal(blob, reference.encode(weights)[0])
    assert torch.equal(bits(reference.decode(blob, layout)), bits(weights))
    assert torch.equal(decoded(blob, layout)[: layout.elements], bits(weights))


@pytest.mark.parametrize("tiles", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("rest", [0, 1, TILE - 1])
def test_blocks_of_tiles_fit_together(tiles: int, rest: int) -> None:
    weights = torch.cat([normal(tiles * TILE + rest - 999), random_bits(999)])
    blob, layout = forced(weights)
    assert torch.equal(blob, reference.encode(weights)[0])
    assert torch.equal(decoded(blob, layout)[: layout.elements], bits(weights))


def test_the_bytes_are_where_the_layout_says() -> None:
    """Worked out by hand from djinn/codec/layout.py: exponents 121 to 127 in a tile, and three escapes."""
    exponents = 121 + torch.arange(TILE) % 7
    exponents[0] = 121  # makes 121 to 127 equally common but for the escapes below
    escapes = {2: 250, 2050: 251, 768: 252}  # at bytes 4, 5 and 1536 = 512 * 3 + 0 of sm
    for weight, exponent in escapes.items():
        exponents[weight] = exponent
    weights = of_exponents(exponents)
    blob, layout = forced(weights)
    assert layout == Layout(TILE, 3)
    parts = sections(blob, layout)

    table = parts.lut[0].tolist()
    counts = [int((exponents == exponent).sum()) for exponent in table[:7]]
    assert sorted(table[:7]) == list(range(121, 128))
    assert table[7] == 0
    assert [(-count, exponent) for count, exponent in zip(counts, table[:7], strict=True)] == sorted(
        (-count, exponent) for count, exponent in zip(counts, table[:7], strict=True)
    )
    assert parts.esc.tolist() == [252, 250, 251]  # plane bytes 0, 4, 5
    assert parts.off.tolist() == [0, 3]
    for weight in (0, 1, 2, 768, 2047, 2048, 2050, 4095):
        byte = 2 * weight if weight < 2048 else 2 * (weight - 2048) + 1
        value = int(bits(weights)[weight]) & 0xFFFF
        assert int(parts.sm[0, byte]) == value >> 15 << 7 | value & 0x7F
        code = sum((int(parts.planes[0, plane, byte % 512]) >> byte // 512 & 1) << plane for plane in range(3))
        assert code == (7 if weight in escapes else table.index(int(exponents[weight])))


def test_the_last_tile_is_filled_up_with_its_commonest_exponent() -> None:
    exponents = torch.tensor([130] * TILE + [9, 7, 7, 9, 8])
    blob, layout = forced(of_exponents(exponents))
    assert layout.escapes == 0
    assert set(decoded(blob, layout)[layout.elements :].tolist()) == {7 << 7}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_bits_per_weight(name: str) -> None:
    most, _ = DISTRIBUTIONS[name]
    weights = spread(name)
    measured = layout_of(weights)
    assert measured is not None
    assert 10.5 < 8 * measured.nbytes / weights.numel() <= most


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_stay_raw(dtype: torch.dtype) -> None:
    weights = torch.zeros(100_000).to(dtype)
    assert encode(weights) is None
    assert layout_of(weights) is None


@pytest.mark.parametrize(
    "weights", [normal(0), normal(1), normal(TILE + 1), random_bits(10 * TILE)], ids=["none", "one", "ragged", "noise"]
)
def test_what_does_not_gain_stays_raw(weights: torch.Tensor) -> None:
    assert encode(weights) is None
    assert layout_of(weights) is None


def test_the_least_gain_is_exact() -> None:
    weights = normal(10 * TILE)
    _, layout = forced(weights)
    gain = 1 - layout.nbytes / layout.raw_bytes
    assert gain > MIN_GAIN
    assert layout_of(weights) == layout
    assert encode(weights, min_gain=gain - 1e-9) is not None
    assert encode(weights, min_gain=gain + 1e-9) is None


def test_shape_and_strides_do_not_matter() -> None:
    weights = normal(300 * 500).view(300, 500)
    flat, _ = forced(weights.T.contiguous().view(-1))
    assert torch.equal(forced(weights.T)[0], flat)
    assert torch.equal(forced(torch.nn.Parameter(weights.T))[0], flat)


def test_threads_do_not_disturb_each_other() -> None:
    weights = [normal(40 * TILE + seed, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        coded = list(pool.map(forced, weights))
        restored = list(pool.map(lambda pair: decoded(*pair), coded))
    for original, (blob, _), bits_out in zip(weights, coded, restored, strict=True):
        assert torch.equal(blob, forced(original)[0])
        assert torch.equal(bits_out[: len(original)], bits(original))


def test_a_decoder_reads_what_is_there_at_the_call() -> None:
    first, second = normal(2 * TILE, 1), normal(2 * TILE, 1).neg()
    blob, layout = forced(first)
    out = torch.empty(2 * TILE, dtype=torch.bfloat16)
    run = Decoder(layout, blob, out)
    run()
    assert torch.equal(bits(out), bits(first))
    blob.copy_(forced(second)[0])
    run()
    assert torch.equal(bits(out), bits(second))


def test_unsuitable_tensors_are_refused() -> None:
    blob, layout = forced(normal(TILE))
    out = torch.empty(layout.decoded_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a blob is contiguous uint8"):
        decode(blob[:-1], layout, out)
    with pytest.raises(ValueError, match=f"of {layout.decoded_bytes} bytes"):
        decode(blob, layout, out[:-2])
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        decode(blob, layout, out.view(torch.float16))
    with pytest.raises(ValueError, match="multiples of 16"):
        decode(blob, layout, torch.empty(layout.decoded_bytes + 8, dtype=torch.uint8)[8:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("name", BATCHES)
def test_many_blobs_are_decoded_into_rows(name: str, dtype: torch.dtype) -> None:
    batch = BATCHES[name]()
    elements = batch[0].layout.elements
    rows = torch.full((len(batch) + 2, elements), 0x5A5A, dtype=torch.int16)
    run = BatchDecoder(elements, torch.device("cpu"))
    run([(one.blob, one.layout) for one in batch], rows[1:-1].view(dtype))
    assert torch.equal(rows[1:-1], torch.stack([bits(one.weights) for one in batch]))
    assert set(rows[[0, -1]].view(-1).tolist()) == {0x5A5A}


def test_a_decoder_of_many_takes_other_blobs_and_rows_every_time() -> None:
    batch = BATCHES["seventeen blobs"]()
    run = BatchDecoder(TILE, torch.device("cpu"))
    for some in (batch[:3], batch[9:], batch[3:2:-1], []):
        out = torch.empty(len(some), 64, 64, dtype=torch.bfloat16)
        run([(one.blob, one.layout) for one in some], out)
        for one, row in zip(some, out, strict=True):
            assert torch.equal(bits(row), bits(one.weights))


@pytest.mark.parametrize("elements", [-TILE, 0, 1, TILE + 1])
def test_rows_that_are_not_whole_tiles_are_refused(elements: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 4096, not {elements}; decode these one by one"):
        BatchDecoder(elements, torch.device("cpu"))


def test_unsuitable_tensors_are_refused_among_many() -> None:
    one, other = coded(normal(TILE)), coded(normal(2 * TILE))
    good = one.blob, one.layout
    out = torch.ones(2, TILE, dtype=torch.bfloat16)
    run = BatchDecoder(TILE, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"2 blobs of 4096 weights need bfloat16 or uint8 of 16384 bytes, not .* 8192"):
        run([good, good], out[:1])
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        run([good, good], out.view(torch.float16))
    with pytest.raises(ValueError, match="contiguous on cpu"):
        run([good, good], torch.empty(TILE, 2, dtype=torch.bfloat16).T)
    with pytest.raises(ValueError, match="contiguous on cpu, not on meta"):
        run([good, good], out.to("meta"))
    with pytest.raises(ValueError, match="at an address that is a multiple of 16"):
        run([good], torch.empty(TILE + 4, dtype=torch.bfloat16)[4:])
    with pytest.raises(ValueError, match="a blob is contiguous uint8"):
        run([good, (one.blob[:-1], one.layout)], out)
    with pytest.raises(ValueError, match=r"blob 1 must have 4096 weights .* not 8192 weights on cpu"):
        run([good, (other.blob, other.layout)], out)
    with pytest.raises(ValueError, match=r"blob 0 must have .* on cpu at .* on meta"):
        run([(one.blob.to("meta"), one.layout), good], out)
    shifted = torch.cat([torch.zeros(8, dtype=torch.uint8), one.blob])[8:]
    with pytest.raises(ValueError, match=r"blob 1 must have .* at a multiple of 16 bytes"):
        run([good, (shifted, one.layout)], out)
    assert (out == 1).all(), "all are looked at before one is decoded"
