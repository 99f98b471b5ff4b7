"""Machines whose rates are known: this one once it is certified, and those that left reference records.

Names are looked up without torch, which takes seconds to import: a misspelt one is refused at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from djinn.bench.data_sheets import DATA_SHEETS
from djinn.errors import ConfigError
from djinn.places import CERTIFICATION, REFERENCE_DIR, RUNS_DIR, certification_path

if TYPE_CHECKING:
    from djinn.bench.certify.certification import Certification
    from djinn.hardware import Machine
    from djinn.planning.host import HostRates


def machine_names(root: Path = REFERENCE_DIR) -> list[str]:
    """Return the names of reference machines that were certified."""
    return [folder.name for folder in sorted(root.glob("*/")) if certification_path(folder) is not None]


def certified_folder(name: str, root: Path = REFERENCE_DIR) -> Path:
    """Return the folder of a reference machine, or a run directory that holds a certification.

    Raises:
        ConfigError: neither of these.
    """
    for folder in (root / name, Path(name)):
        if name and certification_path(folder) is not None:
            return folder
    raise ConfigError(
        f"no machine {name!r}; the machines are {', '.join(machine_names(root))}, those of data sheets "
        f"{', '.join(DATA_SHEETS)}, or a run directory that `djinn certify` has written to"
    )


def machine_of(name: str, root: Path = REFERENCE_DIR) -> Certification:
    """Return the certification of a reference machine, or of a run directory.

    Raises:
        ConfigError: neither of these, or a damaged file.
    """
    from djinn.bench.certify.certification import read_certification

    found = read_certification(certified_folder(name, root))
    assert found is not None
    return found


def certified_here(device: str, runs: Path | None = None) -> tuple[Path, Certification] | None:
    """Return the newest certification of this machine for a device (cpu or cuda), and its run; None without one."""
    from djinn import hardware
    from djinn.bench.run import Run

    here = kind_of(hardware.describe())
    found = sorted((runs or RUNS_DIR).glob(f"*/{CERTIFICATION}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        run = Run(path.parent.parent)
        certification = None if run.replayed else run.certification
        if certification and certification.rates.device == device and kind_of(certification.machine) == here:
            return run.folder, certification
    return None


def host_rates_here() -> HostRates | None:
    """Return how fast this machine's link and cores are while both are busy; None where nobody has measured that."""
    here = certified_here("cuda")
    return None if here is None else here[1].rates.host


def kind_of(machine: Machine) -> tuple[object, ...]:
    """Return what makes two descriptions those of one machine, as far as rates go."""
    return machine.cpu, machine.threads, machine.ram_bytes, tuple(gpu.name for gpu in machine.gpus)
