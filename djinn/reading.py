"""Files that anyone may have changed, read as what they have to be, or refused by name in one message."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from djinn.errors import ConfigError

_Kind = TypeVar("_Kind")
_SHOWN = 3
"""How many of a file's problems a message names."""


def read_text(path: Path) -> str:
    """Return what a text file holds.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} cannot be read") from None


def read_json(path: Path, kind: type[_Kind]) -> _Kind:
    """Return what a JSON file holds, as a ``kind`` that pydantic knows.

    Raises:
        ConfigError: it cannot be read, is not JSON, or is not of that kind.
    """
    return _as(kind, _read(path), str(path))


def read_json_lines(path: Path, kind: type[_Kind], *, growing: bool = False) -> list[_Kind]:
    """Return what each line of a JSON Lines file holds, as a ``kind`` that pydantic knows.

    In one that is ``growing``, a last line without an end is not there yet.

    Raises:
        ConfigError: as :func:`read_json`, with the line's number.
    """
    # Lines of bytes: text would also be split at characters that JSON leaves as they are, such as U+2028.
    data, adapter = _read(path), TypeAdapter(kind)
    if growing:
        data = data[: data.rfind(b"\n") + 1]
    data = data.removesuffix(b"\n")
    lines = data.split(b"\n") if data else []
    return [_as(adapter, line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


@contextmanager
def samples(path: Path, script: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines that a script of ours wrote, each an object; what they lack inside the ``with`` is refused, too.

    Raises:
        ConfigError: they cannot be read, or are not what the script writes.
    """
    try:
        yield read_json_lines(path, dict[str, Any])
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, ConfigError) as error:
        raise ConfigError(f"{path}: no records of {script}: {error}") from error


def read_csv(path: Path, kind: type[_Kind]) -> list[_Kind]:
    """Return what each row of a CSV file holds, as a ``kind`` whose fields are its columns; an empty cell is None.

    Raises:
        ConfigError: as :func:`read_json`, with the row's number.
    """
    adapter = TypeAdapter(kind)
    rows = csv.DictReader(read_text(path).splitlines(), strict=True)
    found = []
    try:
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():  # what DictReader makes of a row that is too long, or too short
                raise ConfigError(f"{path}, row {number}: damaged: it has not one cell for each column")
            cells = {column: cell or None for column, cell in row.items()}
            found.append(_valid(partial(adapter.validate_python, cells), f"{path}, row {number}"))
    except csv.Error as error:
        raise ConfigError(f"{path}: not a table: {error}") from None
    return found


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that is none is a ValueError
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None


def problems(error: ValidationError) -> str:
    """Return what pydantic found wrong, in one line."""
    found = [
        f"{'.'.join(map(str, each['loc'])) or 'all of it'}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors(include_url=False, include_context=False)
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _as(kind: type[_Kind] | TypeAdapter[_Kind], data: bytes, where: str) -> _Kind:
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    return _valid(partial(adapter.validate_json, data), where)


def _valid(parse: Callable[[], _Kind], where: str) -> _Kind:
    try:
        return parse()
    except ValidationError as error:
        raise ConfigError(f"{where}: damaged, or not what djinn wrote: {problems(error)}") from None
