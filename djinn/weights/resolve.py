"""Checkpoints: from what the user calls a model to a folder on this disk that holds its config and its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from djinn.errors import CheckpointError, DjinnError, UnavailableError
from djinn.places import CHECKPOINT_DIR
from djinn.weights.called import HUB_ID, SYNTHETIC, require_known
from djinn.weights.header import read_header
from djinn.weights.models import ADAPTER
from djinn.weights.packed_format import is_packed
from djinn.weights.shards import read_checkpoint
from djinn.weights.synthetic_checkpoint import read_manifest, synthesise, verify

_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.tokenizer", "*.model", "*.tiktoken", "*.codes", "*.txt"]
"""Weights, configs and every kind of vocabulary that transformers' tokenizers read."""
WANTED_FILES = [*_READ_FILES, "*.jinja"]
UNWANTED_FILES = ["consolidated*", *(f"*/{name}" for name in _READ_FILES)]
"""Other formats of the same weights; in folders lie chat templates alone."""


def synthetic_folder(architecture: str, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Return the folder where :func:`resolve` keeps a synthetic checkpoint, whether it is there or not."""
    return CHECKPOINT_DIR / f"{architecture}-{dtype}-seed{seed}"


def resolve(model: str, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Return a folder with the ``config.json`` and safetensors files of ``model``, making or fetching it if need be.

    Args:
        model: a local checkpoint folder; ``synthetic:<architecture>``, written to
            ``<architecture>-<dtype>-seed<seed>`` in :data:`djinn.places.CHECKPOINT_DIR` unless it is complete
            there; or a Hugging Face hub id with the commit that pins it, ``org/name@revision``, fetched into the hub's
            own cache.
        seed: of a synthetic model.
        dtype: of a synthetic model.

    Raises:
        CheckpointError: no such folder, a folder without config or safetensors files, an unfinished synthetic
            checkpoint, or a hub id or revision that does not exist or is gated.
        UnavailableError: the hub cannot be reached, or there is no room on the disk.
        ConfigError: an unknown synthetic architecture.
    """
    require_known(model)
    if model.startswith(SYNTHETIC):
        name = model.removeprefix(SYNTHETIC)
        return synthesise(name, synthetic_folder(name, seed=seed, dtype=dtype), seed=seed, dtype=dtype)
    folder = Path(model).expanduser().absolute()  # the working directory may change before it is read
    if folder.is_dir():
        _checked(folder)
        if is_synthetic(folder) and not is_packed(read_header(_shards(folder)[0])):
            verify(folder)  # what is packed has other sizes, and checksums of its own
        return folder
    repo, _, revision = model.partition("@")
    return _checked(_fetched(repo, revision or None))


def outline(model: str, into: Path) -> str:
    """Return what to index ``model`` by without having its weights: a folder ``into`` with the headers of a hub id's.

    Its safetensors files have their whole size, and take no room on the disk. What is on this disk already, or is no
    hub id, is returned as it is.

    Raises:
        CheckpointError, UnavailableError: as :func:`resolve`.
    """
    match = HUB_ID.fullmatch(model)
    if match is None or Path(model).expanduser().is_dir():
        return model
    repo, revision = match["repo"], match["revision"]
    with _hub_errors(repo, revision):
        try:
            cached = snapshot_download(repo, revision=revision, local_files_only=True)
            read_checkpoint(Path(cached))
            return cached
        except (LocalEntryNotFoundError, CheckpointError):  # not here, or not all of it
            into.mkdir(parents=True, exist_ok=True)
        snapshot_download(repo, revision=revision, allow_patterns=["*.json"], ignore_patterns=["*/*"], local_dir=into)
        hub = HfFileSystem()
        for path in hub.glob(f"{repo}/*.safetensors", revision=revision):
            name = path.rpartition("/")[2]
            if not name.startswith("consolidated"):
                _write_header(hub, path, revision, into / name)
    return str(_checked(into))


def is_synthetic(folder: Path) -> bool:
    """Return whether the weights in ``folder`` are seeded random numbers, as its manifest says.

    Raises:
        CheckpointError: a manifest that cannot be read.
    """
    manifest = read_manifest(folder)
    return manifest is not None and manifest.synthetic


def _shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{folder}: a PEFT adapter without the model that it was made for; load that model, and attach the "
                "adapter by peft.PeftModel.from_pretrained"
            )
        raise CheckpointError(f"{folder}: no config.json; this is not a checkpoint folder")
    if not _shards(folder):
        raise CheckpointError(f"{folder}: no *.safetensors files; djinn reads no other weights, so convert them first")
    return folder


def _write_header(hub: HfFileSystem, path: str, revision: str | None, target: Path) -> None:
    with hub.open(path, revision=revision, block_size=2**20) as remote, target.open("wb") as local:
        length = remote.read(8)
        local.write(length + remote.read(int.from_bytes(length, "little")))
        local.truncate(remote.size)


def _fetched(repo: str, revision: str | None) -> Path:
    with _hub_errors(repo, revision):
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
        )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Warn about a moving revision; what the hub refuses becomes an error that says what to do."""
    if revision is None or not _COMMIT.fullmatch(revision):
        warnings.warn(
            f"{repo} is not pinned to a commit, so its weights may change; write {repo}@<40-digit commit>", stacklevel=5
        )
    asked = repo if revision is None else f"{repo}@{revision}"
    try:
        yield
    except (DjinnError, MemoryError):
        raise
    except HFValidationError as error:
        raise CheckpointError(f"no folder {asked!r} here, and not a hub id either: {error}") from None
    except GatedRepoError:  # first, being a RepositoryNotFoundError as well
        raise CheckpointError(
            f"{asked}: gated; accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{asked}: the hub has {repo} but no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{asked}: no such folder here and no such repository on the hub, or a private one; "
            "check the name, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # of whatever the connection is made with
        raise UnavailableError(
            f"{asked}: no such folder here, not in the hub's cache, and the hub cannot be reached ({error}); "
            f"connect, or use a local folder or {SYNTHETIC}<architecture>"
        ) from error
