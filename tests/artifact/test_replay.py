"""Replaying reference records: everything is drawn again, and says that it was not measured here."""

from __future__ import annotations

import html
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fabricated import fabricated

from djinn.artifact import replay as replaying
from djinn.artifact.bundle import verify
from djinn.artifact.reference import folders, read_manifest
from djinn.artifact.replay import replay
from djinn.bench.ownership import owned
from djinn.bench.records import append_record
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.profiles import load_profile


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_reference_records_are_replayed(tmp_path: Path) -> None:
    complete = [folder for folder in folders() if (folder / "profile.yaml").is_file()]
    assert complete
    assert [path.name for path in replay(tmp_path)] == [f"replay-{folder.name}" for folder in complete]
    for folder in complete:
        run_dir = tmp_path / f"replay-{folder.name}"
        report = (run_dir / "index.html").read_text()
        assert "Nothing on this page was measured here" in report
        assert Run(run_dir).replayed.removeprefix("replayed: ") in report
        assert (run_dir / "figures" / "bandwidth.pdf").is_file()
        notebooks = sorted((run_dir / "notebooks").glob("*.ipynb"))
        pages = [notebook.with_suffix(".html") for notebook in notebooks]
        assert all(f"notebooks/{page.name}" in report for page in pages)
        assert not any(re.search(r"<script|(src|href)=.?(https?:)?//", page.read_text()) for page in pages)
        notes = [source.notes for source in read_manifest(folder).files.values() if source.notes]
        assert all(note in html.unescape(report) for note in notes)
        assert (run_dir / "provenance.json").read_bytes() == (folder / "provenance.json").read_bytes()
        assert (run_dir / "results" / "baselines.jsonl").read_bytes() == (
            folder / "results" / "baselines.jsonl"
        ).read_bytes()
        verify(run_dir)


def test_an_earlier_replay_is_replaced_and_a_run_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"replay-{next(folder for folder in folders() if (folder / 'profile.yaml').is_file()).name}"
    mine = tmp_path / name / "results" / "baselines.jsonl"
    append_record(mine, fabricated(load_profile("smoke_13b"), "djinn", 0))
    monkeypatch.setattr(replaying, "execute", lambda *_: None)
    with pytest.raises(ConfigError, match="no replay"):
        replay(tmp_path)
    assert mine.is_file()
    Run(tmp_path / name).replay_path.write_text(json.dumps({"machine": "x", "date": "y"}))
    replay(tmp_path)
    assert len(mine.read_text().splitlines()) > 1


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the only reference run is replayed, without its figures and report."""
    folder = next(folder for folder in folders() if (folder / "profile.yaml").is_file())
    monkeypatch.setattr(replaying, "runs", lambda: [folder])
    monkeypatch.setattr(replaying, "execute", lambda *_: None)
    monkeypatch.setattr(replaying, "write_report", lambda run_dir: run_dir / "index.html")
    return tmp_path / f"replay-{folder.name}"


def test_what_another_is_at_work_on_is_left_alone(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere() -> None:
        with ThreadPoolExecutor(1) as other, pytest.raises(ConfigError, match="in use by another thread"):
            other.submit(replay, one.parent).result(60)

    replay(one.parent)
    with owned(one):
        elsewhere()
    assert (one / "results").is_dir()
    monkeypatch.setattr(replaying, "execute", lambda *_: elsewhere())
    replay(one.parent)  # in the place of the first


def test_a_replay_that_was_killed_is_replaced(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Path, run_dir: Path, **__: object) -> None:
        (run_dir / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            replay(one.parent)
    assert (one / "half").is_dir()
    assert replay(one.parent) == [one]
    assert (one / "results").is_dir()
    assert not (one / "half").exists()
