"""One thread of one process at a time has a run directory; processes that it starts have it with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from djinn.bench.harness import Bench
from djinn.bench.ownership import owned
from djinn.errors import ConfigError
from djinn.profiles import load_profile

HOLD = """
import sys
from pathlib import Path
from djinn.bench.ownership import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path):
    """A process that has ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_who_has_it(other: subprocess.Popen[str], tmp_path: Path) -> None:
    scratch = tmp_path / "run" / "scratch" / "accelerate" / "weights"
    scratch.parent.mkdir(parents=True)
    scratch.write_text("of the run that is going on")
    with (
        pytest.raises(ConfigError, match=rf"run_dir .*run is in use by process {other.pid} \(-c"),
        Bench("baselines", load_profile("smoke_tiny"), tmp_path / "run", keep=True),
    ):
        pass
    assert scratch.exists()


@pytest.mark.parametrize("end", ["kill", "terminate", "close"])
def test_it_is_free_once_its_owner_has_gone_however(other: subprocess.Popen[str], tmp_path: Path, end: str) -> None:
    other.communicate() if end == "close" else getattr(other, end)()
    other.wait()
    with owned(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_it_is_its_owners_again_and_that_of_what_its_owner_starts(tmp_path: Path) -> None:
    with owned(tmp_path), owned(tmp_path):
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        child = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert child.stdout == "mine\n", child.stderr
        # Neither the inner one nor the child has given it away.
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_another_thread_is_refused_as_another_process_is(tmp_path: Path) -> None:
    def own() -> None:
        with owned(tmp_path / "run"):
            pass

    with ThreadPoolExecutor(1) as other:
        with (
            owned(tmp_path / "run"),
            pytest.raises(ConfigError, match=rf"run_dir .*run is in use by another thread of process {os.getpid()} \("),
        ):
            other.submit(own).result()
        other.submit(own).result()


def test_a_number_that_is_used_again_is_no_owner(other: subprocess.Popen[str], tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    owner = json.loads(lock.read_text())
    lock.write_text(json.dumps(owner | {"pid": os.getpid(), "created": owner["created"] + 1000}))
    with pytest.raises(ConfigError, match="in use"), owned(tmp_path / "run"):
        pass


def test_what_goes_wrong_inside_is_not_about_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing to do with it") as caught, owned(tmp_path):
        raise OSError("nothing to do with it")
    assert caught.value.filename is None
