"""The commands of ``djinn``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from djinn.cli.show import (
    exit_unless,
    print_generated,
    print_json,
    print_paths,
    print_records,
    print_table,
    print_tensor_sizes,
)
from djinn.errors import CheckpointError, ConfigError, DjinnError, PlanError, UnavailableError

if TYPE_CHECKING:
    from djinn.config import Profile


_BAD_INPUT = (ConfigError, CheckpointError, PlanError, UnavailableError)


class _Commands(TyperGroup):
    """Shows what the user can act on as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DjinnError as error:
            typer.echo(f"djinn: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, _BAD_INPUT) else 1) from None
        except OSError as error:
            if error.filename is None:  # not about a file that the user named
                raise
            typer.echo(f"djinn: {error.filename}: {error.strerror}", err=True)
            raise typer.Exit(2) from None


main = typer.Typer(
    name="djinn",
    cls=_Commands,
    help="Run language models larger than device memory by streaming their weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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


@main.command()
def profiles(as_json: Json = False) -> None:
    """List the profiles and what each needs."""
    from djinn.config import load_profile, profile_names
    from djinn.sizes import format_bytes

    found = [load_profile(name) for name in profile_names()]
    if as_json:
        print_json([profile.model_dump(mode="json") for profile in found])
        return
    print_table(
        ["profile", "what", "device", "budget", "RAM", "disk", "minutes"],
        [
            [p.name, p.title, p.device, *map(format_bytes, (p.budget, p.min_ram, p.min_disk)), f"{p.minutes:g}"]
            for p in found
        ],
    )


@main.command()
def certify(profile: ProfileName = "smoke_tiny", output_dir: OutputDir = None, as_json: Json = False) -> None:
    """Check this machine against what a profile needs, and prove streaming exact on a small model."""
    chosen = _profile(profile)

    from djinn.bench.certify import certify as run

    with redirect_stdout(sys.stderr):
        certification = run(chosen, _run_dir(output_dir, chosen))
    if as_json:
        typer.echo(certification.model_dump_json(indent=2))
    else:
        frame = certification.frame()
        print_table(list(frame.columns), frame.to_numpy().tolist())
    exit_unless(certification.ok)


@main.command()
def plan(
    model: Model,
    budget: Budget,
    ring: Ring = None,
    host_memory: HostMemory = None,
    prompt_tokens: PromptTokens = 512,
    new_tokens: NewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    coding: CodingOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, here or not.  [default: the machine's]")] = None,
    machine: Annotated[
        str | None, typer.Option(help="A machine of data/reference, or a certified run's folder.  [default: this one]")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw it too: a .png or .pdf file.")] = None,
    as_json: Json = False,
) -> None:
    """Say where the weights would be, and how fast that is, without loading anything."""
    from djinn.cli import outlook
    from djinn.engine.forecast import forecast

    there = outlook.machine(machine, device)
    found = forecast(
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
    )
    outlook.print_forecast(found, there, as_json)
    if figure is not None:
        outlook.draw(found, there, model, figure)


@main.command()
def synth(
    architecture: Annotated[str, typer.Argument(help="A name of data/architectures, such as llama-2-13b.")],
    output_dir: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: str = "bfloat16",
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back against the digests.")] = False,
) -> None:
    """Write a real sharded checkpoint of seeded random weights; an interrupted one is continued."""
    from djinn.weights import synth as synthesis

    folder = synthesis.synthesise(architecture, output_dir, seed=seed, dtype=dtype)
    synthesis.verify(folder, full=verify)
    typer.echo(folder)


@main.command()
def pack(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what coding would save, and write nothing.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Code a checkpoint without loss, once; an interrupted packing is continued."""
    from djinn.weights import pack as packing

    if not dry_run:
        if out is None:
            raise ConfigError("pack: name the folder to write, or say --dry-run")
        model = str(packing.pack(model, out, device=device, progress=True))
    print_tensor_sizes(list(packing.survey(model, device=device)), as_json)


@main.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    device: Device = None,
) -> None:
    """Write the files that a packed checkpoint was made from, byte for byte."""
    import djinn

    typer.echo(djinn.unpack(folder, out, device=device, progress=True))


@main.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    budget: Budget,
    new_tokens: NewTokens = 32,
    ring: Ring = None,
    host_memory: HostMemory = None,
    chunk: Chunk = "64 MiB",
    coding: CodingOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: a GPU where there is one]")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the weights, and say how fast that was, and what limited it."""
    from djinn.bench.generation import generate as run

    made = run(
        model,
        prompt,
        budget=budget,
        new_tokens=new_tokens,
        device=device,
        ring=ring,
        host_memory=host_memory,
        chunk=chunk,
        coding=coding,  # type: ignore[arg-type]
        temperature=temperature,
        seed=seed,
        chat=chat,
        show=not as_json,
    )
    if as_json:
        print_json(asdict(made))
    else:
        print_generated(made)


@main.command()
def baseline(
    system: Annotated[str, typer.Argument(help="djinn, accelerate, deepspeed, resident or all.")],
    model: OtherModel = None,
    profile: ProfileName = "smoke_tiny",
    budget: Annotated[str | None, typer.Option(help="Another budget than the profile's.")] = None,
    coding: ProfileCoding = None,
    runs: Runs = None,
    ttft: Annotated[
        bool, typer.Option("--ttft-enabled/--ttft-disabled", help="Show the time to first token; always recorded.")
    ] = True,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure one system, or all of a profile's, on the same prompt and weights; an interrupted run is continued."""
    chosen = _profile(profile, model=model, budget=budget, coding=coding, runs=runs)
    if system != "all":
        chosen = chosen.override(systems=_variants(system, chosen))

    from djinn.bench.harness import run_baselines

    with redirect_stdout(sys.stderr):
        records = run_baselines(chosen, _run_dir(output_dir, chosen, system))
    print_records(records, as_json, hide=[] if ttft else ["TTFT s"])


@main.command()
def sweep(
    profile: ProfileName = "smoke_tiny",
    model: OtherModel = None,
    coding: ProfileCoding = None,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure the profile's chunk and ring sizes; an interrupted sweep is continued."""
    chosen = _profile(profile, model=model, coding=coding)

    from djinn.bench.sweep import run_sweep

    with redirect_stdout(sys.stderr):
        records = run_sweep(chosen, _run_dir(output_dir, chosen))
    print_records(records, as_json)


@main.command()
def figures(run_dir: RunDir) -> None:
    """Draw every figure that the results of a run allow."""
    from djinn.figures import draw_all

    print_paths(draw_all(run_dir))


@main.command()
def report(run_dir: RunDir) -> None:
    """Write the report of a run: systems side by side, claims, machine."""
    from djinn.artifact.claims import claims_frame, write_claims
    from djinn.artifact.report import write_report

    page = write_report(run_dir)
    outcomes = write_claims(run_dir)
    frame = claims_frame(outcomes).drop(columns="why")
    print_table(list(frame.columns), frame.to_numpy().tolist())
    print_paths([page])
    exit_unless(all(outcome.verdict != "FAIL" for outcome in outcomes))


@main.command()
def verify(run_dir: RunDir) -> None:
    """Hold every file of a run, or of reference records, against its checksums."""
    from djinn.artifact import bundle

    typer.echo(f"{run_dir}: {bundle.verify(run_dir)} files are what their checksums say")


@main.command()
def bundle(
    run_dir: RunDir, output: Annotated[Path | None, typer.Option(help="The archive.  [default: RUN_DIR.tar.gz]")] = None
) -> None:
    """Write a run as the archive to deposit: the same run gives the same bytes."""
    from djinn.artifact import bundle as archive

    print_paths([archive.bundle(run_dir, output)])


@main.command()
def replay(
    output_dir: Annotated[Path, typer.Option(help="Where the run directories go.")] = Path("artifact/runs"),
) -> None:
    """Draw figures, claims and report of the reference records again; needs no GPU and measures nothing."""
    from djinn.artifact.replay import replay as run

    run(output_dir)


@main.command()
def reproduce(
    profile: Annotated[str, typer.Option(help="A profile, or auto: the largest this machine can hold.")] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory to make or continue.")] = None,
) -> None:
    """Run the four notebooks in order and write figures and report, which says whether the claims hold."""
    from djinn.artifact.runner import reproduce as run

    run(profile, run_dir)


def _profile(name: str, **changes: Any) -> Profile:
    from djinn.config import load_profile

    return load_profile(name).override(**{key: value for key, value in changes.items() if value is not None})


def _run_dir(given: Path | None, profile: Profile, system: str = "all") -> Path:
    """Open the run directory; one system alone has its own by default, since one holds one configuration."""
    from djinn.artifact.notebook import open_run_dir

    name = profile.name if system == "all" else f"{profile.name}-{system.replace(':', '-')}"
    run_dir = given or Path("artifact/runs") / name
    open_run_dir(run_dir, profile)
    return run_dir


def _variants(system: str, profile: Profile) -> list[str]:
    """The profile's own variants of a system; every variant where it lists none; the name itself where unknown."""
    from djinn.config import system_names

    for names in (profile.systems, system_names()):
        if found := [name for name in names if system in (name, name.split(":")[0])]:
            return found
    return [system]
