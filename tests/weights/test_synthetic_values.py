"""Synthetic bytes: deterministic, addressable from anywhere, different for every tensor."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn.weights.synthetic_values import BLOCK_ELEMENTS, STANDARD_DEVIATION, fill

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensor_bytes(
    name: str = "a.weight", shape: tuple[int, ...] = (40, 50), dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> np.ndarray:
    out = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    fill(out, name=name, shape=shape, dtype=dtype, seed=seed)
    return out


def values(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_stretch_equals_that_stretch_of_the_whole(dtype: torch.dtype) -> None:
    whole = tensor_bytes(dtype=dtype)

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, len(whole)), st.integers(0, len(whole)))
    def check(one: int, other: int) -> None:
        start, end = sorted((one, other))
        out = np.empty(end - start, np.uint8)
        fill(out, name="a.weight", shape=(40, 50), dtype=dtype, seed=0, start=start)
        assert np.array_equal(out, whole[start:end])

    check()


def test_a_tensor_larger_than_the_block_goes_on_where_the_block_starts_again() -> None:
    shape = (3, BLOCK_ELEMENTS)
    row = BLOCK_ELEMENTS * 2
    ends = [np.empty(2000, np.uint8) for _ in range(2)]
    for number, out in enumerate(ends):
        fill(out, name="big.weight", shape=shape, dtype=torch.bfloat16, seed=0, start=(number + 1) * row - 1000)
    assert np.array_equal(*ends)
    assert values(ends[0], torch.bfloat16).std() > 0


def test_rows_of_a_large_matrix_differ() -> None:
    """A block of a power of two elements would repeat row r at row r + 4096 of an 8192-wide embedding."""
    rows = [np.empty(8192 * 2, np.uint8) for _ in range(2)]
    for row, out in zip((5, 5 + 4096), rows, strict=True):
        fill(out, name="embed.weight", shape=(128256, 8192), dtype=torch.bfloat16, seed=0, start=row * 8192 * 2)
    assert not np.array_equal(*rows)


def test_name_and_seed_make_different_tensors() -> None:
    first = tensor_bytes()
    assert np.array_equal(first, tensor_bytes())
    assert not np.array_equal(first, tensor_bytes(name="b.weight"))
    assert not np.array_equal(first, tensor_bytes(seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_normal_with_the_usual_deviation(dtype: torch.dtype) -> None:
    drawn = values(tensor_bytes(shape=(500, 400), dtype=dtype), dtype)
    assert drawn.isfinite().all()
    assert abs(drawn.mean()) < 0.001
    assert STANDARD_DEVIATION * 0.95 < drawn.std() < STANDARD_DEVIATION * 1.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_one_and_biases_zero(dtype: torch.dtype) -> None:
    assert (values(tensor_bytes("model.norm.weight", (32,), dtype), dtype) == 1).all()
    assert (values(tensor_bytes("q_proj.bias", (32,), dtype), dtype) == 0).all()


def test_threads_fill_the_same_bytes() -> None:
    def one(seed: int) -> bytes:
        return tensor_bytes(seed=seed).tobytes()

    seeds = [2, 3] * 2  # two seeds fight over the one block that is kept
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(one, seeds))
    assert drawn[0::2] == [drawn[0]] * 2
    assert drawn[1::2] == [drawn[1]] * 2
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("out", "start", "dtype", "message"),
    [
        (np.empty(8, np.uint8), 4000 - 7, torch.bfloat16, "outside its 4000 bytes"),
        (np.empty(8, np.uint8), -1, torch.bfloat16, "outside its 4000 bytes"),
        (np.empty(8, np.uint8), 0, torch.int8, "cannot fill torch.int8"),
        (np.empty(8, np.uint16), 0, torch.bfloat16, "contiguous one-dimensional uint8"),
        (np.empty(8, np.uint8)[::2], 0, torch.bfloat16, "contiguous one-dimensional uint8"),
    ],
)
def test_what_cannot_be_filled_is_refused(out: np.ndarray, start: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(out, name="a.weight", shape=(40, 50), dtype=dtype, seed=0, start=start)
