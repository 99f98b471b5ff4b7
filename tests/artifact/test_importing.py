"""A run becomes a reference only with a revision that others can check out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from djinn.artifact.bundle import verify, write_sums
from djinn.artifact.importing import import_run, unclean
from djinn.artifact.reference import folders, read_manifest, runs
from djinn.bench.run import Run
from djinn.errors import CheckpointError, ConfigError

CLEAN = {"revision": "0123abc" + 33 * "0", "dirty": False}
RULE = "2026-11-28"
"""From this day on references are imported by :func:`import_run`."""


def state(run_dir: Path, run: dict[str, Any] = CLEAN, notebook: dict[str, Any] = CLEAN) -> Path:
    """Say what the run and its notebooks were measured with."""
    (run_dir / "provenance.json").write_text(json.dumps(run))
    for name, stated in (("02_baselines", notebook), ("04_figures", {"revision": None, "dirty": None})):
        done = {"wall_s": 3.0, "began_at": "2026-11-28T10:00:00+00:00", **stated}
        (run_dir / "results" / f"{name}.done.json").write_text(json.dumps(done))
    (run_dir / "notebooks").mkdir(exist_ok=True)
    (run_dir / "notebooks" / "02_baselines.ipynb").write_text("{}")
    (run_dir / "notebooks" / "02_baselines.html").write_text("a page")
    write_sums(run_dir)
    return run_dir


def test_a_clean_run_becomes_a_reference(fabricated_run: Path, tmp_path: Path) -> None:
    target = import_run(state(fabricated_run), "a-machine_2026-11-28", "a machine", "What to know.", root=tmp_path)
    assert folders(tmp_path) == runs(tmp_path) == [target]
    verify(target)
    manifest = read_manifest(target)
    assert (manifest.machine, manifest.date) == ("a machine", "2026-11-28")
    source = manifest.files["results/baselines.jsonl"]
    assert (source.command, source.revision) == ("make reproduce PROFILE=smoke_13b", "0123abc")
    assert source.notes == "What to know."
    assert Run(target).baselines == Run(fabricated_run).baselines
    assert [path.name for path in (target / "notebooks").iterdir()] == ["02_baselines.ipynb"]
    with pytest.raises(ConfigError, match="is there already"):
        import_run(fabricated_run, "a-machine_2026-11-28", "a machine", root=tmp_path)


@pytest.mark.parametrize(
    ("run", "notebook", "message"),
    [
        (CLEAN | {"dirty": True}, CLEAN, "the run ran with uncommitted changes"),
        (CLEAN | {"revision": None}, CLEAN, "the run names no revision"),
        (CLEAN, CLEAN | {"dirty": True}, "02_baselines ran with uncommitted changes"),
        (CLEAN, {"revision": "0123abc", "dirty": None}, "02_baselines ran with uncommitted changes"),
    ],
)
def test_what_cannot_be_checked_out_is_refused(
    fabricated_run: Path, tmp_path: Path, run: dict[str, Any], notebook: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        import_run(state(fabricated_run, run, notebook), "name", "a machine", root=tmp_path / "references")
    assert not (tmp_path / "references").exists()


def test_records_that_changed_since_are_refused(fabricated_run: Path, tmp_path: Path) -> None:
    state(fabricated_run)
    with (fabricated_run / "results" / "baselines.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"results/baselines\.jsonl: changed"):
        import_run(fabricated_run, "name", "a machine", root=tmp_path)


@pytest.mark.parametrize("folder", runs(), ids=lambda folder: folder.name)
def test_references_are_clean_from_the_day_of_the_rule_on(folder: Path) -> None:
    assert read_manifest(folder).date < RULE or not unclean(Run(folder))


@pytest.mark.parametrize("folder", runs(), ids=lambda folder: folder.name)
def test_a_references_machine_names_the_device_of_its_records(folder: Path) -> None:
    run = Run(folder)
    for machine in (run.machine, run.provenance.get("machine")):
        assert machine is not None
        named = machine.gpus[0].name if run.profile.device == "cuda" else machine.cpu
        assert {record.device_name for record in [*run.baselines, *run.sweep]} == {named}
