"""Where every tensor's bytes are: a model without weights, and for each of its parameters a file span or a seed.

transformers itself maps the names: it is asked to load the checkpoint "to disk", which leaves every parameter on the
meta device, computes the buffers, ties what the config ties, and yields for each parameter the file and the name it has
there. It touches one page of each tensor (and the kernel reads ahead from there); only weights that it converts (fused
experts) are read, and written anew, to ``spill``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from djinn.codec.layout import Layout
from djinn.errors import CheckpointError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that torch has."""

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format (its Rust reader refuses larger headers)."""


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file, from ``offset``."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Seeded:
    """Bytes made on demand by :func:`djinn.weights.synthetic.fill` under this tensor name and seed."""

    name: str
    seed: int


@dataclass(frozen=True)
class Encoded:
    """Bytes made by coding those of another source."""

    raw: FileSpan | Seeded


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: what it is, where its bytes come from, and how they are coded, if they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: FileSpan | Seeded | Encoded
    layout: Layout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept and travel: those of the blob where the tensor is coded."""
        return self.raw_bytes if self.layout is None else self.layout.nbytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of the weights as a model computes with them."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def raw(self) -> TensorEntry:
        """The tensor before it was coded; itself where it is not coded while loading."""
        return TensorEntry(self.dtype, self.shape, self.source.raw) if isinstance(self.source, Encoded) else self


@dataclass(frozen=True)
class WeightIndex:
    """A model whose parameters are on the meta device, and the source of each.

    ``tensors`` holds every parameter once, under the first of its names; tied parameters are one object in ``model``.
    """

    model: PreTrainedModel
    tensors: dict[str, TensorEntry]
    synthetic: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, ties counted once."""
        return sum(entry.raw_bytes for entry in self.tensors.values())


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors that a safetensors file declares, checked against the file's real size.

    Raises:
        CheckpointError: not a safetensors file, truncated, or tensors that overlap or lie outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a safetensors file, or cut off inside its header ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    try:
        return _checked(path, header, 8 + length, size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header is not safetensors': {error!r}") from None


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    header.pop("__metadata__", None)
    tensors: dict[str, TensorEntry] = {}
    end = 0
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, stop = item["data_offsets"]
        if item["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {item['dtype']}, which this torch does not have")
        entry = TensorEntry(DTYPES[item["dtype"]], tuple(item["shape"]), FileSpan(path, start + begin))
        if stop - begin != entry.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name} spans {stop - begin} bytes, but {item['dtype']} {list(entry.shape)} needs "
                f"{entry.nbytes}"
            )
        if begin < end:
            raise CheckpointError(f"{path}: tensor {name} begins at {begin}, inside the tensor that ends at {end}")
        if start + stop > size:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {start + stop}, but the file has {size}: it is truncated; "
                "download or write it again"
            )
        tensors[name] = entry
        end = stop
    return tensors


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors checkpoint in ``folder`` under its name in the files.

    Raises:
        CheckpointError: no checkpoint there, a shard that is missing or outside the folder, a tensor that its shard
            does not have, or a damaged file.
    """
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():  # first, as transformers does
        return read_header(single)
    if not index_path.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
        shards = sorted({os.fspath(shard) for shard in weight_map.values()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index_path}: not a safetensors index: {error!r}") from None
    headers: dict[str, dict[str, TensorEntry]] = {}
    for shard in shards:
        path = folder / shard
        if not path.parent.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{index_path}: names {shard!r}, which is outside the checkpoint folder")
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names {shard}, which is not there")
        headers[shard] = read_header(path)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index_path}: places {name} in {shard}, which does not have it")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def checkpoint_index(folder: Path, spill: Path) -> WeightIndex:
    """Return the index of the checkpoint in ``folder``; converted weights are written to ``spill``.

    Raises:
        CheckpointError: a damaged checkpoint, missing or unexpected tensors, or one whose shape or dtype is not what
            the config asks for.
    """
    files = read_checkpoint(folder)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=spill,
                output_loading_info=True,
                local_files_only=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    model: PreTrainedModel
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:5])
            raise CheckpointError(f"{folder}: {len(info[kind])} {kind.replace('_keys', ' tensors')}: {names}")
    where = _disk_index(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the hook's removal leaves a bound copy of the class's own
    _tie(model)
    spilled: dict[str, dict[str, TensorEntry]] = {}
    tensors = {}
    for name, parameter in model.named_parameters():
        place = where[name]
        path = Path(place["safetensors_file"])
        if path.parent == spill:
            entry = spilled.setdefault(str(path), read_header(path))[place["weight_name"]]
        else:
            entry = files[place["weight_name"]]
        for what, found, wanted in (
            ("shape", list(entry.shape), list(parameter.shape)),
            ("dtype", entry.dtype, parameter.dtype),
        ):
            if found != wanted:
                raise CheckpointError(f"{path}: tensor {name} has {what} {found}, but config.json asks for {wanted}")
        tensors[name] = entry
    return WeightIndex(_ready(model), tensors, synthetic=False)


def synthetic_index(model: PreTrainedModel, seed: int) -> WeightIndex:
    """Return the index of a model (made by :func:`empty_model`) whose weights are seeded random numbers."""
    tensors = {
        name: TensorEntry(parameter.dtype, tuple(parameter.shape), Seeded(name, seed))
        for name, parameter in model.named_parameters()
    }
    return WeightIndex(_ready(model), tensors, synthetic=True)


def empty_model(config: object, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model of ``config`` with meta parameters, real buffers and ties made."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, owning module, its name there, parameter) for every name, tied ones included."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), module, name, parameter


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence bars and warnings about loading for a while: nothing is loaded, and what is wrong is raised."""
    accelerate = logging.getLogger("accelerate")
    levels = hf_logging.get_verbosity(), accelerate.level
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(levels[0])
        accelerate.setLevel(levels[1])
        if bars:
            hf_logging.enable_progress_bar()


def _disk_index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return what transformers' disk offload noted for each parameter: file, name there, dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for inner in getattr(hook, "hooks", [hook]):
            weights_map = getattr(inner, "weights_map", None)
            if weights_map is not None:
                return weights_map.dataset.index
    return {}


def _tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object again: offload hooks replace them name by name."""
    parameters = {name: (module, local) for name, module, local, _ in owners(model)}
    for target, source in model.all_tied_weights_keys.items():
        module, local = parameters[source]
        tied_module, tied_local = parameters[target]
        tied_module._parameters[tied_local] = module._parameters[local]
