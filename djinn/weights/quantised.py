"""Quantised checkpoints: transformers loads them into host memory, from where their bytes stream as they are.

Only methods that a test holds against the resident model are taken. Where the bytes of a weight lie beside it (scales,
code books), these stay on the device, where there is also room for one weight as it is multiplied: dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from djinn.errors import CheckpointError, PlanError
from djinn.hardware import usable_ram
from djinn.sizes import format_bytes
from djinn.weights.foreign import parse_object, refusing
from djinn.weights.index import Reads, WeightIndex
from djinn.weights.inputs import example_inputs
from djinn.weights.models import config_of, empty_model, model_class, quiet
from djinn.weights.shards import read_checkpoint
from djinn.weights.tensors import InMemory, TensorEntry
from djinn.weights.tracing import read_by_block, traced_readers

IN_MEMORY = ("bitsandbytes_4bit", "torchao Int8WeightOnlyConfig", "torchao Int8DynamicActivationInt8WeightConfig")
"""Loaded by transformers into host memory, and streamed from there."""
DEQUANTISED = "fp8"
"""Without a GPU, transformers makes bfloat16 weights of these while it loads them: then they are ordinary ones."""


def quantisation_of(folder: Path) -> str | None:
    """Return the name of the method by which the checkpoint in ``folder`` is quantised, None where it is not."""
    try:
        found = parse_object((folder / "config.json").read_bytes())["quantization_config"]
        method = str(found["quant_method"])
    except Exception:  # of whatever is wrong with it; what the config is loaded by says what
        return None
    if method == "bitsandbytes":
        return f"{method}_{'4bit' if found.get('load_in_4bit') else '8bit'}"
    if method == "torchao":
        return f"{method} {_torchao_type(found.get('quant_type'))}"
    return method


def _torchao_type(config: Any) -> str:
    """Return the name of the config that torchao has used, or names if it has used several."""
    kinds = config.values() if isinstance(config, dict) else [config]
    return ", ".join(str(kind.get("_type") if isinstance(kind, dict) else kind) for kind in kinds)


def require_streamable(folder: Path, method: str) -> None:
    """Refuse a quantised checkpoint that is not known to stream right.

    Raises:
        CheckpointError: says which method, and what streams instead.
    """
    if method not in IN_MEMORY and not (method == DEQUANTISED and not torch.cuda.is_available()):
        raise CheckpointError(
            f"{folder}: quantised by {method}, which djinn does not stream; use a checkpoint of unquantised weights, "
            "which coding lossless makes a third smaller (of quantised ones it streams "
            f"{', '.join(IN_MEMORY)}, and {DEQUANTISED} where there is no GPU)"
        )


def quantised_index(folder: Path, dtype: torch.dtype | None, device: torch.device) -> WeightIndex:
    """Return the index of a model that transformers has loaded into host memory, quantised as it is stored.

    It is to run on ``device``.

    Raises:
        CheckpointError: a checkpoint that is packed or damaged.
        PlanError: host memory does not hold it.
        UnavailableError: the package that its method needs is not installed.
    """
    files = read_checkpoint(folder)
    if any(entry.is_packed for entry in files.values()):
        raise CheckpointError(f"{folder}: packed and quantised, which djinn does not load; djinn.unpack it first")
    needed = sum(entry.nbytes for entry in files.values())
    if needed > usable_ram():
        raise PlanError(
            f"host memory: a quantised checkpoint is loaded whole and needs {format_bytes(needed)}, but "
            f"{format_bytes(usable_ram())} are free"
        )
    config: Any = config_of(folder)
    with refusing(f"{folder}: transformers cannot load it"), quiet():
        model: PreTrainedModel = model_class(config).from_pretrained(
            folder, dtype=dtype or "auto", device_map={"": "cpu"}, local_files_only=True, trust_remote_code=False
        )
    model.eval()
    model.requires_grad_(False)
    if device.type == "cpu":
        _run_once(model)
    leaves = {name: dict(_leaves(name, parameter)) for name, parameter in model.named_parameters()}
    tensors = {
        name: TensorEntry(leaf.dtype, tuple(leaf.shape), InMemory(leaf))
        for parts in leaves.values()
        for name, leaf in parts.items()
    }
    gaps = [name for parts in leaves.values() for name, leaf in parts.items() if not leaf.is_contiguous()]
    if gaps:
        raise CheckpointError(f"{folder}: tensor {gaps[0]} does not lie in the order of its shape in memory")
    # The same modules read the same names in the model as it was before it was quantised, on the meta device.
    del config.quantization_config
    readers = traced_readers(empty_model(config, model.dtype))
    readers |= {name: by for name, by in read_by_block(model).items() if name not in readers}
    reads: Reads = [(leaf, (reader,)) for name, by in readers.items() for leaf in leaves[name] for reader in by]
    return WeightIndex(model, tensors, synthetic=False, reads=reads, kept_bytes=quantised_bytes(model))


def _leaves(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the plain tensors that a parameter is made of, by name: itself, or the parts of a tensor subclass."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _leaves(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def _run_once(model: PreTrainedModel) -> None:
    """Let the method do what it leaves to the first pass: on some CPUs it then packs its weights anew."""
    inputs = next(example_inputs(model))
    with torch.no_grad():
        model(**{name: torch.zeros_like(value, device="cpu") for name, value in inputs.items()})


def gather_states(model: nn.Module) -> int:
    """Move what quantised parameters keep beside their own bytes to where those are; return its bytes."""
    for parameter, state in _states(model):
        state.to(parameter.device)
    return states_bytes(model)


def quantised_bytes(model: nn.Module) -> int:
    """Return the device memory that quantised parameters need beside their own bytes.

    What they keep there, and the largest of them once a multiplication has made floating point numbers of it.
    """
    weights = [(state.shape, state.dtype) for _, state in _states(model)]
    whole = (each for each in model.parameters() if not isinstance(each, DTensor))
    weights += [(each.shape, each.dtype) for each in whole if is_traceable_wrapper_subclass(each)]
    return states_bytes(model) + max((shape.numel() * dtype.itemsize for shape, dtype in weights), default=0)


def _states(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """Yield the parameters that keep something beside their own bytes, and what they keep."""
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            yield parameter, state


def states_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Return the size of what quantised parameters keep beside their own bytes, on ``device`` if one is given."""
    parts = [
        part for _, state in _states(model) for part in (state, getattr(state, "state2", None)) if part is not None
    ]
    kept = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept if device in (None, value.device))
