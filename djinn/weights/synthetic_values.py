"""Synthetic weights: the bytes of any tensor of a seeded random model, from any offset, at memory speed.

Drawing 13 billion normal numbers takes minutes, copying takes seconds. So one block of N(0, 0.02) numbers is drawn
per seed and dtype, and every tensor is a stretch of that block which begins at an element chosen by the CRC-32 of the
tensor's name and has its upper seven mantissa bits flipped in a pattern chosen by it too. Tensors that were swapped,
shifted or truncated therefore differ. Signs and exponents stay, so no value becomes infinite; the standard deviation of
a tensor lies between 0.02 and 0.025, depending on its pattern.

The block has a prime number of elements: no row length divides it, so a matrix larger than the block does not repeat
whole rows (equal rows would make equal logits).

As in a freshly initialised model, biases are zero and norms are one. The name and the number of dimensions decide: a
tensor of two or more dimensions is random; of the others, one whose name ends in ``bias`` is zero, the rest are one.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

BLOCK_ELEMENTS = 2**25 - 39  # prime; 64 MiB in bfloat16
STANDARD_DEVIATION = 0.02

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
"""The dtypes that can be filled, and the explicit mantissa bits of each."""

_drawing = threading.Lock()


def fill(out: np.ndarray, *, name: str, shape: Sequence[int], dtype: torch.dtype, seed: int, start: int = 0) -> None:
    """Write bytes ``[start, start + len(out))`` of the synthetic tensor ``name`` into ``out``.

    The same arguments give the same bytes whatever the pieces they are asked for in. Threads may fill at once.

    Args:
        out: uint8, one-dimensional, contiguous, writable; fastest where it starts and ends on whole elements.
        name: the tensor's name in the checkpoint.
        shape: the tensor's shape.
        dtype: bfloat16, float16 or float32.
        seed: which random model, at least 0.
        start: offset into the tensor, in bytes.

    Raises:
        ValueError: another dtype, a buffer of another kind, or a range outside the tensor.
    """
    if dtype not in MANTISSA_BITS:
        raise ValueError(f"tensor {name}: cannot fill {dtype}; only {', '.join(map(str, MANTISSA_BITS))}")
    if out.dtype != np.uint8 or out.ndim != 1 or not out.flags.c_contiguous:
        raise ValueError(f"tensor {name}: the buffer must be contiguous one-dimensional uint8")
    width = dtype.itemsize
    nbytes = math.prod(shape) * width
    if start < 0 or start + len(out) > nbytes:
        raise ValueError(f"tensor {name}: bytes {start} to {start + len(out)} are outside its {nbytes} bytes")

    first, before = divmod(start, width)
    last = -(-(start + len(out)) // width)
    whole = before == 0 and len(out) % width == 0
    target = out if whole else np.empty((last - first) * width, np.uint8)
    _fill_elements(target.view(f"u{width}"), first, name=name, ndim=len(shape), dtype=dtype, seed=seed)
    if not whole:
        out[:] = target[before : before + len(out)]


def _fill_elements(out: np.ndarray, first: int, *, name: str, ndim: int, dtype: torch.dtype, seed: int) -> None:
    if ndim < 2:
        value = 0.0 if name.endswith("bias") else 1.0
        out[:] = torch.tensor(value, dtype=dtype).view(_unsigned(dtype)).item()
        return
    with _drawing:  # lru_cache alone would let two threads draw the same block at once
        block = _block(seed, dtype)
    digest = zlib.crc32(name.encode())
    flip = out.dtype.type(((digest >> 25) & 127) << (MANTISSA_BITS[dtype] - 7))
    done = 0
    while done < len(out):
        at = (digest + first + done) % BLOCK_ELEMENTS
        count = min(len(out) - done, BLOCK_ELEMENTS - at)
        np.bitwise_xor(block[at : at + count], flip, out=out[done : done + count])
        done += count


@lru_cache(maxsize=1)
def _block(seed: int, dtype: torch.dtype) -> np.ndarray:
    """Return the block of ``seed`` as raw bits, shape [BLOCK_ELEMENTS], unsigned integers of the dtype's width."""
    random = np.random.Generator(np.random.SFC64(seed))
    block = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
    for piece in block.split(2**20):  # float32 copies stay small beside the block
        drawn = torch.from_numpy(random.standard_normal(len(piece), dtype=np.float32))
        piece.copy_(drawn.mul_(STANDARD_DEVIATION))
    return block.view(_unsigned(dtype)).numpy()


def _unsigned(dtype: torch.dtype) -> torch.dtype:
    return torch.uint16 if dtype.itemsize == 2 else torch.uint32
