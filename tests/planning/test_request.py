"""A user's words become bytes in one place, or are refused there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import djinn
from djinn.errors import ConfigError
from djinn.planning.request import HOST_SHARE, Request
from djinn.planning.workspace import Workload

WORK = Workload(prompt_tokens=512, new_tokens=128, batch=1)


def request(**changes: Any) -> Request:
    return Request.of(**({"budget": "24 GB", "keep": WORK, "device": "cpu"} | changes))


def test_words_become_bytes() -> None:
    asked = request(ring="1 GiB", host_memory="100 GB", chunk="64 MiB", keep="2 GB", dtype=torch.float16)
    assert (asked.budget, asked.ring, asked.host_memory) == (24 * 10**9, 2**30, 100 * 10**9)
    assert (asked.chunk, asked.keep, asked.dtype) == (64 * 2**20, 2 * 10**9, torch.float16)
    assert asked.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "24"}, "size '24' is not a positive number with a unit"),
        ({"budget": 0}, "size 0 is not positive"),
        ({"ring": "-1 GB"}, "size '-1 GB'"),
        ({"host_memory": "much"}, "size 'much'"),
        ({"chunk": True}, "size True is not a string with a unit"),
        ({"keep": "0 GB"}, "size '0 GB' is not positive"),
        ({"device": "tpu"}, "device 'tpu': the devices are cpu and cuda"),
        ({"dtype": torch.int8}, r"dtype torch\.int8: it is torch\.bfloat16"),
        ({"coding": "zip"}, "coding 'zip': it is none or lossless"),
        ({"keep": Workload(prompt_tokens=-5, new_tokens=1, batch=1)}, "prompt_tokens -5: it is a whole number"),
        ({"keep": Workload(prompt_tokens=1, new_tokens=-1, batch=1)}, "new_tokens -1"),
        ({"keep": Workload(prompt_tokens=1, new_tokens=1, batch=0)}, "batch 0: it is a whole number of at least 1"),
        ({"keep": Workload(prompt_tokens=1, new_tokens=1, batch=1.5)}, r"batch 1\.5"),  # type: ignore[arg-type]
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        request(**changes)


@pytest.mark.parametrize("door", [djinn.plan, djinn.load, djinn.forecast])
def test_every_door_refuses_alike(door: Any) -> None:
    """A prompt of fewer than no tokens once made room for weights."""
    with pytest.raises(ConfigError, match="prompt_tokens -512"):
        door("synthetic:llama-tiny", budget="5 MB", device="cpu", prompt_tokens=-512)


@given(
    budget=st.integers(1, 10**12), free=st.integers(0, 10**12), given_back=st.integers(0, 10**12),
    staging=st.integers(0, 10**11), on_gpu=st.booleans(),
)  # fmt: skip
def test_an_arena_by_default_leaves_memory_for_others(
    budget: int, free: int, given_back: int, staging: int, on_gpu: bool
) -> None:
    asked = request(budget=budget, device="cuda" if on_gpu else "cpu")
    arena = asked.arena_bytes(free, given_back, staging)
    assert arena >= given_back, "what loading gives back is all the arena's"
    assert arena - given_back <= HOST_SHARE * free + 1
    assert arena - given_back <= max(free - staging, 0)
    if not on_gpu and arena > given_back:
        assert arena - given_back + budget <= HOST_SHARE * free + 1, "on a CPU the device is host memory too"


def test_an_arena_that_was_asked_for_is_given() -> None:
    assert request(host_memory="7 GB").arena_bytes(0, 5) == 7 * 10**9


def test_another_budget_or_generation_changes_nothing_else() -> None:
    asked = request(ring="1 GB")
    longer = Workload(prompt_tokens=4096, new_tokens=1, batch=2)
    other = asked.asking(budget=10**9, work=longer)
    assert (other.budget, other.keep, other.ring) == (10**9, longer, 10**9)
    assert asked.asking() == asked
