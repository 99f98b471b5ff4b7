"""Architectures that synthetic weights can be made for: each a published ``config.json`` in ``data/architectures``."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from djinn.errors import ConfigError
from djinn.places import ARCHITECTURE_DIR


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
    return AutoConfig.from_pretrained(str(architecture_path(name)))
