"""The commands of ``djinn``, in the order in which help lists them; how each ends when it is refused."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from djinn.cli import artifact, measure, models
from djinn.errors import CheckpointError, ConfigError, DjinnError, PlanError, UnavailableError

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

for command in (
    measure.profiles,
    measure.certify,
    models.plan,
    models.synth,
    models.pack,
    models.unpack,
    models.generate,
    measure.baseline,
    measure.sweep,
    artifact.figures,
    artifact.report,
    artifact.verify,
    artifact.bundle,
    artifact.replay,
    artifact.reproduce,
):
    main.command()(command)
