"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ProfileName = Annotated[str, typer.Option("--profile", help="A name that `djinn profiles` lists, or a .yaml file.")]
Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id (org/name@revision) or synthetic:<name>.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Another model than the profile's.")]
Budget = Annotated[str, typer.Option(help="The most device memory to use: '4 GB', '24 GiB'.")]
Ring = Annotated[str | None, typer.Option(help="Device ring; the plan chooses by default.")]
HostMemory = Annotated[str | None, typer.Option(help="The most page-locked host memory for weights.")]
Chunk = Annotated[str, typer.Option(help="Size of one copy command.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of the prompt to keep device memory for.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens to generate.")]
OutputDir = Annotated[Path | None, typer.Option(help="Run directory.  [default: in artifact/runs]")]
RunDir = Annotated[Path, typer.Argument(help="A run directory with results.")]
Runs = Annotated[int | None, typer.Option(min=1, help="Runs of each point.  [default: the profile's]")]
CodingOption = Annotated[
    str | None, typer.Option("--coding", help="lossless or none; by default weights stay as they are stored.")
]
ProfileCoding = Annotated[str | None, typer.Option("--coding", help="lossless or none; the profile's by default.")]
Device = Annotated[str | None, typer.Option(help="Where tensors are coded.  [default: a GPU where there is one]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
