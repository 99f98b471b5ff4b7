"""What an experts module gets in the place of its weights: objects that know in which slot each expert is.

transformers runs experts in three ways, and all of them take expert ``i`` of ``n`` as ``weight[i]``, gather
``weight[ids]``, or multiply by groups with ``F.grouped_mm(rows, weight, offs)``. The objects here answer these three
from the pool, with the bits that a resident model's weights would give, because each product is of the same shapes:

- an index gives a view of the expert's slot, a gather copies the same bytes from other places;
- on a GPU the kernel of a grouped product is chosen by the number of rows, of groups, and the rows per group. Rows are
  brought into the order of slots and all slots are passed as groups, with idle rows behind them such that rows per
  group stay the same; or one expert at a time is passed as each of the groups, with as many rows as ever, of which only
  its own are multiplied. On a processor each group is a product by itself.

Numbers of experts stay as they are, and so does the order in which a token's outputs are summed. Where a layer needs
more experts than there are slots they come in rounds, tensor by tensor: between two products nothing is summed. Any
other use of the weights gets all of them, put together in memory of their own: right, and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from djinn.engine.expert_tensors import ExpertTensor
from djinn.engine.whereabouts import Whereabouts
from djinn.planning.experts import MOST_GROUPS

Bring = Callable[[str, Sequence[int]], dict[int, int]]
"""Brings a tensor (by its name) of the first of some experts, as many as there is room for; returns their slots."""

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""What transformers calls an experts module with."""


