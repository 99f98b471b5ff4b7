"""Mixtures of experts that are stored apart, and stream from there: the resident model's logits and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import placement
from djinn.errors import CheckpointError, ConfigError
from djinn.planning.placement import Tier
from djinn.weights.tensors import Stacked

Mixture = Callable[[str], Path]
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
names = pytest.mark.parametrize("name", MIXTURES)
pytestmark = pytest.mark.usefixtures("one_thread")


def streaming(folder: Path, host_memory: str = "1 B", share: float = 0.4, **options: Any) -> PreTrainedModel:
    """Load with about ``share`` of the weights on the device."""
    all_of_it = djinn.plan(folder, budget="1 GB", **WORK)
    budget = all_of_it.workspace_bytes + round(share * sum(unit.image_bytes for unit in all_of_it.units))
    return djinn.load(folder, budget=budget, host_memory=host_memory, chunk="32 KiB", **WORK | options)


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: PreTrainedModel, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 3 + length).view(1, length)).logits


def same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return list(state) == list(wanted) and all(torch.equal(value, wanted[key]) for key, value in state.items())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return dict(sorted(found.items()))


def streamed_experts(model: PreTrainedModel, tier: Tier) -> set[str]:
    units = placement(model).at(tier)
    return {tensor.name for unit in units for tensor in unit.tensors if isinstance(tensor.entry.source, Stacked)}


@names
@pytest.mark.parametrize(("host", "tier"), [("1 B", Tier.DISK), ("1 GB", Tier.PINNED)])
def test_it_streams_bit_for_bit(mixture_checkpoint: Mixture, name: str, host: str, tier: Tier) -> None:
    folder = mixture_checkpoint(name)
    model, whole = streaming(folder, host), resident(folder)
    assert streamed_experts(model, tier)
    for length in (1, 16):
        assert torch.equal(logits(model, length), logits(whole, length))


@names
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"coding": "lossless"}])
def test_it_fits_bit_for_bit(mixture_checkpoint: Mixture, name: str, options: dict[str, Any]) -> None:
    folder = mixture_checkpoint(name)
    model = djinn.load(folder, budget="1 GB", **WORK | options)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=options.get("dtype", "auto")).eval()
    assert not placement(model).streamed
    assert torch.equal(logits(model), logits(whole))


@names
@pytest.mark.parametrize("host", ["1 B", "1 GB"])
def test_it_is_saved_as_the_resident_model_is(
    mixture_checkpoint: Mixture, tmp_path: Path, name: str, host: str
) -> None:
    model, whole = streaming(mixture_checkpoint(name), host), resident(mixture_checkpoint(name))
    assert same(model.state_dict(), whole.state_dict())
    for saved, folder in ((model, tmp_path / "streaming"), (whole, tmp_path / "whole")):
        saved.save_pretrained(folder, max_shard_size="200KB")
    # Which shard a tensor goes to depends on whether its memory has gaps, as that of experts in host memory has.
    assert same(stored(tmp_path / "streaming"), stored(tmp_path / "whole"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "streaming" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@names
@pytest.mark.parametrize("host", ["1 B", "1 GB"])
def test_weights_read_between_passes_are_the_true_ones(mixture_checkpoint: Mixture, name: str, host: str) -> None:
    model, whole = streaming(mixture_checkpoint(name), host), resident(mixture_checkpoint(name))
    logits(model)
    for parameter, wanted in whole.named_parameters():
        assert torch.equal(model.get_parameter(parameter).clone(), wanted), parameter


@names
@pytest.mark.parametrize("host", ["1 B", "1 GB"])
def test_detaching_gives_an_ordinary_model(mixture_checkpoint: Mixture, name: str, host: str) -> None:
    model, whole = streaming(mixture_checkpoint(name), host), resident(mixture_checkpoint(name))
    wanted = logits(whole)
    assert torch.equal(logits(model), wanted)
    djinn.detach(model)
    assert same(model.state_dict(), whole.state_dict())
    assert torch.equal(logits(model), wanted)


def test_saving_over_experts_that_are_streamed_from_is_refused(mixture_checkpoint: Mixture, tmp_path: Path) -> None:
    """Also where no other tensor is."""
    resident(mixture_checkpoint("mixtral")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {name: "experts/e.safetensors" if "experts." in name else "others.safetensors" for name in tensors}
    (tmp_path / "experts").mkdir()
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model = streaming(tmp_path)
    assert streamed_experts(model, Tier.DISK)
    with pytest.raises(ConfigError, match="whose files would be overwritten"):
        model.save_pretrained(tmp_path / "experts")
    (tmp_path / "experts" / "e.safetensors").unlink()
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"e\.safetensors: cannot be read any more"):
        state["model.layers.0.mlp.experts.down_proj"].sum()


@pytest.mark.slow
def test_experts_that_are_coded_while_they_are_loaded(tmp_path: Path) -> None:
    config = type(MIXTURES["mixtral"])(**MIXTURES["mixtral"].to_dict() | {"hidden_size": 256, "intermediate_size": 384})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="5MB")
    planned = djinn.plan(tmp_path, budget="20 MB", coding="lossless", **WORK)
    model = streaming(tmp_path, "1 GB", 0.8, coding="lossless")
    assert planned.is_coded
    assert placement(model).is_coded
    assert torch.equal(logits(model), logits(resident(tmp_path)))


@names
def test_a_mixture_in_memory_is_offloaded_with_its_experts_routed(mixture_checkpoint: Mixture, name: str) -> None:
    module, whole = (resident(mixture_checkpoint(name)) for _ in range(2))
    kept = 1 << 20
    budget = kept + round(0.5 * sum(parameter.nbytes for parameter in whole.parameters()))
    djinn.offload(module, budget=budget, workspace=kept, example=(torch.tensor([[1, 2, 3]]),), device="cpu")
    assert placement(module).routed
    assert torch.equal(logits(module), logits(whole))
    djinn.detach(module)
    assert same(module.state_dict(), whole.state_dict())
