"""Verdicts of the checks on machines that differ from a good one in one respect."""

from typing import Any

import pytest

from djinn import hardware
from djinn.bench.certify.checks import check_all
from djinn.bench.certify.findings import Check, Findings, Package
from djinn.bench.certify.proof import Proof
from djinn.bench.rates.disk import DiskRate
from djinn.bench.rates.link import LinkRate
from djinn.bench.rates.several import LinksTogether
from djinn.gpus import Gpu
from djinn.planning.placement import Plan
from djinn.profiles import load_profile

GIB = 2**30

GPU = Gpu(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=80 * GIB,
    compute_capability="9.0",
    pcie_generation=5,
    pcie_generation_max=5,
    pcie_width=16,
    pcie_width_max=16,
    numa_node=1,
)
MACHINE = hardware.Machine(
    os="Debian",
    kernel="6",
    cpu="a CPU",
    cpu_features=(),
    cores=16,
    threads=32,
    ram_bytes=256 * GIB,
    available_bytes=250 * GIB,
    cgroup_limit_bytes=None,
    memlock_bytes=None,
    memlock_exempt=False,
    numa_nodes=(
        hardware.NumaNode(index=0, cpus="0-15", memory_bytes=128 * GIB),
        hardware.NumaNode(index=1, cpus="16-31", memory_bytes=128 * GIB),
    ),
    gpus=(GPU,),
    driver="580.1",
    driver_cuda="13.0",
    torch_cuda="13.0",
    rocm=None,
    python="3.11",
    torch="2.13.0",
    transformers="5.23.0",
    accelerate="1.15.0",
    deepspeed=None,
    disk_free_bytes=10**12,
)
PROOF = Proof(
    model="synthetic:llama-tiny",
    device="cuda",
    model_bytes=100,
    device_bytes=45,
    link_bytes=900,
    steps=6,
    logits_equal=True,
    tokens_equal=True,
)
PLAN = Plan(
    units=(),
    tiers=(),
    slots=(),
    budget=24 * 10**9,
    ring_bytes=0,
    workspace_bytes=0,
    scratch_bytes=0,
    model_bytes=138 * 10**9,
)
LINK = [LinkRate(kind="pinned to device", chunk_bytes=2**26, gbps=54.8)]
DISK = [DiskRate(kind="read", mode=mode, threads=1, gbps=1.5) for mode in ("buffered", "direct")]


def links(at_once: dict[tuple[int, ...], float]) -> list[LinksTogether]:
    """Links of 54.8 GB/s each alone, and what each carries beside others."""
    every = sorted({gpu for gpus in at_once for gpu in gpus})
    alone = [LinksTogether(gpus=(gpu,), gbps=(54.8,)) for gpu in every]
    return alone + [LinksTogether(gpus=gpus, gbps=(gbps,) * len(gpus)) for gpus, gbps in at_once.items()]


def _findings(machine: dict[str, Any] | None = None, gpu: dict[str, Any] | None = None, **changes: Any) -> Findings:
    described = MACHINE.model_copy(update=machine or {})
    if gpu is not None:
        described = described.model_copy(update={"gpus": (GPU.model_copy(update=gpu),)})
    good: dict[str, Any] = {
        "profile": load_profile("virt_mem_h100"),
        "machine": described,
        "usable_ram": 250 * GIB,
        "allowed_cpus": frozenset(range(16, 32)),
        "gpu_cpus": frozenset(range(16, 32)),
        "checkpoint_bytes": 0,
        "link": LINK,
        "link_reason": "",
        "disk": DISK,
        "disk_reason": "",
        "plan": PLAN,
        "plan_reason": "",
        "tools": {"C++ compiler": True, "ninja": True, "libaio headers": True},
        "packages": [Package(name="torch", version="2.13.0", allowed=">=2.11,<2.14", fits=True, optional=False)],
        "proof": PROOF,
        "proof_reason": "",
        "cpu_profiles": ["smoke_13b", "smoke_tiny"],
    }
    return Findings(**(good | changes))


def _named(findings: Findings) -> dict[str, Check]:
    return {check.name: check for check in check_all(findings)}


@pytest.mark.parametrize("found", [[], links({(0, 1): 54.0})])
def test_a_good_gpu_machine_passes_every_check(found: list[LinksTogether]) -> None:
    checks = check_all(_findings(links=found))
    assert any(check.name == "links at once" for check in checks) == bool(found)
    assert {check.verdict for check in checks} == {"pass"}
    assert not any(check.remedy for check in checks)
    assert len({check.name for check in checks}) == len(checks)


