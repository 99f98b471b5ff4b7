"""Machines whose rates are known: reference records by name, runs by folder, this one by its newest certification."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from djinn import hardware
from djinn.bench.certify.certification import Certification
from djinn.bench.machines import certified_here, machine_names, machine_of
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.places import CERTIFICATION, REFERENCE_DIR

CPU = "2-cores_2026-11-25"


def write(run: Path, certification: Certification, age: int = 0) -> None:
    (run / CERTIFICATION).parent.mkdir(parents=True)
    (run / CERTIFICATION).write_text(certification.model_dump_json())
    os.utime(run / CERTIFICATION, (1e9 - age, 1e9 - age))


def elsewhere() -> Certification:
    """A certification that no machine under test can have."""
    reference = machine_of(CPU)
    return reference.model_copy(update={"machine": reference.machine.model_copy(update={"ram_bytes": 1})})


def here() -> Certification:
    """A certification that this machine could have, with another's rates."""
    reference = machine_of(CPU)
    machine = hardware.describe()
    return reference.model_copy(update={"machine": machine.model_copy(update={"gpus": ()})})


def test_reference_machines_have_the_rates_of_their_device() -> None:
    assert {CPU, "h100_2026-11-24", "h200_2026-11-24"} <= set(machine_names())
    h200, cpu = machine_of("h200_2026-11-24").rates, machine_of(CPU).rates
    assert (h200.device, cpu.device) == ("cuda", "cpu")
    assert h200.link == pytest.approx(55.4e9, rel=0.01)
    certified = machine_of(CPU)
    assert cpu.disk == max(1e9 * (rate.gbps or 0) for rate in certified.disk if rate.kind == "read")
    assert cpu.link == min(1e9 * rate.gbps for rate in certified.link)  # in chunks that no cache holds
    assert [rate.tokens for rate in cpu.compute] == [1, 8, 64, 512]
    assert (h200.compute, h200.module_s) == ((), 0.0)


def test_a_run_is_a_machine_too_and_anything_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", machine_of(CPU))
    assert machine_of(str(tmp_path / "run")) == machine_of(CPU)
    for name in ("l4", str(tmp_path), ""):
        with pytest.raises(ConfigError, match=f"the machines are {CPU}, .*h200_2026-11-24.*djinn certify"):
            machine_of(name)


def test_the_newest_certification_of_this_very_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = here().machine
    monkeypatch.setattr(hardware, "describe", lambda: machine)
    assert certified_here("cpu", tmp_path) is None
    write(tmp_path / "elsewhere", elsewhere())
    write(tmp_path / "replayed", here())
    Run(tmp_path / "replayed").replay_path.write_text(json.dumps({"machine": "another", "date": "2026-11-24"}))
    assert certified_here("cpu", tmp_path) is None
    write(tmp_path / "old", here(), age=2)
    write(tmp_path / "new", here(), age=1)
    found = certified_here("cpu", tmp_path)
    assert found is not None
    assert found[0].name == "new"
    assert certified_here("cuda", tmp_path) is None


def test_reference_folders_are_where_they_are_looked_for() -> None:
    assert (REFERENCE_DIR / CPU / CERTIFICATION).is_file()
