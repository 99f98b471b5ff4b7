"""How fast a model's experts come, measured when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from routed_models import WORK, engine_experts, routed
from transformers import PreTrainedModel

import djinn
from djinn.engine.expert_layers import Layer, measured_rate
from djinn.engine.load import placement
from djinn.planning.experts import Pool
from djinn.transport.fetcher import Arrival
from djinn.transport.reader import Reader, allocate, settle

EXPERTS, NBYTES = 4, 1000
RATES = {True: 1e3, False: 1e6}
"""Bytes/s, by whether experts come from disk."""


class Clock:
    """A fetcher to which experts come as fast as :data:`RATES` say, and what opens a file takes a second more."""

    def __init__(self) -> None:
        self.now = 0.0
        self._open = False

    def fetch(self, arrivals: Sequence[Arrival], within: Sequence[tuple[int, int]], after: Any = None) -> None:
        assert [arrival.slot for arrival in arrivals] == list(range(len(arrivals)))
        self.now += 0.0 if self._open else 1.0
        self._open = True
        self.now += sum(NBYTES / RATES[arrival.source.image is None] for arrival in arrivals)

    def clock(self) -> float:
        return self.now


def layer(*, on_disk: bool) -> Any:
    unit = SimpleNamespace(weight_bytes=NBYTES)
    source = SimpleNamespace(image=None if on_disk else b"", unit=unit)
    return SimpleNamespace(unit=SimpleNamespace(weight_bytes=EXPERTS * NBYTES), sources=[source] * EXPERTS)


@pytest.mark.parametrize("on_disk", [[True], [False], [False, True, True], [True, False], [False, False, False, True]])
def test_the_rate_is_that_of_all_layers_wherever_they_wait(on_disk: list[bool]) -> None:
    """A pass asks every layer; which one is first does not matter."""
    layers: list[Layer] = [layer(on_disk=each) for each in on_disk]
    found = measured_rate(layers, Clock(), Pool(3, NBYTES, EXPERTS * len(layers), EXPERTS, 2))  # type: ignore[arg-type]
    assert found == pytest.approx(len(on_disk) / sum(1 / RATES[each] for each in on_disk))


def test_a_tensor_that_comes_alone_leaves_the_expert_s_other_bytes(
    resident: PreTrainedModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Packed ones share pages in a slot, and direct reads are of whole pages."""
    resident.save_pretrained(tmp_path / "plain", save_original_format=False)
    packed = djinn.pack(tmp_path / "plain", tmp_path / "packed", device="cpu")
    model = routed(packed, "half", host_memory="1 B")
    reader = Reader(2**20, threads=1)
    request.addfinalizer(reader.close)
    for each in engine_experts(model)._layers:
        for name, sources in each.by_tensor.items():
            for source, expert in zip(sources, each.unit.experts, strict=True):
                image = allocate(expert.image_bytes)
                image[:] = 0xA5
                settle(reader.fill(source.unit, image))
                others = [tensor for tensor in expert.tensors if tensor.name != name]
                for other in others:
                    assert (image[other.offset : other.offset + other.entry.nbytes] == 0xA5).all()


@pytest.mark.parametrize("host_memory", ["1 B", "1 GB"], ids=["disk", "memory"])
def test_measuring_leaves_no_trace(folder: Path, host_memory: str) -> None:
    budget = placement(routed(folder, "two windows", host_memory=host_memory)).budget
    model = djinn.load(folder, budget=budget, host_memory=host_memory, trace=True, **WORK)
    assert engine_experts(model)._whole_from is not None
    stats = djinn.stats(model)
    assert stats.timeline == []
    assert (stats.link_bytes, stats.disk_read_bytes, stats.stall_s) == (0, 0, 0)
