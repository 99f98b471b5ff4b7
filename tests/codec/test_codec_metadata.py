"""What is stored beside a blob: damage is found and named, what cannot be decoded is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from codec_cases import normal
from hypothesis import given
from hypothesis import strategies as st

from djinn.codec.encode import encode
from djinn.codec.layout import TILE
from djinn.codec.metadata import Metadata
from djinn.errors import CheckpointError

CODED = encode(normal(5 * TILE - 100).view(20, 1019))
assert CODED is not None
BLOB, LAYOUT = CODED
METADATA = Metadata.of(BLOB, LAYOUT, (20, 1019))


def stored() -> dict[str, Any]:
    return json.loads(json.dumps(METADATA.to_dict()))


def flipped(byte: int, bit: int) -> torch.Tensor:
    blob = BLOB.clone()
    blob[byte] ^= 1 << bit
    return blob


def test_json_and_back() -> None:
    metadata = Metadata.from_dict(stored(), "w")
    assert metadata == METADATA
    metadata.verify(BLOB, "w")


@pytest.mark.parametrize("section", LAYOUT.offsets)
def test_a_changed_section_is_named(section: str) -> None:
    byte = LAYOUT.offsets[section] + LAYOUT.section_bytes[section] - 1
    message = rf"^layers\.0\.w: section {section}, from byte {LAYOUT.offsets[section]}, changed"
    with pytest.raises(CheckpointError, match=message):
        METADATA.verify(flipped(byte, 5), "layers.0.w")


@given(st.integers(0, LAYOUT.nbytes - 1), st.integers(0, 7))
def test_any_flipped_bit_is_found(byte: int, bit: int) -> None:
    with pytest.raises(CheckpointError, match="changed since it was coded"):
        METADATA.verify(flipped(byte, bit), "w")


def test_another_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match=f"w: has {LAYOUT.nbytes - 1} coded bytes instead of {LAYOUT.nbytes}"):
        METADATA.verify(BLOB[:-1], "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "coded in version 2 and this djinn decodes version 1"),
        ({"version": None}, "coded in version None"),
        ({"dtype": "float16"}, "coded from 'float16'"),
        ({"shape": [20, 1018]}, r"shape \[20, 1018\] does not have its 20380 elements"),
        ({"escapes": 10**6}, "damaged .ValueError: no coded tensor has 20380 weights and 1000000 escapes"),
        ({"escapes": None}, "description is damaged"),
        ({"shape": 5}, "description is damaged"),
        ({"crc32": {"sm": "0"}}, r"description is damaged \(KeyError: 'planes'\)"),
        ({"crc32": dict.fromkeys(LAYOUT.offsets, "what")}, "description is damaged"),
    ],
)
def test_what_cannot_be_decoded_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Metadata.from_dict(stored() | change, "w")
