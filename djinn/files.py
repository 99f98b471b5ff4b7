"""Files that are there whole or not at all, whatever interrupts their writing; and errors that name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run the same command again",
    errno.EIO: "the disk or its connection fails; look at the system's log, and choose another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write, or change its permissions",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
}


@contextmanager
def naming(path: Path, *aliases: Path) -> Iterator[None]:
    """Give ``path`` to what the system refuses inside the ``with``, where it names no file or one of ``aliases``.

    What writes to an open file does not know its name: an error of ``write`` or ``fsync`` names none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) in map(str, aliases):
            error.filename, error.filename2 = str(path), None
        raise


def remedy(error: OSError) -> str:
    """Return what a person can do about what the system refused; nothing where nobody can say."""
    return _REMEDIES.get(error.errno or 0, "")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield the path to write to; at the end it becomes ``path``, or is removed if an exception ended the writing.

    Makes the folder. Each process writes to a name of its own, so that two of them leave one whole file.

    Raises:
        OSError: the disk is full or fails, or the folder cannot be written; it names ``path``.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path, part):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, making its folder; raises as :func:`unfinished`.

    Libraries draw and format into memory, and the result comes here: on a full disk each of them fails in a way of its
    own.
    """
    with unfinished(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, making its folder; raises as :func:`unfinished`."""
    write_bytes(path, text.encode())
