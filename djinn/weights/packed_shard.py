"""One safetensors file into its packed form and back.

Tensors are coded on threads, a few at a time, and written in order, so that memory holds a few tensors only.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from djinn.codec.checksums import checksums, verify
from djinn.codec.decode import decode
from djinn.codec.encode import encode
from djinn.codec.layout import ALIGNMENT, TILE_BYTES
from djinn.errors import CheckpointError
from djinn.hardware import allowed_cpus, usable_ram
from djinn.weights.header import Header, read_header
from djinn.weights.packed_format import Stored, compose, described, original_of, reserve
from djinn.weights.tensors import Decoded, FileSpan, Stacked, TensorEntry

Item = TypeVar("Item")
Result = TypeVar("Result")

_TIMES_A_TENSOR = 6
"""Memory that coding a tensor takes on a CPU, as a multiple of its bytes."""


def pack_shard(
    source: Path,
    target: Path,
    on_done: Callable[[int], object],
    device: torch.device,
    experts: Mapping[str, int],
) -> None:
    """Write the packed form of ``source`` to ``target``; ``on_done`` hears of raw bytes as they are written.

    ``experts`` says of the tensors that hold several experts' weights how many each has. An exception leaves a partial
    file.

    Raises:
        CheckpointError: a damaged file, or one with bytes that belong to no tensor.
    """
    original = read_header(source)
    _require_no_gaps(original)
    write_packed(original, lambda name: read_tensor(original.tensors[name]), target, on_done, device, experts)


def write_packed(
    original: Header,
    read: Callable[[str], torch.Tensor],
    target: Path,
    on_done: Callable[[int], object],
    device: torch.device,
    experts: Mapping[str, int],
) -> None:
    """Write the packed form of a file with this header; ``read`` gives a tensor's bytes (uint8, on the host).

    Otherwise as :func:`pack_shard`.
    """
    tensors, experts = original.tensors, stacks_of(original, experts)
    reserved = reserve(original, experts)
    stored: dict[str, list[Stored]] = {}

    def coded(name: str) -> tuple[str, list[torch.Tensor], list[Stored]] | None:
        blobs, parts = [], []
        for weights in read(name).view(tensors[name].dtype).chunk(experts.get(name, 1)):
            made = encode(weights.to(device))
            if made is None:
                return None
            blob, layout = made[0].cpu(), made[1]
            blobs.append(blob)
            parts.append(Stored(layout, checksums(blob, layout)))
        return name, blobs, parts

    with _whole_file(target) as file:
        file.seek(reserved)
        candidates = [name for name, entry in original.tensors.items() if is_candidate(entry, experts.get(name, 1))]
        for result in _in_order(candidates, coded, _workers(original, device)):
            if result is not None:
                name, blobs, stored[name] = result
                for blob in blobs:
                    file.write(blob.numpy().data)
                    file.write(bytes(-len(blob) % ALIGNMENT))
                on_done(original.tensors[name].raw_bytes)
        for name, entry in original.tensors.items():
            if name not in stored:
                raw = read(name)
                stored[name] = [Stored(None, checksums(part, None)) for part in raw.chunk(experts.get(name, 1))]
                file.write(raw.numpy().data)
                on_done(entry.raw_bytes)
        file.seek(0)
        file.write(compose(original, stored, reserved))


def stacks_of(original: Header, experts: Mapping[str, int]) -> dict[str, int]:
    """Return those of ``experts`` whose tensors the file holds so: each of several files may have another shape."""
    tensors = original.tensors
    return {name: count for name, count in experts.items() if name in tensors and tensors[name].is_stack_of(count)}


def is_candidate(entry: TensorEntry, experts: int) -> bool:
    """Return whether a plain tensor that holds the weights of so many ``experts`` may be coded.

    Several are decoded together, so each has to be whole tiles.
    """
    if experts == 1:
        return entry.codable
    return entry.codable_with_others and entry.raw_bytes % (experts * TILE_BYTES) == 0


def unpack_shard(source: Path, target: Path, on_done: Callable[[int], object], device: torch.device) -> None:
    """Write the file that ``source`` was packed from to ``target``, byte for byte; otherwise as :func:`pack_shard`.

    Raises:
        CheckpointError: a damaged file; the tensor and its section are named.
    """
    original = original_of(read_header(source))
    with _whole_file(target) as file:
        file.write(original.lead)
        file.truncate(original.end)
        for name, weights in unpacked(source, device):
            file.seek(original.offset(name))
            file.write(weights.numpy().data)
            on_done(len(weights))


def unpacked(source: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the original bytes (uint8, on the host) of every tensor of a packed file.

    Raises:
        CheckpointError: a damaged file; the tensor and its section are named.
    """
    header = read_header(source)
    entries = described(header)

    def raw(name: str) -> tuple[str, torch.Tensor]:
        return name, original_bytes(name, entries[name], device)

    yield from _in_order(entries, raw, _workers(header, device))


def original_bytes(name: str, entry: TensorEntry, device: torch.device) -> torch.Tensor:
    """Return the bytes (uint8, on the host) that a stored tensor was packed from; its own where it is not packed.

    Raises:
        CheckpointError: a damaged file; the tensor, its expert and its section are named.
    """
    if isinstance(entry.source, Stacked):
        return torch.cat([original_bytes(called, part, device) for called, part in entry.parts_of(name)])
    if isinstance(entry.source, Decoded):
        return original_bytes(name, entry.source.coded, device)
    stored = read_tensor(entry)
    if entry.crc32 is None:
        return stored
    assert isinstance(entry.source, FileSpan)
    verify(stored, entry.layout, entry.crc32, f"{entry.source.path}: tensor {name}")
    if entry.layout is None:
        return stored
    room = torch.empty(entry.layout.decoded_bytes, dtype=torch.uint8, device=device)
    decode(stored.to(device), entry.layout, room)
    return room[: entry.raw_bytes].cpu()


def _require_no_gaps(header: Header) -> None:
    end = header.start
    for name, entry in header.tensors.items():
        if header.offset(name) != end:
            raise CheckpointError(
                f"{header.path}: {header.offset(name) - end} bytes before tensor {name} belong to none"
            )
        end += entry.raw_bytes
    if end != header.path.stat().st_size:
        raise CheckpointError(f"{header.path}: {header.path.stat().st_size - end} bytes after its tensors")


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor's bytes as they are stored (uint8, one-dimensional).

    Raises:
        CheckpointError: the file is shorter than its header said.
    """
    assert isinstance(entry.source, FileSpan)
    data = np.fromfile(entry.source.path, np.uint8, entry.nbytes, offset=entry.source.offset)
    if len(data) < entry.nbytes:
        raise CheckpointError(f"{entry.source.path}: has become shorter while it was read")
    return torch.from_numpy(data)


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, and wait at the end until the disk has it."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _workers(header: Header, device: torch.device) -> int:
    """Return how many tensors are coded at once: on a GPU one beside the one being read."""
    if device.type == "cuda":
        return 2
    largest = max((entry.raw_bytes for entry in header.tensors.values()), default=0)
    return max(1, min(len(allowed_cpus() or "1"), usable_ram() // (_TIMES_A_TENSOR * largest + 1)))


def _in_order(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[Result]:
    """Yield ``work`` of each item in order, at most ``workers`` of them begun and not yet taken."""
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, "djinn-pack") as pool:
        try:
            for item in items:
                if len(under_way) >= workers:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(work, item))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
