"""The guard after the parameters cell: what it refuses, and what it makes of the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from djinn.artifact import notebook
from djinn.bench.run import Run
from djinn.errors import ConfigError, DjinnError
from djinn.places import ROOT
from djinn.profiles import load_profile


def given(run_dir: Path | str | None, **changes: Any) -> dict[str, Any]:
    """Return what a kernel's namespace holds after the parameters cell and the cell that papermill injects."""
    cell = "\n".join(f"{name} = None" for name in notebook.PARAMETERS)
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    names = dict.fromkeys(notebook.PARAMETERS) | {"profile": "smoke_tiny", "run_dir": run_dir and str(run_dir)}
    return names | changes | {"In": ["", cell, injected]}


def test_unset_parameters_keep_the_profiles_values(tmp_path: Path):
    session = notebook.begin("02_baselines", given(tmp_path / "x"))
    assert session.profile == load_profile("smoke_tiny")
    assert load_profile(session.run_dir / "profile.yaml") == session.profile


def test_overrides(tmp_path: Path):
    session = notebook.begin("02_baselines", given(tmp_path, budget="6 MB", runs=1, systems="djinn, accelerate:disk"))
    assert (session.profile.budget, session.profile.runs) == (6_000_000, 1)
    assert session.profile.systems == ("djinn", "accelerate:disk")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "70b"}, "no parameter 'modle'; did you mean model?; the parameters are profile, run_dir, "),
        ({"zzz": None}, "no parameter 'zzz'; the parameters are profile"),
        ({"zzz": ["a"]}, "no parameter 'zzz'"),
        ({"runs": "three"}, "parameter runs = 'three' is str; expected a whole number"),
        ({"runs": 1e5}, "parameter runs = 100000.0 is float; expected a whole number"),
        ({"model": 1e5}, "parameter model = 100000.0 is float; expected a checkpoint folder"),
        ({"model": 7}, "parameter model = 7 is int; expected a checkpoint folder"),
        ({"runs": True}, "parameter runs = True is bool"),
        ({"profile": None}, "parameter profile = None is NoneType; expected a profile's name"),
        ({"budget": 24}, "parameter budget = 24 is int; expected a size with its unit"),
        ({"budget": "24"}, "budget: size '24' is not a positive number with a unit"),
        ({"runs": 0}, "runs: Input should be greater than or equal to 1"),
        ({"systems": "djinn,vllm"}, "no system 'vllm'; the systems are djinn"),
        ({"profile": "smoke_13B"}, "no profile 'smoke_13B'; the profiles are compare_13b, compare_34b"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        notebook.begin("02_baselines", given(tmp_path / "x", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_missing_parameter_is_refused(tmp_path: Path):
    namespace = given(tmp_path)
    del namespace["chunk"]
    with pytest.raises(ConfigError, match="the parameters cell does not set 'chunk'"):
        notebook.begin("02_baselines", namespace)


def test_what_nobody_gave_is_not_taken_for_a_parameter(tmp_path: Path):
    startup = {
        "json": json,
        "begin": notebook.begin,
        "Out": {},
        "_i": "x",
        "records": [object()],
        "modle": "70b",
        "e": 2.7,
    }
    namespace = given(tmp_path) | startup | {"e": 2.7}
    namespace["In"] = ["", "modle = '70b'", "%pylab", *namespace["In"][1:], "e = 2.7"]  # the user's own cells
    notebook.begin("x", namespace)


def test_a_misspelt_parameter_is_forgotten_once_its_cell_is_mended(tmp_path: Path):
    namespace = given(tmp_path)
    before, mended = namespace["In"][1] + "\nmodle = '70b'", namespace["In"][1]
    with pytest.raises(ConfigError, match="no parameter 'modle'"):
        notebook.begin("x", namespace | {"modle": "70b", "In": ["", before]})
    notebook.begin("x", namespace | {"modle": "70b", "In": ["", before, mended]})


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "hdfs://host/run", "/here/s3:/bucket"])
def test_a_run_directory_elsewhere_is_refused_by_name(url: str):
    with pytest.raises(ConfigError, match=r"(s3|gs|hdfs)://…: results go to a folder of this machine"):
        notebook.begin("x", given(url))


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/x cannot be written: Not a directory; choose another"):
        notebook.begin("02_baselines", given(tmp_path / "file" / "x"))


def test_one_run_directory_holds_one_configuration(tmp_path: Path):
    notebook.begin("02_baselines", given(tmp_path, runs=2))
    with pytest.raises(ConfigError, match=r"holds another configuration \(runs: 2 there, 3 asked for\)"):
        notebook.begin("03_sweep", given(tmp_path))
    notebook.begin("03_sweep", given(tmp_path, runs=2))


def test_relative_run_directories_mean_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    relative = f"artifact/runs/{tmp_path.name}"
    try:
        session = notebook.begin("01_certify", given(relative))
        assert session.run_dir == ROOT / relative
    finally:
        for path in sorted((ROOT / relative).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (ROOT / relative).rmdir()


def test_the_sentinel_is_there_only_after_the_end(tmp_path: Path):
    session = notebook.begin("01_certify", given(tmp_path, runs=2))
    notebook.finish(session, "Two checks pass.")
    sentinel = Run(tmp_path).done("01_certify")
    assert sentinel is not None
    assert sentinel["config_digest"] == session.profile.digest
    assert sentinel["parameters"]["runs"] == 2
    notebook.begin("01_certify", given(tmp_path, runs=2))
    assert Run(tmp_path).done("01_certify") is None


def test_a_notebook_says_how_long_it_will_take_and_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    session = notebook.begin("02_baselines", given(tmp_path, profile="smoke_13b"))
    notebook.finish(session, "djinn takes 2 s per token.")
    began, _, meaning, finished, found = capsys.readouterr().out.splitlines()
    assert "all four notebooks take about 30 minutes; this one took " in began
    assert finished == "02_baselines: finished in 0 s"
    assert found == "djinn takes 2 s per token."
    assert "in this run is the disk" in meaning
    notebook.begin("02_baselines", given(tmp_path / "tiny"))
    began, _, meaning = capsys.readouterr().out.splitlines()
    assert began.endswith("about 2 minutes")  # no reference run
    assert "This is a smoke run" in meaning


def test_a_failed_check_stops_with_its_words(tmp_path: Path):
    session = notebook.begin("01_certify", given(tmp_path))
    session.check(True, "fine")
    with pytest.raises(DjinnError, match="no such luck"):
        session.check(False, "no such luck")
    shown = session.overview().data
    assert shown.index("5 MB") < shown.index("<details>") < shown.index("chunk") < shown.index("torch")
    assert not re.search("bytes|not set, not", shown)
