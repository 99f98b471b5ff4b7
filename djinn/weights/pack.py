"""``pack``: code a checkpoint once, so that loading it codes nothing; ``unpack``: the original files, byte for byte.

A folder is written beside its final name and renamed at the end. What was finished before an interruption is kept,
shard by shard, as long as the source is the same. Only regular files are read and written: a source's links are
followed within its folder and into the hub's cache, and an unfinished folder that holds any is not gone on with.
"""

from __future__ import annotations

import filecmp
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from djinn.codec.encode import layout_of
from djinn.devices import device_here
from djinn.errors import CheckpointError, ConfigError
from djinn.weights import packed_format
from djinn.weights.converted_folder import STATE, Convert, Work, written
from djinn.weights.experts import fused_experts
from djinn.weights.foreign import require_file
from djinn.weights.header import read_header
from djinn.weights.packed_format import original_of
from djinn.weights.packed_shard import is_candidate, pack_shard, read_tensor, unpack_shard, unpacked
from djinn.weights.rank_files import rank_tensors, ranks_of, refuse_cut
from djinn.weights.resolve import resolve
from djinn.weights.shards import read_checkpoint, read_shard, shard_files
from djinn.weights.tensors import TensorEntry, kind_of

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
        return kind_of(self.name.rpartition(": ")[2])

    @property
    def rank(self) -> str:
        """Whose part of a tensor it is, ``rank 0``, where all ranks' are listed; else nothing."""
        return self.name.rpartition(": ")[0]

    @property
    def bits(self) -> float:
        """Bits stored for every 16 of the weights."""
        return 16 * self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


def pack(model: str | Path, out: str | Path, *, device: str | None = None, progress: bool = False) -> Path:
    """Write the packed form of a checkpoint to folder ``out`` and return it; continues where it was interrupted.

    Args:
        model: a checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``.
        out: a folder that is not there yet, or empty; one that holds the result already is left as it is.
        device: where tensors are coded; by default a GPU where there is one.
        progress: show a bar of the bytes coded.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged or packed already, or an ``out`` that holds something.
        ConfigError: an ``out`` that is, holds or is in the source.
        UnavailableError: the disk is full; what was finished is kept.
    """
    source = resolve(str(model))
    convert = partial(pack_shard, device=device_here(device), experts=fused_experts(source))
    return _converted(source, Path(out), "pack", convert, progress)


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
    where, folder = device_here(device), resolve(str(model))
    is_cut = ranks_of(folder) is not None
    experts = {} if is_cut else fused_experts(folder)
    for name, entry in rank_tensors(folder) if is_cut else read_checkpoint(folder).items():
        yield tensor_size(name, entry, partial(read_tensor, entry), experts.get(name, 1), where)


def tensor_size(
    name: str, entry: TensorEntry, read: Callable[[], torch.Tensor], experts: int, device: torch.device
) -> TensorSize:
    """Return what packing would do to a tensor of so many ``experts``, whose bytes ``read`` gives; or what it did."""
    layouts = [part.layout for part in entry.stored_parts]
    if not entry.is_packed and is_candidate(entry, experts):
        layouts = [layout_of(part.to(device)) for part in read().view(entry.dtype).chunk(experts)]
    is_coded = all(layout is not None for layout in layouts)
    stored_bytes = packed_format.stored_bytes(entry, layouts) if is_coded else entry.raw_bytes
    return TensorSize(name, str(entry.dtype).removeprefix("torch."), entry.raw_bytes, stored_bytes, is_coded)


def plain_shards(source: Path) -> list[str]:
    """Return the names of the files of a whole checkpoint, each of which is to be packed.

    Raises:
        CheckpointError: a checkpoint that is damaged, packed already, or cannot be packed.
    """
    shards = _shards(source)
    _require(shards, source, packed_already=False)
    return shards


