"""Coded weights in the engine: equal bits, fewer bytes, and scratch that nobody reads too late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.codec.layout import LEAST_BYTES
from djinn.engine.coding import Coder, Scratch
from djinn.engine.load import placement
from djinn.errors import ConfigError, PlanError
from djinn.planning.placement import Tier
from djinn.transport.reader import Reader
from djinn.weights import coding
from djinn.weights.index import checkpoint_index
from djinn.weights.tensors import Encoded
from djinn.weights.units import find_units

pytestmark = pytest.mark.usefixtures("one_thread")

WORK = {"prompt_tokens": 16, "new_tokens": 8, "device": "cpu", "host_memory": "1 GB", "coding": "lossless"}
RING = "6 MB"  # a GPU's own choice would hold this whole model
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.gpu,
    ),
]


@pytest.fixture
def checkpoint(codable_checkpoint: Path) -> Path:
    return codable_checkpoint


def coded(folder: Path, device: str, share: float, **options: object) -> PreTrainedModel:
    """Return a coded model whose budget holds ``share`` of the raw weights, besides the workspace."""
    work = WORK | {"device": device}
    del work["coding"]
    whole = djinn.plan(folder, budget="3 GB", **work)  # type: ignore[arg-type]
    budget = whole.workspace_bytes + round(share * whole.model_bytes)
    return djinn.load(folder, budget=budget, ring=RING, **WORK | {"device": device} | options)  # type: ignore[arg-type]


def resident(folder: Path, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)


def logits(model: PreTrainedModel, length: int = 7) -> torch.Tensor:
    prompt = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        return model(prompt.to(model.device)).logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_output_is_the_resident_models_bit_for_bit(checkpoint: Path, device: str, share: float) -> None:
    """Invariant 7: streamed units and coded residents alike."""
    model, whole = coded(checkpoint, device, share), resident(checkpoint, device)
    made = placement(model)
    assert any(unit.coded for unit in made.streamed)
    assert any(unit.coded for unit in made.at(Tier.RESIDENT))
    for length in (1, 16, 7):
        assert torch.equal(logits(model, length), logits(whole, length))
    prompt = torch.arange(5, 12, device=model.device)[None]
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(model.generate(prompt, **greedy), whole.generate(prompt, **greedy))
    stats = djinn.stats(model)
    assert (stats.reloads, stats.skips) == (0, 0)
    assert stats.link_bytes == stats.passes * sum(unit.weight_bytes for unit in made.streamed)


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_bytes_cross_and_more_stays(checkpoint: Path, device: str) -> None:
    packed, raw = coded(checkpoint, device, 0.6), coded(checkpoint, device, 0.6, coding="none")
    assert placement(packed).model_bytes == placement(raw).model_bytes
    assert placement(packed).device_bytes <= placement(packed).budget
    streamed = sum(unit.raw_bytes for unit in placement(packed).streamed)
    assert streamed < sum(unit.raw_bytes for unit in placement(raw).streamed)
    assert sum(unit.weight_bytes for unit in placement(packed).streamed) < 0.72 * streamed


def test_a_model_that_fits_stays_raw(checkpoint: Path) -> None:
    model = djinn.load(checkpoint, budget="1 GB", **WORK)  # type: ignore[arg-type]
    assert not any(unit.coded for unit in placement(model).units)


def test_a_plan_of_coded_weights_is_about_what_loading_finds(checkpoint: Path) -> None:
    made = placement(coded(checkpoint, "cpu", 0.5))
    planned = djinn.plan(checkpoint, budget=made.budget, ring=RING, **WORK)  # type: ignore[arg-type]
    assert planned.is_coded
    assert planned.scratch_bytes == made.scratch_bytes
    for place in ("resident_bytes", "pinned_bytes"):
        assert getattr(planned, place) == pytest.approx(getattr(made, place), rel=0.1)


def test_a_coding_that_there_is_not_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="coding 'lossy': it is none or lossless"):
        djinn.load(checkpoint, **WORK | {"budget": "1 GB", "coding": "lossy"})  # type: ignore[arg-type]


def test_what_is_coded_cannot_stay_on_disk(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="made, converted or coded in memory have no disk tier"):
        coded(checkpoint, "cpu", 0.3, host_memory="1 MB")


@pytest.mark.parametrize("device", DEVICES)
def test_the_timeline_shows_decoding_of_streamed_units_and_residents(checkpoint: Path, device: str) -> None:
    model = coded(checkpoint, device, 0.6, trace=True)
    logits(model)
    logits(model)
    spans = [span for span in djinn.stats(model).timeline if span.lane == "decode"]
    made = placement(model)
    for units in (made.streamed, made.at(Tier.RESIDENT)):
        names = [unit.name for unit in units if unit.coded]
        assert names
        assert all(sum(span.unit == name for span in spans) == 2 for name in names)
    assert all(span.start_s <= span.end_s for span in spans)


@pytest.mark.parametrize("device", DEVICES)
def test_the_timeline_shows_what_computes_with_decoded_weights_after_each_decoding(
    checkpoint: Path, device: str
) -> None:
    model = coded(checkpoint, device, 0.6, trace=True)
    logits(model)
    logits(model)
    timeline = djinn.stats(model).timeline
    made = placement(model)
    for name in (unit.name for unit in made.units if unit.coded):
        decoded, computed = (
            sorted((span.start_s, span.end_s) for span in timeline if (span.lane, span.unit) == (lane, name))
            for lane in ("decode", "compute")
        )
        assert len(decoded) == len(computed) == 2
        # Compute begins where decoding has ended, and ends before the next pass decodes anew.
        assert all(begin >= end - 1e-6 for (_, end), (begin, _) in zip(decoded, computed, strict=True))
        assert computed[0][1] <= decoded[1][0] + 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_detaching_brings_the_raw_weights_back(checkpoint: Path, device: str) -> None:
    model, whole = coded(checkpoint, device, 0.3), resident(checkpoint, "cpu")
    logits(model)
    djinn.detach(model)
    wanted = dict(whole.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_in_a_pass_leaves_a_model_that_works(checkpoint: Path, error: BaseException) -> None:
    model = coded(checkpoint, "cpu", 0.6)
    wanted = logits(model)

    def fail(*_: object) -> None:
        raise error

    for name in ("model.embed_tokens", "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"):
        handle = model.get_submodule(name).register_forward_hook(fail)
        with pytest.raises(type(error)):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), wanted)


def test_a_unit_read_inside_another_is_refused(checkpoint: Path) -> None:
    """Both would be decoded into the same scratch; the recorded pass did not do it."""
    model = coded(checkpoint, "cpu", 0.6)
    wanted = logits(model)
    outer, inner = model.model.layers[0].mlp.gate_proj, model.model.layers[1].mlp.gate_proj
    forward = outer.forward

    def nested(x: torch.Tensor) -> torch.Tensor:
        return forward(x) + 0 * inner(x)

    outer.forward = nested
    with pytest.raises(PlanError, match=r"is read inside|which the recorded pass did not do"):
        logits(model)
    del outer.forward
    assert torch.equal(logits(model), wanted)


def test_only_what_gains_is_coded(checkpoint: Path, tmp_path: Path) -> None:
    reader = Reader(2**20)
    coder = Coder(reader, torch.device("cpu"))
    units = coding.coded(find_units(checkpoint_index(checkpoint, tmp_path)), coder.layout)
    for name, entry in ((tensor.name, tensor.entry) for unit in units for tensor in unit.tensors):
        assert (entry.layout is not None) == (entry.raw_bytes >= LEAST_BYTES), name
        assert isinstance(entry.source, Encoded) == (entry.layout is not None)
        assert entry.raw.nbytes == entry.raw_bytes
    coder.close()
    reader.close()


def test_scratch_knows_who_reads_it() -> None:
    scratch = Scratch(1, torch.device("cpu"))
    scratch.enter("a")
    scratch.enter("a")
    scratch.leave("b")
    scratch.leave("a")
    with pytest.raises(PlanError, match="unit b is read inside a"):
        scratch.enter("b")
    scratch.leave("a")
    scratch.enter("b")
    scratch.clear()
    scratch.enter("c")


def test_parameters_look_as_ever(checkpoint: Path) -> None:
    model = coded(checkpoint, "cpu", 0.3)
    parameters = dict(model.named_parameters())
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in parameters.values())
    shapes = {name: value.shape for name, value in resident(checkpoint, "cpu").named_parameters()}
    assert {name: value.shape for name, value in parameters.items()} == shapes
