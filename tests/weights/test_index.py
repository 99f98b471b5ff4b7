"""The index of real checkpoints, and each way in which a checkpoint can be bad."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MarianConfig, MarianMTModel
from transformers.utils import logging as hf_logging

import djinn
from djinn.errors import CheckpointError
from djinn.weights.architectures import load_architecture
from djinn.weights.header_index import header_index
from djinn.weights.index import WeightIndex, checkpoint_index, synthetic_index
from djinn.weights.models import empty_model, owners
from djinn.weights.packed_shard import read_tensor
from djinn.weights.shards import read_checkpoint, read_shard
from djinn.weights.tensors import FileSpan, Seeded, TensorEntry
from djinn.weights.units import find_units

Tiny = Callable[[str], Path]
INDEX = "model.safetensors.index.json"


def value_of(entry: TensorEntry) -> torch.Tensor:
    return torch.cat([read_tensor(part) for part in entry.parts]).view(entry.dtype).view(entry.shape)


@pytest.fixture
def copy(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A llama checkpoint to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama"))


def refusal(folder: Path) -> str:
    """Index ``folder``; return what the refusal says."""
    with pytest.raises(CheckpointError) as error:
        checkpoint_index(folder, folder.parent / "spill")
    return str(error.value)


def shard_of(folder: Path, name: str) -> Path:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / weight_map[name]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_found_with_its_value(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    index = checkpoint_index(tiny_checkpoint(name), tmp_path)
    resident = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(name), dtype="auto")
    wanted = dict(resident.named_parameters())
    assert list(index.tensors) == list(wanted)
    for parameter, entry in index.tensors.items():
        assert torch.equal(value_of(entry), wanted[parameter]), parameter
    assert index.nbytes == sum(parameter.nbytes for parameter in wanted.values())
    assert not index.synthetic


@pytest.mark.parametrize("name", TINY)
def test_the_model_has_no_weights_but_its_buffers_and_ties(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    index = checkpoint_index(tiny_checkpoint(name), tmp_path)
    resident = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(name), dtype="auto")
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in index.model.parameters())
    assert not index.model.training
    buffers = dict(index.model.named_buffers())
    assert buffers.keys() == dict(resident.named_buffers()).keys()
    assert all(torch.equal(buffers[key], buffer) for key, buffer in resident.named_buffers())
    assert [key for key, *_ in owners(index.model)] == [key for key, *_ in owners(resident)]
    assert not any(hasattr(module, "_hf_hook") for module in index.model.modules())
    assert all("forward" not in vars(module) for module in index.model.modules())


def test_tied_weights_are_one_object_under_every_name(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Invariant 6."""
    index = checkpoint_index(tiny_checkpoint("gpt2"), tmp_path)
    model = index.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "transformer.wte.weight" in index.tensors
    assert "lm_head.weight" not in index.tensors


def test_only_converted_weights_are_written_anew(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    index = checkpoint_index(tiny_checkpoint("mixtral"), tmp_path, torch.float32)
    anew = {
        name
        for name, entry in index.tensors.items()
        if isinstance(entry.source, FileSpan) and entry.source.path.parent == tmp_path
    }
    assert anew
    assert all(".experts." in name for name in anew)


def test_indexing_is_quiet_and_leaves_verbosity_as_it_was(
    tiny_checkpoint: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    accelerate = logging.getLogger("accelerate")
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), accelerate.level
    checkpoint_index(tiny_checkpoint("llama"), tmp_path)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), accelerate.level) == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_single_file_is_a_checkpoint_too(copy: Path, tmp_path: Path) -> None:
    tensors = {name: value_of(entry) for name, entry in read_checkpoint(copy).items()}
    for path in [*copy.glob("*.safetensors"), copy / INDEX]:
        path.unlink()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    index = checkpoint_index(copy, tmp_path / "spill")
    assert all(torch.equal(value_of(entry), tensors[name]) for name, entry in index.tensors.items())


