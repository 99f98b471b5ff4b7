"""Reference records: what was measured on real machines, kept in ``data/reference``.

Each folder holds records as they were written, a ``manifest.json`` that says where each file comes from, and
``SHA256SUMS``; one that holds a whole run has its ``profile.yaml``, ``results`` and ``notebooks``. In it
``results/claims.json`` alone is derived: ``python -m djinn.artifact.pages`` judges the records anew by today's claims.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from djinn.artifact.claims import evaluate, load_claims
from djinn.artifact.metrics import read_evidence
from djinn.bench.run import Run
from djinn.places import REFERENCE_DIR
from djinn.reading import read_json


class Source(BaseModel):
    """Where one file, or every file of one folder, comes from: command, revision, and what a reader has to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    revision: str
    notes: str = ""


class Manifest(BaseModel):
    """What a folder of reference records holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    date: str
    files: dict[str, Source]


def folders(root: Path = REFERENCE_DIR) -> list[Path]:
    """Return the folders of reference records, in order of name."""
    return sorted(path.parent for path in root.glob("*/manifest.json"))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        ConfigError: it is not a manifest.
    """
    return read_json(folder / "manifest.json", Manifest)


def runs(root: Path = REFERENCE_DIR) -> list[Path]:
    """Return the folders that hold a whole run."""
    return [folder for folder in folders(root) if Run(folder).has_profile]


def run_of(profile: str, root: Path = REFERENCE_DIR) -> Path | None:
    """Return the newest reference run of a profile, None where there is none."""
    found = [folder for folder in runs(root) if Run(folder).profile.name == profile]
    return max(found, key=lambda folder: read_manifest(folder).date, default=None)


def measured(folder: Path) -> dict[str, str]:
    """Return what a reference run measured, by claim; claims that it has no number for are left out."""
    evidence = read_evidence(Run(folder))
    numbers = {claim.id: evaluate(claim, evidence).measured for claim in load_claims()}
    return {claim: f"{number:.4g}" for claim, number in numbers.items() if number is not None}


def expected(device: str | None = None, root: Path = REFERENCE_DIR) -> dict[str, str]:
    """Return for each claim what reference runs measured, and which.

    With a ``device``, a claim about any device shows only what was measured on that one.
    """
    found: dict[str, list[str]] = {}
    about = {claim.id: claim.needs.device for claim in load_claims()}
    for folder in runs(root):
        elsewhere = Run(folder).profile.device != device
        for claim, number in measured(folder).items():
            if device is not None and about[claim] is None and elsewhere:
                continue
            found.setdefault(claim, []).append(f"{number} ({folder.name})")
    return {claim: "; ".join(each) for claim, each in found.items()}
