"""Machines whose rates are known: this one once it is certified, and those that left reference records."""

from __future__ import annotations

from pathlib import Path

from djinn import hardware
from djinn.bench.certification import RESULT, Certification, read_certification
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.hardware import Machine
from djinn.places import REFERENCE_DIR, RUNS_DIR


def machine_names(root: Path = REFERENCE_DIR) -> list[str]:
    """Return the names of reference machines that were certified."""
    return [folder.name for folder in sorted(root.glob("*/")) if read_certification(folder) is not None]


def machine_of(name: str, root: Path = REFERENCE_DIR) -> Certification:
    """Return the certification of a reference machine, or of a run directory.

    Raises:
        ConfigError: neither of these, or a damaged file.
    """
    for folder in (root / name, Path(name)):
        if name and folder.is_dir() and (found := read_certification(folder)) is not None:
            return found
    raise ConfigError(
        f"no machine {name!r}; the machines are {', '.join(machine_names(root))}, or a run directory that "
        "`djinn certify` has written to"
    )


def certified_here(device: str, runs: Path | None = None) -> tuple[Path, Certification] | None:
    """Return the newest certification of this machine for a device (cpu or cuda), and its run; None without one."""
    here = _kind(hardware.describe())
    found = sorted((runs or RUNS_DIR).glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        run = Run(path.parent.parent)
        certification = None if run.replayed else run.certification
        if certification and certification.rates.device == device and _kind(certification.machine) == here:
            return run.folder, certification
    return None


def _kind(machine: Machine) -> tuple[object, ...]:
    """Return what makes two descriptions those of one machine, as far as rates go."""
    return machine.cpu, machine.threads, machine.ram_bytes, tuple(gpu.name for gpu in machine.gpus)
