"""Encoding: a tensor's blob, or the layout that it would have, made on the device where the tensor is."""

from __future__ import annotations

import torch

from djinn.codec.backends import backend
from djinn.codec.layout import MIN_GAIN, Layout, sections


def encode(weights: torch.Tensor, min_gain: float = MIN_GAIN) -> tuple[torch.Tensor, Layout] | None:
    """Return the blob (uint8 [layout.nbytes], on the tensor's device) and its layout, or None where raw is better.

    ``weights`` may have any shape. Raw is better for a tensor that is not bfloat16, has no elements, or would shrink by
    less than the share ``min_gain`` of its bytes. With ``-math.inf`` it is coded even if it grows.
    """
    if not _codable(weights):
        return None
    flat = weights.detach().reshape(-1)
    coder = backend(flat.device)
    lut, escapes = coder.survey(flat)
    layout = Layout(len(flat), int(escapes.sum()))
    if not _gains(layout, min_gain):
        return None
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8, device=flat.device)
    parts = sections(blob, layout)
    parts.lut.copy_(lut)
    parts.off[1:] = escapes.cumsum(0)
    coder.write(flat, parts)
    return blob, layout


def layout_of(weights: torch.Tensor, min_gain: float = MIN_GAIN) -> Layout | None:
    """Return the layout of the blob that `encode` would make, in about half of its time; None where raw is better."""
    if not _codable(weights):
        return None
    flat = weights.detach().reshape(-1)
    _, escapes = backend(flat.device).survey(flat)
    layout = Layout(len(flat), int(escapes.sum()))
    return layout if _gains(layout, min_gain) else None


def _codable(weights: torch.Tensor) -> bool:
    return weights.dtype == torch.bfloat16 and weights.numel() > 0


def _gains(layout: Layout, min_gain: float) -> bool:
    return layout.nbytes <= (1 - min_gain) * layout.raw_bytes
