"""Where things are: the data that djinn comes with, and where checkpoints and runs are kept.

In a checkout of the repository all of it lies where people see it. An installed package carries its data inside itself,
keeps synthetic checkpoints in the user's cache folder and runs in the current folder, and is never written into.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PACKED_DATA = _PACKAGE / "_data"
"""What the build puts into the package; a checkout has no such folder."""

CHECKOUT: Path | None = None if _PACKED_DATA.is_dir() else _PACKAGE.parent
"""The repository's root; None for an installed package."""
DATA = CHECKOUT or _PACKED_DATA
ROOT = CHECKOUT or Path.cwd()
"""Where relative paths of a run begin: the repository, or the folder in which djinn was started."""

CONFIG_DIR = DATA / "artifact" / "configs"
CLAIMS_FILE = DATA / "artifact" / "claims.yaml"
ARCHITECTURE_DIR = DATA / "data" / "architectures"
REFERENCE_DIR = DATA / "data" / "reference"
NOTEBOOK_DIR = DATA / "notebooks"

RUNS_DIR = ROOT / "artifact" / "runs"
_CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "djinn"
CHECKPOINT_DIR = (CHECKOUT / "artifact" if CHECKOUT else _CACHE_DIR) / "checkpoints"

KERNEL_DIR = _CACHE_DIR / "kernels"
"""Where code is that was compiled for this machine's processor."""

CERTIFICATION = Path("results") / "certify.json"
"""Where a run keeps what was found out of its machine."""


def certification_path(folder: Path) -> Path | None:
    """Return the certification of a run, or of a folder that holds it alone; None if there is none yet."""
    return next((path for path in (folder / CERTIFICATION, folder / CERTIFICATION.name) if path.is_file()), None)


def from_root(path: Path) -> str:
    """Return ``path`` as seen from :data:`ROOT`, so that what is written down names no one's home."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
