"""The reference records: whole, unchanged, readable, and what README's table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.artifact.bundle import kept_files, verify
from djinn.artifact.readme import rewritten
from djinn.artifact.reference import expected, folders, read_manifest
from djinn.bench.records import read_records
from djinn.places import ROOT


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_is_what_its_manifest_and_checksums_say(folder: Path) -> None:
    named = read_manifest(folder).files
    for name in set(kept_files(folder)) - {"manifest.json"}:
        assert name in named or any(key.endswith("/") and name.startswith(key) for key in named), name
    assert all((folder / name).exists() for name in named)
    verify(folder)
    for path in folder.rglob("*.jsonl"):
        assert path.name.startswith("timeline") or read_records(path)


def test_readme_shows_records_and_claims() -> None:
    """After new records or claims: python -m djinn.artifact.readme."""
    readme = (ROOT / "README.md").read_text()
    assert all(f"<!-- {name}: written by djinn.artifact.readme -->" in readme for name in ("results", "claims"))
    assert rewritten(readme) == readme


def test_expected_values_are_those_of_runs_on_the_same_kind_of_device() -> None:
    everywhere, on_gpus, on_cpus = expected(), expected("cuda"), expected("cpu")
    assert "2-cores" in everywhere["C2"]
    assert "2-cores" not in on_gpus["C2"]
    assert "h100" not in on_cpus["C2"]
    assert on_gpus["C5"] == everywhere["C5"], "only a CPU can measure it"
    assert on_cpus["C11"] == everywhere["C11"], "only a GPU can measure it"
