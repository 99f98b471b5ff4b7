"""Folders for what has to be on disk for as long as a model is loaded: gone with it, or at the latest at the next load.

A process that is killed removes nothing. So each folder holds a file that its process keeps locked, and whoever loads
a model first removes those of this user whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "djinn-"
_OWNER = ".owner"


@contextmanager
def spill_folder() -> Iterator[Path]:
    """Yield a new folder in the system's temporary folder; it is removed at the end, or once this process is dead.

    Raises:
        OSError: the temporary folder cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # Locked before it has its name: who sees an owner's file that is not locked may take the owner for dead.
    with (folder / f"{_OWNER}.new").open("w") as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX)
            Path(owner.name).rename(folder / _OWNER)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove this user's folders whose processes are dead."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # no owner: not one of these folders, or one that is being made; or gone meanwhile
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with (folder / _OWNER).open() as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
