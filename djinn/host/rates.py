"""How fast the host's cores multiply weights where they lie, alone and while the link is busy, and what either loses.

Link and cores read the same memory, so a plan that uses both needs what they do at once. Weights are taken in turn from
more memory than a processor's caches hold.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from djinn.devices import cpus_near
from djinn.hardware import usable_ram
from djinn.host.ahead import Beside, computing_beside
from djinn.host.products import HostProducts, Linear
from djinn.planning.host import ASSUMED_MODULE_S, HostRates
from djinn.planning.rates import Rates
from djinn.sizes import Count
from djinn.transport.lane import HOST_BYTES, Lane, lane, memory_near, start
from djinn.transport.stats import Stats

TOKENS = (1, 2, 4, 8, 16)
WEIGHTS_BYTES = 2_900_000_000
"""Of weights that are multiplied in turn beside a GPU's link. With 0.94 GB of them cores were measured a tenth faster
than they then were with a model's: hosts with last caches of 300 MB may have read a part from there."""
MEASURED_BYTES = WEIGHTS_BYTES + HOST_BYTES
"""The host memory that a measurement takes, and gives back; less where a host has little."""
SHAPE = (28672, 8192)
"""Of Llama-2-70B's gate and up projections, which are one product."""
_WINDOW_S = 0.1
"""How long products are repeated without a link; beside one, as long as it is busy."""
_WINDOWS = 3
_TRIPS, _FEW_COLUMNS = 20, 16
_KNEE = 1.3
Calls = Sequence[Sequence[Tensor]]
"""Matrices that one call multiplies, for several calls in turn."""
Multiply = Callable[[Sequence[Tensor], Tensor], object]


class ProductRate(BaseModel):
    """10^9 bytes of weights that are multiplied by ``tokens`` vectors in a second, and what the link carried then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Count = Field(ge=1)
    gbps: float = Field(gt=0, le=10**9)
    link_gbps: float | None = Field(default=None, gt=0, le=10**9)
    """None where the cores were alone."""


class HostCores(BaseModel):
    """What the host's cores multiply. Rates are in 10^9 bytes/s of bfloat16 weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: str
    """What multiplied: djinn's kernel and its instructions, or ``torch``."""
    threads: Count
    alone: tuple[ProductRate, ...]
    """In order of tokens, the first one of one token."""
    beside_link: tuple[ProductRate, ...] = ()
    """The same while the link is busy; empty where there is none."""
    round_trip_s: float | None = Field(default=None, gt=0, le=10**9)
    """In which a token's inputs come from the device and its outputs go back, while the link is busy; the median."""

    @property
    def host_gbps(self) -> float:
        """Of the cores alone, by one token."""
        return self.alone[0].gbps

    @property
    def host_gbps_beside_link(self) -> float | None:
        """Of the cores while the link is busy, by one token."""
        return by_one_token(self.beside_link).gbps if self.beside_link else None

    @property
    def link_gbps_beside_host(self) -> float | None:
        """Of the link while the cores multiply by one token."""
        return by_one_token(self.beside_link).link_gbps if self.beside_link else None

    def added_to(self, rates: Rates) -> Rates:
        """Return ``rates`` with what is known of the cores beside a link, and of the link beside them."""
        return _with_cores(rates, self.beside_link, self.round_trip_s) if self.beside_link else rates


def knee(rates: Sequence[ProductRate]) -> int:
    """Return up to how many tokens no product takes more than 1.3x as long as the fastest of fewer. Pure."""
    fastest = itertools.accumulate((rate.gbps for rate in rates), max)
    cheap = itertools.takewhile(lambda both: both[0] <= _KNEE * both[1].gbps, zip(fastest, rates, strict=True))
    return max(rate.tokens for _, rate in cheap)


def by_one_token(rates: Sequence[ProductRate]) -> ProductRate:
    """Return the fastest up to the :func:`knee`: what a host does by few tokens, it does by one. Pure.

    On one host with H200s the same product took a tenth longer by one token, which was measured first, than by two
    (data/benchmarks/ranks_peers_h200_2026-11-28).
    """
    most = knee(rates)
    return max((rate for rate in rates if rate.tokens <= most), key=lambda rate: rate.gbps)


def beside_link(device: torch.device, threads: int | None = None, shape: tuple[int, int] = SHAPE) -> HostRates:
    """Return what this host's cores and a GPU's link do at once, for a load of which nobody knows.

    It takes about six seconds with a Gen5 link.

    Args, Raises: as for :func:`measure`.
    """
    with _ready(device, shape, threads) as (products, calls), lane(device) as link:
        start([link])
        alone = 1e9 * link.gbps()
        found = [rate(products.multiply, calls, tokens, link) for tokens in TOKENS]
        trip_s = _round_trip_s(products, link, shape[0])
    known = Rates(device="cuda", link=alone, module_s=ASSUMED_MODULE_S)
    rates = _with_cores(known, found, trip_s).host
    assert rates is not None, "a GPU has a link"
    return replace(rates, threads=products.threads)


