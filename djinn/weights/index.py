"""Where every tensor's bytes are: a model without weights, and for each of its parameters a file span or a seed.

transformers itself maps the names: it is asked to load the checkpoint "to disk", which leaves every parameter on the
meta device, computes the buffers, ties what the config ties, and yields for each parameter the file and the name it has
there. It touches one page of each tensor (and the kernel reads ahead from there); only weights that it converts (fused
experts) are read, and written anew, to ``spill``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from djinn.errors import CheckpointError
from djinn.weights.models import computed, empty_model, model_class, owners, quiet
from djinn.weights.packed_shard import hollow_shard, unpack_shard
from djinn.weights.shards import read_checkpoint, read_shard
from djinn.weights.tensors import FileSpan, InMemory, Seeded, TensorEntry

Model = TypeVar("Model", bound=nn.Module)

Reads = list[tuple[str, tuple[str, ...]]]
"""Every read of a pass, in order: the parameter's first name, and the modules running, outermost first."""


@dataclass(frozen=True)
class WeightIndex(Generic[Model]):
    """A model and the source of each of its parameters, which are on the meta device unless they are the source.

    ``tensors`` holds every parameter once, under the first of its names; tied parameters are one object in ``model``.
    """

    model: Model
    tensors: dict[str, TensorEntry]
    synthetic: bool
    reads: Reads | None = None
    """What a recorded pass has read, where there was one: for units in its order (see :mod:`djinn.weights.units`)."""
    kept_bytes: int = 0
    """Of what the weights need beside them on the device: scales of quantised ones, and one of them dequantised."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, ties counted once."""
        return sum(entry.raw_bytes for entry in self.tensors.values())

    @property
    def in_host_memory_bytes(self) -> int:
        """Bytes of the weights that are in host memory already, and are freed there while they are taken."""
        held = (
            (entry.raw_bytes, entry.source.parameter.device)
            for entry in self.tensors.values()
            if isinstance(entry.source, InMemory)
        )
        return sum(nbytes for nbytes, device in held if device.type == "cpu")


def checkpoint_index(folder: Path, spill: Path, dtype: torch.dtype | None = None) -> WeightIndex:
    """Return the index of the checkpoint in ``folder``; converted and computed weights are written to ``spill``.

    As in transformers, ``dtype`` is that of floating point weights, by default the config's, and some models keep some
    of theirs in float32; what is stored in another one is converted when it is loaded. Tensors that the model does not
    have are ignored, with a warning.

    Raises:
        CheckpointError: a damaged checkpoint, missing tensors, or one whose shape is not what the config asks for.
    """
    files = read_checkpoint(folder)
    if any(entry.crc32 is not None for entry in files.values()):
        # transformers knows the original names, shapes and dtypes; only weights that it converts does it read.
        original = spill / "original"
        _restore(folder, files, original, hollow_shard)
        model, where, extra = _on_disk(original, spill, dtype)
        if any(Path(place["safetensors_file"]).parent == spill for place in where.values()):
            _restore(folder, files, original, partial(unpack_shard, device=torch.device("cpu"), on_done=lambda _: None))
            model, where, extra = _on_disk(original, spill, dtype)
    else:
        model, where, extra = _on_disk(folder, spill, dtype)
    if extra:
        some = ", ".join(sorted(extra)[:5]) + ", ..." * (len(extra) > 5)
        warnings.warn(f"{folder}: {type(model).__name__} has no place for {len(extra)} tensors: {some}", stacklevel=2)
    spilled: dict[str, dict[str, TensorEntry]] = {}
    tensors = {}
    for name, parameter in model.named_parameters():
        place = where[name]
        path = Path(place["safetensors_file"])
        if path.parent == spill:
            entry = spilled.setdefault(str(path), read_shard(path))[place["weight_name"]]
        else:
            entry = files[place["weight_name"]]
        if entry.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, but config.json asks for {list(parameter.shape)}"
            )
        tensors[name] = entry.to(parameter.dtype)
    return WeightIndex(_ready(model), tensors, synthetic=False)


def _restore(
    folder: Path, files: Mapping[str, TensorEntry], original: Path, write: Callable[[Path, Path], None]
) -> None:
    """Make ``original`` what the packed checkpoint in ``folder`` was; ``write`` makes a shard from a packed one."""
    original.mkdir(exist_ok=True)
    shards = {entry.source.path for entry in files.values() if isinstance(entry.source, FileSpan)}
    for shard in shards:
        write(shard, original / shard.name)
    for path in folder.iterdir():
        if path.suffix == ".json" and not (original / path.name).exists():
            (original / path.name).symlink_to(path.absolute())


