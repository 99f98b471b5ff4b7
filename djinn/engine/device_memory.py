"""A GPU's memory beside the weights: held in one piece for passes, and explained when it runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from djinn.planning.workspace import CUDA_CONTEXT_BYTES, SMALL_TENSORS_BYTES

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def hold_workspace(workspace_bytes: int, device: torch.device) -> None:
    """Have torch's allocator hold a GPU's workspace as one free piece, from which passes then cut their tensors.

    Left to itself it takes memory from the driver in pieces of whatever size is asked for first; a KV cache that grows
    lies scattered over them, and passes need up to 1.4 times what their tensors come to. The piece serves passes on the
    stream that is current now; it is gone once someone calls ``torch.cuda.empty_cache()`` or memory runs out, and what
    is allocated outside of passes, another model too, may be cut from it. Where torch is told not to split what is
    large, or the memory is not there, passes get theirs as torch gives it.
    """
    if not any("max_split_size_mb" in os.environ.get(name, "") for name in _ALLOCATOR_SETTINGS):
        with suppress(torch.OutOfMemoryError):
            torch.empty(held_bytes(workspace_bytes), dtype=torch.uint8, device=device)


def held_bytes(workspace_bytes: int) -> int:
    """Return how much of a GPU's workspace is held in one piece: all that is not the context's or small tensors'."""
    return max(workspace_bytes - CUDA_CONTEXT_BYTES - SMALL_TENSORS_BYTES, 0)


def shortage_hook(kept_for: str) -> Callable[..., None]:
    """Return a forward hook, to be called always, that says on an out-of-memory error what memory was kept for."""

    def explain(*_: object) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note(
                f"djinn kept device memory for {kept_for}: load the model with what you need, or ask for less; it can "
                "still be used"
            )

    return explain
