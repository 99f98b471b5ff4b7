"""Nine ways in which papermill 2.7 reports success for a notebook that failed, and what stands against each.

Here, with real papermill: a parameters cell without its tag, values derived in it, annotated names in it, errors that
are caught. In ``test_notebooks.py``: a misspelt parameter, a value that YAML reads as another type. In
``artifact/test_runner.py``: a killed kernel, also in the last cell; ``sys.exit(0)`` half-way; what a failure leaves.
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from notebook_contract import faults

from djinn.artifact import runner
from djinn.bench.run import Run
from djinn.errors import ConfigError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def probe(path: Path, *cells: str) -> Path:
    """Write a notebook whose first cell is tagged as the parameters."""
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    document.cells[0].metadata["tags"] = ["parameters"]
    document.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(document, path)
    return path


def run(path: Path, **parameters: object) -> nbformat.NotebookNode:
    """Execute a notebook with papermill alone; return what it left."""
    out = path.with_suffix(".out.ipynb")
    return papermill.execute_notebook(path, out, parameters, progress_bar=False, cwd=path.parent)


@pytest.mark.slow
def test_without_its_tag_the_parameters_cell_wins_and_papermill_says_otherwise(fabricated_run: Path, tmp_path: Path):
    document = nbformat.read(NOTEBOOKS / "04_figures.ipynb", as_version=4)
    (cell,) = [cell for cell in document.cells if cell.metadata.get("tags")]
    cell.metadata["tags"] = []
    cell.source = cell.source.replace("run_dir = None", f"run_dir = {str(fabricated_run)!r}").replace(
        "smoke_tiny", "smoke_13b"
    )
    source = tmp_path / "04_figures.ipynb"
    nbformat.write(document, source)

    executed = run(source, profile="smoke_tiny")
    assert executed.metadata.papermill.parameters["profile"] == "smoke_tiny"
    used = Run(fabricated_run).done("04_figures")
    assert used is not None
    assert used["parameters"]["profile"] == "smoke_13b"  # what ran, not what was asked for
    provenance = json.loads((fabricated_run / "provenance.json").read_text())
    assert provenance["profile"]["name"] == "smoke_13b"

    assert "0 cells are tagged parameters" in faults(source)
    with pytest.raises(ConfigError, match="'parameters' has no profile"):
        runner.execute(source, tmp_path / "other", {"profile": "smoke_tiny"})
    assert not (tmp_path / "other").exists()


def test_a_value_derived_in_the_parameters_cell_keeps_its_origin(tmp_path: Path):
    source = probe(tmp_path / "probe.ipynb", "runs = 1\ntwice = 2 * runs", "print(runs, twice)")
    assert run(source, runs=5).cells[-1].outputs[0].text == "5 2\n"
    assert faults(source) == ["parameters: twice = 2 * runs is no plain literal"]


def test_an_annotated_parameter_is_refused(tmp_path: Path):
    cell = "from typing import Literal\nmode: Literal['a', 'b'] = 'a'"
    source = probe(tmp_path / "probe.ipynb", cell, "print(mode)")
    assert any("mode: Literal" in fault for fault in faults(source))
    with pytest.raises(ConfigError, match="has no mode"):
        runner.execute(source, tmp_path / "run", {"mode": "b"})


def test_an_error_that_is_caught_is_refused(tmp_path: Path):
    source = probe(
        tmp_path / "probe.ipynb", "runs = 1", "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    print(e)"
    )
    assert run(source).metadata.papermill.exception is None
    assert faults(source) == ["cell 2: an error is caught, and papermill would call it success"]


@pytest.mark.parametrize("call", ["exit()", "sys.exit(0)", "os._exit(0)"])
def test_leaving_early_is_refused(tmp_path: Path, call: str):
    source = probe(tmp_path / "probe.ipynb", "runs = 1", f"import os, sys\n{call}")
    assert faults(source) == [f"cell 2: {call} ends the kernel, and papermill would call it success"]
