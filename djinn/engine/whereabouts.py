"""Where a layer's experts are, as the device knows it: tables in which numbers of experts are looked up at once.

An entry is written when its expert is fetched; that of one which has left the pool stays, and is never looked up. Rows
are uploaded from page-locked memory of their own, which is written again once what was uploaded before has been read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from djinn.engine.expert_tensors import ExpertTensor
from djinn.transport.compute_stream import ComputeStream


class Whereabouts:
    """Tables of one layer: of raw tensors an expert's slot, the same for all; of a coded one its parts' addresses."""

    def __init__(self, experts: int, tensors: Sequence[ExpertTensor]) -> None:
        self._tensors = {tensor.table: tensor for tensor in tensors}
        device = tensors[0].device
        self._host: dict[str, torch.Tensor] = {}
        self._there: dict[str, torch.Tensor] = {}
        for name, tensor in self._tensors.items():
            shape = (experts, tensor.parts) if tensor.coded else (experts,)
            self._host[name] = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._there[name] = self._host[name].to(device)
        self._numbers = {name: host.numpy() for name, host in self._host.items()}
        self._compute = ComputeStream(device) if device.type == "cuda" else None
        self._read = torch.cuda.Event() if device.type == "cuda" else None

    def note(self, places: Mapping[int, int]) -> None:
        """Enter the slots of some experts."""
        if self._read is not None:
            self._read.synchronize()  # long since, nearly always
        for name, tensor in self._tensors.items():
            numbers = self._numbers[name]
            for expert, slot in places.items():
                numbers[expert] = tensor.addresses(expert, slot) if tensor.coded else slot
            self._there[name].copy_(self._host[name], non_blocking=True)
        if self._read is not None and self._compute is not None:
            self._read.record(self._compute.stream())

    def look_up(self, tensor: ExpertTensor, key: torch.Tensor) -> torch.Tensor:
        """Return for each number of an expert in ``key`` its slot, or where its coded parts are."""
        return self._there[tensor.table][key]
