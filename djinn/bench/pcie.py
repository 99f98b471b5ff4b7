"""What crosses PCIe while something runs, as each GPU itself counts it.

Two sources side by side: ``nvidia-smi dmon`` once a second (its text is kept beside the trace), and NVML's counters
as often as they answer: each of the two calls watches one GPU's link for 20 ms, so that a GPU's turn comes about every
50 ms for each GPU that is traced. Received is host to device. Without an NVIDIA GPU nothing is traced and nothing is
written; the trace says why.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from djinn import gpus
from djinn.files import unfinished

COLUMNS = ("time_s", "rx_gbps", "tx_gbps", "source", "gpu")
_DMON = ("nvidia-smi", "dmon", "-s", "pct", "-d", "1", "-o", "T")
_DAY_S = 24 * 3600


@dataclass(frozen=True)
class Sample:
    """Rates of one GPU at one moment, 10^9 bytes/s; ``time_s`` counts from the start of the trace. None is missing."""

    time_s: float
    rx_gbps: float | None
    tx_gbps: float | None
    source: Literal["nvml", "dmon"]
    gpu: int
    """As torch counts."""


@dataclass(frozen=True)
class DmonRow:
    """One row of ``nvidia-smi dmon``: seconds since midnight, the GPU's index there, 10^9 bytes/s."""

    clock_s: int
    gpu: int
    rx_gbps: float | None
    tx_gbps: float | None


@dataclass
class Trace:
    """A running trace, or the reason why there is none or only a part. ``began_s`` is its ``time.perf_counter()``."""

    available: bool
    reason: str = ""
    began_s: float = field(default_factory=time.perf_counter)


@contextmanager
def trace(path: Path, count: int = 1) -> Iterator[Trace]:
    """Trace the PCIe traffic of the first ``count`` GPUs while the block runs, also if it raises or is interrupted.

    Afterwards ``path`` is a CSV file with :data:`COLUMNS`, in order of time within each source and GPU, and what dmon
    printed lies beside it as ``.dmon.txt``. A GPU that is not here is left out; without any NVIDIA GPU neither file is
    written and the trace says why.
    """
    with gpus.nvml() as library:
        found = {gpu: gpus.nvml_handle(library, gpu) for gpu in range(count if library else 0)}
        handles = {gpu: handle for gpu, handle in found.items() if handle is not None}
        if library is None or not handles:
            yield Trace(available=False, reason="no NVIDIA GPU, or its management library (nvidia-ml-py) is missing")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        running = Trace(available=True)
        began_clock_s = _seconds_of_day(time.strftime("%H:%M:%S"))
        stop, samples = threading.Event(), list[Sample]()
        sampler = threading.Thread(target=_sample, args=(library, handles, running.began_s, stop, samples), daemon=True)
        sampler.start()
        try:
            with _dmon(path.with_suffix(".dmon.txt"), running):
                yield running
        finally:
            stop.set()
            sampler.join()
            text = _text(path.with_suffix(".dmon.txt"))
            numbers = {library.nvmlDeviceGetIndex(handle): gpu for gpu, handle in handles.items()}
            samples += dmon_samples(parse_dmon(text), numbers, began_clock_s)
            _write_csv(path, samples)


def parse_dmon(text: str) -> list[DmonRow]:
    """Return the rows of what ``nvidia-smi dmon -o T`` printed, those with a PCIe rate.

    Which columns there are depends on the driver and the GPU; a line that begins with "#" and names "gpu" says what
    follows (the one after it gives the units: MB/s). dmon repeats both now and then. A dash is a missing value, and
    a last line cut short is left out.
    """
    rows = []
    columns: list[str] = []
    for line in text.splitlines():
        words = line.replace("#", " ").split()
        if line.lstrip().startswith("#"):
            columns = [word.lower() for word in words] if "gpu" in words else columns
        elif words and len(words) == len(columns):
            cells = dict(zip(columns, words, strict=True))
            rx, tx = _gbps(cells.get("rxpci")), _gbps(cells.get("txpci"))
            if "time" in cells and (rx is not None or tx is not None):
                rows.append(DmonRow(_seconds_of_day(cells["time"]), int(cells["gpu"]), rx, tx))
    return rows


def dmon_samples(rows: list[DmonRow], numbers: Mapping[int, int], began_clock_s: int) -> list[Sample]:
    """Return the samples of some GPUs, timed from ``began_clock_s``, seconds since midnight.

    ``numbers`` holds torch's number of each GPU by dmon's. dmon tells the time of day to the second, so these times are
    right to a second; a trace may pass midnight.
    """
    half = _DAY_S // 2
    return [
        Sample((row.clock_s - began_clock_s + half) % _DAY_S - half, row.rx_gbps, row.tx_gbps, "dmon", numbers[row.gpu])
        for row in rows
        if row.gpu in numbers
    ]


def _gbps(megabytes: str | None) -> float | None:
    return float(megabytes) / 1e3 if megabytes and megabytes.replace(".", "", 1).isdigit() else None


def _seconds_of_day(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return hours * 3600 + minutes * 60 + seconds


def _sample(
    library: Any, handles: Mapping[int, Any], began_s: float, stop: threading.Event, samples: list[Sample]
) -> None:
    """Ask NVML about each GPU in turn until told to stop; each answer is an average over the 20 ms of the call."""
    counting = dict(handles)
    while counting and not stop.wait(0.01):
        for gpu, handle in list(counting.items()):
            begun = time.perf_counter()
            try:
                rx = library.nvmlDeviceGetPcieThroughput(handle, library.NVML_PCIE_UTIL_RX_BYTES)
                tx = library.nvmlDeviceGetPcieThroughput(handle, library.NVML_PCIE_UTIL_TX_BYTES)
            except library.NVMLError:
                del counting[gpu]  # it does not count its link (virtual GPUs do not); dmon shows the same
                continue
            middle = (begun + time.perf_counter()) / 2
            samples.append(Sample(middle - began_s, rx / 1e6, tx / 1e6, "nvml", gpu))  # NVML answers in KB/s


@contextmanager
def _dmon(path: Path, running: Trace) -> Iterator[None]:
    """Run dmon while the block runs and leave its output in ``path``; without the program, note that and go on."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        child = _start(out, running)
        try:
            yield
        finally:
            if child is not None:
                _end(child, running)
            part.replace(path)


def _end(child: subprocess.Popen[bytes], running: Trace) -> None:
    if child.poll() is not None:
        running.reason = f"nvidia-smi dmon ended by itself with exit code {child.returncode}; NVML alone was sampled"
    child.terminate()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _start(out: IO[bytes], running: Trace) -> subprocess.Popen[bytes] | None:
    if shutil.which(_DMON[0]) is None:
        running.reason = "nvidia-smi is not installed; NVML alone is sampled"
        return None
    return subprocess.Popen(_DMON, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _write_csv(path: Path, samples: list[Sample]) -> None:
    with unfinished(path) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows((f"{s.time_s:.4f}", s.rx_gbps, s.tx_gbps, s.source, s.gpu) for s in samples)
