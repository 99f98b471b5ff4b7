"""Runs the kernels in Triton's interpreter; in a process of its own, since Triton reads TRITON_INTERPRET on import."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray


def code(weights: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Return the blob that the kernels write, and the whole tiles that they decode from it."""
    from djinn.codec import backends, gpu
    from djinn.codec.encode import encode
    from djinn.codec.layout import sections

    backends.cpu = gpu  # type: ignore[misc]
    coded = encode(torch.from_numpy(weights).view(torch.bfloat16), min_gain=-math.inf)
    assert coded is not None
    blob, layout = coded
    out = torch.full((layout.decoded_bytes,), 0xA5, dtype=torch.uint8)
    gpu._decode[(layout.tiles,)](*gpu.decode_arguments(sections(blob, layout), out))
    return blob.numpy(), out.view(torch.int16).numpy()


def decode_batch(blobs: list[NDArray[np.uint8]], elements: int) -> NDArray[np.int16]:
    """Return the rows that the kernel for many blobs decodes, and a row behind them that it has to leave alone."""
    from djinn.codec import gpu
    from djinn.codec.layout import TILE

    out = torch.full((len(blobs) + 1, elements), 0x5A5A, dtype=torch.int16)
    table = torch.tensor([blob.ctypes.data for blob in blobs])
    grid = (elements // TILE, len(blobs))
    gpu._decode_batch[grid](table, out.view(torch.uint32), *gpu.section_starts(elements))
    return out.numpy()
