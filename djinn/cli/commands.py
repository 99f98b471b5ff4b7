"""The commands of ``djinn``, in the groups and the order that help shows; how each ends when it is refused or ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import djinn
from djinn.cli import artifact, measure, models
from djinn.cli.ending import terminable
from djinn.cli.ranks import is_first
from djinn.cli.show import say
from djinn.errors import CheckpointError, ConfigError, DjinnError, PlanError, UnavailableError
from djinn.files import remedy
from djinn.text import one_line

_BAD_INPUT = (ConfigError, CheckpointError, PlanError, UnavailableError)


EXTRAS = {
    "artifact": (
        "IPython",
        "ipykernel",
        "jinja2",
        "jupyter_client",
        "matplotlib",
        "nbclient",
        "nbconvert",
        "nbformat",
        "pandas",
        "papermill",
        "seaborn",
    ),
    "baselines": ("deepspeed", "ninja"),
}
"""The packages that an extra brings, by the names that they are imported by."""


def _extra(error: ModuleNotFoundError) -> str | None:
    """Return what is missing and the extra that brings it; None for a module of none."""
    missing = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
    return extra and f"{missing}: pip install 'djinn[{extra}]'"


class _Commands(TyperGroup):
    """Shows what the user can act on as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except DjinnError as error:
            if is_first():  # all ranks are refused alike
                say(f"djinn: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, _BAD_INPUT) else 1) from None
        except ModuleNotFoundError as error:
            lacking = _extra(error)
            if lacking is None:
                raise
            say(f"djinn: {ctx.invoked_subcommand} needs {lacking}", err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # who read the output has left; click ends quietly
        except OSError as error:
            parts = (error.filename, error.strerror or error, remedy(error))
            say("djinn: " + one_line(": ".join(str(part) for part in parts if part)), err=True)
            raise typer.Exit(2) from None


main = typer.Typer(
    name="djinn",
    cls=_Commands,
    help="Run language models larger than device memory by streaming their weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"djinn {djinn.__version__}")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Use": (models.plan, models.generate, models.pack, models.unpack, models.synth),
    "Measure": (measure.profiles, measure.certify, measure.baseline, measure.sweep),
    "Artifact": (
        artifact.reproduce,
        artifact.replay,
        artifact.figures,
        artifact.report,
        artifact.verify,
        artifact.bundle,
    ),
}

for group, commands in GROUPS.items():
    for command in commands:
        main.command(rich_help_panel=group)(command)
