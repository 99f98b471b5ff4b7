"""Host time that djinn's hooks add to each unit, on a model of 1,000 small modules.

    python benchmarks/hooks.py [--modules 1000] [--runs 7] [--profile] [--output hooks.json]

A chain of small linear layers with a streamed unit each, and copies that take nothing, so that the hooks and what torch
does to call them are left. Passes of the hooked chain and of the same chain without hooks take turns; the median of
the differences over the number of units is what streaming costs the host for each. ``counted_us`` is what the hooks
themselves count into ``stats.hook_s``.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from djinn.engine.coding import Scratch
from djinn.engine.presence import Presence
from djinn.engine.streamer import Streamer
from djinn.planning.ring import schedule
from djinn.transport.stats import Stats
from djinn.weights.tensors import Seeded, TensorEntry
from djinn.weights.units import PlacedTensor, Unit

WIDTH = 8


class NoCopies:
    """A copier that copies nothing, so that the hooks' own time is left."""

    def __init__(self) -> None:
        self.ring = torch.empty(0, dtype=torch.uint8)

    def submit(self, unit: int, after: int | None) -> None: ...

    def wait(self, unit: int) -> None: ...

    def release(self, unit: int) -> None: ...

    def decode(self, unit: Unit, decode: Any) -> None: ...

    def settle(self) -> None: ...

    def computed(self, unit: Unit) -> None: ...

    def resolve_timeline(self) -> None: ...

    def close(self) -> None: ...


def chain(modules: int) -> nn.Sequential:
    """Return the model."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(modules))).requires_grad_(False)


def hooked(modules: int) -> tuple[nn.Sequential, Stats]:
    """Return the chain with a streamer that has a unit for each module, and a ring of a tenth of them."""
    model = chain(modules)
    nbytes = WIDTH * WIDTH * 4
    units = tuple(
        Unit(str(number), (str(number),), (PlacedTensor(name, _entry(name), 0),))
        for number, name in enumerate(f"{number}.weight" for number in range(modules))
    )
    ring_bytes = nbytes * max(modules // 10, 2)
    slots = tuple(schedule([nbytes] * modules, ring_bytes))
    sizes = {"model_bytes": nbytes * modules, "resident_bytes": 0, "host_bytes": nbytes * modules, "disk_bytes": 0}
    stats = Stats(ring_bytes=ring_bytes, **sizes)
    present = {unit.name: Presence(model.get_submodule(unit.name).parameters()) for unit in units}
    Streamer(units, slots, NoCopies(), stats, {}, Scratch(0, torch.device("cpu")), present).attach(model)
    return model, stats


def _entry(name: str) -> TensorEntry:
    return TensorEntry(torch.float32, (WIDTH, WIDTH), Seeded(name, 0))


def pass_s(model: nn.Module) -> float:
    """Return the time of one pass, s."""
    x = torch.ones(1, WIDTH)
    start = time.perf_counter()
    with torch.no_grad():
        model(x)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="say which functions the time goes to")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = chain(options.modules)
    model, stats = hooked(options.modules)
    for either in (plain, model):
        pass_s(either)
    before = stats.hook_s
    runs = [{"plain_s": pass_s(plain), "hooked_s": pass_s(model)} for _ in range(options.runs)]
    added_us = statistics.median(run["hooked_s"] - run["plain_s"] for run in runs) / options.modules * 1e6
    counted_us = (stats.hook_s - before) / options.runs / options.modules * 1e6
    print(f"{added_us:.3g} µs per unit added to a pass, of which the hooks count {counted_us:.3g} µs")
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(pass_s, model)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    if options.output is not None:
        result = {"modules": options.modules, "added_us": added_us, "counted_us": counted_us, "runs": runs}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
