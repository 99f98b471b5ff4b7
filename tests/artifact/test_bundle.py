"""A deposited run: what changed is named, and the archive's bytes repeat."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from djinn.artifact.bundle import bundle, kept_files, verify, write_sums
from djinn.errors import CheckpointError, ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in ("results/a.jsonl", "figures/b.pdf", "profile.yaml", "logs/log.txt", "scratch/big", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_sums(folder)
    return folder


def test_every_file_but_logs_and_scratch_is_listed(run: Path) -> None:
    assert kept_files(run) == ["figures/b.pdf", "profile.yaml", "results/a.jsonl"]
    assert verify(run) == 3
    assert os.system(f"cd {run} && sha256sum --check --quiet SHA256SUMS") == 0


def test_what_is_not_as_it_was_is_named(run: Path) -> None:
    (run / "results/a.jsonl").write_text("better")
    (run / "figures/b.pdf").unlink()
    (run / "results/c.jsonl").write_text("new")
    with pytest.raises(CheckpointError) as refusal:
        verify(run)
    for problem in ("results/a.jsonl: changed", "figures/b.pdf: missing", "results/c.jsonl: not listed"):
        assert problem in str(refusal.value)
    with pytest.raises(CheckpointError):
        bundle(run)


def test_no_checksums_is_bad_input(run: Path) -> None:
    (run / "SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match="no SHA256SUMS"):
        verify(run)


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = bundle(run)
    assert first == tmp_path / "run.tar.gz"
    os.utime(run / "profile.yaml", (0, 0))
    assert bundle(run, tmp_path / "other.tar.gz").read_bytes() == first.read_bytes()
    with tarfile.open(first) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert verify(tmp_path / "out" / "run") == 3
