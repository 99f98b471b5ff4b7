"""Several GPUs: a process for each of them, a **rank**, holds its own shard of every weight and streams that.

Every rank plans, fills and streams by itself, as one process does alone; transformers adds up what they have computed
(see :mod:`djinn.engine.sharding`). What ranks have to agree on goes over a group of their own: errors while loading,
the memory that each may take, and what a pass is called with.
"""

from __future__ import annotations

import os
import sys
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from djinn import errors
from djinn.devices import require_here
from djinn.engine.binding import parameters_of
from djinn.engine.sharding import local_parameters, sharded
from djinn.engine.split_linear import shorten
from djinn.errors import ConfigError, DjinnError, UnavailableError
from djinn.gpus import own_gpu, ranks_started
from djinn.planning.request import Request
from djinn.planning.workspace import COLLECTIVES_BYTES
from djinn.weights.index import WeightIndex

TIMEOUT = timedelta(minutes=10)
"""Longest that a rank waits for another one, which may still be filling its memory."""
ENDED = 70
"""Exit status of a rank whose pass has failed: the others wait for it in a sum and could not go on."""


class Alone:
    """A process that holds a whole model."""

    collectives_bytes: ClassVar[int] = 0
    """Device memory of a plan's workspace that is not torch's to take: what adding up takes on a GPU."""

    def share(self, request: Request) -> Request:
        """Return what one process may take of what was asked for."""
        return request

    def share_of_host(self, nbytes: int) -> int:
        """Return what one process may take of a host's memory."""
        return nbytes

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise on all ranks what fails here on any."""
        yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """End this process if a pass within fails, as one does later: others wait for what it did not compute."""
        yield

    def distribute(self, index: WeightIndex[PreTrainedModel]) -> WeightIndex[PreTrainedModel]:
        """Return the index of what this process holds."""
        return index

    def parameters_of(self, index: WeightIndex[PreTrainedModel]) -> Mapping[str, Sequence[torch.Tensor]]:
        """Return by first name the tensors that hold each weight's bytes in this process."""
        return parameters_of(index)

    def hold_together(self, model: nn.Module) -> Iterator[Any]:
        """See to it that all ranks compute the same passes; yield handles that undo it."""
        yield from ()


