"""Bits per coded weight of trained checkpoints, by kind of tensor, against their entropy and against Gaussian weights.

    python benchmarks/trained.py trained
    python benchmarks/bits_per_weight.py trained/smollm2 trained/minilm --output bits.jsonl

For every kind of matrix a line of JSON:

    bits        what djinn's coding takes for a weight, tables and padding included, whatever the tensor's size
    exponent    8 bits of sign and mantissa and the entropy of the exponent: the least that any code can take which
                codes exponents one by one, as djinn's does, and leaves the rest as it is
    entropy     the entropy of whole bfloat16 values: the least that any code of single weights can take
    gaussian    bits of as many Gaussian numbers of the same standard deviation, with the entropies of these

Entropies are of each tensor's own histogram, in bits per weight, weighted by size: C. E. Shannon, A Mathematical Theory
of Communication, 1948. A small tensor's histogram fits it too well, so that its entropy is too low, by about
(K - 1) / (2 N ln 2) for K different values among N (G. A. Miller, 1955): 0.03 bits for the smallest matrices here.
Smaller ones are left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from trained import PROVENANCE

from djinn.codec.encode import layout_of
from djinn.weights.packed_shard import read_tensor
from djinn.weights.shards import read_checkpoint
from djinn.weights.tensors import kind_of

LEAST_WEIGHTS = 100_000


def entropy(values: torch.Tensor) -> float:
    """Return the entropy of whole numbers from 0 on, bits per value."""
    counts = torch.bincount(values.flatten()).double()
    shares = counts[counts > 0] / values.numel()
    return float(-(shares * shares.log2()).sum())


def bits_of(weights: torch.Tensor) -> dict[str, float]:
    """Return bits and entropies of a bfloat16 tensor, bits per weight."""
    words = weights.view(torch.int16).int() & 0xFFFF
    layout = layout_of(weights, -math.inf)
    assert layout is not None
    return {
        "bits": 8 * layout.nbytes / weights.numel(),
        "exponent": 8 + entropy((words >> 7) & 0xFF),
        "entropy": entropy(words),
    }


def mean(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the means of numbers, weighted by how many weights they are of."""
    weights = sum(count for count, _ in parts)
    return {name: sum(count * each[name] for count, each in parts) / weights for name in parts[0][1]}


def kinds(folder: Path) -> list[dict[str, object]]:
    """Return a record for each kind of matrix of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    own: dict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    gaussian: dict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    for name, entry in read_checkpoint(folder).items():
        if entry.dtype != torch.bfloat16 or len(entry.shape) != 2 or math.prod(entry.shape) < LEAST_WEIGHTS:
            continue
        weights = read_tensor(entry).view(entry.dtype)
        noise = torch.randn(weights.shape, generator=generator) * weights.float().std()
        own[kind_of(name)].append((weights.numel(), bits_of(weights)))
        gaussian[kind_of(name)].append((weights.numel(), bits_of(noise.bfloat16())))
    return [
        {
            "checkpoint": folder.name,
            "provenance": PROVENANCE.get(folder.name, "a checkpoint of the user's own"),
            "kind": kind,
            "tensors": len(parts),
            "weights": sum(count for count, _ in parts),
            **mean(parts),
            "gaussian": mean(gaussian[kind]),
        }
        for kind, parts in own.items()
    ]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="Checkpoint folders.")
    parser.add_argument("--output", type=Path, default=Path("bits.jsonl"))
    options = parser.parse_args()
    records = [record for folder in options.folders for record in kinds(folder)]
    options.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
