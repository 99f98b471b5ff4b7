"""The command line: parse, call, print. What the commands do is in the library.

Exit codes: 0 done; 1 a check, a claim or a run did not succeed; 2 bad input; 130 interrupted. Results go to
standard output, everything else to standard error. Imports wait inside the commands, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from djinn.errors import DjinnError

if TYPE_CHECKING:
    from djinn.bench.records import Record
    from djinn.config import Profile


class _Commands(TyperGroup):
    """Shows what the user can act on as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DjinnError as error:
            typer.echo(f"djinn: {error}", err=True)
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
OutputDir = Annotated[Path | None, typer.Option(help="Run directory.  [default: artifact/runs/<profile>]")]
RunDir = Annotated[Path, typer.Argument(help="A run directory with results.")]
Runs = Annotated[int | None, typer.Option(min=1, help="Runs of each point.  [default: the profile's]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@main.command()
def profiles(as_json: Json = False) -> None:
    """List the profiles and what each needs."""
    from djinn.config import load_profile, profile_names
    from djinn.sizes import format_bytes

    found = [load_profile(name) for name in profile_names()]
    if as_json:
        _print_json([profile.model_dump(mode="json") for profile in found])
        return
    _print_table(
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

    certification = run(chosen, _run_dir(output_dir, chosen))
    if as_json:
        typer.echo(certification.model_dump_json(indent=2))
    else:
        _print_table(
            ["check", "measured", "needed", "verdict", "remedy"],
            [[c.name, c.measured, c.needed, c.verdict, c.remedy] for c in certification.checks],
        )
    _exit_unless(all(check.verdict != "fail" for check in certification.checks))


@main.command()
def plan(
    model: Model,
    budget: Budget,
    ring: Ring = None,
    host_memory: HostMemory = None,
    chunk: Chunk = "64 MiB",
    as_json: Json = False,
) -> None:
    """Say what would be resident, pinned and on disk, and how fast a pass would be, without loading anything."""
    import djinn

    chosen = djinn.plan(model, budget=budget, ring=ring, host_memory=host_memory, chunk=chunk)
    if as_json:
        _print_json(dataclasses.asdict(chosen))
    else:
        typer.echo(chosen.table())


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
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    budget: Budget,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    ring: Ring = None,
    host_memory: HostMemory = None,
    chunk: Chunk = "64 MiB",
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the weights, and say how fast that was."""
    from transformers import AutoTokenizer, TextStreamer

    import djinn
    from djinn.weights.checkpoint import resolve

    folder = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    streaming = djinn.load(
        folder,
        budget=budget,
        ring=ring,
        host_memory=host_memory,
        chunk=chunk,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True)
    before, start = djinn.stats(streaming), time.perf_counter()
    ids = streaming.generate(
        **inputs.to(streaming.device), max_new_tokens=new_tokens, do_sample=False, streamer=streamer
    )[0, prompt_tokens:]
    wall_s, after = time.perf_counter() - start, djinn.stats(streaming)
    result = {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "new_tokens": len(ids),
        "wall_s": wall_s,
        "tokens_per_s": len(ids) / wall_s,
        "link_gbps": (after.link_bytes - before.link_bytes) / wall_s / 1e9,
        "effective_gbps": (after.passes - before.passes) * after.model_bytes / wall_s / 1e9,
        "stall_s": after.stall_s - before.stall_s,
    }
    if as_json:
        _print_json(result)
        return
    typer.echo(
        f"{len(ids)} tokens in {wall_s:.3g} s: {result['tokens_per_s']:.3g} tokens/s, effective bandwidth "
        f"{result['effective_gbps']:.3g} GB/s, of which {result['link_gbps']:.3g} GB/s crossed the link",
        err=True,
    )


@main.command()
def baseline(
    system: Annotated[str, typer.Argument(help="djinn, accelerate, deepspeed, resident or all.")],
    model: OtherModel = None,
    profile: ProfileName = "smoke_tiny",
    budget: Annotated[str | None, typer.Option(help="Another budget than the profile's.")] = None,
    runs: Runs = None,
    ttft: Annotated[
        bool, typer.Option("--ttft-enabled/--ttft-disabled", help="Show the time to first token; always recorded.")
    ] = True,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure one system, or all of a profile's, on the same prompt and weights; an interrupted run is continued."""
    chosen = _profile(profile, model=model, budget=budget, runs=runs)
    if system != "all":
        chosen = chosen.override(systems=_variants(system, chosen))

    from djinn.bench.harness import run_baselines

    records = run_baselines(chosen, _run_dir(output_dir, chosen))
    _print_records(records, as_json, hide=[] if ttft else ["TTFT s"])


@main.command()
def sweep(
    profile: ProfileName = "smoke_tiny",
    model: OtherModel = None,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure the profile's chunk and ring sizes; an interrupted sweep is continued."""
    chosen = _profile(profile, model=model)

    from djinn.bench.sweep import run_sweep

    _print_records(run_sweep(chosen, _run_dir(output_dir, chosen)), as_json)


@main.command()
def figures(run_dir: RunDir) -> None:
    """Draw every figure that the results of a run allow."""
    from djinn.figures import draw_all

    _print_paths(draw_all(run_dir))


@main.command()
def report(run_dir: RunDir) -> None:
    """Write the report of a run: systems side by side, claims, machine."""
    from djinn.artifact.report import write_report

    _print_paths([write_report(run_dir)])


@main.command()
def reproduce(
    profile: Annotated[str, typer.Option(help="A profile, or auto: the largest this machine can hold.")] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory to make or continue.")] = None,
) -> None:
    """Run the four notebooks in order and write figures and report."""
    from djinn.artifact.runner import reproduce as run

    _print_paths([run(profile, run_dir)])


def _profile(name: str, **changes: Any) -> Profile:
    from djinn.config import load_profile

    return load_profile(name).override(**{key: value for key, value in changes.items() if value is not None})


def _run_dir(given: Path | None, profile: Profile) -> Path:
    return given or Path("artifact/runs") / profile.name


def _variants(system: str, profile: Profile) -> list[str]:
    """The profile's own variants of a system; every variant where it lists none; the name itself where unknown."""
    from djinn.config import system_names

    for names in (profile.systems, system_names()):
        if found := [name for name in names if system in (name, name.split(":")[0])]:
            return found
    return [system]


def _exit_unless(fine: bool) -> None:
    if not fine:
        raise typer.Exit(1)


def _print_records(records: Sequence[Record], as_json: bool, hide: Sequence[str] = ()) -> None:
    """Print the records, as JSON or summarised, and exit with 1 unless every one is ok."""
    if as_json:
        _print_json([record.model_dump(mode="json") for record in records])
    else:
        from djinn.bench.statistics import summary_frame

        columns = {
            "system": "label",
            "status": "status",
            "runs": "runs",
            "load s": "load_s_median",
            "TTFT s": "ttft_s_median",
            "s/token": "token_s_median",
            "effective GB/s": "effective_gbps_median",
            "of ceiling": "link_utilisation_median",
            "reason": "reason",
        }
        shown = [name for name in columns if name not in hide]
        frame = summary_frame(records)
        _print_table(shown, frame[[columns[name] for name in shown]].to_numpy().tolist())
    _exit_unless(all(record.status == "ok" for record in records))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return "" if value is None else str(value)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        typer.echo(path)


if __name__ == "__main__":
    main()
