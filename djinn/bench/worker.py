"""A process that holds one system and measures it: reads commands from its standard input, a JSON object per line.

``{"do": "start"}`` replies as soon as the process is ready for more.
``{"do": "check", "system", "variant", "model", "scratch", "profile", "trace"}`` imports and builds
    what the system needs.
``{"do": "load"}`` loads that system and replies with what loading gives a record.
``{"do": "warm"}`` generates two tokens, not measured.
``{"do": "run"}`` measures one generation with the profile's prompt and tokens.
``{"do": "timeline", "path"}`` writes the copy engine's intervals, one JSON object per line.
``{"do": "close"}`` ends the process.

Replies go to the file descriptor named on the command line, one per command: ``{"status": "ok", "fields": {...}}``,
or another status of a record with its reason. What libraries print is kept out of them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from djinn.bench.measure import MemoryPeak, measure, warm
from djinn.bench.records import Status
from djinn.bench.systems import loader
from djinn.bench.systems.base import Job, Loader, System
from djinn.bench.systems.common import deterministic_attention, skeleton, weight_bytes
from djinn.engine.ranks import own_device
from djinn.errors import DjinnError, PlanError, UnavailableError
from djinn.files import write_text
from djinn.gpus import own_rank
from djinn.planning.workspace import CUDA_CONTEXT_BYTES
from djinn.text import one_line

_JOB = TypeAdapter(Job)


class Worker:
    """Holds the loaded system between commands."""

    def __init__(self) -> None:
        self._peak = MemoryPeak()
        self._job: Job
        self._loader: Loader
        self._system: System
        self._model_bytes: int
        self._is_rank = False

    def start(self) -> dict[str, Any]:
        """Importing torch and transformers is all that starting takes."""
        return {}

    def check(self, system: str, **job: Any) -> dict[str, Any]:
        """Take the job, and see that this machine can do it."""
        self._job = _JOB.validate_python(job)
        profile = self._job.profile
        rank = str(own_rank())
        self._job = replace(self._job, scratch=self._job.scratch / rank)  # ranks drop the pages of their own files
        self._job.scratch.mkdir(exist_ok=True)
        tempfile.tempdir = str(self._job.scratch)  # whatever a system spills goes when the scratch folder goes
        if self._job.on_gpu:
            if not torch.cuda.is_available():
                raise UnavailableError("device: the profile asks for cuda, and torch finds no GPU here")
            deterministic_attention()
            if (found := torch.cuda.device_count()) <= max(self._job.own_gpus):
                raise UnavailableError(f"device: the profile asks for {profile.gpus} GPUs, and torch finds {found}")
            for gpu in self._job.own_gpus if system != "resident" else ():
                total = torch.cuda.get_device_properties(gpu).total_memory
                allowed = profile.budget - CUDA_CONTEXT_BYTES  # the allocator's limit leaves the context out
                torch.cuda.set_per_process_memory_fraction(min(max(allowed / total, 0.0), 1.0), gpu)
        self._is_rank = profile.processes(system) > 1
        self._loader = loader(system)
        self._loader.check(self._job)
        return {}

    def load(self) -> dict[str, Any]:
        """Load the system and return what a record says of it."""
        self._model_bytes = weight_bytes(skeleton(self._job))  # which imports the model's code
        self._peak.mark_bare(self._job.own_gpus)
        if self._is_rank:
            own_device(torch.device(self._job.profile.device))  # only now: it may make the GPU's context
        start = time.perf_counter()
        self._system = self._loader.load(self._job)
        return {
            "load_s": time.perf_counter() - start,
            "model_bytes": self._model_bytes,
            "resident_bytes": self._system.resident_bytes,
            "ring_bytes": self._system.ring_bytes,
            "settings": self._system.settings,
        }

    def warm(self) -> dict[str, Any]:
        """Bring the system to where later runs begin."""
        warm(self._system, self._job)
        return {}

    def run(self) -> dict[str, Any]:
        """Measure one generation."""
        return measure(self._system, self._job, self._model_bytes, self._peak)

    def timeline(self, path: str) -> dict[str, Any]:
        """Write the intervals of the last run, one per line, as a whole or not at all; rank 1 beside ``path``."""
        rank = own_rank()
        target = Path(path).with_stem(f"{Path(path).stem}_{rank}") if rank else Path(path)
        write_text(target, "".join(json.dumps(asdict(interval)) + "\n" for interval in self._system.timeline()))
        return {}

    def close(self) -> dict[str, Any]:
        """Release what the system holds."""
        self._system.close()
        return {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what ``command`` says; an exception becomes a status and a reason, its traceback goes to the log."""
        try:
            return {"status": "ok", "fields": getattr(self, command.pop("do"))(**command)}
        except Exception as error:
            traceback.print_exc()
            return {"status": status_of(error), "reason": reason_of(error)}


def status_of(error: Exception) -> Status:
    """Return the status that a record gets for what was raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    # A plan that cannot work here is a machine or budget that is too small, as is a package that is not installed.
    return "unavailable" if isinstance(error, UnavailableError | PlanError | ImportError) else "error"


def reason_of(error: Exception) -> str:
    """Return one line that says what was raised; errors written for people speak for themselves."""
    text = one_line(error) or "no message"
    return text if isinstance(error, DjinnError) else f"{type(error).__name__}: {text}"


def main() -> None:
    """Serve commands until the last one, or until the harness is gone."""
    worker = Worker()
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        for line in sys.stdin:
            command = json.loads(line)
            last = command["do"] == "close"
            print(json.dumps(worker.answer(command)), file=replies, flush=True)
            if last:
                break
