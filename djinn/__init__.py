"""Run language models larger than device memory by streaming their weights.

``djinn.load`` returns an ordinary Hugging Face model that streams; ``djinn.offload`` makes any module in memory do
so; ``djinn.plan`` says what loading would do, ``djinn.forecast`` how fast that would be; ``djinn.stats`` what it did;
``djinn.cool`` empties the ring; ``djinn.trace_experts`` records what routers pick; ``djinn.detach`` undoes it all.
``djinn.resolve`` makes or fetches a checkpoint, ``djinn.pack`` codes one without loss, so that fewer bytes cross the
link, and ``djinn.unpack`` gives the original back.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djinn.engine.expert_trace import trace_experts
    from djinn.engine.forecast import forecast
    from djinn.engine.load import cool, detach, load, stats
    from djinn.engine.offload import offload
    from djinn.engine.opened import plan
    from djinn.engine.rank_packing import pack
    from djinn.weights.pack import unpack
    from djinn.weights.resolve import resolve

    __version__: str

__all__ = [
    "cool", "detach", "forecast", "load", "offload", "pack", "plan", "resolve", "stats", "trace_experts", "unpack",
]  # fmt: skip

_HOMES = {
    "forecast": "djinn.engine.forecast",
    "offload": "djinn.engine.offload",
    "trace_experts": "djinn.engine.expert_trace",
    "plan": "djinn.engine.opened",
    "resolve": "djinn.weights.resolve",
    "pack": "djinn.engine.rank_packing",
    "unpack": "djinn.weights.pack",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and the command line's help needs neither.
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "djinn.engine.load")), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("djinn")
    raise AttributeError(f"module 'djinn' has no attribute {name!r}")
