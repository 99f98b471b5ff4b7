"""Coded weights in the engine: which tensors are coded, how their images are made, and how they are decoded.

Weights are coded while they are loaded, tensor by tensor, on the device that will compute with them. Sizes have to be
known before anything is placed, so they are measured first; both passes give the same blobs. A coded unit is decoded
into scratch that all coded units share, just before it is read: compute runs in order, so the next unit's decoding
comes after the last one's use.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import torch

from djinn.codec.decode import Decoder
from djinn.codec.encode import encode, layout_of
from djinn.engine.arena import PinnedMemory
from djinn.engine.reader import Buffer, Reader, settle
from djinn.errors import PlanError
from djinn.weights.index import Encoded, TensorEntry, WeightIndex
from djinn.weights.units import PAGE, PlacedTensor, Unit, find_units

LEAST_BYTES = 2**20
"""Smaller tensors stay raw: decoding one costs a kernel of its own and saves next to nothing."""


class Coder:
    """Makes images of units, raw ones as :class:`Reader` does, coded ones by coding what it reads.

    Holds one page-locked buffer of the largest raw tensor, as long as there is something to code.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self._reader = reader
        self._device = device
        self._staging = PinnedMemory(0)

    def index(self, index: WeightIndex) -> WeightIndex:
        """Return ``index`` with every tensor coded that gains by it and can be decoded just before it is read.

        Raises:
            CheckpointError: a file that cannot be read.
            UnavailableError: a GPU without Triton.
        """
        units = find_units(index)
        readers = [reader for unit in units for reader in unit.readers]
        tensors = dict(index.tensors)
        for unit in units:
            # Scratch holds one unit: what is read around or beside others has to lie elsewhere.
            if unit.held or any(readers.count(reader) > 1 for reader in unit.readers):
                continue
            for tensor in unit.tensors:
                tensors[tensor.name] = self._with_layout(tensor.entry)
        return replace(index, tensors=tensors)

    def fill(self, unit: Unit, image: Buffer) -> list[Future[int]]:
        """Start filling ``image`` (uint8, ``unit.image_bytes``, page-aligned); return futures of bytes."""
        if not unit.coded:
            return self._reader.fill(unit, image)
        done: list[Future[int]] = []
        host = torch.from_numpy(image)
        for tensor in unit.tensors:
            target = host[tensor.offset : tensor.offset + tensor.entry.nbytes]
            weights = self._weights(tensor.entry.raw)
            if tensor.entry.layout is None:
                target.copy_(weights.view(-1).view(torch.uint8))
            else:
                coded = encode(weights)
                assert coded is not None, "the same weights gained when they were measured"
                target.copy_(coded[0])
            future: Future[int] = Future()
            future.set_result(tensor.entry.nbytes)
            done.append(future)
        return done

    def close(self) -> None:
        """Give the buffer back, and the device memory that coding took."""
        self._staging.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _with_layout(self, entry: TensorEntry) -> TensorEntry:
        if entry.dtype != torch.bfloat16 or entry.nbytes < LEAST_BYTES or isinstance(entry.source, Encoded):
            return entry
        layout = layout_of(self._weights(entry))
        return entry if layout is None else replace(entry, source=Encoded(entry.source), layout=layout)

    def _weights(self, entry: TensorEntry) -> torch.Tensor:
        """Return a raw tensor on the device; valid until the next call."""
        unit = Unit("", (), (PlacedTensor("", entry, 0),))
        if self._staging.buffer.nbytes < unit.image_bytes + PAGE:
            self._staging.close()
            self._staging = PinnedMemory(unit.image_bytes + PAGE)
            self._staging.buffer[::PAGE] = 0
            if self._device.type == "cuda":
                self._staging.pin()
        settle(self._reader.fill(unit, self._staging.buffer))
        raw = torch.from_numpy(self._staging.buffer[: entry.nbytes])
        return raw.to(self._device).view(entry.dtype).view(entry.shape)


class Scratch:
    """Device memory that coded units are decoded into, and which of them is in it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._user = ""
        self._depth = 0

    def enter(self, unit: str) -> None:
        """Note that ``unit`` is read from now on.

        Raises:
            PlanError: another unit is still being read.
        """
        if self._depth > 0 and self._user != unit:
            raise PlanError(
                f"unit {unit} is read inside {self._user}, which the recorded pass did not do, and coded units share "
                "their scratch; load with coding none"
            )
        self._user = unit
        self._depth += 1

    def leave(self, unit: str) -> None:
        """Note that ``unit`` has been read; nothing to note where it never came in."""
        if unit == self._user:
            self._depth = max(self._depth - 1, 0)

    def clear(self) -> None:
        """Forget who reads: a pass that was interrupted has not said so."""
        self._depth = 0


def decoding(unit: Unit, image: torch.Tensor, scratch: Scratch) -> Callable[[], None]:
    """Return a function that brings ``unit`` from its ``image`` (uint8, on the device) into the scratch.

    On a GPU it starts kernels on the current stream and returns.
    """
    steps: list[Callable[[], object]] = []
    for tensor, target in zip(unit.tensors, unit.decoded, strict=True):
        stored = image[tensor.offset : tensor.offset + tensor.entry.nbytes]
        layout = tensor.entry.layout
        if layout is None:
            room = scratch.buffer[target.offset : target.offset + tensor.entry.nbytes]
            steps.append(lambda room=room, stored=stored: room.copy_(stored))  # type: ignore[misc]
        else:
            room = scratch.buffer[target.offset : target.offset + layout.decoded_bytes]
            steps.append(Decoder(layout, stored, room))

    def decode() -> None:
        for step in steps:
            step()

    return decode
