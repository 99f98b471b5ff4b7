"""Tensors of state dicts that are made when somebody reads them: experts that a checkpoint keeps apart, on disk.

They lie in several places of their files, so no map of these shows them as one. Who saves an adapter never reads them.
What is made then is in a file without a name, which the system writes back and drops from memory as it does with maps.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_iter

from djinn.errors import UnavailableError
from djinn.sizes import format_bytes

_SAYS_SHAPE = {
    "__hash__", "__len__", "dim", "element_size", "is_floating_point", "ndimension", "nelement", "numel", "size",
}  # fmt: skip
"""Names of functions that do not look at a tensor's elements."""


class LateTensor(torch.Tensor):
    """A tensor of this shape that ``make`` makes: see :func:`late`."""

    _make: Callable[[], torch.Tensor] | None

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", "")
            if name in _SAYS_SHAPE:
                return func(*args, **kwargs or {})
            if name == "__get__" and not isinstance(found := func(*args), torch.Tensor):
                return found
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, LateTensor):
                    tensor._come()
            return func(*args, **kwargs or {})

    def _come(self) -> None:
        if self._make is not None:
            self.data = self._make()
            self._make = None


def late(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what looks like a tensor of ``shape``, and becomes the one that ``make`` returns once it is read."""
    tensor = torch.empty(1, dtype=dtype).expand(shape).as_subclass(LateTensor)
    tensor._make = make
    return tensor


def file_memory(nbytes: int) -> torch.Tensor:
    """Return memory (uint8) that is a file without a name in the system's temporary folder.

    Raises:
        UnavailableError: the folder has no room for it.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # or who writes into memory without a disk behind it is killed
            return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(nbytes,)))
    except OSError as error:
        raise UnavailableError(
            f"{tempfile.gettempdir()}: saving experts that are stored apart takes {format_bytes(nbytes)} of disk for "
            f"each of their tensors, which cannot be had here: {error.strerror}; set TMPDIR to a folder with more room"
        ) from error
