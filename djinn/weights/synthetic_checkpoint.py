"""Synthetic checkpoints: a real sharded safetensors checkpoint of seeded random weights, resumable and verifiable.

The folder is what ``save_pretrained`` would write (config, generation config, tokenizer, shards, index) and one file
more: ``digests.json``, the manifest. It says that the weights are synthetic and which ones they are, and lists every
finished file with its size and the CRC-32 of each 16 MiB of it (CRC-32, because it keeps up with the disk on one core
and guards against damage, not against forgery). A shard enters the manifest once the disk has it, so whatever is
listed is kept when an interrupted run is started again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from djinn.errors import CheckpointError, ConfigError, UnavailableError
from djinn.sizes import format_bytes
from djinn.weights import synthetic_values
from djinn.weights.architectures import architecture_path, load_architecture
from djinn.weights.synthetic_shard import BLOCK_BYTES, Shard, lay_out, write_shard
from djinn.weights.tokenizer import byte_tokenizer

MANIFEST = "digests.json"
INDEX = "model.safetensors.index.json"
PARTIAL = ".partial"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in synthetic_values.MANTISSA_BITS}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Digest(BaseModel):
    """A finished file: its size in bytes, and the CRC-32 of each 16 MiB of it, eight hexadecimal digits apiece."""

    size: int
    crc32: str


class Manifest(BaseModel):
    """Which synthetic checkpoint a folder holds, and how much of it is there."""

    synthetic: bool = True
    architecture: str
    config_digest: str
    """SHA-256 of the architecture's config file, shortened: the same name may mean another model one day."""
    dtype: str
    seed: int
    complete: bool = False
    shard_bytes: int = 0
    """Bytes of all shards, finished or not."""
    files: dict[str, Digest] = {}

    @property
    def identity(self) -> str:
        """What must agree before a folder is continued."""
        return f"{self.architecture} (config {self.config_digest}), {self.dtype}, seed {self.seed}"


def synthesise(architecture: str, out: Path, *, seed: int = 0, dtype: str = "bfloat16", progress: bool = True) -> Path:
    """Write the synthetic checkpoint of ``architecture`` into folder ``out``, or finish it; return ``out``.

    A complete checkpoint is left as it is. ``AutoModelForCausalLM`` and ``AutoTokenizer`` load the folder offline.
    Where two processes are asked for the same folder, the second waits for the first.

    Args:
        architecture: one of :func:`djinn.weights.architectures.architecture_names`.
        out: the folder; made if it is not there.
        seed: which random model.
        dtype: "bfloat16", "float16" or "float32".
        progress: show a bar of the bytes written.

    Raises:
        ConfigError: an unknown architecture or dtype, or a negative seed.
        CheckpointError: ``out`` holds something else.
        UnavailableError: not enough disk, or a folder that cannot be written. What was finished stays.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"no synthetic dtype {dtype!r}; the dtypes are {', '.join(_DTYPES)}")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative; a seed is a whole number from 0")
    config_digest = hashlib.sha256(architecture_path(architecture).read_bytes()).hexdigest()[:16]
    wanted = Manifest(architecture=architecture, config_digest=config_digest, dtype=dtype, seed=seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            manifest = _continued(out, wanted)
            if not (manifest.complete and all(_is_whole(out, file, manifest) for file in manifest.files)):
                _write(out, manifest, progress)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UnavailableError(
                f"{out}: the disk is full: {_finished(out)}; free some space and run the same command again, "
                "it continues there"
            ) from error
        raise UnavailableError(f"{out}: cannot write the checkpoint: {error}") from error
    return out


def verify(folder: Path, full: bool = False) -> None:
    """Check every file of a synthetic checkpoint against its manifest: the size, and if ``full`` the digest.

    Raises:
        CheckpointError: no manifest, an unfinished checkpoint, or a file missing, truncated or damaged, named.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder}: no {MANIFEST}; this is not a synthetic checkpoint")
    if not manifest.complete:
        raise CheckpointError(f"{folder}: unfinished: {_finished(folder)}; synthesise it again, it continues there")
    for file, digest in manifest.files.items():
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; synthesise it again, what is whole is kept")
        if path.stat().st_size != digest.size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes where the manifest says {digest.size}; synthesise it again"
            )
        if full and (damaged := _first_difference(_digest(path).crc32, digest.crc32)) is not None:
            raise CheckpointError(
                f"{path}: damaged in the 16 MiB from byte {damaged * BLOCK_BYTES}; delete it and synthesise it again"
            )


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a synthetic checkpoint, or None where there is none.

    Raises:
        CheckpointError: a manifest that cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error}); delete the folder and synthesise it again") from None


