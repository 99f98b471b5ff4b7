"""A run directory as one object: where its files are, what they hold, and which configuration it is bound to."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired

import yaml
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from djinn.bench.certify.certification import Certification, read_certification
from djinn.bench.records import Record, latest, read_records, swept_label, system_label
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.hardware import Machine
from djinn.names import local_folder
from djinn.places import from_root
from djinn.profiles import Profile, load_profile, system_names
from djinn.reading import read_json


class Done(TypedDict):
    """What a notebook that ended well has noted of itself; it notes more than is read here."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]

    wall_s: Annotated[float, Field(ge=0, le=10**9)]
    began_at: NotRequired[str]
    revision: NotRequired[str | None]
    dirty: NotRequired[bool | None]


class Provenance(TypedDict, total=False):
    """What is read of a ``provenance.json``, which holds more."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]

    machine: Machine | None
    revision: str | None
    dirty: bool | None
    lock_sha256: str | None
    packages: dict[str, str] | None


class Origin(TypedDict):
    """Whose records a run replays."""

    machine: str
    date: str


@dataclass(frozen=True)
class Run:
    """The results of one configuration in ``folder``. A file that is not there yet holds nothing; each is read once."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, profile: Profile) -> Run:
        """Make a run directory, check that it can be written, and bind it to ``profile``: its ``profile.yaml``.

        Raises:
            ConfigError: a URL, not writable, or it holds another configuration; each difference is named.
        """
        run = cls(local_folder(folder))
        try:
            run.results.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.results):
                pass
        except (OSError, ValueError) as error:  # a NUL in its name is a ValueError
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"run_dir {from_root(folder)} cannot be written: {why}; choose another") from None
        if not run.has_profile:
            write_text(run.profile_path, yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False))
            return run
        before, now = run.profile.model_dump(mode="json"), profile.model_dump(mode="json")
        changed = [
            f"{key}: {before.get(key, 'not set')} there, {now.get(key, 'not set')} asked for"
            for key in before | now
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ConfigError(
                f"run_dir {from_root(folder)} holds another configuration ({'; '.join(changed)}); "
                "give the same parameters as before, or another run_dir"
            )
        return run

    @property
    def results(self) -> Path:
        """The folder of raw results."""
        return self.folder / "results"

    @property
    def profile_path(self) -> Path:
        """The file of the profile that the run is bound to."""
        return self.folder / "profile.yaml"

    @property
    def has_profile(self) -> bool:
        """Whether the folder is a run directory at all."""
        return self.profile_path.is_file()

    @cached_property
    def profile(self) -> Profile:
        """The profile that the run is bound to.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        return load_profile(self.profile_path)

    @cached_property
    def baselines(self) -> list[Record]:
        """The latest record of every point of the comparison.

        Raises:
            ConfigError: a damaged file, or a system that no profile can list.
        """
        path = self.results / "baselines.jsonl"
        records = latest(read_records(path))
        for record in records:
            _require_known(system_label(record), path)
        return records

    @cached_property
    def sweep(self) -> list[Record]:
        """The latest record of every point of the sweep.

        Raises:
            ConfigError: a damaged file, or a system that no profile can list.
        """
        path = self.results / "sweep.jsonl"
        records = latest(read_records(path))
        for record in records:
            _require_known(swept_label(record), path)
        return records

    @cached_property
    def certification(self) -> Certification | None:
        """What was found out of the machine.

        Raises:
            ConfigError: a damaged file.
        """
        return read_certification(self.folder)

    @property
    def replay_path(self) -> Path:
        """In a run that holds reference records: the machine and the date that they are of."""
        return self.folder / "replayed.json"

    @cached_property
    def replayed(self) -> str:
        """Words that say whose records the run replays; none where they were measured for it.

        Raises:
            ConfigError: a damaged file.
        """
        if not self.replay_path.is_file():
            return ""
        origin = read_json(self.replay_path, Origin)
        return f"replayed: {origin['machine']}, {origin['date']}"

    @cached_property
    def provenance(self) -> Provenance:
        """What ``provenance.json`` holds; nothing where there is none.

        Raises:
            ConfigError: a damaged file.
        """
        path = self.folder / "provenance.json"
        return read_json(path, Provenance) if path.is_file() else {}

    @property
    def machine(self) -> Machine | None:
        """The machine that measured the run: the one that was certified.

        What was drawn again elsewhere may have a provenance that was written there.

        Raises:
            ConfigError: a damaged file.
        """
        return self.certification.machine if self.certification else self.provenance.get("machine")

    def done_path(self, notebook: str) -> Path:
        """Return the sentinel of a notebook: it is there once the notebook has ended well."""
        return self.results / f"{notebook}.done.json"

    def done(self, notebook: str) -> Done | None:
        """Return what a notebook that ended well has noted of itself, or None.

        Raises:
            ConfigError: a damaged file.
        """
        path = self.done_path(notebook)
        return read_json(path, Done) if path.is_file() else None

    @property
    def notebooks_done(self) -> dict[str, Done]:
        """What each notebook that ended well has noted of itself, by name.

        Raises:
            ConfigError: a damaged file.
        """
        paths = sorted(self.results.glob("*.done.json"))
        return {path.name.removesuffix(".done.json"): read_json(path, Done) for path in paths if path.is_file()}


def _require_known(name: str, path: Path) -> None:
    if name not in system_names():
        raise ConfigError(f"{path}: no system {name!r}; the systems are {', '.join(system_names())}")
