"""The C library's heap: what is freed there goes back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
"""As in glibc's ``malloc.h``."""


def trim_heap() -> None:
    """Give memory that has been freed back to the system; glibc keeps blocks under 32 MiB in the middle of its heap."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Have the C library map memory of a MiB and more by itself, for the whole process, so that freeing it frees it.

    glibc stops doing so once a large block has been freed. A KV cache that grows between activations then leaves holes
    all over its heap: with prompts of a 7B model up to twice what its tensors come to. Passes are no slower for it.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
