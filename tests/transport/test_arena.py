"""The arena: exact, whole pages back to back, and nothing left where filling it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from djinn.errors import CheckpointError
from djinn.transport.arena import Arena, PinnedMemory
from djinn.transport.reader import Buffer, Reader, allocate, settle
from djinn.transport.residents import load_residents
from djinn.weights.shards import read_shard
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit, lay_out


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(4 * PAGE)
    yield made
    made.close()


@pytest.fixture
def units(tmp_path: Path) -> list[Unit]:
    path = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.randn(100 * number + 1, 33) for number in range(6)}, path)
    entries = list(read_shard(path).items())
    return [Unit(f"u{number}", (f"u{number}",), lay_out(entries[number : number + 2])) for number in range(0, 6, 2)]


def expected(unit: Unit) -> Buffer:
    reader = Reader(PAGE, 1)
    image = allocate(unit.image_bytes)
    settle(reader.fill(unit, image))
    reader.close()
    return image


def test_images_lie_back_to_back_on_whole_pages(units: list[Unit], reader: Reader) -> None:
    """Invariant 9: no rounding up, no second copy."""
    arena = Arena(units, reader, pin=False)
    addresses = [arena.images[unit.name].ctypes.data for unit in units]
    sizes = [unit.image_bytes for unit in units]
    assert all(address % PAGE == 0 for address in addresses)
    assert [address - addresses[0] for address in addresses] == [0, sizes[0], sizes[0] + sizes[1]]
    assert arena._memory.buffer.nbytes == sum(sizes)
    for unit in units:
        for tensor in unit.tensors:
            where = slice(tensor.offset, tensor.offset + tensor.entry.nbytes)
            np.testing.assert_array_equal(arena.images[unit.name][where], expected(unit)[where])
    arena.close()
    assert arena.images == {}


class Driver:
    """Registers memory until ``refuses_after`` calls have been made."""

    def __init__(self, refuses_after: int) -> None:
        self.registered: dict[int, int] = {}
        self.calls = 0
        self._refuses_after = refuses_after

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls += 1
        if self.calls > self._refuses_after:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def test_memory_is_page_locked_in_parts_of_whole_units(
    units: list[Unit], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(refuses_after=10)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr("djinn.transport.arena.PART_BYTES", units[0].image_bytes + 1)
    arena = Arena(units, reader, pin=True)
    sizes = [unit.image_bytes for unit in units]
    assert arena.pinned
    assert driver.registered == {
        arena.images[units[0].name].ctypes.data: sizes[0] + sizes[1],
        arena.images[units[2].name].ctypes.data: sizes[2],
    }
    arena.close()
    assert driver.registered == {}


def test_page_locking_that_is_refused_half_way_leaves_nothing_locked(
    units: list[Unit], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(refuses_after=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr("djinn.transport.arena.PART_BYTES", 1)
    with pytest.warns(RuntimeWarning, match="SEVERAL TIMES SLOWER; raise the memlock limit"):
        arena = Arena(units, reader, pin=True)
    assert not arena.pinned
    assert (driver.registered, driver.calls) == ({}, 2)
    for unit in units:
        for tensor in unit.tensors:
            where = slice(tensor.offset, tensor.offset + tensor.entry.nbytes)
            np.testing.assert_array_equal(arena.images[unit.name][where], expected(unit)[where])
    arena.close()


def test_an_arena_of_nothing_is_empty(reader: Reader) -> None:
    arena = Arena([], reader, pin=False, progress=True)
    assert arena._memory.buffer.nbytes == 0
    arena.close()


def test_a_file_that_cannot_be_read_is_named(units: list[Unit], reader: Reader, tmp_path: Path) -> None:
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="ends at byte 5000"):
        Arena(units, reader, pin=False)


def test_progress_is_shown_on_request(units: list[Unit], reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    Arena(units, reader, pin=False).close()
    assert capsys.readouterr().err == ""
    Arena(units, reader, pin=False, progress=True).close()
    assert "filling host memory: 100%" in capsys.readouterr().err


def test_residents_are_one_block(units: list[Unit], reader: Reader) -> None:
    images = load_residents(units, reader, torch.device("cpu"))
    assert len({image.untyped_storage().data_ptr() for image in images.values()}) == 1
    assert images["u0"].untyped_storage().nbytes() == sum(unit.image_bytes for unit in units)
    for unit in units:
        for tensor in unit.tensors:
            where = slice(tensor.offset, tensor.offset + tensor.entry.nbytes)
            np.testing.assert_array_equal(images[unit.name].numpy()[where], expected(unit)[where])


def test_memory_that_was_given_back_is_empty() -> None:
    memory = PinnedMemory(3 * PAGE)
    memory.close()
    memory.close()
    assert memory.buffer.nbytes == 0
