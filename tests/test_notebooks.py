"""The notebooks' contract, and the notebooks executed as README says."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook_contract import code_of, faults

from djinn.artifact import notebook, runner
from djinn.artifact.bundle import verify
from djinn.bench.run import Run
from djinn.profiles import load_profile

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
EXAMPLE = ROOT / "notebooks" / "example_own_model.ipynb"


def papermill(name: str, out: Path, *parameters: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb", str(out), "--no-progress-bar", *parameters]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_runner_runs_every_notebook():
    assert tuple(path.stem for path in NOTEBOOKS) == runner.NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestContract:
    def test_one_parameters_cell_of_plain_literals(self, path: Path):
        tagged = [cell for cell in code_of(path) if "parameters" in cell.metadata.get("tags", [])]
        body = ast.parse(tagged[0].source).body
        names = [line.targets[0].id for line in body if isinstance(line, ast.Assign)]  # type: ignore[attr-defined]
        assert names == list(notebook.PARAMETERS)
        assert tagged[0].source.count("# help: ") == len(names)

    def test_the_next_code_cell_checks_them(self, path: Path):
        cells = code_of(path)
        assert f'session = begin("{path.stem}", globals())' in cells[1].source
        assert cells[-1].source.splitlines()[-1].startswith("finish(session, ")

    def test_thin_stripped_and_nothing_that_papermill_would_let_pass(self, path: Path):
        assert faults(path) == []

    def test_runs_anywhere(self, path: Path):
        document = nbformat.read(path, as_version=4)
        nbformat.validate(document)
        assert document.metadata.kernelspec.name == "python3"
        assert not re.search(r"""["' (](/|~/|[A-Z]:\\)\w""", "\n".join(cell.source for cell in document.cells))

    def test_says_what_it_claims_and_what_to_expect(self, path: Path):
        cells = nbformat.read(path, as_version=4).cells
        assert cells[0].source.startswith("# ")
        assert cells[1].source.startswith("## What to expect")

    def test_every_figure_has_a_cell_of_its_own_and_words_before_it(self, path: Path):
        cells = nbformat.read(path, as_version=4).cells
        for before, cell in itertools.pairwise(cells):
            figures = len(re.findall(r"\b(?:drawn|picture)\(", cell.source)) if cell.cell_type == "code" else 0
            assert figures <= 1
            assert not figures or before.cell_type == "markdown"


@pytest.mark.slow
def test_the_example_breaks_no_contract_and_says_what_limits(tmp_path: Path):
    assert faults(EXAMPLE) == []
    document = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(document)
    assert document.metadata.kernelspec.name == "python3"
    done = papermill("example_own_model", tmp_path / "out.ipynb", "-p", "new_tokens", "2")
    assert done.returncode == 0, done.stderr
    *_, generated, report, figure = (cell.outputs for cell in code_of(tmp_path / "out.ipynb")[:6])
    said = "".join(output.text for output in generated if output.output_type == "stream")
    match = re.search(r"^new text: .*, of the tokens \[\d+, \d+\]$", said, flags=re.M)
    assert match is not None, said
    report, figure = report[-1].data, figure[-1].data
    assert "what limits" in report["text/html"]
    assert "..." not in report["text/html"]  # nothing cut short
    assert "image/png" in figure


@pytest.mark.slow
def test_a_misspelt_parameter_stops_papermill(tmp_path: Path):
    done = papermill("04_figures", tmp_path / "out.ipynb", "-p", "modle", "70b", "-p", "run_dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "no parameter 'modle'; did you mean model?; the parameters are profile, run_dir, " in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistyped_parameter_stops_papermill(tmp_path: Path):
    done = papermill(
        "02_baselines", tmp_path / "out.ipynb", "-p", "runs", "1e5", "-p", "run_dir", str(tmp_path / "run")
    )
    assert done.returncode != 0
    assert "parameter runs = 100000.0 is float; expected a whole number" in done.stderr


@pytest.mark.slow
def test_names_of_a_startup_file_are_nobodys_parameters(
    fabricated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("pi = 3.14\nnames = ['a', 'b']\nmodle = '70b'\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    given = ("-p", "profile", "smoke_13b", "-p", "run_dir", str(fabricated_run))
    done = papermill("04_figures", tmp_path / "out.ipynb", *given)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_figures_are_drawn_from_partial_records_alone(fabricated_run: Path, tmp_path: Path):
    (fabricated_run / "results" / "sweep.jsonl").unlink()
    given = ("-p", "profile", "smoke_13b", "-p", "run_dir", str(fabricated_run))
    done = papermill("04_figures", tmp_path / "out.ipynb", *given)
    assert done.returncode == 0, done.stderr
    assert (fabricated_run / "index.html").is_file()
    assert Run(fabricated_run).done("04_figures") is not None
    assert verify(fabricated_run) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_tiny_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run_dir = runner.reproduce("smoke_tiny", tmp_path / "run")
    for name in runner.NOTEBOOKS:
        assert (run_dir / "notebooks" / f"{name}.ipynb").is_file()
    profile = load_profile("smoke_tiny")
    html = (run_dir / "index.html").read_text()
    assert profile.title in html
    assert "2 of 2 claims that apply here pass" in html
    assert len(list((run_dir / "figures").glob("*.pdf"))) == 10
    assert not (run_dir / "scratch").exists()
    assert verify(run_dir) > 0
    assert "index.html" in capfd.readouterr().out
