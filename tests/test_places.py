"""Where things are: in a checkout, and in an installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from djinn import places
from djinn.places import ROOT, from_root


def test_a_checkout_is_its_own_place() -> None:
    assert Path(__file__).resolve().parent.parent == ROOT == places.CHECKOUT
    there = (places.CONFIG_DIR, places.CLAIMS_FILE, places.ARCHITECTURE_DIR, places.REFERENCE_DIR, places.NOTEBOOK_DIR)
    assert all(path.exists() for path in there)
    assert places.RUNS_DIR == ROOT / "artifact" / "runs"
    assert places.CHECKPOINT_DIR == ROOT / "artifact" / "checkpoints"


def test_an_installed_package_is_never_written_into(tmp_path: Path) -> None:
    package, working = tmp_path / "site-packages" / "djinn", tmp_path / "working"
    (package / "_data").mkdir(parents=True)
    working.mkdir()
    shutil.copy(places.__file__, package)
    (package / "__init__.py").touch()
    code = "from djinn.places import *; print(CHECKOUT, CONFIG_DIR, RUNS_DIR, CHECKPOINT_DIR, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(package.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=working, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed == [
        "None",
        str(package / "_data" / "artifact" / "configs"),
        str(working / "artifact" / "runs"),
        str(tmp_path / "cache" / "djinn" / "checkpoints"),
    ]


def test_what_is_written_down_names_no_home(tmp_path: Path) -> None:
    assert from_root(ROOT / "artifact" / "runs" / "x") == "artifact/runs/x"
    assert from_root(tmp_path) == str(tmp_path)
