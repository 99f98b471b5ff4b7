"""Who has a run directory: one thread of one process measures in it, with the processes that it starts for that."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, ValidationError

from djinn.errors import ConfigError
from djinn.files import naming
from djinn.places import from_root

LOCK = ".lock"
"""A file of the run directory, empty while nobody has it. The kernel lets go of it when its process ends, however."""


class _Owner(BaseModel):
    pid: int
    thread: int
    created: float
    """When the process was, by the system's clock: a number is used again."""
    command: str


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run directory inside the ``with``; in that thread, and in processes it started, nothing changes.

    Raises:
        ConfigError: another process or thread has it; says which.
        OSError: the folder cannot be written; it names the file.
    """
    path = folder / LOCK
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        mine = _locked(file, path)
        try:
            yield
        finally:
            if mine:
                file.truncate(0)


def _locked(file: IO[str], path: Path) -> bool:
    """Lock the file for this thread, or return False where this thread has it already, or a process that started it."""
    try:
        with naming(path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(_this().model_dump_json())
            file.flush()
    except BlockingIOError:
        file.seek(0)
        owner = _read(file.read())
        who = f"process {owner.pid} ({owner.command})" if owner else "another process"
        if owner is not None and owner.pid in _line(owner.created):
            if owner.pid != os.getpid() or owner.thread == threading.get_native_id():
                return False
            who = f"another thread of {who}"
        raise ConfigError(
            f"run_dir {from_root(path.parent)} is in use by {who}; wait until it ends, or choose another run_dir"
        ) from None
    return True


def _this() -> _Owner:
    words = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return _Owner(
        pid=os.getpid(),
        thread=threading.get_native_id(),
        created=psutil.Process().create_time(),
        command=words[:100],
    )


def _line(created: float) -> set[int]:
    """Return those of this process and its ancestors that came to be at that time."""
    here = psutil.Process()
    return {each.pid for each in (here, *here.parents()) if abs(each.create_time() - created) < 1}


def _read(text: str) -> _Owner | None:
    try:
        return _Owner.model_validate_json(text)
    except ValidationError:
        return None
