"""Several workers, one for each rank, behind the face of one: each command goes to all, and one reply comes back.

What ranks do they do together, so whichever fails first ends the others, which would wait for it.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from djinn import hardware
from djinn.bench.records import RankNumbers
from djinn.bench.worker_client import LOOK_S, WorkerError, WorkerProcess

MERGED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "load_s": max,
    "resident_bytes": sum,
    "ring_bytes": max,
    "link_bytes": sum,
    "ceiling_gbps": sum,
    "bare_gbps_before": sum,
    "bare_gbps_after": sum,
    "link_utilisation": min,
    "stall_s": max,
    "peak_device_bytes": max,
    "peak_host_bytes": sum,
    "peak_anon_bytes": sum,
}
"""What the ranks' numbers come to. A claim about device memory, waits or a link is about the rank where it is worst."""


def merged(replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one reply for those of all ranks, in their order: the first rank's, but for what :data:`MERGED` says.

    What each rank measured stands in ``by_rank``. A number that a rank has not measured is None for all.

    Raises:
        WorkerError: the ranks generated different tokens.
    """
    first = replies[0]
    for rank, reply in enumerate(replies):
        if reply.get("tokens") != first.get("tokens"):
            raise WorkerError("error", f"rank {rank} generated other tokens than rank 0")
    found = dict(first)
    for name, together in MERGED.items():
        if name in first:
            values = [reply.get(name) for reply in replies]
            found[name] = None if None in values else together(values)  # type: ignore[arg-type]
    own = [{name: reply[name] for name in RankNumbers.model_fields if name in reply} for reply in replies]
    return found | ({"by_rank": own} if any(own) else {})


class RankWorkers:
    """A worker for each of ``count`` ranks on this host; see :class:`~djinn.bench.worker_client.WorkerProcess`.

    They find each other as processes of torchrun do. What rank 1 prints goes to ``<log>-1.log``.
    """

    def __init__(self, log: Path, count: int) -> None:
        threads = max(len(hardware.allowed_cpus() or ()) // count, 1)
        together = rendezvous(count) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        self._workers = [
            WorkerProcess(
                log.with_name(f"{log.stem}-{rank}{log.suffix}"),
                together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        self._numbers: list[dict[str, Any]] = [{} for _ in range(count)]

    def ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send ``command`` to all ranks and return what their replies come to (see :func:`merged`).

        Raises:
            WorkerError: of the rank that failed first; all are gone.
        """
        self.send(command)
        deadline = time.monotonic() + timeout_s
        replies: dict[int, dict[str, Any]] = {}
        try:
            while len(replies) < len(self._workers):
                for rank in self._answering(set(range(len(self._workers))) - replies.keys(), deadline):
                    replies[rank] = self._reply(rank, command, deadline, timeout_s)
            found = merged([replies[rank] for rank in sorted(replies)])
        except WorkerError:
            self.kill()
            raise
        if "by_rank" in found:
            # What loading gave each rank stands beside what its runs give.
            self._numbers = [known | own for known, own in zip(self._numbers, found["by_rank"], strict=True)]
            found["by_rank"] = self._numbers
        return found

    def _answering(self, waiting: set[int], deadline: float) -> list[int]:
        """Return the ranks that have something to say, or that nobody waits for any longer.

        Those that are dead come first: others may only say that they have lost them.
        """
        while time.monotonic() < deadline:
            pipes = {self._workers[rank].look(): rank for rank in waiting}
            if ready := select.select(list(pipes), [], [], LOOK_S)[0]:
                return sorted((pipes[pipe] for pipe in ready), key=lambda rank: self._workers[rank].alive)
        return sorted(waiting)

    def _reply(self, rank: int, command: dict[str, Any], deadline: float, timeout_s: float) -> dict[str, Any]:
        try:
            return self._workers[rank].reply(command, deadline, timeout_s)
        except WorkerError as error:
            # djinn says itself which rank could not do what all were to do.
            reason = error.reason if error.reason.startswith("rank ") else f"rank {rank}: {error.reason}"
            raise WorkerError(error.status, reason) from None

    def send(self, command: dict[str, Any]) -> None:
        """Send ``command`` to all ranks and wait for nothing."""
        for worker in self._workers:
            worker.send(command)

    def wait(self, deadline: float) -> None:
        """Wait until all have ended, or :func:`time.monotonic` says ``deadline``."""
        for worker in self._workers:
            worker.wait(deadline)

    def kill(self) -> None:
        """End all and whatever they started."""
        for worker in self._workers:
            worker.kill()

    @property
    def alive(self) -> bool:
        """Whether any of the processes is there."""
        return any(worker.alive for worker in self._workers)


def rendezvous(count: int) -> dict[str, str]:
    """Return the environment in which ``count`` processes of this host find each other, at a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(count)
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
