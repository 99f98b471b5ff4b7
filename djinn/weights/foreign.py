"""The boundary to what others wrote: their files, and the packages that read these, may raise anything at all.

Beyond it there are only djinn's own errors. What is interrupted and what is out of memory passes as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from djinn.errors import CheckpointError, DjinnError, UnavailableError


@contextmanager
def refusing(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever is raised while ``what`` (a file or folder, and what is wrong with it) is read into an error of it.

    Raises:
        CheckpointError: ``what``, the error and ``remedy``.
        UnavailableError: a package that is not installed.
    """
    try:
        yield
    except (DjinnError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise UnavailableError(f"{what}: {error}") from error
    except BaseException as error:  # of any type: panics of Rust and errors of torch.distributed are no Exceptions
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}{remedy and f'; {remedy}'}") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that ``text`` (UTF-8) is; call it within :func:`refusing`.

    Raises:
        ValueError: not JSON, not an object, or a name that stands in it twice.
        RecursionError: nested too deep.
    """
    found = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_once)
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} where an object has to be")
    return found


def require_file(path: Path, named_by: Path | None = None) -> None:
    """Refuse what is no regular file: one that is may be opened, and neither blocks nor goes on for ever.

    Raises:
        CheckpointError: a folder, a fifo, a socket or a device, behind links too; or nothing.
    """
    if not path.is_file():
        what = "not a regular file" if path.exists() else "not there"
        raise CheckpointError(f"{path}: {what}{f'; {named_by} names it' if named_by else ''}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found
