"""Checkpoints made at random: djinn gives what transformers does, bit for bit, or refuses; never anything else.

Each is loaded by transformers, and by djinn streamed, resident and packed. Where transformers cannot load it, or makes
up what the files lack, djinn has to refuse. ``DJINN_FAULTS_SCALE`` makes more of them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

import djinn
from djinn.errors import DjinnError
from djinn.weights.models import quiet

CASES = round(150 * float(os.environ.get("DJINN_FAULTS_SCALE", "1")))
WORK: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 4, "device": "cpu"}
PROMPT = torch.arange(5, 11)[None]

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
    "qwen2": Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    ),
}  # fmt: skip
EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "qwen2": "model.embed_tokens.weight",
}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "qwen2": "Qwen2ForCausalLM"}
HEAD = "lm_head.weight"
BUFFERS = {
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "gpt2": "transformer.h.0.attn.bias",
    "qwen2": "model.rotary_emb.inv_freq",
}
CONFIG_KEYS: list[dict[str, Any]] = [
    {"architectures": None}, {"architectures": ["NoSuchModel"]}, {"architectures": ["Trainer"]},
    {"architectures": ["pipeline"]}, {"architectures": 7}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": None},
    {"dtype": "nothing"}, {"vocab_size": 65}, {"vocab_size": "many"}, {"num_hidden_layers": 3}, {"n_layer": 1},
    {"hidden_size": -1}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"model_type": "ours"}, {"model_type": None},
    {"auto_map": {"AutoConfig": "a.B"}, "model_type": "ours"}, {"transformers_weights": "other.safetensors"},
    {"transformers_weights": "../other.safetensors"}, {"transformers_weights": 5}, {"hidden_act": "nothing"},
    {"rope_parameters": {"rope_type": "nothing"}}, {"unheard_of": [1, {"of": None}]}, {"vocab_size": 1e400},
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a checkpoint is made from."""

    kind: str
    seed: int
    config_ties: bool
    head: str
    """``absent``, ``equal`` to the embedding or ``different``, or the ``only`` one of the two that is stored."""
    dtypes: tuple[torch.dtype, ...]
    shards: int
    index: str
    """``whole``, ``none``, ``lacks a tensor``, ``names another shard`` or ``without metadata``."""
    prefix: bool
    """Whether names lack the base model's prefix."""
    lost: bool
    extra: tuple[str, ...]
    twice: str
    """``no``, ``in two shards``, the same or other bytes, or under ``two names``."""
    named: str
    """What ``transformers_weights`` names: ``nothing``, ``file``, ``index`` or ``nowhere``."""
    link: str
    """What the shards are: ``files``, ``hub`` links, links to ``elsewhere``, or one a ``fifo`` or a ``loop``."""
    keys: dict[str, Any]
    beside: str
    """Another file in the folder."""


def cases() -> st.SearchStrategy[Case]:
    """Mostly ordinary, each part of it strange now and then."""

    def rarely(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
        return st.sampled_from([usual] * 8 * len(others) + list(others))

    return st.builds(
        Case,
        kind=st.sampled_from(sorted(CONFIGS)),
        seed=st.integers(0, 2**16),
        config_ties=st.booleans(),
        head=st.sampled_from(["absent", "equal", "different", "different", "only"]),
        dtypes=rarely((torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16)),
        shards=st.integers(1, 3),
        index=rarely("whole", "none", "lacks a tensor", "names another shard", "without metadata"),
        prefix=rarely(False, True),
        lost=rarely(False, False, True),
        extra=rarely((), ("buffer",), ("stray",), ("buffer", "stray")),
        twice=rarely("no", "in two shards", "in two shards, equal", "two names"),
        named=rarely("nothing", "file", "index", "nowhere"),
        link=rarely("files", "hub", "elsewhere", "fifo", "loop"),
        keys=rarely({}, *CONFIG_KEYS),
        beside=rarely("nothing", "adapter", "model.safetensors", "rank", "pytorch_model.bin"),
    )


def write(case: Case, parent: Path) -> Path:
    """Write the checkpoint of ``case`` into a folder in ``parent``."""
    folder = parent / "model" / "snapshots" / "checkpoint"
    folder.mkdir(parents=True)
    tensors = tensors_of(case)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(case.shards)]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[number % case.shards][name] = tensor
    name = sorted(shards[0])[0]
    weight_map = {name: shard_name(number) for number, shard in enumerate(shards) for name in shard}
    if case.twice.startswith("in two shards"):
        shards[-1][name] = shards[0][name].clone() if case.twice.endswith("equal") else shards[0][name] + 1
    files = {shard_name(number): shard for number, shard in enumerate(shards)}
    if case.index == "none" or case.named == "file":
        files = {"model.safetensors": {key: value for shard in shards for key, value in shard.items()}}
    if case.named == "file":
        files = {"named.safetensors": next(iter(files.values()))}
    for file, content in files.items():
        save_file({key: value.contiguous() for key, value in content.items()}, folder / file, metadata={"format": "pt"})
    if case.index != "none":
        write_index(case, folder, weight_map)
    document = json.loads(config_of(case))
    (folder / "config.json").write_text(json.dumps(document | case.keys))
    put_beside(case, folder)
    replace_by_link(case, folder)
    return folder


def shard_name(number: int) -> str:
    return f"part-{number}.safetensors"


