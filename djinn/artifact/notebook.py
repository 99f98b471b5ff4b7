"""What the notebooks share: parameters checked before anything runs, one run directory, a sentinel at the end.

Papermill warns about a misspelt parameter and goes on with the default, and a kernel that is killed in its last
cell leaves a notebook that looks finished. So ``begin`` refuses what it does not know, and ``finish`` writes
``results/<notebook>.done.json``: without that file, a notebook did not end well.
"""

from __future__ import annotations

import ast
import difflib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Image, Markdown
from matplotlib.figure import Figure

from djinn import hardware
from djinn.artifact.answer import meaning
from djinn.artifact.bundle import write_sums
from djinn.artifact.provenance import git_state
from djinn.artifact.reference import run_of
from djinn.artifact.tables import overview
from djinn.bench.ownership import owned
from djinn.bench.run import Run
from djinn.errors import ConfigError, DjinnError
from djinn.figures.draw import PNG_DPI
from djinn.figures.style import house_style
from djinn.files import write_text
from djinn.places import ROOT, RUNS_DIR, from_root
from djinn.profiles import Profile, load_profile
from djinn.sizes import format_bytes
from djinn.text import markdown, one_line, printable

SCREEN_DPI = 144
"""How large a figure appears in a notebook: half as large again as in print."""

PARAMETERS: dict[str, tuple[tuple[type, ...], str]] = {
    "profile": ((str,), "a profile's name, or a .yaml file"),
    "run_dir": ((str,), "a folder for the results; None: artifact/runs/<profile>"),
    "model": ((str,), "a checkpoint folder, org/name@revision or synthetic:<name>"),
    "gpus": ((int,), "a whole number"),
    "budget": ((str,), "a size with its unit, such as '24 GB'"),
    "ring": ((str,), "a size with its unit"),
    "host_memory": ((str,), "a size with its unit"),
    "chunk": ((str,), "a size with its unit, such as '64 MiB'"),
    "prompt_tokens": ((int,), "a whole number"),
    "new_tokens": ((int,), "a whole number"),
    "batch": ((int,), "a whole number"),
    "runs": ((int,), "a whole number"),
    "systems": ((str, list, tuple), "names separated by commas, or a list of names"),
}
"""Every parameter of every notebook: the types it may have besides None, in Python and in words.

None means the profile's value, for all but ``profile`` itself.
"""

_INJECTED = "# Parameters\n"
"""How the cell begins that papermill puts after the parameters cell."""


@dataclass(frozen=True)
class Session:
    """One execution of one notebook: what it was asked for and where its results go."""

    name: str
    profile: Profile
    run_dir: Path
    parameters: Mapping[str, Any]
    began: float = field(default_factory=time.monotonic)
    began_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def overview(self) -> HTML:
        """Return the profile in six lines, with all settings and this machine folded."""
        machine = machine_frame(hardware.describe(self.run_dir).model_dump(mode="json"))
        return overview(self.profile, configuration_frame(self.profile), machine)

    def check(self, holds: bool, otherwise: str) -> None:
        """Stop the notebook with the words ``otherwise`` unless ``holds``.

        Raises:
            DjinnError: it does not hold.
        """
        if not holds:
            raise DjinnError(otherwise)


def begin(name: str, namespace: Mapping[str, Any]) -> Session:
    """Check the parameters in ``namespace`` (the notebook's ``globals()``) and open its run directory.

    Args:
        name: the notebook's file name without ending, such as ``01_certify``.
        namespace: where the parameters cell and papermill put their names.

    Raises:
        ConfigError: a misspelt or mistyped parameter, an impossible value, a run directory that cannot be written
            that holds the results of another configuration, or in which another process measures.
    """
    parameters = _checked(namespace)
    profile = _profile(parameters)
    given = parameters["run_dir"]
    run_dir = ROOT / Path(given).expanduser() if given else RUNS_DIR / profile.name
    run = Run.open(run_dir, profile)
    with owned(run_dir):
        run.done_path(name).unlink(missing_ok=True)
    pd.set_option("display.max_colwidth", None)  # reasons and remedies are shown whole
    title = one_line(profile.title)
    print(f"{name}: {title}; all four notebooks take about {profile.minutes:g} minutes{_took(profile, name)}")
    print(f"Results: {printable(from_root(run_dir))}")
    print(meaning(profile))
    return Session(name, profile, run_dir, parameters)


