"""DeepSpeed ZeRO-3 inference with parameters offloaded to host memory (``cpu``) or to files (``nvme``).

The configuration starts from ``artifact/configs/ds_config.json``; what depends on the model and the machine is filled
in by :func:`configuration` and recorded. On several GPUs each rank keeps its part of every parameter,
moves that over its own link, and gathers the others' from their GPUs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn import hardware
from djinn.bench.rank_workers import rendezvous
from djinn.bench.systems.base import Job, PassCounter
from djinn.bench.systems.common import (
    FILLERS,
    config_of,
    require_disk,
    require_ram,
    skeleton,
    synthetic_weight,
    weight_bytes,
)
from djinn.errors import UnavailableError
from djinn.places import CONFIG_DIR
from djinn.planning.workspace import COLLECTIVES_BYTES, workspace_bytes

TEMPLATE = CONFIG_DIR / "ds_config.json"

_EXTENSIONS = ("async_io", "deepspeed_shm_comm", "pin_memory")
_LIVE_LAYERS = 3.5
_REST_BYTES = 10**9
"""What a GPU holds besides workspace, persistent and 1.5 times live parameters: 0.8 GB at 70B, 0.7 GB at 34B (H100)."""


class DeepSpeed(PassCounter):
    """See the module's text. A parameter above the persistence threshold crosses the link once in every pass."""

    def __init__(self, engine: Any, job: Job, settings: dict[str, str | int | float | bool], keep: object) -> None:
        self._engine = engine
        self._keep = keep
        weights = list(engine.module.parameters())
        resident = [weight for weight in weights if weight.ds_persist]
        streamed = [weight for weight in weights if not weight.ds_persist]
        if not job.on_gpu:
            # The link is the disk: weights in host memory never cross it, nor do those too small for DeepSpeed to swap.
            streamed = [weight for weight in streamed if weight.ds_tensor.final_location == "nvme"]
        super().__init__(
            engine.module,
            resident=sum(weight.ds_numel * weight.element_size() for weight in resident),
            streamed=_held_bytes(streamed),
            settings=settings,
        )
        if not job.on_gpu and job.variant == "cpu":
            self.host_bytes = _held_bytes(weights) - _held_bytes(resident)

    def close(self) -> None:
        """Release the engine; its swap files lie in the job's scratch folder, which goes with the job."""
        self._engine.destroy()


