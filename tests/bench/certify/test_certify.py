"""Certification of this very machine, end to end, on the smallest profile."""

from pathlib import Path

import pytest
import torch

from djinn import hardware
from djinn.bench import certify as module
from djinn.bench.certify import certify
from djinn.bench.certify.certification import Certification, read_certification
from djinn.bench.certify.proof import prove
from djinn.bench.rates.several import SUM_BYTES, LinksTogether, SumRate
from djinn.errors import ConfigError, PlanError
from djinn.gpus import Gpu
from djinn.host.rates import ProductRate
from djinn.places import CERTIFICATION
from djinn.profiles import load_profile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def certification(run_dir: Path) -> Certification:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHECKPOINT_DIR", run_dir / "checkpoints")
        return certify(load_profile("smoke_tiny"), run_dir, progress=False)


def test_this_machine_passes_the_smallest_profile(certification: Certification) -> None:
    assert certification.ok, certification.frame().query("verdict == 'fail'").to_string()
    assert certification.proof is not None
    assert certification.proof.holds


def test_what_predictions_lack_is_said_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no group")

    monkeypatch.setattr(module, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    monkeypatch.setattr(module.streaming, "split_s", failing)
    monkeypatch.setattr(module.compute, "measure", failing)
    found = certify(load_profile("smoke_ranks"), tmp_path, progress=False)
    assert found.streaming is not None
    assert found.streaming.decode_gbps
    assert found.compute is None
    lacking = {check.name: check for check in found.checks if check.measured == "not measured"}
    assert lacking.keys() == {"compute", "split modules"}
    assert all("no group" in check.remedy and check.verdict == "warn" for check in lacking.values())


def test_the_result_is_written_whole_and_read_back(certification: Certification, run_dir: Path) -> None:
    assert read_certification(run_dir) == certification
    assert [path.name for path in (run_dir / CERTIFICATION).parent.iterdir()] == ["certify.json"]
    assert list((run_dir / "checkpoints").iterdir()) == []


def test_the_tables_have_a_row_per_check_and_per_rate(certification: Certification) -> None:
    assert list(certification.frame().columns) == ["check", "measured", "needed", "verdict", "remedy"]
    assert len(certification.frame()) == len(certification.checks)
    host = certification.host
    assert host is not None
    products = len(host.alone) + 2 * len(host.beside_link)
    assert len(certification.rates_frame()) == len(certification.link) + len(certification.disk) + products > 5


def test_plans_are_predicted_from_what_was_measured(certification: Certification) -> None:
    several_gpus = certification.model_copy(
        update={
            "links": tuple(
                LinksTogether(gpus=gpus, gbps=gbps)
                for gpus, gbps in (
                    ((0,), (55.0,)),
                    ((0, 1, 2), (40.0, 38.0, 39.0)),
                    ((0, 1), (50.0, 48.0)),
                    ((1, 2), (49.0, 49.5)),
                )
            ),
            "sums": tuple(
                SumRate(nbytes=nbytes, seconds=seconds, beside_copies=beside)
                for beside, seconds in ((False, 1e-4), (True, 1.0))
                for nbytes in SUM_BYTES
            ),
        }
    )
    together = several_gpus.rates
    assert (together.links, together.sum_s, together.sum_rate) == (((2, 48e9), (3, 38e9)), 1e-4, SUM_BYTES[1] / 1e-4)
    assert len(several_gpus.rates_frame()) == len(certification.rates_frame()) + 8 + 4
    rates = certification.rates
    assert (rates.links, rates.sum_s, rates.sum_rate) == ((), 0.0, None)
    assert rates.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert rates.link in [rate.gbps * 1e9 for rate in certification.link]
    assert rates.disk in [rate.gbps * 1e9 for rate in certification.disk if rate.gbps and rate.kind == "read"]
    assert certification.compute is not None
    assert [rate.tokens for rate in rates.compute] == [rate.tokens for rate in certification.compute.rates]
    assert rates.module_s == certification.compute.module_s >= 0


def test_plans_get_what_link_and_cores_do_at_once(certification: Certification) -> None:
    assert certification.host is not None
    cores = certification.host.model_copy(
        update={
            "beside_link": tuple(
                ProductRate(tokens=tokens, gbps=gbps, link_gbps=49.0)
                for tokens, gbps in ((1, 55.0), (2, 43.0), (4, 42.0))
            ),
            "round_trip_s": 5e-5,
        }
    )
    rates = certification.model_copy(update={"host": cores}).rates
    assert (rates.cores_beside_link, rates.link_beside_cores) == (55e9, 49e9)
    assert (rates.cores_tokens, rates.cores_round_trip_s) == (2, 5e-5)
    unknown = certification.model_copy(update={"host": None}).rates
    assert (unknown.cores_beside_link, unknown.link_beside_cores, unknown.cores_tokens) == (None, None, 0)
    if not torch.cuda.is_available():
        assert (certification.rates.cores_beside_link, certification.rates.link_beside_cores) == (None, None)


def test_no_certification_yet_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_certification(tmp_path) is None
    (tmp_path / CERTIFICATION).parent.mkdir()
    (tmp_path / CERTIFICATION).write_text('{"profile": "smoke_tiny"')
    with pytest.raises(ConfigError, match="delete it"):
        read_certification(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_measurement_that_breaks_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: out of order")

    monkeypatch.setattr(module, "prove", broken)
    monkeypatch.setattr(module.link, "rates", broken)
    monkeypatch.setattr(module.disk, "rates", broken)
    monkeypatch.setattr(module.compute, "measure", broken)
    monkeypatch.setattr(module.host, "measure", broken)
    found = certify(load_profile("virt_mem_h100"), tmp_path, progress=False)
    assert not found.ok
    checks = {check.name: check for check in found.checks}
    assert "smoke_tiny" in checks["device"].remedy
    assert checks["streamed = resident"].remedy == "CUDA error: out of order"
    assert checks["plan"].verdict == "pass"


def test_a_profile_that_cannot_be_planned_says_what_would_do() -> None:
    profile = load_profile("smoke_tiny").override(ring="64 KB")
    with pytest.raises(PlanError, match="ring"):
        module.plan_of(profile)
    missing = load_profile("smoke_tiny").override(model="nobody/nothing")
    with pytest.raises(ConfigError, match="not on this disk"):
        module.plan_of(missing)


def test_the_processors_of_the_gpus_node_are_read_from_the_kernels_notation(certification: Certification) -> None:
    node = hardware.NumaNode(index=1, cpus="4-6,9", memory_bytes=1)
    gpu = Gpu(index=0, name="a GPU", memory_bytes=1, numa_node=1)
    machine = certification.machine.model_copy(update={"numa_nodes": (node,), "gpus": (gpu,)})
    assert module.gpu_cpus(machine) == {4, 5, 6, 9}
    assert module.gpu_cpus(machine.model_copy(update={"gpus": ()})) == frozenset()


@pytest.mark.gpu
def test_streaming_is_exact_on_a_gpu() -> None:
    assert prove("cuda").holds
