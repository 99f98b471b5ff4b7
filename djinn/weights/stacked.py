"""Experts that a checkpoint keeps as separate tensors, and a model as one: read in place, from where they are.

transformers stacks them when it loads them: of each expert the gate on top of the up projection, and one expert after
the other. So the bytes of what it makes are those of the files, in that order, and no copy has to be made of them. Of
a packed checkpoint each is a blob of its own, which is decoded by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from djinn.errors import CheckpointError
from djinn.weights.naming import Naming
from djinn.weights.tensors import Stacked, TensorEntry


def stacked(
    model: PreTrainedModel, files: Mapping[str, TensorEntry], names: Naming, folder: Path
) -> dict[str, TensorEntry]:
    """Return the entries of parameters whose bytes are those of several stored tensors, one behind the other.

    ``model`` has meta parameters in the dtypes that they will have. What is stored in another dtype, or in other
    shapes than those that make up the parameter, is left to transformers.

    Raises:
        CheckpointError: experts that are missing; names their tensors.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, TensorEntry] = {}
    missing: list[str] = []
    for name, groups in names.stacks.items():
        parameter = parameters.get(name)
        if parameter is None:
            continue
        matrices = [_in_order(stored, len(parameter)) for stored in groups]
        missing += [part for matrix in matrices for part in matrix if part not in files]
        if not missing and all(matrices):
            experts = [[files[part] for part in expert] for expert in zip(*matrices, strict=True)]
            if _make_up(parameter, experts):
                parts = tuple(part.raw for expert in experts for part in expert)
                found[name] = TensorEntry(parameter.dtype, tuple(parameter.shape), Stacked(parts))
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} missing tensors: {', '.join(sorted(missing)[:5])}")
    return found


def _in_order(stored: Sequence[str], count: int) -> list[str]:
    """Return the names of a matrix of ``count`` experts in order, of which some are ``stored``.

    Empty where the stored names do not tell: they have to differ in one number, below ``count``.
    """
    if len(stored) == count == 1:
        return list(stored)
    fields = [name.split(".") for name in stored]
    differing = [place for place, values in enumerate(zip(*fields, strict=False)) if len(set(values)) > 1]
    if len(differing) != 1:
        return []
    before, after = fields[0][: differing[0]], fields[0][differing[0] + 1 :]
    names = [".".join([*before, str(number), *after]) for number in range(count)]
    return names if set(stored) <= set(names) else []


def _make_up(parameter: nn.Parameter, experts: Sequence[Sequence[TensorEntry]]) -> bool:
    """Return whether the bytes of ``experts``, as they are stored or decoded, are those of ``parameter``."""
    parts = [part for expert in experts for part in expert]
    are_matrices = all(part.dtype == parameter.dtype and len(part.shape) == 2 for part in parts)
    if not are_matrices or parameter.ndim != 3:
        return False
    alike = len({tuple(part.shape for part in expert) for expert in experts}) == 1
    columns = {part.shape[1] for part in parts}
    return alike and columns == {parameter.shape[2]} and sum(part.shape[0] for part in experts[0]) == parameter.shape[1]
