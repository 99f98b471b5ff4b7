"""``load``: an ordinary Hugging Face model whose weights stream; ``detach`` undoes that, and ``offload`` too."""

from __future__ import annotations

import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from djinn.devices import free_device_memory, require_here
from djinn.engine.assembly import Engine, restore, start
from djinn.engine.binding import Weights
from djinn.engine.closing import closer
from djinn.engine.coding import Coder
from djinn.engine.device_memory import shortage_hook
from djinn.engine.opened import Opened, opened
from djinn.engine.ranks import ranks_of
from djinn.errors import ConfigError, PlanError
from djinn.hardware import usable_ram
from djinn.host.rates import MEASURED_BYTES, beside_link
from djinn.names import Coding
from djinn.planning.memory import require_device_memory
from djinn.planning.placement import Plan
from djinn.planning.request import Experts, Request
from djinn.planning.workspace import Workload
from djinn.sizes import format_bytes
from djinn.spill import remove_leftovers, spill_folder
from djinn.transport.stats import Stats
from djinn.weights.opening import index_of

Model = TypeVar("Model", bound=nn.Module)

engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


def load(
    model: str | Path,
    *,
    budget: int | str,
    device: str | None = None,
    ring: int | str | None = None,
    host_memory: int | str | None = None,
    chunk: int | str = "64 MiB",
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    coding: Coding | None = None,
    experts: Experts = "routed",
    distributed_config: DistributedConfig | None = None,
    host_compute: bool = False,
    host_threads: int | None = None,
    trace: bool = False,
    progress: bool = False,
) -> PreTrainedModel:
    """Return a Hugging Face model that runs within ``budget`` bytes of device memory, streaming what does not fit.

    Its class is the one that the checkpoint's config names, of whatever kind; a causal language model if it names none.

    Args:
        model: a checkpoint folder, a hub id (``org/name@revision``), or ``synthetic:<architecture>``, whose seeded
            random weights are made straight in host memory. Tensors that its class has no place for are ignored, with
            a warning. Quantised ones: see :mod:`djinn.weights.quantised`.
        budget: device memory for residents, ring, KV cache and activations; a size such as ``"24 GB"``.
        device: ``"cuda"`` or ``"cpu"``; by default a GPU where there is one. On a CPU the device is a budget of host
            memory, and weights are streamed from disk; so that what is freed is free, glibc then maps large blocks of
            the whole process by themselves.
        ring: size of the device ring; by default the smallest that still overlaps copies and compute.
        host_memory: most page-locked host memory for streamed weights; what does not fit is read from disk each pass.
        chunk: size of one copy command, and of one disk read.
        prompt_tokens, new_tokens, batch: the longest generation to keep device memory for.
        dtype: bfloat16, float16 or float32; by default a checkpoint's own, and bfloat16 for synthetic weights. Weights
            in another one are converted while they are loaded, and have to fit the device and host memory. As in
            transformers, some models keep some weights in float32.
        seed: of synthetic weights.
        coding: ``"lossless"`` codes bfloat16 weights while they are loaded, to about 0.7 of their size, and rebuilds
            their exact bits on the device. Weights coded here have to fit the device and host memory; those of a
            packed checkpoint are coded already, and stay on disk as they are. ``"none"`` decodes a packed checkpoint
            while it is loaded. By default weights stay as they are stored. A model that fits the budget is raw.
        experts: ``"routed"`` fetches of a mixture of experts those that its routers pick, and keeps as many as there
            is room for on the device; ``"whole"`` streams all of them in every pass, as is done with models whose
            experts transformers does not mark.
        distributed_config: as for ``from_pretrained``, in a process that ``torchrun`` has started for each GPU:
            ``DistributedConfig(tp_plan="auto")`` splits every weight over all of them. Each streams its own shards
            over its own link. ``budget`` and ``ring`` are then each GPU's, ``host_memory`` is the host's.
        host_compute: in passes of few tokens (16 at the most), a part of the weights is not copied to the GPU: the
            host's cores compute with it where it waits, beside the link. Outputs are then **not equal** to the
            resident model's, only close to them: sums are made in another order. For bfloat16 models, in passes under
            ``torch.no_grad()``; passes of more tokens are exact.
        host_threads: the most cores that compute so; by default all that can be spared.
        trace: keep a timeline of copies, compute and stalls in :func:`stats`.
        progress: show a bar while host memory is filled.

    Raises:
        ConfigError: an argument that means nothing.
        CheckpointError: a checkpoint that is missing or damaged, or quantised by a method that djinn does not stream.
        PlanError: a ring, budget or host memory that cannot work; says what would.
        UnavailableError: no such device, or a package that a quantised checkpoint needs.
    """
    request = Request.of(
        budget=budget, device=device, ring=ring, host_memory=host_memory, chunk=chunk, dtype=dtype, coding=coding,
        experts=experts, keep=Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch),
        host_compute=host_compute, host_threads=host_threads,
    )  # fmt: skip
    return load_requested(
        model, request, distributed_config=distributed_config, seed=seed, trace=trace, progress=progress
    )