class Ranks(Alone):
    """The processes that hold one model together, as one of them sees them."""

    collectives_bytes = COLLECTIVES_BYTES

    def __init__(self, config: DistributedConfig | None, device: torch.device) -> None:
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            # Without ``device_id``: with it NCCL makes a communicator for each group, used or not, in device memory.
            dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self._config = config
        self._device = device
        self._group = control_group()
        self._handled: BaseException | None = None
        """What the caller of a pass was handling when it began: no error of the pass."""

    def share(self, request: Request) -> Request:
        return replace(request.shared_by(self._here), device=self._device)

    def share_of_host(self, nbytes: int) -> int:
        return int(min(self.gather(nbytes))) // self._here

    @contextmanager
    def agreed(self) -> Iterator[None]:
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        said = self.gather(None if mine is None else (type(mine).__name__, str(mine)))
        if mine is not None:
            raise mine
        for rank, what in enumerate(said):
            if what is not None:
                kind = getattr(errors, what[0], DjinnError)
                raise kind(f"rank {rank}: {what[1]}")

    def distribute(self, index: WeightIndex[PreTrainedModel]) -> WeightIndex[PreTrainedModel]:
        assert self._config is not None
        return sharded(index, self._config)

    def parameters_of(self, index: WeightIndex[PreTrainedModel]) -> Mapping[str, Sequence[torch.Tensor]]:
        return local_parameters(index.model, self._device)

    def hold_together(self, model: nn.Module) -> Iterator[Any]:
        yield model.register_forward_pre_hook(self._compare, prepend=True, with_kwargs=True)
        yield model.register_forward_hook(self._end, always_call=True)
        yield from shorten(model)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order.

        Raises:
            UnavailableError: a rank has ended, or has not come for a long time.
        """
        found: list[Any] = [None] * self.count
        with self._answering():
            dist.all_gather_object(found, value, self._group)
        return found

    def _numbers(self, mine: int) -> list[int]:
        """Return the numbers of all ranks, in their order: as :meth:`gather` does, in one message and not in two.

        Raises:
            UnavailableError: as for :meth:`gather`.
        """
        found = torch.empty(self.count, 1, dtype=torch.int64)
        with self._answering():
            dist.all_gather(list(found), torch.tensor([mine]), self._group)
        return found.flatten().tolist()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UnavailableError(f"rank {self.rank}: another rank has ended or does not answer: {error}") from error

    @contextmanager
    def computing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._report(error)

    def _compare(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a pass whose inputs differ: sums over ranks would add up what does not belong together, silently."""
        self._handled = sys.exc_info()[1]
        checksum = 0
        for value in tree_iter((args, {name: kwargs[name] for name in kwargs if name != "past_key_values"})):
            if isinstance(value, torch.Tensor):
                stored = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
                checksum = zlib.crc32(stored.numpy().data, zlib.crc32(str(tuple(value.shape)).encode(), checksum))
        found = self._numbers(checksum)
        if len(set(found)) > 1:
            other = next(rank for rank, each in enumerate(found) if each != found[0])
            raise RanksDifferError(
                f"the inputs of rank {other} are not those of rank 0: every rank has to be called with the same "
                "tokens, and to sample with the same seed (torch.manual_seed)"
            )

    def _end(self, *_: object) -> None:
        """End this process if its pass has failed: the others wait for it in a sum, and end with it."""
        error = sys.exc_info()[1]
        if error is not None and error is not self._handled and not isinstance(error, RanksDifferError):
            self._report(error)

    def _report(self, error: BaseException) -> NoReturn:
        traceback.print_exception(error)
        print(f"rank {self.rank}: its pass failed, for which the other ranks wait; ending", file=sys.stderr)
        sys.stderr.flush()
        os._exit(ENDED)


def control_group() -> Any:
    """Return the group in which ranks agree, one for each default group: groups are never given back.

    It is gloo's, and takes no device memory.
    """
    return _control_group_beside(dist.group.WORLD)


@lru_cache(maxsize=1)
def _control_group_beside(_: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


class RanksDifferError(ConfigError):
    """Ranks were called with different inputs; all of them know."""


def ranks_of(config: DistributedConfig | None, device: torch.device) -> Alone:
    """Return the ranks that hold a model together under ``config``; without one, this process alone.

    Raises:
        ConfigError: one of several processes without a configuration, or a configuration in a single one.
    """
    started = ranks_started()
    if config is None:
        if started > 1:
            raise ConfigError(
                f"this is one of {started} processes (WORLD_SIZE), each of which would hold a whole model; "
                'distributed_config=DistributedConfig(tp_plan="auto") splits it over them'
            )
        return Alone()
    if started == 1:
        raise ConfigError(
            "distributed_config: this process was started alone; torchrun --nproc-per-node N starts one for each GPU"
        )
    return Ranks(config, own_device(device))


def ranks_holding(module: nn.Module, device: torch.device) -> Alone:
    """Return the ranks over which a module that is in memory is split; this process alone if it is not."""
    is_split = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    return Ranks(None, own_device(device)) if is_split else Alone()


def own_device(device: torch.device) -> torch.device:
    """Return this rank's own device of the kind that was asked for, which becomes torch's current one.

    Raises:
        ConfigError: another rank's GPU, or processors beside GPUs.
        UnavailableError: more ranks than GPUs.
    """
    if device.type == "cuda":
        number = own_gpu()
        if device.index not in (None, number):
            raise ConfigError(f"device {device}: this is rank {number} of its host, whose GPU is cuda:{number}")
        device = torch.device("cuda", number)
        require_here(device)
        torch.cuda.set_device(device)
    elif torch.cuda.is_available():
        raise ConfigError("device cpu: transformers distributes a model over the GPUs that this machine has")
    return device