def _on_disk(
    folder: Path, spill: Path, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, dict[str, str]], set[str]]:
    """Return the model on the meta device, where transformers found each parameter, and what it has no place for.

    A place is a file, a name there and a dtype.
    """
    try:
        with quiet():
            loaded: Any = model_class(AutoConfig.from_pretrained(folder, local_files_only=True)).from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map={"": "disk"},
                offload_folder=spill,
                output_loading_info=True,
                local_files_only=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    model: PreTrainedModel
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:5])
            raise CheckpointError(f"{folder}: {len(info[kind])} {kind.replace('_keys', ' tensors')}: {names}")
    where = _disk_index(model)
    made = [
        name for name, _ in model.named_parameters() if name not in where and name not in model.all_tied_weights_keys
    ]
    for name in made:
        vars(model.get_submodule(name.rpartition(".")[0])).pop("_hf_hook")  # its removal would look for their files
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the hook's removal leaves a bound copy of the class's own
    values = {name: computed(model, name) for name in made}
    chance = [name for name, value in values.items() if value is None]
    if chance:
        raise CheckpointError(
            f"{folder}: its files do not hold {', '.join(chance[:5])}, which {type(model).__name__} would make random "
            "numbers of"
        )
    if values:
        path = spill / "computed.safetensors"
        save_file({name: value for name, value in values.items() if value is not None}, path)
        where |= {name: {"safetensors_file": str(path), "weight_name": name} for name in values}
    _tie(model)
    _keep_dtypes(model)
    return model, where, info["unexpected_keys"]


def synthetic_index(model: PreTrainedModel, seed: int) -> WeightIndex:
    """Return the index of a model (made by :func:`empty_model`) whose weights are seeded random numbers."""
    tensors = {
        name: TensorEntry(parameter.dtype, tuple(parameter.shape), Seeded(name, seed))
        for name, parameter in model.named_parameters()
    }
    return WeightIndex(_ready(model), tensors, synthetic=True)


def header_index(folder: Path, dtype: torch.dtype | None = None) -> WeightIndex:
    """Return an index for planning alone, of a folder whose files may be headers without weights.

    ``dtype`` is as for :func:`checkpoint_index`.

    Nothing is read or converted: what has another name in the files, or is made of several tensors there, has the
    shape and dtype that the model gives it.

    Raises:
        CheckpointError: a damaged header, or a config that transformers has no model for.
    """
    files = read_checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        stored = next((entry.dtype for entry in files.values() if entry.dtype.is_floating_point), torch.float32)
        model = empty_model(config, dtype or getattr(config, "dtype", None) or stored)
        _keep_dtypes(model)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder.name}: transformers cannot make its model: {error}") from error
    tensors = {}
    for name, parameter in model.named_parameters():
        found = files.get(name)
        if found is None or found.shape != tuple(parameter.shape):
            found = TensorEntry(parameter.dtype, tuple(parameter.shape), FileSpan(folder, 0))
        tensors[name] = found.to(parameter.dtype)
    return WeightIndex(_ready(model), tensors, synthetic=False)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()
    model.requires_grad_(False)
    return model


def _disk_index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return what transformers' disk offload noted for each parameter: file, name there, dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for inner in getattr(hook, "hooks", [hook]):
            weights_map = getattr(inner, "weights_map", None)
            if weights_map is not None:
                return weights_map.dataset.index
    return {}


def _keep_dtypes(model: PreTrainedModel) -> None:
    """Give meta parameters the dtypes in which transformers keeps them whatever the model's is, when it loads them."""
    dtype: Any = model.config.dtype
    kept = model._get_dtype_plan(dtype)
    if kept:
        pattern, groups, _ = build_glob_alternation(list(kept))
        for name, parameter in model.named_parameters():
            found = pattern.search(name)
            if found is not None and found.lastgroup is not None:
                parameter.data = parameter.data.to(kept[groups[found.lastgroup]])


def _tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object again: offload hooks replace them name by name."""
    parameters = {name: (module, local) for name, module, local, _ in owners(model)}
    for target, source in model.all_tied_weights_keys.items():
        module, local = parameters[source]
        tied_module, tied_local = parameters[target]
        tied_module._parameters[tied_local] = module._parameters[local]
