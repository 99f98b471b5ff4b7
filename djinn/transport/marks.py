"""Marks: numbers in page-locked memory by which a GPU's stream and the host's threads wait for each other.

Neither the caller nor CUDA's runtime is needed once they are queued: the stream writes one when it comes to it, and
goes on behind another once somebody has written that.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from djinn.devices import gpu_index

_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: of the difference as a signed number, so that counting may wrap around
_AFTER_ALL = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: everything before it can be seen by whoever sees the mark


def work_on(device: torch.device) -> bool:
    """Return whether the driver has marks for the streams of ``device``."""
    if torch.version.hip is not None:
        return False
    mark = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    try:
        write(gpu_index(device), mark.data_ptr(), 1)
        wait(gpu_index(device), mark.data_ptr(), 1)
    except (RuntimeError, OSError, AttributeError):
        return False
    finally:
        torch.cuda.synchronize(device)
    return int(mark[0]) == 1


def write(gpu: int, address: int, number: int) -> None:
    """Queue on the current stream of a GPU that ``number`` is written to page-locked memory, 4 bytes at ``address``."""
    _call(_driver().cuStreamWriteValue32_v2, gpu, address, number, _AFTER_ALL)


def wait(gpu: int, address: int, number: int) -> None:
    """Queue on the current stream of a GPU that it goes on when the 4 bytes at ``address`` are ``number``, or later."""
    _call(_driver().cuStreamWaitValue32_v2, gpu, address, number, _AT_LEAST)


def _call(function: Any, gpu: int, address: int, number: int, flags: int) -> None:
    with torch.cuda.device(gpu):  # the default stream is that of the current context
        error = function(torch._C._cuda_getCurrentRawStream(gpu), address, number, flags)
    if error != 0:
        raise RuntimeError(f"{function.__name__} failed with CUDA error {error}")


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        getattr(library, name).argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    return library
