"""What a name may be before it becomes a path."""

from __future__ import annotations

import re
from pathlib import Path

from djinn.errors import ConfigError

_NAME = re.compile(r"\w([\w .+=-]{0,98}\w)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def plain_name(name: str) -> str:
    """Return a name that a folder can be called by.

    Raises:
        ConfigError: anything that a path, a shell or a terminal would take for more than a name.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"name {name!r}: it has up to 100 letters, digits, spaces and . _ + = -, letters at its ends")
    return name


def local_folder(path: Path) -> Path:
    """Return a path that a user named, which lies on this machine.

    Raises:
        ConfigError: a URL, such as s3://bucket/run, which would become a folder called ``s3:``.
    """
    if scheme := next((part for part in path.parts if _SCHEME.fullmatch(part)), None):
        raise ConfigError(f"{scheme}//…: results go to a folder of this machine; copy them from there afterwards")
    return path
