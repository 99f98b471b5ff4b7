"""Products that nobody waits for but a device: they begin when its mark says so, and end with a mark for it.

See queue.h, and :mod:`djinn.host.ahead` for how a model uses it.
"""

from __future__ import annotations

import ctypes
import weakref

from djinn.errors import UnavailableError


class Product(ctypes.Structure):
    """As in queue.h: a product, and when it was computed, in seconds of ``time.perf_counter``."""

    _fields_ = (
        ("matrices", ctypes.c_void_p),
        ("many", ctypes.c_int64),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("arrived", ctypes.c_void_p),
        ("computed", ctypes.c_void_p),
        ("number", ctypes.c_uint32),
        ("asked_s", ctypes.c_double),
        ("there_s", ctypes.c_double),
        ("done_s", ctypes.c_double),
    )


class ProductQueue:
    """Computes products in the order in which they are put here, on the threads of a pool and one of its own.

    Made by :meth:`djinn.host.products.HostProducts.queue`; to be closed before these products are.
    """

    def __init__(self, kernel: ctypes.CDLL, pool: int, cpu: int) -> None:
        self._kernel = kernel
        self._handle = kernel.djinn_open_queue(pool, cpu)
        if self._handle is None:
            raise UnavailableError("the system starts no thread for host products; lower host_threads")
        self._ending = weakref.finalize(self, kernel.djinn_close_queue, self._handle)
        self._ending.atexit = False  # as that of the threads

    def put(self, product: Product) -> None:
        """Add a product. It, and all that it names, has to stay where it is until it is computed."""
        self._kernel.djinn_put(self._handle, ctypes.byref(product))

    @property
    def unfinished(self) -> int:
        """How many products are not computed yet."""
        return int(self._kernel.djinn_unfinished(self._handle))

    def close(self) -> None:
        """End the thread. Products whose inputs are not there are not computed, but marked as if: a device may wait."""
        self._ending()

    def forget(self) -> None:
        """Leave the thread to the process that has it: a forked child has none."""
        self._ending.detach()
