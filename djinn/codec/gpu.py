"""The codec on a GPU: Triton kernels, one program per tile, no atomics. Importing this needs Triton.

The decoder loads and stores whole words that are contiguous, except for escapes. Words of planes are unsigned, because
a shift would spread the sign of a signed word. Sizes are written as numbers, because kernels cannot read globals: a
tile has 4096 weights, 1024 words of ``sm``, 3 planes of 128 words, 2048 words decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from djinn.codec.layout import TILE, Layout, Sections
from djinn.devices import gpu_index

ENCODE_WARPS = 4
DECODE_WARPS = 4
"""Warps that decode a tile. With 4, every thread has one word of each plane and the 8 words of ``sm`` it codes; loads
of four words at once, which need an exchange between threads, were no faster."""


def survey(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every tile's table (uint8 [tiles, 8]) and number of escapes (int64 [tiles]).

    ``weights`` are bfloat16 [elements], contiguous, not empty.
    """
    tiles = -(-len(weights) // TILE)
    lut = torch.empty(tiles, dtype=torch.int64, device=weights.device)
    escapes = torch.empty_like(lut)
    with torch.cuda.device_of(weights):
        _survey[(tiles,)](weights.view(torch.int16), len(weights), lut, escapes, num_warps=ENCODE_WARPS)
    return lut.view(torch.uint8).view(tiles, 8), escapes


def write(weights: torch.Tensor, parts: Sections) -> None:
    """Write sections ``sm``, ``planes`` and ``esc`` of ``weights`` (as in :func:`survey`) by ``lut`` and ``off``."""
    bits = weights.view(torch.int16)
    lut = parts.lut.view(torch.int64)
    with torch.cuda.device_of(weights):
        _write[(len(parts.sm),)](
            bits, len(bits), lut, parts.off, parts.sm, parts.planes, parts.esc, num_warps=ENCODE_WARPS
        )


def decoder(parts: Sections, out: torch.Tensor, warps: int = DECODE_WARPS) -> Callable[[], None]:
    """Return a function that decodes ``parts`` into ``out`` (uint8 [decoded_bytes]) on the current stream.

    The arguments' types and alignment are what the kernel is compiled for, so they are tensors once, here.
    """
    tensors = decode_arguments(parts, out)
    tiles = len(parts.sm)
    with torch.cuda.device_of(out):
        launch = _launcher(_decode.warmup(*tensors, grid=(tiles, 1, 1), num_warps=warps), gpu_index(out.device))
    return partial(launch, tiles, 1, *[tensor.data_ptr() for tensor in tensors])


def _launcher(kernel: Any, index: int) -> Callable[..., None]:
    """Return a function that launches a compiled kernel on the current stream of a GPU, by columns, rows and arguments.

    Triton's own call looks at every argument anew, at 10 to 20 µs, and a compiled kernel's at its own parts each time.
    """
    launch = kernel.run  # loads it here and now: loading may wait for the device
    function, metadata, here = kernel.function, kernel.packed_metadata, nullcontext()

    def run(columns: int, rows: int, *arguments: int) -> None:
        # A new torch.cuda.Stream each time would take longer than the launch.
        stream = torch._C._cuda_getCurrentRawStream(index)
        with here if torch._C._cuda_getDevice() == index else torch.cuda.device(index):  # in its context
            launch(columns, rows, 1, stream, function, metadata, None, None, None, *arguments)

    return run


def decode_arguments(parts: Sections, out: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that the decoding kernel takes; its grid is the number of tiles."""
    as_words = [tensor.view(torch.uint32) for tensor in (parts.sm, parts.planes, parts.lut)]
    return [*as_words, parts.off, parts.esc, out.view(torch.uint32)]


def batch_decoder(
    elements: int, device: torch.device, warps: int = DECODE_WARPS
) -> Callable[[Sequence[tuple[torch.Tensor, Layout]], torch.Tensor], None]:
    """Return a function that decodes blobs of ``elements`` weights into the rows of a tensor, on the current stream."""
    at = address_decoder(elements, device, warps)

    def run(blobs: Sequence[tuple[torch.Tensor, Layout]], out: torch.Tensor) -> None:
        # Page-locked by torch's allocator, which gives the table's memory out again only once its copy has been read.
        # Tables of our own in turn would need an event each, too, and would let the host be only as many calls ahead
        # of the device as there are tables. On the device, memory freed here is given out in the order of this stream.
        table = torch.empty(len(blobs), dtype=torch.int64, pin_memory=True)
        table.numpy()[:] = [blob.data_ptr() for blob, _ in blobs]  # torch would look at each number for longer
        at(table.to(device, non_blocking=True), out)

    return run


def address_decoder(
    elements: int, device: torch.device, warps: int = DECODE_WARPS
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a function that decodes the blobs at ``addresses`` (int64 [blobs], on the device) into rows of ``out``.

    It launches as :func:`decoder` does. The kernel is compiled for addresses that are multiples of 16, before there
    are any: those that come later have to be.
    """
    starts = section_starts(elements)
    tiles = elements // TILE
    with torch.cuda.device(device):
        kernel = _decode_batch.warmup(torch.int64, torch.uint32, *starts, grid=(tiles, 1), num_warps=warps)
        launch = _launcher(kernel, gpu_index(device))

    def at(addresses: torch.Tensor, out: torch.Tensor) -> None:
        launch(tiles, len(addresses), addresses.data_ptr(), out.data_ptr(), *starts)

    return at


def section_starts(elements: int) -> list[int]:
    """Return where sections begin in every blob of ``elements`` weights, as the kernel for many blobs takes them."""
    offsets = Layout(elements, 0).offsets
    return [offsets[name] for name in ("planes", "lut", "off", "esc")]


@triton.jit
def _survey(weights: tl.tensor, elements: tl.tensor, lut: tl.tensor, escapes: tl.tensor) -> None:
    """Find a tile's table and count its escapes. weights: int16, lut: int64 (8 bytes), escapes: int64."""
    tile = tl.program_id(0).to(tl.int64)
    index = tile * 4096 + tl.arange(0, 4096)
    bits = tl.load(weights + index, mask=index < elements, other=0).to(tl.int32)
    exponents = tl.arange(0, 256)
    counts = tl.histogram(bits >> 7 & 0xFF, 256)
    missing = tl.maximum(tile * 4096 + 4096 - elements, 0).to(tl.int32)  # these were counted as exponent 0
    counts = tl.where(exponents == 0, counts - missing, counts)

    table = tl.zeros((), tl.int64)
    left = 4096 - missing
    for code in tl.static_range(7):
        # One maximum finds the commonest, and among equals the smallest, exponent.
        best = tl.max(counts * 256 + (255 - exponents), 0)
        commonest = 255 - (best & 255)
        table |= commonest.to(tl.int64) << (8 * code)
        left -= best >> 8
        counts = tl.where(exponents == commonest, -1, counts)
    tl.store(lut + tile, table)
    tl.store(escapes + tile, left.to(tl.int64))


@triton.jit
def _write(
    weights: tl.tensor,
    elements: tl.tensor,
    lut: tl.tensor,
    off: tl.tensor,
    sm: tl.tensor,
    planes: tl.tensor,
    esc: tl.tensor,
) -> None:
    """Write sm, planes and esc of a tile. weights: int16, lut: int64, off: int32, the others: uint8."""
    tile = tl.program_id(0).to(tl.int64)
    bit = tl.arange(0, 8)[:, None]
    byte = tl.arange(0, 512)
    place = 512 * bit + byte[None, :]  # in sm
    index = tile * 4096 + (place & 1) * 2048 + (place >> 1)
    real = index < elements
    bits = tl.load(weights + index, mask=real, other=0).to(tl.int32)
    tl.store(sm + tile * 4096 + place, (bits >> 8 & 0x80 | bits & 0x7F).to(tl.uint8))

    exponents = bits >> 7 & 0xFF
    table = tl.load(lut + tile)
    codes = tl.full((8, 512), 7, tl.int32)
    for code in tl.static_range(7):
        codes = tl.where(exponents == (table >> (8 * code) & 0xFF).to(tl.int32), code, codes)
    codes = tl.where(real, codes, 0)
    for plane in tl.static_range(3):
        packed = tl.sum((codes >> plane & 1) << bit, 0)
        tl.store(planes + tile * 1536 + plane * 512 + byte, packed.to(tl.uint8))

    escaped = (codes == 7).to(tl.int32)
    in_byte = tl.sum(escaped, 0)
    before = tl.cumsum(in_byte, 0) - in_byte
    rank = before[None, :] + tl.cumsum(escaped, 0) - escaped
    start = tl.load(off + tile).to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(esc + start + rank, exponents.to(tl.uint8), mask=escaped != 0)


@triton.jit
def _decode(
    sm: tl.tensor,
    planes: tl.tensor,
    lut: tl.tensor,
    off: tl.tensor,
    esc: tl.tensor,
    out: tl.tensor,
) -> None:
    """Decode a tile of one blob; arguments as for `_decode_tile`."""
    _decode_tile(tl.program_id(0).to(tl.int64), sm, planes, lut, off, esc, out)


@triton.jit
def _decode_batch(
    blobs: tl.tensor,
    out: tl.tensor,
    planes: tl.tensor,
    lut: tl.tensor,
    off: tl.tensor,
    esc: tl.tensor,
) -> None:
    """Decode a tile of one of several blobs. blobs: int64, their addresses; out: uint32; the others: bytes into a blob.

    Blobs are at multiples of 16 bytes, and so are their sections. The compiler loses sight of that where a number
    becomes a pointer, and has to be told: otherwise it loads ``sm`` word by word.
    """
    blob = tl.load(blobs + tl.program_id(1))
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * 2048
    _decode_tile(
        tl.program_id(0).to(tl.int64),
        tl.multiple_of(blob.to(tl.pointer_type(tl.uint32)), 16),
        (blob + planes).to(tl.pointer_type(tl.uint32)),
        (blob + lut).to(tl.pointer_type(tl.uint32)),
        (blob + off).to(tl.pointer_type(tl.int32)),
        (blob + esc).to(tl.pointer_type(tl.uint8)),
        out + row,
    )


@triton.jit
def _decode_tile(
    tile: tl.tensor,
    sm: tl.tensor,
    planes: tl.tensor,
    lut: tl.tensor,
    off: tl.tensor,
    esc: tl.tensor,
    out: tl.tensor,
) -> None:
    """Decode a tile, four weights to a word. sm, planes, lut, out: uint32; off: int32; esc: uint8."""
    bit = tl.arange(0, 8)[:, None]
    word = tl.arange(0, 128)
    place = 128 * bit + word[None, :]  # in the words of sm
    rest = tl.load(sm + tile * 1024 + place)
    plane0 = tl.load(planes + tile * 384 + word)
    plane1 = tl.load(planes + tile * 384 + 128 + word)
    plane2 = tl.load(planes + tile * 384 + 256 + word)
    table_low = tl.load(lut + tile * 2)
    table_high = tl.load(lut + tile * 2 + 1)

    # A byte of ones for every weight whose code has the bit, then a choice among the table's entries, bit by bit.
    mask0 = (plane0[None, :] >> bit & 0x01010101) * 0xFF
    mask1 = (plane1[None, :] >> bit & 0x01010101) * 0xFF
    mask2 = (plane2[None, :] >> bit & 0x01010101) * 0xFF
    code01 = _choose(mask0, _entry(table_low, 0), _entry(table_low, 1))
    code23 = _choose(mask0, _entry(table_low, 2), _entry(table_low, 3))
    code45 = _choose(mask0, _entry(table_high, 0), _entry(table_high, 1))
    code67 = _choose(mask0, _entry(table_high, 2), _entry(table_high, 3))  # the entry of escapes is 0
    exponents = _choose(mask2, _choose(mask1, code01, code23), _choose(mask1, code45, code67))

    # Each round adds the next escape of every plane word. A word has one or so on average, the tile's fullest about 5.
    escaped = plane0 & plane1 & plane2
    count = _bits_set(escaped)
    start = tl.load(off + tile).to(tl.uint32, bitcast=True).to(tl.int64)
    next_escape = esc + start + (tl.cumsum(count, 0) - count)
    rounds = tl.max(count, 0)
    while rounds > 0:
        value = tl.load(next_escape, mask=escaped != 0, other=0).to(tl.uint32)
        others = escaped & (escaped - 1)
        exponents += ((escaped ^ others)[None, :] >> bit & 0x01010101) * value[None, :]
        escaped = others
        next_escape += 1
        rounds -= 1

    first_half = (exponents & 0x00FF00FF) << 7 | (rest & 0x00800080) << 8 | rest & 0x007F007F
    second_half = exponents >> 1 & 0x7F807F80 | rest & 0x80008000 | rest >> 8 & 0x007F007F
    tl.store(out + tile * 2048 + place, first_half)
    tl.store(out + tile * 2048 + 1024 + place, second_half)


@triton.jit
def _entry(table: tl.tensor, number: tl.constexpr) -> tl.tensor:
    """Return the byte ``number`` of ``table`` four times."""
    return (table >> (8 * number) & 0xFF) * 0x01010101


@triton.jit
def _choose(mask: tl.tensor, clear: tl.tensor, full: tl.tensor) -> tl.tensor:
    """Return ``full`` where ``mask`` has ones, ``clear`` elsewhere."""
    return clear ^ (clear ^ full) & mask


@triton.jit
def _bits_set(word: tl.tensor) -> tl.tensor:
    """Count the ones of a uint32, as int32."""
    word = word - (word >> 1 & 0x55555555)
    word = (word & 0x33333333) + (word >> 2 & 0x33333333)
    word = word + (word >> 4) & 0x0F0F0F0F
    return (word * 0x01010101 >> 24).to(tl.int32)