@pytest.mark.parametrize(
    ("name", "verdict", "remedy", "changes"),
    [
        ("device", "fail", "smoke_13b, smoke_tiny", {"machine": {"gpus": ()}}),
        ("device", "fail", "torch built for CUDA", {"machine": {"torch_cuda": None}}),
        ("device", "fail", "", {"profile": load_profile("ranks_2x24")}),  # there is one
        ("device memory", "fail", "budget", {"gpu": {"memory_bytes": 16 * GIB}}),
        ("driver", "fail", "CUDA 13.0", {"machine": {"driver_cuda": "12.4"}}),
        ("driver", "warn", "nvidia-ml-py", {"machine": {"driver_cuda": None}}),
        ("PCIe link", "warn", "slot", {"gpu": {"pcie_width": 8}}),
        ("PCIe link", "warn", "link rate", {"gpu": {"pcie_generation": None}}),
        ("NUMA", "warn", "--cpunodebind=1", {"allowed_cpus": frozenset(range(32))}),
        ("NUMA", "warn", "by hand", {"gpu": {"numa_node": None}}),
        ("link rate", "warn", "NUMA", {"link": [LinkRate(kind="pinned to device", chunk_bytes=1, gbps=20)]}),
        ("link rate", "fail", "refused", {"link": [], "link_reason": "refused"}),
        ("links at once", "warn", "GPUs 0 and 1 share", {"links": links({(0, 1): 26.0})}),
        ("links at once", "warn", "GPUs 1 and 2 share", {"links": links({(0, 1, 2): 40.0, (0, 1): 54, (1, 2): 27})}),
        ("links at once", "warn", "GPUs 0 and 1 and 2 share", {"links": links({(0, 1, 2): 40.0, (0, 1): 54})}),
        ("links at once", "warn", "refused", {"links_reason": "refused"}),
        ("RAM", "warn", "close", {"usable_ram": 100 * GIB}),
        ("RAM", "fail", "smaller profile", {"usable_ram": 8 * GIB, "machine": {"cgroup_limit_bytes": 8 * GIB}}),
        ("host memory", "warn", "close", {"usable_ram": 100 * GIB}),
        ("host memory", "fail", "host_memory", {"usable_ram": 8 * GIB, "machine": {"ram_bytes": 64 * GIB}}),
        ("memlock", "fail", "ulimit", {"machine": {"memlock_bytes": 8 * 2**20}, "link": []}),
        ("disk space", "fail", "free", {"machine": {"disk_free_bytes": 10**9}}),
        ("direct I/O", "warn", "ext4", {"disk": DISK[:1]}),
        ("split modules", "warn", "no group", {"missing": {"compute": "", "split modules": "no group"}}),
        ("plan", "fail", "ring too small", {"plan": None, "plan_reason": "ring too small"}),
        ("ninja", "warn", "pip install ninja", {"tools": {"ninja": False}}),
        ("libaio headers", "warn", "apt install libaio-dev", {"tools": {"libaio headers": False}}),
        ("C++ compiler", "warn", "apt install g++", {"tools": {"C++ compiler": False}}),
        ("streamed = resident", "fail", "no such device", {"proof": None, "proof_reason": "no such device"}),
        ("streamed = resident", "fail", "report", {"proof": PROOF.model_copy(update={"logits_equal": False})}),
        ("streamed = resident", "fail", "report", {"proof": PROOF.model_copy(update={"device_bytes": 50})}),
        ("streamed = resident", "fail", "report", {"proof": PROOF.model_copy(update={"link_bytes": 0})}),
    ],
)
def test_what_is_wrong_is_found_with_its_remedy(name: str, verdict: str, remedy: str, changes: dict[str, Any]) -> None:
    check = _named(_findings(**changes))[name]
    assert check.verdict == verdict
    assert remedy in check.remedy


@pytest.mark.parametrize(("optional", "verdict"), [(True, "warn"), (False, "fail")])
def test_a_package_outside_its_range(optional: bool, verdict: str) -> None:
    package = Package(name="deepspeed", version=None, allowed=">=0.19.8", fits=False, optional=optional)
    check = _named(_findings(packages=[package]))["deepspeed"]
    assert (check.verdict, check.measured, check.remedy) == (
        verdict,
        "not installed",
        "pip install 'deepspeed>=0.19.8'",
    )


def test_a_memlock_limit_that_the_driver_does_not_charge_passes() -> None:
    check = _named(_findings(machine={"memlock_bytes": 8 * 2**20}))["memlock"]
    assert check.verdict == "pass"
    assert "does not bind the GPU's driver" in check.measured


def test_without_a_gpu_memlock_is_a_warning() -> None:
    findings = _findings(
        profile=load_profile("smoke_13b"), machine={"gpus": (), "memlock_bytes": 8 * 2**20}, link=[], plan=PLAN
    )
    assert _named(findings)["memlock"].verdict == "warn"


def test_a_machine_sold_with_the_ram_that_is_needed_only_warns() -> None:
    findings = _findings(
        profile=load_profile("smoke_13b"), machine={"gpus": (), "ram_bytes": int(11.7 * GIB)}, usable_ram=11 * GIB
    )
    assert _named(findings)["RAM"].verdict == "warn"


def test_a_checkpoint_that_is_there_already_needs_no_more_room() -> None:
    profile = load_profile("smoke_13b")
    findings = _findings(profile=profile, machine={"gpus": (), "disk_free_bytes": profile.min_disk - 1})
    assert _named(findings)["disk space"].verdict == "fail"
    findings = _findings(
        profile=profile,
        machine={"gpus": (), "disk_free_bytes": profile.min_disk - 1},
        checkpoint_bytes=26 * 10**9,
    )
    assert _named(findings)["disk space"].verdict == "pass"


def test_a_cpu_profile_is_not_asked_about_a_gpu_nor_deepspeeds_tools_without_deepspeed() -> None:
    profile = load_profile("smoke_tiny").override(systems=["djinn", "resident"])
    checks = _named(_findings(profile=profile, machine={"gpus": ()}, tools={"ninja": False}))
    assert checks["device"].verdict == "pass"
    assert not {"driver", "PCIe link", "NUMA", "link rate", "ninja"} & set(checks)


def test_a_disk_too_slow_for_the_time_out_is_a_warning() -> None:
    class DiskPlan(Plan):
        disk_bytes = 26 * 10**9  # type: ignore[assignment]

    plan = DiskPlan(**{field: getattr(PLAN, field) for field in PLAN.__dataclass_fields__})
    profile = load_profile("smoke_13b").override(timeout_s=30)
    check = _named(_findings(profile=profile, machine={"gpus": ()}, plan=plan))["disk rate"]
    assert check.verdict == "warn"
    assert "2.6 GB/s" in check.needed
