"""Packing: byte for byte back, loaded like any checkpoint, and each way in which it can go wrong."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import djinn
from djinn.codec.layout import LEAST_BYTES
from djinn.engine.load import placement
from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.planning.placement import Tier
from djinn.weights import pack as packing
from djinn.weights import packed_format as packed_form
from djinn.weights.header import read_header
from djinn.weights.header_index import header_index
from djinn.weights.index import checkpoint_index
from djinn.weights.pack import TensorSize, pack, survey, unpack
from djinn.weights.packed_shard import original_bytes
from djinn.weights.shards import read_checkpoint, read_shard, same_bytes
from djinn.weights.tensors import FileSpan

pytestmark = pytest.mark.usefixtures("one_thread")

WORK = {"prompt_tokens": 16, "new_tokens": 8, "device": "cpu", "ring": "6 MB"}


@pytest.fixture(scope="module")
def folder(codable_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint packed; not to be changed."""
    return pack(codable_checkpoint, tmp_path_factory.mktemp("packed") / "out", device="cpu")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A packed checkpoint to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path, share: float = 0.4, host: str = "1 GB", **options: object) -> PreTrainedModel:
    whole = djinn.plan(folder, budget="3 GB", host_memory="1 GB", **WORK)  # type: ignore[arg-type]
    budget = whole.workspace_bytes + round(share * whole.model_bytes)
    return djinn.load(folder, budget=budget, host_memory=host, **WORK | options)  # type: ignore[arg-type]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 12)[None]).logits