def load_requested(
    model: str | Path,
    request: Request,
    *,
    distributed_config: DistributedConfig | None = None,
    seed: int = 0,
    trace: bool = False,
    progress: bool = False,
) -> PreTrainedModel:
    """Return the model that :func:`load` does, for a request that has been made already.

    Raises:
        ConfigError, CheckpointError, PlanError, UnavailableError: as for :func:`load`.
    """
    require_here(request.device)
    if distributed_config is not None:
        request.require_one_gpu()
    ranks = ranks_of(distributed_config, request.device)
    request = ranks.share(request)
    remove_leftovers()
    # Outside of inference mode: else nothing outside of it could use the model.
    with ExitStack() as undo, torch.inference_mode(False):
        with ranks.agreed():
            spill = undo.enter_context(spill_folder())
            index = index_of(model, spill, request.device, request.dtype, seed)
        index = ranks.distribute(index)
        free = ranks.share_of_host(usable_ram())
        with ranks.agreed():
            coder = Coder.on(request.device, request.chunk, undo)
            found = opened(index, request, coder.layout)
            planned = found.plan(free)
            if request.device.type == "cuda":
                require_device_memory(planned, *free_device_memory(request.device))
            planned = _with_measured_cores(found, planned, free)
        with ranks.agreed():
            vars(index.model).pop("hf_device_map", None)  # what transformers has noted while it indexed the files
            weights = Weights(ranks.parameters_of(index), coder)
            explain = shortage_hook(str(request.keep))
            engine = start(
                index.model, planned, weights, explain, trace=trace, progress=progress, undo=undo, ranks=ranks,
                host_threads=request.host.threads if request.host is not None else None,
            )  # fmt: skip
            undo.push(engine.resources)  # until no other rank can fail any more
        undo.pop_all()
    for handle in ranks.hold_together(index.model):
        engine.resources.callback(handle.remove)
    register(index.model, engine)
    return index.model


def _with_measured_cores(found: Opened, planned: Plan, free: int) -> Plan:
    """Return the plan; if the cores are to compute and nobody has measured them, they are, and it is made again.

    They are not where the arena is smaller than what measuring takes, or where the driver page-locks nothing.
    """
    request = found.request
    if planned.host is None or not planned.host.rates.assumed or request.device.type != "cuda":
        return planned
    if request.host is None or planned.pinned_bytes < MEASURED_BYTES:
        return planned
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # filling the arena says what cannot be page-locked
            rates = beside_link(request.device, request.host.threads)
    except PlanError:
        return planned
    finally:
        torch.cuda.empty_cache()
    return replace(found, request=request.knowing(rates)).plan(free)


def placement(model: nn.Module) -> Plan:
    """Return the plan that a streaming model follows, with the sizes that its weights really have.

    Raises:
        ConfigError: not a model that streams.
    """
    return engine_of(model).plan


def stats(model: nn.Module) -> Stats:
    """Return the running totals of a streaming model.

    Raises:
        ConfigError: not a model that streams.
    """
    engine = engine_of(model)
    engine.copier.resolve_timeline()
    if engine.experts is not None:
        engine.experts.fetcher.resolve_timeline()
    if engine.host is not None:
        engine.host.count()
    return engine.stats


def cool(model: nn.Module) -> None:
    """Drop everything prefetched, so that the next pass begins with a cold ring and an empty pool.

    Raises:
        ConfigError: not a model that streams, or called in the middle of a pass.
    """
    engine = engine_of(model)
    with engine.streamer.turns.lock:
        engine.streamer.turns.refuse_while_running("cool")
        engine.streamer.cool()
        if engine.experts is not None:
            engine.experts.cool()


def detach(model: Model) -> Model:
    """Undo :func:`load` or :func:`djinn.offload`: return the same model as an ordinary one, hooks and ring gone.

    A model from :func:`load` is then in host memory; an offloaded module is where it was, bit for bit as it was but for
    what passes have changed in its buffers. What waited in host memory stays there and is not copied.

    Raises:
        ConfigError: not a model that streams, or called in the middle of a pass.
        PlanError: the weights do not fit the host memory that is free; the model goes on streaming.
    """
    engine = engine_of(model)
    with engine.streamer.turns.lock, torch.inference_mode(False):
        engine.streamer.turns.refuse_while_running("detach")
        _detach(model, engine)
    return model


def _detach(model: nn.Module, engine: Engine) -> None:
    units = engine.plan.units
    needed, free = engine.weights.copied_bytes(units), engine.ranks.share_of_host(usable_ram())
    with engine.ranks.agreed():
        if needed > free:
            raise PlanError(
                f"host memory: the whole model needs another {format_bytes(needed)}, {format_bytes(free)} are free; it "
                "goes on streaming"
            )
        for device in engine.weights.devices:
            _require_room_at_home(engine.plan, device)
    engine.weights.give_back(units)
    del engines[model]
    engine.resources.close()
    restore(model, engine.weights, engine.before)


def _require_room_at_home(planned: Plan, device: torch.device) -> None:
    """Hold a model that goes back to a GPU against the memory there, with what streaming gives back.

    Raises:
        PlanError: there is less.
    """
    if device.type != "cuda":
        return
    needed = sum(unit.raw_bytes for unit in planned.units)
    free = free_device_memory(device)[0] + planned.device_bytes - planned.workspace_bytes
    if needed > free:
        raise PlanError(
            f"device memory: the whole model needs {format_bytes(needed)} on {device}, {format_bytes(free)} are free; "
            "it goes on streaming"
        )


def register(model: nn.Module, engine: Engine) -> None:
    """Keep ``engine`` for as long as ``model`` lives."""
    engines[model] = engine
    weakref.finalize(model, closer().close, engine.resources, engine.weights.coder.device)


def engine_of(model: nn.Module) -> Engine:
    """Return what streams a model.

    Raises:
        ConfigError: not a model that streams.
    """
    try:
        return engines[model]
    except KeyError:
        raise ConfigError(
            f"this {type(model).__name__} does not stream; djinn.load returns models that do, and djinn.offload makes "
            "any module do so"
        ) from None
