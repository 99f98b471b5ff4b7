"""Architectures that synthetic weights can be made for: each a published ``config.json`` in ``data/architectures``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from djinn.errors import ConfigError
from djinn.places import ARCHITECTURE_DIR

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def architecture_names() -> list[str]:
    """Return the names that ``synthetic:<name>`` accepts."""
    return sorted(path.stem for path in ARCHITECTURE_DIR.glob("*.json"))


def architecture_path(name: str) -> Path:
    """Return the config file of architecture ``name``.

    Raises:
        ConfigError: no such architecture; the message lists those there are.
    """
    if name not in architecture_names():
        raise ConfigError(f"no architecture {name!r}; the architectures are {', '.join(architecture_names())}")
    return ARCHITECTURE_DIR / f"{name}.json"


def load_architecture(name: str) -> PretrainedConfig:
    """Return the transformers config of architecture ``name``, with the dtype it was published in.

    Raises:
        ConfigError: no such architecture; the message lists those there are.
    """
    from transformers import AutoConfig  # takes seconds; a list of names does not

    config: PretrainedConfig = AutoConfig.from_pretrained(str(architecture_path(name)))
    return config
