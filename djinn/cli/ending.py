"""How a command ends that is told to: as Ctrl-C ends it, with its workers gone and nothing half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""What ``docker stop``, ``timeout``, a batch system or a terminal that is closed send."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn the first request to end, inside the ``with``, into an exit that every ``finally`` sees, code 128 + n.

    A signal that is ignored, as under ``nohup``, stays ignored, and what follows the first does not disturb the
    cleaning up. Only the main thread hears signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [each for each in _SIGNALS if signal.getsignal(each) is signal.SIG_DFL]

    def end(number: int, _: FrameType | None) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in heard:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in heard:
            signal.signal(each, signal.SIG_DFL)