class Asked(NamedTuple):
    """A call of an experts module, as it was made."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by their names."""
        return dict(zip(ARGUMENTS, self.args, strict=False)) | dict(self.kwargs)

    def instead(self, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return other arguments, each given as its like was."""
        count = len(self.args)
        return tuple(named[name] for name in ARGUMENTS[:count]), {name: named[name] for name in ARGUMENTS[count:]}

    def picked(self, experts: int) -> tuple[torch.Tensor, bool]:
        """Return the numbers of the experts that each token picked, [tokens, picked], and whether the call shows them.

        Where it does not, they are all of the ``experts``.
        """
        found = self.args[1] if len(self.args) > 1 else self.kwargs.get("top_k_index")
        if isinstance(found, torch.Tensor) and found.dim() == 2 and found.dtype in (torch.int32, torch.int64):
            return found, True
        return torch.arange(experts)[None], False


def _no_rounds(name: str, experts: Sequence[int]) -> dict[int, int]:
    raise AssertionError(f"{name}: experts {experts} were not picked")


@dataclass
class Call:
    """One call of an experts module. ``index``: the numbers of the experts that each token picked."""

    experts: int
    index: torch.Tensor
    where: Whereabouts
    bring: Bring = _no_rounds
    places: Mapping[int, int] | None = None
    """The slot of every expert that was picked; None where they come in rounds."""
    is_known: bool = True
    """Whether the call shows what was picked; if not, ``index`` is all experts."""
    arrive: Callable[[str], None] = lambda _: None
    """Makes the compute that follows wait until a tensor, by its name, of all of them is there."""

    def __post_init__(self) -> None:
        self._found: dict[str, torch.Tensor] = {}
        """By table, what the numbers in ``_key`` were found to be there."""
        self._key: torch.Tensor | None = None
        self._by_slot: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rounds: dict[str, dict[int, int]] = {}
        """By tensor, the slots of those that came last, where they come in rounds."""

    def with_index(self, index: torch.Tensor, picks: np.ndarray) -> Call:
        """Return the call with other experts: ``index`` on the device, and the same ``picks`` on the host."""
        other = replace(self, index=index)
        vars(other)["picks"] = picks.reshape(-1).tolist()  # the host need not ask for them
        return other

    @cached_property
    def picks(self) -> list[int]:
        """The picked experts, token by token, on the host."""
        return list(chain.from_iterable(self.index.tolist()))

    @cached_property
    def wanted(self) -> list[int]:
        """The experts that were picked, in ascending order."""
        return sorted(set(self.picks))

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each expert was picked: int64 [experts]."""
        return np.bincount(self.picks, minlength=self.experts)

    def look_up(self, tensor: ExpertTensor, key: torch.Tensor) -> torch.Tensor:
        """Return for each number of an expert in ``key`` its slot, or where its coded parts are; never waits."""
        if self._key is not key:
            self._key = key
            self._found.clear()
        if tensor.table not in self._found:
            self._found[tensor.table] = self.where.look_up(tensor, key)
        return self._found[tensor.table]

    def slots(self, name: str, experts: Sequence[int]) -> Mapping[int, int]:
        """Return the slots of ``experts``, of those first among them that fit at once; their tensor is there."""
        if self.places is not None:
            self.arrive(name)
            return self.places
        if experts[0] not in self._rounds.get(name, {}):
            after = [expert for expert in self.wanted if expert > experts[0] and expert not in experts]
            places = self.bring(name, [*experts, *after])
            # Where another expert is now, its tensors may lie over the other's: coded ones differ in length.
            self._rounds = {other: found for other, found in self._rounds.items() if found == places} | {name: places}
        return self._rounds[name]

    def upload(self, numbers: np.ndarray) -> torch.Tensor:
        """Return ``numbers``, int64, on the device, without waiting for it."""
        if not self.index.is_cuda:
            return torch.from_numpy(numbers)
        table = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=True)
        table.numpy()[:] = numbers
        return table.to(self.index.device, non_blocking=True)

    def by_slot(self, padded: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the order of a grouped product's rows, which come by expert, by slot; and where each slot's rows end.

        Behind the ordered rows the first one stands idle, so that they are ``padded`` in all.
        """
        if self._by_slot is None:
            assert self.places is not None
            ends = np.cumsum(self.counts)
            order = sorted(self.wanted, key=self.places.__getitem__)
            rows = [np.arange(ends[expert] - self.counts[expert], ends[expert]) for expert in order]
            until = np.zeros(slots, np.int64)
            until[[self.places[expert] for expert in order]] = np.cumsum(self.counts[order])
            idle = np.zeros(padded - len(self.picks), np.int64)
            self._by_slot = (
                self.upload(np.concatenate([*rows, idle])),
                self.upload(np.maximum.accumulate(until)).to(torch.int32),
            )
        return self._by_slot


class HandedWeights:
    """One tensor of all of a module's experts, as far as it is there: [experts, ...]."""

    def __init__(self, call: Call, tensor: ExpertTensor, *, transposed: bool = False) -> None:
        self._call = call
        self._tensor = tensor
        self._transposed = transposed
        self.dtype = tensor.dtype
        self.device = tensor.device

    @property
    def shape(self) -> torch.Size:
        """As that of the weights that it stands for."""
        *front, last, least = (self._call.experts, *self._tensor.shape)
        return torch.Size([*front, least, last] if self._transposed else [*front, last, least])

    @property
    def ndim(self) -> int:
        """As that of the weights that it stands for."""
        return len(self.shape)

    def transpose(self, first: int, second: int) -> HandedWeights:
        """Return the weights with each expert's matrix transposed."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise IndexError(f"transpose({first}, {second}): only an expert's own two dimensions can be exchanged")
        return HandedWeights(self._call, self._tensor, transposed=not self._transposed)

    def data_ptr(self) -> int:
        """Return an address with the alignment that the weights have."""
        return self._tensor.address

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self._call.experts

    def __getitem__(self, key: Any) -> torch.Tensor:
        if isinstance(key, torch.Tensor) and key.dtype in (torch.int32, torch.int64):
            return self._turned(self._gathered(key) if key.dim() else self._one(int(key)))
        return self._turned(self._one(key)) if isinstance(key, int) else self._all()[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # before there is anything to ask, while it is copied
        return getattr(self._all(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weights_second = len(args) == 2 and isinstance(args[1], HandedWeights)
        given = {name for name, value in kwargs.items() if value is not None}
        if "grouped_mm" in getattr(func, "__name__", "") and weights_second and given == {"offs"}:
            return args[1]._grouped(func, args[0], kwargs["offs"])
        whole = [arg._all() if isinstance(arg, HandedWeights) else arg for arg in args]
        named = {name: arg._all() if isinstance(arg, HandedWeights) else arg for name, arg in kwargs.items()}
        return func(*whole, **named)

    def _turned(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.transpose(-2, -1) if self._transposed else weights

    def _slots(self, experts: Sequence[int]) -> Mapping[int, int]:
        return self._call.slots(self._tensor.name, experts)

    def _one(self, expert: int) -> torch.Tensor:
        return self._tensor.one(expert, self._slots([expert])[expert])

    def _gathered(self, key: torch.Tensor) -> torch.Tensor:
        call, tensor = self._call, self._tensor
        if call.places is not None and (key.is_cuda or not tensor.coded):
            found = call.look_up(tensor, key)
            call.arrive(tensor.name)
            if not tensor.coded:
                return tensor.slots[found]
            return tensor.decode_at(found.reshape(-1), key.numel()).view(*key.shape, *tensor.shape)
        ids = key.reshape(-1).tolist()
        out = tensor.empty(len(ids))
        left = sorted(set(ids))
        while left:
            places = self._slots(left)
            here = [(row, expert) for row, expert in enumerate(ids) if expert in places and expert in left]
            tensor.gather([(expert, places[expert]) for _, expert in here], out, [row for row, _ in here])
            left = [expert for expert in left if expert not in places]
        return out.view(*key.shape, *tensor.shape)

    def _grouped(self, func: Any, rows: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """Return the grouped product of ``rows`` [P, in], which come by expert, each expert's up to its ``offs``."""
        call, total = self._call, len(rows)
        out = rows.new_empty(total, self.shape[-1])
        ends = np.cumsum(call.counts)
        if not call.is_known or ends[-1] != total:
            return func(rows, self._all(), offs=offs)  # whose rows they are is not known
        if not total:
            return out
        is_raw_there = call.places is not None and not self._tensor.coded
        if rows.device.type != "cpu" and is_raw_there and (slots := len(self._tensor.slots)) <= MOST_GROUPS:
            padded = max(total, total // call.experts * slots)
            if padded // slots == total // call.experts:
                order, until = call.by_slot(padded, slots)
                call.arrive(self._tensor.name)
                made = func(rows[order], self._turned(self._tensor.slots), offs=until)
                out[order[:total]] = made[:total]
                return out
        several = rows.device.type != "cpu"
        reach = torch.cat([rows, torch.empty_like(rows)]) if several else rows
        for expert in call.wanted:
            begin, end = int(ends[expert] - call.counts[expert]), int(ends[expert])
            weights = self._turned(self._one(expert))[None]
            groups = call.experts if several else 1
            mine = reach[begin : begin + total] if several else rows[begin:end]
            made = func(mine, weights.expand(groups, -1, -1), offs=offs.new_full((groups,), end - begin))
            out[begin:end] = made[: end - begin]
        return out

    def _all(self) -> torch.Tensor:
        """Return all experts' weights, of which only those that were picked are there; the others are zero."""
        tensor = self._tensor
        found = tensor.empty(self._call.experts).zero_()
        for expert in self._call.wanted:
            found[expert] = self._one(expert)
        return self._turned(found)
