"""Hostile and damaged packed files, and what goes wrong while one is written: a message, and the next call goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_cases import normal
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import djinn
from djinn.cli import main
from djinn.codec.checksums import checksums, verify
from djinn.codec.encode import encode
from djinn.codec.layout import TILE, Layout, sections
from djinn.errors import CheckpointError, DjinnError, UnavailableError
from djinn.weights import converted_folder
from djinn.weights import pack as packing
from djinn.weights.pack import pack, unpack

WORK = {"prompt_tokens": 8, "new_tokens": 4, "device": "cpu"}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint of two shards, one of them with a tensor large enough to be coded; no model of it."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shards = {"a.safetensors": {"w": normal(2**20).view(1024, 1024)}, "b.safetensors": {"v": torch.ones(5)}}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    return pack(plain, tmp_path / "packed", device="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Blobs whose counts lie. The checksums are the file's own, so they are right.


def blob(elements: int = 5 * TILE) -> tuple[torch.Tensor, Layout]:
    made = encode(normal(elements))
    assert made is not None
    return made


def _first(off: torch.Tensor) -> None:
    off[0] = 1


def _last(off: torch.Tensor) -> None:
    off[-1] += 1


def _far(off: torch.Tensor) -> None:
    off[2] = -1  # 2^32 - 1


def _falling(off: torch.Tensor) -> None:
    off[2] = 0


def _shifted(off: torch.Tensor) -> None:
    off[1:-1] += 1


@pytest.mark.parametrize("change", [_first, _last, _far, _falling, _shifted])
def test_a_blob_whose_offsets_lie_is_refused(change: Callable[[torch.Tensor], None]) -> None:
    stored, layout = blob()
    change(sections(stored, layout).off)
    with pytest.raises(CheckpointError, match="w: section off does not count the escapes"):
        verify(stored, layout, checksums(stored, layout), "w")


@pytest.mark.parametrize("bits", [0xFF, 0x80, 0x01])
def test_a_blob_whose_planes_hold_other_counts_is_refused(bits: int) -> None:
    stored, layout = blob()
    planes = sections(stored, layout).planes
    planes[1, :, 7] = bits if int(planes[1, 0, 7] & planes[1, 1, 7] & planes[1, 2, 7]) != bits else 0
    with pytest.raises(CheckpointError, match="section off"):
        verify(stored, layout, checksums(stored, layout), "w")


@pytest.mark.parametrize("elements", [1, TILE - 1, TILE, 3 * TILE + 5])
@pytest.mark.parametrize("spread", [0.02, None])
def test_whatever_the_encoder_makes_passes(elements: int, spread: float | None) -> None:
    bits = torch.randint(-(2**15), 2**15, (elements,), generator=torch.Generator().manual_seed(elements))
    weights = normal(elements) if spread else bits.to(torch.int16).view(torch.bfloat16)
    made = encode(weights, min_gain=-float("inf"))
    assert made is not None
    verify(made[0], made[1], checksums(*made), "w")


# Descriptions.


def describe(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of a packed file, checksum included; its header keeps its length."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    description = json.loads(header["__metadata__"]["djinn"])
    changed = change(description)
    text = changed if isinstance(changed, str) else json.dumps(description if changed is None else changed)
    header["__metadata__"] |= {"djinn": text, "djinn_crc32": f"{zlib.crc32(text.encode()):08x}"}
    body = json.dumps(header, separators=(",", ":")).encode()
    length = max(length, len(body))
    path.write_bytes(length.to_bytes(8, "little") + body.ljust(length) + raw[8 + int.from_bytes(raw[:8], "little") :])


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda _: [],
    "a number": lambda _: 5,
    "deep": lambda _: "[" * 99999,
    "no tensors": lambda it: it.pop("tensors") and None,
    "tensors a list": lambda it: it.update(tensors=[]),
    "tensors of other names": lambda it: it["tensors"].update(x={}),
    "a tensor that is a number": lambda it: it["tensors"].update(w=5),
    "no header": lambda it: it.pop("header") and None,
    "a header that is a number": lambda it: it.update(header=5),
    "a header with a surrogate": lambda it: it.update(header="\udcff"),
    "a deep header": lambda it: it.update(header="[" * 99999),
    "infinite elements": lambda it: it["tensors"]["w"].update(elements=float("inf")),
    "text for elements": lambda it: it["tensors"]["w"].update(elements="1048576"),
    "escapes below 0": lambda it: it["tensors"]["w"].update(escapes=-1),
    "true escapes": lambda it: it["tensors"]["w"].update(escapes=True),
    "no checksums": lambda it: it["tensors"]["w"].pop("crc32") and None,
    "checksums that are numbers": lambda it: it["tensors"]["w"]["crc32"].update(sm=5),
    "checksums that are none": lambda it: it["tensors"]["w"].update(crc32=None),
    "gaps": lambda it: it.update(header=it["header"].replace("[0,2097152]", "[4000000000,4002097152]")),
    "another version": lambda it: it.update(version=[2]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_description_that_is_none_is_refused_and_leaves_nothing(packed: Path, tmp_path: Path, what: str) -> None:
    describe(packed / "a.safetensors", CHANGES[what])
    out = tmp_path / "out"
    for take in (lambda: unpack(packed, out, device="cpu"), lambda: djinn.load(packed, budget="1 GB", **WORK)):  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            take()
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("value", [5, None, {}, ["a"]])
def test_metadata_that_is_no_text_is_refused(packed: Path, tmp_path: Path, value: object) -> None:
    path = packed / "a.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["djinn"] = value
    path.write_bytes(raw[:8] + json.dumps(header).encode().ljust(length)[:length] + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the header is not safetensors'"):
        unpack(packed, tmp_path / "out", device="cpu")


def test_one_shard_packed_and_one_not_loads_as_the_whole(codable_checkpoint: Path, tmp_path: Path) -> None:
    mixed = pack(codable_checkpoint, tmp_path / "mixed", device="cpu")
    first = sorted(codable_checkpoint.glob("*.safetensors"))[0]
    shutil.copy(first, mixed / first.name)
    prompt = torch.arange(5, 12)[None]
    models = [djinn.load(folder, budget="2 GB", **WORK) for folder in (codable_checkpoint, mixed)]  # type: ignore[arg-type]
    assert torch.equal(models[0](prompt).logits, models[1](prompt).logits)


# Interruptions.


@pytest.mark.parametrize("shards", [0, 1])
@pytest.mark.parametrize(
    "error", [ValueError("odd"), OSError(errno.ENOSPC, "full"), CheckpointError("odd"), KeyError(1)]
)
def test_after_any_error_the_same_call_goes_on(
    plain: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, shards: int
) -> None:
    really = packing.pack_shard
    done: list[Path] = []

    def fails(source: Path, target: Path, *rest: object, **options: object) -> None:
        if len(done) == shards:
            target.write_bytes(b"half")
            raise error
        done.append(source)
        really(source, target, *rest, **options)  # type: ignore[arg-type]

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_shard", fails)
        with pytest.raises((type(error), DjinnError)):
            pack(plain, out, device="cpu")
    assert out.with_name("out.partial").exists() == bool(shards)
    assert contents(pack(plain, out, device="cpu")) == contents(packed)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 99999])
def test_a_note_that_is_cut_off_has_begun_nothing(plain: Path, packed: Path, tmp_path: Path, text: str) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "packing.json").write_text(text)
    (partial / ".packing.json.part").write_text("")
    assert contents(pack(plain, tmp_path / "out", device="cpu")) == contents(packed)


def test_a_full_disk_while_the_note_is_written(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        path.write_text(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(converted_folder, "write_text", full)
        with pytest.raises(UnavailableError, match="the disk is full; 0 of 2"):
            pack(plain, tmp_path / "out", device="cpu")
    pack(plain, tmp_path / "out", device="cpu")


def test_a_finished_packing_run_again_says_so(plain: Path, packed: Path, tmp_path: Path) -> None:
    before = contents(packed)
    with pytest.warns(UserWarning, match="is finished already, from this source"):
        assert pack(plain, packed, device="cpu") == packed
    assert contents(packed) == before
    back = unpack(packed, tmp_path / "back", device="cpu")
    with pytest.warns(UserWarning, match="is finished already"):
        unpack(packed, back, device="cpu")
    result = CliRunner().invoke(main, ["unpack", str(packed), str(back), "--device", "cpu"])
    assert result.exit_code == 0


@pytest.mark.parametrize("what", ["weights", "file", "lost", "more", "shard"])
def test_a_folder_from_another_source_is_not_taken_for_finished(plain: Path, packed: Path, what: str) -> None:
    if what == "weights":
        tensors = load_file(plain / "a.safetensors")
        tensors["w"][3, 3] += 1
        save_file(tensors, plain / "a.safetensors", {"format": "pt"})
    elif what == "file":
        (plain / "config.json").write_text('{"a": 1}')
    elif what == "lost":
        (packed / "config.json").unlink()
    elif what == "more":
        (packed / "more").write_text("")
    else:
        (packed / "a.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is there already; choose a folder"):
        pack(plain, packed, device="cpu")


def test_the_second_of_two_packers_finds_the_result_of_the_first(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    inside, go = threading.Event(), threading.Event()
    really = packing.pack_shard

    def slow(*arguments: Any, **options: Any) -> None:
        inside.set()
        assert go.wait(60)
        really(*arguments, **options)

    monkeypatch.setattr(packing, "pack_shard", slow)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert pack(plain, out, device="cpu") == out
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=work)
    first.start()
    assert inside.wait(60)
    second = threading.Thread(target=work)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    go.set()
    first.join(60)
    second.join(60)
    assert not errors
    assert not out.with_name("out.partial").exists()


# Links.


@pytest.mark.parametrize("kind", ["fifo", "device", "dangling", "loop"])
def test_what_is_no_file_is_not_copied(plain: Path, tmp_path: Path, kind: str) -> None:
    path = plain / "odd.txt"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": "odd.txt"}[kind])
    with pytest.raises(CheckpointError, match=r"odd\.txt: not"):
        pack(plain, tmp_path / "out", device="cpu")


def test_a_private_file_is_not_copied_through_a_link(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (plain / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"notes\.txt: links to .*private, out of the checkpoint"):
        pack(plain, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_packed(plain: Path, packed: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "commit"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in plain.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert contents(pack(snapshot, tmp_path / "out", device="cpu")) == contents(packed)


@pytest.mark.parametrize("planted", ["link", "hard link", "folder", "itself"])
def test_an_unfinished_folder_with_links_is_not_written_through(plain: Path, tmp_path: Path, planted: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    partial = tmp_path / "out.partial"
    if planted == "itself":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    else:
        partial.mkdir()
        state = {"what": "pack", "version": 1, "source": converted_folder._identity(plain)}
        (partial / "packing.json").write_text(json.dumps(state))
    if planted == "link":
        (partial / "config.json").symlink_to(victim)
    elif planted == "hard link":
        os.link(victim, partial / "config.json")
    elif planted == "folder":
        (partial / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"remove"):
        pack(plain, tmp_path / "out", device="cpu")
    assert victim.read_text() == "mine"
    assert not any((tmp_path / "elsewhere").glob("*"))


def test_a_sources_own_packing_note_is_refused(plain: Path, tmp_path: Path) -> None:
    (plain / "packing.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"packing\.json: has the name of the note"):
        pack(plain, tmp_path / "out", device="cpu")


def test_a_shard_in_a_folder_of_its_own_is_refused(plain: Path, tmp_path: Path) -> None:
    (plain / "sub").mkdir()
    (plain / "b.safetensors").rename(plain / "sub" / "b.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors", "v": "sub/b.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a packed checkpoint is one folder"):
        pack(plain, tmp_path / "out", device="cpu")
