"""Steered routing: what is drawn, what repeats, and what of a model it changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn.bench.steering import STEPS, SteeredRouting, steered_picks
from djinn.weights.experts import routed_experts


def picks(reuse: float = 0.0, zipf: float = 0.0, seed: int = 0) -> np.ndarray:
    return steered_picks(3, 32, 4, reuse=reuse, zipf=zipf, seed=seed)


@pytest.mark.parametrize(("reuse", "zipf"), [(0, 0), (0.7, 0), (0, 1.5), (0.5, 1.0), (1.0, 0)])
def test_every_token_picks_different_experts_that_there_are(reuse: float, zipf: float) -> None:
    found = picks(reuse, zipf)
    assert (found.shape, found.dtype) == ((STEPS, 3, 4), np.int64)
    assert found.min() >= 0
    assert found.max() < 32
    assert all(len(set(picked)) == 4 for picked in found.reshape(-1, 4).tolist())


def test_the_same_seed_gives_the_same_picks() -> None:
    assert np.array_equal(picks(0.5, 1.0, 3), picks(0.5, 1.0, 3))
    assert not np.array_equal(picks(0.5, 1.0, 3), picks(0.5, 1.0, 4))


def repeated(found: np.ndarray) -> float:
    """Return the share of picks that the token before had picked too."""
    pairs = zip(found[:-1].reshape(-1, 4), found[1:].reshape(-1, 4), strict=True)
    return float(np.mean([np.isin(after, before).mean() for before, after in pairs]))


def test_reuse_is_the_share_that_stays() -> None:
    even = 4 / 32
    for reuse in (0.0, 0.3, 0.6, 0.9):
        expected = reuse + (1 - reuse) * even
        assert repeated(picks(reuse)) == pytest.approx(expected, abs=0.06)
    assert repeated(picks(1.0)) == 1


def busiest(found: np.ndarray) -> float:
    """Return the share of a layer's picks that its four busiest experts have."""
    counts = [sorted(Counter(found[:, layer].ravel().tolist()).values())[-4:] for layer in range(3)]
    return float(np.mean([sum(each) for each in counts])) / (STEPS * 4)


def test_zipf_makes_some_experts_busier_and_each_layer_has_its_own() -> None:
    shares = [busiest(picks(zipf=zipf)) for zipf in (0.0, 0.7, 1.4)]
    assert shares[0] < 0.2 < shares[1] < shares[2]
    found = picks(zipf=3.0)
    assert len({Counter(found[:, layer].ravel().tolist()).most_common(1)[0][0] for layer in range(3)}) > 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES["mixtral"], dtype=torch.float32).eval()


def picked_by(model: PreTrainedModel, tokens: int) -> list[torch.Tensor]:
    """Return what each experts module is called with, seen by hooks behind all others."""
    seen: list[torch.Tensor] = []
    modules = [module for module in model.modules() if routed_experts(module)]
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for module in modules]
    with torch.no_grad():
        model(torch.arange(5, 5 + tokens)[None])
    for handle in handles:
        handle.remove()
    return seen


def test_it_steers_single_tokens_alone_and_leaves_nothing(model: PreTrainedModel) -> None:
    plain = {tokens: picked_by(model, tokens) for tokens in (1, 6)}
    process = steered_picks(3, 12, 2, reuse=0.5, zipf=1.0, seed=9)
    with SteeredRouting(model, reuse=0.5, zipf=1.0, seed=9):
        steered = [picked_by(model, 1) for _ in range(3)]
        assert all(map(torch.equal, picked_by(model, 6), plain[6])), "several tokens go where the router sends them"
        steered.append(picked_by(model, 1))
    for step, layers in enumerate(steered, start=1):
        assert torch.equal(torch.cat(layers), torch.from_numpy(process[step]))
        assert layers[0].dtype == plain[1][0].dtype
    assert not all(map(torch.equal, steered[0], plain[1]))
    for tokens in (1, 6):
        assert all(map(torch.equal, picked_by(model, tokens), plain[tokens]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_is_undone_after_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="of the test"), SteeredRouting(model, reuse=0.5, zipf=1.0):
        raise RuntimeError("of the test")
    assert not any(module._forward_pre_hooks for module in model.modules())
