"""Start ranks as torchrun does, on processors with gloo, and bring back what each of them says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 300
"""Far longer than any of these takes on a busy machine: a rank that waits for ever is a failure."""


@dataclass(frozen=True)
class Ended:
    """What a launch left: its exit status, what it printed, and by rank what each case said."""

    status: int
    printed: str
    said: dict[int, dict[str, Any]]


def launch(script: Path, ranks: int, folder: Path, *arguments: str) -> Ended:
    """Run ``script`` in ``ranks`` processes, which write their words to ``folder`` (see :func:`say`)."""
    folder.mkdir(parents=True, exist_ok=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    ended = subprocess.run(
        [*start, str(script), str(folder), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    said = {
        int(path.stem): dict(json.loads(line) for line in path.read_text().splitlines())
        for path in sorted(folder.glob("*.said"))
    }
    return Ended(ended.returncode, ended.stdout + ended.stderr, said)


def say(folder: Path, case: str, value: Any) -> None:
    """Write down, in a rank, what a case came to."""
    with (folder / f"{os.environ['RANK']}.said").open("a") as lines:
        print(json.dumps([case, value]), file=lines)
