"""Inputs of a product that the host computes go from the device to the host, and its outputs back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from djinn.errors import UnavailableError


class Exchange(Protocol):
    """What brings them there. All tensors are bfloat16."""

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``inputs`` ([tokens, columns]) once they are in host memory, contiguous there; until the next call."""
        ...

    def room(self, tokens: int, rows: Sequence[int]) -> list[torch.Tensor]:
        """Return host memory for outputs, [tokens, each of ``rows``]; until the next call."""
        ...

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return ``outputs``, which fill the latest room, on the device, for compute that follows."""
        ...


class CpuExchange:
    """The device is the host: nothing has to go anywhere."""

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.contiguous()

    def room(self, tokens: int, rows: Sequence[int]) -> list[torch.Tensor]:
        return [torch.empty(tokens, each, dtype=torch.bfloat16) for each in rows]

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(outputs)


class CudaExchange:
    """Both on the stream that the caller computes on, through page-locked memory that is used again each time.

    Only :meth:`to_host` waits. Outputs would wait behind the copies of prefetching, so a kernel reads them.
    """

    def __init__(self, device: torch.device) -> None:
        """Compile the kernel.

        Raises:
            UnavailableError: Triton is not installed.
        """
        try:
            from djinn.transport.past_copies import WORD_BYTES, reader_of_host_memory
        except ImportError as error:
            raise UnavailableError(
                f"the host's cores compute beside {device} only with Triton ({error}); install it, or load without them"
            ) from error
        self._device = device
        self._read = reader_of_host_memory(device)
        self._word = WORD_BYTES // torch.bfloat16.itemsize
        self._inputs = self._outputs = torch.empty(0, dtype=torch.bfloat16)
        self._arrived = torch.cuda.Event()
        self._left = torch.cuda.Event()

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        host = self.send(inputs)
        self._arrived.record(torch.cuda.current_stream(self._device))
        self._arrived.synchronize()
        return host

    def send(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`to_host` does, before they are there."""
        if inputs.numel() > self._inputs.numel():
            self._inputs = _page_locked(inputs.numel())
        host = self._inputs[: inputs.numel()].view(inputs.shape)
        host.copy_(inputs, non_blocking=True)
        return host

    def room(self, tokens: int, rows: Sequence[int]) -> list[torch.Tensor]:
        self._left.synchronize()  # the last outputs may still be on their way
        sizes = [tokens * each for each in rows]
        if sum(sizes) > self._outputs.numel():
            self._outputs = _page_locked(self._whole_words(sum(sizes)))
        return [part.view(tokens, -1) for part in self._outputs[: sum(sizes)].split(sizes)]

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [output.numel() for output in outputs]
        there = torch.empty(self._whole_words(sum(sizes)), dtype=torch.bfloat16, device=self._device)
        self._read(self._outputs[: len(there)], there)
        self._left.record(torch.cuda.current_stream(self._device))
        parts = there[: sum(sizes)].split(sizes)
        return [part.view(output.shape) for part, output in zip(parts, outputs, strict=True)]

    def _whole_words(self, elements: int) -> int:
        return -(-elements // self._word) * self._word


def exchange_with(device: torch.device) -> Exchange:
    """Return what brings tensors to the host and back to ``device``.

    Raises:
        UnavailableError: a GPU without Triton.
    """
    return CudaExchange(device) if device.type == "cuda" else CpuExchange()


def _page_locked(elements: int) -> torch.Tensor:
    with torch.inference_mode(False):  # else only passes in inference mode could write it from now on
        return torch.empty(elements, dtype=torch.bfloat16, pin_memory=True)
