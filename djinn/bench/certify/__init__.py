"""Certify: measure this machine, check it against a profile, and prove the functional claim on a small model.

Nothing that is found out here raises: a machine that cannot do what the profile asks is a certification with a
failed check, and the caller decides what follows from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from packaging.requirements import Requirement
from tqdm import tqdm

from djinn import hardware
from djinn.bench.certify.certification import Certification
from djinn.bench.certify.checks import check_all
from djinn.bench.certify.findings import Findings, Package
from djinn.bench.certify.proof import prove
from djinn.bench.ownership import owned
from djinn.bench.rates import compute, disk, link, several, streaming
from djinn.engine.opened import outlined
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.hardware import Machine
from djinn.host import rates as host
from djinn.places import CERTIFICATION, CHECKPOINT_DIR
from djinn.planning.placement import Plan
from djinn.profiles import Profile, load_profile, profile_names
from djinn.weights.called import SYNTHETIC
from djinn.weights.resolve import synthetic_folder

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
_Result = TypeVar("_Result")


def certify(profile: Profile, run_dir: Path, *, progress: bool = True) -> Certification:
    """Measure, check and prove; write the result to ``run_dir/results/certify.json`` and return it.

    Takes about a minute, or two on a slow processor: the disk is measured with a file of at most 1 GiB that is deleted
    again.

    Raises:
        ConfigError: another process measures in the run directory.
        OSError: the run directory cannot be written.
    """
    with owned(run_dir):
        return _certified(profile, run_dir, progress)


def _certified(profile: Profile, run_dir: Path, progress: bool) -> Certification:
    target = run_dir / CERTIFICATION
    checkpoint = _checkpoint(profile)
    folder = CHECKPOINT_DIR if checkpoint else run_dir
    folder.mkdir(parents=True, exist_ok=True)
    chunks = sorted({profile.chunk, *profile.sweep.chunks})
    with tqdm(total=7, desc="certify: link", disable=not progress) as bar:

        def step(then: str) -> None:
            bar.update()
            bar.set_description(f"certify: {then}")

        link_rates, link_reason = _tried(lambda: link.rates(chunks))
        # A GPU's link shows its true generation only while it is used, so the machine is described now.
        machine = hardware.describe(folder)
        on_gpu = machine.torch_sees_gpu and torch.cuda.is_available()
        gpus = torch.cuda.device_count() if on_gpu else 0
        links, links_reason = _tried(lambda: several.links(gpus)) if gpus > 1 else (None, "")
        missing: dict[str, str] = {}
        sums, missing["sums over GPUs"] = _tried(lambda: several.sums(gpus)) if gpus > 1 else (None, "")
        step("disk")
        disk_rates, disk_reason = _tried(lambda: disk.rates(folder, min(2**30, profile.min_disk // 4)))
        device = torch.device("cuda" if on_gpu else "cpu")
        step("compute")
        computed, missing["compute"] = _tried(lambda: compute.measure(device))
        step("streaming")
        streamed, missing["streaming"] = _tried(lambda: streaming.measure(device))
        if streamed is not None and profile.gpus > 1:
            split_s, missing["split modules"] = _tried(lambda: streaming.split_s(device))
            streamed = streamed.model_copy(update={"split_s": split_s})
        step("host")
        cores, missing["host's cores"] = _tried(lambda: host.measure(device))
        step("plan")
        plan, plan_reason = _tried(lambda: plan_of(profile))
        step("streamed = resident")
        proof, proof_reason = _tried(lambda: prove("cuda" if on_gpu and profile.device == "cuda" else "cpu"))
        step("done")
    findings = Findings(
        profile=profile,
        machine=machine,
        usable_ram=hardware.usable_ram(),
        allowed_cpus=frozenset(hardware.allowed_cpus() or ()),
        gpu_cpus=gpu_cpus(machine),
        checkpoint_bytes=_size(checkpoint) if checkpoint else 0,
        link=link_rates or [],
        link_reason=link_reason,
        disk=disk_rates or [],
        disk_reason=disk_reason,
        links=links or [],
        links_reason=links_reason,
        missing=missing,
        plan=plan,
        plan_reason=plan_reason,
        tools=_tools(),
        packages=_packages(),
        proof=proof,
        proof_reason=proof_reason,
        cpu_profiles=[name for name in profile_names() if load_profile(name).device == "cpu"],
    )
    certification = Certification(
        profile=profile.name,
        config_digest=profile.digest,
        machine=machine,
        link=tuple(findings.link),
        disk=tuple(findings.disk),
        links=tuple(findings.links),
        sums=tuple(sums or ()),
        compute=computed,
        host=cores,
        streaming=streamed,
        proof=proof,
        checks=tuple(check_all(findings)),
    )
    write_text(target, certification.model_dump_json(indent=2) + "\n")
    return certification


def _tried(measure: Callable[[], _Result]) -> tuple[_Result | None, str]:
    """Return (result, ""), or (None, why): whatever a driver, a disk or a model's code raises is a finding here."""
    try:
        return measure(), ""
    except Exception as error:
        return None, str(error) or type(error).__name__


def _checkpoint(profile: Profile) -> Path | None:
    """Return the folder where the profile's synthetic checkpoint is or will be; None for models from elsewhere."""
    if profile.weights == "memory" or not profile.synthetic:
        return None
    return synthetic_folder(profile.model.removeprefix(SYNTHETIC), seed=profile.seed, dtype=profile.dtype)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def plan_of(profile: Profile) -> Plan:
    """Plan the profile's model, from a synthetic model's config alone, so that no checkpoint has to be there yet."""
    if not profile.synthetic and not Path(profile.model).expanduser().is_dir():
        raise ConfigError(f"{profile.model} is not on this disk yet; fetch it, and certify again")
    model = outlined(profile.model, profile.request(), profile.gpus)
    if profile.weights == "disk":
        model = model.on_disk()
    return model.place(profile.host_memory // profile.gpus)


def gpu_cpus(machine: Machine) -> frozenset[int]:
    """Return the processors of the first GPU's NUMA node."""
    node = machine.gpus[0].numa_node if machine.gpus else None
    listed = next((numa.cpus for numa in machine.numa_nodes if numa.index == node), "")
    return frozenset(hardware.cpu_list(listed))


def _tools() -> dict[str, bool]:
    """Look for what DeepSpeed builds with, as it will look for them itself."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    beside_python = str(Path(sys.executable).parent)
    headers = False
    if compiler is not None:
        program = "#include <libaio.h>\n"
        asked = subprocess.run(
            [compiler, "-x", "c++", "-E", "-o", os.devnull, "-"], input=program, text=True, capture_output=True
        )
        headers = asked.returncode == 0
    return {
        "C++ compiler": compiler is not None,
        "ninja": (shutil.which("ninja") or shutil.which("ninja", path=beside_python)) is not None,
        "libaio headers": headers,
    }


def _packages() -> list[Package]:
    """Return the packages that decide what is measured, against the ranges that djinn's own metadata allows."""
    found = []
    for line in importlib.metadata.requires("djinn") or ():
        requirement = Requirement(line)
        if requirement.name in _PACKAGES:
            version = hardware.installed(requirement.name)
            found.append(
                Package(
                    name=requirement.name,
                    version=version,
                    allowed=str(requirement.specifier),
                    fits=version is not None and requirement.specifier.contains(version, prereleases=True),
                    optional=requirement.marker is not None,
                )
            )
    return found
