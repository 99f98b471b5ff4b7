"""The PCIe trace: dmon's text is understood, and its child and the sampler end with the block."""

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn import gpus
from djinn.bench import pcie

H100 = """\
#Time        gpu    pwr  gtemp  mtemp   mclk   pclk  rxpci  txpci
#HH:MM:SS    Idx      W      C      C    MHz    MHz   MB/s   MB/s
 10:21:05      0     71     33     44   2619   1980      -      -
 10:21:06      0    142     36     47   2619   1980  54021    312
 10:21:06      1     70     31     42   2619    345      0      1
 10:21:07      0    143     36     47   2619   1980  54377      -
#Time        gpu    pwr  gtemp  mtemp   mclk   pclk  rxpci  txpci
#HH:MM:SS    Idx      W      C      C    MHz    MHz   MB/s   MB/s
 10:21:08      0    143     37     47   2619   1980  54102    298
 10:21:09      0    143     37     4"""

OLDER = """\
# Time      gpu   rxpci   txpci   pwr  temp
# HH:MM:SS  Idx    MB/s    MB/s     W     C
 23:59:59     0    22873     57    70    52
 00:00:01     0    22911     60    70    52
"""


def test_dmon_rows_with_their_missing_values_and_without_the_torn_line() -> None:
    assert pcie.parse_dmon(H100) == [
        pcie.DmonRow(37266, 0, 54.021, 0.312),
        pcie.DmonRow(37266, 1, 0.0, 0.001),
        pcie.DmonRow(37267, 0, 54.377, None),
        pcie.DmonRow(37268, 0, 54.102, 0.298),
    ]


def test_dmon_columns_are_found_by_name() -> None:
    assert [(row.rx_gbps, row.tx_gbps) for row in pcie.parse_dmon(OLDER)] == [(22.873, 0.057), (22.911, 0.06)]


@pytest.mark.parametrize("text", ["", "No devices were found\n", "# gpu pwr\n# Idx W\n 0 70\n", " 10:21:06 0 1 2\n"])
def test_dmon_text_without_pcie_columns_has_no_rows(text: str) -> None:
    assert pcie.parse_dmon(text) == []


def test_dmon_samples_are_of_some_gpus_and_may_pass_midnight() -> None:
    samples = pcie.dmon_samples(pcie.parse_dmon(OLDER), {0: 0}, began_clock_s=86400 - 2)
    assert [sample.time_s for sample in samples] == [1, 3]
    assert pcie.dmon_samples(pcie.parse_dmon(OLDER), {1: 0}, began_clock_s=0) == []


def test_dmon_samples_are_numbered_as_torch_counts() -> None:
    samples = pcie.dmon_samples(pcie.parse_dmon(H100), {0: 1, 1: 0}, began_clock_s=37266)
    assert [(sample.gpu, sample.rx_gbps) for sample in samples] == [(1, 54.021), (0, 0.0), (1, 54.377), (1, 54.102)]


@given(st.integers(0, 86399), st.integers(-3600, 36000))
def test_the_time_since_the_start_survives_the_clock(began: int, later: int) -> None:
    row = pcie.DmonRow((began + later) % 86400, 0, 1.0, 1.0)
    assert pcie.dmon_samples([row], {0: 0}, began)[0].time_s == later


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_nothing_is_written_and_the_trace_says_why(tmp_path: Path) -> None:
    with pcie.trace(tmp_path / "pcie.csv") as trace:
        assert not trace.available
        assert "NVIDIA" in trace.reason
    assert list(tmp_path.iterdir()) == []


class _NVMLError(Exception):
    pass


