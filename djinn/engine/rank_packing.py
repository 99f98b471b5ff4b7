"""``pack``: code a checkpoint once, whole or cut for ranks, each of which then reads a file of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from djinn.devices import device_here
from djinn.engine.coding import Coder
from djinn.engine.sharding import pretended, sharded
from djinn.errors import CheckpointError, ConfigError
from djinn.spill import spill_folder
from djinn.transport.reader import allocate, settle
from djinn.weights import pack as whole
from djinn.weights.experts import by_expert
from djinn.weights.header import plain_header, read_header
from djinn.weights.opening import index_of
from djinn.weights.pack import TensorSize
from djinn.weights.packed_format import original_of
from djinn.weights.packed_shard import stacks_of, unpacked, write_packed
from djinn.weights.rank_files import file_name, rank_of, ranked
from djinn.weights.resolve import resolve
from djinn.weights.tensors import PAGE, InMemory, TensorEntry
from djinn.weights.units import PlacedTensor, Unit, find_units

_CHUNK = 64 * 2**20


def pack(
    model: str | Path, out: str | Path, *, ranks: int = 1, device: str | None = None, progress: bool = False
) -> Path:
    """Write the packed form of a checkpoint to folder ``out`` and return it; continues where it was interrupted.

    Args:
        model: a checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``.
        out: a folder that is not there yet, or empty; one that holds the result already is left as it is.
        ranks: of several, each gets a file with what transformers' tensor parallelism gives it, in the order in which a
            pass reads it. Only as many ranks can load that.
        device: where tensors are coded; by default a GPU where there is one.
        progress: show a bar of the bytes coded.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged or packed already, or an ``out`` that holds something.
        ConfigError: an ``out`` that is, holds or is in the source; or a model that cannot be split over ``ranks``.
        UnavailableError: the disk is full; what was finished is kept.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"ranks {ranks!r}: it is a whole number of at least 1")
    if ranks == 1:
        return whole.pack(model, out, device=device, progress=progress)
    source = resolve(str(model))
    names = [file_name(rank, ranks) for rank in range(ranks)]
    convert = partial(_write_rank, source, ranks, device_here(device))
    return whole.cut(source, Path(out), names, convert, partial(_agrees, source, ranks), progress)


def survey(model: str | Path, *, ranks: int = 1, device: str | None = None) -> Iterator[TensorSize]:
    """Yield what packing would do to each tensor of a checkpoint, those of every rank; of a packed one, what it did.

    Raises:
        CheckpointError, ConfigError: as for :func:`pack`.
    """
    if ranks == 1:
        yield from whole.survey(model, device=device)
        return
    where, source = device_here(device), resolve(str(model))
    whole.plain_shards(source)
    for rank in range(ranks):
        with _held(source, ranks, rank) as held:
            header = plain_header(Path(file_name(rank, ranks)), held.tensors)
            experts = stacks_of(header, held.experts)
            for name, entry in header.tensors.items():
                read = partial(held.read, name)
                yield whole.tensor_size(ranked(rank, name), entry, read, experts.get(name, 1), where)


def _write_rank(
    source: Path, ranks: int, device: torch.device, name: str, target: Path, on_done: Callable[[int], object]
) -> None:
    """Write what a rank, that of the file's ``name``, holds of a checkpoint, packed."""
    with _held(source, ranks, rank_of(name)) as held:
        write_packed(plain_header(target, held.tensors), held.read, target, on_done, device, held.experts)


def _agrees(source: Path, ranks: int, path: Path) -> bool:
    """Return whether a rank's file is the packed form of what that rank holds of a checkpoint; reads both."""
    with _held(source, ranks, rank_of(path.name)) as held:
        try:
            if original_of(read_header(path)).text != plain_header(path, held.tensors).text:
                return False
            return all(torch.equal(weights, held.read(name)) for name, weights in unpacked(path, torch.device("cpu")))
        except CheckpointError:
            return False


@dataclass(frozen=True)
class _Held:
    """What a rank holds of a checkpoint, raw."""

    tensors: Mapping[str, TensorEntry]
    experts: Mapping[str, int]
    """Of tensors that hold several experts' weights, how many each has."""
    read: Callable[[str], torch.Tensor]
    """Returns a tensor's bytes (uint8, on the host)."""


@contextmanager
def _held(source: Path, ranks: int, rank: int) -> Iterator[_Held]:
    here = torch.device("cpu")
    with ExitStack() as undo, torch.inference_mode(False):
        config = undo.enter_context(pretended(ranks, rank))
        index = sharded(index_of(source, undo.enter_context(spill_folder()), here), config)
        units = by_expert(find_units(index), index.model)
        tensors = {tensor.name: tensor.entry.raw for unit in units for tensor in unit.tensors}
        counts = {tensor.name: len(unit.experts) for unit in units if unit.experts for tensor in unit.tensors}
        buffers = _kept_buffers(index.model)
        coder = Coder.on(here, _CHUNK, undo)
        one_at_a_time = threading.Lock()  # the coder has one set of buffers

        def read(name: str) -> torch.Tensor:
            if name in buffers:
                return buffers[name].reshape(-1).view(torch.uint8)
            unit = Unit("", (), (PlacedTensor(name, tensors[name], 0),))
            made = allocate(unit.image_bytes + PAGE)
            with one_at_a_time:
                settle(coder.fill(unit, made))
            return torch.from_numpy(made[: tensors[name].nbytes])

        kept = {name: TensorEntry(value.dtype, tuple(value.shape), InMemory(value)) for name, value in buffers.items()}
        yield _Held(tensors | kept, counts, read)


def _kept_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the buffers that a checkpoint of the model has, contiguous."""
    saved = model.state_dict().keys()
    return {name: buffer.contiguous() for name, buffer in model.named_buffers() if name in saved}
