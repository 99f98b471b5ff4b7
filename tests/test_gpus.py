"""What djinn.gpus says of this machine's GPUs, and of one described by files made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from djinn import gpus


@pytest.mark.parametrize(("said", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_numa_node_of_a_gpu_is_found_by_its_bus_id(tmp_path: Path, said: str | None, node: int | None) -> None:
    if said is not None:
        (tmp_path / "0000:1b:00.0").mkdir()
        (tmp_path / "0000:1b:00.0/numa_node").write_text(said)
    assert gpus._pci_numa_node("00000000:1B:00.0", tmp_path) == node


def test_a_gpu_that_is_not_there_has_no_numa_node() -> None:
    assert gpus.numa_node_of(10_000) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_driver_there_is_no_nvml() -> None:
    with gpus.nvml() as library:
        assert library is None


@pytest.mark.gpu
def test_a_cuda_device_tells_its_memory_and_link() -> None:
    gpu = gpus.gpus()[0]
    assert gpu.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert gpu.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))
    if gpu.pcie_generation is not None:
        assert gpu.pcie_generation_max is not None
        assert gpu.pcie_generation <= gpu.pcie_generation_max
