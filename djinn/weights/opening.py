"""Opening: from what the user calls a model to its index, with its weights or, for planning alone, without them."""

from __future__ import annotations

from pathlib import Path

import torch

from djinn.errors import CheckpointError
from djinn.weights.architectures import load_architecture
from djinn.weights.called import SYNTHETIC
from djinn.weights.header_index import header_index
from djinn.weights.index import WeightIndex, checkpoint_index, synthetic_index
from djinn.weights.models import empty_model
from djinn.weights.quantised import IN_MEMORY, quantisation_of, quantised_index, require_streamable
from djinn.weights.rank_files import rank_index, ranks_of
from djinn.weights.resolve import outline, resolve


def index_of(
    model: str | Path, spill: Path, device: torch.device, dtype: torch.dtype | None = None, seed: int = 0
) -> WeightIndex:
    """Return the index of what a user calls a model, to run on ``device``; ``seed`` is of a synthetic one.

    Raises:
        ConfigError, CheckpointError, UnavailableError: a model that cannot be had, or is damaged.
    """
    name = str(model)
    if name.startswith(SYNTHETIC):
        config = load_architecture(name.removeprefix(SYNTHETIC))
        return synthetic_index(empty_model(config, dtype or torch.bfloat16), seed)
    folder = resolve(name)
    ranks = ranks_of(folder)
    if ranks is not None:
        return rank_index(folder, ranks, dtype)
    method = quantisation_of(folder)
    if method is not None:
        require_streamable(folder, method)
    if method in IN_MEMORY:
        return quantised_index(folder, dtype, device)
    return checkpoint_index(folder, spill, dtype)


def outline_of(model: str | Path, spill: Path, device: torch.device, dtype: torch.dtype | None = None) -> WeightIndex:
    """Return the index of a model for planning alone: only headers are read, and of a hub id only they are fetched.

    A quantised checkpoint is loaded into host memory all the same.

    Raises:
        ConfigError, CheckpointError, UnavailableError: as for :func:`index_of`.
    """
    if str(model).startswith(SYNTHETIC):
        return index_of(model, spill, device, dtype)
    headers = spill / "outline"
    found = outline(str(model), headers)
    fetched = headers.is_dir()
    folder = headers if fetched else resolve(found)
    ranks = ranks_of(folder)
    if ranks is not None:
        return rank_index(folder, ranks, dtype)
    method = quantisation_of(folder)
    if method is None:
        return header_index(folder, dtype)
    require_streamable(Path(str(model)), method)
    if fetched:
        raise CheckpointError(f"{model}: quantised, so that headers do not tell its plan; fetch it first: hf download")
    return index_of(folder, spill, device, dtype)
