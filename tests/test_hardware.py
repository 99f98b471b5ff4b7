"""What djinn.hardware says of this machine, and of machines described by files made for the test."""

import importlib.metadata
import json
import os
import socket
from pathlib import Path

import psutil
import pytest
import torch

from djinn import hardware


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_machine_is_described_and_survives_a_round_trip(tmp_path: Path) -> None:
    machine = hardware.describe(tmp_path)
    assert machine.ram_bytes == psutil.virtual_memory().total
    assert 0 < machine.available_bytes <= machine.ram_bytes
    assert 0 < machine.ram_limit_bytes <= machine.ram_bytes
    assert machine.threads == os.cpu_count()
    assert machine.torch == importlib.metadata.version("torch")  # PyPI's for CUDA calls itself 2.13.0+cu130
    assert machine.disk_free_bytes > 0
    assert hardware.Machine.model_validate_json(machine.model_dump_json()) == machine


def test_the_description_names_neither_host_nor_user() -> None:
    described = json.dumps(hardware.describe().model_dump(mode="json"))
    assert socket.gethostname() not in described
    assert str(Path.home()) not in described
    assert str(Path.cwd()) not in described


def test_gpus_agree_with_torch() -> None:
    machine = hardware.describe()
    if torch.cuda.is_available():
        assert [gpu.name for gpu in machine.gpus] == [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
        assert machine.torch_sees_gpu
    else:
        assert not machine.torch_sees_gpu


def test_usable_ram_is_never_more_than_what_is_available() -> None:
    assert 0 < hardware.usable_ram() <= psutil.virtual_memory().total


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert hardware.free_disk(tmp_path / "not" / "yet") > 0
    assert hardware.free_disk(Path("not/yet")) > 0


def test_cgroup_v2_takes_the_tightest_limit_above_the_process(tmp_path: Path) -> None:
    _write(tmp_path / "membership", "0::/pod/container\n")
    root = tmp_path / "cgroup"
    _write(root / "pod/container/memory.max", "max\n")
    _write(root / "pod/memory.max", "8000\n")
    _write(root / "pod/memory.current", "5000\n")
    _write(root / "pod/memory.stat", "anon 1000\nactive_file 1500\ninactive_file 2500\n")
    assert hardware.cgroup_memory(tmp_path / "membership", root) == (8000, 7000)


def test_cgroup_v2_of_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    _write(tmp_path / "membership", "0::/\n")
    _write(tmp_path / "cgroup/memory.max", "4096\n")
    _write(tmp_path / "cgroup/memory.current", "96\n")
    assert hardware.cgroup_memory(tmp_path / "membership", tmp_path / "cgroup") == (4096, 4000)


def test_cgroup_v1_counts_descendants_and_ignores_no_limit(tmp_path: Path) -> None:
    _write(tmp_path / "membership", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    root = tmp_path / "cgroup"
    _write(root / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    _write(root / "memory/a/memory.limit_in_bytes", "6000\n")
    _write(root / "memory/a/memory.usage_in_bytes", "3000\n")
    _write(root / "memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 600\n")
    assert hardware.cgroup_memory(tmp_path / "membership", root) == (6000, 4000)


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    assert hardware.cgroup_memory(tmp_path / "membership", tmp_path) == (None, None)


def test_processors_of_a_node_are_read_from_the_kernels_list() -> None:
    assert hardware.cpu_list("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11}
    assert hardware.cpu_list("") == set()


def test_numa_nodes_come_in_order_with_their_memory(tmp_path: Path) -> None:
    for index, cpus in (10, "8-15"), (2, "0-7"):
        _write(tmp_path / f"node{index}/cpulist", cpus + "\n")
        _write(tmp_path / f"node{index}/meminfo", f"Node {index} MemTotal:       1024 kB\nNode {index} MemFree: 1 kB\n")
    assert hardware.numa_nodes(tmp_path) == (
        hardware.NumaNode(index=2, cpus="0-7", memory_bytes=2**20),
        hardware.NumaNode(index=10, cpus="8-15", memory_bytes=2**20),
    )


@pytest.mark.parametrize(("capabilities", "exempt"), [("000001fffeffffff", True), ("00000000a80425fb", False)])
def test_whether_memory_may_be_locked_past_the_limit(tmp_path: Path, capabilities: str, exempt: bool) -> None:
    _write(tmp_path / "status", f"Name:\tpython\nCapEff:\t{capabilities}\n")
    assert hardware.may_lock_memory(tmp_path / "status") is exempt


def test_an_unknown_package_has_no_version() -> None:
    assert hardware.installed("no-such-package-anywhere") is None


def test_a_quota_of_processors_is_the_tightest_above_the_process(tmp_path: Path) -> None:
    _write(tmp_path / "membership", "0::/pod/container\n")
    _write(tmp_path / "cgroup/pod/container/cpu.max", "max 100000\n")
    _write(tmp_path / "cgroup/pod/cpu.max", "650000 100000\n")
    assert hardware.cgroup_cpus(tmp_path / "membership", tmp_path / "cgroup") == 6.5


def test_a_quota_of_cgroup_v1(tmp_path: Path) -> None:
    _write(tmp_path / "membership", "5:cpu,cpuacct:/a\n")
    for path, quota in (("cpu", "-1"), ("cpu/a", "150000")):
        _write(tmp_path / f"cgroup/{path}/cpu.cfs_quota_us", quota)
        _write(tmp_path / f"cgroup/{path}/cpu.cfs_period_us", "100000")
    assert hardware.cgroup_cpus(tmp_path / "membership", tmp_path / "cgroup") == 1.5


def test_no_quota_of_processors(tmp_path: Path) -> None:
    assert hardware.cgroup_cpus(tmp_path / "membership", tmp_path) is None
