"""A run directory as one object: where its files are, what they hold, and which configuration it is bound to."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from djinn.bench.certify.certification import Certification, read_certification
from djinn.bench.records import Record, latest, read_records
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.places import from_root
from djinn.profiles import Profile, load_profile


@dataclass(frozen=True)
class Run:
    """The results of one configuration in ``folder``. A file that is not there yet holds nothing; each is read once."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, profile: Profile) -> Run:
        """Make a run directory, check that it can be written, and bind it to ``profile``: its ``profile.yaml``.

        Raises:
            ConfigError: it cannot be written, or holds another configuration; each difference is named.
        """
        run = cls(folder)
        try:
            run.results.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.results):
                pass
        except OSError as error:
            raise ConfigError(
                f"run_dir {from_root(folder)} cannot be written: {error.strerror}; choose another"
            ) from None
        if not run.has_profile:
            write_text(run.profile_path, yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False))
            return run
        before, now = run.profile.model_dump(mode="json"), profile.model_dump(mode="json")
        changed = [f"{key}: {before[key]} there, {now[key]} asked for" for key in now if before[key] != now[key]]
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
            ConfigError: a damaged file.
        """
        return latest(read_records(self.results / "baselines.jsonl"))

    @cached_property
    def sweep(self) -> list[Record]:
        """The latest record of every point of the sweep.

        Raises:
            ConfigError: a damaged file.
        """
        return latest(read_records(self.results / "sweep.jsonl"))

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
        """Words that say whose records the run replays; none where they were measured for it."""
        origin = _json(self.replay_path)
        return f"replayed: {origin['machine']}, {origin['date']}" if origin else ""

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What ``provenance.json`` holds."""
        return _json(self.folder / "provenance.json")

    def done_path(self, notebook: str) -> Path:
        """Return the sentinel of a notebook: it is there once the notebook has ended well."""
        return self.results / f"{notebook}.done.json"

    def done(self, notebook: str) -> dict[str, Any] | None:
        """Return what a notebook that ended well has noted of itself, or None."""
        return _json(self.done_path(notebook)) or None

    @property
    def notebooks_done(self) -> dict[str, dict[str, Any]]:
        """What each notebook that ended well has noted of itself, by name."""
        paths = sorted(self.results.glob("*.done.json"))
        return {path.name.removesuffix(".done.json"): _json(path) for path in paths}


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