def finish(session: Session, found: str) -> None:
    """Write the sentinel that says the notebook reached its end, and checksums; the last call of the last code cell.

    Args:
        found: what the notebook found, in sentences computed from its data; they are the last thing that it says.
    """
    wall_s = time.monotonic() - session.began
    document = {
        "notebook": session.name,
        "parameters": dict(session.parameters),
        "config_digest": session.profile.digest,
        "began_at": session.began_at,
        "wall_s": round(wall_s, 3),
        **git_state(),
    }
    with owned(session.run_dir):
        write_text(Run(session.run_dir).done_path(session.name), json.dumps(document, indent=2) + "\n")
        write_sums(session.run_dir)
    print(f"{session.name}: finished in {wall_s:.0f} s\n{printable(found)}")


@house_style()
def picture(figure: Figure) -> Image:
    """Return ``figure`` as an image, for the last line of a notebook's cell."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=PNG_DPI)
    return Image(data.getvalue(), width=round(figure.get_size_inches()[0] * SCREEN_DPI))


def drawn(plot: Callable[..., Figure], *arguments: Any, **options: Any) -> Image | Markdown:
    """Return what ``plot`` draws of the arguments as an image; where it lacks records, what it lacks."""
    try:
        return picture(plot(*arguments, **options))
    except DjinnError as error:
        return Markdown(f"*Not drawn: {markdown(str(error))}.*")


def configuration_frame(profile: Profile) -> pd.DataFrame:
    """Return a profile's settings and its digest, in words: one row each."""
    settings = profile.model_dump(mode="json") | {"digest": profile.digest}
    return pd.DataFrame({"value": [_plain(value) for value in settings.values()]}, index=list(settings))


def machine_frame(machine: Mapping[str, Any]) -> pd.DataFrame:
    """Return a machine's known facts, in words: one row each."""
    known = {fact: value for fact, value in machine.items() if value not in (None, [], ())}
    return pd.DataFrame({"value": [_fact(fact, value) for fact, value in known.items()]}, index=list(map(_name, known)))


def _checked(namespace: Mapping[str, Any]) -> dict[str, Any]:
    allowed = "the parameters are " + ", ".join(PARAMETERS)
    for name in _given(namespace.get("In", ())):
        if name in PARAMETERS:
            continue
        near = difflib.get_close_matches(name, PARAMETERS, n=1)
        raise ConfigError(f"no parameter {name!r}{f'; did you mean {near[0]}?' if near else ''}; {allowed}")
    parameters = {}
    for name, (types, words) in PARAMETERS.items():
        if name not in namespace:
            raise ConfigError(f"the parameters cell does not set {name!r}; {allowed}")
        value = parameters[name] = namespace[name]
        if value is None and name != "profile":
            continue
        if isinstance(value, bool) or not isinstance(value, types):
            raise ConfigError(f"parameter {name} = {value!r} is {type(value).__name__}; expected {words}")
    return parameters


def _given(cells: Sequence[str]) -> list[str]:
    """Return the names that were given as parameters: by the last parameters cell, and by what papermill put after it.

    ``cells`` are the sources of all cells so far, as IPython keeps them. Names from elsewhere, such as a startup file,
    are nobody's parameters.
    """
    names: list[str] = []
    for cell in reversed(cells):
        own = _assigned(cell)
        is_parameters = set(PARAMETERS) <= set(own)
        if is_parameters or cell.startswith(_INJECTED):
            names = own + names
        if is_parameters:
            break
    return names


def _assigned(cell: str) -> list[str]:
    try:
        lines = ast.parse(cell).body
    except (SyntaxError, ValueError):  # IPython keeps what it could not run, too
        return []
    targets = [target for line in lines if isinstance(line, ast.Assign) for target in line.targets]
    targets += [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _profile(parameters: Mapping[str, Any]) -> Profile:
    name = parameters["profile"]
    # Jupyter runs in the notebook's folder, papermill in the shell's: relative paths mean the repository's.
    profile = load_profile(ROOT / name if name.endswith(".yaml") else name)
    changes = {
        key: value for key, value in parameters.items() if key not in ("profile", "run_dir") and value is not None
    }
    if isinstance(changes.get("systems"), str):
        changes["systems"] = [system.strip() for system in changes["systems"].split(",")]
    return profile.override(**changes)


def _took(profile: Profile, name: str) -> str:
    """Return how long the notebook took in the reference run of the profile, in words; nothing where there is none."""
    reference = run_of(profile.name)
    done = Run(reference).done(name) if reference is not None else None
    return "" if reference is None or done is None else f"; this one took {done['wall_s']:.0f} s in {reference.name}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "not set" if value is None else str(value)


def _name(fact: str) -> str:
    return fact.removesuffix("_bytes").replace("_", " ")


def _fact(fact: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_name(key)} {_fact(key, each)}" for key, each in value.items() if each is not None)
    if isinstance(value, list):
        return "; ".join(_fact(fact, each) for each in value)
    return format_bytes(value) if fact.endswith("_bytes") else str(value)
