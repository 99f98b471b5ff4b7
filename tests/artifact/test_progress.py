"""A person sees that a notebook is alive and how long it still takes; a log has two lines of it."""

from __future__ import annotations

import logging
from io import StringIO

import pytest
from rich.console import Console

from djinn.artifact.progress import _Line, shown

PAPERMILL = logging.getLogger("papermill")


@pytest.fixture(autouse=True)
def chatty() -> None:
    """Papermill's logger lets through what the runner keeps."""
    PAPERMILL.setLevel(logging.INFO)


def drawn(line: _Line, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(line)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_has_a_line_at_the_start_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with shown("02_baselines", 125):
        PAPERMILL.info("run 1 of 12")
    assert capsys.readouterr().err == "02_baselines  takes about 02:05\n02_baselines  done in 00:00\n"


def test_verbose_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with shown("02_baselines", 125, verbose=True):
        PAPERMILL.info("run 1 of 12")
    assert capsys.readouterr().err.splitlines()[1] == "run 1 of 12"
    PAPERMILL.info("of somebody else")
    assert capsys.readouterr().err == ""


def test_one_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), shown("02_baselines", 125):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("02_baselines  stopped after 00:00\n")


def test_a_terminal_shows_what_is_measured_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    with shown("02_baselines", 125):
        PAPERMILL.info("djinn, run 1 of 12")
    said = capsys.readouterr().err
    assert "djinn, run 1 of 12" in said
    assert "about 02:0" in said
    assert "takes about" not in said
    assert said.endswith("02_baselines  done in 00:00\n")


def test_the_line_shows_the_last_that_the_cell_printed() -> None:
    line = _Line("02_baselines", 125)
    for message in ("first", "a table\nits last row", "\rbaselines: 25%\rbaselines: 50%"):
        line.emit(logging.makeLogRecord({"msg": message}))
    assert "baselines: 50%" in drawn(line)
    assert "25%" not in drawn(line)
    line.emit(logging.makeLogRecord({"msg": "Ending Cell 4----"}))
    assert "Ending" not in drawn(line)
    assert "50%" not in drawn(line)


def test_a_narrow_terminal_cuts_what_was_printed_and_keeps_the_time_left() -> None:
    line = _Line("02_baselines", 125.5)
    line.emit(logging.makeLogRecord({"msg": "x" * 200}))
    said = drawn(line, width=80)
    assert len(said.splitlines()) == 1
    assert "00:00, about 02:05 left" in said
    assert "…" in said


def test_what_takes_longer_than_expected_says_so() -> None:
    assert "longer than expected" in drawn(_Line("02_baselines", 0))
