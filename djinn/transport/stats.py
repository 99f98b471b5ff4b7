"""What streaming did: bytes moved, stalls and their cause, and the timeline of copies against compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Lane = Literal["copy", "decode", "compute", "stall", "host"]
TIMELINE_LIMIT = 100_000
"""Intervals kept; about 15 MB. What comes after is counted in the totals alone."""


@dataclass(frozen=True)
class Interval:
    """Something that took time: a unit's copy, the decoding or compute that read its slot, the wait in between, or what
    the host's cores computed with units.

    Times are seconds of one clock whose zero is arbitrary; ``cause`` says what a stall waited for.
    """

    lane: Lane
    unit: str
    start_s: float
    end_s: float
    nbytes: int = 0
    cause: str = ""


@dataclass
class Stats:
    """Totals since loading. Sizes are bytes, times seconds."""

    model_bytes: int
    resident_bytes: int
    ring_bytes: int
    host_bytes: int
    """Bytes of weights streamed from host memory: in every pass, or experts when a router picks them."""
    disk_bytes: int
    """Bytes of weights streamed from disk, as those."""
    traced: bool = False
    """Whether copies and compute are put on the timeline."""
    page_locked: bool = True
    """Whether host memory is page-locked where a GPU copies from it; if not, copies run at a fraction of the link."""
    link_bytes: int = 0
    """Weight bytes that came into the ring and were there when compute came to read them; counted then, so that what
    is prefetched beyond the last visit does not count."""
    disk_read_bytes: int = 0
    """Those of them that came from disk."""
    passes: int = 0
    visits: int = 0
    skips: int = 0
    """Units that were prefetched but that the pass did not read."""
    reloads: int = 0
    """Visits outside the recorded order, for which the pipeline had to start anew."""
    expert_hits: int = 0
    """Experts that a router picked and that were in the pool."""
    expert_misses: int = 0
    """Those that were not: they were fetched, or the host's cores computed with them."""
    expert_computed: int = 0
    """Those of them that the cores computed with."""
    routed_layers: int = 0
    """Layers whose experts were fetched as their router picked them."""
    whole_layers: int = 0
    """Layers of passes of many tokens, which take all experts."""
    index_wait_s: float = 0.0
    """Host time until routers' answers were there, the compute before them included."""
    stall_s: float = 0.0
    """Time that compute waited for a unit (on CUDA: known for traced passes only)."""
    hook_s: float = 0.0
    """Host time spent in hooks, stalls excluded."""
    host_computed_bytes: int = 0
    """Weight bytes that the host's cores have computed with."""
    host_s: float = 0.0
    """Time in which they did; this and the next one are up to date in what ``djinn.stats`` returns."""
    host_wait_s: float = 0.0
    """Time that they waited for inputs: for all compute before them, and for the copy to the host."""
    product_wait_s: float = 0.0
    """Time that the caller waited for what the cores compute, or for room to queue more of it; it launched nothing."""
    zero_s: float = 0.0
    """What the host's clock (``time.perf_counter``) showed at the zero of the timeline."""
    timeline: list[Interval] = field(default_factory=list)

    def count_copy(self, nbytes: int, *, from_disk: bool) -> None:
        """Count a unit that has arrived."""
        self.link_bytes += nbytes
        self.disk_read_bytes += nbytes if from_disk else 0

    def count_product(self, name: str, nbytes: int, asked: float, there: float, done: float) -> None:
        """Count a product of the cores: asked for, its inputs there, and done, in seconds of the host's clock."""
        self.host_wait_s += there - asked
        self.host_s += done - there
        self.add(Interval("host", name, there - self.zero_s, done - self.zero_s, nbytes))

    def add(self, interval: Interval) -> None:
        """Append to the timeline if it is kept, up to its limit."""
        if self.traced and len(self.timeline) < TIMELINE_LIMIT:
            self.timeline.append(interval)
