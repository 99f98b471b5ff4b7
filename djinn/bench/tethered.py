"""What a worker's process runs first: it is tied to the harness before it imports anything, which takes seconds.

Started as ``python -m djinn.bench.tethered REPLIES HARNESS``: the file descriptor for replies, the harness's process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Die when the harness does, however it dies; then become the worker."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return  # it died before it could be heard of

    from djinn.bench.worker import main as serve

    serve()


if __name__ == "__main__":
    main()
