"""The measured rates of a machine that plans are predicted from. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from djinn.planning.host import HostRates


@dataclass(frozen=True, kw_only=True)
class ComputeRate:
    """What a device computes: ``tokens`` rows times bf16 weights, in bytes of weights a second.

    A multiplication takes one operation for each of a weight's bytes and a token, so ``tokens * rate`` is FLOP/s, with
    what stands between two products in its time; at one token memory gives the weights at that rate or a higher one.
    """

    tokens: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of one device and what feeds it, bytes/s; None and empty are not measured."""

    device: Literal["cpu", "cuda"]
    link: float | None = None
    """Page-locked host memory to a GPU; on a CPU, host memory into the ring."""
    disk: float | None = None
    """Direct reads, as many at once as is best."""
    compute: tuple[ComputeRate, ...] = ()
    """In order of tokens."""
    module_s: float = 0.0
    """Host seconds that a module with weights takes on a device that has nothing to compute."""
    pass_s: float = 0.0
    """Host seconds of a pass beside its modules'."""
    call_s: float = 0.0
    """Host seconds of a call of ``generate`` before its first pass."""
    decode: float | None = None
    """Bytes of bfloat16 that coded weights become."""
    unit_s: float = 0.0
    """Host seconds that a unit takes which streams or is decoded, beside its module's."""
    split_s: float = 0.0
    """Host seconds that a module takes more where its model is split over GPUs."""
    last_token: float | None = None
    """Weights by the last of several tokens, on a CPU: its torch first copies them, once for each sequence."""
    links: tuple[tuple[int, float], ...] = ()
    """Of several GPUs: how many copy at once, and what the slowest of their links carries then, in order."""
    sum_s: float = 0.0
    """Seconds in which several GPUs add up what they have computed of a few numbers."""
    sum_rate: float | None = None
    """Bytes/s at which they add up many."""
    cores_beside_link: float | None = None
    """Bytes/s of weights in host memory that its cores multiply by one token while the link is busy."""
    link_beside_cores: float | None = None
    """Bytes/s that the link carries meanwhile."""
    cores_tokens: int = 0
    """The most tokens by which the cores multiply about as fast as by one; 0 where that was not measured."""
    cores_round_trip_s: float = 0.0
    """Seconds in which a token's inputs come from a GPU to the host, and outputs go back, while the link is busy."""

    def busy_links(self, gpus: int) -> int | None:
        """Return for how many busy links the rate is known which is taken for ``gpus``: the nearest number; or None.

        Of two that are as near it is the larger, whose links are slower.
        """
        return min((count for count, _ in self.links), key=lambda count: (abs(count - gpus), -count), default=None)

    def beside(self, gpus: int) -> Rates:
        """Return the rates of one of ``gpus`` that all copy at once, as far as that was measured."""
        count = self.busy_links(gpus) if gpus > 1 else None
        return self if count is None else replace(self, link=dict(self.links)[count])

    @property
    def host(self) -> HostRates | None:
        """What is known of link and cores while both are busy."""
        if not self.cores_beside_link or not self.link_beside_cores:
            return None
        return HostRates(
            link=self.link_beside_cores, cores=self.cores_beside_link, alone=self.link,
            wait_s=self.cores_round_trip_s,
            device=self.compute[0].rate if self.compute else None, module_s=self.module_s + self.unit_s,
            tokens=self.cores_tokens,
        )  # fmt: skip
