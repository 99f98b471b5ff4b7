"""Residents: units that are put into one block of device memory when the model is loaded, and stay there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from djinn.transport.arena import PinnedMemory
from djinn.transport.reader import Filler, allocate, settle
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit


def load_residents(units: Sequence[Unit], filler: Filler, device: torch.device) -> dict[str, torch.Tensor]:
    """Return each unit's image (uint8, ``unit.image_bytes``) on ``device``, read in parallel.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    ends = list(itertools.accumulate((unit.image_bytes for unit in units), initial=0))
    starts = dict(zip((unit.name for unit in units), ends, strict=False))
    if device.type == "cpu":
        host = allocate(ends[-1])
        futures: list[Future[int]] = []
        for unit in units:
            futures += filler.fill(unit, host[starts[unit.name] : starts[unit.name] + unit.image_bytes])
        settle(futures)
        block = torch.from_numpy(host)
    else:
        block = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        _copy_over(units, block, starts, filler)
    return {unit.name: block[starts[unit.name] : starts[unit.name] + unit.image_bytes] for unit in units}


def _copy_over(units: Sequence[Unit], block: torch.Tensor, starts: dict[str, int], filler: Filler) -> None:
    """Fill ``block`` through two page-locked buffers, so that one is read while the other is copied."""
    largest = max((unit.image_bytes for unit in units), default=0)
    memory = PinnedMemory(2 * largest)
    memory.buffer[::PAGE] = 0
    memory.pin()
    copied = [torch.cuda.Event(), torch.cuda.Event()]
    try:
        for number, unit in enumerate(units):
            side = number % 2
            copied[side].synchronize()
            host = memory.buffer[side * largest : side * largest + unit.image_bytes]
            settle(filler.fill(unit, host))
            block[starts[unit.name] : starts[unit.name] + unit.image_bytes].copy_(
                torch.from_numpy(host), non_blocking=True
            )
            copied[side].record(torch.cuda.current_stream(block.device))
        torch.cuda.synchronize(block.device)
    finally:
        memory.close()
