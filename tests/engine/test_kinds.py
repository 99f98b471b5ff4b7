"""Models that are built in ways of their own: their passes equal the resident model's in every budget that is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, WORK
from tiny_models import save_model
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import djinn
from djinn.engine.load import placement
from djinn.errors import CheckpointError, PlanError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 10).view(1, 7)
TWO = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}

KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor]]] = {
    # Its head is tied, and has a bias that is read at the same time.
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=4096, dim=16, hidden_dim=64, n_layers=4, n_heads=2, max_position_embeddings=64)
        ),
        {"input_ids": IDS},
    ),
    # It computes its positions.
    "marian": (
        lambda: MarianMTModel(
            MarianConfig(
                vocab_size=256, d_model=64, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
                pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            )
        ),
        TWO,
    ),
    # Its routers convert themselves, to what they are.
    "switch": (
        lambda: SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(
                vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_decoder_layers=4, num_heads=4,
                num_experts=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, decoder_start_token_id=0,
            )
        ),
        TWO,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_budget_that_is_taken_gives_the_resident_models_output(tmp_path: Path, name: str) -> None:
    build, inputs = KINDS[name]
    made = build()
    folder = save_model(made, name, tmp_path)
    whole = type(made).from_pretrained(folder, dtype="auto").eval()
    options: dict[str, Any] = {**WORK, "host_memory": "1 MB"}
    fits = djinn.plan(folder, budget="1 GB", **options)
    images = sum(unit.image_bytes for unit in fits.units)
    streamed = 0
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        try:
            model = djinn.load(folder, budget=fits.workspace_bytes + round(share * images), **options)
        except PlanError:
            continue
        streamed += bool(placement(model).streamed)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, whole(**inputs).logits), share
    assert streamed > 2


def test_weights_that_a_pass_converts_for_good_are_converted_when_they_are_loaded(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.gate_proj = self.gate_proj.to(torch.float32)
        gate = self.gate_proj(x.float()).to(x.dtype)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return]

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    folder = tiny_checkpoint("llama")
    whole = ARCHITECTURES["llama"].cls.from_pretrained(folder, dtype="auto").eval()
    fits = djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    budget = fits.workspace_bytes + round(0.9 * sum(unit.image_bytes for unit in fits.units))
    model = djinn.load(folder, budget=budget, **WORK)  # type: ignore[arg-type]
    assert placement(model).streamed
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_model_that_converts_weights_and_cannot_be_traced_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    build, _ = KINDS["switch"]
    folder = save_model(build().to(torch.bfloat16), "switch", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"converts \S+router\.classifier\.weight .* load it with dtype torch.float32"
    ):
        djinn.load(folder, budget="1 GB", device="cpu")


def test_a_model_from_inference_mode_can_be_used_outside_of_it(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("llama")
    whole = ARCHITECTURES["llama"].cls.from_pretrained(folder, dtype="auto").eval()
    fits = djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    budget = fits.workspace_bytes + round(0.4 * sum(unit.image_bytes for unit in fits.units))
    with torch.inference_mode():
        model = djinn.load(folder, budget=budget, host_memory="1 B", **WORK)  # type: ignore[arg-type]
        wanted = whole(IDS).logits
        assert torch.equal(model(IDS).logits, wanted)
        read = model.model.layers[1].mlp.up_proj.weight[0]
        assert torch.equal(read, whole.model.layers[1].mlp.up_proj.weight[0])
    assert torch.equal(model(IDS).logits, wanted)
    with torch.inference_mode():
        djinn.detach(model)
    assert torch.equal(model(IDS).logits, wanted)
    model.requires_grad_(True)
    model(IDS).logits.sum().backward()


def test_a_relative_path_is_the_same_after_the_working_directory_changes(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama")
    whole = ARCHITECTURES["llama"].cls.from_pretrained(folder, dtype="auto").eval()
    fits = djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]
    budget = fits.workspace_bytes + round(0.4 * sum(unit.image_bytes for unit in fits.units))
    monkeypatch.chdir(folder.parent)
    model = djinn.load(folder.name, budget=budget, host_memory="1 B", **WORK)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
