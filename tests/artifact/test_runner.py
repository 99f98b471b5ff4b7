"""Papermill reports success for notebooks that did not finish; the runner does not."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from fabricated import fabricated

from djinn.artifact import runner
from djinn.bench import ownership
from djinn.bench.ownership import owned
from djinn.bench.records import append_record
from djinn.errors import ConfigError, DjinnError
from djinn.profiles import load_profile

PARAMETERS = "run_dir = None"
SENTINEL = """
from pathlib import Path
Path(run_dir, "results").mkdir(parents=True, exist_ok=True)
Path(run_dir, "results", "probe.done.json").write_text('{"wall_s": 1}')
"""


@pytest.fixture
def run(tmp_path: Path):
    """Execute a notebook of the given cells with the runner; return the run directory."""

    def execute(*cells: str, name: str = "run") -> Path:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, *cells)])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, tmp_path / "probe.ipynb")
        runner.execute(tmp_path / "probe.ipynb", tmp_path / name, {"run_dir": str(tmp_path / name)})
        return tmp_path / name

    return execute


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "notebooks").iterdir())


def test_a_notebook_that_ends_well_is_kept_under_its_name(run, tmp_path: Path):
    (tmp_path / "run" / "notebooks").mkdir(parents=True)
    (tmp_path / "run" / "notebooks" / "probe.failed.ipynb").write_text("of an earlier try")
    run("print('so far so good')", SENTINEL)
    assert left(tmp_path) == ["probe.html", "probe.ipynb"]
    assert "so far so good" in (tmp_path / "run" / "notebooks" / "probe.html").read_text()
    written = nbformat.read(tmp_path / "run" / "notebooks" / "probe.ipynb", as_version=4)
    assert "input_path" in written.metadata["papermill"]
    assert "so far so good" in (tmp_path / "run" / "logs" / "probe.log").read_text()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"], "died"),
        (["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", SENTINEL], "died"),
        (["import sys\nsys.exit(0)", SENTINEL], "the kernel stopped before cell"),
        (["1 / 0", SENTINEL], "cell 3: ZeroDivisionError: division by zero"),
        (["'no sentinel'"], "it did not reach its end"),
    ],
    ids=["killed in the last cell", "killed half-way", "sys.exit(0) half-way", "an exception", "no sentinel"],
)
def test_a_notebook_that_does_not_is_a_failure_and_is_kept_as_one(run, tmp_path: Path, cells: list[str], message: str):
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / "results" / "probe.done.json").write_text("of an earlier execution")
    with pytest.raises(DjinnError, match=message) as caught:
        run(*cells)
    assert "probe.failed.ipynb" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == ["probe.failed.ipynb"]


def test_an_unknown_profile_or_override_stops_before_anything_is_made(tmp_path: Path):
    with pytest.raises(ConfigError, match="no profile 'smoke'"):
        runner.reproduce("smoke", tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown key rnus; did you mean runs"):
        runner.reproduce("smoke_tiny", tmp_path / "run", rnus=1)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_written_stops_before_a_kernel_starts(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        runner.reproduce("smoke_tiny", tmp_path / "file" / "run")


def test_a_run_ends_with_its_verdict(
    fabricated_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    over = fabricated(load_profile("smoke_13b"), "djinn", 0, peak_device_bytes=5_000_000_000)
    append_record(fabricated_run / "results" / "baselines.jsonl", over)
    monkeypatch.setattr(runner, "execute", lambda *_: None)
    runner.reproduce("smoke_13b", fabricated_run)
    said = capsys.readouterr()
    counts, failed = said.out.splitlines()[-2:]
    assert counts == (
        "5 of 6 claims that apply here pass; 12 need a GPU; 1 was not measured; 1 needs a run that the disk limits; "
        "1 needs a mixture of experts; "
        "per token djinn is 1.8x faster than DeepSpeed ZeRO-3, disk"
    )
    assert failed.startswith("FAIL C2: Peak device memory stays within the budget: 1.163 is not <= 1 of the budget")
    assert f"{fabricated_run}/logs" in said.out
    assert [line.split()[0] for line in said.err.splitlines()] == [name for name in runner.NOTEBOOKS for _ in range(2)]


def test_a_notebook_is_expected_to_take_what_it_took_in_the_reference_run():
    assert runner.expected_s(load_profile("smoke_13b"), "02_baselines") == pytest.approx(688 + 5, abs=0.1)
    alone = [runner.expected_s(load_profile("smoke_tiny"), name) for name in runner.NOTEBOOKS]
    assert sum(alone) == pytest.approx(2 * 60 + 4 * 5)
    assert min(alone) > 5


@pytest.mark.parametrize("name", ["{}", "{x}", "a{0}b", "{{y}}", "100%"])
def test_a_folders_name_is_no_template(run, tmp_path: Path, name: str):
    assert run(SENTINEL, name=name) == tmp_path / name
    assert (tmp_path / name / "notebooks" / "probe.ipynb").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "probe.ipynb"])


def test_notebooks_run_in_this_interpreter_whatever_kernels_there_are(run, tmp_path: Path, monkeypatch):
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    where = run("import sys\nprint('ran in', sys.executable)", SENTINEL)
    assert f"ran in {sys.executable}" in (where / "logs" / "probe.log").read_text()


def test_the_kernel_works_in_the_directory_that_its_parent_has(run, tmp_path: Path):
    cell = "from pathlib import Path\nfrom djinn.bench.ownership import owned\nwith owned(Path(run_dir)): print('mine')"
    with owned(tmp_path / "run"):
        where = run(cell, SENTINEL)
    assert "mine" in (where / "logs" / "probe.log").read_text()


def test_a_second_reproduction_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ownership, "_line", lambda _: set())  # as another process would see it
    with owned(tmp_path / "run"), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        runner.reproduce("smoke_tiny", tmp_path / "run")
    assert not (tmp_path / "run" / "notebooks").exists()


def test_a_log_that_cannot_be_written_ends_the_notebook(run, tmp_path: Path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "probe.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*probe\.ipynb'"):
        run("print('x')", SENTINEL)


def test_a_page_of_a_notebook_fetches_nothing_and_shows_progress_as_text(tmp_path: Path) -> None:
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Loading: 100%"}
    output = nbformat.v4.new_output("display_data", data=bar)
    cell = nbformat.v4.new_code_cell("load()", outputs=[output], execution_count=1)
    document = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("a $formula$")])
    document.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    executed = tmp_path / "01_certify.ipynb"
    nbformat.write(document, executed)
    page = runner.write_page(executed, "*Kept as it ran.*").read_text()
    assert "<em>Kept as it ran.</em>" in page
    assert "Loading: 100%" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(.?https?:", page)