def test_there_and_back_gives_the_same_bytes(codable_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    back = unpack(folder, tmp_path / "back", device="cpu")
    assert contents(back) == contents(codable_checkpoint)
    assert len(list(codable_checkpoint.glob("*.safetensors"))) > 1


def test_packed_files_are_smaller_safetensors_with_the_same_names(codable_checkpoint: Path, folder: Path) -> None:
    before, after = read_checkpoint(codable_checkpoint), read_checkpoint(folder)
    for name, entry in before.items():
        stored = after[name]
        assert (stored.dtype, stored.shape) == (entry.dtype, entry.shape)
        assert (stored.layout is not None) == (entry.nbytes >= LEAST_BYTES)
        assert isinstance(stored.source, FileSpan)
        if stored.layout is not None:
            assert stored.nbytes < 0.75 * entry.nbytes
            assert stored.source.offset % 256 == 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # the library itself takes it
            assert set(file.keys()) == set(read_shard(codable_checkpoint / path.name))


@pytest.mark.parametrize("host", ["1 GB", "1 MB", "8 MB"])
def test_a_packed_checkpoint_streams_coded_from_every_tier(codable_checkpoint: Path, folder: Path, host: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(codable_checkpoint, dtype="auto").eval()
    model = loaded(folder, host=host)
    made = placement(model)
    assert all(unit.coded for unit in made.streamed if unit.raw_bytes > LEAST_BYTES)
    assert bool(made.at(Tier.DISK)) == (host != "1 GB")
    for _ in range(2):
        assert torch.equal(logits(model), logits(whole))
    djinn.detach(model)
    wanted = dict(whole.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())


def test_coding_none_decodes_while_loading(codable_checkpoint: Path, folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(codable_checkpoint, dtype="auto").eval()
    model = loaded(folder, coding="none")
    assert not placement(model).is_coded
    assert placement(model).away
    assert torch.equal(logits(model), logits(whole))


def test_a_packed_model_that_fits_is_decoded(codable_checkpoint: Path, folder: Path) -> None:
    model = loaded(folder, share=3)
    assert not placement(model).streamed
    assert not placement(model).is_coded
    whole = AutoModelForCausalLM.from_pretrained(codable_checkpoint, dtype="auto").eval()
    assert torch.equal(logits(model), logits(whole))


@pytest.fixture(scope="module", params=["apart", "fused"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture each of whose matrices is large enough to be coded; its experts are stored apart, or by layer."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=768, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=4, vocab_size=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    save_mixture(MixtralForCausalLM(config).to(torch.bfloat16), path, request.param)
    return path


def save_mixture(model: PreTrainedModel, path: Path, how: str = "fused") -> None:
    model.save_pretrained(path, max_shard_size="20MB", save_original_format=how == "apart")


@pytest.fixture(scope="module")
def packed_mixture(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(mixture, tmp_path_factory.mktemp("packed") / "out", device="cpu")


def is_fused(folder: Path) -> bool:
    return any(len(entry.shape) == 3 for entry in read_checkpoint(folder).values())


def spilled(before: set[Path]) -> int:
    """Return the bytes of weights in temporary folders that were not there ``before``."""
    folders = set(Path(tempfile.gettempdir()).glob("djinn-*")) - before
    return sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("host", ["1 GB", "20 MB", "1 B"])
def test_packed_experts_are_streamed_as_they_are_packed(
    mixture: Path, packed_mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(mixture, dtype="auto").eval()
    model = loaded(packed_mixture, share=0.6, host=host)
    made = placement(model)
    parts = [tensor for unit in made.routed for expert in unit.experts for tensor in expert.tensors]
    assert len(parts) == 3 * 4 * (2 if is_fused(mixture) else 3)
    assert all(part.entry.layout is not None and isinstance(part.entry.source, FileSpan) for part in parts)
    assert {unit.name for unit in made.at(Tier.DISK)} >= {unit.name for unit in made.routed if host == "1 B"}
    assert spilled(set()) < 10**5
    for _ in range(2):
        assert torch.equal(logits(model), logits(whole))
    wanted, state = whole.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    djinn.detach(model)
    assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.6, {"coding": "none"}),
        (0.6, {"experts": "whole", "ring": "20 MB"}),
        (3, {}),
        (0.9, {"dtype": torch.float32, "ring": "40 MB"}),
    ],
    ids=["raw", "whole layers", "resident", "converted"],
)
def test_packed_experts_are_decoded_where_they_have_to_be(
    mixture: Path, packed_mixture: Path, share: float, options: dict[str, Any]
) -> None:
    dtype = options.get("dtype", torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(mixture, dtype=dtype).eval()
    model = loaded(packed_mixture, share=share, **options)
    assert bool(placement(model).away) == (share < 1)
    assert torch.equal(logits(model), logits(whole))
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_plan_of_packed_experts_is_what_they_are_loaded_by(packed_mixture: Path) -> None:
    model = loaded(packed_mixture, share=0.6)
    made = placement(model)
    planned = djinn.plan(packed_mixture, budget=made.budget, host_memory="1 GB", **WORK)
    assert (planned.pool, planned.pinned_bytes, planned.tiers) == (made.pool, made.pinned_bytes, made.tiers)


def test_a_packed_mixture_is_what_its_headers_tell(packed_mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    assert header_index(packed_mixture).tensors == checkpoint_index(packed_mixture, tmp_path / "spill").tensors


def test_packed_experts_are_compared_as_they_are_stored(packed_mixture: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed_mixture, tmp_path / "copy"))
    (tmp_path / "spill").mkdir()
    one, other = (checkpoint_index(folder, tmp_path / "spill").tensors for folder in (packed_mixture, copy))
    first, second = (f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1))
    assert one[first] != other[first]
    assert same_bytes(one[first], other[first])
    assert not same_bytes(one[first], other[second])


def test_a_packed_mixture_is_unpacked_and_described(mixture: Path, packed_mixture: Path, tmp_path: Path) -> None:
    assert contents(unpack(packed_mixture, tmp_path / "back", device="cpu")) == contents(mixture)
    wanted = list(survey(mixture, device="cpu"))
    assert sorted(survey(packed_mixture), key=str) == sorted(wanted, key=str)
    assert all(size.coded and 11 < size.bits < 11.5 for size in wanted if ".experts." in size.name)
    sizes = {path.name: path.stat().st_size for path in packed_mixture.glob("*.safetensors")}
    assert sum(sizes.values()) < sum(size.stored_bytes for size in wanted) + len(sizes) * 2**16
    with pytest.warns(UserWarning, match="is finished already"):
        pack(mixture, packed_mixture, device="cpu")


def test_only_files_with_experts_in_one_tensor_are_of_a_later_version(
    codable_checkpoint: Path, mixture: Path, packed_mixture: Path, folder: Path
) -> None:
    for packed, plain in ((folder, codable_checkpoint), (packed_mixture, mixture)):
        for path in packed.glob("*.safetensors"):
            fused = any(len(entry.shape) == 3 for entry in read_shard(plain / path.name).values())
            assert json.loads(read_header(path).metadata["djinn"])["version"] == (2 if fused else 1)


def test_experts_that_were_packed_as_one_tensor_still_stream(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of models that transformers does not mark are packed so."""
    monkeypatch.setattr(packing, "fused_experts", lambda _: {})
    packed = pack(mixture, tmp_path / "packed", device="cpu")
    assert all(json.loads(read_header(path).metadata["djinn"])["version"] == 1 for path in packed.glob("*.safetensors"))
    model = loaded(packed, share=0.6, ring="20 MB")
    assert bool(placement(model).routed) != is_fused(mixture)
    assert placement(model).is_coded
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(mixture, dtype="auto").eval()))


def small_mixture(path: Path, moe: int, change: Callable[[PreTrainedModel], object] = lambda _: None) -> Path:
    """Write a mixture of 8 experts of 2 * ``moe`` and ``moe`` rows of 64 weights, stored by layer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=moe, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, vocab_size=128,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    change(model)
    save_mixture(model, path)
    return path


def one_expert_of_noise(model: PreTrainedModel) -> None:
    """Give an expert weights that coding would make larger, as a sum can still take them."""
    weights = model.get_parameter("model.layers.0.mlp.experts.down_proj").data
    exponents = torch.randint(1, 100, weights[3].shape, dtype=torch.int16) << 7
    weights[3] = exponents.view(torch.bfloat16)


@pytest.mark.parametrize(
    ("moe", "change", "raw"),
    [
        (64, lambda _: None, set()),
        (104, lambda _: None, {"gate_up_proj", "down_proj"}),
        (99, lambda _: None, {"gate_up_proj", "down_proj"}),
        (64, lambda model: model.float(), {"gate_up_proj", "down_proj"}),
        (64, one_expert_of_noise, {"down_proj"}),
    ],
    ids=["whole tiles", "parts of tiles", "odd rows", "float32", "noise"],
)
@pytest.mark.parametrize("host", ["1 GB", "1 B"])
def test_what_is_not_coded_of_experts_is_fetched_raw(
    tmp_path: Path, moe: int, change: Callable[[PreTrainedModel], object], raw: set[str], host: str
) -> None:
    plain = small_mixture(tmp_path / "plain", moe, change)
    packed = pack(plain, tmp_path / "packed", device="cpu")
    assert contents(unpack(packed, tmp_path / "back", device="cpu")) == contents(plain)
    first = {name.rpartition(".")[2]: entry for name, entry in read_checkpoint(packed).items() if "layers.0" in name}
    experts = {name: first[name].stored_parts for name in ("gate_up_proj", "down_proj")}
    for name, parts in experts.items():
        assert [part.layout is None for part in parts] == [name in raw] * 8
        assert all(part.crc32 is not None for part in parts)
    whole = AutoModelForCausalLM.from_pretrained(plain, dtype="auto").eval()
    model = loaded(packed, share=0.7, host=host, ring=None)
    made = placement(model)
    # transformers' products of odd rows, or of float32, cannot be traced: such a model streams by blocks.
    assert bool(made.routed) == (moe % 8 == 0 and whole.dtype == torch.bfloat16)
    assert made.away
    for each in (model, whole):
        each.set_experts_implementation("eager")  # the only one that takes odd rows
    assert {unit.name for unit in made.at(Tier.DISK)} >= {unit.name for unit in made.routed if host == "1 B"}
    assert torch.equal(logits(model), logits(whole))
    djinn.detach(model)
    assert all(torch.equal(value, whole.get_parameter(name)) for name, value in model.named_parameters())
    damaged = experts["down_proj"][5].source
    assert isinstance(damaged, FileSpan)
    damage(damaged.path, damaged.offset)
    message = r"model\.safetensors: tensor .*down_proj( of .*experts\[5\]|, expert 5): section .* changed"
    with pytest.raises(CheckpointError, match=message):
        loaded(packed, share=0.7, host=host, ring=None)


def test_experts_that_transformers_converts_are_packed_as_one_tensor_and_read_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of transformers, which converted nothing, may have let them be packed one by one."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 128, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    fused = {name: 8 for name, entry in read_checkpoint(tmp_path / "plain").items() if len(entry.shape) == 3}
    assert len(fused) == 4
    packed = pack(tmp_path / "plain", tmp_path / "packed", device="cpu")
    assert not any(read_checkpoint(packed)[name].stored_parts[1:] for name in fused)
    monkeypatch.setattr(packing, "fused_experts", lambda _: fused)
    by_expert = pack(tmp_path / "plain", tmp_path / "by_expert", device="cpu")
    assert all(len(read_checkpoint(by_expert)[name].stored_parts) == 8 for name in fused)
    found = {}
    for folder in (tmp_path / "plain", packed, by_expert):
        spill = tmp_path / f"{folder.name}_spill"
        spill.mkdir()
        tensors = checkpoint_index(folder, spill).tensors
        assert header_index(folder).tensors.keys() == tensors.keys()
        found[folder.name] = {name: original_bytes(name, entry, torch.device("cpu")) for name, entry in tensors.items()}
    for name, wanted in found["plain"].items():
        assert torch.equal(found["packed"][name], wanted), name
        assert torch.equal(found["by_expert"][name], wanted), name


EXPERTS: dict[str, Callable[[list[Any]], Any]] = {
    "none": lambda _: [],
    "one": lambda them: them[:1],
    "one too few": lambda them: them[1:],
    "one too many": lambda them: [*them, them[0]],
    "a number": lambda _: 8,
    "a number for an expert": lambda them: [8, *them[1:]],
    "one raw": lambda them: [{"crc32": {"weights": "00000000"}}, *them[1:]],
    "all raw": lambda them: [{"crc32": {"weights": "00000000"}}] * len(them),
    "one within another": lambda them: [{"experts": them}, *them[1:]],
    "more escapes": lambda them: [them[0] | {"escapes": 4096}, *them[1:]],
    "a tile fewer": lambda them: [them[0] | {"elements": 4096}, *them[1:]],
    "a weight fewer": lambda them: [them[0] | {"elements": 8191}, *them[1:]],
}
OF_RAW_ONES = ("none", "one", "one too few", "one too many", "a number", "a number for an expert")


@pytest.mark.parametrize(
    ("name", "what"), [*(("gate_up_proj", what) for what in EXPERTS), *(("down_proj", what) for what in OF_RAW_ONES)]
)
def test_experts_that_the_file_does_not_have_are_refused(tmp_path: Path, name: str, what: str) -> None:
    plain = small_mixture(tmp_path / "plain", 64, one_expert_of_noise)
    packed = pack(plain, tmp_path / "packed", device="cpu")
    path = packed / "model.safetensors"
    raw, header = path.read_bytes(), read_header(path)
    description = json.loads(header.metadata["djinn"])
    tensor = description["tensors"][f"model.layers.0.mlp.experts.{name}"]
    tensor["experts"] = EXPERTS[what](tensor["experts"])
    text = json.dumps(description)
    metadata = header.metadata | {"djinn": text, "djinn_crc32": f"{zlib.crc32(text.encode()):08x}"}
    body = json.dumps(json.loads(header.text) | {"__metadata__": metadata}).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[header.start :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the description of its packed tensors is damaged"):
        unpack(packed, tmp_path / "back", device="cpu")


def test_a_damaged_expert_is_named(packed_mixture: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed_mixture, tmp_path / "copy"))
    entries = read_checkpoint(copy)
    if is_fused(copy):
        stored = "model.layers.1.mlp.experts.down_proj"
        entry = entries[stored].stored_parts[2]
        named = f"{stored}, expert 2"
    else:
        stored = named = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
        entry = entries[stored]
    assert isinstance(entry.source, FileSpan)
    with entry.source.path.open("r+b") as file:
        file.seek(entry.source.offset + 5000)
        was = file.read(1)
        file.seek(entry.source.offset + 5000)
        file.write(bytes([was[0] ^ 1]))
    message = rf"{entry.source.path.name}: tensor .*down_proj of model\.layers\.1\.mlp\.experts\[2\]: .* changed"
    for host in ("1 GB", "1 B"):
        with pytest.raises(CheckpointError, match=message):
            loaded(copy, share=0.6, host=host)
    file = entry.source.path.name
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {named}: section sm, .* changed"):
        unpack(copy, tmp_path / "back", device="cpu")
    elsewhere: list[dict[str, Any]] = [{"share": 3}, {"coding": "none"}, {"experts": "whole", "ring": "20 MB"}]
    for options in elsewhere:
        with pytest.raises(CheckpointError, match=rf"{file}: tensor .*(experts\[2\]|, expert 2): .* changed"):
            loaded(copy, **{"share": 0.6} | options)


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    strange = torch.randn(2**20).to(torch.bfloat16)
    strange[::1000] = float("nan")
    strange[1::1000] = float("inf")
    strange[2::1000] = -float("inf")
    strange.view(torch.int16)[3] = 0x7F81  # a NaN with a payload
    return {
        "strange": strange.view(1024, 1024),
        "random_bits": torch.randint(-(2**15), 2**15, (2**20,), dtype=torch.int16).view(torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "one": torch.ones(1, dtype=torch.bfloat16),
        "f32": torch.randn(600, 600),
        "f16": torch.randn(1000, 600).half(),
        "f8": torch.randn(1024, 1100).to(torch.float8_e4m3fn),
        "i8": torch.randint(-128, 127, (1500, 1001), dtype=torch.int8),
    }


def test_what_is_not_bfloat16_or_does_not_gain_passes_through(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    save_file(every_dtype(), plain / "model.safetensors", metadata={"format": "pt", "author": "ä"})
    found = {size.name: size for size in survey(plain, device="cpu")}
    assert {name for name, size in found.items() if size.coded} == {"strange"}
    packed = pack(plain, tmp_path / "packed", device="cpu")
    assert {size.name: size for size in survey(packed)} == found
    assert read_header(packed / "model.safetensors").metadata["author"] == "ä"
    assert contents(unpack(packed, tmp_path / "back", device="cpu")) == contents(plain)
    raw = load_file(packed / "model.safetensors")
    assert torch.equal(raw["f32"], every_dtype()["f32"])


def test_kinds_and_bits() -> None:
    size = TensorSize("model.layers.3.self_attn.q_proj.weight", "bfloat16", 1000, 700, coded=True)
    assert (size.kind, size.bits) == ("q_proj", 11.2)
    assert TensorSize("empty", "bfloat16", 0, 0, coded=False).bits == 0


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["1 GB", "1 MB"])
@pytest.mark.parametrize("section", ["sm", "planes", "lut", "off", "esc", "weights"])
def test_a_flipped_bit_is_named_by_tensor_and_section(copy: Path, tmp_path: Path, section: str, host: str) -> None:
    entries = read_checkpoint(copy)
    wanted = "model.layers.1.self_attn.q_proj.bias" if section == "weights" else "model.layers.1.mlp.up_proj.weight"
    entry = entries[wanted]
    assert isinstance(entry.source, FileSpan)
    within = 0 if entry.layout is None else entry.layout.offsets[section]
    damage(entry.source.path, entry.source.offset + within)
    message = rf"{entry.source.path.name}: tensor {wanted}: section {section}, .* changed since it was packed"
    with pytest.raises(CheckpointError, match=message):
        loaded(copy, host=host)
    with pytest.raises(CheckpointError, match=message):
        unpack(copy, tmp_path / "back", device="cpu")
    assert not (tmp_path / "back").exists()


def test_a_flipped_bit_anywhere_in_the_header_gives_an_error_or_the_same_weights(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[0]
    before, entries = path.read_bytes(), read_shard(path)
    for offset in range(0, len(read_header(path).text), 97):
        damage(path, offset)
        try:
            same = read_shard(path) == entries
        except CheckpointError:
            same = True
        assert same, offset
        path.write_bytes(before)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="it is truncated"):
        loaded(copy)


def test_an_unknown_version_is_refused(
    codable_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packed_form, "VERSIONS", (3, 4))
        later = pack(codable_checkpoint, tmp_path / "later", device="cpu")
    with pytest.raises(CheckpointError, match="packed in version 3, and this djinn reads versions 1 and 2"):
        loaded(later)


def test_packing_twice_and_unpacking_what_is_not_packed_are_refused(
    codable_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is packed already"):
        pack(folder, tmp_path / "again", device="cpu")
    with pytest.raises(CheckpointError, match="is not packed"):
        unpack(codable_checkpoint, tmp_path / "again", device="cpu")


def test_the_source_folder_and_a_full_folder_are_refused(codable_checkpoint: Path, tmp_path: Path) -> None:
    for out in (codable_checkpoint, codable_checkpoint / "inside", codable_checkpoint.parent):
        with pytest.raises(ConfigError, match="writes beside the source"):
            pack(codable_checkpoint, out, device="cpu")
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="is there already"):
        pack(codable_checkpoint, tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="is there already"):
        pack(codable_checkpoint, tmp_path / "mine", device="cpu")


def test_a_file_with_gaps_is_refused(codable_checkpoint: Path, tmp_path: Path) -> None:
    gappy = Path(shutil.copytree(codable_checkpoint, tmp_path / "gappy"))
    path = sorted(gappy.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="4 bytes after its tensors"):
        pack(gappy, tmp_path / "out", device="cpu")


def failing_after(shards: int, error: BaseException) -> Callable[..., None]:
    """Return a ``pack_shard`` that raises half-way through the shard after the first ``shards``."""
    really, calls = packing.pack_shard, []

    def pack_shard(source: Path, target: Path, *rest: object, **options: object) -> None:
        calls.append(source)
        if len(calls) > shards:
            target.write_bytes(b"half")
            raise error
        really(source, target, *rest, **options)  # type: ignore[arg-type]

    return pack_shard


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_packing_goes_on(
    codable_checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_shard", failing_after(1, error))
        expected = UnavailableError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            pack(codable_checkpoint, out, device="cpu")
    if isinstance(error, OSError):
        assert "the disk is full; 1 of" in str(caught.value)
        assert "it continues there" in str(caught.value)
    kept = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(kept) == 1
    assert not out.exists()
    finished = kept[0].stat().st_mtime_ns
    pack(codable_checkpoint, out, device="cpu")
    assert (out / kept[0].name).stat().st_mtime_ns == finished
    assert contents(out) == contents(folder)
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_changed_does_not_go_on(
    codable_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(codable_checkpoint, tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_shard", failing_after(1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", device="cpu")
    sorted(source.glob("*.safetensors"))[0].touch()
    with pytest.raises(CheckpointError, match=r"out\.partial: was begun from another source"):
        pack(source, tmp_path / "out", device="cpu")


def test_other_files_come_along_and_folders_do_not(codable_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(codable_checkpoint, tmp_path / "source"))
    (source / "notes.txt").write_text("mine")
    (source / "onnx").mkdir()
    with pytest.warns(UserWarning, match="folders are left out: onnx"):
        out = pack(source, tmp_path / "out", device="cpu")
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "onnx").exists()


def test_a_synthetic_checkpoint_stays_synthetic(tmp_path: Path) -> None:
    from djinn.weights.resolve import is_synthetic, resolve
    from djinn.weights.synthetic_checkpoint import synthesise

    packed = pack(synthesise("llama-tiny", tmp_path / "tiny", progress=False), tmp_path / "packed", device="cpu")
    assert is_synthetic(resolve(str(packed)))
    assert json.loads((packed / "digests.json").read_text())["synthetic"]
