"""``pack``: code a checkpoint once, so that loading it codes nothing; ``unpack``: the original files, byte for byte.

A folder is written beside its final name and renamed at the end. What was finished before an interruption is kept,
shard by shard, as long as the source is the same.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from djinn.codec.encode import layout_of
from djinn.devices import device_here
from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.weights import packed_format
from djinn.weights.header import read_header
from djinn.weights.packed_shard import pack_shard, read_tensor, unpack_shard
from djinn.weights.resolve import resolve
from djinn.weights.shards import read_checkpoint, read_shard
from djinn.weights.synthetic_checkpoint import DISK_FULL, PARTIAL, locked
from djinn.weights.tensors import FileSpan, TensorEntry, kind_of

_STATE = "packing.json"
_Convert = Callable[[Path, Path, Callable[[int], object]], None]


@dataclass(frozen=True)
class TensorSize:
    """What coding does to a tensor. Sizes are bytes."""

    name: str
    dtype: str
    raw_bytes: int
    stored_bytes: int
    coded: bool

    @property
    def kind(self) -> str:
        """The module's own name, without where it is: ``q_proj``."""
        return kind_of(self.name)

    @property
    def bits(self) -> float:
        """Bits stored for every 16 of the weights."""
        return 16 * self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


def pack(model: str | Path, out: str | Path, *, device: str | None = None, progress: bool = False) -> Path:
    """Write the packed form of a checkpoint to folder ``out`` and return it; continues where it was interrupted.

    Args:
        model: a checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``.
        out: a folder that is not there yet, or empty.
        device: where tensors are coded; by default a GPU where there is one.
        progress: show a bar of the bytes coded.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged or packed already, or an ``out`` that holds something.
        ConfigError: an ``out`` that is, holds or is in the source.
        UnavailableError: the disk is full; what was finished is kept.
    """
    return _converted(resolve(str(model)), Path(out), "pack", partial(pack_shard, device=device_here(device)), progress)


def unpack(folder: str | Path, out: str | Path, *, device: str | None = None, progress: bool = False) -> Path:
    """Write the checkpoint that ``folder`` was packed from to folder ``out``, byte for byte; otherwise as :func:`pack`.

    Raises:
        CheckpointError, ConfigError, UnavailableError: as for :func:`pack`; a ``folder`` that is not packed.
    """
    return _converted(
        resolve(str(folder)), Path(out), "unpack", partial(unpack_shard, device=device_here(device)), progress
    )


def survey(model: str | Path, *, device: str | None = None) -> Iterator[TensorSize]:
    """Yield what packing would do to each tensor of a checkpoint; of a packed one, what it did.

    Raises:
        CheckpointError: a checkpoint that is missing or damaged.
    """
    where = device_here(device)
    for name, entry in read_checkpoint(resolve(str(model))).items():
        layout = entry.layout
        if entry.codable:
            layout = layout_of(read_tensor(entry).view(entry.dtype).to(where))
        dtype = str(entry.dtype).removeprefix("torch.")
        yield TensorSize(name, dtype, entry.raw_bytes, packed_format.stored_bytes(entry, layout), layout is not None)


def _converted(source: Path, out: Path, what: str, convert: _Convert, progress: bool) -> Path:
    source, out = source.resolve(), out.expanduser().resolve()
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise ConfigError(f"{out}: {what} writes beside the source, not into {source}; choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; choose a folder that is empty or not there yet")
    shards = _shards(source)
    _require(shards, source, packed_already=what == "unpack")
    sizes = {name: sum(entry.raw_bytes for entry in read_shard(source / name).values()) for name in shards}
    unfinished = out.with_name(out.name + PARTIAL)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with locked(unfinished):
            _claim(unfinished, {"what": what, "version": packed_format.VERSION, "source": _identity(source)})
            with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=what, disable=not progress) as bar:
                for name in shards:
                    if (unfinished / name).exists():
                        bar.update(sizes[name])
                    else:
                        _write_whole(unfinished / name, partial(convert, source / name), bar.update)
            _copy_others(source, unfinished, shards)
            (unfinished / _STATE).unlink()
            if out.exists():
                out.rmdir()
            unfinished.rename(out)
    except CheckpointError:
        if not any((unfinished / name).exists() for name in shards):
            shutil.rmtree(unfinished)
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            done = sum((unfinished / name).exists() for name in shards)
            raise UnavailableError(
                f"{unfinished}: the disk is full; {done} of {len(shards)} files are finished and kept: free some space "
                "and run the same command again, it continues there"
            ) from error
        raise UnavailableError(f"{unfinished}: cannot be written: {error}") from error
    return out


def _require(shards: list[str], source: Path, *, packed_already: bool) -> None:
    for name in shards:
        is_packed = packed_format.is_packed(read_header(source / name))
        if is_packed and not packed_already:
            raise CheckpointError(f"{source / name}: is packed already; `djinn unpack` gives the original back")
        if packed_already and not is_packed:
            raise CheckpointError(f"{source / name}: is not packed, so there is nothing to unpack")


def _write_whole(
    path: Path, convert: Callable[[Path, Callable[[int], object]], None], on_done: Callable[[int], object]
) -> None:
    part = path.with_name(path.name + PARTIAL)
    try:
        convert(part, on_done)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _shards(source: Path) -> list[str]:
    """Return the names of the files that hold the checkpoint's tensors."""
    return sorted({_span(entry).path.name for entry in read_checkpoint(source).values()})


def _span(entry: TensorEntry) -> FileSpan:
    assert isinstance(entry.source, FileSpan)
    return entry.source


def _identity(source: Path) -> dict[str, Any]:
    """Return what says that the source is still the same: each file's size and time of change."""
    files = (path for path in sorted(source.iterdir()) if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _claim(unfinished: Path, state: dict[str, Any]) -> None:
    """Note whose the unfinished folder is.

    Raises:
        CheckpointError: it is of another source, or was begun by something else.
    """
    path = unfinished / _STATE
    begun = json.loads(path.read_text()) if path.is_file() else None
    if begun is None and any(unfinished.iterdir()):
        raise CheckpointError(f"{unfinished}: holds files that djinn has not begun; remove it")
    if begun not in (None, state):
        raise CheckpointError(f"{unfinished}: was begun from another source, or from this one as it was; remove it")
    if begun is None:
        path.write_text(json.dumps(state))


def _copy_others(source: Path, target: Path, shards: list[str]) -> None:
    """Copy the folder's other files; folders in it are left out, with a warning."""
    left_out = []
    for path in sorted(source.iterdir()):
        if path.is_dir():
            left_out.append(path.name)
        elif path.name not in shards:
            shutil.copy2(path, target / path.name)
    if left_out:
        warnings.warn(f"{source}: folders are left out: {', '.join(left_out)}", stacklevel=4)
