"""What names may be that a user gives: of folders, devices and codings. Told before anything large is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, cast, get_args

from djinn.errors import ConfigError

_NAME = re.compile(r"\w([\w .+=-]{0,98}\w)?")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

Coding = Literal["none", "lossless"]


def device_name(name: str) -> str:
    """Return the name of a device, which need not be here.

    Raises:
        ConfigError: neither cpu nor cuda, nor cuda with the number of a GPU.
    """
    if _DEVICE.fullmatch(name) is None:
        raise ConfigError(f"device {name!r}: the devices are cpu and cuda, and cuda:1 is the second GPU")
    return name


def coding_name(name: str) -> Coding:
    """Return the name of a coding of weights.

    Raises:
        ConfigError: there is no such coding.
    """
    if name not in get_args(Coding):
        raise ConfigError(f"coding {name!r}: it is none or lossless")
    return cast("Coding", name)


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
