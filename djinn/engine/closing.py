"""What a dropped model has held is closed on a thread of its own.

The garbage collector ends a model on whatever thread it runs on: on one that moves this model's weights, or in the
middle of Python's starting or joining another, with Python's own locks held. Closing waits for threads to end, and
there it would wait for itself. So the thread on which a model ends only asks, and waits for the answer for a while:
then memory is free once ``del`` or ``gc.collect`` return, and what cannot be closed while they wait is closed later.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from contextlib import ExitStack, nullcontext

import torch

PATIENCE_S = 10.0
"""The longest that a thread waits."""


class Closer:
    """Closes resources on a thread of its own."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._requests: queue.SimpleQueue[tuple[ExitStack, torch.device, threading.Lock]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="djinn-closing", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this is the process whose thread it has, and no forked child of it."""
        return os.getpid() == self._owner

    def close(self, resources: ExitStack, device: torch.device) -> None:
        """Have ``resources`` on ``device`` closed.

        A forked child closes nothing: it has neither the threads nor the right to its parent's files.
        """
        if not self.is_here:
            return
        closed = threading.Lock()
        closed.acquire()
        self._requests.put((resources, device, closed))
        if threading.get_ident() != self._thread.ident:
            closed.acquire(timeout=PATIENCE_S)

    def _run(self) -> None:
        while True:
            resources, device, closed = self._requests.get()
            try:
                # Else CUDA would take some memory of the first GPU, whichever one the model was on.
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    resources.close()
            except BaseException:
                sys.excepthook(*sys.exc_info())  # as weakref.finalize does
            closed.release()


_closer: Closer | None = None


def closer() -> Closer:
    """Return this process's closer."""
    global _closer
    if _closer is None or not _closer.is_here:
        _closer = Closer()
    return _closer
