"""Commands about one model: plan, generate, synth, pack, unpack."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from djinn.cli.options import (
    Budget,
    Chunk,
    CodingOption,
    Device,
    Figure,
    Gpus,
    HitRate,
    HostCompute,
    HostMemory,
    HostThreads,
    Json,
    Model,
    NewTokens,
    OtherDevice,
    OtherDisk,
    OtherLink,
    OtherMachine,
    OtherRam,
    PromptTokens,
    Ring,
    RunDevice,
)
from djinn.cli.ranks import is_first, is_rank, run_as_ranks
from djinn.cli.show import print_generated, print_json, print_paths, print_tensor_sizes, say, working
from djinn.errors import ConfigError, PlanError
from djinn.sizes import parse_bytes
from djinn.text import printable

if TYPE_CHECKING:
    from djinn.cli.outlook import Machine
    from djinn.planning.outlook import Forecast

_IMPORTING = "importing torch and transformers"


def plan(
    model: Model,
    budget: Budget,
    ring: Ring = None,
    host_memory: HostMemory = None,
    prompt_tokens: PromptTokens = 512,
    new_tokens: NewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    coding: CodingOption = None,
    host_compute: HostCompute = False,
    host_threads: HostThreads = None,
    hit_rate: HitRate = None,
    gpus: Gpus = 1,
    device: OtherDevice = None,
    machine: OtherMachine = None,
    link: OtherLink = None,
    disk: OtherDisk = None,
    ram: OtherRam = None,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Say where the weights would be, and how fast that is, without loading anything."""
    with working(_IMPORTING) as line:
        from djinn.cli import outlook
        from djinn.engine.forecast import forecast

        there = outlook.machine(machine, device, link=link, disk=disk, ram=ram)
        line.update("reading the weights' headers and planning")

        def planned(there: Machine) -> Forecast:
            return forecast(
                model,
                budget=budget,
                device=there.device,
                rates=there.rates,
                free=there.free,
                ring=ring,
                host_memory=host_memory,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                batch=batch,
                coding=coding,  # type: ignore[arg-type]
                host_compute=host_compute,
                host_threads=host_threads,
                cores=there.cores,
                hit_rate=hit_rate,
                gpus=gpus,
            )

        try:
            found = planned(there)
        except PlanError as refused:
            if there.elsewhere is None:
                raise
            there = there.elsewhere
            try:
                found = planned(there)
            except PlanError:  # it is not this machine's memory
                raise refused from None
    outlook.print_forecast(found, there, as_json)
    if figure is not None:
        with working("drawing"):
            drawn = outlook.draw(found, there, model, figure)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            print_paths(drawn)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    budget: Budget,
    new_tokens: NewTokens = 32,
    ring: Ring = None,
    host_memory: HostMemory = None,
    chunk: Chunk = "64 MiB",
    coding: CodingOption = None,
    host_compute: HostCompute = False,
    host_threads: HostThreads = None,
    device: RunDevice = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    gpus: Gpus = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the weights, and say how fast that was, and what limited it."""
    if gpus > 1 and not is_rank():
        from djinn.weights.resolve import resolve

        resolve(model)  # once, not by each rank: it may have to be fetched or written
        run_as_ranks(gpus, sys.argv[1:])
        return
    with working(_IMPORTING):
        from transformers.distributed import DistributedConfig

        from djinn.bench.generation import generate as run
        from djinn.devices import require_here
        from djinn.planning.request import Request
        from djinn.planning.workspace import Workload
        from djinn.weights.resolve import resolve

        request = Request.of(
            budget=budget,
            keep=Workload(prompt_tokens=1, new_tokens=new_tokens, batch=1),
            device=device,
            ring=ring,
            host_memory=host_memory,
            chunk=chunk,
            coding=coding,  # type: ignore[arg-type]
            host_compute=host_compute,
            host_threads=host_threads,
        )
        require_here(request.device)
    folder = resolve(model)  # one that is fetched or written shows its own progress
    with working("starting") as line:

        def show(text: str) -> None:
            line.stop()
            # A pipe gets the text as it is; a terminal would obey what is in it.
            typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)

        made = run(
            str(folder),
            prompt,
            request,
            temperature=temperature,
            seed=seed,
            chat=chat,
            distributed_config=DistributedConfig(tp_plan="auto") if gpus > 1 else None,
            show=show if is_first() and not as_json else None,
            say=line.update,
        )
    if not is_first():
        return
    if as_json:
        print_json(asdict(made))
    else:
        print_generated(made, parse_bytes(budget), gpus)


def synth(
    architecture: Annotated[str, typer.Argument(help="A name of data/architectures, such as llama-2-13b.")],
    output_dir: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: str = "bfloat16",
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back against the digests.")] = False,
) -> None:
    """Write a real sharded checkpoint of seeded random weights; an interrupted one is continued."""
    from djinn.weights import synthetic_checkpoint as synthesis

    folder = synthesis.synthesise(architecture, output_dir, seed=seed, dtype=dtype)
    synthesis.verify(folder, full=verify)
    say(folder)


def pack(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what coding would save, and write nothing.")] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="Cut for so many GPUs: a file for each, which only as many can load.")
    ] = 1,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Code a checkpoint without loss, once; an interrupted packing is continued."""
    import djinn
    from djinn.engine.rank_packing import survey

    if dry_run:
        sizes = survey(model, ranks=ranks, device=device)
    elif out is None:
        raise ConfigError("pack: name the folder to write, or say --dry-run")
    else:
        sizes = survey(djinn.pack(model, out, ranks=ranks, device=device, progress=True), device=device)
    print_tensor_sizes(list(sizes), as_json)


def unpack(
    folder: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    device: Device = None,
) -> None:
    """Write the files that a packed checkpoint was made from, byte for byte."""
    import djinn

    say(djinn.unpack(folder, out, device=device, progress=True))
