"""The stream that a caller computes on, found fast: hooks ask for it several times per layer."""

from __future__ import annotations

import torch

from djinn.devices import gpu_index


class ComputeStream:
    """The current stream of a device, one order of work even where threads compute on streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = gpu_index(device)
        self._known: dict[int, torch.cuda.Stream] = {}
        self._computing: torch.cuda.Stream | None = None

    def stream(self) -> torch.cuda.Stream:
        """Return the stream that the caller computes on; never asked for in a copy stream's context.

        ``torch.cuda.current_stream`` makes a new object each time, which takes longer than all else in a hook.
        """
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        if handle not in self._known:
            self._known[handle] = torch.cuda.current_stream(self._device)
        stream = self._known[handle]
        if stream is not self._computing:
            # A thread may compute on a stream of its own; one release stands for all before it only in one order.
            if self._computing is not None:
                stream.wait_stream(self._computing)
            self._computing = stream
        return stream
