"""A deposited run: what changed is named, and the archive's bytes repeat."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from djinn.artifact.bundle import bundle, kept_files, verify, write_sums
from djinn.errors import CheckpointError, ConfigError

SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""The first releases of Python 3.11 have no filters."""


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
        archive.extractall(tmp_path / "out", **SAFELY)
    assert verify(tmp_path / "out" / "run") == 3


def test_nothing_behind_a_link_is_bundled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (run / "results" / "linked.txt").symlink_to(tmp_path / "private" / "key")
    (run / "linked").symlink_to(tmp_path / "private")
    (run / "scratch" / "big").unlink()
    write_sums(run)
    with tarfile.open(bundle(run)) as archive:
        assert not [name for name in archive.getnames() if "linked" in name]
    (run / "results" / "a.jsonl").unlink()
    (run / "results" / "a.jsonl").symlink_to(tmp_path / "private" / "key")
    with pytest.raises(CheckpointError, match=r"a\.jsonl: missing"):
        verify(run)


def test_odd_names_verify_as_they_were_written(run: Path, tmp_path: Path) -> None:
    for name in (b"a\nb", b"c\rd", b"e\\f", b"e\\nf", "g\u2028h".encode(), b"\xff\xfe", b" lead  ", "é".encode()):
        Path(os.fsdecode(os.path.join(os.fsencode(run), name))).write_bytes(name)  # noqa: PTH118  bytes
    write_sums(run)
    assert verify(run) == 3 + 8
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run, check=True)
    with tarfile.open(bundle(run)) as archive:
        archive.extractall(tmp_path / "out", **SAFELY)
    assert verify(tmp_path / "out" / "run") == 3 + 8


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (b"\xff\xfe", "line 1: not a line of sha256sum"),
        (b"nonsense\n", "line 1: not a line of sha256sum"),
        (b"0" * 64 + b"  x\n\n", "line 2: not a line of sha256sum"),
        (b"0" * 64 + b"  x\n" + b"1" * 64 + b"  x\n", "line 2: x is listed twice"),
    ],
)
def test_checksums_that_are_none_are_bad_input(run: Path, sums: bytes, message: str) -> None:
    (run / "SHA256SUMS").write_bytes(sums)
    with pytest.raises(ConfigError, match=re.escape(message)):
        verify(run)


def test_names_that_are_not_there_reach_no_terminal_raw(run: Path) -> None:
    (run / "SHA256SUMS").write_bytes(b"0" * 64 + b"  \x1b[31mred\xff\n")
    with pytest.raises(CheckpointError) as refusal:
        verify(run)
    assert "\\x1b[31mred\\udcff: missing" in str(refusal.value)


def test_the_folder_one_is_in_has_a_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert bundle(Path()) == run.with_name("run.tar.gz")
    with pytest.raises(ConfigError, match="s3://"):
        bundle(run, Path("s3://bucket/run.tar.gz"))
