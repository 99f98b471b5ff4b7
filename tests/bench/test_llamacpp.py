"""The GGUF file that llama.cpp is measured on holds the same model, and what is made of llama-bench's output."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from djinn.errors import ConfigError
from djinn.planning.workspace import Workload
from djinn.weights.architectures import load_architecture
from djinn.weights.synthetic_checkpoint import synthesise

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "llamacpp.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llamacpp", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transformers_reads_the_same_model_back(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = load_architecture("llama-tiny")
    script.write_gguf(config, tmp_path / "tiny.gguf", seed=3)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    folder = synthesise("llama-tiny", tmp_path / "checkpoint", seed=3, progress=False)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {name: tensor.shape for name, tensor in read.state_dict().items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in ours.state_dict().items())
    for key in ("rope_parameters", "num_key_value_heads", "max_position_embeddings", "vocab_size"):
        assert getattr(read.config, key) == getattr(ours.config, key), key
    assert read.config.rms_norm_eps == pytest.approx(ours.config.rms_norm_eps)  # a float32 there


def test_what_is_no_plain_llama_is_refused(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for name in ("qwen2-tiny", "llama-3.1-8b"):
        with pytest.raises(ConfigError, match="only plain Llama"):
            script.write_gguf(load_architecture(name), tmp_path / "other.gguf", seed=0)
    assert not list(tmp_path.iterdir())


@given(st.integers(-100, 1000), st.integers(1, 90), st.integers(1, 90), st.integers(1, 12))
def test_as_many_layers_as_fit_go_to_the_gpu(script: ModuleType, room: int, head: int, layer: int, layers: int) -> None:
    chosen = script.gpu_layers(room, head, layer, layers)

    def taken(count: int) -> int:
        return head + (count - 1) * layer if count else 0

    assert 0 <= chosen <= layers + 1
    assert taken(chosen) <= max(room, 0)
    assert chosen == layers + 1 or taken(chosen + 1) > room


def test_layers_of_a_70b_model_in_24_gb(script: ModuleType) -> None:
    work = Workload(prompt_tokens=512, new_tokens=12, batch=1)
    config = load_architecture("llama-2-70b-16-layers")
    assert 11 <= script.layers_in(config, 24 * 10**9, work) <= 14  # of 1.71 GB each
    assert script.layers_in(config, 0, work) == 0
    assert script.layers_in(config, 10**12, work) == 17


_BENCH = """#!{python}
import json, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for load in asked["-lm"].split(","):
    for threads in map(int, asked["-t"].split(",")):
        slow = (2 if load == "mmap" else 1) * (1 + abs(threads - 3)) * max(int(asked["-n"]), 1)
        print(json.dumps({{
            "n_threads": threads, "load_mode": load, "n_gen": int(asked["-n"]), "n_prompt": int(asked["-p"]),
            "n_gpu_layers": int(asked["-ngl"]), "model_filename": asked["-m"],
            "samples_ns": [slow * 10**9] * 2 + [99 * 10**9],
        }}))
"""


def test_every_test_is_kept_and_the_best_of_each_work_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, weights, kept = tmp_path / "llama-bench", tmp_path / "weights.gguf", tmp_path / "kept.jsonl"
    program.write_text(_BENCH.format(python=sys.executable))
    program.chmod(0o755)
    weights.touch()
    words = ["llama-tiny", "--llama-bench", program, "--gguf", weights, "--threads", 2, 3, "--output", kept]
    monkeypatch.setattr(sys, "argv", ["llamacpp.py", *map(str, words)])
    script.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["work"], line["threads"], line["load"]) for line in lines[:-1]] == [
        (work, threads, load) for work in ("prompt", "tokens") for load in ("mmap", "none") for threads in (2, 3)
    ]
    assert str(tmp_path) not in kept.read_text()
    assert {line["seconds"] for line in lines[:-1]} == {1.0, 2.0, 4.0}
    assert lines[-1] == {
        "system": "llamacpp", "model": "synthetic:llama-tiny", "work": "best", "prompt_seconds": 1.0,
        "prompt_threads": 3, "prompt_load": "none", "tokens_seconds": 1.0, "tokens_threads": 3, "tokens_load": "none",
    }  # fmt: skip


def test_a_program_that_fails_is_quoted(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"ended with 3: .*no such model"):
        script.run([sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"])
