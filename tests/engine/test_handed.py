"""What an experts module gets in the place of its weights, in the hands of those who do something else with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import assert_right, experts_of, logits, streaming
from transformers import PreTrainedModel

from djinn.engine.handed import Call

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pool", ["k", "two windows"])
@pytest.mark.parametrize("coding", [None, "lossless"])
def test_weights_may_be_used_in_other_ways(
    folder: Path, resident: PreTrainedModel, pool: str, coding: str | None
) -> None:
    """They stand for all experts, of which those that were not picked are zero."""
    model, found = streaming(folder, pool, coding=coding), []
    wanted: torch.Tensor = experts_of(resident, 0).gate_up_proj.detach()  # type: ignore[assignment, operator]

    def use(module: Any, args: tuple[Any, ...]) -> None:
        weights, picked = module.gate_up_proj, sorted(set(args[1].flatten().tolist()))
        there = torch.zeros_like(wanted)
        there[picked] = wanted[picked]
        assert (weights.shape, weights.ndim, len(weights), weights.size(1)) == (wanted.shape, 3, 8, wanted.size(1))
        assert torch.equal(weights.float().sum(), there.float().sum())
        assert torch.equal(torch.mean(weights, 0), torch.mean(there, 0))
        assert torch.equal(weights[2:5], there[2:5])
        assert torch.equal(weights.transpose(1, 2)[picked[0]], there[picked[0]].T)
        assert torch.equal(torch.einsum("ehd->hd", weights), torch.einsum("ehd->hd", there))
        with pytest.raises(IndexError, match="only an expert's own two dimensions"):
            weights.transpose(0, 1)
        found.append(len(picked))

    experts_of(model, 0).register_forward_pre_hook(use)
    assert_right(model, resident)
    assert max(found) > 2


@pytest.mark.parametrize("coding", [None, "lossless"])
def test_experts_that_come_in_rounds_may_be_asked_for_in_any_order(
    folder: Path, resident: PreTrainedModel, coding: str | None
) -> None:
    model, found = streaming(folder, "k", coding=coding), []
    first, second = (getattr(experts_of(resident, 0), name).detach() for name in ("gate_up_proj", "down_proj"))

    def use(module: Any, args: tuple[Any, ...]) -> None:
        picked = sorted(set(args[1].flatten().tolist()))
        turned = module.gate_up_proj.transpose(1, 2)
        for expert in [picked[0], picked[-1], *picked, *reversed(picked)]:
            other = picked[-1 - picked.index(expert)]
            assert torch.equal(module.gate_up_proj[expert], first[expert])
            assert torch.equal(turned[other], first[other].T)
            assert torch.equal(module.down_proj[other], second[other])
            assert torch.equal(module.gate_up_proj[expert], first[expert])
        found.append(len(picked))

    experts_of(model, 0).register_forward_pre_hook(use)
    logits(model)
    assert max(found) > 2


def test_rows_are_ordered_by_slot_with_idle_ones_behind() -> None:
    """As a GPU multiplies them: each slot's rows are those of the expert in it, and there are as many as asked for."""
    index = torch.tensor([[2, 0], [2, 3], [0, 2]])
    call = Call(4, index, None, lambda *_: {}, places={0: 5, 2: 1, 3: 2})  # type: ignore[arg-type]
    order, until = call.by_slot(9, 7)
    assert order.tolist() == [2, 3, 4, 5, 0, 1, 0, 0, 0]
    assert until.tolist() == [0, 3, 4, 4, 4, 6, 6]
    assert until.dtype == torch.int32
