"""What is saved of a streaming model is what would be saved of the resident one; what would break it is refused."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine import load as engine_model
from djinn.engine import saving
from djinn.engine.load import engine_of
from djinn.errors import CheckpointError, ConfigError, PlanError, UnavailableError
from djinn.planning.placement import Tier

Tiny = Callable[[str], Path]
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
IDS = torch.arange(3, 10).view(1, 7)


def streaming(folder: Path, host_memory: int | str = "1 B", share: float = 0.4, **options: Any) -> PreTrainedModel:
    """Load with about ``share`` of the weights on the device."""
    all_of_it = djinn.plan(folder, budget="1 GB", **WORK)
    budget = all_of_it.workspace_bytes + round(share * sum(unit.image_bytes for unit in all_of_it.units))
    return djinn.load(folder, budget=budget, host_memory=host_memory, chunk="32 KiB", **WORK | options)


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return list(state) == list(wanted) and all(
        value.dtype == wanted[key].dtype and torch.equal(value, wanted[key]) for key, value in state.items()
    )


@pytest.fixture(autouse=True)
def one_thread_and_no_garbage(one_thread: None) -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["1 B", "1 GB"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_files_and_state_dict_are_those_of_the_resident_model(
    tiny_checkpoint: Tiny, tmp_path: Path, name: str, host: str
) -> None:
    model, whole = streaming(tiny_checkpoint(name), host), resident(tiny_checkpoint(name))
    logits(model)
    assert same(model.state_dict(), whole.state_dict())
    assert same(model.model.state_dict() if name != "gpt2" else model.transformer.state_dict(),
                whole.base_model.state_dict())  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "streaming", max_shard_size="200KB")
    whole.save_pretrained(tmp_path / "whole", max_shard_size="200KB")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) > 4
    # Experts in host memory have gaps between them, and transformers counts these when it fills a shard.
    if (name, host) != ("mixtral", "1 GB"):
        assert sorted(path.name for path in (tmp_path / "streaming").iterdir()) == files
        for file in files:
            assert (tmp_path / "streaming" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert torch.equal(logits(model), logits(whole))
    assert torch.equal(logits(resident(tmp_path / "streaming")), logits(whole))


def test_ties_that_stream_are_one_tensor(tiny_checkpoint: Tiny) -> None:
    """In the smallest budget there is, which has no room for them beside the ring."""
    folder = tiny_checkpoint("gpt2")
    whole = resident(folder)
    with pytest.raises(PlanError) as refusal:
        djinn.plan(folder, budget="1 KB", ring="132 KiB", **WORK)
    least = int(str(refusal.value).split(" need ")[1].split()[0])
    for host in ("1 B", "1 GB"):
        model = djinn.load(folder, budget=least, host_memory=host, ring="132 KiB", **WORK)
        streamed = {tensor.name for unit in engine_model.placement(model).streamed for tensor in unit.tensors}
        assert "transformer.wte.weight" in streamed
        state = model.state_dict()
        assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
        assert same(state, whole.state_dict())
        assert torch.equal(logits(model), logits(whole))


def test_what_is_in_memory_or_in_files_is_not_copied(tiny_checkpoint: Tiny) -> None:
    for host in ("1 B", "1 GB"):
        model = streaming(tiny_checkpoint("llama"), host)
        state = model.state_dict()
        engine = engine_of(model)
        images = engine.weights.images
        for unit in engine.plan.at(Tier.PINNED):
            for tensor in unit.tensors:
                assert state[tensor.name].data_ptr() == images[unit.name].data_ptr() + tensor.offset
        maps = Path("/proc/self/maps").read_text()
        for unit in engine.plan.at(Tier.DISK):
            assert str(unit.tensors[0].entry.source.path) in maps
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_experts_on_disk_are_put_together_when_they_are_read_and_not_in_memory(tiny_checkpoint: Tiny) -> None:
    wanted = resident(tiny_checkpoint("mixtral")).state_dict()
    model = streaming(tiny_checkpoint("mixtral"))
    names = {tensor.name for unit in engine_of(model).plan.at(Tier.DISK) for tensor in unit.tensors if unit.experts}
    assert names
    state = model.state_dict()
    for name in names:
        value, whole = state[name], wanted[name]
        assert (value.shape, value.dtype, value.numel(), len(value)) == (whole.shape, whole.dtype, whole.numel(), 4)
        assert isinstance(value, torch.Tensor)
        assert not value.requires_grad
        assert value.untyped_storage().nbytes() == value.nbytes
        low = value.data_ptr()
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{low:x}-")]
        assert maps
        assert "(deleted)" in maps[0], "a file without a name"
        assert torch.equal(value, whole)


def test_an_adapter_is_saved_without_reading_experts(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state dict PEFT takes what is its own."""
    model = streaming(tiny_checkpoint("mixtral"))

    def none(_: int) -> torch.Tensor:
        raise AssertionError("somebody reads them")

    monkeypatch.setattr(saving, "file_memory", none)
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert not state
    with pytest.raises(AssertionError, match="somebody reads them"):
        _ = model.state_dict()["model.layers.0.mlp.experts.down_proj"].sum()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_room_for_experts_is_named(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    state = streaming(tiny_checkpoint("mixtral")).state_dict()

    def full(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError, match=rf"{os.strerror(error)}; set TMPDIR to a folder with more room"):
        state["model.layers.0.mlp.experts.down_proj"].clone()
    monkeypatch.undo()
    state["model.layers.0.mlp.experts.down_proj"].clone()


@pytest.mark.slow
def test_coded_and_packed_weights_are_saved_raw(codable_checkpoint: Path, tmp_path: Path) -> None:
    wanted = resident(codable_checkpoint).state_dict()
    coded = streaming(codable_checkpoint, "1 GB", 0.5, coding="lossless")
    assert engine_model.placement(coded).is_coded
    assert same(coded.state_dict(), wanted)
    djinn.pack(codable_checkpoint, tmp_path / "packed")
    packed = streaming(tmp_path / "packed", "1 B", 0.5)
    assert any(unit.coded for unit in engine_model.placement(packed).at(Tier.DISK))
    assert same(packed.state_dict(), wanted)
    packed.save_pretrained(tmp_path / "raw")
    saved = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(value, wanted[key]) for key, value in saved.items())
    assert saved.keys() == wanted.keys()


