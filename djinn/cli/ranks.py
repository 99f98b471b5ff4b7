"""How a command becomes several processes, one for each GPU: ``--gpus``."""

from __future__ import annotations

import logging
import os
import sys
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
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say themselves why they end
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "djinn", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise typer.Exit(failure.exitcode if failure.exitcode > 0 else 1) from None
