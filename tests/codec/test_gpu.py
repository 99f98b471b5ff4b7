"""The GPU's kernels in Triton's interpreter: the same bytes as the reference. It cannot see races; a GPU can."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from codec_cases import BATCHES, CASES, bits, of_exponents
from codec_interpreter import code, decode_batch

from djinn.codec import reference
from djinn.codec.layout import TILE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("name", [name for name in CASES if name != "every bit pattern"])
def test_the_kernels_are_the_reference(interpreter: ProcessPoolExecutor, name: str) -> None:
    check(interpreter, CASES[name])


def test_a_plane_word_of_escapes_only(interpreter: ProcessPoolExecutor) -> None:
    """The decoder's longest loop: the first 2048 weights have rare exponents, the others seven."""
    exponents = torch.cat([50 + torch.arange(TILE // 2) % 200, torch.arange(TILE // 2) % 7])
    at_word_0 = (torch.arange(32) % 4 % 2 * (TILE // 2)) + 256 * (torch.arange(32) // 4) + torch.arange(32) % 4 // 2
    exponents[at_word_0] = 20 + torch.arange(32)
    check(interpreter, of_exponents(exponents))


@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_for_many_blobs_restores_every_bit(interpreter: ProcessPoolExecutor, name: str) -> None:
    batch = BATCHES[name]()
    elements = batch[0].layout.elements
    arrays = {id(one.blob): one.blob.numpy() for one in batch}  # a blob that comes again is at the same address there
    decoded = interpreter.submit(decode_batch, [arrays[id(one.blob)] for one in batch], elements).result()
    assert torch.equal(torch.from_numpy(decoded[:-1]), torch.stack([bits(one.weights) for one in batch]))
    assert set(decoded[-1]) == {0x5A5A}


def check(interpreter: ProcessPoolExecutor, weights: torch.Tensor) -> None:
    blob, decoded = interpreter.submit(code, bits(weights).numpy()).result()
    expected, layout = reference.encode(weights)
    assert torch.equal(torch.from_numpy(blob), expected)
    assert torch.equal(torch.from_numpy(decoded)[: layout.elements], bits(weights))
