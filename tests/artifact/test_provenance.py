"""Provenance names what was used, and nobody's home."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from djinn.artifact import provenance
from djinn.artifact.provenance import write_provenance
from djinn.places import REFERENCE_DIR, ROOT
from djinn.profiles import load_profile


def test_provenance(tmp_path: Path):
    profile = load_profile("smoke_13b").override(seed=7)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "01_certify.done.json").write_text('{"wall_s": 3.0}')
    document = json.loads(write_provenance(tmp_path, profile).read_text())
    assert document["model"] == {"name": "synthetic:llama-2-13b", "synthetic": True, "seed": 7, "revision": None}
    assert document["config_digest"] == profile.digest
    assert document["notebooks"] == {"01_certify": {"wall_s": 3.0}}
    assert document["lock_sha256"] == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert {"torch", "transformers", "papermill"} <= set(document["packages"])
    assert document["link_rates"] is None
    assert {"driver", "gpus"} <= set(document["machine"])
    assert document["peak_memory"] == {}
    assert str(ROOT) not in json.dumps(document)


def test_provenance_of_a_measured_run(fabricated_run: Path):
    profile = load_profile("smoke_13b").override(model="org/name@0123abc")
    rates = [{"kind": "pinned to device", "chunk_bytes": 1 << 26, "gbps": 55.0}]
    certified = json.loads((REFERENCE_DIR / "h100_2026-11-25" / "results" / "certify.json").read_text())
    certified |= {"link": rates}
    (fabricated_run / "results" / "certify.json").write_text(json.dumps(certified))
    document = json.loads(write_provenance(fabricated_run, profile).read_text())
    assert document["model"] == {"name": "org/name@0123abc", "synthetic": False, "seed": None, "revision": "0123abc"}
    assert document["link_rates"] == rates
    assert document["machine"] == certified["machine"], "where the records come from, not where they are written up"
    peaks = document["peak_memory"]
    assert peaks["djinn"] == {
        "peak_device_bytes": 4_200_000_000, "peak_host_bytes": 9_000_000_000, "peak_anon_bytes": 8_000_000_000
    }  # fmt: skip
    assert peaks["accelerate:disk"]["peak_device_bytes"] is None
    assert "deepspeed:cpu" not in peaks  # it finished no run


def test_what_is_drawn_elsewhere_keeps_what_it_was_measured_with(fabricated_run: Path):
    """A run of an H100, whose figures are drawn here, where there is none."""
    certified = (REFERENCE_DIR / "h100_2026-11-25" / "results" / "certify.json").read_text()
    (fabricated_run / "results" / "certify.json").write_text(certified)
    measured = {"revision": "0123abc", "dirty": False, "lock_sha256": "f" * 64, "packages": {"torch": "2.11.0"}}
    (fabricated_run / "provenance.json").write_text(json.dumps(measured))
    document = json.loads(write_provenance(fabricated_run, load_profile("smoke_13b")).read_text())
    assert {name: document[name] for name in measured} == measured
    assert document["machine"] == json.loads(certified)["machine"]
    (fabricated_run / "provenance.json").unlink()
    unknown = json.loads(write_provenance(fabricated_run, load_profile("smoke_13b")).read_text())
    assert {name: unknown[name] for name in measured} == dict.fromkeys(measured)


def test_of_a_package_that_is_installed_twice_the_one_that_is_imported_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        info = tmp_path / folder / f"a_package-{version}.dist-info"
        info.mkdir(parents=True)
        name = {"first": "a_package", "second": "a-package"}[folder]
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    found = provenance._packages()
    assert found["a_package"] == "2.0"
    assert "a-package" not in found
