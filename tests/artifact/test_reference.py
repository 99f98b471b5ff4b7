"""The reference records: whole, unchanged, readable, and what README's table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.artifact.reference import (
    BEGIN,
    ROOT,
    checksums,
    folders,
    read_manifest,
    results_markdown,
    with_results,
)
from djinn.bench.records import read_records


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_is_what_its_manifest_and_checksums_say(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json", "SHA256SUMS"}
    assert (folder / "SHA256SUMS").read_text() == checksums(folder)
    for name in manifest.files:
        if name.endswith(".jsonl"):
            assert read_records(folder / name)


def test_readme_shows_the_records() -> None:
    """After new records: python -m djinn.artifact.reference."""
    readme = (ROOT / "README.md").read_text()
    assert BEGIN in readme
    assert with_results(readme, results_markdown()) == readme
