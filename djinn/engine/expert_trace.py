"""Which experts a model's routers pick, written down: to try pools of any size on one's own traffic, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from djinn.engine.load import engine_of
from djinn.errors import ConfigError


@contextmanager
def trace_experts(model: nn.Module) -> Iterator[list[list[tuple[int, ...]]]]:
    """Record what routers pick, for every routed pass and in it for every layer in order, while the context lasts.

    What it yields, and fills, is what :func:`djinn.planning.expert_cache.hit_rate` replays for a pool of any size.
    Passes of many tokens take whole layers and ask no router, so they are not in it.

    Raises:
        ConfigError: a model that does not stream, or has no routed experts away from the device.
    """
    experts = engine_of(model).experts
    if experts is None:
        raise ConfigError(
            f"this {type(model).__name__} has no experts that are fetched as routers pick them: all are on the device, "
            "its architecture has none, or it was loaded with experts='whole'"
        )
    passes: list[list[tuple[int, ...]]] = []
    last = -1

    def note(layer: int, picked: Sequence[int]) -> None:
        nonlocal last
        if layer <= last or not passes:
            passes.append([])
        passes[-1] += [()] * (layer - len(passes[-1])) + [tuple(picked)]
        last = layer

    experts.picked = note
    try:
        yield passes
    finally:
        experts.picked = None
