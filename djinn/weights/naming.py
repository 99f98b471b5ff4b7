"""Which stored tensors each weight of a model is made of, by transformers' own rules for names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

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
    stacks: Mapping[str, list[list[str]]] = field(default_factory=dict)
    """By the model's name, of a weight that is experts' matrices one behind the other: the stored names, by matrix.

    First those of every expert's first matrix (its gate), then of every one's second; the order of experts is open.
    """
    used: tuple[WeightTransform, ...] = ()
    """The rules that some name was subject to: by them transformers makes the stored names again when it saves."""


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
    by_pattern: dict[str, dict[str, list[str]]] = {}
    for name in stored:
        meant, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if meant not in state and name in state:
            meant, pattern = rename_source_key(name, [], [], prefix, state)
        if meant not in state:
            unknown.add(meant)
        elif pattern is not None:
            by_pattern.setdefault(meant, {}).setdefault(pattern, []).append(name)
            first, *_ = targets = of_pattern[pattern].target_patterns
            for target in targets:
                converted.setdefault(meant.replace(first, target), []).append(name)
        elif meant in renamed:
            raise CheckpointError(
                f"{where}: tensors {renamed[meant]} and {name} are both {meant} of {type(model).__name__}; remove one"
            )
        else:
            renamed[meant] = name
    used = tuple(rule for rule in rules if rule.was_used())
    stacks = {}
    for meant, groups in by_pattern.items():
        converter = of_pattern[next(iter(groups))]
        # It has to be possible to store such a weight whole, under the model's own name: see djinn.weights.stand_in.
        as_named = rename_source_key(meant, renamings, converters, prefix, state) == (meant, None)
        if _only_stacks(converter) and groups.keys() == set(converter.source_patterns) and as_named:
            stacks[meant] = [groups[pattern] for pattern in converter.source_patterns]
    stacks = {meant: groups for meant, groups in stacks.items() if meant not in renamed}
    return Naming(renamed, converted, frozenset(unknown), stacks, used)


def _only_stacks(converter: WeightConverter) -> bool:
    """Return whether what a converter makes is the bytes of its sources, of one expert after the other."""
    if len(converter.target_patterns) != 1:
        return False
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
        case _:
            return False
