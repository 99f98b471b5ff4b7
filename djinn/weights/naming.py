"""Which stored tensors each weight of a model is made of, by transformers' own rules for names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from djinn.errors import CheckpointError


@dataclass(frozen=True)
class Naming:
    """What the names in the files mean to a model."""

    renamed: Mapping[str, str]
    """By the model's name, the stored one of the same tensor: of a parameter, or of a buffer."""
    converted: Mapping[str, list[str]] = field(default_factory=dict)
    """By the model's name, the stored names that transformers puts it together from, or cuts it out of."""
    unknown: frozenset[str] = frozenset()
    """What the model has no place for, as transformers names it."""


def naming(model: PreTrainedModel, stored: Iterable[str], where: str) -> Naming:
    """Return what the names ``stored`` in the files of ``where`` mean to ``model``.

    Raises:
        CheckpointError: two stored tensors that are the same weight; names them.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unknown = set()
    for name in stored:
        meant, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if meant not in state and name in state:
            meant, pattern = rename_source_key(name, [], [], prefix, state)
        if meant not in state:
            unknown.add(meant)
        elif pattern is not None:
            first, *_ = targets = of_pattern[pattern].target_patterns
            for target in targets:
                converted.setdefault(meant.replace(first, target), []).append(name)
        elif meant in renamed:
            raise CheckpointError(
                f"{where}: tensors {renamed[meant]} and {name} are both {meant} of {type(model).__name__}; remove one"
            )
        else:
            renamed[meant] = name
    return Naming(renamed, converted, frozenset(unknown))
