"""Adapters beside weights that stream: PEFT's LoRA equals the same adapter on the resident model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine.load import placement
from djinn.errors import ConfigError

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

Tiny = Callable[[str], Path]
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
TARGETS = {"attention": ["q_proj", "v_proj", "down_proj"], "mlp": ["up_proj"], "head": ["lm_head"]}
IDS = torch.arange(3, 10).view(1, 7)


@pytest.fixture
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters of the llama, all of their weights random."""
    saved = {}
    for name, targets in TARGETS.items():
        saved[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(len(name))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(resident(tiny_checkpoint("llama")), config).save_pretrained(saved[name])
    return saved


def streaming(folder: Path) -> PreTrainedModel:
    all_of_it = djinn.plan(folder, budget="1 GB", **WORK)
    budget = all_of_it.workspace_bytes + round(0.4 * sum(unit.image_bytes for unit in all_of_it.units))
    return djinn.load(folder, budget=budget, host_memory="1 B", chunk="32 KiB", **WORK)


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_equal(streamed: Any, whole: Any) -> torch.Tensor:
    found = logits(streamed)
    assert torch.equal(found, logits(whole))
    for greedily in (True, False):
        tokens = []
        for model in (streamed, whole):
            torch.manual_seed(0)
            tokens.append(model.generate(input_ids=IDS, max_new_tokens=8, do_sample=not greedily))
        assert torch.equal(*tokens)
    return found


def test_an_adapter_equals_the_resident_models(folder: Path, adapters: dict[str, Path]) -> None:
    """One, none, another, both weighted, and taken off again: in order throughout."""
    model, plain = streaming(folder), resident(folder)
    before = logits(model)
    both = [peft.PeftModel.from_pretrained(each, adapters["attention"], "attention") for each in (model, plain)]
    assert placement(model).disk_bytes > 0
    first = assert_equal(*both)
    assert not torch.equal(first, before)
    with both[0].disable_adapter(), both[1].disable_adapter():
        assert torch.equal(assert_equal(*both), before)
    for each in both:
        each.load_adapter(adapters["mlp"], "mlp")
        each.set_adapter("mlp")
    assert not torch.equal(assert_equal(*both), first)
    for each in both:
        each.add_weighted_adapter(["attention", "mlp"], [0.5, 2.0], "both", combination_type="cat")
        each.set_adapter("both")
    assert_equal(*both)
    assert (djinn.stats(model).skips, djinn.stats(model).reloads) == (0, 0)
    assert both[0].unload() is model
    assert torch.equal(logits(model), before)


def test_an_adapter_may_come_through_transformers(folder: Path, adapters: dict[str, Path]) -> None:
    model, plain = streaming(folder), resident(folder)
    for each in (model, plain):
        each.load_adapter(str(adapters["attention"]))
    assert_equal(model, plain)


def test_merging_is_refused_and_changes_nothing(folder: Path, adapters: dict[str, Path]) -> None:
    model = streaming(folder)
    adapted = peft.PeftModel.from_pretrained(model, adapters["attention"])
    before = logits(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ConfigError, match=r"streams and no adapter can be merged .*; run the adapter beside them"):
            merge()
    assert torch.equal(logits(adapted), before)


def test_a_detached_model_merges(folder: Path, adapters: dict[str, Path]) -> None:
    model, plain = streaming(folder), resident(folder)
    both = [peft.PeftModel.from_pretrained(each, adapters["attention"]) for each in (model, plain)]
    djinn.detach(model)
    assert_equal(*both)
    assert_equal(*(each.merge_and_unload() for each in both))


def test_an_adapter_of_a_model_that_does_not_stream_merges(folder: Path, adapters: dict[str, Path]) -> None:
    """While another one does."""
    model = streaming(folder)
    peft.PeftModel.from_pretrained(resident(folder), adapters["attention"]).merge_and_unload()
    assert placement(model).streamed


def test_an_adapter_with_base_weights_of_its_own_is_refused(folder: Path, adapters: dict[str, Path]) -> None:
    """PEFT saves a projection that an adapter has as a target, and would write it over the one that streams."""
    with pytest.raises(ConfigError, match=r"load_state_dict: .*lm_head\.base_layer\.weight streams"):
        peft.PeftModel.from_pretrained(streaming(folder), adapters["head"])


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=TARGETS["attention"], init_lora_weights=False, **options)


READERS = {
    "DoRA": lambda: _lora(use_dora=True),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS["attention"], init_weights=False),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS["attention"], init_weights=False),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS["attention"], init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=TARGETS["attention"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", READERS)
def test_adapters_that_read_the_weights_beside_them(folder: Path, kind: str) -> None:
    """In a forward of their own, where the layer that they wrap has run already, or never does."""
    both = []
    for model in (streaming(folder), resident(folder)):
        torch.manual_seed(0)
        both.append(peft.get_peft_model(model, READERS[kind]()).eval())
    for _ in range(2):
        assert_equal(*both)


@pytest.mark.parametrize("kind", ["pissa_init", "olora_init", "KaSA"])
def test_adapters_that_take_weights_apart_are_refused_before_they_do(folder: Path, kind: str) -> None:
    model = streaming(folder)
    if kind == "KaSA":
        config = _lora(kasa_config=peft.KasaConfig())
    else:
        begin = kind.removesuffix("_init")
        config = peft.LoraConfig(r=4, target_modules=TARGETS["attention"], init_lora_weights=begin)
    with pytest.raises(ConfigError, match=rf"weights cannot be overwritten, as PEFT's {kind} does"):
        peft.get_peft_model(model, config)
    whole, found = resident(folder), model.state_dict()
    assert found.keys() == whole.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    assert torch.equal(logits(model), logits(whole))


def test_a_detached_model_has_its_weights_taken_apart(folder: Path) -> None:
    model = streaming(folder)
    config = peft.LoraConfig(r=4, target_modules=TARGETS["attention"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    config = peft.LoraConfig(r=4, target_modules=TARGETS["attention"], init_lora_weights="olora")
    with pytest.raises(ConfigError, match="olora_init"):
        adapted.add_adapter("second", config)
    djinn.detach(model)
    adapted.add_adapter("third", config)


def test_an_adapter_on_experts_reads_them_whole_and_right(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    mixture = tiny_checkpoint("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(resident(mixture), config).save_pretrained(tmp_path)
    model = streaming(mixture)
    assert placement(model).routed
    plain = logits(model)
    streamed, whole = (peft.PeftModel.from_pretrained(each, tmp_path) for each in (model, resident(mixture)))
    assert not torch.equal(assert_equal(streamed, whole), plain)
