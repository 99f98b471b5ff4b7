"""What others wrote and what others raise: hostile and damaged checkpoints, each refused in one message."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import djinn
from djinn.cli import main
from djinn.engine.forecast import forecast
from djinn.errors import CheckpointError, DjinnError, UnavailableError
from djinn.weights import index as index_module
from djinn.weights.foreign import parse_object, refusing
from djinn.weights.index import checkpoint_index
from djinn.weights.models import model_class
from djinn.weights.resolve import resolve
from djinn.weights.shards import read_checkpoint

Tiny = Callable[[str], Path]
WORK = {"prompt_tokens": 8, "new_tokens": 4, "device": "cpu"}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A tied qwen2 in several shards, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model"))


def change_config(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def refusal(folder: Path) -> str:
    with pytest.raises(DjinnError) as error:
        djinn.load(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    return str(error.value)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 12)[None]).logits
    return found


def single(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Put all tensors into one file, changed."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# The boundary.


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_what_is_no_fault_of_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), refusing("file"):
        raise error


class Panic(BaseException):
    """As Rust's, which is no Exception."""


@pytest.mark.parametrize("error", [Panic("deep"), RecursionError("deep"), AssertionError("deep"), KeyError("deep")])
def test_anything_else_becomes_an_error_of_the_file(error: BaseException) -> None:
    said = rf"^a\.json: {type(error).__name__}: .*deep.*; write it again$"
    with pytest.raises(CheckpointError, match=said), refusing("a.json", "write it again"):
        raise error


def test_a_missing_package_is_no_fault_of_the_file() -> None:
    with pytest.raises(UnavailableError, match="no timm"), refusing("file"):
        raise ImportError("no timm")


@pytest.mark.parametrize(
    "text", [b"[]", b"", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"[" * 99999]
)
def test_json_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError), refusing("file"):
        parse_object(text)


# Configs.


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": "many"}, {"num_attention_heads": 0}, {"hidden_size": 0}, {"vocab_size": 1e400},
        {"architectures": 7}, {"rope_parameters": 7}, {"layer_types": [1]}, {"hidden_act": ["a"]}, {"dtype": "nothing"},
    ],
)  # fmt: skip
def test_a_config_with_nonsense_is_refused(folder: Path, keys: dict[str, object]) -> None:
    change_config(folder, **keys)
    assert str(folder) in refusal(folder)
    with pytest.raises(CheckpointError):
        djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]


def test_a_deep_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 99999)
    assert "transformers cannot load its config" in refusal(folder)


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoTokenizer", "__path__", "LlamaConfig"])
def test_only_models_are_taken_for_the_models_class(name: str) -> None:
    assert model_class(SimpleNamespace(architectures=[name])) is AutoModelForCausalLM  # type: ignore[arg-type]


def test_code_in_the_folder_is_refused_without_a_question(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(
        folder, model_type="ours", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert "model_type 'ours' is code of the checkpoint's own" in refusal(folder)
    with pytest.raises(CheckpointError, match="code of the checkpoint's own"):
        djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


def test_an_adapter_beside_the_model_is_named(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert f"{folder / 'adapter_config.json'}: a PEFT adapter beside the model" in refusal(folder)


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "a PEFT adapter without the model" in refusal(tmp_path)


# Files.


def test_a_fifo_is_not_opened(folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder / "b")
    (folder / "digests.json").write_text('{"architecture": "x", "config_digest": "", "dtype": "", "seed": 0}')
    os.mkfifo(folder / "a.safetensors")
    with pytest.raises(CheckpointError, match="unfinished"):
        resolve(str(folder))
    (folder / "digests.json").unlink()
    shard = sorted(folder.glob("model*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard}: not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "loop/x.safetensors", 5, None, ["a"]])
def test_a_shard_of_an_impossible_name_is_refused(folder: Path, name: object) -> None:
    (folder / "loop").symlink_to("loop")
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(document))
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [128.0]}, {"shape": [True]}, {"shape": [-1, -128]}, {"data_offsets": [0.0, 256.0]},
        {"data_offsets": [False, 256]}, {"shape": {}}, {"dtype": []},
    ],
)  # fmt: skip
def test_a_header_of_other_types_is_refused(folder: Path, change: dict[str, object]) -> None:
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="the header is not safetensors'"):
        read_checkpoint(folder)


