"""The kernel that notebooks run in: that of the interpreter that runs djinn, whatever kernels are installed."""

from __future__ import annotations

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

NAME = "python3"
"""What notebooks call it. Jupyter would look it up, and a folder on JUPYTER_PATH may have another of that name."""


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels of this interpreter."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return how this interpreter starts a kernel."""
        return KernelSpec(**get_kernel_dict())