def _pretend_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dmon: str, count: int = 1, virtual: int = -1
) -> None:
    """GPUs that receive 50, 40, ... GB/s and an ``nvidia-smi`` that is the shell script ``dmon``.

    The driver counts GPUs from the last to the first. The ``virtual`` one does not count its link.
    """

    def throughput(gpu: int, counter: int) -> int:
        if gpu == virtual:
            raise _NVMLError
        return (50 - 10 * gpu) * 10**6 if counter else 200_000

    library = SimpleNamespace(
        NVML_PCIE_UTIL_RX_BYTES=1,
        NVML_PCIE_UTIL_TX_BYTES=0,
        NVMLError=_NVMLError,
        nvmlDeviceGetPcieThroughput=throughput,
        nvmlDeviceGetIndex=lambda gpu: count - 1 - gpu,
    )

    @contextmanager
    def nvml() -> Iterator[SimpleNamespace]:
        yield library

    monkeypatch.setattr(gpus, "nvml", nvml)
    monkeypatch.setattr(gpus, "nvml_handle", lambda library, index: index if index < count else None)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{dmon}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [None, KeyboardInterrupt, ValueError])
def test_a_trace_has_both_sources_and_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: type[BaseException] | None
) -> None:
    pid = tmp_path / "pid"
    script = f"cat <<END\n{OLDER}END\necho $$ >{pid}\nexec sleep 600"
    _pretend_gpus(monkeypatch, tmp_path, script)
    path = tmp_path / "run" / "pcie.csv"

    def work() -> None:
        with pcie.trace(path) as trace:
            assert trace.available
            _wait_for(pid)
            time.sleep(0.05)
            if how is not None:
                raise how

    if how is None:
        work()
    else:
        with pytest.raises(how):
            work()
    assert not _running(int(pid.read_text()))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == pcie.COLUMNS
    assert {row["source"] for row in rows} == {"nvml", "dmon"}
    assert {row["rx_gbps"] for row in rows if row["source"] == "nvml"} == {"50.0"}
    assert [row["rx_gbps"] for row in rows if row["source"] == "dmon"] == ["22.873", "22.911"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["pcie.csv", "pcie.dmon.txt"]


def test_a_dmon_that_refuses_leaves_the_finer_samples_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_gpus(monkeypatch, tmp_path, "echo 'Invalid metric'; exit 2")
    with pcie.trace(tmp_path / "pcie.csv") as trace:
        time.sleep(0.3)
    assert "exit code 2" in trace.reason
    assert (tmp_path / "pcie.dmon.txt").read_text() == "Invalid metric\n"
    with (tmp_path / "pcie.csv").open() as file:
        assert {row["source"] for row in csv.DictReader(file)} == {"nvml"}


def test_every_gpu_that_is_here_and_counts_its_link_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = tmp_path / "printed"
    _pretend_gpus(monkeypatch, tmp_path, f"cat <<END\n{H100}\nEND\necho >{printed}\nexec sleep 600", count=3, virtual=1)
    with pcie.trace(tmp_path / "pcie.csv", 4):
        _wait_for(printed)
        time.sleep(0.05)
    with (tmp_path / "pcie.csv").open() as file:
        rows = [(row["source"], row["gpu"], row["rx_gbps"]) for row in csv.DictReader(file)]
    assert {row for row in rows if row[0] == "nvml"} == {("nvml", "0", "50.0"), ("nvml", "2", "30.0")}
    # The driver's GPUs 0 and 1 are torch's 2 and 1.
    assert {gpu for source, gpu, _ in rows if source == "dmon"} == {"2", "1"}
    assert ("dmon", "2", "54.021") in rows


@pytest.mark.gpu
def test_a_real_copy_is_seen(tmp_path: Path) -> None:
    source = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    with pcie.trace(tmp_path / "pcie.csv") as trace:
        begun = time.monotonic()
        while time.monotonic() - begun < 3:
            target.copy_(source)
    assert trace.available
    with (tmp_path / "pcie.csv").open() as file:
        rates = [float(row["rx_gbps"]) for row in csv.DictReader(file) if row["source"] == "nvml"]
    assert max(rates) > 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_to_one_of_two_gpus_are_seen_on_its_link_alone(tmp_path: Path) -> None:
    source = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda:1")
    with pcie.trace(tmp_path / "pcie.csv", 2):
        begun = time.monotonic()
        while time.monotonic() - begun < 3:
            target.copy_(source)
    with (tmp_path / "pcie.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "nvml"]
    first, second = (max(float(row["rx_gbps"]) for row in rows if row["gpu"] == gpu) for gpu in ("0", "1"))
    assert second > 1 > first