def measure(device: torch.device, shape: tuple[int, int] = SHAPE, threads: int | None = None) -> HostCores:
    """Measure this host's cores, alone and beside the link of a GPU; takes seconds and up to five GB of memory.

    Args:
        device: the GPU; a CPU to measure the cores alone.
        shape: rows and columns of the two matrices that one product reads.
        threads: how many multiply; by default all that can be spared.

    Raises:
        ConfigError: more threads than this process may use.
        PlanError: the driver refuses to page-lock host memory.
        UnavailableError: the system starts no more threads, or a GPU without Triton.
    """
    with _ready(device, shape, threads) as (products, calls), ExitStack() as undo:
        link = undo.enter_context(lane(device)) if device.type == "cuda" else None
        return HostCores(
            kernel=products.name,
            threads=products.threads,
            alone=tuple(rate(products.multiply, calls, tokens) for tokens in TOKENS),
            beside_link=tuple(rate(products.multiply, calls, tokens, link) for tokens in TOKENS) if link else (),
            round_trip_s=_round_trip_s(products, link, shape[0]) if link else None,
        )


@contextmanager
def _ready(device: torch.device, shape: tuple[int, int], threads: int | None) -> Iterator[tuple[HostProducts, Calls]]:
    """Yield the cores that multiply, and the weights of one product of two matrices."""
    products = HostProducts(threads, cpus_near(device))
    try:
        nbytes = min(WEIGHTS_BYTES, usable_ram() // 8) if device.type == "cuda" else 0
        with calls_in_memory([shape, shape], device, nbytes) as calls:
            yield products, calls
    finally:
        products.close()


def _with_cores(rates: Rates, beside: Sequence[ProductRate], trip_s: float | None) -> Rates:
    """Return ``rates`` with what is known of the cores beside a link, and of the link beside them. Pure."""
    best = by_one_token(beside)
    return replace(
        rates,
        cores_beside_link=1e9 * best.gbps,
        link_beside_cores=1e9 * best.link_gbps if best.link_gbps else None,
        cores_tokens=knee(beside),
        cores_round_trip_s=trip_s or 0.0,
    )


@contextmanager
def calls_in_memory(shapes: Sequence[tuple[int, int]], device: torch.device, nbytes: int = 0) -> Iterator[Calls]:
    """Yield matrices of ``shapes`` (rows, columns), one call's, as often as they fit ``nbytes``, and once at least.

    They lie one behind the other in memory that a GPU's copies could come from; without one it is not page-locked.

    Raises:
        PlanError: the driver refuses to page-lock host memory.
    """
    one = sum(2 * math.prod(shape) for shape in shapes)
    with memory_near(device, max(1, nbytes // one) * one, 0x3C) as memory:  # 0.0115 in bfloat16
        calls = torch.from_numpy(memory.buffer).view(torch.bfloat16).split(one // 2)
        sizes = [math.prod(shape) for shape in shapes]
        yield [[part.view(shape) for part, shape in zip(call.split(sizes), shapes, strict=True)] for call in calls]


def rate(multiply: Multiply, calls: Calls, tokens: int, link: Lane | None = None) -> ProductRate:
    """Return how fast ``tokens`` are multiplied, one call after the other, and what ``link`` carries meanwhile.

    The median of a few windows. Products count that ended while the link was busy.
    """
    vectors = torch.ones(tokens, calls[0][0].shape[1], dtype=torch.bfloat16)
    multiply(calls[-1], vectors)
    found = [_window(multiply, calls, vectors, link) for _ in range(_WINDOWS)]
    host = statistics.median(host for host, _ in found)
    links = [link for _, link in found if link is not None]
    return ProductRate(tokens=tokens, gbps=host, link_gbps=statistics.median(links) if links else None)


def _window(multiply: Multiply, calls: Calls, vectors: Tensor, link: Lane | None) -> tuple[float, float | None]:
    if link is not None:
        start([link])
    begun = now = time.perf_counter()
    moved = read = 0
    for call in itertools.cycle(calls):
        multiply(call, vectors)
        read += sum(matrix.nbytes for matrix in call)
        ended = time.perf_counter()
        over = ended - begun > _WINDOW_S if link is None else not link.busy
        if not over or not moved:
            moved, now = read, ended
        if over:
            break
    return moved / (now - begun) / 1e9, link.gbps() if link is not None else None


def _round_trip_s(products: HostProducts, link: Lane, rows: int) -> float:
    """Return the seconds from a product's inputs to its outputs on the device, beside the multiplication.

    Of one product after the other while the link is busy, with outputs of two matrices of ``rows`` and hardly any
    weights; the median of a few windows.
    """
    stats = Stats(model_bytes=0, resident_bytes=0, ring_bytes=0, host_bytes=0, disk_bytes=0)
    inputs = torch.ones(1, _FEW_COLUMNS, dtype=torch.bfloat16, device=link.device)
    layers = [Linear(torch.ones(rows, _FEW_COLUMNS, dtype=torch.bfloat16)) for _ in range(2)]
    computing = computing_beside(link.device, products, stats)
    try:
        with torch.cuda.device(link.device):
            return statistics.median(_trip_s(computing, layers, inputs, link) for _ in range(_WINDOWS))
    finally:
        computing.close()


def _trip_s(computing: Beside, layers: Sequence[Linear], inputs: Tensor, link: Lane) -> float:
    computing.outputs_of(layers, inputs, "")  # allocates
    start([link])
    begun, count = time.perf_counter(), 0
    while link.busy or not count:
        for _ in range(_TRIPS):
            computing.outputs_of(layers, inputs, "")
        torch.cuda.current_stream().synchronize()
        count += _TRIPS
    return (time.perf_counter() - begun) / count
