"""Where a run's results come from: revision, lock file, packages, machine, configuration and model, times."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from djinn import hardware
from djinn.bench.machines import kind_of
from djinn.bench.run import Run
from djinn.figures.frames import read_runs
from djinn.files import write_text
from djinn.places import CHECKOUT, ROOT
from djinn.profiles import Profile

_SOFTWARE = ("revision", "dirty", "lock_sha256", "packages")
"""What belongs to the place where records are measured, and not to the one where they are drawn."""


def write_provenance(run_dir: Path, profile: Profile) -> Path:
    """Write ``provenance.json`` of a run and return its path; what is unknown is null.

    Holds the git revision and whether the tree had changes, the lock file's SHA-256, every installed package, the
    machine that was certified (this one if none was) with its driver and link, the link's measured rates, the profile
    as used, the model (synthetic with its seed, or the revision that pins it), each system's peak memory over its runs
    in bytes, and what each finished notebook said of itself: parameters, revision, start, wall seconds. What is
    replayed keeps the provenance of its records. What is drawn again on another machine than the certified one keeps
    the revision, the lock and the packages that it was measured with; null where nobody wrote them down there.
    """
    path = run_dir / "provenance.json"
    run = Run(run_dir)
    if run.replayed:
        return path
    here = hardware.describe(run_dir)
    certified = run.certification.model_dump(mode="json") if run.certification else {}
    is_here = run.certification is None or kind_of(run.certification.machine) == kind_of(here)
    document: dict[str, Any] = {
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **(_software() if is_here else {name: run.provenance.get(name) for name in _SOFTWARE}),
        "model": {
            "name": profile.model,
            "synthetic": profile.synthetic,
            "seed": profile.seed if profile.synthetic else None,
            "revision": profile.model.partition("@")[2] or None,
        },
        "config_digest": profile.digest,
        "profile": profile.model_dump(mode="json"),
        "notebooks": run.notebooks_done,
        "machine": certified.get("machine") or here.model_dump(mode="json"),
        "link_rates": certified.get("link"),
        "peak_memory": _peaks(run_dir),
    }
    write_text(path, json.dumps(document, indent=2) + "\n")
    return path


def git_state() -> dict[str, Any]:
    """Return ``revision`` and ``dirty`` (changes to tracked files) of this repository; None outside of git."""
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _software() -> dict[str, Any]:
    """Return what runs here: see :data:`_SOFTWARE`."""
    lock = ROOT / "requirements.lock"
    return {
        **git_state(),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "packages": _packages(),
    }


def _peaks(run_dir: Path) -> dict[str, dict[str, int | None]]:
    """Return for each system the largest device, resident and anonymous host memory that any run of it took."""
    kinds = ("peak_device_bytes", "peak_host_bytes", "peak_anon_bytes")
    runs = read_runs(run_dir).groupby("name", sort=False)[list(kinds)].max()
    peaks = runs.dropna(how="all").to_dict("index")
    return {
        str(name): {kind: None if isnan(peak[kind]) else int(peak[kind]) for kind in kinds}
        for name, peak in peaks.items()
    }


def _git(*arguments: str) -> str | None:
    if CHECKOUT is None:
        return None
    # The ceiling keeps git from answering for another repository that this one was unpacked in.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(CHECKOUT.parent)}
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _packages() -> dict[str, str]:
    """Return the version of every package; of one that is installed twice, that which Python imports."""
    found: dict[str, tuple[str, str]] = {}
    for each in importlib.metadata.distributions():  # in the order in which Python looks for modules
        found.setdefault(canonicalize_name(each.name), (each.name, each.version))
    return dict(found[name] for name in sorted(found))
