"""The kernel of host products, compiled on first use for this processor and kept in the user's cache folder.

It is one shared library for each set of instructions. Which one this processor can run is looked up in what the system
says of it, whenever the kernel is loaded: a cache folder that several machines share holds a library for each of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from djinn.errors import UnavailableError
from djinn.files import unfinished
from djinn.hardware import cpu_flags
from djinn.places import KERNEL_DIR

_SOURCE = Path(__file__).with_name("products.cpp")
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("queue.h", "threads.h"))
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_LONGEST_S = 120


@dataclass(frozen=True)
class Instructions:
    """A set of instructions: what the processor must have, as /proc/cpuinfo calls it, and what the compiler is told."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...] = ()


INSTRUCTIONS = (
    Instructions("avx512", frozenset({"avx512f", "avx512bw", "fma"}), ("-mavx512f", "-mavx512bw", "-mfma")),
    Instructions("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    Instructions("neon", frozenset({"asimd"})),  # every 64-bit Arm processor has it, and every compiler takes it
    Instructions("plain", frozenset()),
)
"""The fastest first."""


def runnable() -> list[Instructions]:
    """Return the sets of instructions that this processor has, the fastest first."""
    flags = cpu_flags()
    return [instructions for instructions in INSTRUCTIONS if instructions.needs <= flags]


@functools.cache
def load(instructions: Instructions) -> ctypes.CDLL:
    """Return the kernel for these instructions, compiled if it is not in the cache folder.

    Raises:
        UnavailableError: there is no C++ compiler, it fails, or the cache folder cannot be used.
    """
    path = _compiled(instructions)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"the kernel for host products cannot be loaded: {error}; delete {path}") from None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for function, result, arguments in (
        (library.djinn_open, pointer, (pointer, number)),
        (library.djinn_close, None, (pointer,)),
        (library.djinn_multiply, None, (pointer, pointer, size, pointer, number, size)),
        (library.djinn_open_queue, pointer, (pointer, number)),
        (library.djinn_close_queue, None, (pointer,)),
        (library.djinn_put, None, (pointer, pointer)),
        (library.djinn_unfinished, size, (pointer,)),
    ):
        function.restype, function.argtypes = result, arguments
    return library


def _compiled(instructions: Instructions) -> Path:
    # The compiler that PyTorch's extension loader takes (torch.utils.cpp_extension.get_cxx_compiler).
    compiler = os.environ.get("CXX") or "c++"
    command = [*shlex.split(compiler), *_FLAGS, *instructions.flags]
    sources = b"".join(path.read_bytes() for path in (_SOURCE, *_HEADERS))
    key = hashlib.sha256(sources + repr(command).encode()).hexdigest()[:16]
    path = KERNEL_DIR / f"products-{platform.machine()}-{instructions.name}-{key}.so"
    if path.is_file():
        return path
    try:
        with unfinished(path) as part:
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(part)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LONGEST_S,
            )
    except FileNotFoundError as error:
        raise UnavailableError(f"no C++ compiler {error.filename!r}; install g++, or name one in CXX") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "it says nothing").strip()
        raise UnavailableError(f"{compiler} cannot compile the kernel for host products: {said[:500]}") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{compiler} did not compile the kernel for host products in {_LONGEST_S} s") from None
    except OSError as error:
        raise UnavailableError(f"the kernel for host products cannot be compiled: {error}") from None
    return path
