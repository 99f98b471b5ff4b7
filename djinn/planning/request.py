"""A request: what a user asks of a device, as numbers. Here words become bytes, or are refused, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch

from djinn.devices import device_of
from djinn.errors import ConfigError
from djinn.names import Coding, coding_name
from djinn.planning.host import HostCompute, HostRates
from djinn.planning.workspace import Workload
from djinn.sizes import parse_bytes

Experts = Literal["routed", "whole"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOST_SHARE = 0.8
"""Share of the host memory that is free now which streamed weights may take, if no other limit is given."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a model is planned and loaded for. Sizes are bytes; :func:`djinn.load` says what each field means."""

    device: torch.device
    budget: int
    keep: Workload | int
    """What device memory is kept for beside the weights: a generation, or bytes that the user named."""
    ring: int | None
    host_memory: int | None
    chunk: int
    dtype: torch.dtype | None
    coding: Coding | None
    experts: Experts = "routed"
    host: HostCompute | None = None

    @classmethod
    def of(
        cls,
        *,
        budget: int | str,
        keep: Workload | int | str,
        device: str | None = None,
        ring: int | str | None = None,
        host_memory: int | str | None = None,
        chunk: int | str = "64 MiB",
        dtype: torch.dtype | None = None,
        coding: Coding | None = None,
        experts: Experts = "routed",
        host_compute: bool = False,
        host_threads: int | None = None,
    ) -> Self:
        """Return the request that a user's words make. The device need not be here.

        Raises:
            ConfigError: a word that means nothing; says which, and what would.
        """
        if dtype not in (*DTYPES, None):
            raise ConfigError(f"dtype {dtype}: it is {', '.join(map(str, DTYPES))}, or None for the checkpoint's own")
        if coding is not None:
            coding_name(coding)
        if experts not in get_args(Experts):
            raise ConfigError(f"experts {experts!r}: it is {' or '.join(get_args(Experts))}")
        if isinstance(keep, Workload):
            _check(keep)
        where = device_of(device)
        return cls(
            device=where,
            budget=parse_bytes(budget),
            keep=keep if isinstance(keep, Workload) else parse_bytes(keep),
            ring=None if ring is None else parse_bytes(ring),
            host_memory=None if host_memory is None else parse_bytes(host_memory),
            chunk=parse_bytes(chunk),
            dtype=dtype,
            coding=coding,
            experts=experts,
            host=_host(host_compute, host_threads, where, dtype),
        )

    def asking(self, *, budget: int | None = None, work: Workload | None = None) -> Self:
        """Return the same request with another budget, or for another generation."""
        return replace(self, budget=budget or self.budget, keep=work or self.keep)

    def knowing(self, rates: HostRates | None) -> Self:
        """Return the same request with what is known of the machine's link and cores, if they are to compute."""
        return self if self.host is None else replace(self, host=replace(self.host, rates=rates))

    def shared_by(self, processes: int) -> Self:
        """Return what each of several processes on one host may ask for: all of them share its memory."""
        host_memory = None if self.host_memory is None else self.host_memory // processes
        return replace(self, host_memory=host_memory)

    def require_one_gpu(self) -> None:
        """Refuse what cannot be asked of several GPUs that hold a model together.

        Raises:
            ConfigError: host_compute.
        """
        if self.host is not None:
            raise ConfigError("host_compute: it is for one GPU; several would share the cores of their host")

    def arena_bytes(self, free: int, given_back: int, staging: int = 0) -> int:
        """Return the largest arena: what was asked for, or a share of the host memory that is ``free``.

        It leaves what ``staging`` from disk may take. What loading gives back while it fills the arena is all the
        arena's.
        """
        if self.host_memory is not None:
            return self.host_memory
        on_device = self.budget if self.device.type == "cpu" else 0
        return given_back + max(min(round(HOST_SHARE * free), free - staging) - on_device, 0)


def _host(asked: bool, threads: int | None, device: torch.device, dtype: torch.dtype | None) -> HostCompute | None:
    if not asked:
        if threads is not None:
            raise ConfigError(f"host_threads {threads!r}: it is for host_compute, which was not asked for")
        return None
    if device.type == "cpu":
        raise ConfigError(
            "host_compute: the device is the CPU, whose cores compute already; it is for weights that stream to a GPU"
        )
    if dtype not in (torch.bfloat16, None):
        raise ConfigError(f"host_compute: the cores multiply weights in torch.bfloat16, and dtype is {dtype}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"host_threads {threads!r}: it is a whole number of at least 1")
    return HostCompute(threads=threads)


def _check(work: Workload) -> None:
    for name, least in (("prompt_tokens", 1), ("new_tokens", 0), ("batch", 1)):
        value = getattr(work, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} {value!r}: it is a whole number of at least {least}")
