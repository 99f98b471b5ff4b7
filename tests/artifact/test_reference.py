"""The reference records: whole, unchanged, readable, and what the generated pages and README's picture say."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest

from djinn.artifact.bundle import kept_files, verify
from djinn.artifact.claims import evaluate, load_claims, read_claims
from djinn.artifact.metrics import read_evidence
from djinn.artifact.pages import DOCS, pages, results_page
from djinn.artifact.pictures import PICTURE, figure_frames, picture_frame
from djinn.artifact.reference import expected, folders, read_manifest, runs
from djinn.bench.records import read_records
from djinn.bench.run import Run


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_is_what_its_manifest_and_checksums_say(folder: Path) -> None:
    named = read_manifest(folder).files
    for name in set(kept_files(folder)) - {"manifest.json"}:
        assert name in named or any(key.endswith("/") and name.startswith(key) for key in named), name
    assert all((folder / name).exists() for name in named)
    verify(folder)
    for path in folder.rglob("*.jsonl"):
        assert path.name.startswith("timeline") or read_records(path)


@pytest.mark.parametrize("name", ["results.md", "claims.md"])
def test_generated_pages_show_records_and_claims(name: str) -> None:
    """After new records or claims: python -m djinn.artifact.pages."""
    assert pages()[DOCS / name] == (DOCS / name).read_text()


@pytest.mark.parametrize("folder", runs(), ids=lambda folder: folder.name)
def test_verdicts_beside_the_records_are_those_of_todays_claims(folder: Path) -> None:
    """After new claims: python -m djinn.artifact.pages."""
    evidence = read_evidence(Run(folder))
    written, today = read_claims(folder), [evaluate(claim, evidence) for claim in load_claims()]
    for one, other in zip(written, today, strict=True):
        assert one.model_copy(update={"measured": None}) == other.model_copy(update={"measured": None})
        # Processors add up in different orders.
        assert one.measured == (None if other.measured is None else pytest.approx(other.measured))


def test_the_newest_record_of_a_machine_and_model_stands_first() -> None:
    front, _, older = results_page().partition("\n## Older and partial records\n")
    headings = [re.findall(r"^### (.*)", part, flags=re.M) for part in (front, older)]
    assert len(set(headings[0])) == len(headings[0]), "one section for each machine and model"
    assert set(headings[1]) <= set(headings[0]), "what is older has a newer one above"
    dates = re.findall(r"^(\d{4}-\d\d-\d\d), ", front, flags=re.M)
    assert dates == sorted(dates, reverse=True)


def test_tables_show_display_names_alone() -> None:
    shown = re.findall(r"^\| ([^|]+?) \|", results_page(), flags=re.M)
    assert not [name for name in shown if ":" in name]


def test_the_pages_pictures_show_the_records() -> None:
    """The CSV is what a picture was drawn from."""
    for name, frame in {PICTURE.name: picture_frame(), **figure_frames()}.items():
        buffer = StringIO()
        frame.to_csv(buffer, index=False)
        picture = PICTURE.with_name(f"{name}.png")
        assert buffer.getvalue() == picture.with_suffix(".csv").read_text()
        assert 10_000 < picture.stat().st_size < 130_000


def test_expected_values_are_those_of_runs_on_the_same_kind_of_device() -> None:
    everywhere, on_gpus, on_cpus = expected(), expected("cuda"), expected("cpu")
    assert "2-cores" in everywhere["C2"]
    assert "2-cores" not in on_gpus["C2"]
    assert "h100" not in on_cpus["C2"]
    assert on_gpus["C5"] == everywhere["C5"], "only a CPU can measure it"
    assert on_cpus["C11"] == everywhere["C11"], "only a GPU can measure it"
