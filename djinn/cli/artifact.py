"""Commands about a run and the records it leaves: figures, report, verify, bundle, replay, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from djinn.cli.options import OtherGpus, OutputDir, RunDir
from djinn.cli.show import exit_unless, print_paths, print_table, say
from djinn.errors import ConfigError


def figures(
    run_dir: RunDir,
    beside: Annotated[
        list[Path] | None, typer.Option(help="A run on another number of GPUs, to draw the times of all; repeatable.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Bare figures, without titles: captions lie beside them.")
    ] = False,
) -> None:
    """Draw every figure that the results of a run allow."""
    from djinn.figures import draw_all

    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run directory")
    print_paths(draw_all(run_dir, beside=beside or (), paper=paper))


def report(run_dir: RunDir) -> None:
    """Write the report of a run: systems side by side, claims, machine."""
    from djinn.artifact.claims import claims_frame, read_claims
    from djinn.artifact.closing import verdict_of
    from djinn.artifact.reference import measured, run_of
    from djinn.artifact.report import write_report
    from djinn.bench.run import Run

    page = write_report(run_dir)
    outcomes, run = read_claims(run_dir), Run(run_dir)
    reference = None if run.replayed else run_of(run.profile.name)
    columns = ["claim", "verdict", "text", "target", "measured", *(["reference"] if reference else [])]
    frame = claims_frame(outcomes, measured(reference) if reference else None)
    print_table(columns, frame[columns].to_numpy().tolist())
    if reference is not None:
        say(f"reference: {reference.name}, a run of the same profile")
    print_paths([page])
    say(verdict_of(run_dir))
    exit_unless(all(outcome.verdict != "FAIL" for outcome in outcomes))


def verify(run_dir: RunDir) -> None:
    """Hold every file of a run, or of reference records, against its checksums."""
    from djinn.artifact import bundle

    say(f"{run_dir}: {bundle.verify(run_dir)} files are what their checksums say")


def bundle(
    run_dir: RunDir, output: Annotated[Path | None, typer.Option(help="The archive.  [default: RUN_DIR.tar.gz]")] = None
) -> None:
    """Write a run as the archive to deposit: the same run gives the same bytes."""
    from djinn.artifact import bundle as archive

    print_paths([archive.bundle(run_dir, output)])


def replay(
    output_dir: OutputDir = None,
) -> None:
    """Draw figures, claims and report of the reference records again; needs no GPU and measures nothing."""
    from djinn.artifact.replay import replay as run

    run(output_dir) if output_dir else run()


def reproduce(
    profile: Annotated[str, typer.Option(help="A profile, or auto: the largest this machine can hold.")] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory to make or continue.")] = None,
    gpus: OtherGpus = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show all that the notebooks print.")] = False,
) -> None:
    """Run the four notebooks in order, write figures and report, and say whether the claims hold."""
    from djinn.profiles import load_profile

    if profile != "auto":
        load_profile(profile)  # a misspelt name is refused before anything is imported

    from djinn.artifact.runner import reproduce as run

    run(profile, run_dir, verbose=verbose, **({} if gpus is None else {"gpus": gpus}))
