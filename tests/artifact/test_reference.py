"""The reference records: whole, unchanged, readable, and what README's table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.artifact.bundle import kept_files, verify
from djinn.artifact.reference import (
    BEGIN,
    ROOT,
    folders,
    read_manifest,
    results_markdown,
    with_results,
)
from djinn.bench.records import read_records


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_is_what_its_manifest_and_checksums_say(folder: Path) -> None:
    named = read_manifest(folder).files
    for name in set(kept_files(folder)) - {"manifest.json"}:
        assert name in named or any(key.endswith("/") and name.startswith(key) for key in named), name
    assert all((folder / name).exists() for name in named)
    verify(folder)
    for path in folder.rglob("*.jsonl"):
        assert path.name.startswith("timeline") or read_records(path)


def test_readme_shows_the_records() -> None:
    """After new records: python -m djinn.artifact.reference."""
    readme = (ROOT / "README.md").read_text()
    assert BEGIN in readme
    assert with_results(readme, results_markdown()) == readme
