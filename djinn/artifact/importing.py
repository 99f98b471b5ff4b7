"""A run that was measured elsewhere becomes a reference: its records go to ``data/reference``, with a manifest.

python -m djinn.artifact.importing RUN NAME --machine "one NVIDIA H100 80GB, 125 GiB of RAM" --notes "What to know."
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from djinn.artifact.bundle import verify, write_sums
from djinn.artifact.reference import Manifest, Source
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.names import plain_name
from djinn.places import REFERENCE_DIR, from_root

_DRAWS = "04_figures"
"""The notebook that measures nothing."""
_SHORT = 7
"""Digits of a revision in a manifest."""


def unclean(run: Run) -> list[str]:
    """Return what is wrong with where a run's records come from, a few words each; nothing for a clean one.

    The run and each notebook that measured name a revision, and the tree held no changes to it.
    """
    measured = {name: done for name, done in run.notebooks_done.items() if name != _DRAWS}
    stated = {"the run": run.provenance, **measured}
    problems = []
    for what, state in stated.items():
        if not state.get("revision"):
            problems.append(f"{what} names no revision")
        elif state.get("dirty") is not False:
            problems.append(f"{what} ran with uncommitted changes")
    return problems


def import_run(run_dir: Path, name: str, machine: str, notes: str = "", root: Path = REFERENCE_DIR) -> Path:
    """Copy a verified run's records to ``root/name``, with manifest and checksums; return that folder.

    Pages and figures are left behind: a replay draws them again. ``notes`` are what a reader of the comparison has to
    know; they stand under its table.

    Raises:
        ConfigError: no run, one without a comparison, uncommitted changes or no revision, or a name that is taken.
        CheckpointError: files that changed since the run ended.
    """
    run, target = Run(run_dir), root / plain_name(name)
    verify(run_dir)
    if not run.baselines:
        raise ConfigError(f"{from_root(run_dir)}: no results/baselines.jsonl; there is nothing to refer to")
    if problems := unclean(run):
        raise ConfigError(
            f"{from_root(run_dir)}: {'; '.join(problems)}. A reference names what it was measured with: run it again "
            "from a clean clone"
        )
    if target.exists():
        raise ConfigError(f"{from_root(target)} is there already; choose another name")
    began = min(done.get("began_at", "") for done in run.notebooks_done.values())
    revision = (run.provenance.get("revision") or "")[:_SHORT]
    source = Source(command=f"make reproduce PROFILE={run.profile.name}", revision=revision)
    files = dict.fromkeys(("results/", "notebooks/", "profile.yaml", "provenance.json"), source)
    files = {"results/baselines.jsonl": source.model_copy(update={"notes": notes}), **files}
    manifest = Manifest(machine=machine, date=began[:10], files=files)
    shutil.copytree(run.results, target / "results")
    (target / "notebooks").mkdir()
    for notebook in sorted((run_dir / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, target / "notebooks")
    for kept in ("profile.yaml", "provenance.json"):
        shutil.copy(run_dir / kept, target)
    write_text(target / "manifest.json", json.dumps(manifest.model_dump(), indent=2) + "\n")
    write_sums(target)
    return target


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--machine", required=True, help="The machine, in words.")
    parser.add_argument("--notes", default="", help="What a reader of the comparison has to know.")
    options = parser.parse_args()
    print(from_root(import_run(options.run, options.name, options.machine, options.notes)))


if __name__ == "__main__":
    main()
