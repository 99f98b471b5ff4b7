"""Checksums: damage is found wherever it is, and its section named."""

from __future__ import annotations

import pytest
import torch
from codec_cases import normal
from hypothesis import given
from hypothesis import strategies as st

from djinn.codec.checksums import checksums, section_names, verify
from djinn.codec.encode import encode
from djinn.codec.layout import TILE
from djinn.errors import CheckpointError

CODED = encode(normal(5 * TILE - 100).view(20, 1019))
assert CODED is not None
BLOB, LAYOUT = CODED
SUMS = checksums(BLOB, LAYOUT)


def flipped(byte: int, bit: int) -> torch.Tensor:
    blob = BLOB.clone()
    blob[byte] ^= 1 << bit
    return blob


def test_what_is_whole_passes() -> None:
    verify(BLOB, LAYOUT, SUMS, "w")
    assert list(SUMS) == section_names(LAYOUT)


@pytest.mark.parametrize("section", LAYOUT.offsets)
def test_a_changed_section_is_named(section: str) -> None:
    byte = LAYOUT.offsets[section] + LAYOUT.section_bytes[section] - 1
    message = rf"^layers\.0\.w: section {section}, from byte {LAYOUT.offsets[section]} of the tensor, changed"
    with pytest.raises(CheckpointError, match=message):
        verify(flipped(byte, 5), LAYOUT, SUMS, "layers.0.w")


@given(st.integers(0, LAYOUT.nbytes - 1), st.integers(0, 7))
def test_any_flipped_bit_is_found(byte: int, bit: int) -> None:
    with pytest.raises(CheckpointError, match="changed since it was packed"):
        verify(flipped(byte, bit), LAYOUT, SUMS, "w")


def test_a_raw_tensor_is_one_section() -> None:
    raw = torch.arange(100, dtype=torch.uint8)
    sums = checksums(raw, None)
    assert list(sums) == section_names(None)
    verify(raw, None, sums, "w")
    with pytest.raises(CheckpointError, match="w: section weights, from byte 0"):
        verify(raw + 1, None, sums, "w")


def test_an_empty_tensor_has_a_checksum() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    verify(empty, None, checksums(empty, None), "w")