def checkpoint_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that ``save_pretrained`` would write, under its name there, in model order.

    Tied tensors come once. Names are reverted entry by entry, because doing all at once sorts them alphabetically;
    that is the same as long as no entry of the file is put together from several of the model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: tuple(tensor.shape)
        for held, whole in model.state_dict().items()
        if held not in model.all_tied_weights_keys
        for name, tensor in revert_weight_conversion(model, {held: whole}).items()
    }


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder for this process; another that asks for it waits.

    Yields whether it is still there under its name: who held it before may have renamed or removed it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
    finally:
        os.close(descriptor)


def _continued(out: Path, wanted: Manifest) -> Manifest:
    manifest = read_manifest(out)
    if manifest is None:
        found = [path.name for path in sorted(out.iterdir()) if not path.name.endswith(PARTIAL)]
        if found:
            raise CheckpointError(f"{out}: holds {found[0]} and no {MANIFEST}; choose an empty folder")
        return wanted
    if manifest.identity != wanted.identity:
        raise CheckpointError(
            f"{out}: holds {manifest.identity}, not {wanted.identity}; choose another folder, or delete this one"
        )
    return manifest


def _write(out: Path, manifest: Manifest, progress: bool) -> None:
    config = load_architecture(manifest.architecture)
    config.dtype = _DTYPES[manifest.dtype]
    shards = lay_out(checkpoint_tensors(config), _DTYPES[manifest.dtype])
    for partial in out.glob(f"*{PARTIAL}"):
        partial.unlink()
    kept = {shard.file for shard in shards if _is_whole(out, shard.file, manifest)}
    manifest.complete = False
    manifest.files = {file: manifest.files[file] for file in kept}
    needed = sum(shard.size for shard in shards if shard.file not in kept)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UnavailableError(
            f"{out}: {format_bytes(needed)} are still to be written and {format_bytes(free)} are free; "
            f"free {format_bytes(needed - free)} or choose another disk"
        )
    manifest.shard_bytes = total = sum(shard.size for shard in shards)
    _save(out, manifest)

    bar = tqdm(
        total=total, initial=total - needed, unit="B", unit_scale=True, desc=manifest.architecture, disable=not progress
    )
    with bar:
        for shard in shards:
            if shard.file not in kept:
                partial = out / (shard.file + PARTIAL)
                try:
                    digests = write_shard(shard, partial, manifest.seed, bar.update)
                    partial.rename(out / shard.file)
                finally:
                    partial.unlink(missing_ok=True)
                manifest.files[shard.file] = Digest(size=shard.size, crc32="".join(f"{crc:08x}" for crc in digests))
                _save(out, manifest)

    # The small files need no temporary names: until the manifest says complete, the folder is not a checkpoint.
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    byte_tokenizer(config).save_pretrained(out)
    (out / INDEX).write_text(_index(shards))
    for path in sorted(out.iterdir()):
        if path.is_file() and path.name != MANIFEST and path.name not in manifest.files:
            manifest.files[path.name] = _digest(path)
    manifest.complete = True
    _save(out, manifest)


def _index(shards: list[Shard]) -> str:
    weights = sum(shard.size - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    return json.dumps({"metadata": {"total_size": weights}, "weight_map": weight_map}, indent=2) + "\n"


def _save(out: Path, manifest: Manifest) -> None:
    partial = out / (MANIFEST + PARTIAL)
    partial.write_text(manifest.model_dump_json(indent=2) + "\n")
    partial.rename(out / MANIFEST)


def _is_whole(out: Path, file: str, manifest: Manifest) -> bool:
    path = out / file
    return file in manifest.files and path.is_file() and path.stat().st_size == manifest.files[file].size


def _finished(folder: Path) -> str:
    manifest = read_manifest(folder)
    if manifest is None:
        return "nothing was finished"
    done = sum(digest.size for file, digest in manifest.files.items() if file.endswith(".safetensors"))
    return f"{format_bytes(done)} of {format_bytes(manifest.shard_bytes)} are finished and kept"


def _digest(path: Path) -> Digest:
    crcs = []
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crcs.append(f"{zlib.crc32(block[:count]):08x}")
    return Digest(size=path.stat().st_size, crc32="".join(crcs))


def _first_difference(found: str, wanted: str) -> int | None:
    """Return the first block whose digest differs, or None."""
    return next((k // 8 for k in range(0, len(wanted), 8) if found[k : k + 8] != wanted[k : k + 8]), None)
