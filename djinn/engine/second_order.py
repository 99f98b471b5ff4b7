"""The order of passes of few tokens, where the host's cores compute with some of the units that stream otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from djinn.weights.units import Unit

_IDS = {"input_ids", "decoder_input_ids"}
_EMBEDDED = {"inputs_embeds", "decoder_inputs_embeds"}
_OTHERS = ("pixel_", "input_")
"""How the names of other inputs begin, whose tokens nobody has counted: pictures and sounds."""


@dataclass(frozen=True)
class SecondOrder:
    """The units that the second order visits, and what reads them in their other slots."""

    units: tuple[Unit, ...]
    tokens: int
    """The most tokens of a pass that takes this order."""
    decodings: Mapping[str, Callable[[], None]]
    """By name of a coded unit, what decodes it from its slot in this order."""
    bind: Callable[[int], None]
    """Binds the parameters of a visit, of either order, to its slot; there is none for what is decoded."""

    def is_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of the model takes this order: of few tokens, and without gradients."""
        tokens = tokens_of(args, kwargs)
        return tokens is not None and tokens <= self.tokens and not torch.is_grad_enabled()


class Orders:
    """Numbers the visits of both orders, those of the second behind those of the first, and says which a pass takes.

    Args:
        first: the units of the first order: all that stream.
        decodings: by name of a coded unit, what decodes it from its slot in the first order.
    """

    def __init__(
        self, first: tuple[Unit, ...], decodings: Mapping[str, Callable[[], None]], second: SecondOrder | None
    ) -> None:
        self.first = first
        self._second = second
        fewer = second.units if second is not None else ()
        self.units = first + fewer
        """Of each visit."""
        self.decodes = [decodings.get(unit.name) for unit in first]
        """What decodes the unit of each visit, where it is coded."""
        if second is not None:
            self.decodes += [second.decodings.get(unit.name) for unit in fewer]
        self.again = len(first) if fewer else 0
        """The visit that is expected after the last one."""
        self.few = False
        """Whether the pass takes the second order."""
        numbers = {unit.name: number for number, unit in enumerate(first)}
        self._of_few = {numbers[unit.name]: len(first) + number for number, unit in enumerate(fewer)}
        self._bound: dict[str, int | None] = dict(numbers)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the order of a pass by what the model is called with."""
        self.few = self._second is not None and self._second.is_for(args, kwargs)

    def number(self, unit: int) -> int | None:
        """Return the visit of a ``unit``, given by its number in the first order; None where the host computes it."""
        return self._of_few.get(unit) if self.few else unit

    def bind(self, visit: int) -> None:
        """Bind parameters to the slot of a visit, if they are bound to that of the other order."""
        if self._second is None:
            return
        name = self.units[visit].name
        if self._bound[name] != visit:
            self._bound[name] = None  # an interrupt may come in between
            self._second.bind(visit)
            self._bound[name] = visit


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return how many tokens, of all sequences, a model is called with; None where that cannot be seen."""
    counts = []
    for name, value in (*((None, value) for value in args[:1]), *kwargs.items()):
        if not isinstance(value, torch.Tensor):
            continue
        if name in _IDS or (name is None and not value.is_floating_point()):
            counts.append(value.numel())
        elif name in _EMBEDDED or name is None:
            counts.append(math.prod(value.shape[:2]))
        elif name.startswith(_OTHERS):
            return None
    return max(counts, default=None)
