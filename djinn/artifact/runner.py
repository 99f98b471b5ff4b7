"""The four notebooks in order through papermill, where a notebook counts as done only if it says so itself.

Papermill reports success for a kernel killed in its last cell and for ``sys.exit(0)`` half-way. So after each
notebook the runner looks for its sentinel and for cells that did not run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter

from djinn.artifact import auto, kernel
from djinn.artifact.closing import verdict_of
from djinn.artifact.progress import shown
from djinn.artifact.provenance import write_provenance
from djinn.artifact.reference import run_of
from djinn.artifact.report import write_report
from djinn.bench.ownership import owned
from djinn.bench.run import Run
from djinn.errors import ConfigError, DjinnError
from djinn.files import naming, remedy, write_text
from djinn.places import NOTEBOOK_DIR, ROOT, RUNS_DIR, from_root
from djinn.profiles import Profile, load_profile
from djinn.text import one_line, printable

NOTEBOOKS = ("01_certify", "02_baselines", "03_sweep", "04_figures")

_PAGE = Path(__file__).parent / "templates" / "notebook.html.j2"
_PROGRESS_S = "10"
"""Seconds between two states of a progress bar, as tqdm reads it: a log keeps every one of them."""


_START_S = 5.0
"""What a notebook takes besides its cells: its kernel starts, its page is written."""
_ABOUT_S = {"01_certify": 20.0, "04_figures": 5.0}
"""Seconds of the notebooks that measure no model; the other two share what is left of a profile's minutes."""


def reproduce(profile: str = "auto", run_dir: Path | None = None, *, verbose: bool = False, **overrides: Any) -> Path:
    """Run the four notebooks, say what they come to, and return the run directory with results, figures and report.

    Args:
        profile: a profile's name or file; ``auto`` takes the largest that this machine can hold, and says why.
        run_dir: an earlier run directory is continued: what it has measured is not measured again. By default a
            new one, ``artifact/runs/<profile>-<UTC time>``.
        verbose: show all that the notebooks print; it is kept in the run's ``logs`` either way.
        overrides: other values than the profile's, by the notebooks' parameter names.

    Raises:
        DjinnError: a notebook failed; it is kept as ``notebooks/<name>.failed.ipynb``.
        ConfigError: an unknown profile, or a run directory that cannot be written, holds another configuration or is
            in use.
        UnavailableError: ``auto`` found no profile that fits.
    """
    if profile == "auto":
        if run_dir is not None and Run(run_dir).has_profile:
            profile = Run(run_dir).profile.name
        else:
            choice = auto.choose()
            print(printable(choice.text()))
            profile = choice.profile.name
    chosen = load_profile(profile).override(**overrides)
    if run_dir is None:
        run_dir = RUNS_DIR / f"{chosen.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    run_dir = run_dir.absolute()
    Run.open(run_dir, chosen)
    title, logs = one_line(chosen.title), printable(from_root(run_dir / "logs"))
    print(f"{title}: four notebooks, about {chosen.minutes:g} minutes; what they print goes to {logs}", flush=True)
    named = from_root(Path(profile)) if profile.endswith(".yaml") else profile
    parameters = {"profile": named, "run_dir": from_root(run_dir), **overrides}
    with owned(run_dir):
        for name in NOTEBOOKS:
            with shown(name, expected_s(chosen, name), verbose=verbose):
                execute(NOTEBOOK_DIR / f"{name}.ipynb", run_dir, parameters)
            write_provenance(run_dir, chosen)
        write_report(run_dir)
    for what, path in (("report", "index.html"), ("figures",) * 2, ("notebooks",) * 2, ("logs",) * 2):
        print(f"{what:10}{printable(from_root(run_dir / path))}")
    print(printable(verdict_of(run_dir)))
    return run_dir


def expected_s(profile: Profile, notebook: str) -> float:
    """Return about how many seconds a notebook takes: what it took in a reference run of this very profile, if any."""
    reference = run_of(profile.name)
    same = reference is not None and Run(reference).profile.digest == profile.digest
    done = Run(reference).done(notebook) if reference and same else None
    others = len(NOTEBOOKS) - len(_ABOUT_S)
    estimate = _ABOUT_S.get(notebook, (60 * profile.minutes - sum(_ABOUT_S.values())) / others)
    return _START_S + (done["wall_s"] if done else estimate)


