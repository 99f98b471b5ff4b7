"""Offsets and sizes of coded tensors, the largest ones included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn.codec.layout import ALIGNMENT, TILE, Layout, sections


@given(st.integers(1, 2**36), st.floats(0, 1))
def test_sections_are_aligned_and_apart(elements: int, share: float) -> None:
    layout = Layout(elements, min(int(share * elements), 2**32 - 1))
    end = 0
    for name, nbytes in layout.section_bytes.items():
        offset = layout.offsets[name]
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + nbytes
    assert end == layout.nbytes
    assert layout.elements <= layout.tiles * TILE < layout.elements + TILE
    assert layout.decoded_bytes == 2 * TILE * layout.tiles


@given(st.integers(1, 2**36), st.floats(0, 1))
def test_sections_of_equally_many_weights_begin_at_the_same_bytes(elements: int, share: float) -> None:
    layout = Layout(elements, min(int(share * elements), 2**32 - 1))
    assert layout.offsets == Layout(elements, 0).offsets
    assert layout.offsets is layout.offsets, "asked for each of many blobs, for every token"


def test_a_tensor_of_more_than_2_to_the_31_weights() -> None:
    layout = Layout(128256 * 8192 * 4, 3 * 10**9)
    blob = torch.empty(layout.nbytes, dtype=torch.uint8, device="meta")
    parts = sections(blob, layout)
    assert parts.sm.shape == (1026048, TILE)
    assert parts.off.shape == (1026049,)
    assert parts.esc.shape == (3 * 10**9,)
    assert torch.tensor([3 * 10**9]).to(torch.int32).view(torch.uint32).item() == 3 * 10**9  # as in section off


@pytest.mark.parametrize(("elements", "escapes"), [(0, 0), (-1, 0), (5, 6), (5, -1), (2**34, 2**32)])
def test_numbers_that_cannot_be_are_refused(elements: int, escapes: int) -> None:
    with pytest.raises(ValueError, match=f"{elements} weights and {escapes} escapes"):
        Layout(elements, escapes)
