"""A folder of files that are converted one by one: written beside its final name, and renamed at the end.

What was finished before an interruption is kept, file by file, as long as the source is the same.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from djinn.errors import CheckpointError, UnavailableError
from djinn.files import write_text
from djinn.weights import packed_format
from djinn.weights.foreign import parse_object
from djinn.weights.synthetic_checkpoint import DISK_FULL, PARTIAL, locked

STATE = "packing.json"
Convert = Callable[[str, Path, Callable[[int], object]], None]
"""Writes the file of a name to a path, and tells of raw bytes as they are written."""


@dataclass(frozen=True)
class Work:
    """What has to be written: files with about so many raw bytes each, by their names, and copies of the others."""

    what: str
    source: Path
    out: Path
    sizes: Mapping[str, int]
    others: list[Path]


def written(work: Work, convert: Convert, progress: bool) -> bool:
    """Write all of it, or what an interruption has left to do; return False where another process has just done so."""
    out, names = work.out, list(work.sizes)
    unfinished = out.with_name(out.name + PARTIAL)
    try:
        if unfinished.is_symlink():
            raise CheckpointError(f"{unfinished}: is a link; remove it")
        unfinished.mkdir(parents=True, exist_ok=True)
        with locked(unfinished) as is_there:
            if not is_there:  # another process had it, and has ended
                return False
            state = {"what": work.what, "version": packed_format.VERSIONS[-1], "source": _identity(work.source)}
            _claim(unfinished, state)
            total = sum(work.sizes.values())
            try:
                with tqdm(total=total, unit="B", unit_scale=True, desc=work.what, disable=not progress) as bar:
                    for name in names:
                        if (unfinished / name).exists():
                            bar.update(work.sizes[name])
                        else:
                            _write_whole(unfinished / name, partial(convert, name), bar.update)
                for path in work.others:
                    shutil.copy2(path, unfinished / path.name)
                (unfinished / STATE).unlink()
                if out.exists():
                    out.rmdir()
                unfinished.rename(out)
            except Exception:
                if not any((unfinished / name).exists() for name in names):
                    shutil.rmtree(unfinished, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in DISK_FULL:
            done = sum((unfinished / name).exists() for name in names)
            raise UnavailableError(
                f"{unfinished}: the disk is full; {done} of {len(names)} files are finished and kept: free some space "
                "and run the same command again, it continues there"
            ) from error
        raise UnavailableError(f"{unfinished}: cannot be written: {error}") from error
    return True


def _write_whole(
    path: Path, convert: Callable[[Path, Callable[[int], object]], None], on_done: Callable[[int], object]
) -> None:
    part = path.with_name(path.name + PARTIAL)
    try:
        convert(part, on_done)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _identity(source: Path) -> dict[str, Any]:
    """Return what says that the source is still the same: each file's size and time of change."""
    files = (path for path in sorted(source.iterdir()) if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _claim(unfinished: Path, state: dict[str, Any]) -> None:
    """Note whose the unfinished folder is.

    Raises:
        CheckpointError: it is of another source, or was begun by something else.
    """
    path = unfinished / STATE
    for held in unfinished.iterdir():
        status = held.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise CheckpointError(f"{held}: is a link, or no file; djinn has not made it, so remove {unfinished}")
    try:
        begun = parse_object(path.read_bytes())
    except Exception:  # not there, or cut off: then nothing was begun
        begun = None
    if begun is None and any(not held.name.startswith((STATE, f".{STATE}")) for held in unfinished.iterdir()):
        raise CheckpointError(f"{unfinished}: holds files that djinn has not begun; remove it")
    if begun not in (None, state):
        raise CheckpointError(f"{unfinished}: was begun from another source, or from this one as it was; remove it")
    if begun is None:
        for part in unfinished.glob(f".{STATE}*"):  # of a process that was killed while it wrote the note
            part.unlink()
        write_text(path, json.dumps(state))
