"""What users do with a model that streams, at random: the resident model's output, or an error that says why not.

Each case is a model, a budget and some acts, seeded by its number. ``DJINN_FAULTS_SCALE`` makes more of them.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, WORK
from pairs import equal
from torch import nn
from transformers import PreTrainedModel

import djinn
from djinn.engine.load import placement
from djinn.errors import DjinnError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CASES = round(100 * float(os.environ.get("DJINN_FAULTS_SCALE", "1")))
GROUPS = 10
"""Tests that share the cases."""
NAMES = ("llama", "gpt2", "opt", "phi3", "mixtral", "t5", "whisper", "bert", "albert", "vit", "clip", "llava")
ACTS_A_CASE = 4

Act = Callable[[random.Random, PreTrainedModel], Any]
"""Does something to a model, the same to any two models with two equal sources of random numbers; returns tensors."""


def outputs(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    architecture = ARCHITECTURES[name]
    with torch.no_grad():
        found = model(**architecture.inputs(), **architecture.decoder)
    return {key: found[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in found}


def leaf(chance: random.Random, model: nn.Module) -> tuple[str, nn.Module]:
    """Return a module that has a weight of its own and was the model's from the beginning."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return chance.choice([(name, module) for name, module in found if "lora_" not in name])


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest list whose output may stand for their input."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


def read(chance: random.Random, model: PreTrainedModel) -> Any:
    _, module = leaf(chance, model)
    way = chance.choice(("row", "norm", "whole", "product", "data", "transposed"))
    weight: Any = module.weight
    with torch.no_grad():
        return {
            "row": lambda: weight[-1],
            "norm": lambda: weight.float().norm(),
            "whole": lambda: weight + 0,
            "product": lambda: torch.ones(2, weight.shape[0], dtype=weight.dtype) @ weight,
            "data": lambda: weight.data[0].clone(),
            "transposed": lambda: weight.T.contiguous(),
        }[way]()


def call_by_forward(chance: random.Random, model: PreTrainedModel) -> None:
    """Make a module's calls go past its hooks, as in ``block.forward(...)``."""
    name, module = leaf(chance, model)
    parent, _, local = name.rpartition(".")

    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self)["within"] = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return vars(self)["within"].forward(*args, **kwargs)

        def __getattr__(self, key: str) -> Any:
            return getattr(vars(self)["within"], key)

    if not isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential) and local != "shared":
        model.get_submodule(parent)._modules[local] = Past()


