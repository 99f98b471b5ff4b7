"""The index of a model for planning alone: headers are read, and nothing is converted or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers.utils.loading_report import LoadStateDictInfo

from djinn.codec.layout import Layout
from djinn.weights.index import WeightIndex, computed_weights, empty_for, indexed, require_all, warn_of
from djinn.weights.models import config_of
from djinn.weights.naming import naming
from djinn.weights.shards import read_checkpoint
from djinn.weights.stacked import stacked
from djinn.weights.tensors import Encoded, FileSpan, TensorEntry
from djinn.weights.ties import tie, untie


def header_index(folder: Path, dtype: torch.dtype | None = None) -> WeightIndex:
    """Return an index for planning alone, of a folder whose files may be headers without weights.

    ``dtype`` is as for :func:`checkpoint_index`.

    Nothing is converted or written: what transformers makes of several stored tensors has the shape and dtype that the
    model gives it, and stands for what will be written of it. Of what is tied and stored apart, only bytes tell whether
    it differs; those of headers alone are equal.

    Raises:
        CheckpointError: as for :func:`checkpoint_index`.
    """
    files = read_checkpoint(folder)
    model = empty_for(folder, config_of(folder), files, dtype)
    untie(model)
    names = naming(model, files, str(folder))
    stored = {name: files[found] for name, found in names.renamed.items()}
    stored |= stacked(model, files, names, folder)
    parameters = dict(model.named_parameters())
    for name, found in names.converted.items():
        if name in parameters and name not in stored:
            parts = [part for source in found for part in files[source].stored_parts]
            stored[name] = _standing_for(parameters[name], parts)
    entries = tie(model, stored, folder)
    info = LoadStateDictInfo(
        missing_keys=model.state_dict().keys() - entries.keys() - names.converted.keys(),
        unexpected_keys=set(names.unknown),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    require_all(folder, model, info.missing_keys, ())
    warn_of(info.unexpected_keys, model, folder)
    made = computed_weights(model, [name for name in dict(model.named_parameters()) if name not in entries], folder)
    entries |= {name: TensorEntry(value.dtype, tuple(value.shape), FileSpan(folder, 0)) for name, value in made.items()}
    return indexed(model, entries, folder)


def _standing_for(parameter: nn.Parameter, parts: list[TensorEntry]) -> TensorEntry:
    """Return an entry, for planning alone, of a parameter that ``parts`` will be converted to."""
    made = TensorEntry(parameter.dtype, tuple(parameter.shape), _sample(parts, parameter.nbytes))
    layouts = [part.layout for part in parts]
    if parameter.dtype != torch.bfloat16 or not all(layouts):
        return made
    # Packed weights are unpacked to be converted, and coded again while they are loaded.
    escapes = sum(layout.escapes for layout in layouts if layout is not None)
    assert isinstance(made.source, FileSpan)
    elements = parameter.numel()
    return replace(made, source=Encoded(made.source), layout=Layout(elements, min(escapes, elements)))


def _sample(parts: list[TensorEntry], nbytes: int) -> FileSpan:
    """Return where bytes like those of ``parts`` are: ``nbytes`` of one file, from the first part or before it."""
    first = parts[0].source
    assert isinstance(first, FileSpan)
    return FileSpan(first.path, max(min(first.offset, first.path.stat().st_size - nbytes), 0))
