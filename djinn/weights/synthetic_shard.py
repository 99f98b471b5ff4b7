"""Shards: how synthetic tensors are laid out in safetensors files, and how one file is written at disk speed.

The header is padded with spaces so that the first tensor starts on a page, where direct reads can begin.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from djinn.weights import synthetic_values

PAGE_BYTES = 4096
BLOCK_BYTES = 16 * 2**20
"""One write, and the stretch of a file that one digest covers."""
MOST_SHARD_BYTES = 5 * 10**9
WRITERS = 2

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Shard:
    """One safetensors file of synthetic tensors, not yet written."""

    file: str
    header: bytes
    dtype: torch.dtype
    tensors: Mapping[str, tuple[int, ...]]
    """Shape by name, in file order."""
    starts: tuple[int, ...]
    """Byte of the file at which each tensor begins, and at last the size of the file."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.starts[-1]

    def fill(self, out: np.ndarray, start: int, seed: int) -> None:
        """Write bytes ``[start, start + len(out))`` of the file into ``out`` (uint8, one-dimensional)."""
        end = start + len(out)
        head = np.frombuffer(self.header[start:end], np.uint8)
        out[: len(head)] = head
        first = max(bisect_right(self.starts, start) - 1, 0)
        extents = zip(self.tensors.items(), pairwise(self.starts), strict=True)
        for (name, shape), (begin, stop) in islice(extents, first, None):
            if begin >= end:
                break
            low, high = max(begin, start), min(stop, end)
            synthetic_values.fill(
                out[low - start : high - start],
                name=name,
                shape=shape,
                dtype=self.dtype,
                seed=seed,
                start=low - begin,
            )


def lay_out(tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[Shard]:
    """Divide ``tensors`` (shape by name) over shards, keeping their order.

    A shard takes tensors up to 5 GB, or up to half of a model smaller than 10 GB, so that there are always several
    and reading many files is exercised by the smallest model too. One tensor is never divided.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors.items()}
    limit = min(MOST_SHARD_BYTES, sum(sizes.values()) // 2)
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [
        _shard(f"model-{k:05}-of-{len(groups):05}.safetensors", {name: tensors[name] for name in group}, dtype)
        for k, group in enumerate(groups, start=1)
    ]


def _shard(file: str, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, shape in tensors.items():
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, dtype, tensors, tuple(len(header) + end for end in ends))


def write_shard(shard: Shard, path: Path, seed: int, on_written: Callable[[int], object]) -> list[int]:
    """Write ``shard`` to ``path`` and wait until the disk has it; return the CRC-32 of each block of the file.

    Blocks are made and written by two threads, past the page cache where the file system allows, and
    ``on_written(bytes)`` is called from the calling thread after each. An exception leaves a partial file.
    """
    buffers: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(WRITERS):
        buffers.put(np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8))  # direct writes need page alignment

    def write_block(start: int) -> tuple[int, int]:
        buffer = buffers.get()
        try:
            out = buffer[: min(BLOCK_BYTES, shard.size - start)]
            shard.fill(out, start, seed)
            # Direct writes come in whole pages; the truncation below cuts what the last one adds.
            padded = buffer[: -(-len(out) // PAGE_BYTES) * PAGE_BYTES]
            done = 0
            while done < len(padded):
                done += os.pwrite(file, padded.data[done:], start + done)
            return zlib.crc32(out.data), len(out)
        finally:
            buffers.put(buffer)

    digests = []
    file = _open_for_writing(path)
    try:
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="djinn-write") as pool:
            for digest, nbytes in pool.map(write_block, range(0, shard.size, BLOCK_BYTES)):
                digests.append(digest)
                on_written(nbytes)
        os.ftruncate(file, shard.size)
        os.fsync(file)
    finally:
        os.close(file)
    return digests


def _open_for_writing(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # not every file system has direct I/O; a real problem comes back from the second try
        return os.open(path, flags, 0o644)
