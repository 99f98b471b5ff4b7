"""How fast the host's cores multiply weights of a layer of Llama-2-70B where they lie: djinn's kernel and PyTorch's.

    python benchmarks/host_products.py                    # the cores alone
    python benchmarks/host_products.py --gpu 0            # alone, and while that GPU's link is busy

A line of JSON for each measurement: which matrices one call reads, by how many tokens, by what, with how many threads,
10^9 bytes/s of weights, and what the link carried meanwhile. Weights come in turn from as much memory as ``--gb`` says,
which should be more than the processor's caches hold; they are synthetic, and page-locked where a GPU is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch.nn.functional import linear

from djinn.devices import cpus_near
from djinn.hardware import describe
from djinn.host.cores import choose_cpus
from djinn.host.products import HostProducts
from djinn.host.rates import TOKENS, Multiply, calls_in_memory, rate
from djinn.transport.lane import Lane, lane

HIDDEN, INNER, KEYS = 8192, 28672, 1024
CALLS = {
    "q": [(HIDDEN, HIDDEN)],
    "k": [(KEYS, HIDDEN)],
    "q, k, v": [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN)],
    "gate": [(INNER, HIDDEN)],
    "gate, up": [(INNER, HIDDEN), (INNER, HIDDEN)],
    "down": [(HIDDEN, INNER)],
}
"""Rows and columns of the matrices that one call reads."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpu", type=int, help="index of a GPU whose link is kept busy")
    arguments.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    arguments.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    arguments.add_argument("--threads", type=int, nargs="+", help="thread counts to try; by default djinn's own choice")
    arguments.add_argument("--gb", type=float, default=2.0, help="memory that weights are read from, 10^9 bytes")
    arguments.add_argument("--torch", action="store_true", help="measure PyTorch's linear as well")
    options = arguments.parse_args()
    machine = describe()
    gpus = [gpu.name for gpu in machine.gpus]
    print(json.dumps({"cpu": machine.cpu, "cores": machine.cores, "processors": machine.threads, "gpus": gpus}))
    device = torch.device("cpu") if options.gpu is None else torch.device("cuda", options.gpu)
    near = cpus_near(device)
    with ExitStack() as undo:
        links: list[Lane | None] = [None]
        if device.type == "cuda":
            links.append(undo.enter_context(lane(device)))
        for name in options.calls:
            with calls_in_memory(CALLS[name], device, int(1e9 * options.gb)) as calls:
                for threads in options.threads or [len(choose_cpus(near=near))]:
                    for way, multiply in ways(threads, near, options.torch):
                        for tokens, link in itertools.product(options.tokens, links):
                            found = rate(multiply, calls, tokens, link)
                            line = {"call": name, "by": way, "threads": threads} | found.model_dump()
                            print(json.dumps(line), flush=True)


def ways(threads: int, near: set[int] | None, with_torch: bool) -> Iterator[tuple[str, Multiply]]:
    """Yield each way to multiply with so many threads: its name, and what does it."""
    products = HostProducts(threads, near)
    yield products.name, products.multiply
    products.close()
    if with_torch:
        torch.set_num_threads(threads)
        yield "torch", lambda weights, vectors: [linear(vectors, matrix) for matrix in weights]


if __name__ == "__main__":
    main()
