"""A kernel that reads page-locked host memory: a small copy that does not wait behind large ones.

One engine of the GPU makes all copies to it, in the order in which they were issued, whatever their streams. A small
one waits behind everything that prefetching has issued: 18 ms behind a GiB of it on an H100. What a kernel reads of
host memory goes past them. Importing this needs Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from djinn.devices import gpu_index

WORD_BYTES = 8
_BLOCK_WORDS = 512
"""As in the kernel, which cannot read it."""


@functools.cache
def reader_of_host_memory(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a function that copies a page-locked tensor to one on ``device``, both contiguous, on its current stream.

    They begin at multiples of 16 bytes and have the same number of bytes, a multiple of ``WORD_BYTES``. The kernel is
    compiled and loaded here, and called with plain addresses: Triton's own call takes longer than what it starts.
    """
    index = gpu_index(device)
    with torch.cuda.device(index):
        kernel = _copy.warmup(torch.int64, torch.int64, _BLOCK_WORDS, grid=(1,))
        kernel[1, 1, 1]  # loads it here and now: loading may wait for the device

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        words = source.nbytes // WORD_BYTES
        stream = torch._C._cuda_getCurrentRawStream(index)
        with torch.cuda.device(index):  # in whose context it is launched
            kernel[-(-words // _BLOCK_WORDS), 1, 1](source.data_ptr(), target.data_ptr(), words, stream=stream)

    return copy


@triton.jit(do_not_specialize=["words"])
def _copy(source: tl.tensor, target: tl.tensor, words: tl.tensor) -> None:
    """Copy ``words`` of 8 bytes, 512 by each program."""
    word = tl.program_id(0) * 512 + tl.arange(0, 512)
    tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)
