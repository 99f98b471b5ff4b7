"""A run ready to be deposited: checksums of every file, their verification, and an archive whose bytes repeat."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import tarfile
from pathlib import Path

from djinn.errors import CheckpointError, ConfigError
from djinn.files import naming, unfinished, write_bytes
from djinn.names import local_folder
from djinn.text import one_line

SUMS = "SHA256SUMS"
_NOT_KEPT = ("scratch", "logs")
"""Folders of a run that are of no use elsewhere."""
_LINE = re.compile(rb"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)", re.DOTALL)
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
"""How ``sha256sum`` writes the characters of a name that would break its line, which then begins with a backslash."""
_UNESCAPED = {escape: character for character, escape in _ESCAPES.items()}


def write_sums(folder: Path) -> Path:
    """Write ``SHA256SUMS``, a line for every other file of ``folder``, as ``sha256sum`` writes it; return its path."""
    write_bytes(folder / SUMS, b"".join(_line(_digest(folder / name), name) for name in kept_files(folder)))
    return folder / SUMS


def kept_files(folder: Path) -> list[str]:
    """Return the paths from ``folder`` of all files that a run keeps, sorted, without the checksums themselves.

    Links are not files of a run, whatever they lead to.
    """
    found = []
    for root, folders, names in os.walk(folder):
        within = Path(root).relative_to(folder)
        if not within.parts:
            folders[:] = [name for name in folders if name not in _NOT_KEPT]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                found.append((within / name).as_posix())
    return sorted(name for name in found if name != SUMS)


def verify(folder: Path) -> int:
    """Check every file of ``folder`` against ``SHA256SUMS``; return how many files there are.

    Raises:
        ConfigError: no checksums there, or lines that are none.
        CheckpointError: files that changed, are missing or are not listed; every one is named.
    """
    if not (folder / SUMS).is_file():
        raise ConfigError(f"{folder}: no {SUMS}; a run writes it when it ends, `djinn report` too")
    expected = _read_sums(folder / SUMS)
    found = set(kept_files(folder))
    problems = [f"{one_line(name)}: missing" for name in sorted(set(expected) - found)]
    problems += [f"{one_line(name)}: not listed" for name in sorted(found - set(expected))]
    changed = [name for name in sorted(found & set(expected)) if _digest(folder / name) != expected[name]]
    problems += [f"{one_line(name)}: changed" for name in changed]
    if problems:
        raise CheckpointError(f"{folder} is not what its checksums say: {'; '.join(problems)}")
    return len(found)


def bundle(folder: Path, out: Path | None = None) -> Path:
    """Write the archive of a verified run, by default ``<folder>.tar.gz`` beside it; equal runs give equal bytes.

    Raises:
        ConfigError, CheckpointError: as for :func:`verify`.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()  # "." has no name that an archive could have
    verify(folder)
    target = local_folder(out) if out else folder.with_name(f"{folder.name}.tar.gz")
    with (
        unfinished(target) as part,
        part.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted([*kept_files(folder), SUMS]):
            with (folder / name).open("rb") as file:
                entry = tarfile.TarInfo(f"{folder.name}/{name}")  # no owner, no times: those are not the run's
                entry.size = os.fstat(file.fileno()).st_size
                archive.addfile(entry, file)
    return target


def _read_sums(path: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    data = path.read_bytes().removesuffix(b"\n")
    for number, line in enumerate(data.split(b"\n") if data else [], start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}: not a line of sha256sum: a digest, two spaces and a name")
        name = os.fsdecode(match["name"])
        if match["escaped"]:
            name = re.sub(r"\\[\\nr]", lambda escape: _UNESCAPED[escape[0]], name)
        if name in digests:
            raise ConfigError(f"{path}, line {number}: {one_line(name)} is listed twice; write the checksums again")
        digests[name] = match["digest"].decode()
    return digests


def _line(digest: str, name: str) -> bytes:
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    mark = "" if escaped == name else "\\"
    return os.fsencode(f"{mark}{digest}  {escaped}\n")


def _digest(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
