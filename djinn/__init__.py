"""Run language models larger than device memory by streaming their weights.

``djinn.load`` returns an ordinary Hugging Face model that streams; ``djinn.plan`` says what it would do;
``djinn.stats`` what it did; ``djinn.cool`` empties the ring; ``djinn.detach`` undoes it all.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djinn.engine.model import cool, detach, load, plan, stats

__version__ = "0.1.0"
__all__ = ["cool", "detach", "load", "plan", "stats"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and the command line's help needs neither.
    if name in __all__:
        from djinn.engine import model

        return getattr(model, name)
    raise AttributeError(f"module 'djinn' has no attribute {name!r}")
