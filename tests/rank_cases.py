"""What each rank of a launch does: a streamed model beside the one that is resident on the same ranks.

Called with a folder for its words, and the folder of checkpoints; see tests/engine/test_ranks.py.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launched import say
from pairs import equal
from pairs import prompt as prompt_on_host
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import djinn
from djinn.bench.systems.common import synthetic_weight
from djinn.engine.load import placement
from djinn.engine.sharding import filled
from djinn.errors import DjinnError
from djinn.planning.placement import Tier
from djinn.planning.workspace import (
    COLLECTIVES_BYTES,
    CUDA_CONTEXT_BYTES,
    CUDA_OVERHEAD_BYTES,
    Workload,
    kv_cache_bytes,
)
from djinn.weights.models import empty_model

WORDS, CHECKPOINTS = (Path(argument) for argument in sys.argv[1:3])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORK: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 16, "batch": 4, "device": DEVICE, "chunk": "32 KiB"}
ROOM = "10 GB"
"""A budget that holds any of these models."""
EXPERTS = {"mixtral by expert": {"ep_size": 2}}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 30},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return prompt_on_host(length, batch).to(DEVICE)


def split(case: str = "") -> DistributedConfig:
    return DistributedConfig(**{"tp_size": int(os.environ["WORLD_SIZE"]), "tp_plan": "auto"} | EXPERTS.get(case, {}))


def streamed(folder: Path | str, case: str = "", **options: Any) -> PreTrainedModel:
    """Return the model with about half of each rank's shards streamed."""
    asked = WORK | {"distributed_config": split(case)} | options
    if "budget" not in asked:
        # What a plan that has room for everything says, but for half of the weights.
        whole = djinn.load(folder, budget=ROOM, **asked)
        plan = placement(whole)
        asked["budget"] = plan.workspace_bytes + plan.model_bytes // 2
        if DEVICE == "cuda":
            asked.setdefault("ring", plan.model_bytes // 4)  # its default is for budgets of gigabytes
    model = djinn.load(folder, **asked)
    assert placement(model).away, "nothing streams"
    return model


def resident(folder: Path, case: str = "", **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=split(case), **{"dtype": "auto"} | options)


def logits(model: PreTrainedModel, batch: int = 1) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(prompt(7, batch)).logits
    return found


def generated(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    found: torch.Tensor = model.generate(**{"input_ids": prompt(7), "max_new_tokens": 8} | options)
    return found


def padded() -> dict[str, torch.Tensor]:
    ids, mask = prompt(7, 3), torch.ones(3, 7, dtype=torch.long)
    for row, padding in enumerate((0, 2, 4)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask.to(DEVICE)}


def local_bytes(parameter: torch.Tensor) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes


def compare(case: str, found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    """Say whether logits and greedy tokens are equal, and that the link carried this rank's shards alone."""
    same = equal(logits(found), logits(wanted)) and equal(generated(found), generated(wanted))
    stats, plan = djinn.stats(found), placement(found)
    say(WORDS, case, same and (stats.skips, stats.reloads) == (0, 0) and stats.link_bytes > 0)
    held = sum(local_bytes(parameter) for parameter in wanted.parameters())
    say(WORDS, f"{case}: its shards alone", sum(unit.raw_bytes for unit in plan.units) == held)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except DjinnError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def each_family() -> None:
    for folder in sorted((CHECKPOINTS / "families").iterdir()):
        model, whole = streamed(folder, folder.name), resident(folder, folder.name)
        compare(folder.name, model, whole)
        djinn.detach(model)
        say(WORDS, f"{folder.name}: detached", equal(logits(model), logits(whole)))


def each_way(folder: Path) -> None:
    """All that one model does, and all that its weights may come from."""
    model, whole = streamed(folder), resident(folder)
    for mode, options in MODES.items():
        say(WORDS, mode, equal(generated(model, **options), generated(whole, **options)))
    say(WORDS, "padded", equal(*(generated(each, **padded()) for each in (model, whole))))
    say(WORDS, "several sequences", equal(logits(model, 3), logits(whole, 3)))
    say(WORDS, "control", equal(logits(model), logits(whole) + 1))
    say(WORDS, "with gradients", equal(model(prompt(7)).logits, whole(prompt(7)).logits))
    read = {name: parameter.full_tensor() for name, parameter in model.named_parameters() if "q_proj" in name}
    truth = dict(whole.named_parameters())
    say(WORDS, "read while away", all(equal(found, truth[name].full_tensor()) for name, found in read.items()))
    say(WORDS, "state dict", refusal(model.state_dict))
    try:
        raise ValueError("what the caller is handling is no error of a pass")
    except ValueError:
        say(WORDS, "while an error is handled", equal(logits(model), logits(whole)))
    rank = int(os.environ["RANK"])
    plan = placement(model)
    ranks = int(os.environ["WORLD_SIZE"])
    cache = model(prompt(7), use_cache=True).past_key_values
    held = 2 * sum(layer.keys.nbytes for layer in cache.layers)
    work = Workload(prompt_tokens=7, new_tokens=0, batch=1)
    say(WORDS, "cache", held == kv_cache_bytes(model.config, torch.bfloat16, work, ranks))
    uneven = streamed(folder, budget=plan.budget + rank * plan.model_bytes // 4, ring=plan.ring_bytes)
    say(WORDS, "streams", len(placement(uneven).away))
    compare("a plan of its own on each rank", uneven, whole)
    big = resident(CHECKPOINTS / "wide")
    for name, model in (
        ("coded", streamed(CHECKPOINTS / "wide", coding="lossless")),
        ("packed", streamed(CHECKPOINTS / "packed")),
        ("packed, decoded", streamed(CHECKPOINTS / "packed", coding="none")),
    ):
        compare(name, model, big)
        say(WORDS, f"{name}: is coded", any(unit.coded for unit in placement(model).away))
    each_cut(big)
    wide = resident(folder, dtype=torch.float32)
    compare("converted", streamed(folder, dtype=torch.float32), wide)
    whole = resident(CHECKPOINTS / "synthetic")
    say(WORDS, "synthetic", equal(generated(streamed("synthetic:llama-tiny")), generated(whole)))
    empty = empty_model(whole.config, torch.bfloat16)
    made = filled(empty, split(), whole.device, lambda name, each: synthetic_weight(name, each.shape, each.dtype, 0))
    say(WORDS, "made where it stays", equal(logits(made.eval()), logits(whole)))
    say(WORDS, "room for sums", DEVICE == "cpu" or leaves_room_for_sums(folder, plan.budget, plan.ring_bytes))


def leaves_room_for_sums(folder: Path, budget: int, ring: int) -> bool:
    """Return whether torch's allocator takes no more for a model than what is neither CUDA's nor NCCL's of its plan."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = streamed(folder, budget=budget, ring=ring)
    taken = torch.cuda.memory_reserved() - before
    return taken <= placement(model).device_bytes - CUDA_CONTEXT_BYTES - COLLECTIVES_BYTES


def offloaded(folder: Path) -> None:
    """A module that transformers has split and loaded; its own parts then stream, and are given back."""
    whole = resident(folder)
    before = {name: parameter.to_local().clone() for name, parameter in split_parameters(whole)}
    wanted, tokens = logits(whole), generated(whole)
    held = sum(local_bytes(parameter) for parameter in whole.parameters())
    budget = held // 2 + (CUDA_OVERHEAD_BYTES if DEVICE == "cuda" else 0)
    example, room = {"input_ids": prompt(7)}, 2 * held
    djinn.offload(whole, budget=budget, example=example, workspace=held // 8, host_memory=room, device=DEVICE)
    assert placement(whole).away
    say(WORDS, "host memory", placement(whole).pinned_bytes <= room // int(os.environ["WORLD_SIZE"]))
    say(WORDS, "offloaded", equal(logits(whole), wanted) and equal(generated(whole), tokens))
    say(WORDS, "offloaded: its shards alone", placement(whole).model_bytes == held)
    djinn.detach(whole)
    after = {name: parameter.to_local() for name, parameter in split_parameters(whole)}
    say(WORDS, "offloaded: detached", equal(after, before) and equal(logits(whole), wanted))


def split_parameters(model: PreTrainedModel) -> list[tuple[str, DTensor]]:
    return [(name, each) for name, each in model.named_parameters() if isinstance(each, DTensor)]


def each_cut(big: PreTrainedModel) -> None:
    """Checkpoints of which each rank has a file of its own."""
    on_disk = streamed(CHECKPOINTS / "cut", host_memory="64 KB")
    compare("cut", streamed(CHECKPOINTS / "cut"), big)
    compare("cut, on disk", on_disk, big)
    columns = [unit for unit in placement(on_disk).at(Tier.DISK) if unit.name.endswith(("o_proj", "down_proj"))]
    say(WORDS, "columns are on disk", bool(columns))
    for name in ("qwen2", "mixtral"):
        compare(f"cut {name}", streamed(CHECKPOINTS / f"cut {name}"), resident(CHECKPOINTS / "families" / name))


def each_refusal(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for refused in sorted((CHECKPOINTS / "refused").iterdir()):
        say(WORDS, refused.name, refusal(lambda refused=refused: streamed(refused, budget=ROOM)))  # type: ignore[misc]
    say(WORDS, "bare", refusal(lambda: djinn.load(folder, budget=ROOM, **WORK)))
    whole = DistributedConfig(tp_size=1)
    say(WORDS, "not split", refusal(lambda: djinn.load(folder, budget=ROOM, distributed_config=whole, **WORK)))
    pipeline = DistributedConfig(pp_size=2)
    say(WORDS, "pipeline", refusal(lambda: djinn.load(folder, budget=ROOM, distributed_config=pipeline, **WORK)))
    say(WORDS, "budget", refusal(lambda: streamed(folder, budget=ROOM if rank else "10 KB")))
    missing = CHECKPOINTS / "missing" if rank else folder
    say(WORDS, "missing", refusal(lambda: streamed(missing, budget=ROOM)))
    model = streamed(folder)
    ids = prompt(7) + rank
    say(WORDS, "other tokens", refusal(lambda: model(ids)))
    say(WORDS, "and then the same", generated(model).tolist())
    torch.manual_seed(rank)
    say(WORDS, "other seeds", refusal(lambda: model.generate(prompt(7), do_sample=True, max_new_tokens=30)))


def main() -> None:
    torch.set_num_threads(1)
    each_family()
    each_way(CHECKPOINTS / "families" / "llama")
    offloaded(CHECKPOINTS / "families" / "llama")
    each_refusal(CHECKPOINTS / "families" / "llama")


if __name__ == "__main__":
    main()
