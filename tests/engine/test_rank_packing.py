"""Checkpoints that are cut for ranks: all parts together are the checkpoint, and only as many ranks may have it.

That what ranks load is what they hold of the whole checkpoint, tests/engine/test_ranks.py says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_config
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from typer.testing import CliRunner

import djinn
from djinn.cli import main
from djinn.engine import rank_packing
from djinn.engine.sharding import pretended, sharded
from djinn.errors import CheckpointError, ConfigError
from djinn.weights.opening import index_of
from djinn.weights.packed_shard import original_bytes, read_tensor
from djinn.weights.rank_files import file_name, rank_tensors, ranks_of
from djinn.weights.shards import read_checkpoint, read_shard

CPU = torch.device("cpu")
WIDE = LlamaConfig(
    hidden_size=512, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256,
)  # fmt: skip
"""Of which a shard of an MLP has a MiB and more, and is worth coding."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(WIDE, "wide", tmp_path_factory.mktemp("source") / "wide", shard="4MB")


@pytest.fixture(scope="module")
def cut(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return djinn.pack(source, tmp_path_factory.mktemp("cut") / "cut", ranks=2, device="cpu")


def parts(folder: Path, rank: int, ranks: int = 2) -> dict[str, torch.Tensor]:
    held = read_shard(folder / file_name(rank, ranks))
    return {name: original_bytes(name, entry, CPU).view(entry.dtype).view(entry.shape) for name, entry in held.items()}


def test_all_parts_together_are_the_checkpoint(source: Path, cut: Path) -> None:
    first, second = parts(cut, 0), parts(cut, 1)
    whole = read_checkpoint(source)
    assert first.keys() == second.keys() == whole.keys()
    for name, entry in whole.items():
        wanted = read_tensor(entry).view(entry.dtype).view(entry.shape)
        if first[name].shape == wanted.shape:
            assert torch.equal(first[name], wanted)
            assert torch.equal(second[name], wanted)
            continue
        (dim,) = [dim for dim in (0, 1) if first[name].shape[dim] != wanted.shape[dim]]
        assert torch.equal(torch.cat([first[name], second[name]], dim), wanted), name
        assert (dim == 1) == name.endswith(("o_proj.weight", "down_proj.weight"))


def test_a_file_has_what_a_pass_reads_in_its_order_and_coded_where_that_gains(cut: Path) -> None:
    held = read_shard(cut / file_name(0, 2))
    coded = [name for name, entry in held.items() if entry.layout is not None]
    assert coded == [f"model.layers.{k}.mlp.{name}_proj.weight" for k in (0, 1) for name in ("gate", "up", "down")]
    raw = [name for name in held if name not in coded]
    assert raw[0] == "model.embed_tokens.weight"
    assert raw[-1] == "lm_head.weight"
    files = sorted(path.name for path in cut.iterdir() if path.suffix == ".safetensors")
    assert files == [file_name(0, 2), file_name(1, 2)]
    assert ranks_of(cut) == 2


def test_plans_for_as_many_gpus_are_those_of_the_whole_checkpoint(source: Path, cut: Path) -> None:
    sizes = [
        djinn.plan(folder, budget="12 MB", device="cpu", coding="none", gpus=2, prompt_tokens=8, new_tokens=2, batch=1)
        for folder in (source, cut)
    ]
    assert sizes[0].model_bytes == sizes[1].model_bytes
    assert [unit.name for unit in sizes[0].units] == [unit.name for unit in sizes[1].units]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda cut, _: djinn.load(cut, budget="20 MB", device="cpu"), "was cut for 2 ranks, and here is 1"),
        (lambda cut, _: djinn.plan(cut, budget="20 MB", device="cpu", gpus=4), "was cut for 2 ranks, and here are 4"),
        (lambda cut, out: djinn.unpack(cut, out), "was cut for 2 ranks; give the checkpoint that it was made of"),
        (lambda cut, out: djinn.pack(cut, out), "was cut for 2 ranks; give the checkpoint"),
        (lambda cut, out: djinn.pack(cut, out, ranks=2), "was cut for 2 ranks; give the checkpoint"),
        (lambda cut, _: djinn.plan(cut, budget="20 MB", device="cpu", gpus=2, dtype=torch.float32), "leave dtype away"),
        (lambda cut, out: djinn.pack(cut, out, ranks=0), "ranks 0: it is a whole number"),
    ],
)
def test_others_are_refused(cut: Path, tmp_path: Path, act: Callable[[Path, Path], object], said: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=said):
        act(cut, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_plan_of_tensors_is_refused(cut: Path, tmp_path: Path) -> None:
    """Its parts could have the same shapes, and other weights."""
    with pretended(2) as config:
        index = index_of(cut, tmp_path, CPU)
        config.tp_plan = {"model.layers.*.mlp.down_proj": "rowwise"}
        with pytest.raises(ConfigError, match="was cut for ranks by the model's own plan"):
            sharded(index, config)


def test_parts_of_other_shapes_are_refused(cut: Path, tmp_path: Path) -> None:
    with pretended(2) as config:
        index = index_of(cut, tmp_path, CPU)
        name = "model.layers.0.mlp.down_proj.weight"
        odd = replace(index, tensors=index.tensors | {name: index.tensors["model.norm.weight"]})
        with pytest.raises(CheckpointError, match=r"a rank holds \[512, 1408\] of a tensor of which \[512\] was cut"):
            sharded(odd, config)


def test_buffers_that_a_checkpoint_keeps_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = LlamaModel.__init__

    def with_buffer(self: LlamaModel, config: LlamaConfig) -> None:
        make(self, config)
        self.register_buffer("kept", torch.zeros(3))

    monkeypatch.setattr(LlamaModel, "__init__", with_buffer)
    model = LlamaForCausalLM(WIDE).to(torch.bfloat16)
    model.model.kept = torch.tensor([1.0, 2.0, 3.0])
    model.save_pretrained(tmp_path / "source")
    folder = djinn.pack(tmp_path / "source", tmp_path / "cut", ranks=2, device="cpu")
    with pretended(2, 1):
        found = index_of(folder, tmp_path, CPU).model
    assert found.model.kept.tolist() == [1.0, 2.0, 3.0]


def test_what_cannot_be_split_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_key_value_heads 2 .* does not divide by 4 ranks"):
        djinn.pack(source, tmp_path / "out", ranks=4, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_finished_cut_is_left_as_it_is(source: Path, cut: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cut.iterdir()}
    with pytest.warns(UserWarning, match="is finished already, from this source; nothing was written"):
        assert djinn.pack(source, cut, ranks=2, device="cpu") == cut
    assert {path: path.stat().st_mtime_ns for path in cut.iterdir()} == before


@pytest.mark.parametrize("how", ["another file", "other weights", "damaged", "for other ranks"])
def test_a_folder_that_holds_something_else_is_left_alone(source: Path, cut: Path, tmp_path: Path, how: str) -> None:
    there = shutil.copytree(cut, tmp_path / "there")
    part = there / file_name(1, 2)
    if how == "another file":
        (there / "notes.txt").write_text("mine")
    elif how == "other weights":
        shutil.copy(there / file_name(0, 2), part)
    elif how == "damaged":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        part.rename(there / file_name(1, 3))
    held = {path.name: path.read_bytes() for path in there.iterdir()}
    with pytest.raises(CheckpointError, match="is there already"):
        djinn.pack(source, there, ranks=2, device="cpu")
    assert {path.name: path.read_bytes() for path in there.iterdir()} == held


def test_a_survey_says_what_each_rank_would_get(source: Path, cut: Path) -> None:
    would = list(rank_packing.survey(source, ranks=2, device="cpu"))
    assert would
    assert sorted(would, key=str) == sorted(rank_packing.survey(cut, device="cpu"), key=str)
    with pytest.raises(CheckpointError, match="was cut for 2 ranks"):
        list(rank_packing.survey(cut, ranks=2))


def test_an_interrupted_cut_is_continued(
    source: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = rank_packing.write_packed

    def interrupted(*args: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(1)
        write(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(rank_packing, "write_packed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            djinn.pack(source, tmp_path / "out", ranks=2, device="cpu")
    (unfinished,) = tmp_path.iterdir()
    first = (unfinished / file_name(0, 2)).stat().st_mtime_ns
    out = djinn.pack(source, tmp_path / "out", ranks=2, device="cpu")
    assert (out / file_name(0, 2)).stat().st_mtime_ns == first
    for rank in (0, 1):
        assert (out / file_name(rank, 2)).read_bytes() == (cut / file_name(rank, 2)).read_bytes()


def test_a_damaged_part_is_named(cut: Path, tmp_path: Path) -> None:
    name, entry = next((name, entry) for name, entry in rank_tensors(cut) if entry.layout is not None)
    path = tmp_path / file_name(0, 2)
    held = bytearray((cut / path.name).read_bytes())
    held[entry.source.offset + 5000] ^= 1  # type: ignore[union-attr]
    path.write_bytes(held)
    (tmp_path / file_name(1, 2)).write_bytes((cut / file_name(1, 2)).read_bytes())
    damaged = dict(rank_tensors(tmp_path))[name]
    with pytest.raises(CheckpointError, match=r"rank-0-of-2\.safetensors: tensor .*gate_proj"):
        original_bytes(name, damaged, CPU)


def test_the_command_says_what_each_rank_got(source: Path, tmp_path: Path) -> None:
    told = ["pack", str(source), str(tmp_path / "out"), "--ranks", "2", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, told)
    assert done.exit_code == 0, done.stderr
    names = {size["name"] for size in json.loads(done.stdout)}
    assert {"rank 0: model.norm.weight", "rank 1: model.norm.weight"} <= names
    dry = CliRunner().invoke(main, ["pack", str(source), "--dry-run", "--ranks", "2", "--device", "cpu"])
    assert dry.exit_code == 0, dry.stderr
    rows = {line.split("  ")[0]: line for line in dry.stdout.splitlines()}
    assert {"rank 0, all 21", "rank 1, all 21", "all 42", "lm_head x 2"} <= rows.keys()
