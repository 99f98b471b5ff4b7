"""What a plan needs at least: a ring that holds its largest unit, in a budget that holds both. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from djinn.errors import PlanError
from djinn.planning.experts import Pool
from djinn.sizes import format_bytes
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit


def require_room(
    streamed: Sequence[Unit], ring: int, asked_ring: int | None, fixed: int, budget: int, workspace: int, pool: Pool
) -> None:
    """Hold a ring and a budget against the units that are to be streamed; all sizes are bytes.

    Args:
        asked_ring: the ring that was asked for, if one was.
        fixed: device memory that is taken before the ring, workspace and pool included.
        workspace: of it, what is neither weights nor pool.

    Raises:
        PlanError: a ring that its largest unit does not fit, or a budget that ring and fixed needs do not fit.
    """
    largest = max(streamed, key=lambda unit: unit.image_bytes, default=None)
    needed = largest.image_bytes if largest is not None else 0
    if asked_ring is not None and largest is not None and needed > asked_ring // PAGE * PAGE:
        raise PlanError(
            f"ring: unit {largest.name} has {format_bytes(needed)}, more than the ring's {format_bytes(asked_ring)}; "
            f"a ring of {needed} bytes would do"
        )
    needed = asked_ring or needed if streamed else 0
    if fixed + needed > budget:
        ring_text = format_bytes(needed)
        if largest is not None and asked_ring is None:
            ring_text += f" (unit {largest.name})"
        pool_text = f", {pool.slots} experts of {format_bytes(pool.slot_bytes)}" if pool.slots else ""
        raise PlanError(
            f"budget: {format_bytes(budget)} is too small: workspace {format_bytes(workspace)}, weights that cannot be "
            f"streamed {format_bytes(fixed - workspace - pool.nbytes)}{pool_text} and a ring of {ring_text} need "
            f"{fixed + needed} bytes"
        )
