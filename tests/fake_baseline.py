"""``djinn`` in a process of its own, with workers that hold no model; a fork server can import it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FAKE = (sys.executable, str(Path(__file__).parent / "bench" / "fake_worker.py"))


def command(arguments: list[str], log: str) -> None:
    """Be ``djinn``; what it prints goes to the file ``log``."""
    from djinn.bench import worker_client
    from djinn.cli import main

    worker_client.COMMAND = FAKE
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["djinn", *arguments]
    try:
        main(arguments)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))  # a signal that comes later would find multiprocessing's own ending
