"""Decoding: exact bits into whole tiles, of one blob at one address or of many wherever they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from djinn.codec.backends import backend
from djinn.codec.layout import TILE, TILE_BYTES, Layout, check_blob, sections


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


class BatchDecoder:
    """Decodes several blobs of equally many weights, at addresses that change from call to call, in one kernel.

    The kernel is compiled and loaded at construction. A call copies the blobs' addresses to the device and starts the
    kernel, both on the device's current stream, and returns; on a CPU it returns when the bits are there. Calls may
    follow each other on any stream and as fast as the host makes them. They cannot be captured in a CUDA graph: a
    replay would copy the addresses from memory that has been given out again.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        """Prepare for blobs of ``elements`` weights, whole tiles, on ``device``.

        Raises:
            ValueError: weights that are not whole tiles.
            UnavailableError: a GPU without Triton.
        """
        if elements < 1 or elements % TILE:
            raise ValueError(
                f"blobs are decoded together if their weights are whole tiles, a multiple of {TILE}, not {elements}; "
                "decode these one by one"
            )
        self.elements = elements
        self.device = torch.empty(0, device=device).device  # with an index, as tensors have it
        self._row_bytes = elements // TILE * TILE_BYTES
        self._run = backend(self.device).batch_decoder(elements, self.device)
        self._at = backend(self.device).address_decoder(elements, self.device)

    def __call__(self, blobs: Sequence[tuple[torch.Tensor, Layout]], out: torch.Tensor) -> None:
        """Decode ``blobs``, each uint8 [layout.nbytes], into the rows of ``out``, bfloat16 or uint8 of any shape.

        All are contiguous, on the device, at addresses that are multiples of 16. A blob may come several times. As for
        any kernel, a tensor that another stream frees or writes has to wait for this one. Verify blobs that may be
        damaged before they are decoded: a kernel reads escapes from wherever a blob says.

        Raises:
            ValueError: tensors other than these.
        """
        nbytes = len(blobs) * self._row_bytes
        if out.dtype not in (torch.bfloat16, torch.uint8) or out.nbytes != nbytes:
            raise ValueError(
                f"{len(blobs)} blobs of {self.elements} weights need bfloat16 or uint8 of {nbytes} bytes, "
                f"not {out.dtype} of {out.nbytes}"
            )
        if out.device != self.device or not out.is_contiguous():
            raise ValueError(f"the decoded weights must be contiguous on {self.device}, not on {out.device}")
        if out.data_ptr() % 16:
            raise ValueError("the decoded weights must be at an address that is a multiple of 16")
        for number, (blob, layout) in enumerate(blobs):
            check_blob(blob, layout)
            if layout.elements != self.elements or blob.device != self.device or blob.data_ptr() % 16:
                raise ValueError(
                    f"blob {number} must have {self.elements} weights on {self.device} at a multiple of 16 bytes, not "
                    f"{layout.elements} weights on {blob.device} at {blob.data_ptr():#x}"
                )
        if blobs:
            self._run(blobs, out)

    def at(self, addresses: torch.Tensor, out: torch.Tensor) -> None:
        """Decode the blobs at ``addresses``, int64 [blobs] on the device, which the host does not know, into ``out``.

        Nothing is checked: they are blobs of these weights, at multiples of 16, and ``out`` is as for a call.
        """
        self._at(addresses, out)
