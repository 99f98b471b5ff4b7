"""The CPU copy engine on real files: what it moves, what it counts, and copies that fail or are cut short."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from djinn.errors import CheckpointError
from djinn.planning.ring import schedule
from djinn.transport.copier import Source
from djinn.transport.cpu import CpuCopier
from djinn.transport.reader import Reader, allocate, pieces, settle
from djinn.transport.stats import TIMELINE_LIMIT, Interval, Stats
from djinn.weights.shards import read_shard
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit, lay_out


def new_stats(*, traced: bool = False) -> Stats:
    return Stats(model_bytes=0, resident_bytes=0, ring_bytes=0, host_bytes=0, disk_bytes=0, traced=traced)


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(2 * PAGE)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.randn(900, 7 + number) for number in range(4)}, path)
    return path


@pytest.fixture
def units(path: Path) -> list[Unit]:
    return [Unit(name, (name,), lay_out([(name, entry)])) for name, entry in sorted(read_shard(path).items())]


def copier_of(units: list[Unit], reader: Reader, stats: Stats, *, in_memory: bool) -> CpuCopier:
    """Return a copier with two slots, its units on disk or in memory."""
    sources = []
    for unit in units:
        image = allocate(unit.image_bytes) if in_memory else None
        if image is not None:
            settle(reader.fill(unit, image))
        sources.append(Source(unit, image))
    ring_bytes = 2 * max(unit.image_bytes for unit in units)
    slots = tuple(schedule([unit.image_bytes for unit in units], ring_bytes))
    return CpuCopier(sources, slots, allocate(ring_bytes), reader, stats)


def in_slot(copier: CpuCopier, units: list[Unit], number: int) -> torch.Tensor:
    slot, tensor = copier.slots[number], units[number].tensors[0]
    raw = copier.ring[slot.offset + tensor.offset : slot.offset + tensor.offset + tensor.entry.nbytes]
    return raw.view(tensor.entry.dtype).view(tensor.entry.shape)


@pytest.mark.parametrize("in_memory", [True, False])
def test_units_arrive_in_their_slots_and_are_counted(
    units: list[Unit], reader: Reader, path: Path, in_memory: bool
) -> None:
    stats = new_stats(traced=True)
    copier = copier_of(units, reader, stats, in_memory=in_memory)
    for number, unit in enumerate(units):
        copier.submit(number, None)
        copier.wait(number)
        assert torch.equal(in_slot(copier, units, number), load_file(path)[unit.name])
        copier.release(number)
    total = sum(unit.weight_bytes for unit in units)
    assert stats.link_bytes == total
    assert stats.disk_read_bytes == (0 if in_memory else total)
    for lane in ("copy", "compute"):
        assert [interval.unit for interval in stats.timeline if interval.lane == lane] == [u.name for u in units]
    stalls = [interval for interval in stats.timeline if interval.lane == "stall"]
    assert all(interval.cause == ("link" if in_memory else "disk") for interval in stalls)
    assert stats.stall_s == pytest.approx(sum(interval.end_s - interval.start_s for interval in stalls))
    copier.close()
    assert copier.ring.nbytes == 0


def test_a_copy_that_fails_is_raised_where_it_is_waited_for(units: list[Unit], reader: Reader, path: Path) -> None:
    copier = copier_of(units, reader, new_stats(), in_memory=False)
    content = path.read_bytes()
    os.truncate(path, 0)
    copier.submit(0, None)
    copier.settle()
    with pytest.raises(CheckpointError, match="ends at byte 0"):
        copier.wait(0)
    path.write_bytes(content)
    copier.submit(0, None)
    copier.wait(0)
    assert torch.equal(in_slot(copier, units, 0), load_file(path)[units[0].name])


def test_settling_waits_for_a_copy_that_nobody_knows(
    units: list[Unit], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt came when the copy had been asked for and before that was noted; then it is asked for again."""
    copier = copier_of(units, reader, new_stats(), in_memory=False)
    gate, ended = threading.Event(), []
    read = reader.read

    def slow(piece: object, image: np.ndarray) -> int:
        gate.wait()
        done = read(piece, image)  # type: ignore[arg-type]
        ended.append(piece)
        return done

    monkeypatch.setattr(reader, "read", slow)
    copier.submit(0, None)
    del copier.fills[0]
    threading.Timer(0.05, gate.set).start()
    copier.settle()
    assert len(ended) == len(pieces(units[0], reader.chunk_bytes)) > 1
    copier.submit(0, None)
    copier.wait(0)
    copier.close()


def test_closing_waits_for_copies_under_way(units: list[Unit], reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    copier = copier_of(units, reader, new_stats(), in_memory=False)
    gate, ended = threading.Event(), []
    really = reader.read

    def slow(piece: object, image: np.ndarray) -> int:
        gate.wait()
        read = really(piece, image)  # type: ignore[arg-type]
        ended.append(piece)
        return read

    monkeypatch.setattr(reader, "read", slow)
    copier.submit(0, None)
    threading.Timer(0.05, gate.set).start()
    copier.close()
    assert len(ended) == len(pieces(units[0], reader.chunk_bytes)) > 1


def test_a_copy_that_no_thread_takes_any_more_is_no_copy(units: list[Unit], reader: Reader) -> None:
    copier = copier_of(units, reader, new_stats(), in_memory=False)
    reader.pool.shutdown()
    copier.submit(0, None)
    with pytest.raises(RuntimeError, match="after shutdown"):
        copier.wait(0)
    copier.close()


def test_the_timeline_ends_at_its_limit() -> None:
    stats = new_stats(traced=True)
    stats.timeline = [Interval("copy", "u", 0.0, 1.0)] * (TIMELINE_LIMIT - 1)
    for _ in range(3):
        stats.add(Interval("copy", "u", 0.0, 1.0))
    assert len(stats.timeline) == TIMELINE_LIMIT


def test_a_cpu_has_no_link_to_copy_over_bare(units: list[Unit], reader: Reader) -> None:
    copier = copier_of(units, reader, new_stats(), in_memory=True)
    assert copier.bare_rate() is None
    copier.close()
