"""Where every tensor's bytes are: a model without weights, and for each of its parameters a file span or a seed.

transformers itself maps the names: it is asked to load the checkpoint "to disk", which leaves every parameter on the
meta device, computes the buffers, ties what the config ties, and yields for each parameter the file and the name it has
there. It touches one page of each tensor (and the kernel reads ahead from there); only weights that it converts are
read, and written anew, to ``spill``. Experts that it would only stack stay where they are: it is shown a checkpoint in
which they are stacked already (see :mod:`djinn.weights.stacked`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from djinn.errors import CheckpointError, UnavailableError
from djinn.sizes import format_bytes
from djinn.weights.foreign import refusing
from djinn.weights.models import computed, config_of, empty_model, model_class, quiet
from djinn.weights.naming import naming
from djinn.weights.shards import read_checkpoint, read_shard
from djinn.weights.stacked import stacked
from djinn.weights.stand_in import with_stacks
from djinn.weights.tensors import InMemory, Seeded, TensorEntry
from djinn.weights.ties import tie

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
    ranks: int = 1
    """Processes among which heads and MLPs are divided; ``tensors`` are then what this one holds."""
    is_cut: bool = False
    """Whether ``tensors`` are one rank's already, of a model that is still to be distributed."""
    sums: int = 0
    """Times in a pass that what ranks have computed is added up."""

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
        UnavailableError: no room for what is converted, or a package that the model needs.
    """
    files = read_checkpoint(folder)
    config = config_of(folder)
    empty = empty_for(folder, config, files, dtype)
    names = naming(empty, files, str(folder))
    parameters = dict(empty.named_parameters())
    is_quantised = getattr(config, "quantization_config", None) is not None
    is_packed = any(entry.is_packed for entry in files.values())
    in_place = {} if is_quantised else stacked(empty, files, names, folder)
    converted = names.converted.keys() - in_place.keys()
    written = parameters.keys() if is_quantised else parameters.keys() & converted
    needed = sum(parameters[name].nbytes for name in written)
    # Of a checkpoint that stands in for this one transformers reads buffers, and weights that it converts.
    read = {found for name, found in names.renamed.items() if name not in parameters}
    read |= {part for name in converted for part in names.converted[name]}
    if is_packed or in_place:
        needed += sum(files[name].raw_bytes for name in read)
    _require_room(spill, needed)
    shown = folder
    if is_packed or in_place:
        apart = {part for name in in_place for part in names.converted[name]}
        whole = {name: entry for name, entry in files.items() if name not in apart} | in_place
        shown = with_stacks(folder, spill / "original", whole, read)
    model, where, extra = _on_disk(folder, shown, config, spill, dtype)
    if in_place:
        model._weight_conversions = list(names.used)  # type: ignore[assignment]  # of those that it has not been shown
    warn_of(extra, model, folder)
    spilled: dict[str, dict[str, TensorEntry]] = {}
    stored = {}
    for name, place in where.items():
        path = Path(place["safetensors_file"])
        found = None if is_quantised else names.renamed.get(name)
        if name in in_place:
            stored[name] = in_place[name]
        elif found is None and path.parent == spill:
            stored[name] = spilled.setdefault(str(path), read_shard(path))[place["weight_name"]]
        else:
            stored[name] = files[found or place["weight_name"]]
    return indexed(model, tie(model, stored, folder), folder)


def _require_room(spill: Path, needed: int) -> None:
    free = shutil.disk_usage(spill if spill.is_dir() else spill.parent).free
    if needed > free:
        raise UnavailableError(
            f"{spill}: {format_bytes(needed)} of weights that transformers converts are written there, and "
            f"{format_bytes(free)} are free; set TMPDIR to a folder with more room"
        )


def _on_disk(
    folder: Path, shown: Path, config: PretrainedConfig, spill: Path, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, dict[str, str]], set[str]]:
    """Return the model on the meta device, where transformers found each parameter, and what it has no place for.

    A place is a file, a name there and a dtype. The files are those of ``shown``, which stands in for ``folder``.
    """
    with refusing(f"{folder}: transformers cannot load it"), quiet():
        loaded: Any = model_class(config).from_pretrained(
            shown,
            dtype=dtype or "auto",
            device_map={"": "disk"},
            offload_folder=spill,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model: PreTrainedModel
        model, info = loaded
    model.name_or_path = model.config.name_or_path = str(folder)
    require_all(folder, model, info["missing_keys"], info["mismatched_keys"])
    where = _disk_index(model)
    stored = {*where, *model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    made = [name for name, _ in model.named_parameters() if name not in stored]
    for name in made:
        vars(model.get_submodule(name.rpartition(".")[0])).pop("_hf_hook")  # its removal would look for their files
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the hook's removal leaves a bound copy of the class's own
    where |= _written(computed_weights(model, made, folder), spill)
    _keep_dtypes(model)
    return model, where, info["unexpected_keys"]


def computed_weights(model: PreTrainedModel, names: Iterable[str], folder: Path) -> dict[str, torch.Tensor]:
    """Return parameters that the files do not hold, as the model computes them when it is built: fixed positions.

    Raises:
        CheckpointError: one that the model leaves to chance.
    """
    values = {name: computed(model, name) for name in names}
    chance = [name for name, value in values.items() if value is None]
    if chance:
        raise CheckpointError(
            f"{folder}: its files do not hold {', '.join(chance[:5])}, which {type(model).__name__} would make random "
            "numbers of"
        )
    return {name: value for name, value in values.items() if value is not None}


def _written(values: Mapping[str, torch.Tensor], spill: Path) -> dict[str, dict[str, str]]:
    """Write computed weights to ``spill``; return their places."""
    if not values:
        return {}
    path = spill / "computed.safetensors"
    save_file(dict(values), path)
    return {name: {"safetensors_file": str(path), "weight_name": name} for name in values}


def require_all(folder: Path, model: PreTrainedModel, missing: Iterable[Any], mismatched: Iterable[Any]) -> None:
    for kind, found in (("missing", list(missing)), ("mismatched", list(mismatched))):
        if found:
            names = ", ".join(sorted(map(str, found))[:5])
            raise CheckpointError(f"{folder}: {len(found)} {kind} tensors: {names}")


def warn_of(extra: Iterable[str], model: PreTrainedModel, folder: Path) -> None:
    names = sorted(extra)
    if names:
        some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        warnings.warn(f"{folder}: {type(model).__name__} has no place for {len(names)} tensors: {some}", stacklevel=3)


def indexed(model: PreTrainedModel, entries: Mapping[str, TensorEntry], folder: Path) -> WeightIndex:
    """Return the index of a model whose parameters have ``entries``.

    Raises:
        CheckpointError: a parameter of another shape.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        entry = entries[name]
        if entry.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(entry.shape)}, but config.json asks for "
                f"{list(parameter.shape)}"
            )
        tensors[name] = entry.to(parameter.dtype)
    return WeightIndex(_ready(model), tensors, synthetic=False)


def synthetic_index(model: PreTrainedModel, seed: int) -> WeightIndex:
    """Return the index of a model (made by :func:`empty_model`) whose weights are seeded random numbers."""
    tensors = {
        name: TensorEntry(parameter.dtype, tuple(parameter.shape), Seeded(name, seed))
        for name, parameter in model.named_parameters()
    }
    return WeightIndex(_ready(model), tensors, synthetic=True)


def empty_for(
    folder: Path, config: PretrainedConfig, files: Mapping[str, TensorEntry], dtype: torch.dtype | None
) -> PreTrainedModel:
    """Return the model of ``config`` with meta parameters in the dtypes in which it will be loaded."""
    with refusing(f"{folder}: transformers cannot make its model"), quiet():
        stored = next((entry.dtype for entry in files.values() if entry.dtype.is_floating_point), torch.float32)
        model = empty_model(config, dtype or getattr(config, "dtype", None) or stored)
        _keep_dtypes(model)
    return model


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
