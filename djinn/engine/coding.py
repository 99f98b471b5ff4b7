"""Coded weights in the engine: which tensors are coded, how their images are made, and how they are decoded.

A packed checkpoint is coded already. The weights of any other are coded while they are loaded, tensor by tensor, on the
device that will compute with them; sizes have to be known before anything is placed, so they are measured first, and
both passes give the same blobs. A coded unit is decoded into scratch that all coded units share, just before it is
read: compute runs in order, so the next unit's decoding comes after the last one's use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from djinn.codec.checksums import verify
from djinn.codec.decode import Decoder, decode
from djinn.codec.encode import encode, layout_of
from djinn.codec.layout import Layout
from djinn.devices import cpus_near
from djinn.errors import PlanError
from djinn.transport.arena import PinnedMemory
from djinn.transport.reader import THREADS, Buffer, Piece, Reader, allocate, settle
from djinn.weights.tensors import PAGE, Converted, Decoded, Encoded, FileSpan, Sliced, Stacked, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

_SAMPLE_BYTES = 2**20
"""Of a tensor, from which its size when coded is estimated."""


class Coder:
    """Makes images of units: of raw and packed tensors as :class:`Reader` does, of others by coding or decoding.

    Holds two page-locked buffers of the largest tensor that it codes or decodes: one on the way to the device, and one
    on the way back, from which threads copy on while the next tensor is made. A third one is for what is cut out of a
    tensor. What is packed is verified.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        self._staging = PinnedMemory(0)
        self._cut = PinnedMemory(0)
        self._made = PinnedMemory(0)
        self._landing: list[Future[int]] = []

    @classmethod
    def on(cls, device: torch.device, chunk_bytes: int, undo: ExitStack) -> Coder:
        """Return a coder with a reader of its own, on the processors next to a GPU; ``undo`` closes both."""
        reader = Reader(chunk_bytes, cpus=cpus_near(device))
        undo.callback(reader.close)
        coder = cls(reader, device)
        undo.callback(coder.close)
        return coder

    def layout(self, entry: TensorEntry) -> Layout | None:
        """Return the layout of a raw tensor's blob, None where raw is better; reads all of it.

        Raises:
            CheckpointError: a file that cannot be read.
            UnavailableError: a GPU without Triton.
        """
        return layout_of(self._weights(entry, f"of shape {list(entry.shape)}"))

    def estimate(self, entry: TensorEntry) -> Layout | None:
        """Return about what :meth:`layout` would, from the tensor's first MiB."""
        stored = entry
        while isinstance(stored.source, Converted | Sliced):
            stored = stored.source.stored if isinstance(stored.source, Converted) else stored.source.whole
        stored = stored.parts[0]
        elements = entry.raw_bytes // entry.dtype.itemsize
        if isinstance(stored.source, Decoded):
            found = stored.source.coded.layout
            assert found is not None
            return Layout(elements, found.escapes * elements // found.elements)
        nbytes = min(_SAMPLE_BYTES, stored.nbytes)
        sample = allocate(nbytes)
        self.reader.read(Piece("", stored, 0, nbytes, 0), sample)
        found = layout_of(torch.from_numpy(sample).view(stored.dtype).to(entry.dtype))
        if found is None:
            return None
        return Layout(elements, found.escapes * elements // found.elements)

    def fill(self, unit: Unit, image: Buffer) -> list[Future[int]]:
        """Start filling ``image`` (uint8, ``unit.image_bytes``, page-aligned); return futures of bytes.

        Their errors are CheckpointError: a file that cannot be read, or a tensor that changed since it was packed.
        """
        done: list[Future[int]] = []
        if unit.experts:
            for expert, start in zip(unit.experts, unit.expert_offsets, strict=True):
                done += self.fill(expert, image[start : start + expert.image_bytes])
            return done
        for tensor in unit.stored:
            name = f"{tensor.name} of {unit.name}" if unit.is_expert else tensor.name
            if isinstance(tensor.entry.source, Encoded | Decoded | Converted | Sliced):
                self._make(name, tensor.entry, image[tensor.offset : tensor.offset + tensor.entry.nbytes])
                done += self._landing
                continue
            pieces = self.reader.fill(replace(unit, tensors=(tensor,)), image)
            done += pieces
            if tensor.entry.crc32 is not None:
                # The threads take what they are given in order, so none waits for a piece that none has taken.
                done.append(self.reader.pool.submit(_verified, name, tensor, image, pieces))
        return done

    def check(self, units: Iterable[Unit]) -> None:
        """Read units that will be read from disk in every pass, and verify them once.

        Raises:
            CheckpointError: as for :meth:`fill`.
        """
        for unit in units:
            if any(tensor.entry.crc32 is not None for part in unit.experts or (unit,) for tensor in part.stored):
                settle(self.fill(unit, allocate(unit.image_bytes)))

    def close(self) -> None:
        """Give the buffers back, and the device memory that was worked in, if any was."""
        wait(self._landing)
        if self.device.type == "cuda" and self._staging.buffer.nbytes:
            torch.cuda.empty_cache()
        for memory in (self._staging, self._cut, self._made):
            memory.close()

    def _make(self, name: str, entry: TensorEntry, target: Buffer) -> None:
        """Code, decode or convert a tensor on the device, and start copying the bytes that it becomes to ``target``."""
        made = self._weights(entry.raw, name).reshape(-1).view(torch.uint8)
        if entry.layout is not None:
            coded = encode(made.view(entry.dtype))
            assert coded is not None, "the same weights gained when they were measured"
            made = coded[0]
        wait(self._landing)  # they read the buffer that is written next
        self._made = self._at_least(target.nbytes, self._made)
        host = self._made.buffer[: target.nbytes]
        torch.from_numpy(host).copy_(made)
        step = self.reader.chunk_bytes

        def land(start: int) -> int:
            np.copyto(target[start : start + step], host[start : start + step])
            return target[start : start + step].nbytes

        self._landing = [self.reader.pool.submit(land, start) for start in range(0, target.nbytes, step)]

    def _weights(self, entry: TensorEntry, name: str) -> torch.Tensor:
        """Return a raw tensor on the device; valid until the next call."""
        if isinstance(entry.source, Converted):
            return self._weights(entry.source.stored.raw, name).to(entry.dtype)
        if isinstance(entry.source, Sliced):
            source, whole = entry.source, entry.source.whole.raw
            if isinstance(whole.source, Decoded | Converted | Stacked):
                held = self._weights(whole, name)
                return torch.cat([held.narrow(source.dim, a, b - a) for a, b in source.kept], source.dim)
            # Cut on the host: a whole matrix need not go to a device that has a part of it.
            return self._part(entry, self._read(whole, name).view(whole.dtype).view(whole.shape)).to(self.device)
        if isinstance(entry.source, Stacked):
            made = torch.empty(entry.raw_bytes, dtype=torch.uint8, device=self.device)
            rooms = made.split([part.raw_bytes for part in entry.parts])
            for (called, part), room in zip(entry.parts_of(name), rooms, strict=True):
                room.copy_(self._weights(part, called).reshape(-1).view(torch.uint8))
            return made.view(entry.dtype).view(entry.shape)
        if not isinstance(entry.source, Decoded):
            return self._stored(entry, name).view(entry.dtype).view(entry.shape)
        packed = entry.source.coded
        assert packed.layout is not None
        weights = torch.empty(packed.layout.decoded_bytes, dtype=torch.uint8, device=self.device)
        decode(self._stored(packed, name), packed.layout, weights)
        return weights[: entry.raw_bytes].view(entry.dtype).view(entry.shape)

    def _part(self, entry: TensorEntry, whole: torch.Tensor) -> torch.Tensor:
        """Return what ``entry`` keeps of a tensor on the host; threads copy it, which are more than torch's own."""
        source = entry.source
        assert isinstance(source, Sliced)
        self._cut = self._at_least(entry.raw_bytes, self._cut)
        part = torch.from_numpy(self._cut.buffer[: entry.raw_bytes]).view(entry.dtype).view(entry.shape)
        sizes = [end - begin for begin, end in source.kept]
        copies: list[Future[torch.Tensor]] = []
        for (begin, _), size, target in zip(source.kept, sizes, part.split(sizes, source.dim), strict=True):
            kept = whole.narrow(source.dim, begin, size)
            rows = max(1, -(-len(kept) // THREADS))
            copies += map(self.reader.pool.submit, (each.copy_ for each in target.split(rows)), kept.split(rows))
        for copy in copies:
            copy.result()
        return part

    def _stored(self, entry: TensorEntry, name: str) -> torch.Tensor:
        """Return the bytes (uint8, on the device) of a tensor as it is stored; valid until the next call."""
        return self._read(entry, name).to(self.device)

    def _read(self, entry: TensorEntry, name: str) -> torch.Tensor:
        """Return them on the host."""
        unit = Unit("", (), (PlacedTensor(name, entry, 0),))
        self._staging = self._at_least(unit.image_bytes + PAGE, self._staging)
        settle(self.fill(unit, self._staging.buffer))
        return torch.from_numpy(self._staging.buffer[: entry.nbytes])

    def _at_least(self, nbytes: int, memory: PinnedMemory) -> PinnedMemory:
        """Return ``memory``, or a larger one in its place that has ``nbytes``."""
        if memory.buffer.nbytes >= nbytes:
            return memory
        memory.close()
        memory = PinnedMemory(nbytes)
        memory.buffer[::PAGE] = 0
        if self.device.type == "cuda":
            memory.pin()
        return memory


def _verified(name: str, tensor: PlacedTensor, image: Buffer, pieces: Sequence[Future[int]]) -> int:
    """Verify a packed tensor once its ``pieces`` have come; return 0, since they have counted its bytes."""
    for piece in pieces:
        piece.result()
    entry = tensor.entry
    assert entry.crc32 is not None
    assert isinstance(entry.source, FileSpan)
    stored = torch.from_numpy(image[tensor.offset : tensor.offset + entry.nbytes])
    verify(stored, entry.layout, entry.crc32, f"{entry.source.path}: tensor {name}")
    return 0


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

    def is_used_by(self, unit: str) -> bool:
        """Return whether ``unit`` is being read."""
        return self._depth > 0 and self._user == unit

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