@pytest.mark.parametrize("name", TINY)
def test_headers_alone_tell_what_a_model_would_hold(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    folder, hollow, spill = tiny_checkpoint(name), tmp_path / "hollow", tmp_path / "spill"
    for made in (hollow, spill):
        made.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with path.open("rb") as file, (hollow / path.name).open("wb") as copied:
                length = file.read(8)
                copied.write(length + file.read(int.from_bytes(length, "little")))
                copied.truncate(path.stat().st_size)
        else:
            shutil.copy(path, hollow)
    before = {path: path.stat().st_blocks for path in hollow.iterdir()}
    found, whole = header_index(hollow), checkpoint_index(folder, spill)
    assert [(name, entry.dtype, entry.shape) for name, entry in found.tensors.items()] == [
        (name, entry.dtype, entry.shape) for name, entry in whole.tensors.items()
    ]
    assert found.nbytes == whole.nbytes
    assert [unit.name for unit in find_units(found)] == [unit.name for unit in find_units(whole)]
    assert {path: path.stat().st_blocks for path in hollow.iterdir()} == before


def test_a_config_that_no_model_has_is_refused_by_headers_too(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "ours"}')
    with pytest.raises(CheckpointError, match="transformers cannot load its config"):
        header_index(copy)


def test_seeded_models_have_no_files() -> None:
    index = synthetic_index(empty_model(load_architecture("gpt2-tiny"), torch.bfloat16), 7)
    assert index.synthetic
    assert all(entry.source == Seeded(name, 7) for name, entry in index.tensors.items())
    assert all(parameter.is_meta for parameter in index.model.parameters())
    assert index.model.get_output_embeddings().weight is index.model.get_input_embeddings().weight
    assert not any(buffer.is_meta for buffer in index.model.buffers())


def test_the_class_is_the_one_that_was_saved(architecture_checkpoint: Tiny, tmp_path: Path) -> None:
    for name in ("t5", "bert", "vit", "llava"):
        index = checkpoint_index(architecture_checkpoint(name), tmp_path)
        assert type(index.model) is ARCHITECTURES[name].cls
        empty = empty_model(index.model.config, torch.bfloat16)
        assert type(empty) is ARCHITECTURES[name].cls
        assert list(dict(empty.named_parameters())) == list(index.tensors)


@pytest.mark.parametrize("named", [None, [], ["NoSuchModel"]])
def test_without_a_known_class_it_is_a_causal_language_model(copy: Path, tmp_path: Path, named: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert isinstance(checkpoint_index(copy, tmp_path / "spill").model, LlamaForCausalLM)


# Bad checkpoints.


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no model.safetensors and no {INDEX}"):
        read_checkpoint(tmp_path)


def test_a_truncated_shard_is_named_with_the_tensor(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    text = refusal(copy)
    assert f"{path}: tensor " in text
    assert f"ends at byte {size}, but the file has {size - 1}: it is truncated" in text


@pytest.mark.parametrize("length", [0, 5, 8, 20])
def test_a_shard_cut_off_inside_its_header_is_refused(copy: Path, length: int) -> None:
    path = shard_of(copy, "lm_head.weight")
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path}: not a safetensors file, or cut off inside its header ({length} bytes)" in refusal(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")
    path.unlink()
    assert refusal(copy) == f"{path}: not there; {copy / INDEX} names it"


@pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/etc/hostname", "a/../../elsewhere.safetensors"])
def test_a_shard_outside_the_folder_is_refused(copy: Path, outside: str) -> None:
    shutil.copy(shard_of(copy, "lm_head.weight"), copy.parent / "elsewhere.safetensors")
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = outside
    (copy / INDEX).write_text(json.dumps(index))
    assert refusal(copy) == f"{copy / INDEX}: names {outside!r}, which is outside the checkpoint folder"


def test_shards_may_be_links_as_in_the_hubs_cache(copy: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in copy.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert len(checkpoint_index(copy, tmp_path / "spill").tensors) == len(read_checkpoint(copy))


def test_a_tensor_that_its_shard_lacks_is_named(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(copy) == f"{copy}: the index places lm_head.weight in {path.name}, which does not have it"


@pytest.mark.parametrize("text", ["not json", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "{}", "\xff"])
def test_an_index_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / INDEX).write_text(text, encoding="latin-1")
    assert f"{copy / INDEX}: " in refusal(copy)


def test_overlapping_tensors_are_refused(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")

    def overlap(header: dict[str, dict[str, object]]) -> None:
        names = sorted(header.keys() - {"__metadata__"}, key=lambda name: str(header[name]["data_offsets"]))
        header["copy"] = dict(header[names[0]])

    rewrite_header(path, overlap)
    assert "inside the tensor that ends at" in refusal(copy)


def test_a_tensor_outside_its_file_is_refused(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")

    def move(header: dict[str, dict[str, object]]) -> None:
        header["lm_head.weight"]["data_offsets"] = [10**12, 10**12 + 256 * 128 * 2]

    rewrite_header(path, move)
    assert f"{path}: tensor lm_head.weight ends at byte 1000000" in refusal(copy)


def test_a_span_that_is_not_the_tensors_size_is_refused(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")
    rewrite_header(path, lambda header: header["lm_head.weight"].update(shape=[3, 3]))
    assert f"{path}: tensor lm_head.weight spans {256 * 128 * 2} bytes, but BF16 [3, 3] needs 18" in refusal(copy)


def test_an_unknown_dtype_is_named(copy: Path) -> None:
    path = shard_of(copy, "lm_head.weight")
    rewrite_header(path, lambda header: header["lm_head.weight"].update(dtype="F4"))
    assert f"{path}: tensor lm_head.weight has dtype F4" in refusal(copy)


def test_another_shape_than_the_configs_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 300}))
    text = refusal(copy)
    assert str(copy) in text
    assert "mlp" in text


def test_a_weight_that_the_model_computes_is_computed(tmp_path: Path) -> None:
    sizes = {
        f"{part}_{what}": 4 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    config = MarianConfig(d_model=16, vocab_size=32, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **sizes)
    wanted = MarianMTModel(config)
    wanted.save_pretrained(tmp_path / "marian")
    (tmp_path / "spill").mkdir()
    index = checkpoint_index(tmp_path / "marian", tmp_path / "spill")
    for part in ("encoder", "decoder"):
        name = f"model.{part}.embed_positions.weight"
        assert name not in read_checkpoint(tmp_path / "marian")
        assert torch.equal(value_of(index.tensors[name]), wanted.get_parameter(name))


def test_a_missing_tensor_is_named(copy: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(shard_of(copy, name), lambda tensors: tensors.pop(name))
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"][name]
    (copy / INDEX).write_text(json.dumps(index))
    assert refusal(copy) == f"{copy}: 1 missing tensors: {name}"


def add_strays(folder: Path, *names: str) -> None:
    """Add tensors that the model has no place for."""
    path = shard_of(folder, "lm_head.weight")
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(3) for name in names}))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(dict.fromkeys(names, path.name))
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_that_the_model_does_not_have_are_ignored_with_one_warning(copy: Path, tmp_path: Path) -> None:
    wanted = checkpoint_index(copy, tmp_path / "before")
    add_strays(copy, "stray", *(f"pooler.{number}" for number in range(6)))
    with pytest.warns(UserWarning, match="no place for") as warned:
        found = checkpoint_index(copy, tmp_path / "spill")
    assert [str(each.message) for each in warned] == [
        f"{copy}: LlamaForCausalLM has no place for 7 tensors: pooler.0, pooler.1, pooler.2, pooler.3, pooler.4, ..."
    ]
    assert list(found.tensors) == list(wanted.tensors)


def test_what_transformers_itself_expects_beside_the_weights_is_not_warned_of(copy: Path, tmp_path: Path) -> None:
    """Rotary frequencies, which old checkpoints hold."""
    add_strays(copy, "model.layers.0.self_attn.rotary_emb.inv_freq")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint_index(copy, tmp_path / "spill")


def test_a_packed_checkpoint_keeps_what_the_model_does_not_have(copy: Path, tmp_path: Path) -> None:
    add_strays(copy, "stray")
    packed = djinn.pack(copy, tmp_path / "packed", device="cpu")
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no place for 1 tensors: stray") as warned:
        checkpoint_index(packed, tmp_path)
    assert len(warned) == 1
    djinn.unpack(packed, tmp_path / "unpacked", device="cpu")
    for path in copy.iterdir():
        assert (tmp_path / "unpacked" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_tensor_that_the_index_does_not_list_is_still_found(copy: Path, tmp_path: Path) -> None:
    wanted = value_of(read_checkpoint(copy)["model.norm.weight"])
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    assert torch.equal(value_of(checkpoint_index(copy, tmp_path / "spill").tensors["model.norm.weight"]), wanted)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "nothing"}', "{}"])
def test_a_config_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert f"{copy}: transformers cannot load its config" in refusal(copy)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers(-5, 50) | st.sampled_from(["F32", "U8", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"]), inner)
        ),
        max_leaves=12,
    ),
    rest=st.binary(max_size=20),
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: object, rest: bytes) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    try:
        tensors = read_shard(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        for entry in tensors.values():
            assert isinstance(entry.source, FileSpan)
            assert entry.source.offset + entry.nbytes <= path.stat().st_size


def test_sizes_count_ties_once() -> None:
    index = synthetic_index(empty_model(load_architecture("gpt2-tiny"), torch.float32), 0)
    assert isinstance(index, WeightIndex)
    assert index.nbytes == sum(parameter.nbytes for parameter in index.model.parameters())


def test_weights_that_a_model_would_make_random_numbers_of_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head\.weight"], raising=False)
    LlamaForCausalLM(TINY["llama"]).save_pretrained(tmp_path / "llama")
    rewrite(tmp_path / "llama" / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert "do not hold lm_head.weight, which LlamaForCausalLM would make random numbers of" in refusal(
        tmp_path / "llama"
    )


def test_modules_that_others_make_meanwhile_are_ordinary(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """While models are made, nothing is replaced that other threads use; afterwards all is as it was."""
    before = (torch.nn.Module.register_parameter, hf_logging.get_verbosity(), logging.getLogger("accelerate").level)
    done = threading.Event()
    made: list[bool] = []

    def make() -> None:
        while not done.is_set():
            made.append(torch.nn.Linear(2, 2).weight.is_meta)

    def index(number: int) -> None:
        for _ in range(3):
            empty_model(TINY["llama"], torch.float32)
            spill = tmp_path / str(number)
            spill.mkdir(exist_ok=True)
            checkpoint_index(tiny_checkpoint("llama"), spill)

    maker = threading.Thread(target=make)
    maker.start()
    indexing = [threading.Thread(target=index, args=(number,)) for number in range(3)]
    for thread in indexing:
        thread.start()
    for thread in indexing:
        thread.join()
    done.set()
    maker.join()
    assert made
    assert not any(made)
    assert before == (
        torch.nn.Module.register_parameter, hf_logging.get_verbosity(), logging.getLogger("accelerate").level
    )  # fmt: skip