def test_what_safetensors_alone_refuses_is_one_message(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert "SafetensorError" in refusal(folder)


# The same numbers as the resident model.


@pytest.mark.parametrize("ways", ["streamed", "resident", "packed"])
def test_weights_that_the_files_hold_apart_stay_apart(folder: Path, tmp_path: Path, ways: str) -> None:
    single(folder, lambda all: all.update({"lm_head.weight": all["model.embed_tokens.weight"] * 2}))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = djinn.pack(folder, tmp_path / "packed", device="cpu") if ways == "packed" else folder
    with pytest.warns(UserWarning, match="ties lm_head.weight to model.embed_tokens.weight"):
        whole = djinn.plan(found, budget="1 GB", **WORK)  # type: ignore[arg-type]
    assert whole.model_bytes == sum(parameter.nbytes for parameter in wanted.parameters())
    budget = whole.workspace_bytes + whole.model_bytes * 3 // 5
    with pytest.warns(UserWarning, match="stay apart"):
        model = djinn.load(found, budget=budget if ways == "streamed" else "1 GB", host_memory="1 B", **WORK)  # type: ignore[arg-type]
    assert torch.equal(logits(model), logits(wanted))
    assert not torch.equal(model.state_dict()["lm_head.weight"], model.state_dict()["model.embed_tokens.weight"])


def test_equal_weights_that_the_files_hold_twice_are_tied(folder: Path, tmp_path: Path) -> None:
    single(folder, lambda all: all.update({"lm_head.weight": all["model.embed_tokens.weight"].clone()}))
    model = checkpoint_index(folder, tmp_path).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_head_alone_is_the_embedding_too(folder: Path) -> None:
    single(folder, lambda all: all.update({"lm_head.weight": all.pop("model.embed_tokens.weight")}))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = djinn.load(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    assert torch.equal(logits(model), logits(wanted))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_file_that_the_config_names_is_read(folder: Path) -> None:
    single(folder, lambda all: None)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    change_config(folder, transformers_weights="other.safetensors")
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert torch.equal(logits(djinn.load(folder, budget="1 GB", **WORK)), logits(wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../other.safetensors", "weights.bin", "nowhere.safetensors", 5])
def test_a_file_that_the_config_cannot_mean_is_refused(folder: Path, name: object) -> None:
    save_file({"a": torch.ones(1)}, folder.parent / "other.safetensors")
    change_config(folder, transformers_weights=name)
    assert str(folder) in refusal(folder)


def test_of_a_tensor_in_two_shards_the_last_counts(folder: Path) -> None:
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(last), name: load_file(first)[name] * 2}, last, {"format": "pt"})
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert torch.equal(logits(djinn.load(folder, budget="1 GB", **WORK)), logits(wanted))  # type: ignore[arg-type]


def test_two_names_of_one_weight_are_refused(folder: Path) -> None:
    single(folder, lambda all: all.update({"norm.weight": all["model.norm.weight"] * 2}))
    assert "tensors model.norm.weight and norm.weight are both model.norm.weight" in refusal(folder)


# Room for what is converted.


def test_a_plan_of_fused_experts_writes_nothing(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    mixtral = tiny_checkpoint("mixtral")
    for coding in ("none", "lossless"):
        planned = djinn.plan(mixtral, budget="1 GB", coding=coding, **WORK)  # type: ignore[arg-type]
        forecast(mixtral, budget="1 GB", coding=coding, **WORK)  # type: ignore[arg-type]
    assert planned.model_bytes > 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_too_little_room_for_converted_experts_is_said_beforehand(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UnavailableError, match=r"of weights that transformers converts.*1 KB are free; set TMPDIR"):
        checkpoint_index(tiny_checkpoint("mixtral"), tmp_path, torch.float32)
    assert not list(tmp_path.iterdir())
    checkpoint_index(tiny_checkpoint("llama"), tmp_path)


# djinn generate.


def generate(folder: Path, prompt: str = "ab") -> str:
    arguments = [
        "generate",
        str(folder),
        "--prompt",
        prompt,
        "--budget",
        "1 GB",
        "--device",
        "cpu",
        "--new-tokens",
        "2",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def test_generate_without_a_tokenizer_is_one_message(folder: Path) -> None:
    assert "its tokenizer" in generate(folder)


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    from djinn.weights.synthetic_checkpoint import MANIFEST, synthesise

    made = synthesise("gpt2-tiny", tmp_path / "speaking", progress=False)
    (made / MANIFEST).unlink()
    return made


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 5, "model": 7}', "[" * 99999])
def test_generate_with_a_damaged_tokenizer_is_one_message(speaking: Path, text: str) -> None:
    (speaking / "tokenizer.json").write_text(text)
    assert "djinn:" in generate(speaking)


def test_an_empty_prompt_is_refused(speaking: Path) -> None:
    assert "prompt: it is empty" in generate(speaking, "")


def test_ids_beyond_the_model_are_refused(speaking: Path) -> None:
    change_config(speaking, vocab_size=100)
    assert "its tokenizer gives id" in generate(speaking, "zz\xff")