def skip_block(chance: random.Random, model: PreTrainedModel) -> None:
    block = chance.choice(blocks(model))
    run = block.forward
    every = chance.choice((1, 2, 3))
    passes = Counter[str]()

    def forward(self: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passes["all"] += 1
        result = run(hidden, *args, **kwargs)
        if passes["all"] % every:
            return result
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    block.forward = MethodType(forward, block)  # type: ignore[method-assign]


def leave_out_block(chance: random.Random, model: PreTrainedModel) -> None:
    """Do not run what a block is made of."""
    block = chance.choice(blocks(model))
    run = block.forward
    passes = Counter[str]()

    def forward(self: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passes["all"] += 1
        if passes["all"] > 2 and not isinstance(passes["result"], int):
            return passes["result"]
        result = run(hidden, *args, **kwargs)
        passes["result"] = result
        return result

    block.forward = MethodType(forward, block)  # type: ignore[method-assign]


def run_twice(chance: random.Random, model: PreTrainedModel) -> None:
    _, module = leaf(chance, model)
    run = module.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run(*args, **kwargs)
        return run(*args, **kwargs)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def swap_blocks(chance: random.Random, model: PreTrainedModel) -> None:
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList) and len(parent) > 2 and len({type(each).__name__ for each in parent}) == 1:
            one, other = chance.sample(range(len(parent)), 2)
            parent[one], parent[other] = parent[other], parent[one]
            return


def raise_in_the_middle(chance: random.Random, model: PreTrainedModel, error: type[BaseException]) -> None:
    _, module = leaf(chance, model)

    def fail(*_: object) -> None:
        raise error("in the middle")

    before = chance.random() < 0.5
    handle = module.register_forward_pre_hook(fail) if before else module.register_forward_hook(fail)
    try:
        outputs(next(key for key, each in ARCHITECTURES.items() if isinstance(model, each.cls)), model)
    except error:
        pass
    finally:
        handle.remove()


def move_nowhere(chance: random.Random, model: PreTrainedModel) -> None:
    chance.choice((lambda: model.to("cpu"), lambda: model.cpu(), lambda: leaf(chance, model)[1].to("cpu")))()


def adapt(chance: random.Random, model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    name, _ = leaf(chance, model)
    torch.manual_seed(chance.randrange(100))
    config = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False, use_dora=chance.random() < 0.5)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def replace_weight(chance: random.Random, model: PreTrainedModel) -> None:
    _, module = leaf(chance, model)
    weight: Any = module.weight
    module.weight = nn.Parameter((weight.detach() * 0.5).clone(), requires_grad=False)


def write(chance: random.Random, model: PreTrainedModel) -> None:
    _, module = leaf(chance, model)
    row = chance.randrange(2)
    with torch.no_grad():
        module.weight.data[row].mul_(2)  # type: ignore[operator, union-attr]


def state(chance: random.Random, model: PreTrainedModel) -> Any:
    return {key: value.clone() for key, value in model.state_dict().items()}


ACTS: dict[str, Act] = {
    "read": read,
    "read again": read,
    "call by forward": call_by_forward,
    "skip block": skip_block,
    "leave out block": leave_out_block,
    "run twice": run_twice,
    "swap blocks": swap_blocks,
    "error": lambda chance, model: raise_in_the_middle(chance, model, RuntimeError),
    "interrupt": lambda chance, model: raise_in_the_middle(chance, model, KeyboardInterrupt),
    "move nowhere": move_nowhere,
    "adapt": adapt,
    "replace weight": replace_weight,
    "write": write,
    "state": state,
}


def run_case(number: int, name: str, folder: Path) -> Counter[str]:
    """Run one case and return how its acts ended; fail where one was neither right nor refused."""
    chance = random.Random(number)
    fits = whole_plan(folder)
    images = sum(unit.image_bytes for unit in fits.units)
    budget = fits.workspace_bytes + round(chance.uniform(0.15, 1.0) * images)
    host = chance.choice(("1 B", "100 KB", "1 GB"))
    try:
        model = djinn.load(folder, budget=budget, host_memory=host, chunk="32 KiB", **WORK)  # type: ignore[arg-type]
    except DjinnError:
        return Counter({"refused when it was loaded": 1})
    whole = copy.deepcopy(resident(name, folder))
    done = [f"{number}: {name}, {len(placement(model).streamed)} streamed, host memory {host}"]
    ends = Counter[str]()
    for _ in range(ACTS_A_CASE):
        act, seed = chance.choice(list(ACTS)), chance.randrange(10**9)
        done.append(act)
        found, wanted = attempt(act, seed, name, model), None
        if isinstance(found, DjinnError):  # then nothing has been changed
            ends[f"refused: {act}"] += 1
        else:
            wanted = attempt(act, seed, name, whole)
            if isinstance(wanted, Exception):
                assert isinstance(found, type(wanted)), done
                return ends + Counter(["an error of the resident model's, too"])
            assert equal(found, wanted), (done, found)
            ends["right"] += 1
        assert equal(outputs(name, model), outputs(name, whole)), done
    if chance.random() < 0.3:
        djinn.detach(model)
        assert equal(outputs(name, model), outputs(name, whole)), [*done, "detach"]
    return ends


def attempt(act: str, seed: int, name: str, model: PreTrainedModel) -> Any:
    """Return what an act gives and what the model gives after it, or the error that either ends in."""
    try:
        return ACTS[act](random.Random(seed), model), outputs(name, model)
    except Exception as error:
        return error


@cache
def resident(name: str, folder: Path) -> PreTrainedModel:
    whole: PreTrainedModel = ARCHITECTURES[name].cls.from_pretrained(folder, dtype="auto")
    return whole.eval()


@cache
def whole_plan(folder: Path) -> Any:
    return djinn.plan(folder, budget="1 GB", **WORK)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", range(GROUPS))
def test_what_users_do_is_right_or_refused(architecture_checkpoint: Callable[[str], Path], group: int) -> None:
    ends = Counter[str]()
    for number in range(group, CASES, GROUPS):
        name = NAMES[number % len(NAMES)]
        ends += run_case(number, name, architecture_checkpoint(name))
    print(dict(ends))
    assert ends["right"] > sum(ends.values()) / 2
