"""Weights that are stored in another dtype than they are asked for in: converted while they load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import placement
from djinn.errors import ConfigError, PlanError
from djinn.weights.header_index import header_index

pytestmark = pytest.mark.usefixtures("one_thread")

Tiny = Callable[[str], Path]
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def streaming(folder: Path, host_memory: str = "1 GB", share: float = 0.4, **options: Any) -> PreTrainedModel:
    """Load with about ``share`` of the weights on the device."""
    all_of_it = djinn.plan(folder, budget="1 GB", dtype=options.get("dtype"), **WORK)
    budget = all_of_it.workspace_bytes + round(share * sum(unit.image_bytes for unit in all_of_it.units))
    return djinn.load(folder, budget=budget, host_memory=host_memory, chunk="32 KiB", **WORK | options)


def assert_equal(streamed: PreTrainedModel, resident: PreTrainedModel, **inputs: torch.Tensor) -> None:
    """Hold outputs, dtypes and saved weights against the resident model's."""
    resident.eval()
    inputs = inputs or {"input_ids": torch.arange(3, 10).view(1, 7)}
    assert placement(streamed).away
    assert streamed.dtype == streamed.config.dtype == resident.dtype
    with torch.no_grad():
        for _ in range(2):
            found, wanted = streamed(**inputs).logits, resident(**inputs).logits
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    state = streamed.state_dict()
    for name, value in resident.state_dict().items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """Folder of a tiny model saved in a dtype; not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def save(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = save_tiny(name, tmp_path_factory.mktemp(name), dtype=dtype)
        return made[name, dtype]

    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("stored", "asked"), [(SINGLE, BRAIN), (SINGLE, HALF), (BRAIN, HALF), (HALF, SINGLE)])
def test_converted_weights_are_the_resident_models(
    saved: Callable[[str, torch.dtype], Path], name: str, stored: torch.dtype, asked: torch.dtype
) -> None:
    folder = saved(name, stored)
    model = streaming(folder, dtype=asked)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=asked))
    planned = djinn.plan(folder, budget=placement(model).budget, host_memory="1 GB", dtype=asked, **WORK)
    assert planned.tiers == placement(model).tiers
    assert planned.ring_bytes == placement(model).ring_bytes
    assert header_index(folder, asked).nbytes == planned.model_bytes


@pytest.mark.parametrize("asked", [SINGLE, None])
def test_what_is_stored_as_asked_stays_on_disk(
    saved: Callable[[str, torch.dtype], Path], asked: torch.dtype | None
) -> None:
    folder = saved("llama", SINGLE)
    model = streaming(folder, "1 B", dtype=asked)
    assert placement(model).disk_bytes > 0
    assert_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=SINGLE))


def test_converted_weights_cannot_stay_on_disk(saved: Callable[[str, torch.dtype], Path]) -> None:
    with pytest.raises(PlanError, match=r"host memory: .* converted or coded in memory have no disk tier and need"):
        streaming(saved("llama", SINGLE), "100 KB", dtype=HALF)


def test_a_dtype_that_there_is_not_is_refused(saved: Callable[[str, torch.dtype], Path]) -> None:
    for model in (saved("llama", SINGLE), "synthetic:llama-tiny"):
        for do in (djinn.load, djinn.plan):
            with pytest.raises(ConfigError, match=r"dtype torch\.int8: it is torch\.bfloat16, torch\.float16"):
                do(model, budget="1 GB", dtype=torch.int8, **WORK)  # type: ignore[operator]


def test_synthetic_weights_are_bfloat16_or_what_is_asked() -> None:
    assert djinn.load("synthetic:llama-tiny", budget="1 GB", **WORK).dtype == BRAIN
    assert djinn.load("synthetic:llama-tiny", budget="1 GB", dtype=SINGLE, **WORK).dtype == SINGLE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "asked"), [("t5", HALF), ("deepseek-v3", None), ("deepseek-v3", HALF)])
def test_what_transformers_keeps_in_float32_stays_so(
    architecture_checkpoint: Tiny, name: str, asked: torch.dtype | None
) -> None:
    """T5's feed-forward outputs beside float16."""
    folder, architecture = architecture_checkpoint(name), ARCHITECTURES[name]
    resident = architecture.cls.from_pretrained(folder, dtype=asked or "auto")
    model = streaming(folder, dtype=asked)
    assert_equal(model, resident, **architecture.inputs(), **architecture.decoder)
    if name == "t5":
        kept = {key for key, parameter in model.named_parameters() if parameter.dtype == SINGLE}
        assert kept == {key for key in dict(model.named_parameters()) if "wo" in key}
        assert kept
        again = streaming(folder, dtype=asked, coding="lossless")
        assert_equal(again, resident, **architecture.inputs(), **architecture.decoder)


def test_a_mixed_checkpoint_is_right(architecture_checkpoint: Tiny, tmp_path: Path) -> None:
    """One that was saved with float32 among float16: all of it streams from disk."""
    architecture = ARCHITECTURES["t5"]
    resident = architecture.cls.from_pretrained(architecture_checkpoint("t5"), dtype=HALF)
    resident.save_pretrained(tmp_path / "mixed", max_shard_size="200KB")
    model = streaming(tmp_path / "mixed", "1 B")
    assert placement(model).pinned_bytes == 0
    assert_equal(model, resident, **architecture.inputs(), **architecture.decoder)


def test_files_that_contradict_their_config_are_converted(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """As transformers does, silently; tensors in the config's dtype stay on disk."""
    folder = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "up_proj" in name:
                tensors[name] = tensors[name].float() * 1.001  # more bits than bfloat16 has
        save_file(tensors, path, metadata={"format": "pt"})
    model = streaming(folder, "600 KB", share=0.3)
    made = [unit.name for unit in placement(model).streamed if not unit.on_disk]
    assert made
    assert all("up_proj" in name for name in made)
    assert placement(model).disk_bytes > 0
    assert_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def test_a_packed_checkpoint_is_converted(codable_checkpoint: Path, tmp_path: Path) -> None:
    packed = djinn.pack(codable_checkpoint, tmp_path / "packed", device="cpu")
    for share in (0.4, 2.0):
        model = djinn.load(packed, budget=round(share * 60e6), host_memory="1 GB", dtype=HALF, **WORK)
        resident = AutoModelForCausalLM.from_pretrained(codable_checkpoint, dtype=HALF).eval()
        ids = torch.arange(3, 10).view(1, 7)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, resident(ids).logits)


@pytest.mark.slow
def test_converted_weights_are_coded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = streaming(tmp_path, dtype=BRAIN, coding="lossless", share=0.5)
    assert placement(model).is_coded
    assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BRAIN))
    planned = djinn.plan(
        tmp_path, budget=placement(model).budget, host_memory="1 GB", dtype=BRAIN, coding="lossless", **WORK
    )
    assert planned.pinned_bytes == pytest.approx(placement(model).pinned_bytes, rel=0.1)