def check(job: Job) -> None:
    """Import DeepSpeed, build the extensions it compiles on first use, and see that its copy of the weights has room.

    Raises:
        UnavailableError: a package, compiler, header, memory or disk that is missing; says which.
    """
    if hardware.installed("deepspeed") is None:
        raise UnavailableError("DeepSpeed is not installed: pip install 'djinn[baselines]'")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UnavailableError("DeepSpeed compiles its extensions on first use and finds no C++ compiler: install g++")
    model = skeleton(job)
    ranks = job.profile.gpus
    sizes = [parameter.numel() for parameter in model.parameters()]
    settings = configuration(sizes, _layer_elements(model), job)
    if job.variant == "nvme":
        buffers = settings["zero_optimization"]["offload_param"]
        swapped = buffers["buffer_count"] * buffers["buffer_size"] * job.dtype.itemsize
        require_ram(ranks * swapped, "DeepSpeed's swap buffers")
        require_disk(weight_bytes(model), "DeepSpeed's second copy of the weights", job)
    else:
        # torch rounds page-locked memory up to a power of two, parameter by parameter; each rank has its part of each.
        needed = [-(-size // ranks) * job.dtype.itemsize for size in sizes]
        held = sum(1 << (size - 1).bit_length() for size in needed) if job.on_gpu else sum(needed)
        made = sum(sorted(sizes)[-FILLERS:]) * job.dtype.itemsize if job.in_memory else 0
        require_ram(ranks * held + made, "DeepSpeed's copy of all weights in host memory")
    _set_environment(job)
    _build(job)


def load(job: Job) -> DeepSpeed:
    """Load the model partitioned by ZeRO-3, and make the inference engine."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    empty = skeleton(job)
    settings = configuration([p.numel() for p in empty.parameters()], _layer_elements(empty), job)
    keep = None
    if job.in_memory:
        model = _partitioned_synthetic(job, settings)
    else:
        # transformers finds the configuration through a weak reference, and partitions while it loads.
        keep = HfDeepSpeedConfig(settings)
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype, trust_remote_code=False).eval()
    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.module.eval()
    return DeepSpeed(engine, job, _flat(settings["zero_optimization"]), keep)


def tuned_settings(parameters: Sequence[int], layer: int, job: Job) -> dict[str, int]:
    """Return ZeRO-3's limits in elements; ``parameters`` are the elements of each, ``layer`` those of a layer.

    On a CPU one bucket is the largest parameter and two are live: what is live costs memory, and disk or memory
    copies are already as long as they need be. On a GPU the bucket is one layer and 3.5 layers are live, the fastest
    of the settings tried on an H100 (buckets from one matrix to two layers). Live ones are counted 1.5 times, for what
    the allocator holds between them; twice on several GPUs, where parts are gathered into buffers first, and NCCL takes
    some: with 1.5 two H200s ran out of memory. What then is left of the budget persistent parameters fill: any may be
    one, and DeepSpeed takes them in the model's order as long as they fit (``mark_persistent_parameters`` in its
    ``runtime/zero/parameter_offload.py``, 0.19.8), so that the first layers stay on the GPU, and of later ones norms.
    """
    largest = max(parameters)
    if not job.on_gpu:
        bucket, live, threshold, persistent = largest, 2 * largest, 0, 0
    else:
        bucket, live, threshold = max(layer, largest), max(int(_LIVE_LAYERS * layer), 2 * largest), largest
        workspace = workspace_bytes(config_of(job), job.dtype, torch.device("cuda"), job.profile.work)
        rest, times = (_REST_BYTES, 1.5) if job.profile.gpus == 1 else (_REST_BYTES + COLLECTIVES_BYTES, 2.0)
        room = job.profile.budget - workspace - rest - int(times * live * job.dtype.itemsize)
        persistent = max(room, 0) // job.dtype.itemsize
    return {
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": live,
        "stage3_param_persistence_threshold": threshold,
        "stage3_model_persistence_threshold": persistent,
    }


def configuration(parameters: Sequence[int], layer: int, job: Job) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the artifact's file, with what depends on model and machine filled in.

    Args:
        parameters: elements of each parameter.
        layer: elements of the largest layer.
        job: what is to be loaded.
    """
    settings: dict[str, Any] = json.loads(TEMPLATE.read_text())
    settings["bf16"] = {"enabled": job.profile.dtype == "bfloat16"}
    settings["fp16"] = {"enabled": job.profile.dtype == "float16"}
    zero = settings["zero_optimization"]
    zero |= tuned_settings(parameters, layer, job) | job.tuning
    offload = zero["offload_param"]
    # Page-locking serves copies to a GPU; on a CPU there are none.
    offload |= {"device": job.variant, "pin_memory": job.on_gpu}
    if job.variant == "nvme":
        offload |= {"nvme_path": str(job.scratch), "buffer_size": -(-max(parameters) // job.profile.gpus)}
    else:
        del offload["buffer_count"]
    return settings


def _layer_elements(model: PreTrainedModel) -> int:
    """Return the elements of the largest block of the model, as transformers' ``_no_split_modules`` names blocks."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or [])]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)


def _held_bytes(weights: Sequence[Any]) -> int:
    """Return the bytes of these parameters that this process keeps: all of them, or a rank's part."""
    return sum(weight.ds_tensor.ds_numel * weight.element_size() for weight in weights)


def _set_environment(job: Job) -> None:
    """Set what DeepSpeed reads from the environment: it finds ninja, and a single process calls itself a rank."""
    os.environ |= {
        "DS_ACCELERATOR": job.profile.device,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if job.profile.gpus == 1:
        os.environ |= rendezvous(1) | {"RANK": "0", "LOCAL_RANK": "0"}


def _build(job: Job) -> None:
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.comm.torch import build_shm_op
    except Exception as error:  # its import inspects compilers and drivers, and fails in many ways
        raise UnavailableError(f"DeepSpeed cannot be imported: {type(error).__name__}: {error}") from error
    async_io = get_accelerator().create_op_builder("AsyncIOBuilder")
    if job.variant == "nvme" and not async_io.is_compatible():
        raise UnavailableError(
            "DeepSpeed's async_io needs libaio headers: apt install libaio-dev (or conda install libaio)"
        )
    try:
        with _only_builder():
            build_shm_op()  # as init_distributed does, in which ranks wait for one another
            if job.variant == "nvme":
                async_io.load()
        deepspeed.init_distributed("nccl" if job.on_gpu else "gloo")
    except (RuntimeError, OSError) as error:
        raise UnavailableError(f"DeepSpeed could not build its extensions: {error}") from error


@contextmanager
def _only_builder() -> Iterator[None]:
    """Build extensions one process at a time, and take away the locks that killed builds left behind.

    torch waits for such a lock without end. Ours goes with its process, so whoever holds it knows the others are dead.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "djinn.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for extension in _EXTENSIONS:
            for lock in root.rglob(f"{extension}/lock"):
                lock.unlink(missing_ok=True)
        yield


def _partitioned_synthetic(job: Job, settings: dict[str, Any]) -> PreTrainedModel:
    """Return the synthetic model, its parameters filled in host memory a few at a time and partitioned one by one."""
    import deepspeed
    from transformers.initialization import no_init_weights

    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = AutoModelForCausalLM.from_config(config_of(job), dtype=job.dtype, trust_remote_code=False)
    model.tie_weights()
    # zero.Init makes arange return half precision, and with it the frequencies of rotary embeddings: other tokens.
    exact = dict(skeleton(job).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.data = exact[name].to(buffer.device)
    named = list(model.named_parameters())
    first = os.environ["RANK"] == "0"  # DeepSpeed gives the others their parts of what it makes

    def made(name: str, parameter: Any) -> torch.Tensor:
        return synthetic_weight(name, parameter.ds_shape, parameter.dtype, job.profile.seed)

    with ThreadPoolExecutor(FILLERS) as pool:
        for start in range(0, len(named), FILLERS):  # a few at a time, for they are in memory a second time until then
            names, parameters = zip(*named[start : start + FILLERS], strict=True)
            weights = pool.map(made, names, parameters) if first else [None] * len(parameters)
            for parameter, weight in zip(parameters, weights, strict=True):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if weight is not None:
                        parameter.data.copy_(weight)
    return model.eval()


def _flat(zero: dict[str, Any]) -> dict[str, str | int | float | bool]:
    flat = {key: value for key, value in zero.items() if not isinstance(value, dict)}
    return flat | {f"offload_{key}": value for key, value in zero["offload_param"].items() if key != "nvme_path"}