@pytest.mark.slow
def test_a_state_dict_outlives_its_model(tiny_checkpoint: Tiny) -> None:
    wanted = resident(tiny_checkpoint("mixtral")).state_dict()
    for host in ("1 B", "1 GB"):
        model = streaming(tiny_checkpoint("mixtral"), host)
        state = model.state_dict()
        del model
        gc.collect()
        assert same(state, wanted)


def test_saving_over_the_files_that_are_streamed_from_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    resident(tiny_checkpoint("llama")).save_pretrained(folder)
    model, wanted = streaming(folder), logits(resident(folder))
    with pytest.raises(ConfigError, match=r"this model streams from .*own, whose files would be overwritten"):
        model.save_pretrained(folder)
    assert torch.equal(logits(model), wanted)
    in_memory = streaming(folder, "1 GB")
    in_memory.save_pretrained(folder)
    assert torch.equal(logits(resident(folder)), wanted)


def test_files_that_are_gone_are_named(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    resident(tiny_checkpoint("llama")).save_pretrained(folder)
    model = streaming(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read any more"):
        model.state_dict()


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "to dtype": lambda model: model.to(torch.float16),
    "cuda": lambda model: model.cuda(),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "inside another": lambda model: nn.Sequential(model).to(torch.float16),
    "a part": lambda model: model.model.layers[1].half(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "deepcopy of a part": lambda model: copy.deepcopy(model.model.layers),
    "pickle": pickle.dumps,
    "pickle inside another": lambda model: pickle.dumps({"model": model}),
    "torch.save": lambda model: torch.save(model, "/dev/null"),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "load_state_dict of a part": lambda model: model.lm_head.load_state_dict({"weight": torch.zeros(256, 128)}),
}


def test_a_model_that_was_in_memory_generates_and_is_saved_as_it_was(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    whole = resident(tiny_checkpoint("llama"))
    model = copy.deepcopy(whole)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    djinn.offload(model, example={"input_ids": IDS}, budget=weights // 2, workspace="1 KB", device="cpu")
    assert engine_model.placement(model).streamed
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **greedy), whole.generate(IDS, **greedy))
    for either, folder in ((model, "streaming"), (whole, "whole")):
        either.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("streaming", "whole")]
    assert files[0] == files[1]
    assert vars(djinn.detach(model)).keys() == vars(whole).keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MOVES))
def test_what_would_tear_weights_from_the_ring_is_refused(tiny_checkpoint: Tiny, name: str) -> None:
    model = streaming(tiny_checkpoint("llama"))
    wanted = logits(resident(tiny_checkpoint("llama")))
    with pytest.raises(ConfigError, match=r"djinn\.detach\(model\)"):
        MOVES[name](model)
    assert torch.equal(logits(model), wanted)
    djinn.detach(model)
    if name != "cuda":
        MOVES[name](model)


STAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda model: model.to("cpu"),
    "to dtype": lambda model: model.to(torch.bfloat16),
    "to all at once": lambda model: model.to("cpu", torch.bfloat16, non_blocking=True),
    "cpu": lambda model: model.cpu(),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "a part": lambda model: model.model.layers[1].to("cpu"),
}


@pytest.mark.parametrize("name", list(STAYS))
def test_a_move_that_changes_nothing_does_nothing(tiny_checkpoint: Tiny, name: str) -> None:
    model, whole = streaming(tiny_checkpoint("llama")), resident(tiny_checkpoint("llama"))
    for buffers in (model, whole):  # so that nothing of it is in float32
        for module in buffers.modules():
            module._buffers = {key: each.bfloat16() for key, each in module._buffers.items() if each is not None}
    assert STAYS[name](model) in set(model.modules())
    assert torch.equal(logits(model), logits(whole))


def test_a_state_dict_that_has_none_of_the_models_weights_is_loaded(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"))
    model.model.layers[0].adapter = nn.Linear(4, 4)
    found = model.load_state_dict({"model.layers.0.adapter.weight": torch.ones(4, 4)}, strict=False)
    assert not found.unexpected_keys
    assert model.model.layers[0].adapter.weight.sum() == 16


def test_gradients_through_inputs_are_refused(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"))
    embedded = torch.randn(1, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ConfigError, match="gradients cannot be computed through weights that stream"):
        model(inputs_embeds=embedded).logits.sum().backward()


def test_detaching_does_not_copy_what_waits_in_host_memory(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), "1 GB")
    images = dict(engine_of(model).weights.images)
    planned = engine_model.placement(model)
    djinn.detach(model)
    parameters = dict(model.named_parameters())
    for unit in planned.at(Tier.PINNED):
        for tensor in unit.tensors:
            assert parameters[tensor.name].data_ptr() == images[unit.name].data_ptr() + tensor.offset
    assert "save_pretrained" not in vars(model)


def test_a_checkpoint_that_is_loaded_twice(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    one, other = streaming(folder), streaming(folder, "1 GB")
    wanted = logits(resident(folder))
    for _ in range(2):
        assert torch.equal(logits(one), wanted)
        assert torch.equal(logits(other), wanted)
    djinn.detach(one)
    assert torch.equal(logits(other), wanted)
    assert same(other.state_dict(), one.state_dict())
