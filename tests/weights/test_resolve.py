"""Checkpoints: folders, synthetic names and hub ids become a folder, or an error that says what to do."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fsspec.implementations.local import LocalFileSystem
from httpx import Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.weights import resolve as checkpoint_module
from djinn.weights import synthetic_checkpoint
from djinn.weights.resolve import UNWANTED_FILES, WANTED_FILES, is_synthetic, outline, resolve
from djinn.weights.shards import read_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_checkpoint.synthesise("gpt2-tiny", tmp_path_factory.mktemp("checkpoint") / "c", progress=False)


def test_a_local_folder_is_itself(folder: Path) -> None:
    assert resolve(str(folder)) == folder
    assert is_synthetic(folder)


def test_a_trained_checkpoint_is_not_synthetic(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path
    assert not is_synthetic(tmp_path)


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        resolve(str(tmp_path))


def test_an_unfinished_synthetic_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = synthetic_checkpoint.read_manifest(folder)
    assert manifest is not None
    (tmp_path / synthetic_checkpoint.MANIFEST).write_text(
        manifest.model_copy(update={"complete": False}).model_dump_json()
    )
    with pytest.raises(CheckpointError, match="unfinished"):
        resolve(str(tmp_path))


def test_a_synthetic_name_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "CHECKPOINT_DIR", tmp_path)
    made = resolve("synthetic:gpt2-tiny", seed=2, dtype="float16")
    assert made == tmp_path / "gpt2-tiny-float16-seed2"
    assert is_synthetic(made)
    written = (made / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    assert resolve("synthetic:gpt2-tiny", seed=2, dtype="float16") == made
    assert (made / "model-00001-of-00003.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="no architecture 'gpt5'"):
        resolve("synthetic:gpt5")


@pytest.mark.parametrize(
    "model", ["nothing-here", "./org/name", "/no/such/folder", "org/name@", "örg/name", "o--rg/name"]
)
def test_neither_folder_nor_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .* and not a hub id either"):
        resolve(model)


def test_a_hub_id_is_fetched_at_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fetch(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fetch)
    assert resolve(f"org/name-7b.v2@{COMMIT}") == folder
    assert asked["repo"] == "org/name-7b.v2"
    assert asked["revision"] == COMMIT


@pytest.mark.parametrize("model", ["org/name", "org/name@main"])
def test_an_unpinned_hub_id_is_warned_about(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "snapshot_download", lambda repo, **options: str(folder))
    with pytest.warns(UserWarning, match="org/name is not pinned to a commit"):
        resolve(model)


def test_offline_says_what_else_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match=f"org/name@{COMMIT}: .*cannot be reached.*synthetic:"):
        resolve(f"org/name@{COMMIT}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "gated; accept its licence at https://huggingface.co/org/name"),
        (RepositoryNotFoundError, "no such folder here and no such repository on the hub"),
        (RevisionNotFoundError, f"the hub has org/name but no revision '{COMMIT}'"),
    ],
)
def test_what_the_hub_refuses(error: type, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo: str, **options: object) -> str:
        raise error("refused", response=Response(404, request=Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=message):
        resolve(f"org/name@{COMMIT}")


class Hub(LocalFileSystem):
    """A hub whose one repository is a folder; remembers how much of it was read."""

    cachable = False

    def __init__(self, folder: Path, revision: str) -> None:
        super().__init__()
        self.folder, self.revision, self.read = folder, revision, 0

    def glob(self, path: str, revision: str) -> list[str]:  # type: ignore[override]
        assert revision == self.revision
        return [f"org/name/{file.name}" for file in self.folder.glob(path.removeprefix("org/name/"))]

    def open(self, path: str, revision: str, block_size: int) -> Any:  # type: ignore[override]
        assert revision == self.revision
        file = super().open(str(self.folder / path.removeprefix("org/name/")), "rb")
        hub, read = self, file.read

        def counted(length: int) -> bytes:
            hub.read += length
            return bytes(read(length))

        file.read = counted
        return file

    def snapshot_download(self, repo: str, **options: Any) -> str:
        assert (repo, options["revision"]) == ("org/name", self.revision)
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not in the cache")
        for file in self.folder.glob("*.json"):
            shutil.copy(file, options["local_dir"])
        return str(options["local_dir"])


def test_of_a_hub_id_only_headers_are_fetched_for_a_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder, COMMIT)
    monkeypatch.setattr(checkpoint_module, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(checkpoint_module, "HfFileSystem", lambda: hub)
    hollow = Path(outline(f"org/name@{COMMIT}", tmp_path / "hollow"))
    there, here = read_checkpoint(folder), read_checkpoint(hollow)
    assert here.keys() == there.keys()
    assert all((here[name].shape, here[name].dtype) == (entry.shape, entry.dtype) for name, entry in there.items())
    shards = list(hollow.glob("*.safetensors"))
    assert [shard.stat().st_size for shard in shards] == [(folder / shard.name).stat().st_size for shard in shards]
    assert hub.read < 0.1 * sum(shard.stat().st_size for shard in shards)
    assert sum(512 * shard.stat().st_blocks for shard in shards) <= hub.read + 4096 * len(shards)


def test_what_is_here_is_outlined_by_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outline(str(folder), tmp_path) == str(folder)
    assert outline("synthetic:gpt2-tiny", tmp_path) == "synthetic:gpt2-tiny"
    monkeypatch.setattr(checkpoint_module, "snapshot_download", lambda repo, **options: str(folder))
    assert outline(f"org/name@{COMMIT}", tmp_path / "none") == str(folder)
    assert not (tmp_path / "none").exists()


def test_a_cache_that_lacks_a_shard_is_not_taken_for_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "cache"
    partial.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, partial)
    hub = Hub(folder, COMMIT)

    def download(repo: str, **options: Any) -> str:
        return str(partial) if options.get("local_files_only") else hub.snapshot_download(repo, **options)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    monkeypatch.setattr(checkpoint_module, "HfFileSystem", lambda: hub)
    assert outline(f"org/name@{COMMIT}", tmp_path / "hollow") == str(tmp_path / "hollow")


def test_a_plan_without_a_connection_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match="cannot be reached"):
        outline(f"org/name@{COMMIT}", tmp_path / "hollow")


def test_what_is_fetched_is_what_transformers_reads() -> None:
    read = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
        "merges.txt", "vocab.txt", "bpe.codes", "spiece.model", "sentencepiece.bpe.model", "prophetnet.tokenizer",
        "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "consolidated.00.pth", "modeling_own.py",
        "original/params.json", "original/tokenizer.model", "onnx/model.onnx", "fp16/model.safetensors", "README.md",
    ]  # fmt: skip
    kept = filter_repo_objects([*read, *others], allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
    assert list(kept) == read
