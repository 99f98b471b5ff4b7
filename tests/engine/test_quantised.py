"""Quantised checkpoints: those that stream equal the resident model, all others are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, TorchAoConfig

import djinn
from djinn.engine.load import placement
from djinn.errors import CheckpointError, ConfigError, PlanError, UnavailableError
from djinn.planning.workspace import CUDA_OVERHEAD_BYTES
from djinn.weights import quantised
from djinn.weights.opening import index_of

pytestmark = pytest.mark.usefixtures("one_thread")

Tiny = Callable[[str], Path]
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
IDS = torch.arange(3, 10).view(1, 7)
METHODS = {
    "awq": "awq", "gptq": "gptq", "torchao": "torchao None", "compressed-tensors": "compressed-tensors", "hqq": "hqq",
    "fbgemm_fp8": "fbgemm_fp8", "mxfp4": "mxfp4", "bitsandbytes": "bitsandbytes_8bit", "of-tomorrow": "of-tomorrow",
}  # fmt: skip


def resident(folder: Path, device: str = "cpu") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device}).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def streaming(folder: Path, share: float = 0.45, device: str = "cpu") -> PreTrainedModel:
    work = WORK | {"device": device}
    all_of_it = djinn.plan(folder, budget="4 GB", **work)
    budget = all_of_it.workspace_bytes + round(share * sum(unit.image_bytes for unit in all_of_it.units))
    return djinn.load(folder, budget=budget, chunk="32 KiB", **work)


def quantised_by_torchao(plain: Path, folder: Path, name: str) -> Path:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = TorchAoConfig(getattr(torchao, name)())
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def streams_to_a_gpu(folder: Path, dtype: torch.dtype) -> None:
    """Hold a checkpoint whose weights of ``dtype`` stream to a GPU against the resident model, there and detached."""
    model, whole = streaming(folder, device="cuda"), resident(folder, "cuda")
    assert dtype in {tensor.entry.dtype for unit in placement(model).streamed for tensor in unit.tensors}
    wanted = logits(whole)
    for _ in range(3):
        assert torch.equal(logits(model), wanted)
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(model.generate(IDS.cuda(), **greedy), whole.generate(IDS.cuda(), **greedy))
    djinn.detach(model)
    assert torch.equal(logits(model), logits(resident(folder)))


def mark(folder: Path, **config: object) -> Path:
    """Say in a checkpoint's config that it is quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return save_model(model, "llama", tmp_path / "plain", shard="1GB")


@pytest.fixture
def four_bits(plain: Path, tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_known_to_stream_right_is_refused_by_name(
    tiny_checkpoint: Tiny, tmp_path: Path, method: str
) -> None:
    folder = mark(Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama")), quant_method=method)
    for do in (djinn.load, djinn.plan):
        with pytest.raises(CheckpointError) as refusal:
            do(folder, budget="1 GB", **WORK)  # type: ignore[operator]
        assert str(refusal.value).startswith(f"{folder}: quantised by {METHODS[method]}, which djinn does not stream")
        assert "use a checkpoint of unquantised weights" in str(refusal.value)


@pytest.mark.gpu
def test_four_bit_weights_stream_to_a_gpu(four_bits: Path) -> None:
    streams_to_a_gpu(four_bits, torch.uint8)


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_offload_takes_four_bits_to_a_gpu(four_bits: Path, home: str) -> None:
    model, whole = resident(four_bits, home), resident(four_bits, "cuda")
    budget = CUDA_OVERHEAD_BYTES + 60_000_000 + 400_000
    djinn.offload(model, budget=budget, workspace="60 MB", ring="100 KB", example=(IDS,), device="cuda")
    assert placement(model).streamed
    assert torch.equal(logits(model), logits(whole))
    assert {state.absmax.device.type for _, state in quantised._states(model)} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensor_subclasses_stream_to_a_gpu(plain: Path, tmp_path: Path, name: str) -> None:
    streams_to_a_gpu(quantised_by_torchao(plain, tmp_path / "quantised", name), torch.int8)


def test_a_missing_package_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    folder = mark(plain, quant_method="bitsandbytes", load_in_4bit=True)
    with pytest.raises(UnavailableError, match="requires bitsandbytes"):
        djinn.load(folder, budget="1 GB", **WORK)


def test_a_quantised_checkpoint_has_to_fit_host_memory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mark(plain, quant_method="bitsandbytes", load_in_4bit=True)
    monkeypatch.setattr(quantised, "usable_ram", lambda: 10**6)
    with pytest.raises(
        PlanError, match=r"host memory: a quantised checkpoint is loaded whole and needs .* MB, but 1 MB"
    ):
        djinn.load(folder, budget="1 GB", **WORK)


def test_a_packed_one_is_refused(plain: Path, tmp_path: Path) -> None:
    mark(plain, quant_method="bitsandbytes", load_in_4bit=True)
    packed = djinn.pack(plain, tmp_path / "packed", device="cpu")
    with pytest.raises(CheckpointError, match=r"packed and quantised, .*; djinn\.unpack it first"):
        djinn.load(packed, budget="1 GB", **WORK)


def test_four_bit_weights_stream_as_they_are(four_bits: Path) -> None:
    model, whole = streaming(four_bits), resident(four_bits)
    assert {tensor.entry.dtype for unit in placement(model).streamed for tensor in unit.tensors} >= {torch.uint8}
    for _ in range(3):
        assert torch.equal(logits(model), logits(whole))
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **greedy), whole.generate(IDS, **greedy))
    stats = djinn.stats(model)
    assert stats.link_bytes == stats.passes * sum(unit.weight_bytes for unit in placement(model).streamed)
    assert (stats.skips, stats.reloads) == (0, 0)
    assert stats.model_bytes == sum(parameter.nbytes for parameter in whole.parameters())


