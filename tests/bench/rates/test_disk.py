"""Disk rates on real temporary files."""

import os
from pathlib import Path

import pytest

from djinn.bench.rates import disk


def test_every_kind_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    found = disk.rates(tmp_path, 2 * disk.BLOCK, (1, 2))
    assert [(rate.kind, rate.mode, rate.threads) for rate in found] == [
        ("write", "direct", 1),
        ("write", "direct", 2),
        ("write", "buffered", 1),
        ("read", "buffered", 1),
        ("read", "direct", 1),
        ("read", "buffered", 2),
        ("read", "direct", 2),
    ]
    assert all((rate.gbps is None) == bool(rate.reason) for rate in found)
    assert all(rate.gbps is not None and rate.gbps > 0 for rate in found if rate.mode == "buffered")
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_without_direct_io_says_so_and_is_read_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(disk, "_direct", refuse)
    found = disk.rates(tmp_path, disk.BLOCK, (1,))
    assert {rate.reason for rate in found if rate.mode == "direct"} == {"Invalid argument"}
    assert all(rate.gbps is not None for rate in found if rate.mode == "buffered")


def test_a_full_disk_is_a_reason_without_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "pwrite", full)
    found = disk.rates(tmp_path, disk.BLOCK, (1,))
    assert all(rate.gbps is None and rate.reason for rate in found)
    assert {rate.reason for rate in found if rate.kind == "write"} == {"No space left on device"}
    assert str(tmp_path) not in str(found)
    assert list(tmp_path.iterdir()) == []
