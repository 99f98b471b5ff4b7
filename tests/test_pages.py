"""What the pages say exists, and what they show runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml
from launched import launch
from pages import APPENDIX, ARCHITECTURE, CLI, GENERATED, PAGES, PATHS, README, REVIEWERS, ROOT, Page
from typer.testing import CliRunner

from djinn.artifact.claims import load_claims
from djinn.artifact.pictures import picture_frame
from djinn.cli import main
from djinn.figures.headline import OURS, faster
from djinn.figures.style import LOOKS
from djinn.profiles import load_profile, profile_names
from djinn.sizes import format_bytes
from djinn.weights import resolve

SHELL = [line for page in PAGES.values() for line in page.shell]
SPANS = [span for page in PAGES.values() for span in page.spans]
COMMANDS = sorted({text for text in (*SHELL, *SPANS) if re.match(r"djinn [a-z]", text) and "COMMAND" not in text})
SCRIPTS = sorted({match[1] for text in (*SHELL, *SPANS) if (match := re.match(r"python (benchmarks/\w+\.py)", text))})
MAKE_COMMANDS = sorted({text for text in (*SHELL, *SPANS) if re.match(r"make [a-z]+[a-z-]*( |$)", text)})
NOTEBOOK_COMMANDS = [text for text in REVIEWERS.shell if text.startswith("papermill ")]
LINKS = sorted({(name, link) for name, page in PAGES.items() for link in page.links})
PYTHON = [
    pytest.param(block, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, block in enumerate(block for kind, block in page.fenced if kind == "python")
]
CODE_PATHS = sorted(
    {
        (name, span)
        for name, page in PAGES.items()
        if name not in GENERATED
        for span in page.spans
        if re.fullmatch(r"(djinn|benchmarks|notebooks|artifact|data|docs|tests)(/[\w.-]+)*", span)
        and not span.startswith(("artifact/runs", "artifact/checkpoints"))
        and span != "djinn"
    }
)


def test_readme_is_short() -> None:
    assert len(README.text.encode()) <= 10_240
    assert len(README.text.splitlines()) <= 150


def test_the_first_screen_has_picture_install_example_and_both_commands() -> None:
    first = README.text.splitlines()[:36]
    for begin in ("![", "pip install", "import djinn", "make reproduce", "make replay"):
        assert any(line.startswith(begin) for line in first), begin
    example = next(block for kind, block in README.fenced if kind == "python")
    assert len([line for line in example.splitlines() if line]) <= 6


def test_readmes_speedups_are_those_of_its_picture() -> None:
    first = README.text.split("\n## ", 1)[0]
    rows = picture_frame()
    measured = {faster(value).removesuffix(" faster") for ours in OURS for value in rows[ours]}
    said = re.findall(r"\d+(?:\.\d)?x", first)
    assert said
    assert set(said) <= measured


def test_readme_says_where_djinn_is_the_wrong_tool_and_links_every_page() -> None:
    assert "- " in README.section("When djinn is the wrong tool")
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in README.links}
    assert {path for path in PATHS if path.name not in ("README.md", "APPENDIX.md")} <= linked
    assert ROOT / "artifact" / "README.md" in linked


def test_reviewers_find_the_sections_that_they_look_for() -> None:
    assert "## Getting Started Instructions\n" in REVIEWERS.text
    assert "## Detailed Instructions\n" in REVIEWERS.text
    assert "APPENDIX.md" in REVIEWERS.links


def test_the_commands_are_on_the_reviewers_first_screen() -> None:
    first = REVIEWERS.text.splitlines()[:24]
    for target in ("reproduce", "replay", "test"):
        assert any(line.startswith(f"make {target}") for line in first)


def test_profiles_are_those_of_the_artifact() -> None:
    expected = [
        [p.name, p.model, p.device, *map(format_bytes, (p.budget, p.min_ram, p.min_disk)), f"{p.minutes:g}"]
        for p in map(load_profile, profile_names())
    ]
    assert sorted(REVIEWERS.rows("Profiles")) == sorted(expected)


def test_make_targets_are_those_of_the_makefile() -> None:
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony is not None
    targets = set(phony[1].split())
    assert {row[0].removeprefix("make ") for row in CLI.rows("Make targets")} == targets - {"help"}
    used = re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", "\n".join([*SHELL, *SPANS]))
    assert set(used) - {"g"} <= targets


def test_every_command_is_listed() -> None:
    listed = {row[0].split()[1] for row in CLI.rows("Commands") if row[0].startswith("djinn ")}
    assert listed == set(typer.main.get_command(main).commands)  # type: ignore[attr-defined]


def test_every_system_has_the_name_that_pages_show() -> None:
    assert [row[:2] for row in CLI.rows("Names of systems")] == [[name, look.label] for name, look in LOOKS.items()]


@pytest.mark.parametrize("text", COMMANDS)
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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.slow
def test_scripts_say_what_they_take(script: str) -> None:
    command = [sys.executable, script, "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    given = [text for text in (*SHELL, *SPANS) if text.startswith(f"python {script}")]
    assert {option for text in given for option in re.findall(r"--[a-z][a-z-]*", text)} <= set(
        re.findall(r"--[a-z][a-z-]*", finished.stdout)
    )


def test_they_say_where_to_look_for_every_claim() -> None:
    assert {claim.id for claim in load_claims()} <= set(re.findall(r"C\d+[ab]?", REVIEWERS.section("Where to look")))


def test_the_appendix_names_what_is_there() -> None:
    """Two pages: its parts of the system are files, its commands make's, its experiments' profiles those there are."""
    paths = [text for text in APPENDIX.spans if "/" in text]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert set(re.findall(r"PROFILE=(\w+)", APPENDIX.text)) == set(profile_names())
    assert set(re.findall(r"`make (\w+)", APPENDIX.text)) <= {"reproduce", "replay"}
    assert len(APPENDIX.text.split()) < 1200


def test_notebooks_are_all_there_with_their_command() -> None:
    stored = sorted(path.name for path in (ROOT / "notebooks").glob("0*.ipynb"))
    assert [shlex.split(text)[1] for text in NOTEBOOK_COMMANDS] == [f"notebooks/{name}" for name in stored]
    assert [f"{row[0]}.ipynb" for row in REVIEWERS.rows("The four notebooks")] == stored


@pytest.mark.parametrize("path", [row[0] for row in ARCHITECTURE.rows("Beside the package")])
def test_layout_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "path"), CODE_PATHS)
def test_files_that_pages_name_exist(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_module_has_its_line() -> None:
    """A file is named on the page of the architecture, or its folder is."""
    named = set(ARCHITECTURE.spans)
    modules = [path.relative_to(ROOT) for path in (ROOT / "djinn").rglob("*.py") if path.name != "__init__.py"]
    rooms = {"djinn/cli", "djinn/bench/systems", "djinn/bench/certify", "djinn/bench/rates"}
    missing = [
        path.as_posix()
        for path in modules
        if path.as_posix() not in named and not any(folder.as_posix() in named & rooms for folder in path.parents)
    ]
    assert missing == []


def test_tests_cite_invariants_that_are_written_down() -> None:
    numbers = re.findall(r"^(\d+)\. ", ARCHITECTURE.section("Invariants"), flags=re.M)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    cited = {number for source in sources for number in re.findall(r"[Ii]nvariant (\d+)", source)}
    assert cited
    assert cited <= set(numbers)


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (PAGES[page].path.parent / path).resolve() if path else PAGES[page].path
    assert found.exists()
    assert found.is_relative_to(ROOT)
    if anchor:
        assert anchor in Page(found).anchors


def test_extras_that_pages_name_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra for text in SHELL for extra in re.findall(r"\.\[(\w+)\]", text)}
    assert named
    assert named <= set(project["optional-dependencies"])


def test_the_workflow_runs_what_there_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony is not None
    used = {match[1] for step in steps if (match := re.match(r"make ([a-z-]+)", step))}
    assert used == {"lint", "test-fast", "reproduce"}
    assert used <= set(phony[1].split())


@pytest.mark.parametrize("block", PYTHON)
def test_python_examples_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resolve, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    ranks = re.match(r"# torchrun --nproc-per-node (\d)", block)
    if ranks:
        Path("this_file.py").write_text(block)
        ended = launch(Path("this_file.py"), int(ranks[1]), tmp_path)
        assert ended.status == 0, ended.printed
        shown = ended.printed
    else:
        exec(compile(block, "README.md", "exec"), {})
        shown = capsys.readouterr().out
    if "bytes were streamed" in block:
        streamed = re.search(r"(\d+) bytes were streamed", shown)
        assert streamed is not None
        assert int(streamed[1]) > 0
    else:
        assert {path.suffix for path in tmp_path.iterdir()} == {".pdf", ".png", ".csv", ".txt"}


@pytest.mark.parametrize("block", PYTHON)
def test_examples_run_on_machines_with_a_gpu_too(block: str) -> None:
    """CUDA alone takes more than the budgets of examples, so each of them names its device."""
    calls = re.findall(r"djinn\.(?:load|offload|plan)\((.*)\)", block)
    assert [call for call in calls if "device=" not in call] == []
