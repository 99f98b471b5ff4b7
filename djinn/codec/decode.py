"""Decoding: exact bits into a buffer of whole tiles."""

from __future__ import annotations

import torch

from djinn.codec.backends import backend
from djinn.codec.layout import Layout, sections


class Decoder:
    """Decodes one blob at one address into one buffer, as often as it is called.

    Everything that does not change between calls is done at construction, compiling the kernel included. A call
    starts one kernel on the device's current stream and returns; on a CPU it returns when the bits are there. Both
    tensors are kept alive; every call reads the blob and writes the buffer anew.
    """

    def __init__(self, layout: Layout, blob: torch.Tensor, out: torch.Tensor) -> None:
        """``blob``: uint8 [layout.nbytes]. ``out``: bfloat16 or uint8, one-dimensional, layout.decoded_bytes bytes.

        Both are contiguous, on the same device, at addresses that are multiples of 16. Verify a blob that may be
        damaged before it is decoded: a kernel reads escapes from wherever the blob says.

        Raises:
            ValueError: tensors other than these.
            UnavailableError: a GPU without Triton.
        """
        if out.dtype not in (torch.bfloat16, torch.uint8) or out.nbytes != layout.decoded_bytes or out.dim() != 1:
            raise ValueError(
                f"the decoded weights need bfloat16 or uint8 of {layout.decoded_bytes} bytes in one dimension, "
                f"not {out.dtype} {list(out.shape)}"
            )
        if out.device != blob.device or not out.is_contiguous():
            raise ValueError(f"the decoded weights must be contiguous on {blob.device}, not on {out.device}")
        if blob.data_ptr() % 16 or out.data_ptr() % 16:
            raise ValueError("the blob and the decoded weights must be at addresses that are multiples of 16")
        self._tensors = blob, out
        self._run = backend(blob.device).decoder(sections(blob, layout), out.view(torch.uint8))

    def __call__(self) -> None:
        """Decode."""
        self._run()


def decode(blob: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Decode ``blob`` into ``out`` once; tensors and errors as for `Decoder`."""
    Decoder(layout, blob, out)()