def execute(source: Path, run_dir: Path, parameters: dict[str, Any]) -> Path:
    """Execute one notebook into ``run_dir/notebooks`` and return the executed file; its log goes to ``run_dir/logs``.

    A page of it, for readers without Jupyter, lies beside it.

    Raises:
        DjinnError: it raised, its kernel died, it did not run every cell, or it did not reach its last call.
        ConfigError: a parameter that its parameters cell does not have, which papermill would set to no effect.
    """
    name = source.stem
    if unknown := parameters.keys() - papermill.inspect_notebook(_literally(source)).keys():
        raise ConfigError(f"{name}: its cell with the tag 'parameters' has no {', '.join(sorted(unknown))}")
    executed = run_dir / "notebooks" / f"{name}.ipynb"
    unfinished, failed = (executed.with_suffix(f".{state}.ipynb") for state in ("running", "failed"))
    executed.parent.mkdir(parents=True, exist_ok=True)
    Run(run_dir).done_path(name).unlink(missing_ok=True)
    os.environ.setdefault("TQDM_MININTERVAL", _PROGRESS_S)
    try:
        with _logged(run_dir / "logs" / f"{name}.log"):
            papermill.execute_notebook(
                _literally(source),
                _literally(unfinished),
                parameters,
                kernel_name=kernel.NAME,
                kernel_manager_class=kernel.ThisInterpreter,
                cwd=ROOT,
                log_output=True,
                extra_arguments=["--log-level=CRITICAL"],  # the kernel writes its own log to the terminal
                progress_bar=False,
                coalesce_streams=True,  # nbclient: of a progress bar, keep the last state
            )
        cause = _shortcoming(unfinished, run_dir, name)
    except Exception as error:  # papermill, nbclient and the kernel each have their own ways to fail
        if isinstance(error, OSError) and remedy(error):  # a full disk is no failure of the notebook's
            _rename(unfinished, failed)
            with naming(executed, unfinished):
                raise
        cause = _short(error)
    except BaseException:
        _rename(unfinished, failed)
        raise
    if cause:
        _rename(unfinished, failed)
        raise DjinnError(f"{name}: {cause}; see {from_root(failed)}")
    document = nbformat.read(unfinished, as_version=4)
    # Papermill writes down where on this machine they were.
    document.metadata["papermill"] |= {"input_path": from_root(source), "output_path": from_root(executed)}
    write_text(executed, nbformat.writes(document))
    unfinished.unlink()
    failed.unlink(missing_ok=True)
    write_page(executed)
    return executed


def write_page(executed: Path, note: str = "") -> Path:
    """Write an executed notebook as a page beside it, which fetches nothing from a network; return its path.

    ``note`` (Markdown) stands above it on the page.
    """
    document = nbformat.read(executed, as_version=4)
    if note:
        document.cells.insert(0, nbformat.v4.new_markdown_cell(note))
    document.metadata.pop("widgets", None)
    for output in (output for cell in document.cells for output in cell.get("outputs", ())):
        # What draws a widget would have to be fetched; a progress bar has its last state as text, too.
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    body, _ = HTMLExporter(template_file=str(_PAGE)).from_notebook_node(document)
    page = executed.with_suffix(".html")
    write_text(page, body)
    return page


def _shortcoming(executed: Path, run_dir: Path, name: str) -> str:
    """Return what is wrong with an executed notebook that papermill calls done, or nothing."""
    cells = nbformat.read(executed, as_version=4).cells
    pending = [number for number, cell in enumerate(cells) if cell.cell_type == "code" and cell.execution_count is None]
    if pending:
        return f"the kernel stopped before cell {pending[0] + 1} of {len(cells)}"
    if Run(run_dir).done(name) is None:
        return "it did not reach its end: the kernel was killed in the last cell"
    return ""


def _short(error: Exception) -> str:
    if isinstance(error, papermill.PapermillExecutionError):
        return f"cell {error.cell_index + 1}: {error.ename}: {error.evalue}"
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[-1]}"


def _literally(path: Path) -> str:
    """Return a path as papermill, which fills in what stands between braces, has to be told it."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _rename(source: Path, target: Path) -> None:
    if source.is_file():
        source.replace(target)


class _Log(logging.FileHandler):
    """Ends the notebook where its log cannot be written; logging alone would print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Let the error that is being handled go on."""
        raise


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Keep what the cells print while they run in ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("papermill")
    handler = _Log(path, mode="w")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
