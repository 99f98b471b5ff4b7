"""Which profile this machine can hold: the largest whose device, memory and disk needs are met, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from djinn import hardware
from djinn.errors import CheckpointError, UnavailableError
from djinn.places import CHECKPOINT_DIR
from djinn.profiles import Profile, load_profile, profile_names
from djinn.sizes import format_bytes
from djinn.weights.called import SYNTHETIC
from djinn.weights.resolve import synthetic_folder
from djinn.weights.synthetic_checkpoint import verify


@dataclass(frozen=True)
class Resources:
    """What a machine offers. Sizes are bytes; ``gpus`` is name and memory of each that torch can use."""

    ram_bytes: int
    disk_bytes: int
    gpus: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Choice:
    """The chosen profile, its estimated minutes, and for every profile why it was taken or not, largest first."""

    profile: Profile
    reasons: Mapping[str, str]
    minutes: float

    def text(self) -> str:
        """Return the choice and its reasons, a line each."""
        lines = [f"{self.profile.name}: {self.profile.title}, about {self.minutes:g} minutes"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


def choose() -> Choice:
    """Return the largest profile that this machine can hold now.

    Raises:
        UnavailableError: it cannot hold even the smallest; the message says what each one lacks.
    """
    profiles = [load_profile(name) for name in profile_names()]
    machine = hardware.describe(CHECKPOINT_DIR)
    usable = machine.gpus if machine.torch_sees_gpu else ()
    resources = Resources(
        ram_bytes=min(machine.ram_limit_bytes, hardware.usable_ram()),
        disk_bytes=machine.disk_free_bytes,
        gpus=tuple((gpu.name, gpu.memory_bytes) for gpu in usable),
    )
    return choose_from(profiles, resources, {profile.name: _on_disk(profile) for profile in profiles})


def choose_from(profiles: Sequence[Profile], resources: Resources, on_disk: Mapping[str, int]) -> Choice:
    """Return the largest of ``profiles`` that ``resources`` can hold: most device memory first, then RAM, then disk.

    ``on_disk`` says how many bytes of each profile's checkpoint are complete on disk already, and so need no room.
    """
    chosen: Profile | None = None
    reasons = {}
    sizes = {profile.name: (profile.min_device or 0, profile.min_ram, profile.min_disk) for profile in profiles}
    for profile in sorted(profiles, key=lambda profile: sizes[profile.name], reverse=True):
        lacking = _lacking(profile, resources, on_disk.get(profile.name, 0))
        if lacking:
            reasons[profile.name] = "not taken: " + "; ".join(lacking)
        elif chosen is None:
            chosen = profile
            reasons[profile.name] = "taken: the largest that this machine can hold"
        else:
            reasons[profile.name] = "not taken: smaller"
    if chosen is None:
        lines = [f"{name}: {reason}" for name, reason in reasons.items()]
        raise UnavailableError("this machine can hold no profile:\n  " + "\n  ".join(lines))
    return Choice(chosen, reasons, chosen.minutes)


def _lacking(profile: Profile, resources: Resources, on_disk: int) -> list[str]:
    lacking = []
    if profile.device == "cuda":
        needed = profile.min_device or profile.budget
        wanted = "a GPU" if profile.gpus == 1 else f"{profile.gpus} GPUs"
        if not resources.gpus:
            lacking.append(f"needs {wanted} with {format_bytes(needed)} that torch can use; there is none")
        elif sum(size >= needed for _, size in resources.gpus) < profile.gpus:
            found = ", ".join(f"{name} with {format_bytes(size)}" for name, size in resources.gpus)
            lacking.append(f"needs {wanted} with {format_bytes(needed)}; found {found}")
    if resources.ram_bytes < profile.min_ram:
        free = format_bytes(resources.ram_bytes)
        lacking.append(f"needs {format_bytes(profile.min_ram)} of RAM; {free} can be used")
    if resources.disk_bytes + on_disk < profile.min_disk:
        there = f" besides the {format_bytes(on_disk)} already there" if on_disk else ""
        needed_disk = format_bytes(profile.min_disk - on_disk)
        lacking.append(f"needs {needed_disk} of free disk{there}; {format_bytes(resources.disk_bytes)} are free")
    return lacking


def _on_disk(profile: Profile) -> int:
    """Return the bytes of the profile's synthetic checkpoint if it is complete on disk, else 0."""
    if not profile.synthetic or profile.weights == "memory":
        return 0
    folder = synthetic_folder(profile.model.removeprefix(SYNTHETIC), seed=profile.seed, dtype=profile.dtype)
    try:
        verify(folder)
    except CheckpointError:
        return 0
    return sum(path.stat().st_size for path in folder.iterdir())
