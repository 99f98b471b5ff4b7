"""What a user should know before waiting for a model: its plan, how fast it will be, and what other choices would give.

Each answer to "what if" is a plan of its own, made and predicted as the first one; no weights are read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from djinn.devices import cpus_near
from djinn.engine.opened import outlined
from djinn.errors import ConfigError, UnavailableError
from djinn.hardware import usable_ram
from djinn.host.cores import choose_cpus
from djinn.names import Coding
from djinn.planning.host import assumed_rates
from djinn.planning.outlook import MOST_TOKENS, Asked, Forecast, outlook
from djinn.planning.placement import Plan
from djinn.planning.prediction import Prediction, predict
from djinn.planning.rates import Rates
from djinn.planning.request import Request
from djinn.planning.work import work_of
from djinn.planning.workspace import Workload


def forecast(
    model: str | Path,
    *,
    budget: int | str,
    device: str | None = None,
    rates: Rates | None = None,
    free: int | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    coding: Coding | None = None,
    host_compute: bool = False,
    host_threads: int | None = None,
    cores: int | None = None,
    hit_rate: float | None = None,
    gpus: int = 1,
) -> Forecast:
    """Return the forecast of :func:`djinn.load` with the same arguments; reads headers at the most, no weights.

    A synthetic architecture is planned as the checkpoint that :func:`djinn.weights.resolve.resolve` makes of it.

    Args:
        rates: of the machine to plan for; None where they are not known.
        cores: threads that multiply there where ``host_compute`` is asked for and nobody has measured what they do; by
            default as many as can be spared here.
        hit_rate: share of the experts that routers pick which decode finds in the pool; by default that of routers that
            pick evenly, with no locality.
        free: host memory that is free there, bytes; by default what is free here.
        gpus: GPUs that hold the model together, each over its own link; the forecast is of the slowest.

    Raises:
        ConfigError, CheckpointError, PlanError: as :func:`djinn.load`. The device need not be here.
    """
    if hit_rate is not None and not 0 <= hit_rate <= 1:
        raise ConfigError(f"hit_rate {hit_rate}: it is a share, from 0 to 1")
    work = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    request = Request.of(
        budget=budget, keep=work, device=device, ring=ring, host_memory=host_memory, dtype=dtype, coding=coding,
        host_compute=host_compute, host_threads=host_threads,
    )  # fmt: skip
    there = None if rates is None else rates.beside(gpus)
    threads = host_threads or cores or len(choose_cpus(near=cpus_near(request.device)))
    if there is not None:
        multiplies = there.compute[0].rate if there.compute else None
        request = request.knowing(there.host or assumed_rates(threads, there.link, multiplies))
    elif free is not None:  # of a machine elsewhere
        request = request.knowing(assumed_rates(threads))
    found = outlined(model, request, gpus).on_disk()
    room = (usable_ram() if free is None else free) // gpus

    def plan_for(budget_bytes: int, workload: Workload) -> Plan:
        return found.alternative(budget_bytes, workload, room)

    def predict_for(planned: Plan, workload: Workload) -> Prediction:
        if there is None:
            raise UnavailableError("no rates of this machine are known")
        return predict(planned, there, work_of(found.index, planned.units, workload), hit_rate)

    made_for = getattr(found.index.model.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    alone = replace(found, request=replace(found.request, host=None))
    asked = Asked(
        request=found.request,
        gpus=gpus,
        whole_bytes=sum(weight.numel() * weight.element_size() for weight in found.index.model.parameters()),
        arena_bytes=gpus * found.arena_bytes(room),
        threads=threads,
        without_cores=None if request.host is None else alone.plan(room),
    )
    return outlook(found.plan(room), asked, work, plan_for, predict_for, longest=made_for - new_tokens)