def config_of(case: Case) -> str:
    config = type(CONFIGS[case.kind]).from_dict(CONFIGS[case.kind].to_dict())
    config.tie_word_embeddings = case.config_ties
    config.architectures = [CLASSES[case.kind]]
    config.dtype = case.dtypes[0]
    document = config.to_dict()
    names = {
        "nothing": None,
        "file": "named.safetensors",
        "index": "named.safetensors.index.json",
        "nowhere": "no.safetensors",
    }
    if names[case.named] is not None:
        document["transformers_weights"] = names[case.named]
    return json.dumps(document)


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(case.seed)
    config = type(CONFIGS[case.kind]).from_dict(CONFIGS[case.kind].to_dict())
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    embedding = EMBEDDING[case.kind]
    found = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        found[name] = torch.randn(value.shape).mul(0.3).to(case.dtypes[number % len(case.dtypes)])
    if case.head == "absent":
        del found[HEAD]
    elif case.head == "equal":
        found[HEAD] = found[embedding].clone()
    elif case.head == "only":
        del found[embedding]
    if case.lost:
        del found[sorted(found)[case.seed % len(found)]]
    if "buffer" in case.extra:
        found[BUFFERS[case.kind]] = torch.ones(4)
    if "stray" in case.extra:
        found["stray.weight"] = torch.ones(3)
    prefix = embedding.partition(".")[0] + "."
    if case.twice == "two names":
        name = next(name for name in sorted(found) if name.startswith(prefix))
        found[name.removeprefix(prefix)] = found[name] + 1
    if case.prefix:
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def write_index(case: Case, folder: Path, weight_map: dict[str, str]) -> None:
    name = sorted(weight_map)[0]
    if case.index == "lacks a tensor":
        del weight_map[name]
    elif case.index == "names another shard":
        weight_map[name] = shard_name(case.shards - 1)
    document: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    if case.index == "without metadata":
        del document["metadata"]
    stem = "named" if case.named == "index" else "model"
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document))


def put_beside(case: Case, folder: Path) -> None:
    if case.beside == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    elif case.beside == "rank":
        save_file({"stray": torch.ones(1)}, folder / "shard-00000-model-00001-of-00002.safetensors")
    elif case.beside == "model.safetensors" and not (folder / case.beside).exists():
        save_file(
            {name: value.contiguous() for name, value in tensors_of(case).items()},
            folder / case.beside,
            metadata={"format": "pt"},
        )
    elif case.beside == "pytorch_model.bin":
        (folder / case.beside).write_bytes(b"not opened")


def replace_by_link(case: Case, folder: Path) -> None:
    blobs = folder.parent.parent / "blobs" if case.link == "hub" else folder.parent / "elsewhere"
    shard = sorted(folder.glob("*.safetensors"))[0]
    if case.link in ("hub", "elsewhere"):
        blobs.mkdir()
        for path in sorted(folder.iterdir()) if case.link == "hub" else [shard]:
            path.rename(blobs / path.name)
            path.symlink_to(blobs / path.name)
    elif case.link != "files":
        shard.unlink()
        if case.link == "fifo":
            os.mkfifo(shard)
        else:
            shard.symlink_to(shard)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


def wanted(folder: Path) -> torch.Tensor | None:
    """Return what transformers gives; None where it fails, or makes up weights that the files lack."""
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, trust_remote_code=False, local_files_only=True
            )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        return logits(model.eval())
    except KeyboardInterrupt:
        raise
    except BaseException:  # torch.distributed's are no Exceptions
        return None


def streamed(folder: Path) -> torch.Tensor:
    whole = djinn.plan(folder, budget="2 GB", **WORK)
    images = [unit.image_bytes for unit in whole.units]
    budget = whole.workspace_bytes + max(sum(images) // 2, 3 * max(images))
    model = djinn.load(folder, budget=budget, host_memory="1 MB", chunk="32 KiB", **WORK)
    return logits(model)


def resident(folder: Path) -> torch.Tensor:
    return logits(djinn.load(folder, budget="2 GB", **WORK))


def packed(folder: Path) -> torch.Tensor:
    return resident(djinn.pack(folder, folder.parent.parent / "packed", device="cpu"))


WAYS: dict[str, Callable[[Path], torch.Tensor]] = {"streamed": streamed, "resident": resident, "packed": packed}
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    """Say at the end how many were right and how many refused."""
    SEEN.clear()
    yield
    print(f"\ncheckpoints at random: {dict(SEEN)}")
    assert SEEN["right"] > SEEN["tried"] // 4, "too few of them can be loaded for this to say anything"


@pytest.mark.slow
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck), print_blob=True)
@given(cases())
def test_it_is_what_transformers_gives_or_refused(case: Case) -> None:
    parent = Path(tempfile.mkdtemp(prefix="djinn-faults-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(write(case, parent))
    finally:
        shutil.rmtree(parent)


def compare(folder: Path) -> None:
    SEEN["tried"] += 1
    fifo = any(path.is_fifo() for path in folder.iterdir())
    expected = None if fifo else wanted(folder)  # transformers would wait for it
    refused = []
    for way, load in WAYS.items():
        try:
            found = load(folder)
        except DjinnError:
            refused.append(way)
            continue
        assert expected is not None, f"{way}: transformers refuses it"
        assert torch.equal(found, expected), f"{way}: other logits"
    SEEN["refused" if refused else "right"] += 1
    SEEN["refused, though transformers loads it"] += bool(refused) and expected is not None
