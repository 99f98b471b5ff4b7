"""The true weights of what streams, from where they wait: in host memory, or in their files."""

from __future__ import annotations

import numpy as np
import torch

from djinn.codec.decode import decode
from djinn.errors import CheckpointError
from djinn.weights.tensors import Decoded, FileSpan, Stacked, TensorEntry
from djinn.weights.units import PlacedTensor, Unit


def waiting_weights(unit: Unit, tensor: PlacedTensor, image: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor of ``unit`` in host memory, as a model computes with it; ``image`` is None where it is on disk.

    Copied are only those that lie on a GPU, are coded, or are stored in parts. Experts' raw weights in host memory are
    a view with gaps between them, where their other tensors lie.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    if not unit.experts or image is None:
        return tensor.entry.view(stored_bytes(tensor, image))
    first = next(part for part in unit.experts[0].tensors if part.name == tensor.name)
    entry = tensor.entry
    if first.entry.layout is None:
        each = unit.experts[0].image_bytes // entry.dtype.itemsize
        within = torch.empty(entry.shape, device="meta").stride()[1:]
        weights = own(image[first.offset :]).view(entry.dtype)
        return weights.as_strided(entry.shape, (each, *within))
    raw = torch.empty(entry.raw_bytes, dtype=torch.uint8)
    left = raw
    for expert, start in zip(unit.experts, unit.expert_offsets, strict=True):
        for part in expert.tensors:
            layout = part.entry.layout
            if part.name == tensor.name and layout is not None:
                at = start + part.offset
                decode(image[at : at + layout.nbytes], layout, left[: layout.decoded_bytes])
                left = left[layout.decoded_bytes :]
    return own(raw).view(entry.dtype).view(entry.shape)


def stored_bytes(tensor: PlacedTensor, image: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor's raw bytes (uint8, one dimension) in host memory, in a storage of their own.

    Copied are only those that lie on a GPU, are coded, or come from several places. Without an ``image`` they are a
    private map of their file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    entry = tensor.entry
    stored = mapped(entry) if image is None else own(image[tensor.offset : tensor.offset + entry.nbytes].cpu())
    return _decoded(stored, entry)


def _decoded(stored: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    if entry.layout is None:
        return stored
    if stored.data_ptr() % 16:
        stored = stored.clone()
    raw = torch.empty(entry.layout.decoded_bytes, dtype=torch.uint8)
    decode(stored, entry.layout, raw)
    return own(raw[: entry.raw_bytes])


def own(host: torch.Tensor) -> torch.Tensor:
    """Return the same host memory as a storage of exactly these bytes, so that who saves it saves no more."""
    return torch.from_numpy(host.numpy()) if host.numel() else torch.empty(0, dtype=torch.uint8)


def mapped(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor's bytes: a map of them in their file, or what is decoded, or joined from several places."""
    if isinstance(entry.source, Stacked):
        return torch.cat([mapped(part) for part in entry.parts])
    source, nbytes = entry.source, entry.nbytes
    if isinstance(source, Decoded):
        return _decoded(mapped(source.coded), source.coded)
    assert isinstance(source, FileSpan)
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        return torch.from_numpy(np.memmap(source.path, np.uint8, "c", source.offset, (nbytes,)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.path}: cannot be read any more: {error}") from error