def cut(
    source: Path, out: Path, names: list[str], convert: Convert, agrees: Callable[[Path], bool], progress: bool
) -> Path:
    """Write files of these ``names``, by ``convert``, and the other files of a whole checkpoint to folder ``out``.

    ``agrees`` says whether a file that is there already is what ``convert`` would make.

    Raises:
        CheckpointError, ConfigError, UnavailableError: as for :func:`pack`.
    """
    source, out = _apart(source, out, "pack")
    others = [
        path for path in _others(source, plain_shards(source)) if not path.name.endswith(".safetensors.index.json")
    ]
    if _holds_something(out):
        _require_finished(out, names, others, agrees)
        return out
    raw_bytes = sum(entry.raw_bytes for entry in read_checkpoint(source).values())
    work = Work(f"pack for {len(names)} ranks", source, out, dict.fromkeys(names, raw_bytes // len(names)), others)
    return out if written(work, convert, progress) else cut(source, out, names, convert, agrees, progress)


def _converted(source: Path, out: Path, what: str, convert: _Convert, progress: bool) -> Path:
    source, out = _apart(source, out, what)
    shards = _shards(source)
    _require(shards, source, packed_already=what == "unpack")
    others = _others(source, shards)
    if _holds_something(out):
        packed, plain = (out, source) if what == "pack" else (source, out)
        _require_finished(out, shards, others, lambda path: _agree(packed / path.name, plain / path.name))
        return out
    sizes = {name: sum(entry.raw_bytes for entry in read_shard(source / name).values()) for name in shards}

    def convert_one(name: str, target: Path, on_done: Callable[[int], object]) -> None:
        convert(source / name, target, on_done)

    if written(Work(what, source, out, sizes, others), convert_one, progress):
        return out
    return _converted(source, out, what, convert, progress)


def _apart(source: Path, out: Path, what: str) -> tuple[Path, Path]:
    source, out = source.resolve(), out.expanduser().resolve()
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise ConfigError(f"{out}: {what} writes beside the source, not into {source}; choose another folder")
    return source, out


def _holds_something(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _require_finished(out: Path, names: list[str], others: list[Path], agrees: Callable[[Path], bool]) -> None:
    """Say that ``out`` is finished: it holds these files, which agree with the source, and copies of the ``others``.

    Raises:
        CheckpointError: it holds something else.
    """
    files = sorted([*names, *(path.name for path in others)])
    is_made_of = out.is_dir() and files == sorted(path.name for path in out.iterdir())
    is_made_of = is_made_of and all(filecmp.cmp(path, out / path.name, shallow=False) for path in others)
    if not is_made_of or not all(agrees(out / name) for name in names):
        raise CheckpointError(f"{out}: is there already; choose a folder that is empty or not there yet")
    warnings.warn(f"{out}: is finished already, from this source; nothing was written", stacklevel=4)


def _agree(packed: Path, plain: Path) -> bool:
    """Return whether ``packed`` is the packed form of the safetensors file ``plain``; reads both."""
    try:
        wanted = read_header(plain)
        if original_of(read_header(packed)).text != wanted.text:
            return False
        found = unpacked(packed, torch.device("cpu"))
        return all(torch.equal(weights, read_tensor(wanted.tensors[name])) for name, weights in found)
    except CheckpointError:
        return False


def _require(shards: list[str], source: Path, *, packed_already: bool) -> None:
    for name in shards:
        is_packed = packed_format.is_packed(read_header(source / name))
        if is_packed and not packed_already:
            raise CheckpointError(f"{source / name}: is packed already; `djinn unpack` gives the original back")
        if packed_already and not is_packed:
            raise CheckpointError(f"{source / name}: is not packed, so there is nothing to unpack")


def _shards(source: Path) -> list[str]:
    """Return the names of the files that hold the checkpoint's tensors, each of which is read once.

    Raises:
        CheckpointError: a checkpoint that is damaged, or has its files in folders of their own.
    """
    refuse_cut(source)
    read_checkpoint(source)
    shards = shard_files(source)
    for shard in shards:
        if shard.parent != source:
            raise CheckpointError(f"{shard}: is in a folder of its own; a packed checkpoint is one folder")
    return [shard.name for shard in shards]


def _others(source: Path, shards: list[str]) -> list[Path]:
    """Return the folder's other files; folders in it are left out, with a warning.

    Raises:
        CheckpointError: what is no regular file, or lies elsewhere than in the checkpoint or the hub's cache of it.
    """
    left_out = []
    others = []
    for path in sorted(source.iterdir()):
        if path.is_dir():
            left_out.append(path.name)
        elif path.name == STATE:
            raise CheckpointError(f"{path}: has the name of the note that djinn writes while it packs; rename it")
        elif path.name not in shards:
            require_file(path)
            true = path.resolve()
            if not (true.is_relative_to(source) or true.parent == source.parent.parent / "blobs"):
                raise CheckpointError(f"{path}: links to {true}, out of the checkpoint; put a copy or nothing there")
            others.append(path)
    if left_out:
        warnings.warn(f"{source}: folders are left out: {', '.join(left_out)}", stacklevel=4)
    return others
