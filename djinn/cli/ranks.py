"""How a command becomes several processes, one for each GPU: ``--gpus``."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence

import typer


def is_rank() -> bool:
    """Return whether this process is one of several that torchrun, or :func:`run_as_ranks`, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process is the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def run_as_ranks(count: int, arguments: Sequence[str]) -> None:
    """Run ``djinn`` with ``arguments`` in ``count`` processes of this host, as torchrun does; end as they end."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say themselves why they end
    try:
        with tempfile.TemporaryDirectory(prefix="djinn-ranks-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-m", "djinn", *arguments)
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise typer.Exit(failure.exitcode if failure.exitcode > 0 else 1) from None
