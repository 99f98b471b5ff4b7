"""Direct reads on real files: any alignment, any chunk, many threads; and files that break meanwhile."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from djinn.bench.rates.disk import read_rate
from djinn.errors import CheckpointError
from djinn.transport.reader import Reader, allocate, pieces, settle
from djinn.weights.shards import read_shard
from djinn.weights.tensors import PAGE, FileSpan, Seeded, Stacked, TensorEntry
from djinn.weights.units import Unit, lay_out

GUARD = 0xA5


def unit_of(tensors: dict[str, TensorEntry]) -> Unit:
    return Unit(name="u", readers=("u",), tensors=lay_out(list(tensors.items())))


def write_checkpoint(path: Path, sizes: list[int], first: int, gaps: list[int]) -> dict[str, TensorEntry]:
    """Write U8 tensors of random bytes whose data begins at about byte ``first``; return what its header says."""
    offsets, cursor = {}, 0
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        cursor += gap
        offsets[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [cursor, cursor + size]}
        cursor += size
    text = json.dumps(offsets).encode()
    text += b" " * max(first - 8 - len(text), 0)
    data = np.random.default_rng(cursor).integers(0, 256, cursor, dtype=np.uint8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())
    return read_shard(path)


def filled(unit: Unit, chunk_bytes: int, threads: int = 8) -> np.ndarray:
    image = allocate(unit.image_bytes + PAGE)
    image[unit.image_bytes :] = GUARD
    reader = Reader(chunk_bytes, threads)
    try:
        settle(reader.fill(unit, image[: unit.image_bytes]))
    finally:
        reader.close()
    assert (image[unit.image_bytes :] == GUARD).all(), "written beyond the image"
    return image


def check(unit: Unit, image: np.ndarray, path: Path) -> None:
    data = np.fromfile(path, np.uint8)
    for tensor in unit.tensors:
        source = tensor.entry.source
        assert isinstance(source, FileSpan)
        found = image[tensor.offset : tensor.offset + tensor.entry.nbytes]
        np.testing.assert_array_equal(found, data[source.offset : source.offset + tensor.entry.nbytes], tensor.name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(1, 5 * PAGE)), min_size=1, max_size=8),
    first=st.sampled_from([4096, 2048, 2304, 2056, 2049]),
    chunk_bytes=st.sampled_from([1, PAGE, 2 * PAGE, 3 * PAGE + 5, 2**20]),
    data=st.data(),
)
def test_every_alignment_gives_the_bytes_of_the_file(
    tmp_path: Path, sizes: list[int], first: int, chunk_bytes: int, data: st.DataObject
) -> None:
    gaps = data.draw(st.lists(st.sampled_from([0, 0, 1, 256, 511]), min_size=len(sizes), max_size=len(sizes)))
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, sizes, first, gaps))
    check(unit, filled(unit, chunk_bytes), path)


@given(
    sizes=st.lists(st.integers(1, 5 * PAGE), min_size=1, max_size=8),
    offsets=st.lists(st.integers(0, 10**6), min_size=8, max_size=8),
    aligned=st.lists(st.booleans(), min_size=8, max_size=8),
    chunk_pages=st.integers(1, 4),
)
def test_pieces_cover_each_tensor_once_and_share_no_page(
    sizes: list[int], offsets: list[int], aligned: list[bool], chunk_pages: int
) -> None:
    """No two threads write one page of the image, for a direct read writes whole pages."""
    entries = {
        f"t{number}": TensorEntry(
            torch.uint8,
            (size,),
            FileSpan(Path("f"), offsets[number] // 256 * 256 if aligned[number] else offsets[number]),
        )
        for number, size in enumerate(sizes)
    }
    unit = unit_of(entries)
    pages: set[int] = set()
    for tensor in unit.tensors:
        assert isinstance(tensor.entry.source, FileSpan)
        parts = [part for part in pieces(unit, chunk_pages * PAGE) if part.name == tensor.name]
        assert [part.start for part in parts] == [0, *np.cumsum([part.nbytes for part in parts])[:-1]]
        assert sum(part.nbytes for part in parts) == tensor.entry.nbytes
        assert all(0 < part.nbytes <= chunk_pages * PAGE for part in parts)
        assert tensor.offset % 256 == 0
        if tensor.entry.source.offset % 256 == 0:
            assert (tensor.offset - tensor.entry.source.offset) % PAGE == 0
            for part in parts:
                window = set(range(part.offset // PAGE, -(-(part.offset + part.nbytes) // PAGE)))
                assert not window & pages
                pages |= window
    ends = [tensor.offset + tensor.entry.nbytes for tensor in unit.tensors]
    assert all(end <= tensor.offset for end, tensor in zip(ends, unit.tensors[1:], strict=False))
    assert ends[-1] <= unit.image_bytes < ends[-1] + PAGE


def test_images_hold_what_safetensors_itself_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (700, 9), "c": (1,), "d": (64, 64), "e": (2, 3, 1001)}
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bfloat16)
    save_file(
        {
            name: torch.randint(-9, 9, shape, generator=generator).to(dtype)
            for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
        },
        path,
    )
    unit = unit_of(read_shard(path))
    image = filled(unit, PAGE)
    for tensor in unit.tensors:
        raw = torch.from_numpy(image)[tensor.offset : tensor.offset + tensor.entry.nbytes]
        assert torch.equal(raw.view(tensor.entry.dtype).view(tensor.entry.shape), load_file(path)[tensor.name])


def test_seeded_tensors_are_the_same_in_any_chunks() -> None:
    unit = unit_of({"a.weight": TensorEntry(torch.bfloat16, (300, 70), Seeded("a.weight", 3))})
    np.testing.assert_array_equal(filled(unit, PAGE), filled(unit, 2**20))


@pytest.mark.parametrize("first", [4096, 2049], ids=["direct", "through a buffer"])
@pytest.mark.parametrize("length", [0, 10 * PAGE, 10 * PAGE + 1, 13 * PAGE + 4095])
def test_a_file_cut_off_after_indexing_is_named_with_the_byte(tmp_path: Path, first: int, length: int) -> None:
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, [PAGE, 20 * PAGE], first, [0, 0]))
    os.truncate(path, length)
    with pytest.raises(
        CheckpointError, match=rf"{path}: ends at byte {length}; it was longer when indexed; write it again"
    ):
        filled(unit, 4 * PAGE, threads=1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, [PAGE], 4096, [0]))
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read at byte 4096: No such file"):
        filled(unit, PAGE)


@pytest.mark.parametrize("refusing", ["open", "read"])
def test_a_file_system_without_direct_reads_is_read_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    """Some refuse the flag; others take it, and refuse the reads."""
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, [5 * PAGE, 77], 4096, [0, 0]))
    really_open, really_read = os.open, os.preadv
    direct: set[int] = set()

    def open_(name: Path, flags: int) -> int:
        if flags & os.O_DIRECT and refusing == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        file = really_open(name, flags)
        (direct.add if flags & os.O_DIRECT else direct.discard)(file)
        return file

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_read(file, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    image = filled(unit, PAGE)
    check(unit, image, path)


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, [9 * PAGE, 9 * PAGE], 2049, [0, 0]))
    really_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: really_read(file, [buffers[0][: 2 * PAGE]], at))
    check(unit, filled(unit, 2**20), path)


def test_closing_ends_the_threads_and_closes_the_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    unit = unit_of(write_checkpoint(path, [PAGE], 4096, [0]))
    filled(unit, PAGE)
    # What others have open comes and goes meanwhile.
    assert not any(link.is_symlink() and link.readlink() == path for link in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("nbytes", [1, 5 * PAGE, 10**9])
def test_the_raw_read_rate_takes_any_size(tmp_path: Path, nbytes: int) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        write_checkpoint(path, [33 * PAGE + 5], 4096, [0])
    assert 0 < read_rate(paths, nbytes, 2 * PAGE) < math.inf


def test_memory_is_exact_zeroed_and_on_whole_pages() -> None:
    for nbytes in (0, 1, PAGE - 1, 3 * PAGE + 7):
        buffer = allocate(nbytes)
        assert buffer.nbytes == nbytes
        assert buffer.ctypes.data % PAGE == 0 or nbytes == 0
        assert not buffer.any()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("chunk_bytes", [PAGE, 2**20])
def test_parts_that_share_pages_do_not_overwrite_one_another(tmp_path: Path, backwards: bool, chunk_bytes: int) -> None:
    """Parts that lie on their pages in the file as in the image, where whole pages could be read, but for the others'.

    In both orders, so that whichever of two would win is read last once.
    """
    sizes, path = [PAGE + 100, 700, 3 * PAGE, PAGE - 800, 2 * PAGE, 5], tmp_path / "f"
    first = 512  # behind the tensor before it, at the next 256 bytes
    places = [first, *(first + np.cumsum(sizes)).tolist()]
    data = np.random.default_rng(0).integers(0, 256, 100 * PAGE, dtype=np.uint8)
    data.tofile(path)
    starts = [10 * PAGE * (number + 1) + place % PAGE for number, place in enumerate(places[:-1])]
    parts = tuple(
        TensorEntry(torch.uint8, (size,), FileSpan(path, start)) for size, start in zip(sizes, starts, strict=True)
    )
    stacked = TensorEntry(torch.uint8, (sum(sizes),), Stacked(parts))
    unit = unit_of({"before": TensorEntry(torch.uint8, (300,), FileSpan(path, 1)), "stacked": stacked})
    assert [tensor.offset for tensor in unit.tensors] == [0, first]
    image = allocate(unit.image_bytes)
    reader = Reader(chunk_bytes, threads=1)
    try:
        for tensor in reversed(unit.stored) if backwards else unit.stored:
            settle(reader.fill(replace(unit, tensors=(tensor,)), image))
    finally:
        reader.close()
    wanted = np.concatenate([data[start : start + size] for size, start in zip(sizes, starts, strict=True)])
    np.testing.assert_array_equal(image[first : first + len(wanted)], wanted)
    np.testing.assert_array_equal(image[:300], data[1:301])
