"""Every architecture streamed against resident, bit for bit; ``docs/compatibility.md`` is what was seen here.

DJINN_WRITE_DOCS=1 python -m pytest tests/engine/test_compatibility.py        writes the page anew
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, Inputs, Pair
from packaging.version import Version
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import djinn
from djinn.planning.placement import Plan
from djinn.transport.stats import Stats
from djinn.weights.experts import PICKED_NAMES
from djinn.weights.index import checkpoint_index
from djinn.weights.tensors import FileSpan
from djinn.weights.tracing import traced_readers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
WRITE = "DJINN_WRITE_DOCS"
VERSIONS = f"torch {Version(torch.__version__).base_version}, transformers {transformers.__version__}"
INTRODUCTION = f"""# Compatibility

Tiny random checkpoints of each architecture, saved by transformers in several shards, run streamed from disk on a CPU
and wholly in memory. Written by the test suite with {VERSIONS}, never by hand:

```bash
{WRITE}=1 python -m pytest tests/engine/test_compatibility.py
```

- **streamed**: the share of the weights that are not resident: they cross to the device in every pass, routed experts
  as routers pick them.
- **equal**: what was compared with the resident model, bit for bit.
- **experts routed**: of a mixture of experts, whether a pass fetches those that its routers pick (yes) or whole layers
  (no). Empty for models without experts.
- **order**: whether the order of reads was traced beforehand or taken from the model's blocks.
- **first**, **decode**: how a generation of {{passes}} tokens, after an earlier one, left the order that was expected:
  in the first pass (an encoder's included) and in all others together; for models that do not generate, a second
  pass. Units that were prefetched and not read are skips; reloads are times that the pipeline started anew.

| architecture | class | streamed | equal | experts routed | order | first | decode | notes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
NEW_TOKENS = 8
CASES: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "padded batch": {},
}
"""The cases of transformers' own generation tests that ask something of the weights, as arguments of ``generate``."""
ALL_CASES = ("llama", "gemma2", "mixtral", "t5")
"""Those that run them all; other models generate greedily."""


@dataclass(frozen=True)
class Strays:
    """How often passes left the expected order."""

    skips: int
    reloads: int

    def __str__(self) -> str:
        words = [f"{count} {name}" for count, name in ((self.skips, "skips"), (self.reloads, "reloads")) if count]
        return ", ".join(words).replace("1 skips", "1 skip").replace("1 reloads", "1 reload") or "in order"


@dataclass(frozen=True)
class Seen:
    """What a comparison has shown."""

    plan: Plan
    equal: dict[str, bool]
    counted: bool
    """Whether the statistics say that a pass moved all the streamed weights, and of experts those that were picked."""
    traced: bool
    first: Strays
    """Of the first pass of a generation, or of the second pass of a model that does not generate."""
    decode: Strays | None
    """Of its other passes."""
    converted: int
    """Tensors that transformers made out of others."""

    @property
    def read_twice(self) -> bool:
        """Whether a tied weight is streamed, so that passes visit it out of any order."""
        return any(len(unit.readers) > 1 for unit in self.plan.streamed)

    @property
    def share(self) -> float:
        """Of the weights, that are not resident."""
        return sum(unit.weight_bytes for unit in self.plan.away) / self.plan.model_bytes


def tensors(outputs: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(dict(outputs)) if isinstance(leaf, torch.Tensor)]  # type: ignore[call-overload]


