"""Products of weights in host memory and few vectors, by djinn's kernel, or by PyTorch where it cannot be compiled."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from djinn.errors import UnavailableError
from djinn.host import build
from djinn.host.cores import choose_cpus
from djinn.host.queue import ProductQueue

MOST_VECTORS = 16
"""As in products.cpp."""


class _Matrix(ctypes.Structure):
    """As in products.cpp."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("results", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Linear:
    """What a linear layer multiplies by, in host memory: bfloat16 [rows, columns], and maybe a bias [rows]."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class HostProducts:
    """Multiplies where the weights lie, with threads of its own that end with it.

    The calling thread is one of ``threads``, each other one stays on its processor. Calls from several threads wait for
    each other. A forked child starts threads anew when it multiplies. Ctrl-C takes effect when a product is done, which
    takes milliseconds.

    Where the kernel cannot be compiled, PyTorch multiplies with the threads that it has: :attr:`name` is ``torch``, and
    :attr:`reason` says why.

    Args:
        threads: how many, the caller among them; by default as :func:`djinn.host.cores.choose_cpus` chooses.
        near: processors to choose from; all that this process may use if None.

    Raises:
        ConfigError: this process may not use as many processors.
        UnavailableError: the system starts no more threads.
    """

    def __init__(self, threads: int | None = None, near: Collection[int] | None = None) -> None:
        self._cpus = choose_cpus(threads, near)
        self._lock = threading.Lock()
        self._pool: int | None = None
        self._ending: weakref.finalize[..., HostProducts] | None = None
        self._queues: weakref.WeakSet[ProductQueue] = weakref.WeakSet()
        self._closed = False
        self._kernel: ctypes.CDLL | None = None
        self.reason = ""
        best = build.runnable()[0]
        try:
            self._kernel = build.load(best)
        except UnavailableError as error:
            self.name, self.threads, self.reason = "torch", torch.get_num_threads(), str(error)
            return
        self.name, self.threads = f"djinn {best.name}", len(self._cpus)
        self._start(self._kernel)
        _ALL.add(self)

    def multiply(self, weights: Sequence[Tensor], vectors: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return each matrix's products with all vectors, as ``torch.nn.functional.linear`` gives them.

        See :meth:`outputs_of`.
        """
        return self.outputs_of([Linear(matrix) for matrix in weights], vectors, out)

    def outputs_of(
        self, layers: Sequence[Linear], vectors: Tensor, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Return what each of the layers makes of all vectors.

        Sums are float32 and rounded once to bfloat16, to nearest with ties to even; then a bias is added, likewise.
        Denormals, infinities and NaN count as IEEE 754 says, whatever ``torch.set_flush_denormal`` says. A result
        depends on its row and its vector alone.

        Args:
            layers: with weights and biases that are contiguous.
            vectors: bfloat16, [1 to 16, columns], contiguous, in host memory.
            out: where to put results, as they are returned; made if None.

        Returns:
            A tensor for each layer: bfloat16, [vectors, rows].

        Raises:
            ValueError: a tensor is not as above, or this object is closed.
            UnavailableError: in a forked child, the system starts no more threads.
        """
        if out is None:
            out = [vectors.new_empty(len(vectors), len(layer.weight)) for layer in layers]
        matrices = matrices_of(layers, vectors, out)
        with self._lock:
            if self._closed:
                raise ValueError("these host products are closed")
            if self._kernel is None:
                _multiply_by_torch(layers, vectors, out)
            else:
                pool = self._pool or self._start(self._kernel)
                self._kernel.djinn_multiply(pool, matrices, len(matrices), vectors.data_ptr(), *vectors.shape)
        return list(out)

    def queue(self) -> ProductQueue | None:
        """Return a new queue of products, to be closed before this object; None where PyTorch multiplies.

        Raises:
            UnavailableError: the system starts no more threads.
        """
        if self._kernel is None or self._pool is None:
            return None
        queue = ProductQueue(self._kernel, self._pool, self._cpus[0])
        self._queues.add(queue)
        return queue

    def close(self) -> None:
        """End the threads, once a product that is under way is done."""
        with self._lock:
            self._closed = True
            if self._ending is not None:
                self._ending()

    def _start(self, kernel: ctypes.CDLL) -> int:
        others = self._cpus[1:]
        pool = kernel.djinn_open((ctypes.c_int * len(others))(*others), len(others))
        if pool is None:
            raise UnavailableError(f"the system starts no {len(others)} threads for host products; lower host_threads")
        self._pool = pool
        self._ending = weakref.finalize(self, kernel.djinn_close, pool)
        self._ending.atexit = False  # the system ends them; a thread may still be inside a product then
        return int(pool)

    def _forget(self) -> None:
        """Leave the threads to the process that has them: a forked child has only the one that forked."""
        self._lock = threading.Lock()
        self._pool = None
        if self._ending is not None:
            self._ending.detach()
        for queue in self._queues:
            queue.forget()


_ALL: weakref.WeakSet[HostProducts] = weakref.WeakSet()


def _forget_all() -> None:
    for products in _ALL:
        products._forget()


os.register_at_fork(after_in_child=_forget_all)


def matrices_of(layers: Sequence[Linear], vectors: Tensor, out: Sequence[Tensor]) -> ctypes.Array[_Matrix]:
    """Return layers and their results as the kernel wants them; these tensors have to live as long.

    Raises:
        ValueError: as :meth:`HostProducts.outputs_of`.
    """
    count, columns = vectors.shape
    if not 1 <= count <= MOST_VECTORS:
        raise ValueError(f"between 1 and {MOST_VECTORS} vectors can be multiplied, not {count}")
    _check("vectors", vectors, (count, columns))
    matrices = (_Matrix * len(layers))()
    for place, layer, result in zip(matrices, layers, out, strict=True):
        rows = len(layer.weight)
        _check("weights", layer.weight, (rows, columns))
        _check("out", result, (count, rows))
        if layer.bias is not None:
            _check("bias", layer.bias, (rows,))
            place.bias = layer.bias.data_ptr()
        place.weights, place.results, place.rows = layer.weight.data_ptr(), result.data_ptr(), rows
    return matrices


def _multiply_by_torch(layers: Sequence[Linear], vectors: Tensor, out: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for layer, result in zip(layers, out, strict=True):
            result.copy_(torch.nn.functional.linear(vectors, layer.weight))
            if layer.bias is not None:
                result += layer.bias


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.bfloat16 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; contiguous bfloat16 in host memory "
            "can be multiplied"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} where {shape} fits the others")
