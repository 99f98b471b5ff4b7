"""Inputs of a product that the host computes go from the device to the host, and its outputs back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch


class Exchange(Protocol):
    """What brings them there."""

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``inputs`` (bfloat16, [tokens, columns]) in host memory, once they are there; valid until the next."""
        ...

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return ``outputs`` (bfloat16, [tokens, rows] each) on the device, for compute that follows."""
        ...


class CpuExchange:
    """The device is the host: nothing has to go anywhere."""

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(outputs)


class CudaExchange:
    """Small copies on the stream that the caller computes on, through page-locked memory that is used again each time.

    Only for inputs the host waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs = _page_locked(0)
        self._outputs = _page_locked(0)
        self._arrived = torch.cuda.Event()
        self._left = torch.cuda.Event()

    def to_host(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() > self._inputs.numel():
            self._inputs = _page_locked(inputs.numel())
        host = self._inputs[: inputs.numel()].view(inputs.shape)
        host.copy_(inputs, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(self._device))
        self._arrived.synchronize()
        return host

    def to_device(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._left.synchronize()  # the last outputs, which another stream may have taken
        sizes = [math.prod(output.shape) for output in outputs]
        if sum(sizes) > self._outputs.numel():
            self._outputs = _page_locked(sum(sizes))
        parts = self._outputs[: sum(sizes)].split(sizes)
        for part, output in zip(parts, outputs, strict=True):
            part.copy_(output.view(-1))
        there = self._outputs[: sum(sizes)].to(self._device, non_blocking=True)
        self._left.record(torch.cuda.current_stream(self._device))
        return [part.view(output.shape) for part, output in zip(there.split(sizes), outputs, strict=True)]


def _page_locked(elements: int) -> torch.Tensor:
    return torch.empty(elements, dtype=torch.bfloat16, pin_memory=True)