def test_four_bit_weights_cannot_be_saved_until_they_are_detached(four_bits: Path, tmp_path: Path) -> None:
    model, whole = streaming(four_bits), resident(four_bits)
    wanted = logits(whole)
    with pytest.raises(ConfigError, match="state_dict: this Linear4bit is quantised and streams"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model), wanted)
    djinn.detach(model)
    assert torch.equal(logits(model), wanted)
    saved, other = model.state_dict(), whole.state_dict()
    assert saved.keys() == other.keys()
    assert all(torch.equal(saved[name], other[name]) for name in saved)


def test_what_lies_beside_the_weights_is_within_the_budget(four_bits: Path, tmp_path: Path) -> None:
    index = index_of(four_bits, tmp_path, torch.device("cpu"))
    linears = [tensor.nbytes for tensor in index.tensors.values() if tensor.dtype == torch.uint8]
    scales = index.kept_bytes - 4 * max(linears)  # bfloat16 instead of half a byte
    assert 2 * sum(linears) / 64 <= scales <= 8 * sum(linears) / 64


def test_offload_takes_four_bits_and_refuses_eight(four_bits: Path, plain: Path) -> None:
    model, whole = resident(four_bits), resident(four_bits)
    djinn.offload(model, budget="480 KB", workspace="100 KB", example=(IDS,), device="cpu")
    assert placement(model).streamed
    assert placement(model).workspace_bytes == 100_000 + quantised.quantised_bytes(whole) > 100_000 + 128 * 256 * 2
    assert torch.equal(logits(model), logits(whole))
    eight = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(ConfigError, match=r"parameter model\.layers\.0\.\S+ cannot be streamed: bitsandbytes"):
        djinn.offload(eight, budget="480 KB", example=(IDS,), device="cpu")


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensor_subclasses_stream_part_by_part(plain: Path, tmp_path: Path, name: str) -> None:
    folder = quantised_by_torchao(plain, tmp_path / "quantised", name)
    model, whole = streaming(folder), resident(folder)
    streamed = {tensor.name: tensor.entry.dtype for unit in placement(model).streamed for tensor in unit.tensors}
    assert {dtype for part, dtype in streamed.items() if part.endswith("_proj.weight.qdata")} == {torch.int8}
    assert any(part.endswith("_proj.weight.scale") for part in streamed)
    wanted = logits(whole)
    for _ in range(3):
        assert torch.equal(logits(model), wanted)
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **greedy), whole.generate(IDS, **greedy))
    with pytest.raises(ConfigError, match="state_dict: this Linear is quantised and streams"):
        model.state_dict()
    djinn.detach(model)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(
    "types", [{"default": {"_type": "Int4WeightOnlyConfig"}}, {"a": {"_type": "A"}, "b": 2}, "int8", None]
)
def test_another_kind_of_torchao_is_refused_by_name(plain: Path, types: object) -> None:
    mark(plain, quant_method="torchao", quant_type=types)
    with pytest.raises(CheckpointError, match=r"quantised by torchao (Int4WeightOnlyConfig|A, 2|int8|None),"):
        djinn.plan(plain, budget="1 GB", **WORK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, transformers does not dequantise them")
def test_fp8_weights_are_what_transformers_makes_of_them(plain: Path) -> None:
    tensors = {}
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name] = value
        if "_proj" in name:
            rows, columns = value.shape
            blocks = value.float().view(-1, min(rows, 128), columns // 128, 128) if rows >= 128 else None
            blocks = value.float().view(1, rows, columns // 128, 128) if blocks is None else blocks
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    folder = mark(plain, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic", fmt="e4m3")
    model = streaming(folder)
    assert placement(model).streamed
    for _ in range(2):
        assert torch.equal(logits(model), logits(resident(folder)))
