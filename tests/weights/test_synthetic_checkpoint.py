"""Synthetic checkpoints: what transformers loads, resumable, verified, refused where they cannot be written."""

import json
import re
import resource
import shutil
import subprocess
import sys
import unicodedata
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.weights import synthetic_checkpoint, synthetic_values
from djinn.weights import synthetic_shard as shard_module
from djinn.weights.synthetic_checkpoint import checkpoint_tensors, synthesise, verify
from djinn.weights.synthetic_shard import PAGE_BYTES, lay_out

TINY = ["llama-tiny", "gpt2-tiny", "mixtral-tiny", "qwen2-tiny", "opt-tiny"]


def make(out: Path, architecture: str = "qwen2-tiny", **options: object) -> Path:
    return synthesise(architecture, out, progress=False, **options)  # type: ignore[arg-type]


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("synth") / "qwen2-tiny")


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.slow
def test_transformers_loads_it_and_would_have_written_the_same(architecture: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "ours", architecture)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_tensors(folder), load_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("a prompt", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_tensor_is_the_filled_one(dtype: str, tmp_path: Path) -> None:
    for name, tensor in load_tensors(make(tmp_path / "c", dtype=dtype, seed=3)).items():
        wanted = np.empty(tensor.nbytes, np.uint8)
        synthetic_values.fill(wanted, name=name, shape=tensor.shape, dtype=getattr(torch, dtype), seed=3)
        assert np.array_equal(tensor.view(torch.uint8).flatten().numpy(), wanted), name


def test_several_shards_aligned_in_model_order(checkpoint: Path) -> None:
    weight_map = json.loads((checkpoint / synthetic_checkpoint.INDEX).read_text())["weight_map"]
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) >= 2
    in_files: list[str] = []
    for path in shards:
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header_bytes) % PAGE_BYTES == 0
        with safe_open(path, "pt") as file:
            in_files += file.offset_keys()
            assert {weight_map[name] for name in file.keys()} == {path.name}  # noqa: SIM118
    assert in_files == list(weight_map)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    assert in_files == [name for name in model.state_dict() if name != "lm_head.weight"]


def test_mixtral_names_are_the_hubs() -> None:
    names = checkpoint_tensors(synthetic_checkpoint.load_architecture("mixtral-8x7b"))
    assert len(names) == 995
    assert names["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.data())
@settings(max_examples=50, deadline=None)
def test_a_shard_is_filled_alike_in_any_pieces(lengths: list[int], data: st.DataObject) -> None:
    tensors = {f"t{k}.weight": (length, 1) for k, length in enumerate(lengths)}
    shards = lay_out(tensors, torch.bfloat16)
    assert [name for shard in shards for name in shard.tensors] == list(tensors)
    shard = data.draw(st.sampled_from(shards))
    whole = np.empty(shard.size, np.uint8)
    shard.fill(whole, 0, seed=0)
    start = data.draw(st.integers(0, shard.size))
    piece = np.empty(data.draw(st.integers(0, shard.size - start)), np.uint8)
    shard.fill(piece, start, seed=0)
    assert np.array_equal(piece, whole[start : start + len(piece)])


@pytest.mark.parametrize("direct", [True, False])
def test_files_of_several_blocks(direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 2 * PAGE_BYTES)
    if not direct:
        monkeypatch.setattr(shard_module.os, "O_DIRECT", 0)
    (shard,) = lay_out({"a.weight": (300, 101)}, torch.bfloat16)
    whole = np.empty(shard.size, np.uint8)
    shard.fill(whole, 0, seed=0)
    written: list[int] = []
    digests = shard_module.write_shard(shard, tmp_path / "file", 0, written.append)
    assert (tmp_path / "file").read_bytes() == whole.tobytes()
    assert sum(written) == shard.size
    assert len(digests) == len(written) == -(-shard.size // (2 * PAGE_BYTES))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(checkpoint)


@given(text=st.text())
@example(text="\uf900")
@settings(deadline=None)
def test_tokenizer_returns_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    # Some tokenizers' classes bring a normaliser of their own: another spelling of the same characters.
    assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text)
    assert all(token_id < 1024 for token_id in ids)


@pytest.mark.slow
def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    """The process dies by SIGKILL while the second shard is being written: the first one is kept as it is."""
    out = tmp_path / "c"
    script = f"""
import os, signal
from pathlib import Path
from djinn.weights import synthetic_checkpoint
written = synthetic_checkpoint.write_shard
def killed(shard, *rest):
    digests = written(shard, *rest)
    if "00002" in shard.file:
        os.kill(os.getpid(), signal.SIGKILL)
    return digests
synthetic_checkpoint.write_shard = killed
synthetic_checkpoint.synthesise("qwen2-tiny", Path({str(out)!r}), progress=False)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    before = snapshot(out)
    assert list(before) == ["model-00001-of-00003.safetensors"]
    assert list(out.glob("*.partial"))
    with pytest.raises(CheckpointError, match=r"unfinished: 858 KB of 1\.85 MB are finished"):
        verify(out)
    make(out)
    verify(out, full=True)
    assert not list(out.glob("*.partial"))
    assert before.items() <= snapshot(out).items()


def test_a_complete_checkpoint_is_left_alone(checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    make(checkpoint)
    assert snapshot(checkpoint) == before


def test_two_at_once_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = synthetic_checkpoint.write_shard
    monkeypatch.setattr(
        synthetic_checkpoint, "write_shard", lambda shard, *rest: written.append(shard.file) or write(shard, *rest)
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, [tmp_path / "c"] * 2))
    verify(tmp_path / "c", full=True)
    assert len(written) == 3


@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "config.json"])
def test_what_was_lost_is_written_again(file: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    wanted = (folder / file).read_bytes()
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: missing"):
        verify(folder)
    make(folder)
    verify(folder, full=True)
    assert (folder / file).read_bytes() == wanted


def test_disk_full_says_how_far_it_got_and_the_same_command_continues(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (212 * PAGE_BYTES, hard))  # between the first two shards' sizes
    try:
        with pytest.raises(UnavailableError, match=r"disk is full: 858 KB of 1\.85 MB are finished.*same command"):
            make(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "c").glob("*.partial"))
    before = snapshot(tmp_path / "c")
    make(tmp_path / "c")
    verify(tmp_path / "c", full=True)
    assert before.items() <= snapshot(tmp_path / "c").items()


def test_too_little_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UnavailableError, match=r"26 GB are still to be written and 1 MB are free"):
        make(tmp_path / "c", "llama-2-13b")
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "float32"}, {"architecture": "opt-tiny"}])
def test_another_checkpoint_in_the_folder_is_refused(checkpoint: Path, change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"holds qwen2-tiny .*bfloat16, seed 0, not "):
        make(checkpoint, **change)  # type: ignore[arg-type]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=re.escape("holds notes.txt and no digests.json")):
        make(tmp_path)


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("mine")
    with pytest.raises(UnavailableError, match="cannot write the checkpoint"):
        make(tmp_path / "c")


def test_unknown_dtype_and_negative_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no synthetic dtype 'int8'; the dtypes are bfloat16, float16, float32"):
        make(tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="seed -1 is negative"):
        make(tmp_path, seed=-1)


def test_verify_finds_damage(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    path = folder / "model-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    verify(folder)
    with pytest.raises(CheckpointError, match=r"00001-of-00003\.safetensors: damaged in the 16 MiB from byte 0"):
        verify(folder, full=True)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="bytes where the manifest says"):
        verify(folder)
    (folder / synthetic_checkpoint.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="not a manifest"):
        verify(folder)
    (folder / synthetic_checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a synthetic checkpoint"):
        verify(folder)
