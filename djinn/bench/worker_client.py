"""The harness's end of a worker: a process that can be asked, timed out, and told apart when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from djinn.bench.records import Status
from djinn.sizes import format_bytes

COMMAND = (sys.executable, "-m", "djinn.bench.tethered")

LOOK_S = 0.2
"""Seconds between two looks at a worker that has not replied."""
_CLOSE_S = 30.0


class WorkerError(Exception):
    """Why a worker gives no more results: the status and reason of the records that it does not give."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason


class Worker(Protocol):
    """A worker as the harness knows it: one process, or one for each rank."""

    def ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]: ...
    def send(self, command: dict[str, Any]) -> None: ...
    def wait(self, deadline: float) -> None: ...
    def kill(self) -> None: ...
    @property
    def alive(self) -> bool: ...


def close(workers: Sequence[Worker]) -> None:
    """End workers, politely first and all at once: they have the same seconds to go in."""
    deadline = time.monotonic() + _CLOSE_S
    living = [worker for worker in workers if worker.alive]
    for worker in living:
        worker.send({"do": "close"})
    for worker in living:
        worker.wait(deadline)
    for worker in workers:
        worker.kill()


class WorkerProcess:
    """A worker in a process group of its own; what it prints goes to ``log``.

    ``environment`` is added to this process's own.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._peak_bytes = 0
        self._pending = b""
        self._replies, theirs = os.pipe()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs],
                start_new_session=True,
                env=os.environ | (environment or {}),
            )
        os.close(theirs)

    def ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send ``command`` and return the fields of its reply.

        Raises:
            WorkerError: the worker reported one, died, took longer than ``timeout_s``, or replied nonsense; unless it
                reported, it is gone.
        """
        self.send(command)
        return self.reply(command, time.monotonic() + timeout_s, timeout_s)

    def reply(self, command: dict[str, Any], deadline: float, timeout_s: float) -> dict[str, Any]:
        """Return the fields of the reply to ``command``, which was sent ``timeout_s`` before ``deadline``.

        Raises:
            WorkerError: as :meth:`ask`.
        """
        line = self._line(deadline)
        if line is None:
            self.kill()
            raise WorkerError("timeout", f"{command['do']} took longer than {timeout_s:g} s")
        if not line:
            raise self._death()
        try:
            reply = json.loads(line)
            if reply["status"] == "ok":
                return dict(reply["fields"])
            failure = WorkerError(reply["status"], reply["reason"])
        except (ValueError, KeyError, TypeError):
            self.kill()
            raise WorkerError("error", f"the worker's reply cannot be read: {line[:200]!r}") from None
        raise failure

    def wait(self, deadline: float) -> None:
        """Wait until the worker has ended, or :func:`time.monotonic` says ``deadline``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0))

    def kill(self) -> None:
        """End the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def send(self, command: dict[str, Any]) -> None:
        """Send ``command`` and wait for nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: the missing reply says so
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def _line(self, deadline: float) -> bytes | None:
        """Return the next line; empty if the worker is dead, None if the deadline passes first."""
        while b"\n" not in self._pending:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self.look()
            if select.select([self._replies], [], [], min(remaining, LOOK_S))[0]:
                piece = os.read(self._replies, 65536)
                if not piece:
                    return b""
                self._pending += piece
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def look(self) -> int:
        """Note the worker's peak of resident memory, so that it is known if the kernel kills it.

        Returns:
            the file descriptor of its replies.
        """
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._peak_bytes = int(line.split()[1]) * 1024
        return self._replies

    def _death(self) -> WorkerError:
        self._process.wait()
        code = self._process.returncode
        self.kill()
        if code == -signal.SIGKILL:
            return WorkerError(
                "oom", f"killed, probably out of memory; resident memory peaked at {format_bytes(self._peak_bytes)}"
            )
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return WorkerError("error", f"the worker {how}; see logs/{self._log.name}")
