"""What streaming costs beside copies: decoding coded weights, and the host's time for units and for split modules.

The host's time is measured on models so small that they compute nothing. Passes of one that streams are compared with
passes of the same one resident, and passes of one that is split over two processes, of which only this one exists, with
one that is not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field

from djinn.bench.rates.compute import median_s, modules_of, small_model, times_of_host
from djinn.codec.decode import Decoder
from djinn.codec.encode import encode
from djinn.engine.load import detach, placement
from djinn.engine.offload import offload
from djinn.engine.sharding import filled, pretended
from djinn.engine.split_linear import shorten
from djinn.errors import UnavailableError
from djinn.planning.rates import Rates
from djinn.planning.workspace import CUDA_OVERHEAD_BYTES
from djinn.weights.models import empty_model

_CODED = 2**25
"""Weights of the tensor that is decoded: as many as a matrix of a model of 7 billion has."""
_CODED_ON_CPU = 2**21
_LAYERS = 16
_SHARE, _WORKSPACE_BYTES = 0.5, 4 * 2**20
"""Of the small model's weights that fit on the device beside this workspace."""


class Streaming(BaseModel):
    """What streaming and splitting take on one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_gbps: float | None = Field(default=None, gt=0, le=10**9)
    """Bytes of bfloat16 that coded weights become in a second, in 10^9; None where they cannot be decoded."""
    unit_s: float = Field(ge=0, le=10**9)
    """Host seconds that a unit which streams takes, beside its module's."""
    split_s: float | None = Field(default=None, ge=0, le=10**9)
    """Host seconds that a module with weights takes more where its model is split over GPUs; None where none are."""

    def beside(self, rates: Rates) -> Rates:
        """Return ``rates`` with these."""
        decode = None if self.decode_gbps is None else 1e9 * self.decode_gbps
        return replace(rates, decode=decode, unit_s=self.unit_s, split_s=self.split_s or 0.0)


def measure(device: torch.device) -> Streaming:
    """Measure ``device``, but for what splitting takes (:func:`split_s`); takes seconds."""
    return Streaming(decode_gbps=_decode_gbps(device), unit_s=_unit_s(device))


def _decode_gbps(device: torch.device) -> float | None:
    elements = _CODED if device.type == "cuda" else _CODED_ON_CPU
    weights = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    try:
        coded = encode(weights)
        assert coded is not None, "normally distributed weights gain by coding"
        blob, layout = coded
        run = Decoder(layout, blob, torch.empty(layout.decoded_bytes, dtype=torch.uint8, device=device))
    except UnavailableError:
        return None
    return weights.nbytes / median_s(run, device) / 1e9


def _unit_s(device: torch.device) -> float:
    model = small_model(_LAYERS, device)
    resident_s, _ = times_of_host(model, device)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    libraries_bytes = CUDA_OVERHEAD_BYTES if device.type == "cuda" else 0
    offload(
        model,
        budget=_WORKSPACE_BYTES + libraries_bytes + round(_SHARE * nbytes),
        workspace=_WORKSPACE_BYTES,
        example={"input_ids": ids},
        device=str(device),
    )
    try:
        streamed_s, _ = times_of_host(model, device)
        units = len(placement(model).streamed)
    finally:
        detach(model)
    return max(streamed_s - resident_s, 0.0) / units


def split_s(device: torch.device) -> float:
    """Return the host seconds that a module with weights takes more where its model is split; takes a second."""
    whole = small_model(_LAYERS, device)
    resident_s, _ = times_of_host(whole, device)
    weights = {name: parameter.detach().cpu() for name, parameter in whole.named_parameters()}
    with pretended(2) as config:
        split = filled(empty_model(whole.config, torch.bfloat16), config, device, lambda name, _: weights[name])
        list(shorten(split))
        seconds, _ = times_of_host(split.eval(), device)
    return max(seconds - resident_s, 0.0) / modules_of(whole)
