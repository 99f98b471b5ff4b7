"""Replaying reference records: everything is drawn again, and says that it was not measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fabricated import fabricated

from djinn.artifact import replay as replaying
from djinn.artifact.bundle import verify
from djinn.artifact.reference import folders
from djinn.artifact.replay import replay
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
