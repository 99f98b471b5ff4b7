"""A run ready to be deposited: checksums of every file, their verification, and an archive whose bytes repeat."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

from djinn.errors import CheckpointError, ConfigError
from djinn.files import unfinished, write_text

SUMS = "SHA256SUMS"
_NOT_KEPT = ("scratch", "logs")
"""Folders of a run that are of no use elsewhere."""


def write_sums(folder: Path) -> Path:
    """Write ``SHA256SUMS``, a line for every other file of ``folder``, as ``sha256sum`` writes it; return its path."""
    write_text(folder / SUMS, "".join(f"{_digest(folder / name)}  {name}\n" for name in kept_files(folder)))
    return folder / SUMS


def kept_files(folder: Path) -> list[str]:
    """Return the paths from ``folder`` of all files that a run keeps, sorted, without the checksums themselves."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() != SUMS and path.parts[0] not in _NOT_KEPT and not path.name.startswith(".")
    )


def verify(folder: Path) -> int:
    """Check every file of ``folder`` against ``SHA256SUMS``; return how many files there are.

    Raises:
        ConfigError: no checksums there.
        CheckpointError: files that changed, are missing or are not listed; every one is named.
    """
    if not (folder / SUMS).is_file():
        raise ConfigError(f"{folder}: no {SUMS}; a run writes it when it ends, `djinn report` too")
    expected = {
        name: digest for digest, _, name in (line.partition("  ") for line in (folder / SUMS).read_text().splitlines())
    }
    found = set(kept_files(folder))
    problems = [f"{name}: missing" for name in sorted(set(expected) - found)]
    problems += [f"{name}: not listed" for name in sorted(found - set(expected))]
    problems += [
        f"{name}: changed" for name in sorted(found & set(expected)) if _digest(folder / name) != expected[name]
    ]
    if problems:
        raise CheckpointError(f"{folder} is not what its checksums say: {'; '.join(problems)}")
    return len(found)


def bundle(folder: Path, out: Path | None = None) -> Path:
    """Write the archive of a verified run, by default ``<folder>.tar.gz`` beside it; equal runs give equal bytes.

    Raises:
        ConfigError, CheckpointError: as for :func:`verify`.
    """
    verify(folder)
    target = out or folder.with_name(f"{folder.name}.tar.gz")
    with (
        unfinished(target) as part,
        part.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted([*kept_files(folder), SUMS]):
            data = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{folder.name}/{name}")  # no owner, no times: those are not the run's
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
