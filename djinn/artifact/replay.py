"""Replay: the figures, claims and report of reference records, drawn again where nothing can be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from djinn.artifact.progress import shown
from djinn.artifact.reference import read_manifest, runs
from djinn.artifact.report import write_report
from djinn.artifact.runner import execute, expected_s, write_page
from djinn.bench.ownership import LOCK, owned
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.names import local_folder
from djinn.places import NOTEBOOK_DIR, RUNS_DIR, from_root
from djinn.text import printable

_KEPT = (
    "*Kept as it ran on {date}, with the words and statistics of that day. The figures of index.html are drawn anew "
    "from the same records.*"
)


def replay(out: Path = RUNS_DIR) -> list[Path]:
    """Run notebook 04 on every complete set of reference records; return the run directories, ``out/replay-<name>``.

    Nothing is measured: each page and figure says whose records it shows. An earlier replay is replaced.

    Raises:
        DjinnError: the notebook failed.
        ConfigError: a run of another kind lies there, or another process or thread is at work on it.
    """
    replayed = []
    for folder in runs():
        run_dir = (local_folder(out) / f"replay-{folder.name}").absolute()
        with owned(run_dir):
            _replay(folder, Run(run_dir))
        replayed.append(run_dir)
    return replayed


def _replay(folder: Path, run: Run) -> None:
    # The lock stays: another process could lock a new one. So does what says that this is a replay, if it is killed.
    earlier = [path for path in run.folder.iterdir() if path not in (run.folder / LOCK, run.replay_path)]
    if earlier and not run.replay_path.is_file():
        raise ConfigError(f"{from_root(run.folder)}: holds a run that is no replay; choose another folder")
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    manifest = read_manifest(folder)
    write_text(run.replay_path, json.dumps({"machine": manifest.machine, "date": manifest.date}) + "\n")
    shutil.copytree(folder, run.folder, ignore=shutil.ignore_patterns("SHA256SUMS"), dirs_exist_ok=True)
    for notebook in sorted((run.folder / "notebooks").glob("*.ipynb")):
        if notebook.stem != "04_figures":  # which is executed below
            write_page(notebook, _KEPT.format(date=manifest.date))
    parameters = {"profile": from_root(run.profile_path), "run_dir": from_root(run.folder)}
    with shown(folder.name, expected_s(run.profile, "04_figures")):
        execute(NOTEBOOK_DIR / "04_figures.ipynb", run.folder, parameters)
    print(printable(f"{folder.name}: {from_root(write_report(run.folder))}"))
