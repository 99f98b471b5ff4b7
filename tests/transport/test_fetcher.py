"""The fetcher of a CPU: what is asked for arrives in its slot, in order, or fails where it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from djinn.errors import CheckpointError
from djinn.transport.copier import Source
from djinn.transport.fetcher import Arrival, CpuFetcher
from djinn.transport.fetcher_cuda import CudaFetcher
from djinn.transport.reader import Reader, allocate
from djinn.transport.stats import Stats
from djinn.weights.tensors import PAGE, FileSpan, TensorEntry
from djinn.weights.units import Unit, lay_out_expert

SLOTS, NBYTES = 4, 3 * PAGE + 1000
"""An expert is read in several pieces, and does not fill its slot."""


@pytest.fixture
def stats() -> Stats:
    return Stats(model_bytes=0, resident_bytes=0, ring_bytes=0, host_bytes=0, disk_bytes=0, traced=True)


@pytest.fixture
def fetcher(stats: Stats) -> Iterator[CpuFetcher]:
    reader = Reader(PAGE, threads=3)
    made = CpuFetcher(allocate(SLOTS * 4 * PAGE).reshape(SLOTS, 4 * PAGE), reader, stats)
    made.pool.fill_(255)
    yield made
    made.close()
    reader.close()


def source(folder: Path, number: int, *, in_memory: bool) -> tuple[Source, torch.Tensor]:
    """Return an expert, in host memory or in a file at an odd place, and its bytes."""
    values = torch.from_numpy(np.random.default_rng(number).integers(0, 255, NBYTES, dtype=np.uint8))
    path = folder / f"{number}.bin"
    path.write_bytes(bytes(77) + values.numpy().tobytes())
    entry = TensorEntry(torch.uint8, (NBYTES,), FileSpan(path, 77))
    unit = Unit(f"experts[{number}]", ("experts",), lay_out_expert([("experts.up", entry)]), is_expert=True)
    image = None
    if in_memory:
        image = allocate(unit.image_bytes)
        image[:NBYTES] = values.numpy()
    return Source(unit, image), values


@pytest.mark.gpu
def test_on_a_gpu_each_of_two_tensors_that_come_to_one_slot_is_waited_for(tmp_path: Path, stats: Stats) -> None:
    (first, _), (second, _) = (source(tmp_path, number, in_memory=False) for number in range(2))
    (tmp_path / "0.bin").write_bytes(bytes(77))  # all but its beginning is lost
    reader = Reader(PAGE, threads=3)
    pool = torch.empty(SLOTS, 4 * PAGE, dtype=torch.uint8, device="cuda")
    made = CudaFetcher(pool, reader, stats, on_disk=True, zero=None)
    fetches = [made.fetch([Arrival(expert, 1)], []) for expert in (first, second)]
    with pytest.raises(CheckpointError, match=r"0\.bin: ends at byte 77"):
        made.wait(fetches[0])
    made.wait(fetches[1])
    made.close()
    reader.close()


@pytest.mark.parametrize("in_memory", [True, False])
def test_experts_arrive_in_their_slots(tmp_path: Path, fetcher: CpuFetcher, stats: Stats, in_memory: bool) -> None:
    made = [source(tmp_path, number, in_memory=in_memory) for number in range(3)]
    slots = [2, 0, 3]
    arrivals = [Arrival(expert, slot) for (expert, _), slot in zip(made, slots, strict=True)]
    fetch = fetcher.fetch(arrivals, [])
    fetcher.wait(fetch)
    for (_, values), slot in zip(made, slots, strict=True):
        assert torch.equal(fetcher.pool[slot, :NBYTES], values)
    assert (fetcher.pool[1] == 255).all()
    assert fetch.nbytes == stats.link_bytes == 3 * NBYTES
    assert stats.disk_read_bytes == (0 if in_memory else 3 * NBYTES)
    assert fetch.cause == ("link" if in_memory else "disk")
    copies = [interval for interval in stats.timeline if interval.lane == "copy"]
    assert [(interval.unit, interval.nbytes) for interval in copies] == [("experts", 3 * NBYTES)]


def test_copies_within_the_pool_follow_what_arrives(tmp_path: Path, fetcher: CpuFetcher, stats: Stats) -> None:
    expert, values = source(tmp_path, 0, in_memory=True)
    fetcher.wait(fetcher.fetch([Arrival(expert, 1)], [(1, 3), (3, 0)]))
    for slot in (1, 3, 0):
        assert torch.equal(fetcher.pool[slot, :NBYTES], values)
    assert stats.link_bytes == NBYTES, "what stays within crosses no link"
    fetcher.pool[2].fill_(7)
    fetcher.wait(fetcher.fetch([], [(2, 1)]))
    assert (fetcher.pool[1] == 7).all()
    assert len([interval for interval in stats.timeline if interval.lane == "copy"]) == 1


def test_later_fetches_may_be_waited_for_first(tmp_path: Path, fetcher: CpuFetcher) -> None:
    made = [source(tmp_path, number, in_memory=number % 2 == 0) for number in range(4)]
    fetches = [fetcher.fetch([Arrival(expert, slot)], []) for slot, (expert, _) in enumerate(made)]
    for slot in (3, 1, 0, 2):
        fetcher.wait(fetches[slot])
        assert torch.equal(fetcher.pool[slot, :NBYTES], made[slot][1])


def test_nothing_to_fetch_is_there_at_once(fetcher: CpuFetcher, stats: Stats) -> None:
    fetch = fetcher.fetch([], [])
    fetcher.wait(fetch)
    assert (fetch.nbytes, fetch.name, stats.link_bytes, stats.timeline) == (0, "", 0, [])


def test_what_cannot_be_read_is_raised_where_it_is_waited_for(
    tmp_path: Path, fetcher: CpuFetcher, stats: Stats
) -> None:
    (short, _), (whole, values) = (source(tmp_path, number, in_memory=False) for number in range(2))
    (tmp_path / "0.bin").write_bytes(bytes(77 + NBYTES - 1))
    failing = fetcher.fetch([Arrival(short, 0)], [])
    right = fetcher.fetch([Arrival(whole, 1)], [])
    with pytest.raises(CheckpointError, match=r"0\.bin: ends at byte"):
        fetcher.wait(failing)
    assert stats.link_bytes == 0
    fetcher.wait(right)
    assert torch.equal(fetcher.pool[1, :NBYTES], values)
    fetcher.settle()  # raises nothing


def test_settling_and_the_clock_wait_for_all(
    tmp_path: Path, fetcher: CpuFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert, values = source(tmp_path, 0, in_memory=True)
    gate, move = threading.Event(), CpuFetcher._move

    def late(*args: object) -> float:
        gate.wait(10)
        return move(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuFetcher, "_move", late)
    for wait in (fetcher.settle, fetcher.clock):
        gate.clear()
        fetcher.pool.fill_(0)
        fetch = fetcher.fetch([Arrival(expert, 0)], [])
        threading.Timer(0.05, gate.set).start()
        assert not fetch.done.done
        wait()
        assert fetch.done.done
        assert torch.equal(fetcher.pool[0, :NBYTES], values)


def test_a_wait_that_is_late_is_a_stall(tmp_path: Path, fetcher: CpuFetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    expert, _ = source(tmp_path, 0, in_memory=True)
    gate, move = threading.Event(), CpuFetcher._move

    def late(*args: object) -> float:
        gate.wait(10)
        return move(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuFetcher, "_move", late)
    fetch = fetcher.fetch([Arrival(expert, 0)], [])
    threading.Timer(0.05, gate.set).start()
    fetcher.wait(fetch)
    stats = fetcher._stats
    assert 0.02 < stats.stall_s < 10
    assert [interval.cause for interval in stats.timeline if interval.lane == "stall"] == ["link"]


def test_closing_waits_and_frees_the_pool(tmp_path: Path, stats: Stats) -> None:
    reader = Reader(PAGE, threads=2)
    made = CpuFetcher(allocate(SLOTS * 4 * PAGE).reshape(SLOTS, 4 * PAGE), reader, stats)
    fetch = made.fetch([Arrival(source(tmp_path, 0, in_memory=False)[0], 0)], [])
    made.close()
    assert fetch.done.done
    assert made.pool.numel() == 0
    reader.close()
