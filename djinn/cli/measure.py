"""Commands that measure: profiles, certify, baseline, sweep."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from djinn.cli.options import Json, OtherBudget, OtherGpus, OtherModel, OutputDir, ProfileCoding, ProfileName, Runs
from djinn.cli.show import exit_unless, print_json, print_records, print_table

if TYPE_CHECKING:
    from djinn.profiles import Profile


def profiles(as_json: Json = False) -> None:
    """List the profiles and what each needs."""
    from djinn.profiles import load_profile, profile_names
    from djinn.sizes import format_bytes

    found = [load_profile(name) for name in profile_names()]
    if as_json:
        print_json([profile.model_dump(mode="json") for profile in found])
        return
    print_table(
        ["profile", "device", "budget", "RAM", "disk", "min", "what"],
        [
            [p.name, p.device, *map(format_bytes, (p.budget, p.min_ram, p.min_disk)), f"{p.minutes:g}", p.title]
            for p in found
        ],
    )


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


def baseline(
    system: Annotated[str, typer.Argument(help="djinn, accelerate, deepspeed, resident or all.")],
    model: OtherModel = None,
    profile: ProfileName = "smoke_tiny",
    budget: OtherBudget = None,
    gpus: OtherGpus = None,
    coding: ProfileCoding = None,
    runs: Runs = None,
    ttft: Annotated[
        bool, typer.Option("--ttft-enabled/--ttft-disabled", help="Show the time to first token; always recorded.")
    ] = True,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure one system, or all of a profile's, on the same prompt and weights; an interrupted run is continued."""
    chosen = _profile(profile, model=model, budget=budget, gpus=gpus, coding=coding, runs=runs)
    if system != "all":
        chosen = chosen.override(systems=_variants(system, chosen))

    from djinn.bench import statistics  # noqa: F401  its packages are asked for before anything is measured
    from djinn.bench.harness import run_baselines

    with redirect_stdout(sys.stderr):
        records = run_baselines(chosen, _run_dir(output_dir, chosen, system))
    print_records(records, as_json, hide=[] if ttft else ["TTFT s"])


def sweep(
    profile: ProfileName = "smoke_tiny",
    model: OtherModel = None,
    coding: ProfileCoding = None,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Measure the profile's chunk sizes, ring sizes and budgets; an interrupted sweep is continued."""
    chosen = _profile(profile, model=model, coding=coding)

    from djinn.bench import statistics  # noqa: F401  as in baseline
    from djinn.bench.sweep import run_sweep

    with redirect_stdout(sys.stderr):
        records = run_sweep(chosen, _run_dir(output_dir, chosen))
    print_records(records, as_json)


def _profile(name: str, **changes: Any) -> Profile:
    from djinn.profiles import load_profile

    return load_profile(name).override(**{key: value for key, value in changes.items() if value is not None})


def _run_dir(given: Path | None, profile: Profile, system: str = "all") -> Path:
    """Open the run directory; one system alone has its own by default, since one holds one configuration."""
    from djinn.bench.run import Run
    from djinn.places import RUNS_DIR

    name = profile.name if system == "all" else f"{profile.name}-{system.replace(':', '-')}"
    return Run.open(given or RUNS_DIR / name, profile).folder


def _variants(system: str, profile: Profile) -> list[str]:
    """The profile's own variants of a system; every exact one where it lists none; the name itself where unknown."""
    from djinn.profiles import HOST_COMPUTE, system_names

    for names in (profile.systems, [name for name in system_names() if name not in HOST_COMPUTE]):
        if found := [name for name in names if system in (name, name.split(":")[0])]:
            return found
    return [system]
