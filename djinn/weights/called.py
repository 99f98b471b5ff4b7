"""What a user calls a model: a synthetic architecture, a folder or a hub id. Told without importing anything large."""

from __future__ import annotations

import re
from pathlib import Path

from djinn.errors import CheckpointError
from djinn.weights.architectures import architecture_path

SYNTHETIC = "synthetic:"
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def require_known(model: str) -> None:
    """Refuse what no model can be called. Whether a hub has it, and whether a folder holds one, is not looked at.

    Raises:
        ConfigError: an unknown synthetic architecture.
        CheckpointError: neither a folder nor a hub id.
    """
    if model.startswith(SYNTHETIC):
        architecture_path(model.removeprefix(SYNTHETIC))
    elif not Path(model).expanduser().is_dir() and HUB_ID.fullmatch(model) is None:
        raise CheckpointError(
            f"no folder {model!r}, and not a hub id either; a model is a checkpoint folder, org/name@revision, "
            f"or {SYNTHETIC}<architecture>"
        )
