"""A model split over processes: each streams its own shards, and all give what the model resident on them gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from launched import Ended, launch
from packaging.version import Version
from tiny_models import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

import djinn
from djinn.engine.rank_packing import pack
from djinn.engine.sharding import LEAST
from djinn.errors import ConfigError
from djinn.weights.synthetic_checkpoint import synthesise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Version(transformers.__version__) < LEAST, reason=f"ranks need transformers {LEAST}"),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="ranks take a GPU each, or none, and there is one here"),
]

RANKS = 2
SMALL = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": TINY["llama"],
    "qwen2": TINY["qwen2"],  # biases beside a tied embedding
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "qwen3 tied": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "phi3": Phi3Config(**SMALL, pad_token_id=0),  # queries, keys and values in one, gate and up in one
    "mixtral": TINY["mixtral"],
    "mixtral by expert": TINY["mixtral"],
}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "one head of keys": (LlamaConfig(**SMALL | {"num_key_value_heads": 1}), "num_key_value_heads 1 .* by 2 ranks"),
    "no plan": (TINY["gpt2"], "`GPT2LMHeadModel` has no `tp_plan`"),
}
WAYS = (
    "greedy", "sampled", "beams", "static cache", "prompt lookup", "padded", "several sequences", "with gradients",
    "read while away", "synthetic", "made where it stays", "while an error is handled", "cache", "host memory",
    "room for sums",
)  # fmt: skip
STORED = (
    "offloaded", "a plan of its own on each rank", "coded", "packed", "packed, decoded", "converted", "cut",
    "cut, on disk", "cut qwen2", "cut mixtral",
)  # fmt: skip


def save(config: PretrainedConfig, name: str, folder: Path, shard: str = "200KB") -> Path:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    return save_model(model, name, folder, shard=shard)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in FAMILIES.items():
        save(config, name, folder / "families" / name)
    for name, (config, _) in REFUSED.items():
        save(config, name, folder / "refused" / name)
    # Shards of a MiB and more, which are worth coding.
    wide = LlamaConfig(**SMALL | {"hidden_size": 512, "intermediate_size": 2816, "num_hidden_layers": 2})
    save(wide, "wide", folder / "wide", "4MB")
    pack(folder / "wide", folder / "packed")
    pack(folder / "wide", folder / "cut", ranks=RANKS)
    for name in ("qwen2", "mixtral"):
        pack(folder / "families" / name, folder / f"cut {name}", ranks=RANKS)
    synthesise("llama-tiny", folder / "synthetic", progress=False)
    return folder


@pytest.fixture(scope="module")
def said(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One launch for all cases: most of what a case takes is imports."""
    ended = launch(
        Path(__file__).parents[1] / "rank_cases.py", RANKS, tmp_path_factory.mktemp("said"), str(checkpoints)
    )
    assert ended.status == 0, ended.printed
    assert ended.said.keys() == set(range(RANKS))
    return ended


@pytest.mark.parametrize("case", [*FAMILIES, *STORED])
def test_ranks_give_what_the_model_resident_on_them_gives(said: Ended, case: str) -> None:
    """Logits and greedy tokens; each rank's plan has its own shards and no more."""
    for words in said.said.values():
        assert words[case]
        assert words[f"{case}: its shards alone"]


@pytest.mark.parametrize("case", [*WAYS, *(f"{name}: detached" for name in (*FAMILIES, "offloaded"))])
def test_every_way_of_generating_gives_the_same(said: Ended, case: str) -> None:
    assert all(words[case] for words in said.said.values())
    assert not any(words["control"] for words in said.said.values())


def test_columns_of_what_was_cut_for_ranks_may_stay_on_disk(said: Ended) -> None:
    assert all(words["columns are on disk"] for words in said.said.values())


def test_ranks_may_follow_plans_of_their_own(said: Ended) -> None:
    assert said.said[0]["streams"] > said.said[1]["streams"] > 0


def test_shards_are_coded_where_they_were_asked_to_be(said: Ended) -> None:
    found = [
        {case: words[f"{case}: is coded"] for case in ("coded", "packed", "packed, decoded")}
        for words in said.said.values()
    ]
    assert found == [{"coded": True, "packed": True, "packed, decoded": False}] * RANKS


@pytest.mark.parametrize(
    ("case", "words"),
    [
        *((name, words) for name, (_, words) in REFUSED.items()),
        ("bare", r"this is one of 2 processes .* distributed_config=DistributedConfig\(tp_plan=\"auto\"\)"),
        ("pipeline", "pp_size=2 is pipeline parallelism"),
        ("not split", "tp_size=1, and there are 2 ranks"),
        ("budget", "^PlanError: (rank 0: )?budget: 10 KB is too small"),
        ("missing", "^CheckpointError: (rank 1: )?no folder"),
        ("other tokens", "the inputs of rank 1 are not those of rank 0"),
        ("other seeds", "the inputs of rank 1 are not those of rank 0"),
        ("state dict", "is split over ranks and streams"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(said: Ended, case: str, words: str) -> None:
    import re

    for rank in range(RANKS):
        assert re.search(words, said.said[rank][case])


def test_passes_go_on_after_they_were_refused(said: Ended) -> None:
    assert said.said[0]["and then the same"] == said.said[1]["and then the same"]


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_all_ranks_end_when_the_pass_of_one_fails(checkpoints: Path, tmp_path: Path, how: str) -> None:
    """Within seconds, after it has said why: also where a rank's caller would catch the error and go on."""
    script = Path(__file__).parents[1] / "rank_failure.py"
    ended = launch(script, RANKS, tmp_path, str(checkpoints / "families" / "llama"), how)
    took = time.time() - max(words["began"] for words in ended.said.values())
    assert ended.status != 0
    assert not any("caught" in words for words in ended.said.values())
    assert took < 60
    if how == "raise":
        assert "the third layer of rank 1 is unwell" in ended.printed
        assert "rank 1: its pass failed, for which the other ranks wait" in ended.printed


def test_a_configuration_needs_several_processes(tiny_checkpoint: Callable[[str], Path]) -> None:
    from transformers.distributed import DistributedConfig

    with pytest.raises(ConfigError, match="this process was started alone; torchrun --nproc-per-node"):
        djinn.load(tiny_checkpoint("llama"), budget="1 GB", distributed_config=DistributedConfig(tp_plan="auto"))
