"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from djinn.errors import ConfigError
from djinn.names import coding_name, device_name
from djinn.sizes import parse_bytes, parse_rate


def _size(value: str | None) -> str | None:
    """Refuse a size that is none before anything is imported, which takes seconds."""
    if value is not None:
        parse_bytes(value)
    return value


def _rate(value: str | None) -> str | None:
    """Refuse a rate that is none, as early."""
    if value is not None:
        parse_rate(value)
    return value


def _machine(value: str | None) -> str | None:
    """Refuse a machine that nobody certified and no data sheet is of, as early."""
    from djinn.bench.data_sheets import sheet_of
    from djinn.bench.machines import certified_folder

    if value is not None and sheet_of(value) is None:
        certified_folder(value)
    return value


def _model(value: str | None) -> str | None:
    """Refuse what no model can be called, as early."""
    from djinn.weights.called import require_known

    if value is not None:
        require_known(value)
    return value


def _device(value: str | None) -> str | None:
    return None if value is None else device_name(value)


def _coding(value: str | None) -> str | None:
    return None if value is None else coding_name(value)


def _figure(value: Path | None) -> Path | None:
    """Refuse a kind of picture that is not drawn, before anything is planned."""
    if value is not None and value.suffix not in (".pdf", ".png"):
        raise ConfigError(f"figure {str(value)!r}: figures are .pdf and .png")
    return value


ProfileName = Annotated[str, typer.Option("--profile", help="A name that `djinn profiles` lists, or a .yaml file.")]
Model = Annotated[
    str,
    typer.Argument(callback=_model, help="Checkpoint folder, hub id (org/name@revision) or synthetic:<name>."),
]
OtherModel = Annotated[str | None, typer.Option("--model", callback=_model, help="Another model than the profile's.")]
Budget = Annotated[str, typer.Option(callback=_size, help="The most device memory to use: '4 GB', '24 GiB'.")]
OtherBudget = Annotated[str | None, typer.Option("--budget", callback=_size, help="Another budget than the profile's.")]
Ring = Annotated[str | None, typer.Option(callback=_size, help="Device ring; the plan chooses by default.")]
HostMemory = Annotated[str | None, typer.Option(callback=_size, help="The most page-locked host memory for weights.")]
Chunk = Annotated[str, typer.Option(callback=_size, help="Size of one copy command.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of the prompt to keep device memory for.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens to generate.")]
OtherMachine = Annotated[
    str | None,
    typer.Option(
        "--machine",
        callback=_machine,
        help="A machine of data/reference, a certified run's folder, or the data sheet of a card: "
        "L4, 4090, A100-PCIe, A100-SXM.  [default: this one]",
    ),
]
OtherLink = Annotated[
    str | None, typer.Option("--link", callback=_rate, help="Rate of the link to the GPU: '25 GB/s'.")
]
OtherDisk = Annotated[str | None, typer.Option("--disk", callback=_rate, help="Rate of the disk: '7 GB/s'.")]
OtherRam = Annotated[str | None, typer.Option("--ram", callback=_size, help="Host memory of that machine.")]
OutputDir = Annotated[Path | None, typer.Option(help="Run directory.  [default: in artifact/runs]")]
HitRate = Annotated[
    float | None,
    typer.Option("--hit-rate", min=0, max=1, help="Of picked experts found in the pool.  [default: picked evenly]"),
]
HostCompute = Annotated[
    bool,
    typer.Option("--host-compute", help="The host's cores compute beside the link: faster, not equal bits."),
]
HostThreads = Annotated[int | None, typer.Option(min=1, help="Cores that do so.  [default: all that can be spared]")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs that hold the model together, each over its own link.")]
OtherGpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Another number of GPUs than the profile's.")]
RunDir = Annotated[Path, typer.Argument(help="A run directory with results.")]
Runs = Annotated[int | None, typer.Option(min=1, help="Runs of each point.  [default: the profile's]")]
CodingOption = Annotated[
    str | None,
    typer.Option("--coding", callback=_coding, help="lossless or none; by default weights stay as they are stored."),
]
ProfileCoding = Annotated[
    str | None, typer.Option("--coding", callback=_coding, help="lossless or none; the profile's by default.")
]
Device = Annotated[
    str | None, typer.Option(callback=_device, help="Where tensors are coded.  [default: a GPU where there is one]")
]
RunDevice = Annotated[
    str | None, typer.Option("--device", callback=_device, help="cpu or cuda.  [default: a GPU where there is one]")
]
OtherDevice = Annotated[
    str | None, typer.Option("--device", callback=_device, help="cpu or cuda, here or not.  [default: the machine's]")
]
Figure = Annotated[
    Path | None, typer.Option(callback=_figure, help="Draw it too, as .png, .pdf and .csv of this name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
