"""How fast the codec is and what it saves, on a GPU or on a CPU; every case is checked bit for bit.

    python benchmarks/codec.py [--output codec.json] [--device cpu]

On a GPU: bfloat16 decoded per second, by size and tuning, and the bytes that this reads and writes against those of a
plain copy on the device, which is the least time it could take; encoding; the host's time for a call. Small tensors
are decoded in turn from and to so many places that the cache does not hold them, and in a CUDA graph, so that the
host is not what is measured. Several blobs in one kernel, as routed experts are decoded: GB/s, and the host's time for
a call. On a CPU: rates of one thread and of one thread per core, each with a tensor of its own.
On both: bits per weight by distribution.

A case that fails is recorded with its reason, and the others go on. Takes less than a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from operator import call
from pathlib import Path
from typing import Any

import torch

from djinn.codec.backends import backend
from djinn.codec.checksums import checksums
from djinn.codec.decode import BatchDecoder, Decoder
from djinn.codec.encode import encode, layout_of
from djinn.codec.layout import ALIGNMENT, Layout, sections

Result = dict[str, Any]
Run = Callable[[], object]

SIZES = {
    "16 KiB": (2, 4096),
    "1 MiB": (128, 4096),
    "16 MiB": (2048, 4096),
    "134 MB": (8192, 8192),
    "470 MB": (28672, 8192),
    "500 MB": (25000, 10000),
}
"""Rows and columns by bytes of bfloat16; the last is not whole tiles."""
WARPS = (1, 2, 4, 8)
COLD_BYTES = 128 * 2**20
"""What a small tensor's copies come to, coded and decoded: more than twice the cache of an H100."""
BATCHES = ((8, 3_145_728), (2, 117_440_512))
"""Blobs decoded in one kernel, and the weights of each: routed experts of a layer for a token."""
CALLS = 64
"""Decoded in a row, at least."""
ROUNDS = 5


DISTRIBUTIONS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "normal": torch.randn,
    "scaled rows and columns": lambda rows, columns: (
        torch.randn(rows, columns) * torch.randn(rows, 1).exp() * (0.5 * torch.randn(1, columns)).exp()
    ),
    "laplace": lambda rows, columns: torch.rand(rows, columns).log() * torch.randn(rows, columns).sign(),
    "student t(4)": lambda rows, columns: (
        torch.randn(rows, columns) / torch.randn(4, rows, columns).square_().mean(0).sqrt()
    ),
    "5% zeros": lambda rows, columns: torch.randn(rows, columns) * (torch.rand(rows, columns) >= 0.05),
    "random bits": lambda rows, columns: torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16).view(
        torch.bfloat16
    ),
}


def make(name: str, rows: int, columns: int, device: str) -> torch.Tensor:
    """Return bfloat16 [rows, columns] of one distribution, made about as large as weights are by a factor of 0.02."""
    with torch.device(device):
        values = DISTRIBUTIONS[name](rows, columns)
    return values if name == "random bits" else (0.02 * values).bfloat16()


