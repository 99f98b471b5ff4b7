"""The lock file, the conda environment, the Makefile and the licence say the same as pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import djinn
from djinn.cli.commands import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    locked = {canonicalize_name(pin.name): pin for pin in pins()}
    asked = [*PROJECT["dependencies"], *(each for extra in PROJECT["optional-dependencies"].values() for each in extra)]
    for text in asked:
        requirement = Requirement(text)
        pin = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned_version(pin)), text


def test_lock_names_exact_versions_and_no_index_or_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert all(pinned_version(pin) and pin.url is None for pin in pins())
    assert not re.search(r"^\s*--|://|/[a-z]+/", re.sub(r"^#.*", "", text, flags=re.M), flags=re.M)


def test_lock_leaves_cuda_to_the_torch_builds_that_need_it() -> None:
    cuda = [pin.name for pin in pins() if re.match(r"nvidia-|cuda-|triton", pin.name)]
    assert cuda == ["nvidia-ml-py"]


def test_conda_environment_has_no_version_of_its_own() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [each["pip"] for each in environment["dependencies"] if isinstance(each, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    conda = {
        name: version for name, _, version in (d.partition("=") for d in environment["dependencies"] if "pip" not in d)
    }
    assert conda.pop("python") in SpecifierSet(PROJECT["requires-python"])
    assert not conda.keys() & {pin.name for pin in pins()}
    assert not any(conda.values())


def test_the_image_names_its_base_exactly_and_installs_what_make_does() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    base = re.findall(r"^FROM python:(\d+\.\d+)\.\d+-slim-[a-z]+$", recipe, flags=re.M)
    assert len(base) == 1  # one stage, with its patch release and its distribution
    assert f"python={base[0]}" in (ROOT / "environment.yml").read_text()
    assert "RUN make env\n" in recipe
    copied = [name for names in re.findall(r"^COPY (.*) \S+$", recipe, flags=re.M) for name in names.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_running_environment_is_the_locked_one() -> None:
    from importlib.metadata import version

    for name in ("torch", "transformers", "accelerate", "pydantic"):
        (pin,) = [pin for pin in pins() if pin.name == name]
        assert version(name).partition("+")[0] == pinned_version(pin)


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture
def bare_clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def interpreter(folder: Path, body: str) -> Path:
    """An interpreter of another kind, as far as the Makefile can tell."""
    path = folder / "other-python"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_refuses_an_old_python_and_names_it(bare_clone: Path) -> None:
    old = interpreter(bare_clone, "sys.version_info = (3, 9, 18)\nexec(sys.argv[2])")
    finished = make(bare_clone, "env", f"PYTHON={old}")
    assert finished.returncode != 0
    assert "needs Python 3.11 or later" in finished.stderr
    assert "3.9.18" in finished.stderr
    assert not (bare_clone / ".venv").exists()


def test_make_says_which_python_is_missing(bare_clone: Path) -> None:
    finished = make(bare_clone, "env", "PYTHON=python3.nothing")
    assert finished.returncode != 0
    assert "no python3.nothing" in finished.stderr


def test_make_leaves_no_stamp_when_installing_fails(bare_clone: Path) -> None:
    """The next `make` has to try again, and pip's own message has to be seen."""
    python = bare_clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    body = "if sys.argv[-1] != '--version': sys.exit('ERROR: no matching distribution')"
    interpreter(bare_clone, body).rename(python)
    finished = make(bare_clone, "env")
    assert finished.returncode != 0
    assert "no matching distribution" in finished.stderr
    assert not (bare_clone / ".venv/.installed").exists()


def test_make_clean_keeps_runs_and_says_what_it_removes(bare_clone: Path) -> None:
    for name in ("artifact/runs/mine/results", "artifact/checkpoints/tiny", "djinn/__pycache__", ".venv/bin"):
        (bare_clone / name).mkdir(parents=True)
    finished = make(bare_clone, "clean")
    assert finished.returncode == 0, finished.stderr
    assert (bare_clone / "artifact/runs/mine/results").is_dir()
    assert (bare_clone / ".venv/bin").is_dir()
    assert not (bare_clone / "artifact/checkpoints").exists()
    assert not (bare_clone / "djinn/__pycache__").exists()
    assert "artifact/checkpoints" in finished.stdout


def test_there_is_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert djinn.__version__ == PROJECT["version"] == citation["version"]
    assert f"\n## [{djinn.__version__}]" in changes


def test_every_extra_names_the_modules_that_it_brings() -> None:
    """What the message on a missing package says would install it."""
    brought_along = {
        "IPython": "jupyterlab", "ipykernel": "jupyterlab", "jupyter_client": "jupyterlab", "matplotlib": "seaborn",
        "nbclient": "nbconvert",
    }  # fmt: skip
    assert EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"test"}
    for extra, names in EXTRAS.items():
        brought = {Requirement(text).name for text in PROJECT["optional-dependencies"][extra]}
        assert {brought_along.get(name, name) for name in names} <= brought


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("papermill", ["reproduce", "--profile", "smoke_tiny"], "artifact"),
        ("pandas", ["baseline", "djinn", "--profile", "smoke_tiny"], "artifact"),
        ("matplotlib", ["figures", "nowhere"], "artifact"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(missing: str, command: list[str], extra: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from djinn.cli import main; main({command})"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr == f"djinn: {command[0]} needs {missing}: pip install 'djinn[{extra}]'\n"
    assert finished.stdout == ""


def test_plans_and_measurements_of_this_machine_need_no_extra(tmp_path: Path) -> None:
    """The core dependencies alone; what continuous integration installs in an environment of its own."""
    blocked = [name for names in EXTRAS.values() for name in names]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); from djinn.cli import main; "
        "main(['plan', 'synthetic:llama-tiny', '--budget', '5 MB', '--prompt-tokens', '8', '--device', 'cpu'])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
