"""Units in the order of a real forward pass, and models whose order cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from djinn.weights.index import WeightIndex, checkpoint_index, synthetic_index
from djinn.weights.tensors import PAGE
from djinn.weights.units import Unit, find_units

Tiny = Callable[[str], Path]
TRACED = sorted(TINY.keys() - {"opt"})
"""Those whose pass runs on the meta device in every supported transformers (OPT's asks for values in some)."""


def executed(model: nn.Module) -> list[str]:
    """Run the model on real values; return the modules with weights of their own, in the order they first ran."""
    order: list[str] = []
    for name, module in model.named_modules():
        if module._parameters:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        model(torch.arange(5)[None])
    return list(dict.fromkeys(order))


@pytest.mark.parametrize("name", TRACED)
def test_units_are_in_the_order_in_which_the_model_reads_them(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    units = find_units(checkpoint_index(tiny_checkpoint(name), tmp_path))
    ran = executed(AutoModelForCausalLM.from_pretrained(tiny_checkpoint(name), dtype="auto"))
    first_readers = [unit.readers[0] for unit in units]
    assert not any(unit.held for unit in units)
    assert len(first_readers) == len(set(first_readers)), "traced, not cut into blocks"
    assert first_readers == [module for module in ran if module in first_readers]
    assert {reader for unit in units for reader in unit.readers} == set(ran)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_in_one_unit(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    index = checkpoint_index(tiny_checkpoint(name), tmp_path)
    units = find_units(index)
    names = [tensor.name for unit in units for tensor in unit.tensors]
    assert sorted(names) == sorted(index.tensors)
    assert sum(unit.weight_bytes for unit in units) == index.nbytes
    assert len({unit.name for unit in units}) == len(units)
    assert all(unit.image_bytes % PAGE == 0 for unit in units)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bloom"])
def test_a_tied_weight_has_both_its_readers(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    index = checkpoint_index(tiny_checkpoint(name), tmp_path)
    tied = [unit for unit in find_units(index) if len(unit.readers) > 1]
    modules = dict(index.model.named_modules())
    assert len(tied) == 1
    assert [modules[reader] for reader in tied[0].readers] == [
        index.model.get_input_embeddings(),
        index.model.get_output_embeddings(),
    ]


def test_tracing_leaves_the_model_as_it_was(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    index = checkpoint_index(tiny_checkpoint("llama"), tmp_path)
    before = {name: buffer.clone() for name, buffer in index.model.named_buffers()}
    find_units(index)
    assert all(torch.equal(before[name], buffer) for name, buffer in index.model.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in index.model.modules())


# Models with habits of their own.


class Config(PretrainedConfig):
    model_type = "habits"


class Habits(PreTrainedModel):
    """A decoder's skeleton: an embedding, four blocks, and what a subclass does with them."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4))
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def index_of(model: PreTrainedModel) -> WeightIndex:
    return synthetic_index(model.to("meta"), 0)


def readers(units: list[Unit]) -> dict[str, tuple[str, ...]]:
    return {tensor.name: unit.readers for unit in units for tensor in unit.tensors}


def test_a_parent_that_reads_its_childs_weight_is_its_reader() -> None:
    class Parent(Habits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self._body(input_ids), self.head.weight)

        def _body(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    units = find_units(index_of(Parent(Config())))
    assert readers(units)["head.weight"] == ("",)
    assert [unit.name for unit in units if unit.held] == ["(root)"], "the parent needs it while other units are read"


@pytest.mark.parametrize("view", ["T", "mT", "data"])
def test_a_weight_read_through_an_attribute_has_that_reader_too(view: str) -> None:
    """An embedding that a parent also multiplies with, as weight.T, is read by both."""

    class Transposed(Habits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = super().forward(input_ids) @ self.head.weight
            weight = getattr(self.embed.weight, view)
            return x @ weight if view in ("T", "mT") else nn.functional.linear(x, weight)

    assert readers(find_units(index_of(Transposed(Config()))))["embed.weight"] == ("embed", "")


def test_looking_at_a_weights_dtype_reads_nothing() -> None:
    class Looking(Habits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            assert self.head.weight.dtype == torch.float32
            assert self.head.weight.shape == (50, 64)
            assert self.head.weight.device is not None
            return super().forward(input_ids)

    units = find_units(index_of(Looking(Config())))
    assert readers(units)["head.weight"] == ("head",)
    assert not any(unit.held for unit in units)


class DataDependent(Habits):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            if x.abs().max().item() >= 0:
                x = block(x)
        return self.head(x)


def test_a_model_that_cannot_be_traced_is_cut_into_its_blocks() -> None:
    index = index_of(DataDependent(Config()))
    units = find_units(index)
    assert [unit.name for unit in units] == ["(root)", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert [tensor.name for tensor in units[1].tensors] == [
        "blocks.0.0.weight",
        "blocks.0.0.bias",
        "blocks.0.2.weight",
        "blocks.0.2.bias",
    ]


def test_what_lies_outside_the_blocks_of_an_untraced_model_stays() -> None:
    """Nobody knows who reads it: it may be its own module, or any other."""
    units = find_units(index_of(DataDependent(Config())))
    assert [[tensor.name for tensor in unit.tensors] for unit in units if unit.held] == [
        ["embed.weight", "head.weight"]
    ]


def test_a_container_that_is_not_called_is_no_block() -> None:
    class Containers(Habits):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.pairs = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(64, 64)}) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for pair in self.pairs:
                x = pair["a"](x) if x.sum().item() != 0 else x
            return self.head(x)

    units = find_units(index_of(Containers(Config())))
    held = [tensor.name for unit in units if unit.held for tensor in unit.tensors]
    assert {f"pairs.{number}.a.weight" for number in range(3)} <= set(held)


def test_what_no_pass_reads_goes_by_blocks_and_the_rest_is_traced() -> None:
    class Unused(Habits):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.unused = nn.Linear(64, 64)
            self.images = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))

    index = index_of(Unused(Config()))
    units = find_units(index)
    assert sorted(tensor.name for unit in units for tensor in unit.tensors) == sorted(index.tensors)
    assert [unit.name for unit in units][:3] == ["embed", "blocks.0.0", "blocks.0.2"]
    assert [unit.name for unit in units if not unit.held][-2:] == ["images.0", "images.1"]
    assert [tensor.name for unit in units if unit.held for tensor in unit.tensors] == ["unused.weight", "unused.bias"]


def test_a_weight_inside_a_traced_block_that_no_pass_reads_stays() -> None:
    """Its block runs the traced modules, so it cannot be streamed around them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    class Partly(Habits):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.blocks = nn.ModuleList(Block() for _ in range(4))

    units = find_units(index_of(Partly(Config())))
    assert [unit.name for unit in units if unit.held] == [f"blocks.{number}" for number in range(4)]


class Caching(Habits):
    """Multiplies with the head's weight itself once there is a cache, as some convolutions in state-space models do."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> ModelOutput:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        x = self.head(x) if past_key_values is None else nn.functional.linear(x, self.head.weight)
        return ModelOutput(logits=x, past_key_values=(x,))


def test_a_weight_that_is_read_elsewhere_with_a_cache_has_both_readers() -> None:
    units = find_units(index_of(Caching(Config())))
    assert readers(units)["head.weight"] == ("head", "")
    assert [unit.name for unit in units if unit.held] == ["head+"]


def test_a_second_pass_that_fails_leaves_the_order_of_the_first() -> None:
    class Failing(Caching):
        def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> ModelOutput:
            assert past_key_values is None
            return super().forward(input_ids)

    units = find_units(index_of(Failing(Config())))
    assert readers(units)["head.weight"] == ("head",)
    assert not any(unit.held for unit in units)


def test_conditions_hold_while_a_pass_is_traced() -> None:
    class Conditional(Habits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if not (input_ids >= 0).all() or not (input_ids < 50).all().item():
                raise ValueError("an id outside the vocabulary")
            return super().forward(input_ids)

    assert readers(find_units(index_of(Conditional(Config()))))["head.weight"] == ("head",)


def test_every_owner_of_a_tied_weight_is_a_reader() -> None:
    """One that the traced passes did not run may run later."""

    class Tied(Habits):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.head.weight = self.embed.weight
            self.other = nn.Linear(64, 50, bias=False)
            self.other.weight = self.embed.weight

    model = Tied(Config()).to("meta")
    model.head.weight = model.other.weight = model.embed.weight
    assert readers(find_units(synthetic_index(model, 0)))["embed.weight"] == ("embed", "head", "other")


def test_buffers_that_a_pass_replaces_or_adds_do_not_stay_on_the_meta_device() -> None:
    class Buffered(Habits):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("steps", torch.arange(4.0), persistent=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.register_buffer("mask", torch.ones(3, device=input_ids.device), persistent=False)
            self.steps = self.steps + 1
            return super().forward(input_ids)

    model = Buffered(Config())
    index = index_of(model)
    model._buffers["steps"] = torch.arange(4.0)
    find_units(index)
    assert torch.equal(model.steps, torch.arange(4.0))
    assert "mask" not in model._buffers


def test_blocks_of_an_untraced_model_may_be_in_a_sequence() -> None:
    """As in many vision and audio encoders."""
    model = DataDependent(Config())
    model.blocks = nn.Sequential(*model.blocks)  # type: ignore[assignment]
    assert [unit.name for unit in find_units(index_of(model))] == [
        "(root)", "blocks.0", "blocks.1", "blocks.2", "blocks.3",
    ]  # fmt: skip
