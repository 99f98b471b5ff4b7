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
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from djinn import hardware
from djinn.bench import compute, disk, link
from djinn.bench.checks import check_all
from djinn.bench.compute import Compute
from djinn.bench.disk import DiskRate
from djinn.bench.findings import Check, Findings, Package
from djinn.bench.link import LinkRate
from djinn.bench.proof import Proof, prove
from djinn.config import Profile, load_profile, profile_names
from djinn.engine.plan import Plan
from djinn.engine.planning import as_coded, estimating, on_disk, place, workspace_of
from djinn.engine.predict import Rates
from djinn.engine.workspace import Workload
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.hardware import Machine
from djinn.places import CERTIFICATION, CHECKPOINT_DIR, certification_path
from djinn.weights.architectures import load_architecture
from djinn.weights.checkpoint import SYNTHETIC, synthetic_folder
from djinn.weights.index import WeightIndex, checkpoint_index, empty_model, synthetic_index

if TYPE_CHECKING:
    import pandas as pd

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
_Result = TypeVar("_Result")


class Certification(BaseModel):
    """What was found; written to ``results/certify.json`` of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    config_digest: str
    machine: Machine
    link: tuple[LinkRate, ...]
    disk: tuple[DiskRate, ...]
    compute: Compute | None = None
    """None in records from before it was measured, and where measuring it failed."""
    proof: Proof | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    @property
    def rates(self) -> Rates:
        """What plans are predicted from: the best of each kind of rate, of the device that was certified."""
        on_gpu = any(rate.kind == "pinned to device" for rate in self.link)
        kind = "pinned to device" if on_gpu else "memcpy"
        copies = [rate.gbps * 1e9 for rate in self.link if rate.kind == kind]
        reads = [rate.gbps * 1e9 for rate in self.disk if rate.kind == "read" and rate.gbps is not None]
        direct = [rate.gbps * 1e9 for rate in self.disk if (rate.kind, rate.mode) == ("read", "direct") and rate.gbps]
        # Small chunks stay in a processor's cache, which a model does not.
        best = max if on_gpu else min
        computed = self.compute or Compute(device="cuda" if on_gpu else "cpu", rates=(), module_s=0.0)
        return computed.rates_with(link=best(copies, default=None), disk=max(direct or reads, default=None))

    def frame(self) -> pd.DataFrame:
        """Return a row per check: check, measured, needed, verdict, remedy."""
        import pandas as pd  # of the artifact extra; certifying does without

        rows = [check.model_dump() for check in self.checks]
        return pd.DataFrame(rows).rename(columns={"name": "check"})

    def rates_frame(self) -> pd.DataFrame:
        """Return a row per rate: what, chunk_bytes, threads, gbps (10^9 bytes/s), reason. Missing stays missing."""
        import pandas as pd

        rows: list[dict[str, object]] = [
            {"what": rate.kind, "chunk_bytes": rate.chunk_bytes, "gbps": rate.gbps} for rate in self.link
        ]
        rows += [
            {
                "what": f"disk {rate.kind}, {rate.mode}",
                "chunk_bytes": disk.BLOCK,
                "threads": rate.threads,
                "gbps": rate.gbps,
                "reason": rate.reason,
            }
            for rate in self.disk
        ]
        return pd.DataFrame(rows, columns=["what", "chunk_bytes", "threads", "gbps", "reason"])


def certify(profile: Profile, run_dir: Path, *, progress: bool = True) -> Certification:
    """Measure, check and prove; write the result to ``run_dir/results/certify.json`` and return it.

    Takes about a minute, or two on a slow processor: the disk is measured with a file of at most 1 GiB that is deleted
    again.

    Raises:
        OSError: the run directory cannot be written.
    """
    target = run_dir / CERTIFICATION
    checkpoint = _checkpoint(profile)
    folder = CHECKPOINT_DIR if checkpoint else run_dir
    folder.mkdir(parents=True, exist_ok=True)
    chunks = sorted({profile.chunk, *profile.sweep.chunks})
    with tqdm(total=5, desc="certify: link", disable=not progress) as bar:

        def step(then: str) -> None:
            bar.update()
            bar.set_description(f"certify: {then}")

        link_rates, link_reason = _tried(lambda: link.rates(chunks))
        # A GPU's link shows its true generation only while it is used, so the machine is described now.
        machine = hardware.describe(folder)
        step("disk")
        disk_rates, disk_reason = _tried(lambda: disk.rates(folder, min(2**30, profile.min_disk // 4)))
        step("compute")
        on_gpu = machine.torch_sees_gpu and torch.cuda.is_available()
        computed, _ = _tried(lambda: compute.measure(torch.device("cuda" if on_gpu else "cpu")))
        step("plan")
        plan, plan_reason = _tried(lambda: _plan(profile))
        step("streamed = resident")
        proof, proof_reason = _tried(lambda: prove("cuda" if on_gpu and profile.device == "cuda" else "cpu"))
        step("done")
    findings = Findings(
        profile=profile,
        machine=machine,
        usable_ram=hardware.usable_ram(),
        allowed_cpus=frozenset(hardware.allowed_cpus() or ()),
        gpu_cpus=_gpu_cpus(machine),
        checkpoint_bytes=_size(checkpoint) if checkpoint else 0,
        link=link_rates or [],
        link_reason=link_reason,
        disk=disk_rates or [],
        disk_reason=disk_reason,
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
        compute=computed,
        proof=proof,
        checks=tuple(check_all(findings)),
    )
    write_text(target, certification.model_dump_json(indent=2) + "\n")
    return certification


def read_certification(run_dir: Path) -> Certification | None:
    """Read the certification of a run, or of a folder that holds it alone; None if there is none yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = certification_path(run_dir)
    if path is None:
        return None
    try:
        return Certification.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ConfigError(f"{path}: not a certification: {error}; delete it and certify again") from None


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


def _plan(profile: Profile) -> Plan:
    """Plan the profile's model, from a synthetic model's config alone, so that no checkpoint has to be there yet."""
    work = Workload(prompt_tokens=profile.prompt_tokens, new_tokens=profile.new_tokens, batch=profile.batch)
    device = torch.device(profile.device)
    with tempfile.TemporaryDirectory(prefix="djinn-") as spill, estimating() as layout:
        index = _index(profile, Path(spill))
        index = as_coded(index, workspace_of(index, device, work), profile.budget, profile.coding, layout)
    if profile.weights == "disk":
        index = on_disk(index)
    return place(index, device, work, profile.budget, profile.ring, profile.host_memory)


def _index(profile: Profile, spill: Path) -> WeightIndex:
    if profile.synthetic:
        config = load_architecture(profile.model.removeprefix(SYNTHETIC))
        return synthetic_index(empty_model(config, getattr(torch, profile.dtype)), profile.seed)
    folder = Path(profile.model).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{profile.model} is not on this disk yet; fetch it, and certify again")
    return checkpoint_index(folder, spill)


def _gpu_cpus(machine: Machine) -> frozenset[int]:
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
