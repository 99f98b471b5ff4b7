"""The systems that are compared, each a module with ``check`` and ``load`` (see ``base.Loader``)."""

from __future__ import annotations

import importlib
from typing import cast

from djinn.bench.systems.base import Loader
from djinn.errors import ConfigError
from djinn.profiles import SYSTEM_VARIANTS


def loader(name: str) -> Loader:
    """Return the module that loads system ``name``; it alone imports what that system needs.

    Raises:
        ConfigError: no such system.
    """
    if name not in SYSTEM_VARIANTS:
        raise ConfigError(f"no system {name!r}; the systems are {', '.join(SYSTEM_VARIANTS)}")
    return cast(Loader, importlib.import_module(f"djinn.bench.systems.{name}"))
