"""A plan for people: a line for each place where units are. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from djinn.planning.choice import total_bytes
from djinn.sizes import format_bytes

if TYPE_CHECKING:
    from djinn.planning.placement import Plan

Row = tuple[str, int, str]
"""What, its bytes, and words."""


def table_of(plan: Plan) -> str:
    """Return a line per place."""
    when = "each pass" if not plan.routed else "each pass, but for experts"
    pool_words = f"{plan.pool.slots} of {plan.pool.experts} experts; what else a router picks is fetched"
    units: Counter[str] = Counter(plan.tiers)
    scratch: Row = ("  scratch", plan.scratch_bytes, "where coded units are decoded, one at a time")
    rows: list[Row] = [
        ("model", plan.model_bytes, f"{len(plan.units)} units, {plan.oversubscription:.2f}x the budget"),
        ("budget", plan.budget, "device memory, of which:"),
        ("  residents", plan.resident_bytes, f"{units['resident']} units that never cross the link again"),
        ("  ring", plan.ring_bytes, "streamed units on their way"),
        *([scratch] * bool(plan.scratch_bytes)),
        *([("  pool", plan.pool.nbytes, pool_words)] * bool(plan.pool.slots)),
        ("  workspace", plan.workspace_bytes, "KV cache, activations, libraries"),
        ("pinned", plan.pinned_bytes, f"{units['pinned']} units in host memory, streamed {when}"),
        *_host_rows(plan),
        ("disk", plan.disk_bytes, f"{units['disk']} units read {when}"),
    ]
    return "\n".join(f"{name:<12}{format_bytes(size):>9}  {what}" for name, size, what in rows)


def _host_rows(plan: Plan) -> list[Row]:
    if plan.host is None:
        return []
    computed = [unit for unit in plan.streamed if unit.name in plan.host.units]
    these = "some of the experts that the pool lacks" if plan.computed_experts else f"{len(computed)} of them"
    words = f"{these}: the host's cores compute with these in passes of up to {plan.host.rates.tokens} tokens"
    rows: list[Row] = [("  computed", sum(unit.raw().image_bytes for unit in computed), words)]
    if copies := plan.raw_copies:
        rows.append(("  twice", total_bytes(copies), f"{len(copies)} of these wait raw for the cores, beside coded"))
    return rows
