"""What the system refuses is one line that names the file; what files hold reaches no terminal raw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabricated import failed
from typer.testing import CliRunner, Result

from djinn.bench import harness
from djinn.bench.records import append_record
from djinn.cli import main, show
from djinn.profiles import load_profile


def djinn(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, free: int) -> None:
    space = os.statvfs(disk)
    (disk / "filling").write_bytes(bytes(space.f_bavail * space.f_frsize - free))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["report", "figures", "bundle"])
def test_a_full_disk_is_one_line_and_leaves_no_part(small_disk: Path, fabricated_run: Path, command: str) -> None:
    run = small_disk / "run"
    fabricated_run.rename(fabricated_run.with_name("whole"))
    whole = fabricated_run.with_name("whole")
    assert djinn("report", str(whole)).exit_code in (0, 1)
    subprocess.run(["cp", "-r", whole, run], check=True)
    fill(small_disk, 8192)
    before = files(run)
    refused = djinn(command, str(run))
    assert refused.exit_code == 2, refused.output
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"djinn: {small_disk}/run")
    assert line.endswith(": No space left on device: free some space and run the same command again")
    assert ".part" not in line
    assert not [name for name in files(small_disk) if name.endswith(".part")]
    assert files(run) >= before
    (small_disk / "filling").unlink()
    assert djinn(command, str(run)).exit_code in (0, 1)


def test_a_baseline_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    fill(small_disk, 0)
    refused = djinn("baseline", "djinn", "--output-dir", str(small_disk / "run"))
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert "No space left on device" in line
    assert str(small_disk) in line


@pytest.mark.parametrize("command", ["figures", "report"])
def test_a_limit_on_the_size_of_files_is_one_line(fabricated_run: Path, command: str) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        f"from djinn.cli import main; main(['{command}', {str(fabricated_run)!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    (line,) = [each for each in ended.stderr.splitlines() if each.startswith("djinn: ")]
    assert "File too large: raise the limit" in line
    assert "Traceback" not in ended.stderr
    assert not list(fabricated_run.rglob("*.part"))


def test_an_error_of_the_system_without_a_file_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(show, "print_json", refused)
    monkeypatch.setattr("djinn.cli.measure.print_json", refused)
    ended = djinn("profiles", "--json")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("djinn: Input/output error: the disk or its connection fails")


HOSTILE = "[red]\x1b[31m[/x]\x07\u202e\r\n[link=http://e]"


def test_names_are_no_markup_and_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_table(["tensors"], [[HOSTILE]])
    show.print_paths([Path("/tmp/" + HOSTILE)])
    said = capsys.readouterr().out
    assert "[red]\\x1b[31m[/x]\\x07\\u202e [link=http://e]" in said
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(said)


def test_a_report_of_hostile_records_is_clean_on_the_terminal(fabricated_run: Path) -> None:
    profile = load_profile("smoke_13b")
    append_record(fabricated_run / "results/baselines.jsonl", failed(profile, "djinn", 7, "error", HOSTILE))
    shown = djinn("report", str(fabricated_run))
    assert shown.exit_code in (0, 1), shown.output
    assert not {"\x1b", "\x07", "\u202e"} & set(shown.output)
    line = harness._line(failed(profile, "djinn", 7, "error", HOSTILE))
    assert "\x1b" in line  # so that it has to be made harmless where it is shown
    certification = fabricated_run / "results" / "certify.json"
    certification.write_text(json.dumps({HOSTILE: 1}))
    refused = djinn("report", str(fabricated_run))
    assert refused.exit_code == 2
    assert not {"\x1b", "\x07", "\u202e"} & set(refused.output)


@pytest.mark.parametrize(("force", "cell"), [("1", "\x1b[32mPASS\x1b[0m"), ("", "PASS")])
def test_verdicts_have_colours_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, force: str, cell: str
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", force)
    show.print_table(["claim", "verdict", "text"], [["C1", "PASS", "PASS"], ["C2", "odd", "x"]])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "C1" in line]
    assert line.split()[1:] == [cell, "PASS"]