class Cases:
    """Runs cases one after the other, prints each, and writes all that there are so far.

    The status of a case is ok, wrong (other bits came back) or failed (and then it has a reason).
    """

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.records: list[Result] = []

    def add(self, measure: Callable[[], Result], **case: object) -> Result:
        """Run one case; return its record: the case, what it measured, or why it failed."""
        start = time.perf_counter()
        try:
            record = {**case, "status": "ok", **measure()}
        except Exception as error:  # whatever goes wrong in one case, the others are worth having
            record = {**case, "status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if record.get("exact") is False:
            record["status"] = "wrong"
        record["took_s"] = time.perf_counter() - start
        self.records.append(record)
        shown = (f"{value:.4g}" if isinstance(value, float) else value for value in record.values())
        print(*(f"{key}={value}" for key, value in zip(record, shown, strict=True)), flush=True)
        if self.output:
            self.output.write_text(json.dumps(self.records, indent=2) + "\n")
        return record


def forced(weights: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Encode, whatever it costs."""
    coded = encode(weights, min_gain=-math.inf)
    assert coded is not None
    return coded


def is_exact(out: torch.Tensor, weights: torch.Tensor) -> bool:
    """Return whether ``out`` (uint8, whole tiles) begins with the bits of ``weights``."""
    return torch.equal(out.view(torch.int16)[: weights.numel()], weights.reshape(-1).view(torch.int16))


def bits_per_weight(name: str, device: str) -> Result:
    """Code 4096 x 4096 weights (a quarter of them on a CPU) of one distribution."""
    weights = make(name, 1024 if device == "cpu" else 4096, 4096, device)
    blob, layout = forced(weights)
    out = torch.empty(layout.decoded_bytes, dtype=torch.uint8, device=device)
    Decoder(layout, blob, out)()
    return {
        "bits": 8 * layout.nbytes / layout.elements,
        "escapes": layout.escapes / layout.elements,
        "worth_it": layout_of(weights) is not None,
        "exact": is_exact(out, weights),
    }


def repeat(run: Run, times: int) -> None:
    """Call ``run`` several times."""
    for _ in range(times):
        run()


def host_seconds(run: Run) -> float:
    """Return the median wall time of ``run``, the device's part included."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_seconds(run: Run, calls: int) -> float:
    """Return the median time that the device takes for one of the ``calls`` that ``run`` issues."""
    times = []
    for _ in range(1 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / calls


def captured(runs: list[Run]) -> Run:
    """Return a function that issues all of ``runs`` at once, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def copy_on_gpu() -> Result:
    """Copy 500 MB on the device; count bytes read and bytes written."""
    source = torch.ones(500_000_000, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = device_seconds(partial(repeat, partial(target.copy_, source), CALLS), CALLS)
    return {"moved_gbps": 2 * source.nbytes / seconds / 1e9}


class OnGpu:
    """A coded tensor on the GPU, in as many places as it takes to be cold in the cache."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        blob, self.layout = forced(weights)
        self.moved_bytes = self.layout.nbytes + self.layout.decoded_bytes
        copies = 1 + COLD_BYTES // self.moved_bytes
        stride = -(-self.layout.nbytes // ALIGNMENT) * ALIGNMENT
        blobs = torch.zeros(copies, stride, dtype=torch.uint8, device="cuda")
        blobs[:, : self.layout.nbytes] = blob
        self.blobs = [row[: self.layout.nbytes] for row in blobs]
        self.outs = torch.zeros(copies, self.layout.decoded_bytes, dtype=torch.uint8, device="cuda")

    def decode(self, floor_gbps: float, **tuning: int) -> Result:
        """Decode every copy, the first and the last of them checked."""
        prepare = backend(self.outs.device).decoder
        self.outs.zero_()
        pairs = zip(self.blobs, self.outs, strict=True)
        runs = [prepare(sections(blob, self.layout), out, **tuning) for blob, out in pairs]
        runs *= -(-CALLS // len(runs))
        seconds = device_seconds(captured(runs), len(runs))
        moved_gbps = self.moved_bytes / seconds / 1e9
        return {
            "gbps": self.weights.nbytes / seconds / 1e9,
            "moved_gbps": moved_gbps,
            "of_copy": moved_gbps / floor_gbps,
            "us": seconds * 1e6,
            "exact": is_exact(self.outs[0], self.weights) and is_exact(self.outs[-1], self.weights),
        }


@lru_cache(maxsize=1)
def on_gpu(distribution: str, size: str) -> OnGpu:
    """Make a tensor, unless it was the last one made."""
    return OnGpu(make(distribution, *SIZES[size], "cuda"))


def encode_on_gpu(size: str) -> Result:
    """Encode, the time that the host waits included; compare a part's bytes with those that the CPU makes."""
    weights = on_gpu("normal", size).weights
    part = weights.reshape(-1)[: 2**22 + 77]
    return {
        "gbps": weights.nbytes / host_seconds(partial(encode, weights)) / 1e9,
        "layout_gbps": weights.nbytes / host_seconds(partial(layout_of, weights)) / 1e9,
        "exact": torch.equal(forced(part)[0].cpu(), forced(part.cpu())[0]),
    }


def issue_on_gpu() -> Result:
    """Time the host's part of a call, and of preparing one, with so little to decode that the device keeps up."""
    tensor = on_gpu("normal", "16 KiB")
    prepare = partial(Decoder, tensor.layout, tensor.blobs[0], tensor.outs[0])
    decoder = prepare()
    return {
        "call_us": host_seconds(partial(repeat, decoder, 500)) / 500 * 1e6,
        "prepare_us": host_seconds(partial(repeat, prepare, 100)) / 100 * 1e6,
    }


def batch_on_gpu(blobs: int, elements: int) -> Result:
    """Decode several blobs in one kernel, each call from and to other places; time the device's and the host's part."""
    weights = make("normal", blobs, elements, "cuda")
    made = [forced(row) for row in weights]
    moved_bytes = weights.nbytes + sum(layout.nbytes for _, layout in made)
    copies = 1 + COLD_BYTES // moved_bytes
    sets = [[(blob.clone(), layout) for blob, layout in made] for _ in range(copies)]
    outs = torch.zeros(copies, blobs, elements, dtype=torch.bfloat16, device="cuda")
    decoder = BatchDecoder(elements, outs.device)
    calls = list(zip(sets, outs, strict=True)) * -(-CALLS // copies)

    def run() -> None:
        for coded, out in calls:
            decoder(coded, out)

    seconds = device_seconds(run, len(calls))
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()  # fewer calls than a device queues, so that the host waits for none
    issued = time.perf_counter() - start
    return {
        "gbps": weights.nbytes / seconds / 1e9,
        "moved_gbps": moved_bytes / seconds / 1e9,
        "us": seconds * 1e6,
        "call_us": issued / len(calls) * 1e6,
        "exact": all(is_exact(out.view(-1).view(torch.uint8), weights) for out in outs),
    }


def measure_gpu(cases: Cases) -> None:
    """Measure everything on the current GPU."""
    floor_gbps = cases.add(copy_on_gpu, what="copy").get("moved_gbps", math.nan)

    def decode(distribution: str, size: str, **tuning: int) -> Result:
        return on_gpu(distribution, size).decode(floor_gbps, **tuning)

    for size in SIZES:
        for warps in WARPS:
            cases.add(partial(decode, "normal", size, warps=warps), what="decode", size=size, warps=warps)
        cases.add(partial(encode_on_gpu, size), what="encode", size=size)
    cases.add(issue_on_gpu, what="issue", size="16 KiB")
    for blobs, elements in BATCHES:
        cases.add(partial(batch_on_gpu, blobs, elements), what="batch", blobs=blobs, elements=elements)
    for name in DISTRIBUTIONS:
        cases.add(partial(decode, name, "134 MB"), what="decode", size="134 MB", weights=name)


def in_parallel(pool: ThreadPoolExecutor, runs: list[Run]) -> None:
    """Run all of ``runs`` and wait for them."""
    list(pool.map(call, runs))


def rates_on_cpu(threads: int) -> Result:
    """Return bfloat16 GB/s per thread of everything that is done on a CPU."""
    tensors = [make("normal", 2048, 4096, "cpu") for _ in range(threads)]
    coded = [forced(weights) for weights in tensors]
    outs = [torch.empty(layout.decoded_bytes, dtype=torch.uint8) for _, layout in coded]
    decoders = [Decoder(layout, blob, out) for (blob, layout), out in zip(coded, outs, strict=True)]
    works: dict[str, list[Run]] = {
        "encode": [partial(encode, weights) for weights in tensors],
        "layout": [partial(layout_of, weights) for weights in tensors],
        "decode": list(decoders),
        "checksum": [partial(checksums, blob, layout) for blob, layout in coded],
    }
    result: Result = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, runs in works.items():
            seconds = host_seconds(partial(in_parallel, pool, runs))
            result[f"{name}_gbps"] = tensors[0].nbytes / seconds / 1e9
    result["exact"] = all(is_exact(out, weights) for out, weights in zip(outs, tensors, strict=True))
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the records, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    cases = Cases(options.output)
    cases.add(partial(versions, options.device), what="machine")
    for name in DISTRIBUTIONS:
        cases.add(partial(bits_per_weight, name, options.device), what="bits", weights=name)
    if options.device == "cuda":
        measure_gpu(cases)
    else:
        torch.set_num_threads(1)
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            cases.add(partial(rates_on_cpu, threads), what="cpu", threads=threads)
    bad = sum(record["status"] != "ok" for record in cases.records)
    raise SystemExit(f"{bad} of {len(cases.records)} cases failed or gave wrong bits" if bad else 0)


def versions(device: str) -> Result:
    """Return what the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    found = {package: version(package) for package in ("torch", "triton", "numpy") if find_spec(package)}
    return {"device": name, "python": platform.python_version(), **found}


if __name__ == "__main__":
    main()
