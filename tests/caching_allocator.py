"""Torch's CUDA allocator on paper, and what a model's passes ask of it, so that plans can be held against it anywhere.

Recorded are the operators of a CPU, its attention's among them, without an attention mask; a GPU's differ little.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` with its default settings. On an H100 (torch 2.11) the same
passes of Llama-2-7B ran out of memory at the same tensor: 43 MiB wanted with 0.34 GiB in fragments here, 44 and 0.34
there; and Llama-2-70B in 24 GB peaked at 23.97 GB in both.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from djinn.planning.workspace import Workload

MIB = 2**20
Event = tuple[int, int]
"""A tensor's number and its bytes where it is made, 0 where it is freed."""


class OutOfMemoryError(Exception):
    """Says what was wanted, and how much of what the allocator holds is in fragments."""


@dataclass
class _Block:
    nbytes: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


class CachingAllocator:
    """Takes segments from a device of ``limit`` bytes, cuts blocks from them, and puts freed neighbours together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0
        self.allocated = 0
        self.peak = 0
        self._free: dict[bool, list[_Block]] = {True: [], False: []}

    def allocate(self, nbytes: int) -> _Block:
        """Return a block of at least ``nbytes``: the smallest that is free, or the beginning of a new segment."""
        size = max(-(-nbytes // 512) * 512, 512)
        small = size <= MIB
        fits = self._free[small]
        place = bisect.bisect_left(fits, size, key=lambda block: block.nbytes)
        block = fits.pop(place) if place < len(fits) else self._segment(size, small)
        rest = block.nbytes - size
        if rest >= 512 if small else rest > MIB:
            block.nbytes = size
            left = _Block(rest, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = left
            block.after = left
            self._keep(left)
        block.free = False
        self.allocated += block.nbytes
        return block

    def release(self, block: _Block) -> None:
        """Take ``block`` back."""
        self.allocated -= block.nbytes
        if block.before is not None and block.before.free:
            self._forget(block.before)
            block.nbytes += block.before.nbytes
            block.before = block.before.before
            if block.before is not None:
                block.before.after = block
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block.nbytes += block.after.nbytes
            block.after = block.after.after
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def _segment(self, size: int, small: bool) -> _Block:
        needed = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + needed > self.limit:
            self._give_back()
        if self.reserved + needed > self.limit:
            fragments = self.reserved - self.allocated
            raise OutOfMemoryError(f"{size / MIB:.0f} MiB wanted, {fragments / MIB:.0f} MiB in fragments")
        self.reserved += needed
        self.peak = max(self.peak, self.reserved)
        return _Block(needed, small)

    def _give_back(self) -> None:
        """Give segments of which nothing is used back to the device."""
        for small, blocks in self._free.items():
            whole = [block for block in blocks if block.before is None and block.after is None]
            self.reserved -= sum(block.nbytes for block in whole)
            self._free[small] = [block for block in blocks if all(block is not other for other in whole)]

    def _keep(self, block: _Block) -> None:
        block.free = True
        bisect.insort(self._free[block.small], block, key=lambda each: each.nbytes)

    def _forget(self, block: _Block) -> None:
        blocks = self._free[block.small]
        place = bisect.bisect_left(blocks, block.nbytes, key=lambda each: each.nbytes)
        while blocks[place] is not block:
            place += 1
        blocks.pop(place)


class _Recorder(TorchDispatchMode):
    """Notes every storage that an operation makes, and when nothing refers to it any more."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._known = known  # held, or another storage may come to lie at the address of one that is gone
        self._numbers = {tensor.untyped_storage()._cdata: -1 for tensor in known}
        self._alive: list[tuple[StorageWeakRef, int, int]] = []
        self._made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sweep()
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._numbers:
                    self._numbers[storage._cdata] = self._made
                    self._alive.append((StorageWeakRef(storage), storage._cdata, self._made))
                    self.events.append((self._made, storage.nbytes()))
                    self._made += 1
        return result

    def sweep(self) -> None:
        """Note what has been freed since."""
        alive = []
        for reference, key, number in self._alive:
            if reference.expired():
                self._numbers.pop(key)
                self.events.append((number, 0))
            else:
                alive.append((reference, key, number))
        self._alive = alive


def events_of(config: PretrainedConfig, work: Workload) -> list[Event]:
    """Return what ``generate`` makes and frees beside weights, in bfloat16: tensors without memory, on any machine."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        tokens = torch.zeros(work.batch, work.prompt_tokens, dtype=torch.int64)
        recorder = _Recorder([*model.parameters(), *model.buffers(), tokens])
        cache = None
        with recorder:
            for _ in range(work.new_tokens):
                output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens, cache = output.logits[:, -1:].float().argmax(-1), output.past_key_values
                del output
        recorder.sweep()
    return recorder.events


def play(events: Sequence[Event], allocator: CachingAllocator) -> None:
    """Make and free what ``events`` say.

    Raises:
        OutOfMemoryError: the allocator has no room.
    """
    blocks: dict[int, _Block] = {}
    for number, nbytes in events:
        if nbytes:
            blocks[number] = allocator.allocate(nbytes)
        elif number in blocks:
            allocator.release(blocks.pop(number))
