"""A command that is told to end ends as Ctrl-C ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from djinn.cli.ending import terminable

WAIT = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
from pathlib import Path
from djinn import profiles
from djinn.cli import main
from djinn.files import unfinished

def wait():
    with unfinished(Path(sys.argv[1])) as part:
        part.write_text("half")
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)  # cleaning up takes a while
            print("cleaned up", flush=True)

profiles.profile_names = wait
main(["profiles"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_it_cleans_up_however_often_it_is_told(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", WAIT, str(tmp_path / "file.txt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    if number != signal.SIGINT:
        threading.Timer(0.2, process.send_signal, [number]).start()
    said, errors = process.communicate(timeout=30)
    assert (said, process.returncode) == ("cleaned up\n", code), errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_what_is_ignored_stays_ignored_and_what_was_there_comes_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_hears_no_signals() -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with terminable():
                pass
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == []
