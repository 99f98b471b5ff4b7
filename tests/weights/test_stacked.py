"""Experts that are stored apart are read from where they are; what is not just their bytes, transformers converts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM

import djinn
from djinn.errors import CheckpointError, UnavailableError
from djinn.weights.header_index import header_index
from djinn.weights.index import WeightIndex, checkpoint_index
from djinn.weights.packed_shard import read_tensor
from djinn.weights.shards import read_checkpoint, same_bytes
from djinn.weights.tensors import FileSpan, Stacked, TensorEntry
from djinn.weights.units import find_units

Mixture = Callable[[str], Path]
INDEX = "model.safetensors.index.json"
STORED = {
    "mixtral": ("model.layers.2.block_sparse_moe.experts.", ("w1", "w2", "w3")),
    "qwen3_moe": ("model.layers.2.mlp.experts.", ("gate_proj", "down_proj", "up_proj")),
}
"""By model, where the hub's names of experts' matrices in the third layer begin, and how they end."""
names = pytest.mark.parametrize("name", MIXTURES)


@pytest.fixture
def copy(mixture_checkpoint: Mixture, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint to be changed, by name."""
    return lambda name: Path(shutil.copytree(mixture_checkpoint(name), tmp_path / name))


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    folder = tmp_path / "spill"
    folder.mkdir()
    return folder


def value_of(entry: TensorEntry) -> torch.Tensor:
    return torch.cat([read_tensor(part) for part in entry.parts]).view(entry.dtype).view(entry.shape)


def in_place(index: WeightIndex) -> set[str]:
    return {name for name, entry in index.tensors.items() if isinstance(entry.source, Stacked)}


def experts_of(index: WeightIndex) -> set[str]:
    return {name for name in index.tensors if ".experts." in name}


def right(index: WeightIndex, folder: Path, dtype: torch.dtype | str = "auto") -> bool:
    """Return whether an index has the names of transformers' model of ``folder``, and its values.

    Where ``dtype`` is given, only those of experts: others are as they are stored until they are loaded.
    """
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
    return list(index.tensors) == list(wanted) and all(
        torch.equal(value_of(index.tensors[name]), wanted[name])
        for name in (index.tensors if dtype == "auto" else experts_of(index))
    )


def change(folder: Path, changes: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a checkpoint's tensors anew, changed, in two files."""
    tensors = {name: value_of(entry) for name, entry in read_checkpoint(folder).items()}
    changes(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    files = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@names
def test_every_weight_is_transformers_own_and_experts_are_read_from_the_checkpoint(
    mixture_checkpoint: Mixture, spill: Path, name: str
) -> None:
    folder = mixture_checkpoint(name)
    before, matrices = STORED[name]
    assert {f"{before}{number}.{matrix}.weight" for number in range(12) for matrix in matrices} < set(
        read_checkpoint(folder)
    )
    assert len(list(folder.glob("*.safetensors"))) > 3
    index = checkpoint_index(folder, spill)
    assert right(index, folder)
    assert in_place(index) == experts_of(index) != set()
    for entry in index.tensors.values():
        assert all(isinstance(part.source, FileSpan) and part.source.path.parent == folder for part in entry.parts)
    assert index.model.name_or_path == str(folder)


@names
def test_no_room_is_taken_or_asked_for(
    mixture_checkpoint: Mixture, spill: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    index = checkpoint_index(mixture_checkpoint(name), spill)
    assert sum(path.lstat().st_blocks for path in spill.rglob("*")) * 512 < 2**16 < index.nbytes / 8
    with pytest.raises(UnavailableError, match="weights that transformers converts"):
        checkpoint_index(mixture_checkpoint(name), spill, torch.float32)


@names
def test_headers_alone_tell_the_same(mixture_checkpoint: Mixture, spill: Path, name: str) -> None:
    folder = mixture_checkpoint(name)
    assert header_index(folder).tensors == checkpoint_index(folder, spill).tensors


@names
def test_units_have_their_experts_on_disk(mixture_checkpoint: Mixture, spill: Path, name: str) -> None:
    index = checkpoint_index(mixture_checkpoint(name), spill)
    units = [unit for unit in find_units(index) if any(tensor.name in in_place(index) for tensor in unit.tensors)]
    assert len(units) == 3
    assert all(unit.on_disk for unit in units)
    assert sum(unit.weight_bytes for unit in find_units(index)) == index.nbytes


@names
@pytest.mark.parametrize("number", [0, 7, 11])
def test_a_missing_expert_is_refused_by_name(copy: Callable[[str], Path], spill: Path, name: str, number: int) -> None:
    folder = copy(name)
    before, matrices = STORED[name]
    lost = [f"{before}{number}.{matrix}.weight" for matrix in matrices]
    change(folder, lambda tensors: tensors.pop(lost[1]))
    for index in (lambda: checkpoint_index(folder, spill), lambda: header_index(folder)):
        with pytest.raises(CheckpointError) as refused:
            index()
        assert str(refused.value) == f"{folder}: 1 missing tensors: {lost[1]}"
    change(folder, lambda tensors: [tensors.pop(each, None) for each in lost])
    with pytest.raises(CheckpointError) as refused:
        checkpoint_index(folder, spill)
    assert str(refused.value) == f"{folder}: 3 missing tensors: {', '.join(sorted(lost))}"


@names
def test_a_matrix_that_all_experts_lack_is_refused(copy: Callable[[str], Path], spill: Path, name: str) -> None:
    folder = copy(name)
    before, (_, _, up) = STORED[name]
    change(folder, lambda tensors: [tensors.pop(f"{before}{number}.{up}.weight") for number in range(12)])
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        checkpoint_index(folder, spill)


@names
def test_experts_of_another_dtype_are_converted(mixture_checkpoint: Mixture, spill: Path, name: str) -> None:
    index = checkpoint_index(mixture_checkpoint(name), spill, torch.float32)
    assert in_place(index) == set()
    assert all(index.tensors[each].parts[0].dtype == torch.float32 for each in experts_of(index))
    assert right(index, mixture_checkpoint(name), torch.float32)


@names
def test_one_expert_of_another_dtype_has_its_layers_converted(
    copy: Callable[[str], Path], spill: Path, name: str
) -> None:
    folder = copy(name)
    before, matrices = STORED[name]
    odd = f"{before}3.{matrices[1]}.weight"
    change(folder, lambda tensors: tensors.update({odd: tensors[odd].float()}))
    index = checkpoint_index(folder, spill)
    assert experts_of(index) - in_place(index) == {"model.layers.2.mlp.experts.down_proj"}
    assert right(index, folder)


@names
def test_packed_experts_stay_where_they_are(
    mixture_checkpoint: Mixture, tmp_path: Path, spill: Path, name: str
) -> None:
    packed = djinn.pack(mixture_checkpoint(name), tmp_path / "packed", device="cpu")
    index = checkpoint_index(packed, spill)
    assert in_place(index) == experts_of(index)
    assert right(index, mixture_checkpoint(name), torch.bfloat16)
    assert index.model.name_or_path == str(packed)


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.safetensors.index.json"])
def test_a_checkpoint_under_a_name_of_its_own(copy: Callable[[str], Path], spill: Path, file: str) -> None:
    folder = copy("mixtral")
    if file.endswith(".json"):
        (folder / INDEX).rename(folder / file)
    else:
        tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for path in [*folder.glob("*.safetensors"), folder / INDEX]:
            path.unlink()
        save_file(tensors, folder / file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": file}))
    index = checkpoint_index(folder, spill)
    assert in_place(index) == experts_of(index)
    assert right(index, folder)


def test_experts_stored_apart_are_compared_part_by_part(mixture_checkpoint: Mixture, spill: Path) -> None:
    tensors = checkpoint_index(mixture_checkpoint("mixtral"), spill).tensors
    one, other = (tensors[f"model.layers.{layer}.mlp.experts.down_proj"] for layer in (0, 1))
    assert same_bytes(one, one)
    assert not same_bytes(one, other)
    written = checkpoint_index(mixture_checkpoint("mixtral"), spill, torch.float32).tensors
    assert not same_bytes(one, written["model.layers.0.mlp.experts.down_proj"])
