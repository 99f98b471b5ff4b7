"""Byte counts as people write them. GB is 10^9 bytes, GiB is 2^30; a number without a unit is refused."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from djinn.errors import ConfigError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_MOST = 10**15
"""More than any machine that djinn runs on has of anything, bytes."""
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)\s*")


def parse_bytes(value: int | str) -> int:
    """Return the bytes that ``value`` names: a string with a unit ("24 GB", "64 MiB"), or an exact int.

    Raises:
        ConfigError: a negative or zero size, one of more than 1000 TB, an unknown or missing unit, or another type.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"size {value!r} is not a string with a unit, such as '24 GB' or '64 MiB'")
    size: float
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None:
            units = ", ".join(_UNITS)
            raise ConfigError(f"size {value!r} is not a positive number with a unit; the units are {units}")
        size = float(match[1]) * _UNITS[match[2]]
    if size > _MOST:  # not shown: it may have thousands of digits
        raise ConfigError("the size is more than 1000 TB, which no machine has")
    if round(size) <= 0:
        raise ConfigError(f"size {value!r} is not positive")
    return round(size)


def parse_rate(value: str) -> int:
    """Return the bytes per second that ``value`` names: a size with "/s" behind it ("25 GB/s").

    Raises:
        ConfigError: no "/s", or what :func:`parse_bytes` refuses.
    """
    size, slash, unit = value.partition("/")
    if (slash, unit.strip()) != ("/", "s"):
        raise ConfigError(f"rate {value!r} is not a size per second, such as '25 GB/s'")
    return parse_bytes(size)


def format_bytes(size: float) -> str:
    """Return ``size`` in decimal units with three significant digits: ``1.71 GB``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= 0.9995 * _UNITS[unit]:  # what rounds to 1000 of a unit is 1 of the next
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{size:.0f} B"


def exact_bytes(size: int) -> str:
    """Return the shortest exact writing of ``size``, such as ``16 MiB`` or ``1500 MB``; `parse_bytes` undoes it."""
    return min((f"{size // unit} {name}" for name, unit in _UNITS.items() if size % unit == 0), key=len)


def _written_with_unit(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} has no unit; write a size such as '24 GB' or '64 MiB'")
    try:
        return parse_bytes(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Bytes = Annotated[
    int,
    BeforeValidator(_written_with_unit),
    PlainSerializer(exact_bytes, return_type=str, when_used="json-unless-none"),
]
"""A field of a configuration file that holds a size: read and written as a string with a unit, kept as bytes."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A field that holds bytes or another whole number in a file of results: no more than arrays and tables hold."""
