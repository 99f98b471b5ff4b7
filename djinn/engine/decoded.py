"""Coded units that stay on the device: hooks that decode them into the scratch just before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from djinn.engine.coding import Scratch
from djinn.engine.presence import Presence
from djinn.transport.copier import Copier
from djinn.weights.units import Unit

Hooks = tuple[Callable[..., None], Callable[..., None]]


class DecodedResidents:
    """Decodes residents, and knows which of them have been decoded in this turn."""

    def __init__(
        self,
        copier: Copier,
        decodings: Mapping[str, Callable[[], None]],
        scratch: Scratch,
        presences: Mapping[str, Presence],
    ) -> None:
        self._copier = copier
        self._decodings = decodings
        self._scratch = scratch
        self._presences = presences
        self._decoded: set[Presence] = set()

    def hooks(self, unit: Unit) -> Hooks:
        """Return what runs before a reader of ``unit``, and what after it."""
        presence = self._presences[unit.name]

        def enter(*_: object) -> None:
            self._scratch.enter(unit.name)
            self._decoded.add(presence)
            self._copier.decode(unit, self._decodings[unit.name])
            presence.begin()

        def leave(*_: object) -> None:
            self._scratch.leave(unit.name)
            if not self._scratch.is_used_by(unit.name):
                presence.end()

        return enter, leave

    def forget(self) -> None:
        """Note that nothing is read any more: a pass that was interrupted has not said so."""
        for presence in self._decoded:
            presence.end()
        self._decoded.clear()
