"""What README says exists, and what it shows runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from djinn.artifact.claims import load_claims
from djinn.cli import main
from djinn.config import load_profile, profile_names
from djinn.sizes import format_bytes
from djinn.weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
SHELL = [line.partition(" #")[0].strip() for kind, block in FENCED if kind == "bash" for line in block.splitlines()]
SPANS = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)
COMMANDS = [text for text in (*SHELL, *SPANS) if re.match(r"djinn [a-z]", text)]
SCRIPTS = sorted({match[1] for text in (*SHELL, *SPANS) if (match := re.match(r"python (benchmarks/\w+\.py)", text))})
MAKE_COMMANDS = sorted({text for text in (*SHELL, *SPANS) if re.match(r"make [a-z]+( |$)", text)})
APPENDIX = (ROOT / "artifact" / "APPENDIX.md").read_text()
NOTEBOOK_COMMANDS = [text for text in SHELL if text.startswith("papermill ")]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its header."""
    section = README.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table[2:]]


def test_it_has_the_sections_that_reviewers_look_for() -> None:
    assert "## Getting Started Instructions\n" in README
    assert "## Detailed Instructions\n" in README


def test_the_two_commands_are_on_the_first_screen() -> None:
    first = README.splitlines()[:24]
    assert any(line.startswith("make reproduce") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_profiles_are_those_of_the_artifact() -> None:
    expected = [
        [p.name, p.model, p.device, *map(format_bytes, (p.budget, p.min_ram, p.min_disk)), f"{p.minutes:g}"]
        for p in map(load_profile, profile_names())
    ]
    assert sorted(rows("Profiles")) == sorted(expected)


def test_make_targets_are_those_of_the_makefile() -> None:
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony is not None
    targets = set(phony[1].split())
    assert {row[0].removeprefix("make ") for row in rows("Make targets")} == targets - {"help"}
    used = re.findall(r"\bmake ([a-z]+)\b", "\n".join([*SHELL, *SPANS]))
    assert set(used) - {"g"} <= targets


def test_every_command_is_listed() -> None:
    listed = {row[0].split()[1] for row in rows("Command line")}
    assert listed == set(typer.main.get_command(main).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [text for text in COMMANDS if "COMMAND" not in text])
def test_commands_parse(text: str) -> None:
    name, *arguments = shlex.split(text)[1:]
    command = typer.main.get_command(main).commands[name]  # type: ignore[attr-defined]
    if arguments:
        command.make_context(name, arguments)


@pytest.mark.parametrize("name", sorted(typer.main.get_command(main).commands))  # type: ignore[attr-defined]
def test_every_command_has_help(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output


@pytest.mark.parametrize("text", MAKE_COMMANDS)
def test_make_knows_what_it_is_told(text: str) -> None:
    command = [argument.replace("<run>", "smoke_tiny") for argument in shlex.split(text)]
    finished = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    given = re.search(r"PROFILE=([a-z]\w+)", text)
    if given is not None and given[1] not in ("auto", "mine"):
        assert given[1] in profile_names()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_what_they_take(script: str) -> None:
    command = [sys.executable, script, "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "--run-dir" in finished.stdout


def test_it_says_where_to_look_for_every_claim() -> None:
    section = README.split("### Where to look\n", 1)[1].split("\n### ", 1)[0]
    assert {claim.id for claim in load_claims()} <= set(re.findall(r"C\d+", section))


def test_the_appendix_names_what_is_there() -> None:
    """Two pages: its parts of the system are files, its commands make's, its experiments' profiles those there are."""
    spans = re.findall(r"`([^`\n]+)`", APPENDIX)
    paths = [text for text in spans if "/" in text]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert set(re.findall(r"PROFILE=(\w+)", APPENDIX)) == set(profile_names())
    assert set(re.findall(r"`make (\w+)", APPENDIX)) <= {"reproduce", "replay"}
    assert len(APPENDIX.split()) < 1200


def test_notebooks_are_all_there_with_their_command() -> None:
    stored = sorted(path.name for path in (ROOT / "notebooks").glob("0*.ipynb"))
    assert [shlex.split(text)[1] for text in NOTEBOOK_COMMANDS] == [f"notebooks/{name}" for name in stored]
    assert [f"{row[0]}.ipynb" for row in rows("The four notebooks")] == stored


@pytest.mark.parametrize("path", [row[0] for row in rows("Where things are")])
def test_layout_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for kind, block in FENCED if kind == "python"])
def test_python_examples_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    if "bytes were streamed" in block:
        streamed = re.search(r"(\d+) bytes were streamed", capsys.readouterr().out)
        assert streamed is not None
        assert int(streamed[1]) > 0
    else:
        assert {path.suffix for path in tmp_path.iterdir()} == {".pdf", ".png", ".csv"}