def padded(inputs: Inputs) -> Inputs:
    """Return a batch of two: the prompt, and its end behind padding."""
    ids = inputs["input_ids"]
    cut = ids.shape[1] // 2
    shorter = torch.cat([torch.zeros_like(ids[:, :cut]), ids[:, cut:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :cut] = 0
    return {"input_ids": torch.cat([ids, shorter]), "attention_mask": torch.cat([torch.ones_like(ids), mask])}


def generated(model: PreTrainedModel, architecture: Architecture, case: str) -> torch.Tensor:
    inputs = architecture.inputs()
    if case == "padded batch":
        inputs = padded(inputs)
    torch.manual_seed(5)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | CASES[case]
    tokens: torch.Tensor = model.generate(**inputs, **options)
    return tokens


def strays(model: PreTrainedModel, architecture: Architecture) -> tuple[Strays, Strays]:
    """Return how the first pass, and all others, of a second generation left the expected order."""
    stats = djinn.stats(model)
    generated(model, architecture, "greedy")
    counts = [(stats.skips, stats.reloads)]
    handle = model.register_forward_hook(lambda *_: counts.append((stats.skips, stats.reloads)))
    generated(model, architecture, "greedy")
    handle.remove()
    assert len(counts) == 1 + NEW_TOKENS
    (skips, reloads), (first_skips, first_reloads), (all_skips, all_reloads) = counts[0], counts[1], counts[-1]
    return (
        Strays(first_skips - skips, first_reloads - reloads),
        Strays(all_skips - first_skips, all_reloads - first_reloads),
    )


def picked_bytes(plan: Plan, stats: Stats) -> int:
    """Return what a first pass fetches of experts at the least: of each layer as many as one token goes to."""
    assert stats.routed_layers + stats.whole_layers == len(plan.routed)
    expert_bytes = min((expert.weight_bytes for unit in plan.routed for expert in unit.experts), default=0)
    return len(plan.routed) * plan.pool.picked * expert_bytes


def compare(name: str, folder: Path, spill: Path) -> Seen:
    architecture, pair = ARCHITECTURES[name], Pair(name, folder)
    streamed, resident, planned = pair.streamed, pair.resident, pair.plan
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert isinstance(streamed, architecture.cls)
    stats = djinn.stats(streamed)

    inputs = architecture.inputs() | architecture.decoder
    with torch.no_grad():
        outputs = [tensors(model(**inputs, output_hidden_states=True)) for model in (streamed, resident)]
        counted = stats.link_bytes >= sum(unit.weight_bytes for unit in planned.streamed) + picked_bytes(planned, stats)
        before = stats.skips, stats.reloads
        streamed(**inputs)
    assert outputs[0]
    equal = {"outputs": len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))}
    first, decode = Strays(stats.skips - before[0], stats.reloads - before[1]), None
    if architecture.generates:
        for case in CASES if name in ALL_CASES else ("greedy",):
            equal[case] = torch.equal(*(generated(model, architecture, case) for model in (streamed, resident)))
        first, decode = strays(streamed, architecture)

    index = checkpoint_index(folder, spill)
    return Seen(
        plan=planned,
        equal=equal,
        counted=counted,
        traced=traced_readers(index.model).keys() == index.tensors.keys(),
        first=first,
        decode=decode,
        converted=sum(
            isinstance(entry.source, FileSpan) and entry.source.path.is_relative_to(spill)
            for entry in index.tensors.values()
        ),
    )


def is_mixture(name: str) -> bool:
    text = ARCHITECTURES[name].config.get_text_config()
    return any(getattr(text, key, None) for key in PICKED_NAMES)


MIXTURES = [name for name in ARCHITECTURES if is_mixture(name)]


def experts_routed(name: str, plan: Plan) -> str:
    """Return the cell of a row: whether passes fetch experts as routers pick them; nothing where there are none."""
    if name not in MIXTURES:
        assert not plan.routed
        return ""
    return "yes" if plan.routed else "no"


@pytest.fixture(scope="module")
def seen(
    architecture_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Seen]:
    """The comparison of an architecture, made once."""
    return cache(lambda name: compare(name, architecture_checkpoint(name), tmp_path_factory.mktemp("spill")))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_output_is_the_residents_bit_for_bit(seen: Callable[[str], Seen], name: str) -> None:
    found = seen(name)
    assert found.equal == dict.fromkeys(found.equal, True)
    assert found.share > 0.5
    assert found.counted
    assert found.read_twice or found.decode in (None, Strays(0, 0))


WHOLE = ("llama4", "jetmoe")
"""Mixtures whose experts transformers does not mark, so that whole layers stream."""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_routed_where_transformers_marks_them(seen: Callable[[str], Seen], name: str) -> None:
    assert experts_routed(name, seen(name).plan) == ("no" if name in WHOLE else "yes")


def row(name: str, found: Seen) -> str:
    architecture = ARCHITECTURES[name]
    order = "traced" if found.traced else "by blocks"
    held = sum(unit.weight_bytes for unit in found.plan.units if unit.held) / found.plan.model_bytes
    notes = [
        *(["tied weights"] if any(len(unit.readers) > 1 for unit in found.plan.units) else []),
        *(["streamed twice in a pass"] if found.read_twice else []),
        *([f"transformers makes {found.converted} tensors out of others"] if found.converted else []),
        *([f"{held:.1%} read by modules around their children: resident"] if held > 0.001 else []),
    ]
    equal = ", ".join(case for case, same in found.equal.items() if same)
    cells = [
        *(name, architecture.model_class, f"{found.share:.0%}", equal, experts_routed(name, found.plan), order),
        *(str(found.first), "" if found.decode is None else str(found.decode)),
        "; ".join(notes),
    ]
    return f"| {' | '.join(cells)} |\n"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_page_is_what_the_tests_saw(seen: Callable[[str], Seen]) -> None:
    rows = [row(name, seen(name)) for name in ARCHITECTURES]
    page = INTRODUCTION.format(passes=NEW_TOKENS) + "".join(rows)
    if os.environ.get(WRITE):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page)
    written = PAGE.read_text()
    if VERSIONS not in written:
        pytest.skip(f"the page was written with other versions than {VERSIONS}; to compare, write it anew: see above")
    assert written == page, f"write it anew: {WRITE}=1 python -m pytest {Path(__file__).name}"
